"""Results of several models of a realistic size, scored by the package itself from random ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from karmma_dist.evaluation.conditions import Condition, build_conditions, keep
from karmma_dist.evaluation.corruptions.kinds import KINDS
from karmma_dist.evaluation.results import ResultRow, Results
from karmma_dist.evaluation.scores import BatchScores, score_rows

MODALITIES = ("video", "flow", "audio")
HEADS = {"verb": 97, "noun": 300}
EXTRA = ("verb_top1_tail", "noun_top1_tail", "action_top1_tail", "action_top1_unseen")


def row_of(
    condition: Condition, figures: dict[str, float | None], modalities: Sequence[str] = MODALITIES, num_clips: int = 1
) -> ResultRow:
    """Return a row whose clips all have every modality of the model."""
    clips = dict.fromkeys(modalities, num_clips)
    names = (condition.modalities, condition.drop_prob, condition.seed, condition.corrupt)
    return ResultRow(*names, num_clips, 0, clips, clips, figures, missing=condition.missing)


def random_results(
    seed: int,
    modalities: Sequence[str] = MODALITIES,
    num_clips: int = 400,
    skill: float = 1.0,
    extras: bool = False,
    corrupt: Sequence[str] = (),
    **choices: Any,
) -> Results:
    """Results whose ranks are the smaller the more modalities a clip keeps.

    Args:
        seed: Of the ranks.
        modalities: Of the model; a tenth of the clips has none of the last one.
        num_clips: Clips of the split.
        skill: How fast ranks fall with what is kept.
        extras: Add intervals, tail and unseen figures, and without `corrupt` rows of broken sensors.
        corrupt: Broken sensors, under the condition with everything present.
        choices: Of `build_conditions`; without any: subsets and a sweep with three seeds.
    """
    random = np.random.default_rng(seed)
    names = list(modalities)
    keys = [f"clip_{number:05d}" for number in range(num_clips)]
    present_BM = np.ones((num_clips, len(names)), dtype=bool)
    if len(names) > 1:
        present_BM[::10, -1] = False
    conditions = build_conditions(names, **(choices or {"subsets": True, "sweep": True, "num_seeds": 3}))
    conditions += [Condition(tuple(names), corrupt=kind) for kind in corrupt]
    kept = [keep(one, keys, torch.from_numpy(present_BM), names).numpy() for one in conditions]
    masks_BK = np.stack([(k * (1 << np.arange(len(names)))).sum(axis=1) for k in kept], axis=1).astype(np.uint8)
    strength_BK = np.stack([k.sum(axis=1) for k in kept], axis=1) * skill
    ranks = {
        name: np.minimum(random.geometric(1 - np.exp(-0.2 * strength_BK - 0.05)) - 1, num - 1).astype(np.int32)
        for name, num in (("action", HEADS["verb"] * HEADS["noun"]), *HEADS.items())
    }
    labels = {head: random.integers(0, num, num_clips) for head, num in HEADS.items()}
    losses = {head: random.exponential(2.0, masks_BK.shape) for head in HEADS}
    confidence = {name: random.uniform(0.1, 1, masks_BK.shape).astype(np.float32) for name in ranks}
    damage = ["val-000000.tar: clip x: x.flow.mp4: cut"]
    scores = BatchScores(keys, labels, present_BM, masks_BK, ranks, losses, confidence, damage)
    results = score_rows(scores, conditions, names, HEADS, drop_nouns=())
    return _with_extras(results, names, has_broken=not corrupt) if extras else results


def _with_extras(results: Results, modalities: list[str], has_broken: bool) -> Results:
    rows = list(map(_add_figures, results.rows))
    subsets, curve = results.summary.subsets, results.summary.drop_curve
    if subsets is not None:
        subsets = replace(subsets, average_ci={name: _around(value) for name, value in subsets.average.items()})
    if curve is not None:
        mean = {name: [_around(value) for value in values] for name, values in curve.mean.items()}
        area = {name: _around(value) for name, value in curve.area.items()}
        curve = replace(curve, area_ci=area, mean_ci=mean)
    if has_broken:
        rows += _broken(replace(rows[-1], drop_prob=0.0, seed=0, modalities=tuple(modalities)))
    return replace(results, rows=rows, summary=replace(results.summary, subsets=subsets, drop_curve=curve))


def _around(value: float | None) -> tuple[float, float] | None:
    return None if value is None else (0.9 * value, 1.1 * value)


def _add_figures(row: ResultRow) -> ResultRow:
    figures, intervals = dict(row.figures), {}
    for name in ("action", *HEADS):
        value = figures[f"{name}_top1"]
        known = value is not None
        intervals[f"{name}_top1"] = (max(0.0, value - 2.345678901), min(100.0, value + 2.109876543)) if known else None
        figures[f"{name}_top1_tail"] = value / 3 if known else None
    figures["action_top1_unseen"] = figures["action_top1_tail"]
    return replace(row, figures=figures, intervals=intervals)


def _broken(row: ResultRow) -> list[ResultRow]:
    kinds = [f"{name}:{kind}:{level}" for name in row.modalities for kind in ("blur", "noise") for level in (1, 5)
             if f"{name}:{kind}" in KINDS]  # fmt: skip
    rows = []
    for place, kind in enumerate(kinds):
        value = row.figures["action_top1"] / (1 + place / 10)
        figures, intervals = row.figures | {"action_top1": value}, row.intervals | {"action_top1": _around(value)}
        rows.append(replace(row, corrupt=kind, figures=figures, intervals=intervals))
    return rows
