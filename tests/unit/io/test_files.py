"""Tests that a file is written completely or not at all, even if the writer fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from karmma_dist.errors import UserError
from karmma_dist.io.files import write_json, write_whole
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


def test_reading_and_writing_shards_needs_no_torch() -> None:
    code = "import sys, karmma_dist.shards.format; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
