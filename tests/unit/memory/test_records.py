"""A memory gives back what was stored, bit for bit, or nothing: for other views, damage, and kills in the middle."""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from karmma_dist.errors import UserError
from karmma_dist.io.disk_errors import DiskError
from karmma_dist.io.json_fields import JsonObject
from karmma_dist.memory import records
from karmma_dist.memory.header import HEADER, MemoryHeader, open_header, read_header
from karmma_dist.memory.memory import AnswerMemory, Source, set_of
from karmma_dist.memory.records import AnswerFiles
from kits.fuzzing import cases
from kits.patience import HANGS_S

SHARDS = {"train-000000.tar": 5, "train-000001.tar": 3}


def files(folder: Path, answer_bytes: int = 12) -> AnswerFiles:
    return AnswerFiles(folder, answer_bytes, SHARDS)


def answer(draw: random.Random, num_bytes: int = 12) -> bytes:
    return draw.randbytes(num_bytes)


@given(st.integers(0, 2**32 - 1))
def test_what_was_stored_is_found_and_nothing_else(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    draw, folder = random.Random(seed), tmp_path_factory.mktemp("memory")
    memory, stored = files(folder), {}
    places = [(epoch, shard, row) for epoch in range(2) for shard, num in SHARDS.items() for row in range(num)]
    for place in draw.choices(places, k=20):
        entry = (draw.randint(1, 7), answer(draw))
        memory.write(*place, *entry)
        stored.setdefault(place, entry)  # the first answer stays
    for reader in (memory, files(folder)):
        for place in places:
            modalities, expected = stored.get(place, (1, None))
            assert reader.read(*place, modalities) == expected
            assert reader.read(*place, modalities ^ 8) is None
        assert reader.lookups.damaged == 0
        assert reader.lookups.found == len(stored)
        reader.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_answers_come_back_bit_for_bit_in_every_precision(tmp_path: Path, dtype: torch.dtype) -> None:
    header = MemoryHeader("logits", str(dtype).removeprefix("torch."), (2, 3), SHARDS, 8, {})
    memory, source = AnswerMemory(tmp_path, header), Source(4, "train-000001.tar", 2)
    given_EA = torch.tensor([[1 / 3, -0.0, 1e-7], [float("nan"), float("inf"), -2.5]]).to(dtype)
    kept_M = torch.tensor([True, False, True]).numpy()
    memory.store(source, kept_M, given_EA)
    found_EA = memory.clone().find(source, kept_M, kept_M)
    assert found_EA is not None
    assert found_EA.dtype == dtype
    assert torch.equal(found_EA.view(torch.uint8), given_EA.view(torch.uint8))
    assert memory.find(source, ~kept_M, kept_M) is None


def test_no_bit_of_a_record_may_flip(tmp_path: Path) -> None:
    memory = files(tmp_path)
    memory.write(0, "train-000000.tar", 1, 5, b"twelve bytes")
    path = memory.path(0, "train-000000.tar")
    content = path.read_bytes()
    size = memory.record_bytes
    for bit in range(8 * size):
        flipped = bytearray(content)
        flipped[size + bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        reader = files(tmp_path)
        assert reader.read(0, "train-000000.tar", 1, 5) is None
        assert (reader.lookups.damaged, reader.lookups.first_damaged) == (1, f"{path}, record 1")
        assert reader.read(0, "train-000000.tar", 0, 5) is None
        reader.close()


def test_a_file_that_was_cut_lacks_the_answers_behind_the_cut(tmp_path: Path) -> None:
    memory = files(tmp_path)
    for row in range(5):
        memory.write(0, "train-000000.tar", row, 1, bytes([row]) * 12)
    path = memory.path(0, "train-000000.tar")
    os.truncate(path, 2 * memory.record_bytes + 7)
    reader = files(tmp_path)
    assert [reader.read(0, "train-000000.tar", row, 1) is not None for row in range(5)] == [True, True] + 3 * [False]
    memory.close()
    memory.write(0, "train-000000.tar", 4, 1, bytes(12))
    assert reader.read(0, "train-000000.tar", 4, 1) == bytes(12)


def _write_at_random(folder: Path, seed: int, ready: Any) -> None:
    draw, memory = random.Random(seed), files(folder, 64)
    ready.set()
    while True:
        shard, num = draw.choice(list(SHARDS.items()))
        row = draw.randrange(num)
        memory.write(draw.randrange(3), shard, row, 3, bytes([row + 1]) * 64)


def test_killed_writers_leave_whole_answers_or_none(tmp_path: Path) -> None:
    """Kill two processes that write the same memory, several times."""
    context = multiprocessing.get_context("fork")
    for round_ in cases(3):
        started = [context.Event() for _ in range(2)]
        processes = [context.Process(target=_write_at_random, args=(tmp_path, round_, event)) for event in started]
        for process in processes:
            process.start()
        assert all(event.wait(HANGS_S) for event in started)
        for process in processes:
            process.join(random.Random(round_).uniform(0.02, 0.1))
            process.kill()
            process.join()
    memory = files(tmp_path, 64)
    places = [(epoch, shard, row) for epoch in range(3) for shard, num in SHARDS.items() for row in range(num)]
    found = {place: memory.read(*place, 3) for place in places}
    assert any(found.values())
    assert all(content is None or content == bytes([row + 1]) * 64 for (_, _, row), content in found.items())


def test_many_shards_leave_few_files_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "_MOST_OPEN", 3)
    shards = {f"train-{number:06d}.tar": 2 for number in range(20)}
    memory = AnswerFiles(tmp_path, 4, shards)
    for shard in shards:
        memory.write(0, shard, 1, 1, b"four")
        assert memory.read(0, shard, 1, 1) == b"four"
        assert len(memory._open) <= 3


def test_a_full_disk_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    memory = files(tmp_path)
    monkeypatch.setattr(os, "pwrite", refuse)
    with pytest.raises(DiskError, match=r"train-000001\.answers: No space left on device: free some space"):
        memory.write(7, "train-000001.tar", 0, 1, bytes(12))


def test_a_disk_that_fails_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> bytes:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    memory = files(tmp_path)
    memory.write(7, "train-000001.tar", 0, 1, bytes(12))
    monkeypatch.setattr(os, "pread", refuse)
    with pytest.raises(UserError, match=r"epoch-00007/train-000001\.answers: cannot be read: Stale file handle"):
        memory.read(7, "train-000001.tar", 0, 1)


HEADERS = MemoryHeader("logits", "float32", (1, 9), SHARDS, 8, {"seed": 5, "heads": [["verb", 4], ["noun", 5]]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "tokens"}, "its kind is 'tokens', this run's 'logits'"),
        ({"dtype": "bfloat16"}, "its precision is 'bfloat16', this run's 'float32'"),
        ({"shape": [3, 9]}, r"its shape of an answer is \[3, 9\], this run's \[1, 9\]"),
        ({"facts": {"seed": 6, "heads": [["verb", 4], ["noun", 5]]}}, "its seed is 6, this run's 5"),
        ({"facts": {"seed": 5}}, r"its heads is None, this run's \[\['verb', 4\], \['noun', 5\]\]"),
        ({"facts": {**HEADERS.facts, "crop": 3}}, "its crop is 3, this run's None"),
        ({"num_clips": {"train-000000.tar": 4}}, "its numbers of clips per shard differ"),
    ],
)
def test_a_memory_of_something_else_is_refused_with_the_difference(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    other = MemoryHeader.from_fields(JsonObject({**HEADERS.to_json(), **change}))
    open_header(tmp_path / "m", other)
    assert read_header(tmp_path / "m") == other
    with pytest.raises(UserError, match=f"m: this memory is of something else: {message}: name another folder"):
        open_header(tmp_path / "m", HEADERS)


def test_answers_whose_header_is_gone_are_refused(tmp_path: Path) -> None:
    memory = files(tmp_path)
    memory.write(0, "train-000000.tar", 0, 1, bytes(range(12)))
    memory.close()
    with pytest.raises(UserError, match=r"answers without memory\.json, so what they are of is unknown"):
        open_header(tmp_path, HEADERS)
    assert not (tmp_path / HEADER).exists()


def test_a_memory_that_is_gone_is_not_begun_anew(tmp_path: Path) -> None:
    folder = tmp_path / "memory"
    open_header(folder, HEADERS)
    memory = files(folder)
    memory.write(0, "train-000000.tar", 0, 1, bytes(12))
    shutil.rmtree(folder)
    with pytest.raises(UserError, match="memory: the memory is gone"):
        memory.write(1, "train-000000.tar", 0, 1, bytes(12))
    assert memory.read(1, "train-000000.tar", 0, 1) is None
    assert not folder.exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b'{"format": 1}', b'{"format": 2}', b"\xff", b'{"format": 2, "kind": "logits", "dtype": "int4"}',
     b'{"format":2,"kind":"logits","dtype":"int8","shape":[0],"num_clips":{},"num_expected":1,"facts":{}}',
     b'{"format":2,"kind":"logits","dtype":"int8","shape":[9,-9],"num_clips":{},"num_expected":1,"facts":{}}',
     b'{"format":2,"kind":"logits","dtype":"int8","shape":[1000000,1000000],"num_clips":{},"num_expected":1,"facts":{}}',
     b'{"format":2,"kind":"logits","dtype":"int8","shape":[1],"num_clips":{"../x.tar":1},"num_expected":1,"facts":{}}'],
)  # fmt: skip
def test_a_damaged_header_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / HEADER).write_bytes(content)
    with pytest.raises(UserError, match=r"memory\.json: not the header of a memory"):
        open_header(tmp_path, HEADERS)


def test_sets_of_modalities_are_numbered() -> None:
    assert [set_of(torch.tensor(kept).numpy()) for kept in ([True, False], [False, True], [True, True])] == [1, 2, 3]
