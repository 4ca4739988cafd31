"""Skipped optimizer steps: steps whose loss or gradient was not finite, with the ranks and clips that caused it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from karmma_dist.errors import UserError

_SHOWN = 8


@dataclass(frozen=True)
class RankStep:
    """One rank's part of a skipped step."""

    rank: int
    loss_is_finite: bool
    clips: list[str]
    """Keys of its clips; if its loss was not finite, only those of the affected forward passes."""


class SkippedSteps:
    """The skipped steps of a run, counted identically on every rank.

    Args:
        allowed: number of consecutive skipped steps at which the run gives up.
        gather: returns the concatenated lists of all ranks, on every rank.
        scales_loss: True for fp16, whose dynamic loss scale makes gradients overflow; such steps are not errors.
    """

    def __init__(self, allowed: int, gather: Callable[[list[Any]], list[Any]], scales_loss: bool = False) -> None:
        self._allowed, self._gather, self._scales_loss = allowed, gather, scales_loss
        self._in_a_row = 0
        self.is_skipping = False
        """True if the last step was skipped."""
        self.num_skipped = 0
        """Number of steps skipped because a loss or gradient was not finite."""
        self.num_rescaled = 0
        """Number of steps that the fp16 loss scale skipped."""

    def record_update(self) -> None:
        """Record that the parameters were updated."""
        self._in_a_row, self.is_skipping = 0, False

    def record_skip(self, local: RankStep) -> dict[str, Any]:
        """Record that a step was skipped. Every rank must call this.

        Returns:
            The event for the log: `cause` (loss, gradient or loss_scale) and `suspects`, equal on every rank.
        """
        self.is_skipping = True
        all_ranks = self._gather([local])
        suspects = [rank_step for rank_step in all_ranks if not rank_step.loss_is_finite]
        if not suspects and self._scales_loss:
            self.num_rescaled += 1
            return {"cause": "loss_scale", "suspects": []}
        self.num_skipped += 1
        self._in_a_row += 1
        cause = "loss" if suspects else "gradient"
        return {"cause": cause, "suspects": [asdict(rank_step) for rank_step in suspects or all_ranks]}

    def give_up_after_too_many(self, event: dict[str, Any]) -> None:
        """Give up if too many consecutive steps were skipped.

        Raises:
            UserError: the limit is reached; raised on every rank.
        """
        if self._in_a_row >= self._allowed:
            raise UserError(
                f"{self._in_a_row} optimizer steps in a row were skipped, training.max_skipped_steps allows "
                f"{self._allowed - 1}: {describe(event)}: lower optimizer.lr, or look at these clips with karmma-dist "
                "inspect; the last checkpoint is unchanged"
            )


def describe(event: dict[str, Any]) -> str:
    """Return one line that describes an event of `SkippedSteps.record_skip`."""
    if event["cause"] == "loss_scale":
        return "the gradient overflowed at fp16's loss scale, which is now lower"
    parts = []
    for suspect in event["suspects"][:_SHOWN]:
        clips = suspect["clips"]
        more = f" and {len(clips) - _SHOWN} more" if len(clips) > _SHOWN else ""
        parts.append(f"rank {suspect['rank']} with {', '.join(clips[:_SHOWN])}{more}")
    num_hidden = len(event["suspects"]) - len(parts)
    more_ranks = f"; and {num_hidden} more ranks" if num_hidden > 0 else ""
    return f"the {event['cause']} is not finite on {'; '.join(parts)}{more_ranks}"
