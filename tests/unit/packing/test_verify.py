"""Verification finds and names every cut and flipped byte; repair restores lost files byte for byte."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from karmma_dist.cli import main
from karmma_dist.errors import UserError
from karmma_dist.io.files import sha256_of, write_json
from karmma_dist.packing.pack import pack
from karmma_dist.packing.spec import PackingSpec
from karmma_dist.packing.tars.lock import folder_lock
from karmma_dist.packing.tars.writer import write_tar
from karmma_dist.packing.verify.clip import Shown, early_ends
from karmma_dist.packing.verify.repair import repair
from karmma_dist.packing.verify.verify import verify
from karmma_dist.shards.folder import ShardFolder
from karmma_dist.shards.format import index_path, member_name
from karmma_dist.shards.index import build_index
from kits.packing import epic_spec, folder_bytes, movie_path, row, write_epic, write_movie

SHARDS = ("train-000000.tar", "train-000001.tar", "validation-000000.tar")


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write recordings with and without audio and video; one clip ends after its recording."""
    root = tmp_path_factory.mktemp("raw")
    write_movie(movie_path(root, "P01_01"), frames=60, bursts=[0.5])
    write_movie(movie_path(root, "P01_02"), frames=60)
    write_movie(movie_path(root, "P02_01"), bursts=[0.5], seconds=2.4)
    train = [row(f"{name}_{n}", name, f"00:00:00.{20 * n:02d}", f"00:00:01.{20 * n:02d}", verb_class=n % 2)
             for name in ("P01_01", "P01_02", "P02_01") for n in range(2)]  # fmt: skip
    late = row("P01_01_9", "P01_01", "00:00:01.50", "00:00:02.80")
    return write_epic(root, train, [row("P01_01_8", "P01_01"), late])


def spec(raw: Path, out: Path) -> PackingSpec:
    return epic_spec(raw, out, clips_per_shard=4)


@pytest.fixture(scope="module")
def packed(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pack the reference, which no test changes."""
    out = tmp_path_factory.mktemp("packed")
    pack(spec(raw, out))
    assert sorted(path.name for path in out.glob("*.tar")) == sorted(SHARDS)
    return out


@pytest.fixture
def copy(packed: Path, tmp_path: Path) -> Path:
    """Copy the reference, to be damaged."""
    out = tmp_path / "copy"
    shutil.copytree(packed, out)
    return out


def flip(path: Path, place: int, bit: int = 0) -> None:
    """Flip one bit of a file."""
    with open(path, "r+b") as file:
        file.seek(place)
        value = file.read(1)[0]
        file.seek(place)
        file.write(bytes([value ^ (1 << bit)]))


def kinds(folder: Path, *, full: bool = False) -> set[tuple[str | None, str]]:
    """Return file and kind of every finding."""
    return {(finding.shard, finding.kind) for finding in verify(folder, full=full).findings}


def test_what_was_packed_is_whole_and_verifying_changes_nothing(packed: Path) -> None:
    before = folder_bytes(packed)
    told: dict[bool, list[tuple[int, int]]] = {False: [], True: []}
    for full, steps in told.items():
        result = verify(packed, full=full, progress=lambda _, done, total, to=steps: to.append((done, total)))
        assert result.whole, result.findings
        assert steps == sorted(steps)
        assert steps[-1][0] == steps[-1][1]
    assert folder_bytes(packed) == before


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(SHARDS), st.floats(0, 1, exclude_max=True))
def test_a_shard_cut_at_any_block_is_found_fast_and_named(copy: Path, shard: str, share: float) -> None:
    tar = copy / shard
    content = tar.read_bytes()
    os.truncate(tar, int(share * len(content) / 512) * 512)
    try:
        for full in (False, True):
            findings = verify(copy, full=full).findings
            assert {finding.shard for finding in findings} == {shard}
            cut = {finding.key for finding in findings if finding.key}
            size = tar.stat().st_size
            expected = {
                clip.key
                for split in ShardFolder(copy).splits
                for clip in ShardFolder(copy).clips(split)
                if clip.shard == shard and any(m and m.offset + m.size > size for m in clip.members.values())
            }
            assert cut == expected
    finally:
        tar.write_bytes(content)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(SHARDS), st.floats(0, 1, exclude_max=True), st.integers(0, 7))
def test_the_full_check_finds_any_flipped_bit_of_tars(copy: Path, shard: str, share: float, bit: int) -> None:
    tar = copy / shard
    place = int(share * tar.stat().st_size)
    flip(tar, place, bit)
    try:
        findings = verify(copy, full=True).findings
        assert (shard, "sha256") in {(finding.shard, finding.kind) for finding in findings}
        for split in ShardFolder(copy).splits:
            for clip in ShardFolder(copy).clips(split):
                for name, member in clip.members.items():
                    if clip.shard == shard and member and member.offset <= place < member.offset + member.size:
                        assert (clip.key, name, "crc32") in {(f.key, f.member, f.kind) for f in findings}
    finally:
        flip(tar, place, bit)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["manifest.json", "train-000001.index.json"]), st.floats(0, 1, exclude_max=True))
def test_flipped_bits_of_manifest_and_index_are_repaired(copy: Path, name: str, share: float) -> None:
    path = copy / name
    content = path.read_bytes()
    # Only the manifest holds the name and sha256 of a tar. Everything else follows from these.
    proofs = [proof.encode() for shard in SHARDS for proof in (f'"{shard}"', sha256_of(copy / shard))]
    flip(path, int(share * (len(content) - 1)))  # the last byte is the newline that ends the file
    try:
        if not any(verify(copy, full=full).findings for full in (False, True)):
            assert json.loads(path.read_bytes()) == json.loads(content)
            return
        proven = name != "manifest.json" or all(proof in path.read_bytes() for proof in proofs)
        repair(copy)
        if proven:
            assert path.read_bytes() == content
        assert verify(copy, full=True).whole == (path.read_bytes() == content)
    finally:
        path.write_bytes(content)


def test_every_lost_index_comes_back_byte_for_byte(copy: Path, packed: Path) -> None:
    for path in copy.glob("*.index.json"):
        path.unlink()
    assert {kind for _, kind in kinds(copy)} == {"index"}
    done = repair(copy)
    assert len(done.written) == len(SHARDS)
    assert folder_bytes(copy) == folder_bytes(packed)
    assert repair(copy).written == []


def test_one_index_restores_a_lost_manifest_byte_for_byte(copy: Path, packed: Path) -> None:
    (copy / "manifest.json").unlink()
    for shard in SHARDS[1:]:
        index_path(copy / shard).unlink()
    assert kinds(copy) == {("manifest.json", "manifest")}
    repair(copy)
    assert folder_bytes(copy) == folder_bytes(packed)


def test_a_manifest_that_contradicts_its_indexes_is_written_again(copy: Path, packed: Path) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    for change in (
        {"heads": manifest["heads"] | {"verb": ["put", "take"]}},
        {"label_counts": manifest["label_counts"] | {"train": {"verb": [1, 5], "noun": [0, 6, 0]}}},
        {"made_with": {}},
    ):
        write_json(copy / "manifest.json", manifest | change)
        assert kinds(copy) == {("manifest.json", "manifest")}
        repair(copy)
        assert folder_bytes(copy) == folder_bytes(packed)


def test_class_names_that_are_nowhere_are_not_made_up(copy: Path) -> None:
    (copy / "manifest.json").unlink()
    for path in copy.glob("*.index.json"):
        path.unlink()
    before = folder_bytes(copy)
    done = repair(copy)
    assert [finding.kind for finding in done.findings] == ["manifest"]
    assert "class names" in done.findings[0].what
    assert folder_bytes(copy) == before


def test_clips_of_lost_shards_are_named_and_packed_again(raw: Path, copy: Path, packed: Path) -> None:
    lost = {clip.key for clip in ShardFolder(packed).clips("train") if clip.shard == SHARDS[1]}
    (copy / SHARDS[1]).unlink()
    for _ in range(2):
        findings = verify(copy).findings
        assert {finding.key for finding in findings if finding.kind == "lost" and finding.key} == lost
        (copy / "manifest.json").unlink(missing_ok=True)
        repair(copy)
    assert {clip.key for clip in ShardFolder(copy).clips("train")}.isdisjoint(lost)
    assert pack(spec(raw, copy)).status == "packed"
    assert folder_bytes(copy) == folder_bytes(packed)


def test_a_shard_lost_with_its_index_is_missed_by_number(raw: Path, copy: Path, packed: Path) -> None:
    for path in (copy / "manifest.json", copy / SHARDS[0], index_path(copy / SHARDS[0])):
        path.unlink()
    repair(copy)
    assert [f.what for f in verify(copy).findings] == [
        "split train: 3 planned clips are neither in a shard nor in failures.jsonl"
    ]
    assert pack(spec(raw, copy)).status == "packed"
    assert folder_bytes(copy) == folder_bytes(packed)


def test_a_damaged_tar_gets_no_index_and_manifest_entry(copy: Path, packed: Path) -> None:
    tar = copy / SHARDS[0]
    clip = next(clip for clip in ShardFolder(copy).clips("train") if clip.shard == tar.name)
    member = clip.members["json"]
    assert member is not None
    content = tar.read_bytes()
    for harm in ("header", "cut", "payload"):
        if harm == "header":
            flip(tar, member.offset - 400)
        elif harm == "cut":
            os.truncate(tar, (member.offset + member.size + 511) // 512 * 512)
        else:
            flip(tar, next(m for name, m in clip.members.items() if m and name != "json").offset + 9)
        damaged = tar.read_bytes()
        index_path(tar).unlink()
        repair(copy)
        assert not index_path(tar).exists()
        manifest = (copy / "manifest.json").read_bytes()
        (copy / "manifest.json").unlink()
        repair(copy)
        assert [shard.name for shard in ShardFolder(copy).manifest.splits["train"].shards] == [SHARDS[1]]
        assert tar.read_bytes() == damaged
        tar.write_bytes(content)
        (copy / "manifest.json").write_bytes(manifest)
        repair(copy)
        assert folder_bytes(copy) == folder_bytes(packed)


def rewritten(copy: Path, change: Callable[[str, dict[str, bytes], dict[str, Any]], None]) -> str:
    """Write the first shard again, index and manifest consistently, after `change(key, members, metadata)`.

    Returns the key of its first clip that has every modality.
    """
    folder, tar = ShardFolder(copy), copy / SHARDS[0]
    clips = [clip for clip in folder.clips("train") if clip.shard == tar.name]
    chosen = next(clip.key for clip in clips if all(clip.has(m) for m in folder.modalities))
    samples = []
    for clip in clips:
        members = {name: folder.read(clip, name) for name, member in clip.members.items() if member}
        metadata = json.loads(members["json"])
        if clip.key == chosen:
            change(clip.key, members, metadata)
            for name, declared in metadata["modalities"].items():
                if declared is not None and name in members:
                    declared |= {"bytes": len(members[name]), "crc32": zlib.crc32(members[name])}
        members["json"] = json.dumps(metadata).encode()
        samples.append((clip.key, members))
    former = json.loads(index_path(tar).read_text())
    write_tar(tar, samples)
    index = former | build_index(tar, folder.manifest.header.modalities).to_dict()
    write_json(index_path(tar), index)
    manifest = folder.manifest.to_dict()
    entry = next(shard for shard in manifest["splits"]["train"]["shards"] if shard["name"] == tar.name)
    entry |= {"bytes": index["bytes"], "sha256": sha256_of(tar), "index_sha256": sha256_of(index_path(tar))}
    write_json(copy / "manifest.json", manifest)
    return chosen


def declare(modality: str, **values: Any) -> Callable[[str, dict[str, bytes], dict[str, Any]], None]:
    return lambda _key, _members, metadata: metadata["modalities"][modality].update(values)


def spoil(modality: str) -> Callable[[str, dict[str, bytes], dict[str, Any]], None]:
    def change(_key: str, members: dict[str, bytes], _metadata: dict[str, Any]) -> None:
        content = bytearray(members[modality])
        noise = random.Random(0)
        # FLAC begins with 8 KB of padding; of a video the ends are decoded.
        first, last = (9, 10) if modality == "audio" else (3, 9)
        for place in range(first * len(content) // 10, last * len(content) // 10):
            content[place] = noise.randrange(256)
        members[modality] = bytes(content)

    return change


@pytest.mark.parametrize(
    ("change", "member", "kind"),
    [
        (declare("video", num_frames=24), "video", "length"),
        (declare("flow", num_frames=26), "flow", "length"),
        (declare("video", width=78), "video", "decode"),
        (declare("video", fps=0), "json", "metadata"),
        (declare("audio", num_samples=15_999), "audio", "length"),
        (declare("audio", sample_rate=8_000), "audio", "decode"),
        (spoil("video"), "video", "decode"),
        (spoil("flow"), "flow", "decode"),
        (spoil("audio"), "audio", "decode"),
        (lambda _k, _m, metadata: metadata.update(stop_s=metadata["stop_s"] - 0.5), "audio", "length"),
        (lambda _k, _m, metadata: metadata.update(split="validation"), "json", "metadata"),
        (lambda _k, _m, metadata: metadata.update(key="other"), "json", "metadata"),
        (lambda _k, _m, metadata: metadata.pop("recording"), "json", "metadata"),
    ],
)
def test_media_that_contradict_their_declaration_are_named(
    copy: Path, change: Callable[..., None], member: str, kind: str
) -> None:
    key = rewritten(copy, change)
    assert verify(copy).whole
    findings = verify(copy, full=True).findings
    assert (key, member, kind) in {(finding.key, finding.member, finding.kind) for finding in findings}
    assert {(finding.shard, finding.key) for finding in findings} == {(SHARDS[0], key)}


def test_a_member_unknown_to_the_index_is_found_fast(copy: Path) -> None:
    tar = copy / SHARDS[0]
    with tarfile.open(tar, "a") as archive:
        info = tarfile.TarInfo("stranger.json")
        info.size = 2
        archive.addfile(info, io.BytesIO(b"{}"))
    findings = {(finding.key, finding.kind) for finding in verify(copy).findings}
    assert ("stranger", "undeclared") in findings


def test_presence_is_compared_with_the_tar_in_both_directions(copy: Path) -> None:
    tar = copy / SHARDS[0]
    index = json.loads(index_path(tar).read_text())
    entry = next(entry for entry in index["clips"] if entry["members"]["video"] is not None)
    whole, video = json.loads(json.dumps(index)), entry["members"]["video"]

    def findings() -> set[tuple[str | None, str | None, str]]:
        write_json(index_path(tar), index)
        manifest = json.loads((copy / "manifest.json").read_text())
        shard = next(shard for shard in manifest["splits"]["train"]["shards"] if shard["name"] == tar.name)
        shard["index_sha256"] = sha256_of(index_path(tar))
        write_json(copy / "manifest.json", manifest)
        return {(finding.key, finding.member, finding.kind) for finding in verify(copy).findings}

    entry["members"]["video"] = None
    assert (entry["key"], member_name("", "video")[1:], "undeclared") in findings()
    entry["members"]["video"] = [video[0], video[1] + 1, video[2]]
    assert (entry["key"], "video", "header") in findings()
    del entry["members"]["video"]
    assert (entry["key"], None, "presence") in findings()
    index = whole
    assert findings() == set()


def test_names_longer_than_a_tar_header_holds_are_whole(raw: Path, tmp_path: Path) -> None:
    key = "k" * 120
    root = tmp_path / "raw"
    shutil.copytree(raw, root)
    write_epic(root, [row(key), row("P01_01_1", "P01_01")], [])
    pack(spec(root, tmp_path / "out"))
    assert {clip.key for clip in ShardFolder(tmp_path / "out").clips("train")} == {key, "P01_01_1"}
    assert verify(tmp_path / "out", full=True).whole


def test_duplicate_keys_and_unlisted_files_are_found(copy: Path) -> None:
    shutil.copy(copy / SHARDS[1], copy / "train-000007.tar")
    shutil.copy(copy / SHARDS[1], copy / "other.tar")
    (copy / ".train-000001.tar.partial").write_bytes(b"half")
    result = verify(copy)
    assert kinds(copy) == {("train-000007.tar", "unlisted"), ("other.tar", "unlisted")}
    assert any(".train-000001.tar.partial" in note for note in result.notes)
    manifest = json.loads((copy / "manifest.json").read_text())
    train = manifest["splits"]["train"]
    index = json.loads(index_path(copy / SHARDS[1]).read_text()) | {"shard": "train-000007.tar"}
    write_json(copy / "train-000007.index.json", index)
    again = {"name": "train-000007.tar", "index_sha256": sha256_of(copy / "train-000007.index.json")}
    train["shards"].append(train["shards"][1] | again)
    train["clips"] += train["shards"][1]["clips"]
    write_json(copy / "manifest.json", manifest)
    twice = {finding.key for finding in verify(copy).findings if finding.kind == "duplicate"}
    assert twice == {entry["key"] for entry in index["clips"]}


def test_findings_are_the_same_for_any_number_of_workers(copy: Path) -> None:
    def later(_key: str, _members: dict[str, bytes], metadata: dict[str, Any]) -> None:
        metadata["stop_s"] += 0.9  # only a clip of another shard shows that the recording continues

    rewritten(copy, later)
    shutil.copy(copy / SHARDS[1], copy / "train-000002.tar")
    manifest = json.loads((copy / "manifest.json").read_text())
    index = json.loads(index_path(copy / SHARDS[1]).read_text()) | {"shard": "train-000002.tar"}
    index["manifest"] |= {"made_with": {}}
    write_json(copy / "train-000002.index.json", index)
    train = manifest["splits"]["train"]
    again = {"name": "train-000002.tar", "index_sha256": sha256_of(copy / "train-000002.index.json")}
    train["shards"].append(train["shards"][1] | again)
    write_json(copy / "manifest.json", manifest)
    flip(copy / SHARDS[1], 1000)
    os.truncate(copy / SHARDS[2], (copy / SHARDS[2]).stat().st_size // 1024 * 512)
    for full, expected in ((False, {"duplicate", "manifest", "presence"}), (True, {"sha256", "crc32", "length"})):
        alone = verify(copy, full=full)
        assert expected <= {finding.kind for finding in alone.findings}
        assert full == any("its recording continues" in finding.what for finding in alone.findings)
        for workers in (2, 5):
            told: list[tuple[int, int]] = []
            shared = verify(
                copy, full=full, workers=workers, progress=lambda _, done, total, to=told: to.append((done, total))
            )
            assert shared.to_dict() == alone.to_dict()
            assert shared.splits == alone.splits
            assert told == sorted(told)
            assert len(told) == 1 + len(train["shards"]) + 1
            assert told[-1][0] == told[-1][1]


def test_a_clip_may_end_early_only_where_its_recording_does() -> None:
    def shown(key: str, end_s: float, stop_s: float) -> Shown:
        return Shown("s.tar", key, "video", "P01_01", end_s, stop_s, 0.04)

    ends_with_recording, whole = shown("late", 10.0, 12.0), shown("whole", 9.0, 9.0)
    assert list(early_ends([ends_with_recording, whole])) == []
    assert [finding.key for finding in early_ends([ends_with_recording, whole, shown("next", 11.0, 11.0)])] == ["late"]


def test_exit_codes_tell_whole_damaged_and_bad_input(
    copy: Path, packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(copy), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["whole"] is True
    index_path(copy / SHARDS[0]).unlink()
    assert main(["verify", str(copy), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["whole"] is False
    assert [set(finding) for finding in report["findings"]] == [{"shard", "key", "member", "kind", "what"}]
    assert main(["verify", str(copy)]) == 1
    assert "train-000000.index.json: index: lost" in capsys.readouterr().out
    assert main(["verify", str(copy), "--full", "--repair"]) == 0
    assert "written again: train-000000.index.json" in capsys.readouterr().out
    assert folder_bytes(copy) == folder_bytes(packed)
    assert main(["verify", str(copy), "--full", "--workers", "2"]) == 0
    capsys.readouterr()
    for bad in (tmp_path / "nowhere", tmp_path):
        assert main(["verify", str(bad)]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_a_folder_still_being_packed_is_not_repaired(copy: Path) -> None:
    with folder_lock(copy, None), pytest.raises(UserError, match="another packer"):
        repair(copy)
    (copy / ".staging").mkdir()
    (copy / "manifest.json").unlink()
    for check in (verify, repair):
        with pytest.raises(UserError, match="not finished"):
            check(copy)


def test_a_manifest_of_a_newer_schema_is_not_called_damaged(copy: Path) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    write_json(copy / "manifest.json", manifest | {"schema": 2})
    with pytest.raises(UserError, match="schema 2"):
        verify(copy)
