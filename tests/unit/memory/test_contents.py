"""`karmma-dist memory` says what a memory holds, finds every damaged answer, and removes epochs that lack some."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from karmma_dist.cli import main
from karmma_dist.memory.header import HEADER, MemoryHeader, open_header
from karmma_dist.memory.records import AnswerFiles
from kits.disk_writers import file_limit

SHARDS = {"train-000000.tar": 3, "train-000001.tar": 2}
FACTS = {"seed of the views": 7, "heads": [["verb", 1], ["noun", 2]]}
HEADERS = MemoryHeader("logits", "float32", (1, 3), SHARDS, 4, FACTS)


@pytest.fixture
def memory(tmp_path: Path) -> Path:
    """A memory with a complete epoch, of which batches leave out one clip, and one that lacks an answer."""
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
    assert "1 of 2 epochs are complete (4 of 5 clips)" in out
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
    assert "epoch-00001: removed, it had 3 of 4 answers" in capsys.readouterr().out
    assert shown(memory, capsys)["complete_epochs"] == 1
    assert [path.name for path in sorted(memory.iterdir())] == ["epoch-00000", HEADER]


def test_pruning_removes_damaged_answers(memory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = memory / "epoch-00000" / "train-000000.answers"
    content = bytearray(path.read_bytes())
    content[25] ^= 1
    path.write_bytes(content)
    assert main(["memory", str(memory), "--prune"]) == 0
    assert f"{path}, record 1: removed, it was damaged" in capsys.readouterr().out
    (epoch,) = shown(memory, capsys, "--verify")["epochs"]  # type: ignore[misc]
    assert (epoch["num_answers"], epoch["num_damaged"]) == (4, 0)


def test_views_that_dropout_fills_over_several_epochs_are_not_pruned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    header = MemoryHeader("tokens", "int8", (2, 4), SHARDS, 5, FACTS)
    assert header.answer_bytes == 2 * 4 + 2 * 4
    open_header(tmp_path, header)
    files = AnswerFiles(tmp_path, header.answer_bytes, SHARDS)
    files.write(3, "train-000000.tar", 0, 1, bytes(range(16)))
    files.close()
    assert main(["memory", str(tmp_path), "--prune"]) == 0
    assert "0 of 1 views are complete" in capsys.readouterr().out
    assert shown(tmp_path, capsys)["epochs"][0]["num_answers"] == 1  # type: ignore[index]


def test_parts_of_nodes_merge_to_the_whole(memory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Deal the answers of a memory to two parts, and merge them: every byte is back."""
    parts = [tmp_path / "node0", tmp_path / "node1"]
    whole = AnswerFiles(memory, HEADERS.answer_bytes, SHARDS)
    for number, part in enumerate(parts):
        open_header(part, HEADERS)
        files = AnswerFiles(part, HEADERS.answer_bytes, SHARDS)
        for epoch in range(2):
            for shard, num_clips in SHARDS.items():
                for row in range(num_clips):
                    answer = whole.read(epoch, shard, row, 1)
                    if answer is not None and (row + epoch) % 2 == number:
                        files.write(epoch, shard, row, 1, answer)
        files.close()
    assert main(["memory", str(parts[0]), "--merge", str(parts[1])]) == 0
    assert f"4 answers added from {parts[1]}" in capsys.readouterr().out
    for epoch in range(2):
        for shard in SHARDS:
            assert whole.path(epoch, shard).read_bytes() == (
                parts[0] / whole.path(epoch, shard).relative_to(memory)
            ).read_bytes()
    assert main(["memory", str(parts[0]), "--merge", str(parts[1])]) == 0
    assert "0 answers added" in capsys.readouterr().out
    whole.close()


def test_a_disk_without_room_for_a_part_is_named_as_such(
    memory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    open_header(tmp_path / "part", HEADERS)
    with file_limit(30):
        assert main(["memory", str(tmp_path / "part"), "--merge", str(memory)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "part/epoch-00000/train-000000.answers: File too large" in line


def test_another_memory_is_not_merged(memory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    open_header(tmp_path / "other", MemoryHeader("logits", "float32", (1, 3), SHARDS, 4, FACTS | {"split": "test"}))
    assert main(["memory", str(memory), "--merge", str(tmp_path / "other")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"not a part of {memory}: its split is 'test', the other's None" in line


def _with_link(path: Path) -> None:
    path.symlink_to("/etc/hostname")


def _longer(path: Path) -> None:
    path.write_bytes(bytes(range(250)) * 40)


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, Path.touch, _with_link, _longer])
@pytest.mark.parametrize("option", ["--verify", "--prune", "--merge"])
def test_what_is_no_file_of_a_memory_is_one_line_or_damage(
    memory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], make: Callable[[Path], None], option: str
) -> None:
    path = memory / "epoch-00000" / "train-000001.answers"
    path.unlink()
    make(path)
    whole = AnswerFiles(memory, HEADERS.answer_bytes, SHARDS).path(0, "train-000000.tar").read_bytes()
    arguments = [str(memory), option]
    if option == "--merge":
        open_header(tmp_path / "part", HEADERS)
        arguments = [str(tmp_path / "part"), option, str(memory)]
    code = main(["memory", *arguments])
    error = capsys.readouterr().err.splitlines()
    assert (code, len(error)) in [(0, 0), (1, 0), (2, 1)]
    assert option == "--prune" or (memory / "epoch-00000" / "train-000000.answers").read_bytes() == whole


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
