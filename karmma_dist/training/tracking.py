"""Training metrics: running means, accuracy and entropy of model and teacher, data loading time."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from karmma_dist.recipe import Recipe
from karmma_dist.streaming.batch import Batch

_PER_STEP = ("wait_s", "step_s", "flops", "grad_norm")
"""Names measured once per optimizer step; all others are measured once per forward pass."""
_SAME = Fraction(1)
_OVER = " / labelled_"
"""Text between the name of a measurement and the head by whose share of the clips its mean is to be divided."""


def loading_sums(batch: Batch, modalities: Sequence[str]) -> dict[str, float]:
    """Return a batch's loading statistics for the averages; the names are equal on every rank and for every batch."""
    stats = batch.stats
    sums = {"read_s": stats.read_s, "bytes_read": float(stats.bytes_read), "queue_depth": float(stats.queue_depth)}
    for modality in modalities:
        sums[f"decode_s/{modality}"] = stats.decode_s.get(modality, 0.0)
        sums[f"decoded/{modality}"] = float(stats.clips_decoded.get(modality, 0))
    return sums


def answer_sums(batch: Batch) -> dict[str, float]:
    """Return a batch's statistics of the teacher's memory for the averages.

    `remembered_share` is the share of clips whose answers are remembered, `answers_mb` what was read for a batch.
    """
    return {
        "remembered_share": float(batch.answers_BEA is not None), "answers_mb": batch.lookups.num_bytes / 1e6,
        "damaged_answers": float(batch.lookups.damaged),
    }  # fmt: skip


def token_sums(batch: Batch, modalities: Collection[str]) -> dict[str, float]:
    """Return a batch's statistics of the memories of frozen encoders for the averages.

    `remembered_tokens_share` is the share of (clip, modality) pairs whose tokens are remembered, `tokens_mb` what was
    read for a batch.

    Args:
        batch: Batch.
        modalities: Modalities whose encoders have a memory.
    """
    remembered = sum(len(tokens.packed_NX) for tokens in batch.tokens.values())
    encoded = sum(len(clips) for modality, clips in batch.inputs.items() if modality in modalities)
    return {
        "remembered_tokens_share": remembered / max(remembered + encoded, 1),
        "tokens_mb": batch.token_lookups.num_bytes / 1e6, "damaged_tokens": float(batch.token_lookups.damaged),
    }  # fmt: skip


def pace(means: dict[str, float], step_s: float, recipe: Recipe) -> dict[str, float]:
    """Remove the loading statistics from `means`; return the loading metrics and the pace at `step_s` seconds per step.

    `clips_per_s` counts the clips of all ranks; `data_wait_share` is the fraction of a step spent waiting for a batch.
    """
    rates = {"clips_per_s": recipe.training.batch_size / step_s, "data_wait_share": means.pop("wait_s") / step_s}
    return rates | loading_metrics(means, recipe.data.modalities)


def loading_metrics(means: dict[str, float], modalities: Sequence[str]) -> dict[str, float]:
    """Remove the means of `loading_sums` from `means`, and return the metrics computed from them.

    `decode_ms_MODALITY` is the time that a worker takes to decode one clip, `read_mb_per_s` the read rate of one worker
    (0 if nothing was read), and `queue_depth` the number of batches that were ready when one was requested.
    """
    read_s, read_mb = means.pop("read_s"), means.pop("bytes_read") / 1e6
    metrics = {"read_mb_per_s": read_mb / read_s if read_s else 0.0, "queue_depth": means.pop("queue_depth")}
    for modality in modalities:
        seconds, clips = means.pop(f"decode_s/{modality}"), means.pop(f"decoded/{modality}")
        metrics[f"decode_ms_{modality}"] = 1000 * seconds / clips if clips else 0.0
    return metrics


Labelled = Mapping[str, Tensor] | None
"""bool (B,) by head, True = the clip has the head; None: every clip has every head."""


def labelled_shares(labelled: Labelled) -> dict[str, Tensor]:
    """Return labelled_HEAD, the share of clips that have a head, if clips may lack heads.

    The measurements of a head, by the functions below, are then sums over the clips that have it, divided by all clips:
    their means over passes and ranks are exact, and `over_labelled` makes them means over the clips that have the head.
    """
    return {f"labelled_{head}": has_B.float().mean() for head, has_B in (labelled or {}).items()}


def over_labelled(means: Mapping[str, float]) -> dict[str, float]:
    """Return the means over passes and ranks, those of a head's measurements over the clips that have the head.

    A head that no clip had has none. See `labelled_shares`.
    """
    result = {}
    for name, mean in means.items():
        measured, _, head = name.partition(_OVER)
        if not head:
            result[name] = mean
        elif share := means[f"labelled_{head}"]:
            result[measured] = mean / share
    return result


def accuracies(
    name: str, scores: dict[str, Tensor], labels: dict[str, Tensor], labelled: Labelled = None
) -> dict[str, Tensor]:
    """Return the fraction of correctly classified clips, 0 to 1: NAME_accuracy for all heads together, and per head.

    Args:
        name: prefix of the metrics' names.
        scores: logits or log-probabilities (B, C) per head.
        labels: int64 (B,) per head.
        labelled: clips that have each head.
    """
    right = {head: scores_BC.detach().argmax(-1) == labels[head] for head, scores_BC in scores.items()}
    return _shares(f"{name}_accuracy", right, labelled)


def agreements(
    student: dict[str, Tensor], teacher: dict[str, Tensor], labelled: Labelled = None
) -> dict[str, Tensor]:
    """Return the share of clips, 0 to 1, that both assign to the same class: for all heads together, and per head."""
    same = {head: logits_BC.detach().argmax(-1) == teacher[head].argmax(-1) for head, logits_BC in student.items()}
    return _shares("agreement", same, labelled)


def entropies(name: str, scores: dict[str, Tensor], labelled: Labelled = None) -> dict[str, Tensor]:
    """Return NAME_entropy_HEAD, the mean entropy in nats of a head's class distributions.

    Args:
        name: prefix of the metrics' names.
        scores: logits or log-probabilities (B, C) per head.
        labelled: clips that have each head.
    """
    means = {}
    for head, scores_BC in scores.items():
        log_probs_BC = scores_BC.detach().float().log_softmax(dim=-1)
        entropy_B = -(log_probs_BC.exp() * log_probs_BC).sum(dim=-1)
        if labelled is not None:
            entropy_B = entropy_B * labelled[head]
        means[_of_head(f"{name}_entropy", head, labelled)] = entropy_B.mean()
    return means


def _shares(name: str, right: dict[str, Tensor], labelled: Labelled) -> dict[str, Tensor]:
    """Return the shares of clips that are right in all heads that they have, and per head."""
    in_all = list(right.values())
    if labelled is not None:
        in_all = [right_B | ~labelled[head] for head, right_B in right.items()]
        right = {head: right_B & labelled[head] for head, right_B in right.items()}
    shares = {_of_head(name, head, labelled): right_B.float().mean() for head, right_B in right.items()}
    return {name: torch.stack(in_all).all(dim=0).float().mean(), **shares}


def _of_head(name: str, head: str, labelled: Labelled) -> str:
    """Return the name of a head's measurement, for `over_labelled` if clips may lack the head."""
    return f"{name}_{head}" if labelled is None else f"{name}_{head}{_OVER}{head}"


def _nan_for_null(total: float | None) -> float:
    """Return a stored sum: JSON has null for one that is not finite."""
    return math.nan if total is None else total


class Averages:
    """Running means of measurements, kept on the device so that no step waits for them."""

    def __init__(self) -> None:
        self._values: dict[str, tuple[Any, int]] = {}

    def add(self, values: dict[str, Any]) -> None:
        """Add one measurement per name: floats or 0-d tensors."""
        for name, value in values.items():
            total, count = self._values.get(name, (0, 0))
            self._values[name] = (total + value, count + 1)

    def take(self) -> dict[str, float]:
        """Return the means since the last call, as floats, and start anew."""
        means = {name: float(total) / count for name, (total, count) in self._values.items()}
        self._values = {}
        return means

    def state(self) -> dict[str, list[float]]:
        """Return the running sums and counts for a checkpoint; Python floats hold the sums exactly."""
        return {name: [float(total), count] for name, (total, count) in self._values.items()}

    def restore(
        self, states: Sequence[Mapping[str, Sequence[Any]]], rank: int, num_ranks: int, passes: Fraction = _SAME
    ) -> None:
        """Restore the sums of the saved ranks, or their mean if the number of ranks has changed.

        Args:
            states: what `state` returned on each saved rank, in rank order.
            rank: this rank.
            num_ranks: number of ranks of this run.
            passes: ratio of this run's forward passes per optimizer step to those of the saved run; it gives the steps
                before and after the save equal weight in a mean.
        """
        states = [{name: (_nan_for_null(total), count) for name, (total, count) in s.items()} for s in states]
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
