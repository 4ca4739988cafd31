"""Results of several models of a realistic size, scored by the package itself from random ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from karmma_dist.evaluation.conditions import Condition, build_conditions, keep
from karmma_dist.evaluation.corruptions.kinds import KINDS
from karmma_dist.evaluation.results import ResultRow
from karmma_dist.evaluation.scores import BatchScores, score_rows

MODALITIES = ("video", "flow", "audio")
HEADS = {"verb": 97, "noun": 300}
EXTRA = ("verb_top1_tail", "noun_top1_tail", "action_top1_tail", "action_top1_unseen")


def row_of(
    condition: Condition, figures: dict[str, float | None], modalities: Sequence[str] = MODALITIES, num_clips: int = 1
) -> ResultRow:
    """A row whose clips all have every modality of the model."""
    clips = dict.fromkeys(modalities, num_clips)
    names = (condition.modalities, condition.drop_prob, condition.seed, condition.corrupt)
    return ResultRow(*names, num_clips, 0, clips, clips, figures)


def random_results(
    seed: int,
    modalities: Sequence[str] = MODALITIES,
    num_clips: int = 400,
    skill: float = 1.0,
    extras: bool = False,
    **choices: Any,
) -> dict[str, Any]:
    """The object of a results.json: ranks are the smaller the more modalities a clip keeps.

    Args:
        seed: Of the ranks.
        modalities: Of the model; a tenth of the clips has none of the last one.
        num_clips: Clips of the split.
        skill: How fast ranks fall with what is kept.
        extras: Add intervals, losses, tail, unseen and calibration figures, and rows of corrupted sensors.
        choices: Of `build_conditions`, not with `extras`; without any: subsets and a sweep with three seeds.
    """
    random = np.random.default_rng(seed)
    names = list(modalities)
    keys = [f"clip_{number:05d}" for number in range(num_clips)]
    present_BM = np.ones((num_clips, len(names)), dtype=bool)
    if len(names) > 1:
        present_BM[::10, -1] = False
    conditions = build_conditions(names, **(choices or {"subsets": True, "sweep": True, "num_seeds": 3}))
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
    results = score_rows(scores, conditions, names, HEADS, drop_nouns=()).to_dict()
    if extras:
        for row in results["rows"]:
            _add_figures(row)
        subsets, curve = (results["summary"][key] or {} for key in ("subsets", "drop_curve"))
        for summary, key in ((subsets, "average"), (curve, "area")):
            summary[f"{key}_ci"] = {name: [0.9 * value, 1.1 * value] for name, value in summary[key].items()}
        curve["mean_ci"] = {name: [[0.9 * one, 1.1 * one] for one in of] for name, of in curve["mean"].items()}
        results["rows"] += _corrupted(results["rows"][-1] | {"drop_prob": 0.0, "seed": 0, "modalities": names})
    return results


def _add_figures(row: dict[str, Any]) -> None:
    top1 = {key: value for key, value in row.items() if key.endswith("_top1") and value is not None}
    for key, value in top1.items():
        row[f"{key}_ci"] = [max(0.0, value - 2.345678901), min(100.0, value + 2.109876543)]
        row[key.replace("_top1", "_ece")] = value / 7
        row[key.replace("_top1", "_loss")] = 5 - value / 20
    for key in EXTRA:
        value = top1.get("_".join(key.split("_")[:2]))
        row[key] = None if value is None else value / 3


def _corrupted(row: dict[str, Any]) -> list[dict[str, Any]]:
    kinds = [f"{name}:{kind}:{level}" for name in row["modalities"] for kind in ("blur", "noise") for level in (1, 5)
             if f"{name}:{kind}" in KINDS]  # fmt: skip
    rows = []
    for place, kind in enumerate(kinds):
        value = row["action_top1"] / (1 + place / 10)
        rows.append(row | {"corrupt": kind, "action_top1": value, "action_top1_ci": [0.9 * value, 1.1 * value]})
    return rows
