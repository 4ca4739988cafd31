"""Do all ranks compute the same graph? ZeRO reduces gradients by their order, without names.

A rank that leaves a branch out corrupts the update of all of them, or the job hangs. So at the first step and now and
then (`training.guard_every_steps`) the ranks compare, before anything is reduced, which parameters will get a gradient
and in which order. That can be read off the graph of the loss, so nothing has to run twice. Under ZeRO-3 the ranks
also meet before each module with parameters of its own, because gathering those needs all ranks already.

They meet in the job's key-value store, which answers also where a collective would wait for ever.
"""

from __future__ import annotations

import contextlib
import hashlib
import heapq
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import Node

from karmma_dist.distributed.heartbeat import wait_for
from karmma_dist.errors import UserError

_SHOWN = 4


def gradient_order(loss: Tensor, names: dict[int, str]) -> list[str]:
    """Names of the parameters that `loss.backward()` reaches, in the order in which their gradients are complete.

    Args:
        loss: 0-d, with its graph.
        names: name of each parameter by its `id`.
    """
    if loss.grad_fn is None:
        return []
    waits: Counter[Node] = Counter()
    stack, seen = [loss.grad_fn], {loss.grad_fn}
    while stack:
        for following, _ in stack.pop().next_functions:
            if following is None:
                continue
            waits[following] += 1
            if following not in seen:
                seen.add(following)
                stack.append(following)
    order: list[str] = []
    ready = [(-loss.grad_fn._sequence_nr(), 0, loss.grad_fn)]  # torch's engine: of what is ready, the latest made
    num_pushed = 0
    while ready:
        node = heapq.heappop(ready)[2]
        parameter = getattr(node, "variable", None)
        if id(parameter) in names:
            order.append(names[id(parameter)])
        for following, _ in node.next_functions:
            if following is None:
                continue
            waits[following] -= 1
            if not waits[following]:
                num_pushed += 1
                heapq.heappush(ready, (-following._sequence_nr(), num_pushed, following))
    return order


def difference(orders: Sequence[Sequence[str]]) -> str | None:
    """What the first rank whose order is not rank 0's has otherwise; None: all are equal."""
    first = orders[0]
    for rank, order in enumerate(orders):
        if list(order) == list(first):
            continue
        lacks = [name for name in first if name not in set(order)]
        has = [name for name in order if name not in set(first)]
        parts = [f"leaves out {_some(lacks)}"] if lacks else []
        parts += [f"has {_some(has)}, which rank 0 leaves out"] if has else []
        if not parts:
            place = next(i for i, names in enumerate(zip(first, order, strict=False)) if names[0] != names[1])
            parts = [f"comes to {order[place]} where rank 0 comes to {first[place]}"]
        return f"rank {rank} {' and '.join(parts)}"
    return None


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{', '.join(names[:_SHOWN])}{more}"


class Guard:
    """Compares the ranks' graphs at the steps where that is due.

    Args:
        model: its trainable parameters are watched; under ZeRO-3 its modules are.
        store: of the job.
        rank, size: of this process.
        every_steps: distance of the checks after the first step of the process; 0: there are none after it.
        gathers: parameters are gathered module by module (ZeRO-3).
    """

    def __init__(
        self, model: nn.Module, store: dist.Store, rank: int, size: int, every_steps: int, gathers: bool = False
    ) -> None:
        self._model, self._store, self._rank, self._size = model, store, rank, size
        self._every_steps, self._gathers = every_steps, gathers
        self._names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
        self._num_meetings = 0
        self._has_checked = False

    def is_due(self, step: int) -> bool:
        """Whether optimizer step `step` (0-based) is to be checked: the process's first, and every N-th."""
        if self._size == 1:
            return False
        return not self._has_checked or bool(self._every_steps and step % self._every_steps == 0)

    @contextlib.contextmanager
    def forward(self) -> Iterator[None]:
        """Around a forward pass to be checked: under ZeRO-3 the ranks meet before each module.

        Raises:
            UserError: on every rank, if they are not about to run the same module.
        """
        handles = []
        for name, module in self._model.named_modules() if self._gathers else ():
            if any(True for _ in module.parameters(recurse=False)):
                handles.append(module.register_forward_pre_hook(self._meeting_before(name), prepend=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def check(self, loss: Tensor) -> None:
        """Compare the graphs of the ranks' losses, before `backward`. Every rank must call this.

        Raises:
            UserError: on every rank, if one's graph differs, naming the parameters.
        """
        self._compare(gradient_order(loss, self._names), "the gradients of one step")
        self._has_checked = True

    def _meeting_before(self, name: str) -> Callable[[nn.Module, object], None]:
        def meet(module: nn.Module, arguments: object) -> None:  # noqa: ARG001
            self._compare([name], "the forward pass under ZeRO-3")

        return meet

    def _compare(self, order: list[str], what: str) -> None:
        """Rank 0 compares and says what it found; only where hashes differ are the lists themselves sent."""
        meeting = f"guard/{self._num_meetings}"
        self._num_meetings += 1
        hashes = self._meet(f"{meeting}/hash", hashlib.sha256(json.dumps(order).encode()).hexdigest())
        if self._tell(f"{meeting}/equal", "no" if len(set(hashes)) > 1 else "yes") == "yes":
            return
        orders = [json.loads(text) for text in self._meet(f"{meeting}/order", json.dumps(order))]
        found = self._tell(f"{meeting}/found", (difference(orders) or "") if orders else "")
        raise UserError(
            f"{found}: the ranks' graphs differ in {what}, so their updates would be wrong: run every branch on every "
            "rank, on a zero input times 0 where a rank has none"
        )

    def _meet(self, key: str, text: str) -> list[str]:
        """Every rank's text, on rank 0; nothing on the others."""
        self._store.set(f"{key}/{self._rank}", text)
        texts = []
        for rank in range(self._size if self._rank == 0 else 0):
            wait_for(self._store, f"{key}/{rank}")
            texts.append(self._store.get(f"{key}/{rank}").decode())
            self._store.delete_key(f"{key}/{rank}")
        return texts

    def _tell(self, key: str, text: str) -> str:
        """Rank 0's text, on every rank."""
        if self._rank == 0:
            self._store.set(key, text)
        else:
            wait_for(self._store, key)
        return str(self._store.get(key).decode())
