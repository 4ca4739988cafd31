"""Figures of a training: running means, accuracy and entropy of model and teacher, cost of loading."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from karmma_dist.recipe import Recipe
from karmma_dist.streaming.batch import Batch

_PER_STEP = ("wait_s", "step_s", "flops", "grad_norm")
"""Measured once per optimizer step; everything else once per forward pass."""
_SAME = Fraction(1)


def loading_sums(batch: Batch, modalities: Sequence[str]) -> dict[str, float]:
    """What a batch's loading adds to the averages: the same names on every rank and for every batch."""
    stats = batch.stats
    sums = {"read_s": stats.read_s, "bytes_read": float(stats.bytes_read), "queue_depth": float(stats.queue_depth)}
    for modality in modalities:
        sums[f"decode_s/{modality}"] = stats.decode_s.get(modality, 0.0)
        sums[f"decoded/{modality}"] = float(stats.clips_decoded.get(modality, 0))
    return sums


def pace(means: dict[str, float], step_s: float, recipe: Recipe) -> dict[str, float]:
    """Take the means of loading out of `means`; returns what they say, and what a step of `step_s` seconds does.

    `clips_per_s` is of all ranks together, `data_wait_share` the part of a step that waits for its batch.
    """
    rates = {"clips_per_s": recipe.training.batch_size / step_s, "data_wait_share": means.pop("wait_s") / step_s}
    return rates | loading_metrics(means, recipe.data.modalities)


def loading_metrics(means: dict[str, float], modalities: Sequence[str]) -> dict[str, float]:
    """Take the means of `loading_sums` out of `means`; returns what they say.

    `decode_ms_MODALITY` is per clip decoded and worker, `read_mb_per_s` what one worker gets while it reads (0 where
    nothing was), and `queue_depth` the batches that lay ready when one was asked for.
    """
    read_s, read_mb = means.pop("read_s"), means.pop("bytes_read") / 1e6
    found = {"read_mb_per_s": read_mb / read_s if read_s else 0.0, "queue_depth": means.pop("queue_depth")}
    for modality in modalities:
        seconds, clips = means.pop(f"decode_s/{modality}"), means.pop(f"decoded/{modality}")
        found[f"decode_ms_{modality}"] = 1000 * seconds / clips if clips else 0.0
    return found


def accuracies(name: str, scores: dict[str, Tensor], labels: dict[str, Tensor]) -> dict[str, Tensor]:
    """Share of the batch's clips, 0 to 1, whose labels are right: NAME_accuracy over all heads, and for each head.

    Args:
        name: whose they are.
        scores: logits or log-probabilities (B, C) per head.
        labels: int64 (B,) per head.
    """
    right = {head: scores_BC.detach().argmax(-1) == labels[head] for head, scores_BC in scores.items()}
    return _shares(f"{name}_accuracy", right)


def agreements(student: dict[str, Tensor], teacher: dict[str, Tensor]) -> dict[str, Tensor]:
    """Share of the batch's clips, 0 to 1, that both give the same class, over all heads together and for each head."""
    same = {head: of.detach().argmax(-1) == teacher[head].argmax(-1) for head, of in student.items()}
    return _shares("agreement", same)


def entropies(name: str, scores: dict[str, Tensor]) -> dict[str, Tensor]:
    """Mean entropy in nats of each head's class distributions: NAME_entropy_HEAD. Logits or log-probabilities."""
    log_probs = {head: of.detach().float().log_softmax(dim=-1) for head, of in scores.items()}
    return {f"{name}_entropy_{head}": -(of.exp() * of).sum(dim=-1).mean() for head, of in log_probs.items()}


def _shares(name: str, right: dict[str, Tensor]) -> dict[str, Tensor]:
    shares = {f"{name}_{head}": of.float().mean() for head, of in right.items()}
    return {name: torch.stack(list(right.values())).all(dim=0).float().mean(), **shares}


class Averages:
    """Running means of what was measured, kept on the device so that no step waits for them."""

    def __init__(self) -> None:
        self._values: dict[str, tuple[Any, int]] = {}

    def add(self, values: dict[str, Any]) -> None:
        """Add one measurement of each name: floats or 0-d tensors."""
        for name, value in values.items():
            total, count = self._values.get(name, (0, 0))
            self._values[name] = (total + value, count + 1)

    def take(self) -> dict[str, float]:
        """The means since the last call, as floats."""
        means = {name: float(total) / count for name, (total, count) in self._values.items()}
        self._values = {}
        return means

    def state(self) -> dict[str, list[float]]:
        """The running sums and counts, to be saved; sums of floats and of 0-d tensors are exact as Python floats."""
        return {name: [float(total), count] for name, (total, count) in self._values.items()}

    def restore(
        self, states: Sequence[Mapping[str, Sequence[float]]], rank: int, num_ranks: int, passes: Fraction = _SAME
    ) -> None:
        """Go on from the sums that the ranks of a saved run had; where they were not as many, from their mean.

        Args:
            states: `state` of each of them, in rank order.
            rank: this rank.
            num_ranks: ranks of this run.
            passes: forward passes per optimizer step of this run for each one of the saved run: steps before and after
                the save then weigh the same in a mean.
        """
        if len(states) == num_ranks:
            self._values = {name: (total, int(count)) for name, (total, count) in states[rank].items()}
        else:
            names = states[0]
            sums = {name: sum(state[name][0] for state in states) / len(states) for name in names}
            self._values = {name: (sums[name], int(states[0][name][1])) for name in names}
        if passes != 1:
            self._values = {
                name: (total, count) if name in _PER_STEP else (total * float(passes), round(count * passes))
                for name, (total, count) in self._values.items()
            }
