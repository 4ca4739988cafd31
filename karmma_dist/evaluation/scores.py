"""The ranks that evaluation keeps of each clip, and the rows and counts that follow from them.

Ranks, not predictions: too much for results.json, but needed for intervals and paired tests.

Legend: B clips of a batch, N clips of the split, M modalities, K conditions.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from karmma_dist.errors import UserError
from karmma_dist.evaluation import metrics
from karmma_dist.evaluation.conditions import Condition
from karmma_dist.evaluation.groups import Groups
from karmma_dist.evaluation.metrics import calibration_error
from karmma_dist.evaluation.summary import summarise


@dataclass(frozen=True)
class Outcomes:
    """The counted clips of one model under every condition. N clips, K conditions."""

    keys: list[str]
    """In ascending order."""
    conditions: list[Condition]
    """Columns of `ranks`."""
    ranks: dict[str, np.ndarray]
    """Rank of the true class, int32 (N, K), for "action" and per head; -1 = the clip has none of the modalities."""


_DAMAGE_SHOWN = 20
"""Damaged members listed one by one in a summary."""


@dataclass(frozen=True)
class Results:
    """What `eval/results.json` holds."""

    rows: list[dict[str, Any]]
    """One per condition: modalities, drop_prob, seed, corrupt (`video:blur:3`, None where no sensor is broken),
    num_clips, num_without, num_present, num_kept, and in percent action_top1, action_top5, action_mean_class,
    action_ece (calibration error) and the same per head; HEAD_loss, the mean cross-entropy of each head in nats; where
    the groups are known, num_tail, num_unseen and action_top1_tail, action_top1_unseen and the same per head. Figures
    are None where no clip could be evaluated. `add_intervals` adds action_top1_ci and the same per head: [low, high].
    """
    summary: dict[str, Any]
    """Counts, chance levels, and figures over the rows: see `summary.summarise`."""
    outcomes: Outcomes | None = field(default=None, compare=False, repr=False)
    """Clip by clip; not part of the file."""

    @property
    def per_clip(self) -> Outcomes:
        """The outcomes, of results that were not read from a file."""
        assert self.outcomes is not None
        return self.outcomes

    def to_dict(self) -> dict[str, Any]:
        """The JSON object."""
        return {"rows": self.rows, "summary": self.summary}


@dataclass
class BatchScores:
    """What is kept of one batch: small enough to hold a whole split's, and to send to other ranks."""

    keys: list[str]
    labels: dict[str, np.ndarray]
    """Per head int64 (B,), -1 where unlabelled."""
    present_BM: np.ndarray
    """bool."""
    masks_BK: np.ndarray
    """uint8, bit m = modality m was used; 0 = the clip has none of the condition's modalities."""
    ranks: dict[str, np.ndarray]
    """Rank of the true class, int32 (B, K), for "action" and per head; -1 = no label or no modality."""
    losses: dict[str, np.ndarray]
    """Cross-entropy in nats, float64 (B, K), per head; meaningless where the rank is -1."""
    confidence: dict[str, np.ndarray]
    """Probability of the first place, float32 (B, K), for "action" and per head; meaningless where the rank is -1."""
    damage: list[str]
    """What could not be read; these clips are not in `keys`."""


def ranked(heads: Sequence[str]) -> dict[str, list[str]]:
    """What is scored, and from which heads: "action", then every other head.

    The action is verb x noun where the model has these heads, else its own head "action", else all heads together.
    """
    if "verb" in heads and "noun" in heads:
        action = ["verb", "noun"]
    else:
        action = ["action"] if "action" in heads else list(heads)
    return {"action": action} | {head: [head] for head in heads if head != "action"}


def merge(scores: list[BatchScores]) -> BatchScores:
    """One record of all clips, in the order of their keys."""
    keys = [key for one in scores for key in one.keys]
    if not keys:
        damage = sorted(line for one in scores for line in one.damage)
        why = f"none of its {len(damage)} clips can be read, the first: {damage[0]}" if damage else "the split is empty"
        raise UserError(f"there is no clip to evaluate: {why}")
    order = np.argsort(keys, kind="stable")
    ordered = [keys[place] for place in order]
    twice = next((a for a, b in itertools.pairwise(ordered) if a == b), None)
    if twice is not None:
        raise UserError(f"clip {twice} was evaluated twice: every clip must be given to one rank, and once")
    return BatchScores(
        keys=ordered,
        labels={head: np.concatenate([one.labels[head] for one in scores])[order] for head in scores[0].labels},
        present_BM=np.concatenate([one.present_BM for one in scores])[order],
        masks_BK=np.concatenate([one.masks_BK for one in scores])[order],
        ranks={name: np.concatenate([one.ranks[name] for one in scores])[order] for name in scores[0].ranks},
        losses={head: np.concatenate([one.losses[head] for one in scores])[order] for head in scores[0].losses},
        confidence={
            name: np.concatenate([one.confidence[name] for one in scores])[order] for name in scores[0].confidence
        },
        damage=sorted(line for one in scores for line in one.damage),
    )


def is_unlabelled(scores: BatchScores) -> bool:
    """Whether no clip has a label for every head."""
    return bool(np.any([labels_N < 0 for labels_N in scores.labels.values()], axis=0).all())


def count_unlabelled(scores: BatchScores, modalities: list[str]) -> dict[str, Any]:
    """The summary of clips that cannot be scored."""
    return {
        "modalities": modalities,
        "num_clips": 0,
        "num_unlabelled": len(scores.keys),
        "num_damaged": len(scores.damage),
        "damage": scores.damage[:_DAMAGE_SHOWN],
        "num_present": _count(scores.present_BM, modalities),
    }


def score_rows(
    scores: BatchScores,
    conditions: Sequence[Condition],
    modalities: list[str],
    heads: dict[str, int],
    drop_nouns: Collection[int],
    groups: Groups | None = None,
) -> Results:
    """Rows and summary over the clips whose heads are all labelled and whose noun is not left out.

    `groups` adds the figures of rare classes and unseen participants.

    Raises:
        UserError: no such clip.
    """
    unlabelled_N = np.any([labels_N < 0 for labels_N in scores.labels.values()], axis=0)
    pruned_N = np.isin(scores.labels.get("noun", np.full(len(scores.keys), -1)), list(drop_nouns)) & ~unlabelled_N
    counted_N = ~unlabelled_N & ~pruned_N
    if unlabelled_N.all():
        raise UserError("no clip has a label for every head, so nothing can be scored: evaluate on a labelled split")
    if not counted_N.any():
        raise UserError("drop_nouns leaves no clip to score: shorten the list")
    labels = {head: labels_N[counted_N] for head, labels_N in scores.labels.items()}
    sources = ranked(list(heads))
    truth = {
        name: metrics.joint_labels([torch.from_numpy(labels[h]) for h in of], [heads[h] for h in of]).numpy()
        for name, of in sources.items()
    }
    keys = [key for key, counted in zip(scores.keys, counted_N, strict=True) if counted]
    clips = _Clips(
        present_NM=scores.present_BM[counted_N],
        masks_NK=scores.masks_BK[counted_N],
        ranks={name: ranks_NK[counted_N] for name, ranks_NK in scores.ranks.items()},
        losses={head: losses_NK[counted_N] for head, losses_NK in scores.losses.items()},
        confidence={name: of_NK[counted_N] for name, of_NK in scores.confidence.items()},
        truth=truth,
        groups={} if groups is None else groups.members(keys, labels, sources),
    )
    rows = [_row(condition, modalities, clips, k) for k, condition in enumerate(conditions)]
    num_classes = {name: int(np.prod([heads[head] for head in of])) for name, of in sources.items()}
    counts = {
        "modalities": modalities,
        "num_clips": int(counted_N.sum()),
        "num_unlabelled": int(unlabelled_N.sum()),
        "num_pruned": int(pruned_N.sum()),
        "num_damaged": len(scores.damage),
        "damage": scores.damage[:_DAMAGE_SHOWN],
        "num_present": _count(clips.present_NM, modalities),
        "num_classes": num_classes,
        "chance_top1": {name: 100.0 / num for name, num in num_classes.items()},
        "majority_top1": {name: metrics.majority_share(labels_N) for name, labels_N in truth.items()},
    }
    return Results(rows, counts | summarise(rows), Outcomes(keys, list(conditions), clips.ranks))


@dataclass(frozen=True)
class _Clips:
    """The counted clips: `BatchScores` without the others, their true classes, and the groups they belong to."""

    present_NM: np.ndarray
    masks_NK: np.ndarray
    ranks: dict[str, np.ndarray]
    losses: dict[str, np.ndarray]
    confidence: dict[str, np.ndarray]
    truth: dict[str, np.ndarray]
    groups: dict[str, dict[str, np.ndarray]]


def _row(condition: Condition, modalities: list[str], clips: _Clips, k: int) -> dict[str, Any]:
    mask_N = clips.masks_NK[:, k]
    shown_N = mask_N > 0
    kept_NM = (mask_N[shown_N, None] & (1 << np.arange(len(modalities)))) > 0
    row: dict[str, Any] = {
        "modalities": list(condition.modalities),
        "drop_prob": condition.drop_prob,
        "seed": condition.seed,
        "corrupt": condition.corrupt,
        "num_clips": int(shown_N.sum()),
        "num_without": int((~shown_N).sum()),
        "num_present": _count(clips.present_NM[shown_N], modalities),
        "num_kept": _count(kept_NM, modalities),
    }
    for name, ranks_NK in clips.ranks.items():
        ranks_N = ranks_NK[shown_N, k]
        row[f"{name}_top1"] = metrics.top_k(ranks_N, 1)
        row[f"{name}_top5"] = metrics.top_k(ranks_N, 5)
        row[f"{name}_mean_class"] = metrics.mean_class_accuracy(ranks_N, clips.truth[name][shown_N])
        row[f"{name}_ece"] = calibration_error(clips.confidence[name][shown_N, k], ranks_N == 0)
    for head, losses_NK in clips.losses.items():
        row[f"{head}_loss"] = float(losses_NK[shown_N, k].mean()) if shown_N.any() else None
    for group, members in clips.groups.items():
        row[f"num_{group}"] = {name: int((in_N & shown_N).sum()) for name, in_N in members.items()}
        for name, in_N in members.items():
            row[f"{name}_top1_{group}"] = metrics.top_k(clips.ranks[name][in_N & shown_N, k], 1)
    return row


def _count(flags_NM: np.ndarray, modalities: Sequence[str]) -> dict[str, int]:
    return {name: int(num) for name, num in zip(modalities, flags_NM.sum(axis=0), strict=True)}
