"""Shards from a web server through a node's cache: the same bytes as from the folder, after any transmission error."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import fsspec
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from karmma_dist.errors import UserError, masked
from karmma_dist.io import download
from karmma_dist.io.cache import Cache, Content, FetchError
from karmma_dist.io.files import sha256_of, write_json
from karmma_dist.recipe import DataRecipe, InputRecipe, Recipe
from karmma_dist.shards.folder import ShardFolder, Shards
from karmma_dist.shards.format import MANIFEST, DamageError, index_path
from karmma_dist.shards.mixture import open_datasets
from karmma_dist.shards.remote import RemoteShards, open_folder
from karmma_dist.streaming.batch import Batch
from karmma_dist.streaming.loader import TrainingClips, open_shards, training_batches
from karmma_dist.streaming.order import Position, Schedule
from kits.web_server import Fault, Handler, Server, cut, serving, short, status

INPUTS = InputRecipe.model_validate(
    {
        "video": {"num_frames": 4, "short_side": 32, "crop": 24},
        "audio": {"num_windows": 1, "window_s": 0.5, "num_mels": 16},
    }
)
pytestmark = pytest.mark.usefixtures("downloads_at_once")

PLENTY = 10**12
TRAIN = "train-000000.tar"


def flipped(handler: Handler, body: bytes) -> None:
    handler.answer(200, body[:1000] + bytes([body[1000] ^ 1]) + body[1001:])


def silent(handler: Handler, _: bytes) -> None:
    handler.server.release.wait()


def half_then_silent(handler: Handler, body: bytes) -> None:
    cut(handler, body)
    handler.wfile.flush()
    handler.server.reached.set()
    handler.server.release.wait()


@pytest.fixture
def server(shards: Path) -> Iterator[Server]:
    with serving(shards) as running:
        yield running


def opened(server: Server, root: Path, limit_bytes: int = PLENTY) -> RemoteShards:
    return RemoteShards(server.url, Cache(root, limit_bytes))


def test_a_mixture_of_remote_and_local_shards_has_the_bytes_of_both(
    server: Server, shards: Path, actions: Path, tmp_path: Path
) -> None:
    datasets = {"a": {"shards": str(actions), "weight": 1}, "far": {"shards": server.url, "weight": 1}}
    mixture = open_datasets(DataRecipe.model_validate({"mixture": datasets, "cache_dir": str(tmp_path)}))
    stored = {"a": everything(ShardFolder(actions)), "far": everything(ShardFolder(shards))}
    expected = {(f"{name}/{key}", member): data for name in stored for (key, member), data in stored[name].items()}
    assert everything(mixture) == expected
    assert [type(folder) for folder in mixture.folders] == [ShardFolder, RemoteShards]


def everything(folder: Shards, split: str = "train") -> dict[tuple[str, str], bytes]:
    """Return (key, member) -> bytes of all clips of a split."""
    return {
        (clip.key, name): folder.read(clip, name)
        for clip in folder.clips(split)
        for name, member in clip.members.items()
        if member is not None
    }


def digest(folder: ShardFolder) -> str:
    return hashlib.sha256(repr(sorted(everything(folder).items())).encode()).hexdigest()


def tars(server: Server) -> dict[str, int]:
    return {name: asked for name, asked in server.asked.items() if name.endswith(".tar")}


def left(root: Path) -> list[str]:
    """Return the files of a cache folder that are neither entries nor its permanent lock."""
    return sorted(path.name for path in root.iterdir() if path.name.startswith(".") and path.name != ".lock")


def entry_bytes(root: Path) -> int:
    return sum(path.stat().st_size for path in root.iterdir() if not path.name.startswith("."))


READER = """
import hashlib, sys
from pathlib import Path
from karmma_dist.io import download
from karmma_dist.io.cache import Cache
from karmma_dist.shards import remote
download.FIRST_WAIT_S = 0.0
folder = remote.RemoteShards(sys.argv[1], Cache(Path(sys.argv[2]), 10**12))
print("ready", flush=True)
sys.stdin.readline()
found = {(c.key, n): folder.read(c, n) for c in folder.clips("train") for n, m in c.members.items() if m is not None}
print(hashlib.sha256(repr(sorted(found.items())).encode()).hexdigest(), flush=True)
"""


def start_reader(server: Server, root: Path) -> subprocess.Popen[str]:
    """Start a process that opens the shards, prints a line, waits for one, reads every member and prints the digest."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    return subprocess.Popen(
        [sys.executable, "-c", READER, server.url, str(root)], env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip


def go(reader: subprocess.Popen[str]) -> None:
    assert reader.stdout is not None
    assert reader.stdin is not None
    assert reader.stdout.readline() == "ready\n"
    reader.stdin.write("go\n")
    reader.stdin.flush()


def test_every_member_over_http_equals_the_local_one(server: Server, shards: Path, tmp_path: Path) -> None:
    local, there = ShardFolder(shards), opened(server, tmp_path)
    again = pickle.loads(pickle.dumps(there))
    for split in local.splits:
        assert there.clips(split) == local.clips(split)
        assert everything(there, split) == everything(again, split) == everything(local, split)
    assert set(tars(server).values()) == {1}
    assert left(tmp_path) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_training_batches_over_a_url_equal_those_over_the_folder(
    server: Server, shards: Path, tmp_path: Path, workers: int
) -> None:
    def batches(where: str) -> list[Batch]:
        data = DataRecipe.model_validate(
            {"shards": where, "cache_dir": str(tmp_path), "num_workers": workers, "max_damaged_fraction": 0}
        )
        clips = TrainingClips(open_shards(data), data, INPUTS, seed=3, batch_size=8)
        return list(training_batches(clips, Schedule(len(clips.clips), batch_size=8), 0, Position(0, 0), 2))

    here, there = batches(str(shards)), batches(server.url)
    assert len(here) == len(there) == 6
    for ours, theirs in zip(here, there, strict=True):
        assert ours.keys == theirs.keys
        assert torch.equal(ours.present_BM, theirs.present_BM)
        assert ours.inputs.keys() == theirs.inputs.keys()
        assert all(torch.equal(ours.inputs[name], theirs.inputs[name]) for name in ours.inputs)
    assert set(tars(server).values()) == {1}


def test_any_file_system_that_fsspec_opens_will_do(shards: Path, tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(shards), "/bucket/kitchen", recursive=True)
    try:
        data = DataRecipe(shards="memory://bucket/kitchen/", cache_dir=str(tmp_path))
        assert digest(open_folder(data)) == digest(ShardFolder(shards))
    finally:
        memory.rm("/bucket", recursive=True)


@pytest.mark.parametrize("name", [TRAIN, str(index_path(Path(TRAIN))), MANIFEST])
@pytest.mark.parametrize("fault", [status(503), status(429), cut, short, silent], ids=lambda f: f.__name__)
def test_passing_failures_are_tried_again(
    server: Server, shards: Path, tmp_path: Path, fault: Fault, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "READ_TIMEOUT_S", 2.0 if fault is not silent else 0.2)
    server.faults[name] = [fault] * (download.TRIES - 1)
    assert digest(opened(server, tmp_path)) == digest(ShardFolder(shards))
    assert server.asked[name] == download.TRIES


def test_a_byte_flipped_on_the_way_never_reaches_the_cache(server: Server, shards: Path, tmp_path: Path) -> None:
    server.faults[TRAIN] = [flipped]
    assert digest(opened(server, tmp_path)) == digest(ShardFolder(shards))
    assert server.asked[TRAIN] == 2
    assert all(sha256_of(path) == path.name for path in tmp_path.iterdir() if path.name != ".lock")


@pytest.mark.parametrize(
    ("fault", "tries", "what"),
    [
        (flipped, download.TRIES, "sha256 differs"),
        (short, download.TRIES, r"\d+ bytes instead of \d+"),
        (cut, download.TRIES, r"broke off after \d+ of \d+ bytes"),
        (status(404), 1, "not found on the server"),
    ],
    ids=["flipped", "short", "cut", "gone"],
)
def test_a_shard_that_stays_wrong_damages_its_clips_alone(
    server: Server, shards: Path, tmp_path: Path, fault: Fault, tries: int, what: str
) -> None:
    server.faults[TRAIN] = [fault] * 100
    folder, local = opened(server, tmp_path), ShardFolder(shards)
    for clip in folder.clips("train"):
        if clip.shard == TRAIN:
            with pytest.raises(DamageError, match=what) as caught:
                folder.read(clip, "json")
            assert (caught.value.shard, caught.value.key) == (TRAIN, clip.key)
        else:
            assert folder.read(clip, "json") == local.read(clip, "json")
    assert server.asked[TRAIN] == tries, "the clips of a lost shard do not each download it again"
    assert left(tmp_path) == []


def test_an_unreachable_server_is_one_line_and_no_damage(server: Server, tmp_path: Path) -> None:
    folder = opened(server, tmp_path)
    clip = folder.clips("train")[0]
    server.faults[clip.shard] = [status(503)] * 100
    with pytest.raises(UserError, match=rf"{clip.shard}: cannot be reached \(HTTP 503\), after 5 tries"):
        folder.read(clip, "json")
    server.faults[clip.shard] = [status(403)]
    with pytest.raises(UserError, match=rf"{clip.shard}: refused \(HTTP 403\)"):
        folder.read(clip, "json")
    assert server.asked[clip.shard] == download.TRIES + 1


def test_a_url_without_packed_shards_is_one_line(server: Server, tmp_path: Path) -> None:
    def refused(url: str, match: str) -> None:
        with pytest.raises(UserError, match=match) as caught:
            RemoteShards(url, Cache(tmp_path, PLENTY))
        assert "\n" not in str(caught.value)

    refused(server.url + "/nothing", r"kitchen/nothing/manifest\.json: not found on the server: is this the URL")
    refused("http://127.0.0.1:1/kitchen", r"cannot be reached \(.*\), after 5 tries: check URL, network and password")
    refused("gopherhole://x/y", "'gopherhole' is not a protocol")
    server.faults[MANIFEST] = [lambda handler, _: handler.answer(200, b"<html>login</html>")] * 100
    refused(server.url, "not valid JSON, after 5 tries")
    server.faults[MANIFEST] = [lambda handler, _: handler.answer(200, b'{"schema": 99}')]
    refused(server.url, "of schema 99, newer than 1: update karmma-dist")


def test_a_missing_library_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(UserError, match=r"s3://bucket/kitchen/.*: it needs s3fs: pip install 'karmma-dist\[s3\]'"):
        RemoteShards("s3://bucket/kitchen", Cache(tmp_path, PLENTY))


def test_four_processes_download_each_file_once(server: Server, shards: Path, tmp_path: Path) -> None:
    readers = [start_reader(server, tmp_path) for _ in range(4)]
    for reader in readers:
        go(reader)
    assert [reader.communicate()[0] for reader in readers] == [digest(ShardFolder(shards)) + "\n"] * 4
    asked = {name: number for name, number in server.asked.items() if name != MANIFEST}
    assert set(asked.values()) == {1}
    assert len(tars(server)) == len(list(shards.glob("train-*.tar")))
    assert left(tmp_path) == []


def test_when_a_downloader_is_killed_another_process_takes_over(server: Server, shards: Path, tmp_path: Path) -> None:
    server.faults[TRAIN] = [half_then_silent]
    victim = start_reader(server, tmp_path)
    go(victim)
    assert server.reached.wait(60)
    heir = start_reader(server, tmp_path)
    go(heir)
    assert [name for name in left(tmp_path) if name.endswith(".partial")]
    victim.send_signal(signal.SIGKILL)
    assert victim.wait() == -signal.SIGKILL
    victim.communicate()
    assert heir.communicate()[0] == digest(ShardFolder(shards)) + "\n"
    assert server.asked[TRAIN] == 2
    assert left(tmp_path) == []


def test_a_cache_smaller_than_the_shards_reads_everything(
    server: Server, shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    local = ShardFolder(shards)
    sizes = [shard.num_bytes for shard in local.manifest.splits["train"].shards]
    limit = 2 * max(sizes)
    assert sum(sizes) > limit
    folder = opened(server, tmp_path, limit)
    clips = [clip for clip in folder.clips("train") for _ in range(3)]
    assert f"data.cache_bytes is {limit}" in caplog.text
    random.Random(0).shuffle(clips)
    for clip in clips:
        assert folder.read(clip, "json") == local.read(clip, "json")
        assert entry_bytes(tmp_path) <= limit
    assert max(tars(server).values()) > 1


def test_a_cache_too_small_for_one_shard_is_refused(server: Server, shards: Path, tmp_path: Path) -> None:
    largest = max(shard.num_bytes for shard in ShardFolder(shards).manifest.shards)
    with pytest.raises(UserError, match=f"has {largest} bytes, data.cache_bytes is {largest - 7}: 7 too few"):
        opened(server, tmp_path, largest - 7)
    opened(server, tmp_path, largest)


def test_damage_done_in_the_cache_is_mended_and_never_seen(server: Server, shards: Path, tmp_path: Path) -> None:
    local = ShardFolder(shards)
    expected = digest(local)
    assert digest(opened(server, tmp_path)) == expected
    entries = local.manifest.splits["train"].shards
    flip, cut_short = tmp_path / entries[0].sha256, tmp_path / entries[1].sha256
    content = bytearray(flip.read_bytes())
    content[len(content) // 2] ^= 1
    flip.write_bytes(content)
    os.truncate(cut_short, 700)
    index = tmp_path / entries[2].index_sha256
    index.write_bytes(index.read_bytes()[:-10])
    assert digest(opened(server, tmp_path)) == expected
    assert [server.asked[entry.name] for entry in entries[:2]] == [2, 2]


def test_a_clip_damaged_before_packing_is_not_downloaded_again(server: Server, shards: Path, tmp_path: Path) -> None:
    """The shard's sha256 is right, so the server's copy is not better than the cached one."""
    server.folder = copy = tmp_path / "copy"
    shutil.copytree(shards, copy)
    clips = [clip for clip in ShardFolder(copy).clips("train") if clip.shard == TRAIN]
    content = bytearray((copy / TRAIN).read_bytes())
    for clip in clips:
        assert clip.members["json"] is not None
        content[clip.members["json"].offset] ^= 1
    (copy / TRAIN).write_bytes(content)
    manifest = json.loads((copy / MANIFEST).read_text())
    manifest["splits"]["train"]["shards"][0]["sha256"] = sha256_of(copy / TRAIN)
    write_json(copy / MANIFEST, manifest)
    folder = opened(server, tmp_path / "cache")
    for clip in clips:
        with pytest.raises(DamageError, match="crc32 differs"):
            folder.read(clip, "json")
    assert server.asked[TRAIN] == 1


def test_versions_of_shards_on_a_server_never_mix(server: Server, shards: Path, tmp_path: Path) -> None:
    server.folder = copy = tmp_path / "copy"
    shutil.copytree(shards, copy)
    before = opened(server, tmp_path / "cache")
    clips = before.clips("train")
    assert before.read(clips[0], "json") == ShardFolder(shards).read(clips[0], "json")
    other = next(clip for clip in clips if clip.shard != clips[0].shard)
    manifest = json.loads((copy / MANIFEST).read_text())
    first, second = manifest["splits"]["train"]["shards"][:2]
    for entry, name in ((first, second["name"]), (second, first["name"])):
        for suffix in ("tar", "index.json"):  # a new version: two shards are swapped
            shutil.copy((shards / name).with_suffix(f".{suffix}"), (copy / entry["name"]).with_suffix(f".{suffix}"))
    for entry in (first, second):
        tar = copy / entry["name"]
        size, clip_count = tar.stat().st_size, len(json.loads(index_path(tar).read_text())["clips"])
        hashes = {"sha256": sha256_of(tar), "index_sha256": sha256_of(index_path(tar))}
        entry |= {"bytes": size, "clips": clip_count, **hashes}
    write_json(copy / MANIFEST, manifest)
    after = opened(server, tmp_path / "cache")
    assert everything(after) == everything(ShardFolder(copy)) == everything(ShardFolder(shards))
    assert [clip.key for clip in after.clips("train")] != [clip.key for clip in clips]
    assert before.read(clips[0], "json") == ShardFolder(shards).read(clips[0], "json"), "the old version's, by content"
    (tmp_path / "cache" / second["sha256"]).unlink()
    (tmp_path / "cache" / first["sha256"]).unlink()
    with pytest.raises(UserError, match="shards on the server have changed"):
        before.read(other, "json")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", "../../evil-000000.tar"),
        ("name", "/etc/evil-000000.tar"),
        ("name", "a?b-000000.tar"),
        ("sha256", "../" * 21 + "x"),
        ("index_sha256", "A" * 64),
        ("sha256", None),
        ("bytes", "many"),
    ],
)
def test_manifest_names_and_hashes_cannot_leave_their_folders(
    server: Server, shards: Path, tmp_path: Path, field: str, value: str | None
) -> None:
    manifest = json.loads((shards / MANIFEST).read_text())
    manifest["splits"]["train"]["shards"][0][field] = value
    server.faults[MANIFEST] = [lambda handler, _: handler.answer(200, json.dumps(manifest).encode())]
    with pytest.raises(UserError, match=r"manifest\.json: (shard|not a manifest)"):
        opened(server, tmp_path / "cache")
    assert dict(server.asked) == {MANIFEST: 1}


WORD = st.text("abcdefghijklmnopqrstuvwxyz0123456789", min_size=8, max_size=12).map(lambda word: f"s3cret{word}")


@given(user=WORD, password=WORD, query=WORD, scheme=st.sampled_from(["http", "https", "s3", "ftp"]))
def test_masked_urls_show_host_and_path_and_no_secret(user: str, password: str, query: str, scheme: str) -> None:
    url = f"{scheme}://{user}:{password}@host.example:99/a/b?sig={query}#{query}"
    assert masked(url) == f"{scheme}://***@host.example:99/a/b"
    assert masked(masked(url)) == masked(url)
    assert masked(f"{scheme}://host.example/a?sig={query}") == f"{scheme}://host.example/a"
    assert masked(f"shards/{user}@{query}?") == f"shards/{user}@{query}?"


def test_secrets_in_a_url_reach_the_server_and_no_message(server: Server, tmp_path: Path) -> None:
    url = f"http://anna:hush1234@127.0.0.1:{server.server_port}/kitchen?sig=a%2Bhush%3D&x=1"
    folder = RemoteShards(url, Cache(tmp_path, PLENTY))
    clips = folder.clips("train")
    assert server.queries == {"sig=a%2Bhush%3D&x=1"}
    assert server.passwords == {"Basic YW5uYTpodXNoMTIzNA=="}
    messages = []
    for name, code in ((clips[0].shard, 404), (clips[-1].shard, 503)):
        server.faults[name] = [status(code)] * 100
    for clip in (clips[0], clips[-1]):
        with pytest.raises((UserError, DamageError)) as caught:
            folder.read(clip, "json")
        messages.append(str(caught.value))
    for place in (url.replace("/kitchen", "/none"), url.replace(str(server.server_port), "1")):
        with pytest.raises(UserError) as refused:
            RemoteShards(place, Cache(tmp_path, PLENTY))
        messages.append(str(refused.value))
    with pytest.raises(UserError) as unknown:
        folder.clips("exam")
    messages.append(str(unknown.value))
    assert all("hush" not in message and "anna" not in message for message in messages), messages
    assert sum("***@127.0.0.1" in message for message in messages) == 4


def test_a_run_continues_with_another_password_only() -> None:
    from karmma_dist.training.checkpoint.resume import refuse_other_recipe

    def recipe(shards: str, cache_dir: str | None = None) -> Recipe:
        data = {"shards": shards, "modalities": ["video"], "cache_dir": cache_dir}
        model = {"encoders": {"video": {"name": "small_video"}}}
        return Recipe.model_validate({"name": "n", "stage": "supervised", "data": data, "model": model})

    saved = recipe("https://anna:hush@host/kitchen?sig=hush1")
    refuse_other_recipe(saved, recipe("https://ben:hush2@host/kitchen?sig=hush3", cache_dir="/scratch"))
    with pytest.raises(UserError, match=r"data\.shards: https://.*@host/kitchen -> https://.*@host/other") as caught:
        refuse_other_recipe(saved, recipe("https://anna:hush@host/other?sig=hush1"))
    assert "hush" not in str(caught.value)


def test_sizes_in_recipes_are_bytes_or_words_and_nothing_else() -> None:
    sizes = {12: 12, "200 GB": 200 * 10**9, "1.5GiB": 3 * 2**29, "1000": 1000}
    for given_size, expected in sizes.items():
        assert DataRecipe.model_validate({"shards": "x", "cache_bytes": given_size}).cache_bytes == expected
    for wrong in (0, -1, "much", "3 apples"):
        with pytest.raises(ValueError):
            DataRecipe.model_validate({"shards": "x", "cache_bytes": wrong})


def test_the_cache_lies_where_recipe_then_environment_say(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KARMMA_DIST_CACHE", str(tmp_path / "environment"))
    assert open_folder(DataRecipe(shards=server.url)).root == tmp_path / "environment"
    assert open_folder(DataRecipe(shards=server.url, cache_dir=str(tmp_path / "own"))).root == tmp_path / "own"
    monkeypatch.delenv("KARMMA_DIST_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_folder(DataRecipe(shards=server.url)).root == tmp_path / ".cache" / "karmma-dist"


# The cache alone.


def content_of(data: bytes) -> Content:
    return Content(hashlib.sha256(data).hexdigest(), len(data))


def read_and_close(descriptor: int) -> bytes:
    with open(descriptor, "rb") as file:
        return file.read()


def put(data: bytes, path: Path) -> None:
    path.write_bytes(data)


def never(path: Path) -> None:
    raise AssertionError(f"{path} was to be in the cache")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(order=st.lists(st.integers(0, 5), max_size=25), limit=st.integers(60, 250))
def test_entries_keep_their_bytes_below_the_limit(
    tmp_path_factory: pytest.TempPathFactory, order: list[int], limit: int
) -> None:
    cache = Cache(tmp_path_factory.mktemp("cache"), limit)
    for number in order:
        data = bytes([number]) * (10 * number + 10)
        assert read_and_close(cache.open(content_of(data), partial(put, data))) == data
        assert entry_bytes(cache.root) <= limit
        assert read_and_close(cache.open(content_of(data), never)) == data


def test_a_removed_entry_stays_readable_while_open(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 25)
    a, b, c = b"a" * 10, b"b" * 10, b"c" * 10
    os.close(cache.open(content_of(a), partial(put, a)))
    held = cache.open(content_of(b), partial(put, b))
    for age, data in enumerate((a, b)):  # the kernel's clock is coarser than this test
        os.utime(tmp_path / content_of(data).sha256, ns=(age, age))
    os.close(cache.open(content_of(a), never))
    os.close(cache.open(content_of(c), partial(put, c)))
    os.close(cache.open(content_of(a), never))
    assert not (tmp_path / content_of(b).sha256).exists()
    assert read_and_close(held) == b
    assert read_and_close(cache.open(content_of(b), partial(put, b))) == b


def test_remains_of_dead_downloads_alone_are_removed(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 100)
    dead, live, new = b"dead", b"live", b"new"
    for suffix in ("partial", "lock"):
        (tmp_path / f".{content_of(dead).sha256}.{suffix}").write_text("[left")

    def fetch_live(path: Path) -> None:
        path.write_bytes(live)
        os.close(cache.open(content_of(new), partial(put, new)))
        lock, under_way = sorted(left(tmp_path), key=len)
        assert lock == f".{content_of(live).sha256}.lock"
        assert under_way == path.parent.name
        assert under_way.startswith(f".{content_of(live).sha256}.")

    assert read_and_close(cache.open(content_of(live), fetch_live)) == live
    assert left(tmp_path) == []


class SecondReader(threading.Thread):
    """A reader of an entry that another reader is downloading; `begin` returns when it has opened the lock file."""

    def __init__(self, cache: Cache, data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.cache, self.data, self.waiting = cache, data, threading.Event()
        self.flock, self.outcome = fcntl.flock, None
        monkeypatch.setattr(fcntl, "flock", self.tell)

    def tell(self, file: object, kind: int) -> None:
        if threading.current_thread() is self:
            self.waiting.set()
        self.flock(file, kind)

    def run(self) -> None:
        try:
            self.outcome = read_and_close(self.cache.open(content_of(self.data), never))
        except FetchError as error:
            self.outcome = (error.what, error.damaged)

    def begin(self) -> None:
        self.start()
        assert self.waiting.wait(60)

    def finished(self) -> object:
        self.join()
        return self.outcome


def test_waiting_readers_share_a_failure_and_later_ones_retry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, data = Cache(tmp_path, 100), b"data"
    second = SecondReader(cache, data, monkeypatch)

    def fail(_: Path) -> None:
        second.begin()
        raise FetchError("gone", damaged=True)

    with pytest.raises(FetchError, match="gone"):
        cache.open(content_of(data), fail)
    assert second.finished() == ("gone", True)
    assert read_and_close(cache.open(content_of(data), partial(put, data))) == data


def test_the_failure_of_a_killed_process_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, data = Cache(tmp_path, 100), b"data"
    second = SecondReader(cache, data, monkeypatch)
    (tmp_path / f".{content_of(data).sha256}.lock").write_text('["gone", true, false]')

    def succeed(path: Path) -> None:
        second.begin()
        path.write_bytes(data)

    assert read_and_close(cache.open(content_of(data), succeed)) == data
    assert second.finished() == data


def test_full_disks_and_read_only_folders_are_one_line(tmp_path: Path) -> None:
    def full(path: Path) -> None:
        path.write_bytes(b"some")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(UserError, match=r"No space left on device: name another one .*lower data.cache_bytes \(100\)"):
        Cache(tmp_path, 100).open(content_of(b"data"), full)
    assert left(tmp_path) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cache folder .*file: (Not a directory|File exists)"):
        Cache(tmp_path / "file", 100).open(content_of(b"data"), never)
