"""Sums over the clips of past optimizer steps, equal on every rank, on which a later step may depend.

    forward passes of a step: add (this rank's clips) -> after the step, the trainer: commit (reduced over the ranks)

A step reads what earlier steps committed, never what it adds itself. So all ranks read the same numbers, and any number
of ranks and forward passes per step gives the same sums, to rounding. Nothing of a skipped step is committed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class RunningSums(nn.Module):
    """Running sums in float64. They are a buffer: in a model they are saved with the weights and in checkpoints.

    Args:
        num: Number of sums.
        decay: Factor of the sums at each commit: 1 weighs all steps alike, less favours the latest ones.
    """

    sums: Tensor
    """float64 (num,), what has been committed."""

    def __init__(self, num: int, decay: float = 1.0) -> None:
        super().__init__()
        self.decay = decay
        self._added: Tensor | None = None
        self.register_buffer("sums", torch.zeros(num, dtype=torch.float64))

    @torch.no_grad()
    def add(self, values: Tensor) -> None:
        """Add values (num,) of this rank's clips to what the next `commit` takes."""
        values = values.detach().to(self.sums)
        self._added = values if self._added is None else self._added + values

    @torch.no_grad()
    def commit(self, sum_over_ranks: Callable[[Tensor], Tensor], *, keep: bool) -> None:
        """Add what all ranks have added since the last call to the sums. Every rank must call this.

        Args:
            sum_over_ranks: Returns the sum of a tensor over the ranks.
            keep: False to forget it: the step was skipped.
        """
        added = torch.zeros_like(self.sums) if self._added is None else self._added
        self._added = None
        if keep:
            self.sums.mul_(self.decay).add_(sum_over_ranks(added))

    def restore(self, sums: Sequence[float]) -> None:
        """Set the sums to those of a checkpoint, in place."""
        self.sums.copy_(torch.tensor(sums, dtype=self.sums.dtype))

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> RunningSums:
        """Move with the module, and stay float64 when its parameters get another type: bf16 cannot count to 257."""
        before = self.sums
        super()._apply(fn, recurse)
        self.sums = before.to(self.sums.device)
        return self


def running_sums(module: nn.Module) -> list[RunningSums]:
    """Return the running sums of a module, in the same order on every rank."""
    return [part for part in module.modules() if isinstance(part, RunningSums)]
