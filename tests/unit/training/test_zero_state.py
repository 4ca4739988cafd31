"""State shards: for any number of saving and loading ranks, every element arrives once and unchanged."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from karmma_dist.errors import UserError
from karmma_dist.training.checkpoint.zero_state import SavedState, StateShards


@given(st.integers(1, 60), st.lists(st.integers(0, 60), max_size=6), st.integers(0, 60), st.integers(0, 60))
def test_any_range_is_read_from_any_sharding(
    tmp_path_factory: pytest.TempPathFactory, numel: int, cuts: list[int], a: int, b: int
) -> None:
    folder = tmp_path_factory.mktemp("cut")
    whole = torch.randn(numel)
    edges = sorted({0, numel, *(cut for cut in cuts if cut < numel)})
    files = []
    for rank, (start, end) in enumerate(itertools.pairwise(edges)):
        files.append(folder / f"rank-{rank:05d}.safetensors")
        save_file({f"weight:{start}:a.b": whole[start:end].clone()}, files[-1])
    first, end = sorted((min(a, numel), min(b, numel)))
    with SavedState(files) as saved:
        assert torch.equal(saved.read("weight", "a.b", first, end - first), whole[first:end])
        with pytest.raises(UserError, match=rf"weight of a\.b: {numel - first} of {numel + 1 - first} elements"):
            saved.read("weight", "a.b", first, numel + 1 - first)


class Net(nn.Module):
    """A network with trained and frozen parameters, a buffer that changes, and a parameter that no loss depends on."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.trained, self.frozen, self.unused = nn.Linear(3, width), nn.Linear(width, 2), nn.Linear(2, 2)
        self.norm = nn.BatchNorm1d(width)
        self.frozen.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.frozen(self.norm(self.trained(x)))
        return out


def train(net: Net, optimizer: torch.optim.Optimizer, steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        net(torch.randn(8, 3, generator=generator)).square().sum().backward()
        optimizer.step()


def write(net: Net, optimizer: torch.optim.Optimizer, folder: Path, num_ranks: int) -> list[Path]:
    """Save the state as `num_ranks` ranks that each hold all of it; return the files."""
    files = []
    for rank in range(num_ranks):
        files.append(folder / f"rank-{rank:05d}.safetensors")
        save_file(StateShards(net, optimizer, optimizer, rank, num_ranks).snapshot(), files[-1])
    return files


@pytest.mark.parametrize("num_ranks", [1, 2, 7])
def test_resumed_training_is_bit_identical_and_saves_each_element_once(tmp_path: Path, num_ranks: int) -> None:
    net = Net()
    start = copy.deepcopy(net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    train(net, optimizer, 3, seed=1)
    files = write(net, optimizer, tmp_path, num_ranks)
    resumed, fresh = start, torch.optim.AdamW(start.parameters(), lr=0.1)
    with SavedState(files) as saved:
        StateShards(resumed, fresh, fresh, 0, 1).restore(saved, {})
    train(net, optimizer, 3, seed=2)
    train(resumed, fresh, 3, seed=2)
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    trained = sum(p.numel() for p in net.trained.parameters()) + sum(p.numel() for p in net.norm.parameters())
    unused = sum(p.numel() for p in net.unused.parameters())
    assert sum(path.stat().st_size for path in files) < 4 * (3 * trained + unused) + 3000 + 500 * num_ranks


def test_checkpoint_of_another_model_is_refused_naming_the_difference(tmp_path: Path) -> None:
    net, other = Net(), Net(width=6)
    optimizer = torch.optim.AdamW(net.parameters())
    files = write(net, optimizer, tmp_path, 2)
    before = copy.deepcopy(other.state_dict())
    fresh = torch.optim.AdamW(other.parameters())
    with SavedState(files) as saved, pytest.raises(UserError, match=r"norm\.bias \(5 -> 6\)"):
        StateShards(other, fresh, fresh, 0, 1).restore(saved, {})
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())


def test_invalid_safetensors_file_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "rank-00000.safetensors").write_text("no tensors")
    with pytest.raises(UserError, match=r"rank-00000\.safetensors: not a part of a checkpoint"):
        SavedState([tmp_path / "rank-00000.safetensors"])
