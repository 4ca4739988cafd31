"""The order of gradients is read from the graph, and ranks with differing graphs are named with their parameters."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from karmma_dist.distributed.graph_check import GraphCheck, difference, gradient_order
from karmma_dist.errors import UserError


class Branches(nn.Module):
    """Two branches that share a layer, and a parameter used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.video, self.audio, self.head = nn.Linear(3, 4), nn.Linear(2, 4), nn.Linear(4, 2)
        self.token = nn.Parameter(torch.randn(4))
        self.unused = nn.Linear(2, 2)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)

    def forward(self, branches: str = "va") -> Tensor:
        """Return the loss with the named branches."""
        tokens = [self.token]
        if "v" in branches:
            tokens.append(torch.tanh(self.video(torch.ones(3))) * self.token)
        if "a" in branches:
            tokens.append(self.audio(self.frozen(torch.ones(2))))
        tokens = tokens[::-1] if "r" in branches else tokens
        return sum((self.head(token) for token in tokens), torch.zeros(2)).square().sum()


def names(model: nn.Module) -> dict[int, str]:
    return {id(p): name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("branches", ["va", "v", "a", "", "var"])
def test_the_order_is_the_order_in_which_torch_completes_gradients(branches: str) -> None:
    model = Branches()
    seen: list[str] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: seen.append(name))
    loss = model(branches)
    order = gradient_order(loss, names(model))
    loss.backward()
    assert order == seen
    assert not any(name.startswith(("unused", "frozen")) for name in order)
    assert ("video.weight" in order) == ("v" in branches)


def test_the_graph_of_a_checkpointed_segment_is_complete() -> None:
    model = Branches()
    plain = gradient_order(model(), names(model))
    checkpointed = torch.utils.checkpoint.checkpoint(model, "va", use_reentrant=False)
    assert set(gradient_order(checkpointed, names(model))) == set(plain)


def test_a_difference_names_the_rank_and_the_parameters() -> None:
    assert difference([["a", "b"], ["a", "b"]]) is None
    assert difference([["a", "b"], ["a", "b"], ["a"]]) == "rank 2 leaves out b"
    assert difference([["a"], ["a", "b"]]) == "rank 1 has b, which rank 0 leaves out"
    assert difference([["a", "b"], ["b", "a"]]) == "rank 1 reaches b where rank 0 reaches a"


def on_ranks(size: int, work: Callable[[int, dist.Store], None]) -> list[BaseException | None]:
    """Run `work` on one thread per rank with a shared store; return the exception of each rank."""
    server = dist.TCPStore("127.0.0.1", 0, None, True)
    raised: list[BaseException | None] = [None] * size

    def run(rank: int) -> None:
        try:
            work(rank, server.clone())
        except BaseException as error:
            raised[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a rank hangs"
    return raised


@pytest.mark.parametrize("branches", [("va", "va", "va"), ("va", "va", "v")])
def test_every_rank_stops_with_one_line_if_graphs_differ(branches: tuple[str, ...]) -> None:
    def work(rank: int, store: dist.Store) -> None:
        model = Branches()
        check = GraphCheck(model, store, rank, 3, every_steps=10)
        assert check.is_due(7)
        check.check(model("va"))
        assert [step for step in range(5, 25) if check.is_due(step)] == [10, 20]
        check.check(model(branches[rank]))

    raised = on_ranks(3, work)
    if len(set(branches)) == 1:
        assert raised == [None] * 3
    else:
        assert {type(error) for error in raised} == {UserError}
        assert len({str(error) for error in raised}) == 1
        problem, _, rest = str(raised[0]).partition(": ")
        assert problem.startswith("rank 2 leaves out ")
        assert set(problem.removeprefix("rank 2 leaves out ").split(", ")) == {"audio.bias", "audio.weight"}
        assert "the ranks' graphs differ" in rest


def test_zero_3_ranks_stop_before_a_module_that_another_skips() -> None:
    def work(rank: int, store: dist.Store) -> None:
        model = Branches()
        check = GraphCheck(model, store, rank, 2, every_steps=0, gathers=True)
        with check.forward():
            model("va" if rank == 0 else "a")

    raised = on_ranks(2, work)
    assert {type(error) for error in raised} == {UserError}
    assert "rank 1 leaves out video and has frozen" in str(raised[0])


def test_a_single_process_is_never_checked() -> None:
    assert not GraphCheck(Branches(), dist.HashStore(), 0, 1, every_steps=1).is_due(0)
