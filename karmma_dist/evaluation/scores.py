"""The ranks that evaluation keeps of each clip, and the rows and counts that follow from them.

Ranks, not predictions: too much for results.json, but needed for intervals and paired tests.

A rank is the number of classes placed before the true one, 0 = right. Equal scores are ordered by class id, as argmax
does: a model that scores all classes alike says class 0 of every clip, and is right where that is true. (Epic-Kitchens
numbers its classes by frequency, so there it is as good as naming the most frequent one; the official evaluation sorts
in an order that leaves equal scores to the sorting algorithm, and equals this one where no scores do.) What is no
number comes before the true class, so it never helps.

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
from karmma_dist.evaluation.metrics import ACTION, ClipScores, Figure, majority_share, metric_table
from karmma_dist.evaluation.results import ClipResults, ResultRow, Results, Summary
from karmma_dist.evaluation.summary import summarise

_DAMAGE_SHOWN = 20
"""Damaged members listed one by one in a summary."""


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


_JOINT_ELEMENTS = 2**23
"""Most pair scores held at once (64 MiB of float64)."""


def class_ranks(scores_BC: Tensor, labels_B: Tensor) -> Tensor:
    """Return the rank of each clip's true class, int64 (B,); -1 where the label is -1, C where its score is NaN."""
    known_B = labels_B >= 0
    truth_B1 = labels_B.clamp(min=0).unsqueeze(1)
    true_score_B1 = scores_BC.gather(1, truth_B1)
    earlier_BC = torch.arange(scores_BC.shape[1], device=scores_BC.device) < truth_B1
    behind_BC = (scores_BC < true_score_B1) | ((scores_BC == true_score_B1) & ~earlier_BC)  # the true class too
    return (~behind_BC).sum(dim=1).masked_fill(~known_B, -1)


def joint_ranks(log_probs: Sequence[Tensor], labels: Sequence[Tensor]) -> Tensor:
    """Return the rank of the true combination of classes among all combinations, int64 (B,); -1 where any label is -1.

    With verb and noun this is Epic-Kitchens' action: all pairs of a clip, ranked by the product of the two
    softmaxes, that is by the sum of log-probabilities (the challenge's official definition).

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
    """Return the number of each clip's combination among all, last head fastest; -1 where any label is -1."""
    joint_B = labels[0]
    known_B = labels[0] >= 0
    for labels_B, size in zip(labels[1:], sizes[1:], strict=True):
        joint_B = joint_B * size + labels_B
        known_B = known_B & (labels_B >= 0)
    return joint_B.masked_fill(~known_B, -1)


def ranked(heads: Sequence[str]) -> dict[str, list[str]]:
    """Return the heads that each scored thing is made of: "action", then every other head.

    The action is verb x noun where the model has these heads, else its own head "action", else all heads together.
    """
    if "verb" in heads and "noun" in heads:
        action = ["verb", "noun"]
    else:
        action = [ACTION] if ACTION in heads else list(heads)
    return {ACTION: action} | {head: [head] for head in heads if head != ACTION}


def figures_of(heads: Sequence[str]) -> list[Figure]:
    """Return the figures of all clips that a model with these heads gets, in the order of a row."""
    table = metric_table().values()
    every = [metric for metric in table if metric.group is None]
    shared = [Figure(name, metric) for name in ranked(heads) for metric in every if not metric.heads_only]
    return shared + [Figure(head, metric) for head in heads for metric in every if metric.heads_only]


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


def count_unlabelled(scores: BatchScores, modalities: list[str]) -> Summary:
    """Return the summary of clips that cannot be scored."""
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
        name: joint_labels([torch.from_numpy(labels[h]) for h in of], [heads[h] for h in of]).numpy()
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
    """The counted clips: `BatchScores` without the others, their true classes, and the groups they belong to."""

    present_NM: np.ndarray
    masks_NK: np.ndarray
    ranks: dict[str, np.ndarray]
    losses: dict[str, np.ndarray]
    confidence: dict[str, np.ndarray]
    truth: dict[str, np.ndarray]
    groups: dict[str, dict[str, np.ndarray]]

    def scores(self, name: str, chosen_N: np.ndarray, k: int) -> ClipScores:
        """Return what condition `k` gives for the chosen clips, of the action or a head."""
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
