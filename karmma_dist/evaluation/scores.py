"""The ranks that an evaluation keeps of each clip, and the rows and counts computed from them.

Ranks are kept instead of predictions. They are too many for results.json, but intervals and paired tests need them.

A rank is the number of classes placed before the true one, 0 = right. Equal scores are ordered by class id, as argmax
orders them: a model that gives all classes the same score predicts class 0 for every clip, and is right for clips of
class 0. (Epic-Kitchens numbers its classes by frequency, so such a model equals always naming the most frequent class.
The official evaluation leaves the order of equal scores to its sorting algorithm; without equal scores both agree.) A
NaN is placed before the true class, so it never helps.

Legend: B clips of a batch, N clips of the split, M modalities, K conditions, C classes.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from karmma_dist.errors import UserError
from karmma_dist.evaluation.conditions import Condition
from karmma_dist.evaluation.groups import Groups
from karmma_dist.evaluation.metrics import ClipScores, Figure, majority_share, metric_table, ranked
from karmma_dist.evaluation.results import ClipResults, ResultRow, Results, Summary
from karmma_dist.evaluation.summary import summarise

_DAMAGE_SHOWN = 20
"""Damaged members listed one by one in a summary."""


@dataclass
class BatchScores:
    """The scores kept of one batch, small enough to hold a whole split and to send to other ranks."""

    keys: list[str]
    labels: dict[str, np.ndarray]
    """int64 (B,) per head, -1 = unlabelled."""
    present_BM: np.ndarray
    """bool, True = the dataset has the modality for this clip."""
    masks_BK: np.ndarray
    """uint8, bit m = modality m was used; 0 = the clip has none of the condition's modalities."""
    ranks: dict[str, np.ndarray]
    """Rank of the true class, int32 (B, K), for "action" and per head; -1 = no label or no modality."""
    losses: dict[str, np.ndarray]
    """Cross-entropy in nats, float64 (B, K), per head; meaningless where the rank is -1."""
    confidence: dict[str, np.ndarray]
    """Probability of the predicted class, float32 (B, K), for "action" and per head; meaningless if the rank is -1."""
    damage: list[str]
    """Description of each clip that could not be read; `keys` excludes these clips."""


_JOINT_ELEMENTS = 2**23
"""Maximum number of joint scores held at once (64 MiB of float64)."""


def class_ranks(scores_BC: Tensor, labels_B: Tensor) -> Tensor:
    """Return the rank of each clip's true class, int64 (B,): -1 if the label is -1, C if the true score is NaN."""
    known_B = labels_B >= 0
    truth_B1 = labels_B.clamp(min=0).unsqueeze(1)
    true_score_B1 = scores_BC.gather(1, truth_B1)
    earlier_BC = torch.arange(scores_BC.shape[1], device=scores_BC.device) < truth_B1
    behind_BC = (scores_BC < true_score_B1) | ((scores_BC == true_score_B1) & ~earlier_BC)  # the true class too
    return (~behind_BC).sum(dim=1).masked_fill(~known_B, -1)


def joint_ranks(log_probs: Sequence[Tensor], labels: Sequence[Tensor]) -> Tensor:
    """Return the rank of the true combination of classes among all combinations, int64 (B,); -1 where any label is -1.

    With verb and noun this is the action of Epic-Kitchens: all pairs of a clip, ranked by the product of the two
    softmaxes, which is the sum of log-probabilities (the official definition of the challenge).

    Args:
        log_probs: One float64 (B, C) per head.
        labels: One int64 (B,) per head.
    """
    sizes = [scores.shape[1] for scores in log_probs]
    chunk = max(1, _JOINT_ELEMENTS // int(np.prod(sizes)))
    ranks = []
    for first in range(0, len(labels[0]), chunk):
        rows = slice(first, first + chunk)
        joint_BP = log_probs[0][rows]
        for scores in log_probs[1:]:
            joint_BP = (joint_BP.unsqueeze(2) + scores[rows].unsqueeze(1)).flatten(1)  # (B, pairs so far x C)
        ranks.append(class_ranks(joint_BP, joint_labels([x[rows] for x in labels], sizes)))
    return torch.cat(ranks) if ranks else labels[0].new_empty(0)


def joint_labels(labels: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """Return the index of each clip's combination of classes, int64 (B,), last head fastest; -1 if any label is -1."""
    joint_B = labels[0]
    known_B = labels[0] >= 0
    for labels_B, size in zip(labels[1:], sizes[1:], strict=True):
        joint_B = joint_B * size + labels_B
        known_B = known_B & (labels_B >= 0)
    return joint_B.masked_fill(~known_B, -1)


def figures_of(heads: Sequence[str]) -> list[Figure]:
    """Return the figures over all clips of a model with these heads, in the order of a row."""
    table = metric_table().values()
    metrics = [metric for metric in table if metric.group is None]
    shared = [Figure(name, metric) for name in ranked(heads) for metric in metrics if not metric.heads_only]
    return shared + [Figure(head, metric) for head in heads for metric in metrics if metric.heads_only]


def merge(scores: list[BatchScores]) -> BatchScores:
    """Merge the scores of all batches into one record, sorted by clip key.

    Raises:
        UserError: no clip was scored, or a clip was scored twice.
    """
    keys = [key for batch in scores for key in batch.keys]
    damage = sorted(line for batch in scores for line in batch.damage)
    if not keys:
        reason = (
            f"none of the split's {len(damage)} clips can be read, the first: {damage[0]}"
            if damage
            else "the split is empty"
        )
        raise UserError(f"no clip to evaluate: {reason}")
    order = np.argsort(keys, kind="stable")
    ordered = [keys[place] for place in order]
    duplicate = next((a for a, b in itertools.pairwise(ordered) if a == b), None)
    if duplicate is not None:
        raise UserError(f"clip {duplicate} was evaluated twice: give every clip to exactly one rank, once")
    return BatchScores(
        keys=ordered,
        labels={head: np.concatenate([batch.labels[head] for batch in scores])[order] for head in scores[0].labels},
        present_BM=np.concatenate([batch.present_BM for batch in scores])[order],
        masks_BK=np.concatenate([batch.masks_BK for batch in scores])[order],
        ranks={name: np.concatenate([batch.ranks[name] for batch in scores])[order] for name in scores[0].ranks},
        losses={head: np.concatenate([batch.losses[head] for batch in scores])[order] for head in scores[0].losses},
        confidence={
            name: np.concatenate([batch.confidence[name] for batch in scores])[order] for name in scores[0].confidence
        },
        damage=damage,
    )


def is_unlabelled(scores: BatchScores) -> bool:
    """Return True if no clip has a label for every head."""
    return bool(np.any([labels_N < 0 for labels_N in scores.labels.values()], axis=0).all())


def count_unlabelled(scores: BatchScores, modalities: list[str]) -> Summary:
    """Return the summary of a split without labels, which cannot be scored."""
    return Summary(
        modalities=tuple(modalities),
        num_clips=0,
        num_unlabelled=len(scores.keys),
        num_damaged=len(scores.damage),
        damage=scores.damage[:_DAMAGE_SHOWN],
        num_present=_count(scores.present_BM, modalities),
    )


def score_rows(
    scores: BatchScores,
    conditions: Sequence[Condition],
    modalities: list[str],
    heads: dict[str, int],
    drop_nouns: Collection[int],
    groups: Groups | None = None,
) -> Results:
    """Return rows and summary over the clips that have all labels and whose noun is not in `drop_nouns`.

    `groups` adds the figures of rare classes and unseen participants.

    Raises:
        UserError: no clip has all labels, or `drop_nouns` leaves no clip.
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
        name: joint_labels([torch.from_numpy(labels[h]) for h in parts], [heads[h] for h in parts]).numpy()
        for name, parts in sources.items()
    }
    keys = [key for key, counted in zip(scores.keys, counted_N, strict=True) if counted]
    clips = _Clips(
        present_NM=scores.present_BM[counted_N],
        masks_NK=scores.masks_BK[counted_N],
        ranks={name: ranks_NK[counted_N] for name, ranks_NK in scores.ranks.items()},
        losses={head: losses_NK[counted_N] for head, losses_NK in scores.losses.items()},
        confidence={name: confidence_NK[counted_N] for name, confidence_NK in scores.confidence.items()},
        truth=truth,
        groups={} if groups is None else groups.members(keys, labels, sources),
    )
    rows = [_row(condition, modalities, clips, k) for k, condition in enumerate(conditions)]
    num_classes = {name: int(np.prod([heads[head] for head in parts])) for name, parts in sources.items()}
    seeds, subsets, drop_curve = summarise(rows)
    summary = Summary(
        modalities=tuple(modalities),
        num_clips=int(counted_N.sum()),
        num_unlabelled=int(unlabelled_N.sum()),
        num_pruned=int(pruned_N.sum()),
        num_damaged=len(scores.damage),
        damage=scores.damage[:_DAMAGE_SHOWN],
        num_present=_count(clips.present_NM, modalities),
        num_classes=num_classes,
        chance_top1={name: 100.0 / num for name, num in num_classes.items()},
        majority_top1={name: majority_share(labels_N) for name, labels_N in truth.items()},
        seeds=seeds,
        subsets=subsets,
        drop_curve=drop_curve,
    )
    return Results(rows, summary, ClipResults(keys, list(conditions), clips.ranks))


@dataclass(frozen=True)
class _Clips:
    """The scores of the counted clips, as in `BatchScores`, their true classes, and their groups."""

    present_NM: np.ndarray
    masks_NK: np.ndarray
    ranks: dict[str, np.ndarray]
    losses: dict[str, np.ndarray]
    confidence: dict[str, np.ndarray]
    truth: dict[str, np.ndarray]
    groups: dict[str, dict[str, np.ndarray]]

    def scores(self, name: str, chosen_N: np.ndarray, k: int) -> ClipScores:
        """Return the scores of the chosen clips under condition `k`, for the action or a head."""
        losses_NK = self.losses.get(name)
        return ClipScores(
            ranks_N=self.ranks[name][chosen_N, k],
            truth_N=self.truth[name][chosen_N],
            confidence_N=self.confidence[name][chosen_N, k],
            losses_N=None if losses_NK is None else losses_NK[chosen_N, k],
        )


def _row(condition: Condition, modalities: list[str], clips: _Clips, k: int) -> ResultRow:
    mask_N = clips.masks_NK[:, k]
    shown_N = mask_N > 0
    kept_NM = (mask_N[shown_N, None] & (1 << np.arange(len(modalities)))) > 0
    scored = {name: clips.scores(name, shown_N, k) for name in clips.ranks}
    figures = {figure.name: figure.metric.of(scored[figure.scored]) for figure in figures_of(list(clips.losses))}
    for group, members in clips.groups.items():
        for metric in [metric for metric in metric_table().values() if metric.group == group]:
            for name, in_N in members.items():
                figures[Figure(name, metric).name] = metric.of(clips.scores(name, in_N & shown_N, k))
    return ResultRow(
        modalities=condition.modalities,
        drop_prob=condition.drop_prob,
        seed=condition.seed,
        corrupt=condition.corrupt,
        missing=condition.missing,
        num_clips=int(shown_N.sum()),
        num_without=int((~shown_N).sum()),
        num_present=_count(clips.present_NM[shown_N], modalities),
        num_kept=_count(kept_NM, modalities),
        figures=figures,
        group_sizes={
            group: {name: int((in_N & shown_N).sum()) for name, in_N in members.items()}
            for group, members in clips.groups.items()
        },
    )


def _count(flags_NM: np.ndarray, modalities: Sequence[str]) -> dict[str, int]:
    return {name: int(num) for name, num in zip(modalities, flags_NM.sum(axis=0), strict=True)}
