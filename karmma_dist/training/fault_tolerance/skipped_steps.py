"""Optimizer steps that were skipped because a loss or gradient was not finite: who, on which clips, and how many."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from karmma_dist.errors import UserError

_SHOWN = 8


@dataclass(frozen=True)
class Suspect:
    """One rank's part of a step that was skipped."""

    rank: int
    loss_is_finite: bool
    clips: list[str]
    """Keys of its clips; where its loss was not finite, of the forward passes whose was not."""


class Skips:
    """Skipped steps of a run, counted alike on every rank.

    Args:
        allowed: skipped steps in a row after which the run gives up.
        gather: the lists of all ranks joined, on every rank.
        scales_loss: fp16, whose loss scale is found by gradients that overflow: such steps are no fault.
    """

    def __init__(self, allowed: int, gather: Callable[[list[Any]], list[Any]], scales_loss: bool = False) -> None:
        self._allowed, self._gather, self._scales_loss = allowed, gather, scales_loss
        self._in_a_row = 0
        self.num_skipped = 0
        """Steps skipped for a loss or gradient that was not finite."""
        self.num_rescaled = 0
        """Steps that fp16's loss scale skipped."""

    def applied(self) -> None:
        """An update was made."""
        self._in_a_row = 0

    def note(self, mine: Suspect) -> dict[str, Any]:
        """A step was skipped; every rank must call this.

        Returns:
            What to write down: `cause` (loss, gradient or loss_scale) and the suspects, equal on every rank.
        """
        everyone = self._gather([mine])
        suspects = [one for one in everyone if not one.loss_is_finite]
        if not suspects and self._scales_loss:
            self.num_rescaled += 1
            return {"cause": "loss_scale", "suspects": []}
        self.num_skipped += 1
        self._in_a_row += 1
        cause = "loss" if suspects else "gradient"
        return {"cause": cause, "suspects": [asdict(one) for one in suspects or everyone]}

    def give_up_after_too_many(self, event: dict[str, Any]) -> None:
        """Raise where the last skipped step was one too many.

        Raises:
            UserError: on every rank alike.
        """
        if self._in_a_row >= self._allowed:
            raise UserError(
                f"{self._in_a_row} optimizer steps in a row were skipped, training.max_skipped_steps allows "
                f"{self._allowed - 1}: {describe(event)}: lower optimizer.lr, or look at these clips with karmma-dist "
                "inspect; the last checkpoint is as it was"
            )


def describe(event: dict[str, Any]) -> str:
    """One line of what `Skips.note` returned."""
    if event["cause"] == "loss_scale":
        return "the gradient overflowed at fp16's loss scale, which is now lower"
    parts = []
    for one in event["suspects"][:_SHOWN]:
        clips = one["clips"]
        more = f" and {len(clips) - _SHOWN} more" if len(clips) > _SHOWN else ""
        parts.append(f"rank {one['rank']} with {', '.join(clips[:_SHOWN])}{more}")
    left = len(event["suspects"]) - len(parts)
    return f"the {event['cause']} is not finite on {'; '.join(parts)}{f'; and {left} more ranks' if left > 0 else ''}"
