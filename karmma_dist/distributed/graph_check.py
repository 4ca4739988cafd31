"""The check that all ranks compute the same graph: ZeRO reduces gradients by their order, without names.

A rank that leaves out a branch corrupts the update of every rank, or hangs the job. So at the first step, and then
every `training.guard_every_steps` steps, the ranks compare before any reduction which parameters will get a gradient
and in which order. The graph of the loss already tells this, so nothing runs twice. Under ZeRO-3 the ranks also compare
before each module with parameters of its own, because gathering these parameters already needs all ranks.

The ranks compare through the job's key-value store, which still answers when a collective would block forever.
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
    """Return the names of the parameters that `loss.backward()` reaches, in the order in which gradients are completed.

    Args:
        loss: 0-d, with its graph.
        names: Name of each parameter by its `id`.
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
    ready = [(-loss.grad_fn._sequence_nr(), 0, loss.grad_fn)]  # torch's engine takes the newest ready node
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
    """Describe how the first rank with another order than rank 0 differs from it; None if all orders are equal."""
    first = orders[0]
    for rank, order in enumerate(orders):
        if list(order) == list(first):
            continue
        missing = [name for name in first if name not in set(order)]
        extra = [name for name in order if name not in set(first)]
        parts = [f"leaves out {_some(missing)}"] if missing else []
        parts += [f"has {_some(extra)}, which rank 0 leaves out"] if extra else []
        if not parts:
            index = next(i for i, names in enumerate(zip(first, order, strict=False)) if names[0] != names[1])
            parts = [f"reaches {order[index]} where rank 0 reaches {first[index]}"]
        return f"rank {rank} {' and '.join(parts)}"
    return None


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{', '.join(names[:_SHOWN])}{more}"


class GraphCheck:
    """The comparison of the ranks' graphs at the steps at which it is due.

    Args:
        model: Model whose trainable parameters are compared, and under ZeRO-3 its modules.
        store: Key-value store of the job.
        rank, size: Rank of this process and world size.
        every_steps: Steps between checks after the process's first step; 0: only the first step is checked.
        gathers: True if parameters are gathered module by module (ZeRO-3).
    """

    def __init__(
        self, model: nn.Module, store: dist.Store, rank: int, size: int, every_steps: int, gathers: bool = False
    ) -> None:
        self._model, self._store, self._rank, self._size = model, store, rank, size
        self._every_steps, self._gathers = every_steps, gathers
        self._names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
        self._num_comparisons = 0
        self._has_checked = False

    def is_due(self, step: int) -> bool:
        """Return True if optimizer step `step` (0-based) must be checked: the process's first, and every N-th."""
        if self._size == 1:
            return False
        return not self._has_checked or bool(self._every_steps and step % self._every_steps == 0)

    @contextlib.contextmanager
    def forward(self) -> Iterator[None]:
        """Enclose a checked forward pass: under ZeRO-3 the ranks compare before each module.

        Raises:
            UserError: the ranks are about to run different modules; raised on every rank.
        """
        handles = []
        for name, module in self._model.named_modules() if self._gathers else ():
            if any(True for _ in module.parameters(recurse=False)):
                handles.append(module.register_forward_pre_hook(self._comparison_before(name), prepend=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def check(self, loss: Tensor) -> None:
        """Compare the graphs of the ranks' losses, before `backward`. Every rank must call this.

        Raises:
            UserError: a rank's graph differs; raised on every rank, naming the parameters.
        """
        self._compare(gradient_order(loss, self._names), "the gradients of one step")
        self._has_checked = True

    def _comparison_before(self, name: str) -> Callable[[nn.Module, object], None]:
        def compare(module: nn.Module, arguments: object) -> None:  # noqa: ARG001
            self._compare([name], "the forward pass under ZeRO-3")

        return compare

    def _compare(self, order: list[str], stage: str) -> None:
        """Compare the ranks' orders on rank 0, by hash; send the lists themselves only if hashes differ."""
        prefix = f"graph_check/{self._num_comparisons}"
        self._num_comparisons += 1
        hashes = self._gather(f"{prefix}/hash", hashlib.sha256(json.dumps(order).encode()).hexdigest())
        if self._broadcast(f"{prefix}/equal", "no" if len(set(hashes)) > 1 else "yes") == "yes":
            return
        orders = [json.loads(text) for text in self._gather(f"{prefix}/order", json.dumps(order))]
        problem = self._broadcast(f"{prefix}/difference", (difference(orders) or "") if orders else "")
        raise UserError(
            f"{problem}: the ranks' graphs differ in {stage}, so their updates would be wrong: run every branch on "
            "every rank, with a zero input times 0 on a rank that has no input"
        )

    def _gather(self, key: str, text: str) -> list[str]:
        """Return every rank's text on rank 0, and an empty list on the others."""
        self._store.set(f"{key}/{self._rank}", text)
        texts = []
        for rank in range(self._size if self._rank == 0 else 0):
            wait_for(self._store, f"{key}/{rank}")
            texts.append(self._store.get(f"{key}/{rank}").decode())
            self._store.delete_key(f"{key}/{rank}")
        return texts

    def _broadcast(self, key: str, text: str) -> str:
        """Return rank 0's text on every rank."""
        if self._rank == 0:
            self._store.set(key, text)
        else:
            wait_for(self._store, key)
        return str(self._store.get(key).decode())
