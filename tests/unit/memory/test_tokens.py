"""Stored tokens are the encoder's, rounded as their type says, whatever the numbers are."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from karmma_dist.memory.header import MemoryHeader
from karmma_dist.memory.memory import DTYPES, Source
from karmma_dist.memory.tokens import TokenMemory

SHARDS = {"train-000000.tar": 5}
TYPES = ["float32", "bfloat16", "float16", "int8"]


def memory_of(dtype: str, folder: Path = Path("m"), shape: tuple[int, int] = (3, 8)) -> TokenMemory:
    return TokenMemory(folder, MemoryHeader("tokens", dtype, shape, SHARDS, 5, {}))


def tokens(seed: int, num: int = 4, size: float = 1.0) -> torch.Tensor:
    return size * torch.randn(num, 3, 8, generator=torch.Generator().manual_seed(seed))


@given(st.sampled_from(TYPES), st.integers(0, 2**32 - 1), st.floats(1e-6, 1e6), st.integers(0, 4))
def test_every_number_is_rounded_to_the_nearest_of_its_type(dtype: str, seed: int, size: float, num: int) -> None:
    memory, given_NTD = memory_of(dtype), tokens(seed, num, size)
    packed_NX = memory.pack(given_NTD)
    assert (packed_NX.dtype, packed_NX.shape) == (torch.uint8, (num, memory.header.answer_bytes))
    stored_NTD = memory.unpack(packed_NX, torch.float32)
    assert stored_NTD.shape == given_NTD.shape
    if dtype == "int8":
        largest_NT1 = given_NTD.abs().amax(dim=2, keepdim=True)
        assert ((stored_NTD - given_NTD).abs() <= largest_NT1 * (0.5 / 127 + 1e-6)).all()
    else:
        limit = torch.finfo(DTYPES[dtype]).max
        assert torch.equal(stored_NTD, given_NTD.clamp(-limit, limit).to(DTYPES[dtype]).float())
    assert torch.equal(memory.unpack(memory.pack(stored_NTD), torch.float32), stored_NTD)  # rounding again is no change


@pytest.mark.parametrize("dtype", TYPES)
def test_a_clips_tokens_do_not_depend_on_the_others_of_its_batch(dtype: str) -> None:
    memory, batch_NTD = memory_of(dtype), tokens(0)
    packed_NX = memory.pack(batch_NTD)
    for row in range(len(batch_NTD)):
        assert torch.equal(memory.pack(batch_NTD[row : row + 1])[0], packed_NX[row])
        assert torch.equal(
            memory.unpack(packed_NX[row : row + 1], torch.bfloat16), memory.unpack(packed_NX, torch.bfloat16)[row, None]
        )


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_hidden(dtype: str, number: float) -> None:
    memory, given_NTD = memory_of(dtype), tokens(0)
    given_NTD[1, 2, 5] = number
    stored_NTD = memory.unpack(memory.pack(given_NTD), torch.float32)
    is_finite_NT = stored_NTD.isfinite().all(dim=2)
    assert not is_finite_NT[1, 2]
    assert is_finite_NT.sum() == is_finite_NT.numel() - 1


def test_half_precision_holds_numbers_that_are_too_large_for_it() -> None:
    stored_NTD = memory_of("float16").unpack(memory_of("float16").pack(tokens(0, size=1e9)), torch.float32)
    assert stored_NTD.isfinite().all()


@pytest.mark.parametrize("dtype", TYPES)
def test_stored_tokens_are_found_at_their_view_and_clip_only(tmp_path: Path, dtype: str) -> None:
    memory = memory_of(dtype, tmp_path)
    packed_NX = memory.pack(tokens(0, num=5))
    for row in range(0, 5, 2):
        memory.store(Source(1, "train-000000.tar", row), packed_NX[row])
    for view, row in itertools.product(range(2), range(5)):
        found_X = memory.clone().find(Source(view, "train-000000.tar", row))
        assert (found_X is None) == (view != 1 or row % 2 == 1)
        assert found_X is None or torch.equal(found_X, packed_NX[row])


def test_tokens_of_another_shape_are_a_bug() -> None:
    with pytest.raises(ValueError, match=r"tokens are \(3, 8\), expected \(3, 9\)"):
        memory_of("int8", shape=(3, 9)).pack(tokens(0))
