"""`karmma-dist memory` says what a memory holds, finds every damaged answer, and removes epochs that lack some."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from karmma_dist.cli import main
from karmma_dist.memory.header import HEADER, MemoryHeader, open_header
from karmma_dist.memory.records import AnswerFiles

SHARDS = {"train-000000.tar": 3, "train-000001.tar": 2}
FACTS = {"seed of the views": 7, "heads": [["verb", 1], ["noun", 2]]}
HEADERS = MemoryHeader("logits", "float32", (1, 3), SHARDS, FACTS)


@pytest.fixture
def memory(tmp_path: Path) -> Path:
    """A memory with a complete epoch, and one that lacks two answers."""
    folder = tmp_path / "memory"
    open_header(folder, HEADERS)
    files = AnswerFiles(folder, HEADERS.answer_bytes, SHARDS)
    for epoch in range(2):
        for shard, num_clips in SHARDS.items():
            for row in range(num_clips - epoch):
                files.write(epoch, shard, row, 1, bytes([row + 1]) * 12)
    files.close()
    return folder


def shown(folder: Path, capsys: pytest.CaptureFixture[str], *options: str, code: int = 0) -> dict[str, object]:
    assert main(["memory", str(folder), "--json", *options]) == code
    content: dict[str, object] = json.loads(capsys.readouterr().out)
    return content


def test_epochs_and_facts_are_shown(memory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = shown(memory, capsys)
    assert (content["clips"], content["complete_epochs"], content["facts"]) == (5, 1, FACTS)
    epochs = content["epochs"]
    assert isinstance(epochs, list)
    assert [epoch["num_answers"] for epoch in epochs] == [5, 3]
    assert main(["memory", str(memory)]) == 0
    out = capsys.readouterr().out
    assert "1 of 2 epochs are complete (5 clips)" in out
    assert "seed of the views: 7" in out


@pytest.mark.parametrize("place", [0, 5, 12, 17])
def test_damage_is_found_and_exits_with_1(memory: Path, capsys: pytest.CaptureFixture[str], place: int) -> None:
    path = memory / "epoch-00000" / "train-000001.answers"
    content = bytearray(path.read_bytes())
    content[20 + place] ^= 4
    path.write_bytes(content)
    assert shown(memory, capsys, "--verify", code=1)["damaged"] == 1
    assert main(["memory", str(memory)]) == 0  # checksums are only compared with --verify


def test_pruning_removes_what_is_not_complete(memory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["memory", str(memory), "--prune"]) == 0
    assert "epoch-00001: removed, it had 3 of 5 answers" in capsys.readouterr().out
    assert shown(memory, capsys)["complete_epochs"] == 1
    assert [path.name for path in sorted(memory.iterdir())] == ["epoch-00000", HEADER]


@pytest.mark.parametrize("content", [None, b"{", b'{"format": 9}'])
def test_a_folder_without_a_memory_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None
) -> None:
    if content is not None:
        (tmp_path / HEADER).write_bytes(content)
    assert main(["memory", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {tmp_path}")
    assert "memory" in line
