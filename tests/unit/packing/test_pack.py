"""Packing runs: the same bytes after any interruption, and no incomplete folder that looks complete."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from functools import reduce
from operator import getitem
from pathlib import Path

import pytest
import webdataset as wds
from hypothesis import given, settings
from hypothesis import strategies as st

from karmma_dist.errors import UserError
from karmma_dist.io.files import sha256_of
from karmma_dist.packing import pack as pack_module
from karmma_dist.packing.pack import pack
from karmma_dist.packing.spec import PackingSpec, load_spec
from karmma_dist.packing.tars import staging
from karmma_dist.packing.tars.assemble import shard_keys
from karmma_dist.packing.tars.lock import folder_lock
from karmma_dist.settings import flat
from karmma_dist.shards.folder import ShardFolder
from karmma_dist.shards.format import member_name
from kits.packing import (
    decode,
    decode_sound,
    epic_spec,
    folder_bytes,
    movie_path,
    read_number,
    row,
    write_epic,
    write_movie,
)

RECORDINGS = ("P01_01", "P01_02", "P02_01")
CLIPS = 4


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a unit of each recording, so that a run can be resumed."""
    monkeypatch.setattr(staging, "_UNIT_CLIPS", 2)


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write three recordings of four clips, the second without audio, the third without video; one validation clip."""
    root = tmp_path_factory.mktemp("raw")
    write_movie(movie_path(root, "P01_01"), frames=60, bursts=[0.5])
    write_movie(movie_path(root, "P01_02"), frames=60)
    write_movie(movie_path(root, "P02_01"), bursts=[0.5], seconds=2.4)
    write_movie(movie_path(root, "P03_01"), frames=40, bursts=[0.2])
    train = [
        row(f"{name}_{n}", name, f"00:00:00.{20 * n:02d}", f"00:00:01.{20 * n:02d}", verb_class=n % 2)
        for name in RECORDINGS for n in range(CLIPS)
    ]  # fmt: skip
    return write_epic(root, train, [row("P03_01_0", "P03_01")])


def spec(raw: Path, out: Path, **fields: object) -> PackingSpec:
    return epic_spec(raw, out, **({"clips_per_shard": 5} | fields))


@pytest.fixture(scope="module")
def packed(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pack the reference without interruption, in this process."""
    out = tmp_path_factory.mktemp("packed")
    pack(spec(raw, out))
    return out


def test_absent_modalities_are_null_and_present_ones_are_stored(packed: Path) -> None:
    folder = ShardFolder(packed)
    clips = {clip.key: clip for split in folder.splits for clip in folder.clips(split)}
    assert len(clips) == len(RECORDINGS) * CLIPS + 1
    for key, clip in clips.items():
        expected = {"P01_02": {"video", "flow"}, "P02_01": {"audio"}}.get(key[:6], {"video", "flow", "audio"})
        assert {m for m in folder.modalities if clip.has(m)} == expected
        metadata = folder.metadata(clip)
        assert {m for m, stored in metadata.members.items() if stored is not None} == expected
        if clip.has("video"):
            first = read_number(decode(folder.read(clip, "video"))[0])
            assert first == int(metadata.start_s * 25 + 0.1)
        if clip.has("audio"):
            num_samples = metadata.description("audio").num_samples
            assert len(decode_sound(folder.read(clip, "audio"))) == 16_000 == num_samples


def test_the_manifest_says_what_is_on_disk(packed: Path) -> None:
    manifest = json.loads((packed / "manifest.json").read_text())
    tars = {path.name for path in packed.glob("*.tar")}
    for split in manifest["splits"].values():
        assert split["clips"] == sum(shard["clips"] for shard in split["shards"])
        for shard in split["shards"]:
            tars.remove(shard["name"])
            assert sha256_of(packed / shard["name"]) == shard["sha256"]
            index = packed / shard["name"].replace(".tar", ".index.json")
            assert sha256_of(index) == shard["index_sha256"]
    assert not tars
    assert manifest["label_counts"]["train"] == {"verb": [6, 6], "noun": [0, 12, 0]}
    assert [path.name for path in packed.iterdir() if path.name.startswith(".")] in ([], [".lock"])


def test_any_webdataset_reader_takes_the_shards(packed: Path) -> None:
    folder = ShardFolder(packed)
    clips = {clip.key: clip for clip in folder.clips("train")}
    urls = [str(path) for path in sorted(packed.glob("train-*.tar"))]
    samples = list(wds.DataPipeline(wds.SimpleShardList(urls), wds.tarfile_to_samples()))
    assert {sample["__key__"] for sample in samples} == set(clips)
    for sample in samples:
        clip = clips[sample["__key__"]]
        for modality in folder.modalities:
            suffix = member_name("", modality)[1:]
            assert sample.get(suffix) == (folder.read(clip, modality) if clip.has(modality) else None)


def test_clips_of_one_recording_do_not_sit_together(packed: Path) -> None:
    folder = ShardFolder(packed)
    recordings = [clip.key[:6] for clip in folder.clips("train")]
    assert recordings != sorted(recordings)
    assert max(recordings[:4].count(name) for name in RECORDINGS) < CLIPS


@settings(deadline=None)
@given(st.sets(st.integers(0, 10**6).map(str), max_size=60), st.integers(1, 20), st.integers(0, 3))
def test_the_place_of_a_clip_depends_on_the_plan_alone(keys: set[str], size: int, seed: int) -> None:
    shards = shard_keys(sorted(keys), "train", seed, size)
    assert sorted(key for shard in shards for key in shard) == sorted(keys)
    assert all(0 < len(shard) <= size for shard in shards)
    assert shard_keys(sorted(keys, reverse=True), "train", seed, size) == shards


def test_workers_and_parts_do_not_change_a_byte(raw: Path, packed: Path, tmp_path: Path) -> None:
    pack(spec(raw, tmp_path / "two"), workers=2)
    assert folder_bytes(tmp_path / "two") == folder_bytes(packed)
    summaries = [pack(spec(raw, tmp_path / "parts"), part=(part, 3)) for part in (2, 1, 3)]
    assert [summary.status for summary in summaries] == ["staged", "staged", "packed"]
    assert folder_bytes(tmp_path / "parts") == folder_bytes(packed)


def test_a_call_without_part_finishes_what_parts_left(raw: Path, packed: Path, tmp_path: Path) -> None:
    assert pack(spec(raw, tmp_path), part=(2, 2)).status == "staged"
    assert not (tmp_path / "manifest.json").exists()
    assert pack(spec(raw, tmp_path)).status == "packed"
    assert folder_bytes(tmp_path) == folder_bytes(packed)


def _killed_at_rename(number: int, spec: PackingSpec, **options: bool) -> bool:
    """Pack in a child that kills itself before its `number`-th rename; return False if it has fewer renames."""
    child = os.fork()
    if child == 0:
        replace, left = os.replace, [number]

        def replace_or_die(source: object, target: object) -> None:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(source, target)  # type: ignore[call-overload]

        os.replace = replace_or_die  # type: ignore[assignment]
        try:
            pack(spec, **options)  # type: ignore[arg-type]
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def test_after_a_kill_at_any_rename_the_next_run_completes(raw: Path, tmp_path: Path) -> None:
    fields = {"video": {"source": "none"}, "flow": {"source": "none"}}
    pack(spec(raw, tmp_path / "reference", **fields))
    number, reference = 0, folder_bytes(tmp_path / "reference")
    while True:
        out = tmp_path / str(number)
        killed = _killed_at_rename(number, spec(raw, out, **fields))
        if not killed:
            break
        with pytest.raises(UserError, match="no "):
            ShardFolder(out)
        assert pack(spec(raw, out, **fields)).status == "packed"
        assert folder_bytes(out) == reference
        shutil.rmtree(out)
        number += 1
    # Tar and result per unit, tar and index per shard, failures, manifest.
    assert number >= 2 * 4 + 2 * len(list((tmp_path / "reference").glob("*.tar"))) + 2


def test_a_rerun_cuts_only_what_was_not_cut(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut: list[str] = []
    stage = staging.stage

    def interrupted(folder: Path, unit: staging.Unit, settings: PackingSpec) -> int:
        if len(cut) == 2:
            raise KeyboardInterrupt
        cut.append(unit.name)
        return stage(folder, unit, settings)

    monkeypatch.setattr(pack_module, "stage", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pack(spec(raw, tmp_path))
    first = list(cut)
    cut[:] = []
    monkeypatch.setattr(pack_module, "stage", lambda *args: (cut.append(args[1].name), stage(*args))[1])
    pack(spec(raw, tmp_path))
    assert len(first) == 2
    assert len(cut) == 2
    assert not set(first) & set(cut)


def test_packing_again_does_nothing_and_other_settings_are_refused(raw: Path, packed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(packed, out)
    times = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    summary = pack(spec(raw, out))
    assert summary.status == "already packed"
    assert summary.clips == {"train": 12, "validation": 1}
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == times
    for fields, named in (({"seed": 1}, "seed"), ({"video": {"crf": 30}}, r"another video\.crf \(23, now 30\)")):
        with pytest.raises(UserError, match=f"{named}.*another --out"):
            pack(spec(raw, out, **fields))
    with pytest.raises(UserError, match=r"limit \(None, now 2\).*another --out"):
        pack(spec(raw, out), limit=2)


def test_shards_without_a_recorded_setting_continue_with_its_default(raw: Path, packed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(packed, out)
    manifest = json.loads((out / "manifest.json").read_text())
    required = {name for name, field in PackingSpec.model_fields.items() if field.is_required()}
    usual, now = flat(epic_spec(raw).recorded()), flat(spec(raw, out).recorded())
    num_continued = 0
    for name in now:
        *sections, own_name = name.split(".")
        settings = json.loads(json.dumps(manifest["settings"]))
        reduce(getitem, sections, settings).pop(own_name)
        (out / "manifest.json").write_text(json.dumps({**manifest, "settings": settings}))
        is_entry = len(sections) == 2  # of a dictionary, which is one setting
        if now[name] == usual[name] and name not in required and not is_entry:
            assert pack(spec(raw, out)).status == "already packed"
            num_continued += 1
        else:
            with pytest.raises(UserError, match=rf"packed with another {re.escape(name)} \(.*another --out"):
                pack(spec(raw, out))
    assert num_continued >= 20


def test_a_lost_or_cut_shard_is_packed_again_alike(raw: Path, packed: Path, tmp_path: Path) -> None:
    for harm in ("lost", "cut", "no index"):
        out = tmp_path / harm
        shutil.copytree(packed, out)
        tar = out / "train-000001.tar"
        if harm == "lost":
            tar.unlink()
        elif harm == "cut":
            os.truncate(tar, tar.stat().st_size // 2)
        else:
            tar.with_suffix(".index.json").unlink()
        assert pack(spec(raw, out)).status == "packed"
        assert folder_bytes(out) == folder_bytes(packed)


def test_shards_of_unknown_origin_are_not_touched(raw: Path, tmp_path: Path) -> None:
    (tmp_path / "train-000000.tar").write_bytes(b"precious")
    with pytest.raises(UserError, match=r"no manifest\.json"):
        pack(spec(raw, tmp_path))
    assert (tmp_path / "train-000000.tar").read_bytes() == b"precious"


def test_a_second_packer_on_the_folder_is_refused(raw: Path, tmp_path: Path) -> None:
    with folder_lock(tmp_path, None), pytest.raises(UserError, match="another packer"):
        pack(spec(raw, tmp_path))
    with folder_lock(tmp_path, (1, 2)):
        for part in (None, (1, 2)):
            with pytest.raises(UserError, match="another packer"):
                pack(spec(raw, tmp_path), part=part)
        assert pack(spec(raw, tmp_path), part=(2, 2)).status == "staged"


@pytest.fixture
def damaged(raw: Path, tmp_path: Path) -> Path:
    """Copy the raw folder, with one video file overwritten."""
    root = tmp_path / "damaged"
    shutil.copytree(raw, root)
    path = movie_path(root, "P01_02")
    path.write_bytes(b"this is no movie" * 100)
    return root


def test_damaged_clips_fail_by_name_and_others_are_packed(packed: Path, damaged: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    summary = pack(spec(damaged, out))
    lost = {f"P01_02_{n}" for n in range(CLIPS)}
    failures = [json.loads(line) for line in (out / "failures.jsonl").read_text().splitlines()]
    assert {failure["key"] for failure in failures} == lost == {failure.key for failure in summary.failures}
    assert all(failure["modality"] == "video" and failure["stage"] == "open" for failure in failures)
    folder, whole = ShardFolder(out), ShardFolder(packed)
    kept = {clip.key: clip for clip in folder.clips("train")}
    expected = {clip.key: clip for clip in whole.clips("train") if clip.key not in lost}
    assert list(kept) == list(expected)
    for key, clip in kept.items():
        assert folder.metadata(clip) == whole.metadata(expected[key])
    assert pack(spec(damaged, out)).status == "already packed"


def test_retrying_after_repair_gives_the_bytes_without_failure(
    raw: Path, packed: Path, damaged: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    pack(spec(damaged, out))
    still = pack(spec(damaged, out), retry_failed=True)
    assert (still.status, len(still.failures)) == ("packed", CLIPS)
    shutil.copy(movie_path(raw, "P01_02"), movie_path(damaged, "P01_02"))
    assert pack(spec(damaged, out)).status == "already packed"
    assert not pack(spec(damaged, out), retry_failed=True).failures
    assert folder_bytes(out) == folder_bytes(packed)


def test_a_kill_while_mending_loses_nothing(raw: Path, packed: Path, damaged: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    pack(spec(damaged, base))
    shutil.copy(movie_path(raw, "P01_02"), movie_path(damaged, "P01_02"))
    number = 0
    while True:
        out = tmp_path / str(number)
        shutil.copytree(base, out)
        if not _killed_at_rename(number, spec(damaged, out), retry_failed=True):
            break
        pack(spec(damaged, out), retry_failed=True)
        assert folder_bytes(out) == folder_bytes(packed)
        number += 1
    assert number > 4


def test_progress_ends_at_its_total(raw: Path, tmp_path: Path) -> None:
    told: dict[str, list[tuple[int, int]]] = {}
    pack(spec(raw, tmp_path), progress=lambda stage, done, total: told.setdefault(stage, []).append((done, total)))
    assert set(told) == {"cut", "write"}
    for steps in told.values():
        assert steps[-1] == (13, 13)
        assert steps == sorted(steps)


@pytest.mark.parametrize("options", [{"workers": 0}, {"part": (3, 2)}, {"part": (0, 2)}, {"limit": 0}])
def test_impossible_options_are_refused(raw: Path, tmp_path: Path, options: dict) -> None:
    with pytest.raises(UserError):
        pack(spec(raw, tmp_path), **options)


def test_an_out_folder_that_is_a_file_is_refused(raw: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match="another --out"):
        pack(spec(raw, tmp_path / "out"))


def test_a_relative_raw_folder_gives_the_same_shards(
    kitchen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    movie = next((kitchen / "EPIC-KITCHENS").glob("*/videos/*.MP4"))
    (tmp_path / "plain").mkdir()
    shutil.copy(movie, tmp_path / "plain" / "m.mp4")
    (tmp_path / "plain" / "train.csv").write_text("key,media,start,stop,action\na,m.mp4,0.2,0.8,x\n")
    monkeypatch.chdir(tmp_path)
    folders = {"absolute": tmp_path / "plain", "relative": Path("plain"), "dotted": Path("./plain/../plain")}
    for name, raw in folders.items():
        pack(load_spec("plain", raw=raw, out=tmp_path / name, overrides=["flow.source=none"]))
    absolute, *others = (folder_bytes(tmp_path / name) for name in folders)
    assert others == [absolute, absolute]
    os.symlink(kitchen, tmp_path / "kitchen")
    for name, raw in (("k1", kitchen), ("k2", Path("kitchen"))):
        pack(load_spec("demo", raw=raw, out=tmp_path / name), limit=2)
    assert folder_bytes(tmp_path / "k1") == folder_bytes(tmp_path / "k2")
