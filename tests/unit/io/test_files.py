"""Tests that a file is written completely or not at all, even if the writer fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from karmma_dist.errors import UserError
from karmma_dist.io import files
from karmma_dist.io.files import (
    append,
    create,
    remove,
    remove_left,
    temporary_name,
    whole_folder,
    write_json,
    write_whole,
)
from karmma_dist.shards.folder import ShardFolder
from karmma_dist.shards.format import MANIFEST

BEFORE, AFTER = b"what was there before", b"what comes after it"


def test_the_old_file_stays_until_the_new_one_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    for content in (BEFORE, AFTER, lambda temporary: temporary.write_bytes(BEFORE)):
        write_whole(path, content)
        assert path.read_bytes() == (content if isinstance(content, bytes) else BEFORE)

    def cut(temporary: Path) -> None:
        temporary.write_bytes(AFTER[:5])
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        write_whole(path, cut)
    assert path.read_bytes() == BEFORE
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", [AFTER, lambda temporary: temporary.write_bytes(AFTER)], ids=["bytes", "writer"])
def test_a_file_is_synced_before_it_is_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | Callable[[Path], object]
) -> None:
    path = tmp_path / "file.bin"
    flushed = []
    fsync = os.fsync

    def note(descriptor: int) -> None:
        flushed.append((os.pread(descriptor, 100, 0), path.exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    write_whole(path, content)
    assert flushed == [(AFTER, False)]
    assert [item.name for item in tmp_path.iterdir()] == ["file.bin"]


def test_the_umask_decides_who_may_read_a_file(tmp_path: Path) -> None:
    """Check it since colleagues evaluate each other's runs, but safetensors writes files for their owner only."""

    def secretive(temporary: Path) -> None:
        temporary.unlink()
        os.close(os.open(temporary, os.O_CREAT | os.O_WRONLY, 0o600))

    before = os.umask(0o027)
    try:
        for content in (AFTER, secretive):
            write_whole(tmp_path / "file.bin", content)
            assert (tmp_path / "file.bin").stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(before)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda manifest: manifest.pop("splits"), "splits is missing"),
        (lambda manifest: manifest.update(modalities=["smell"]), "modalities[0] is 'smell'"),
        (lambda manifest: manifest["heads"].update(verb="open"), "heads.verb is 'open'"),
        (lambda manifest: shard_of(manifest).pop("index_sha256"), "splits.train.shards[0].index_sha256 is missing"),
        (lambda manifest: shard_of(manifest).update(sha256="../x"), "splits.train.shards[0].sha256 is '../x'"),
        (lambda manifest: shard_of(manifest).update(name="../../x-000000.tar"), "shards[0].name is '../../x-0"),
        (lambda manifest: shard_of(manifest).update(bytes="many"), "splits.train.shards[0].bytes is 'many'"),
        (lambda manifest: manifest.update(schema=0), "schema is 0"),
    ],
)
def test_a_changed_manifest_is_refused_in_one_line(
    shards: Path, tmp_path: Path, change: Callable[[dict], object], said: str
) -> None:
    manifest = json.loads((shards / MANIFEST).read_text())
    change(manifest)
    write_json(tmp_path / MANIFEST, manifest)
    with pytest.raises(UserError) as caught:
        ShardFolder(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / MANIFEST}: not a manifest of packed shards: ")
    assert said in str(caught.value)
    assert "verify --repair" in str(caught.value)


def shard_of(manifest: dict) -> dict:
    return manifest["splits"]["train"]["shards"][0]


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner),
    max_leaves=10,
)


@given(values)
def test_json_is_one_line_of_utf8_that_reads_back(tmp_path_factory: pytest.TempPathFactory, value: object) -> None:
    path = tmp_path_factory.getbasetemp() / "value.json"
    write_json(path, value)
    content = path.read_bytes()
    assert json.loads(content) == value
    assert content.endswith(b"\n")
    assert content.count(b"\n") == 1


OTHERS = b"somebody else's"
WAYS: dict[str, Callable[[Path], object]] = {
    "bytes": lambda path: write_whole(path, AFTER),
    "writer": lambda path: write_whole(path, lambda temporary: temporary.write_bytes(AFTER)),
    "block": lambda path: _in_a_block(path),
}


def _in_a_block(path: Path) -> None:
    with files.whole_file(path) as file:
        file.write(AFTER)


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A file elsewhere, which nothing may change."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "victim").write_bytes(OTHERS)
    return folder / "victim"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder that is written into."""
    (tmp_path / "folder").mkdir()
    return tmp_path / "folder"


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_link_with_the_final_name_is_replaced_and_its_target_stays(
    folder: Path, victim: Path, way: Callable[[Path], object]
) -> None:
    path = folder / "file.bin"
    path.symlink_to(victim)
    (folder / ".file.bin.partial").symlink_to(victim)
    way(path)
    assert path.read_bytes() == AFTER
    assert not path.is_symlink()
    assert victim.read_bytes() == OTHERS


@pytest.mark.parametrize("is_link", [True, False])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_what_has_the_temporary_name_is_neither_followed_nor_overwritten(
    folder: Path, victim: Path, monkeypatch: pytest.MonkeyPatch, way: Callable[[Path], object], is_link: bool
) -> None:
    """Even where somebody could foretell the name."""
    path, planted = folder / "file.bin", folder / ".file.bin.planted.partial"
    monkeypatch.setattr(files, "temporary_name", lambda _: planted)
    planted.symlink_to(victim) if is_link else planted.write_bytes(OTHERS)
    with pytest.raises(FileExistsError):
        way(path)
    assert victim.read_bytes() == OTHERS
    assert not path.exists()


def test_a_link_that_takes_the_place_of_a_temporary_file_is_not_followed(folder: Path, victim: Path) -> None:
    def exchange(temporary: Path) -> None:
        temporary.unlink()
        temporary.symlink_to(victim)

    victim.chmod(0o600)
    with pytest.raises(OSError, match="symbolic links"):
        write_whole(folder / "file.bin", exchange)
    assert victim.read_bytes() == OTHERS
    assert victim.stat().st_mode & 0o777 == 0o600
    assert list(folder.iterdir()) == []


def test_no_temporary_name_comes_twice_and_each_fits_a_file_system(folder: Path) -> None:
    path = folder / ("\u00e4" * 127)  # 254 bytes
    names = {temporary_name(path).name for _ in range(100)}
    assert len(names) == 100
    assert max(len(name.encode()) for name in names) <= 255
    write_whole(path, AFTER)
    assert path.read_bytes() == AFTER


def test_the_end_of_a_link_is_not_written_to(folder: Path, victim: Path) -> None:
    with append(folder / "log") as file:
        file.write(BEFORE)
    with append(folder / "log") as file:
        file.write(AFTER)
    assert (folder / "log").read_bytes() == BEFORE + AFTER
    (folder / "link").symlink_to(victim)
    with pytest.raises(UserError, match=r"link: is a symbolic link, .*: remove it"):
        append(folder / "link")
    assert victim.read_bytes() == OTHERS


def test_a_link_to_a_folder_is_removed_alone(folder: Path, victim: Path) -> None:
    (folder / "link").symlink_to(victim.parent)
    (folder / "inner").mkdir()
    (folder / "inner" / "link").symlink_to(victim.parent)
    for name in ("link", "inner", "nothing"):
        remove(folder / name)
    assert list(folder.iterdir()) == []
    assert victim.read_bytes() == OTHERS


def test_a_folder_is_whole_or_not_there(folder: Path) -> None:
    def cut() -> None:
        with whole_folder(folder / "raw") as temporary:
            (temporary / "file").write_bytes(AFTER)
            raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        cut()
    assert list(folder.iterdir()) == []
    with whole_folder(folder / "raw") as temporary:
        (temporary / "file").write_bytes(AFTER)
    assert [path.name for path in folder.rglob("*")] == ["raw", "file"]


def test_a_device_or_pipe_is_not_replaced_by_a_file(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    for path in (folder / "pipe", Path("/dev/null"), Path("/dev/stdout")):
        with pytest.raises(UserError, match="a device or pipe: name a file to write"):
            write_whole(path, AFTER)


KILLED = """
import os, signal, sys
from pathlib import Path
from karmma_dist.io.files import whole_file
with whole_file(Path(sys.argv[1])) as file:
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_writer_left_is_removed_by_the_next_process_that_writes_there(folder: Path) -> None:
    path = folder / "file.bin"
    for _ in range(2):
        assert subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False).returncode == -signal.SIGKILL
        left = list(folder.iterdir())
        assert len(left) == 1  # the second one removed what the first one had left
        assert left[0].name.startswith(".file.bin.")
        assert left[0].suffix == ".partial"
    write_whole(path, AFTER)
    assert list(folder.iterdir()) == [path]


def test_what_live_writers_and_other_machines_write_is_left_alone_until_it_is_old(
    folder: Path, victim: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = temporary_name(folder / "own")
    monkeypatch.setattr(files, "_short_machine", lambda: "0123abcd")
    fresh, old, link = (temporary_name(folder / name) for name in ("fresh", "old", "link"))
    monkeypatch.undo()
    for path in (own, fresh, old):
        os.close(create(path))
    link.symlink_to(victim)
    old_s = files._LEFT_AFTER_S + 60
    changed = os.stat(fresh).st_mtime
    os.utime(old, (changed - old_s, changed - old_s))
    os.utime(link, (changed - old_s, changed - old_s), follow_symlinks=False)
    (folder / ".of-another-program.partial").touch()
    remove_left(folder)
    assert sorted(folder.iterdir()) == sorted([own, fresh, folder / ".of-another-program.partial"])
    assert victim.read_bytes() == OTHERS


def test_reading_and_writing_shards_needs_no_torch() -> None:
    code = "import sys, karmma_dist.shards.format; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
