"""A small model with exact logits, its batches, and its metrics computed clip by clip."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from karmma_dist.evaluation.conditions import Condition, build_conditions, keep
from karmma_dist.evaluation.evaluate import evaluate
from karmma_dist.evaluation.exports.predictions import PredictionCollector, Predictions
from karmma_dist.evaluation.results import Results
from karmma_dist.evaluation.scores import BatchScores, score_rows
from karmma_dist.evaluation.statistics.bootstrap import add_intervals
from karmma_dist.streaming.batch import Batch

MODALITIES = ["video", "flow", "audio"]
HEADS = {"verb": 4, "noun": 5}
WIDTH = 6


class Fusion(nn.Module):
    """A linear model with small integer weights, whose logits are exact for any batch."""

    def __init__(self, modalities: list[str] = MODALITIES, heads: dict[str, int] = HEADS) -> None:
        super().__init__()
        self.modalities, self.heads = list(modalities), dict(heads)
        generator = torch.Generator().manual_seed(1)
        self.encoders = nn.ParameterDict(
            {name: torch.randint(-3, 4, (WIDTH, WIDTH), generator=generator).float() for name in modalities}
        )
        self.classifiers = nn.ParameterDict(
            {head: torch.randint(-3, 4, (WIDTH, num), generator=generator).float() for head, num in heads.items()}
        )
        self.frozen = nn.Dropout(0.9)
        self.num_encoded = dict.fromkeys(modalities, 0)
        self.num_fused = 0

    def encode(self, inputs: dict[str, Tensor], present_BM: Tensor) -> dict[str, Tensor]:
        tokens = {}
        for column, name in enumerate(self.modalities):
            num = int(present_BM[:, column].sum())
            assert len(inputs.get(name, ())) == num
            if num:
                tokens[name] = self.frozen(inputs[name]) @ self.encoders[name]
                self.num_encoded[name] += num
        return tokens

    def fuse(self, tokens: dict[str, Tensor], present_BM: Tensor, keep_BM: Tensor) -> dict[str, Tensor]:
        assert not (keep_BM & ~present_BM).any()
        assert keep_BM.any(dim=1).all()
        self.num_fused += 1
        sum_BD = torch.zeros(len(present_BM), WIDTH)
        for column, name in enumerate(self.modalities):
            if name in tokens:
                part_BD = torch.zeros(len(present_BM), WIDTH)
                part_BD[present_BM[:, column]] = tokens[name]
                sum_BD = sum_BD + part_BD * keep_BM[:, column : column + 1]
        return {head: sum_BD @ weight for head, weight in self.classifiers.items()}


def make_batches(num: int = 37, batch_size: int = 8, heads: dict[str, int] = HEADS, seed: int = 0) -> list[Batch]:
    """Return batches of clips with any non-empty presence, each a function of its number; the last batch is padded."""
    clips = []
    for number in range(num):
        generator = np.random.default_rng([seed, number])
        present = generator.random(3) < 0.7
        present[generator.integers(3)] = True
        inputs = {m: generator.integers(-2, 3, WIDTH) for m, there in zip(MODALITIES, present, strict=True) if there}
        labels = {head: int(generator.integers(classes)) for head, classes in heads.items()}
        clips.append((f"clip_{number}", inputs, labels))
    return [make_batch(clips[first : first + batch_size], batch_size, heads) for first in range(0, num, batch_size)]


def make_batch(clips: list, batch_size: int, heads: dict[str, int]) -> Batch:
    padding = [("", {}, dict.fromkeys(heads, -1))] * (batch_size - len(clips))
    rows = [*clips, *padding]
    inputs = {m: [inputs[m] for _, inputs, _ in rows if m in inputs] for m in MODALITIES}
    return Batch(
        keys=[key for key, _, _ in rows],
        present_BM=torch.tensor([[m in inputs for m in MODALITIES] for _, inputs, _ in rows]),
        inputs={m: torch.from_numpy(np.stack(values)).float() for m, values in inputs.items() if values},
        labels={head: torch.tensor([labels[head] for _, _, labels in rows]) for head in heads},
        valid_B=torch.tensor([key != "" for key, _, _ in rows]),
        jitter={},
    )


def singles(batches: list[Batch]) -> list[Batch]:
    """Return the same clips, one per batch, without padding."""
    found = []
    for batch in batches:
        for row in range(len(batch.keys)):
            if batch.valid_B[row]:
                places = batch.present_BM[:row].sum(dim=0)
                there = [(c, m) for c, m in enumerate(MODALITIES) if batch.present_BM[row, c]]
                one = slice(row, row + 1)
                clip = replace(batch, keys=batch.keys[one], present_BM=batch.present_BM[one])
                clip.valid_B = batch.valid_B[one]
                clip.inputs = {m: batch.inputs[m][places[c] : places[c] + 1] for c, m in there}
                clip.labels = {head: values[one] for head, values in batch.labels.items()}
                found.append(clip)
    return found


@torch.no_grad()
def naive_row(model: Fusion, clips: list[Batch], condition: Condition) -> dict[str, float]:
    """Each clip alone, from its raw inputs, with what it loses taken away before the encoders."""
    places: dict[str, list[int]] = {"action": [], "verb": [], "noun": []}
    losses: dict[str, list[float]] = {"verb": [], "noun": []}
    for clip in clips:
        keep_BM = keep(condition, clip.keys, clip.present_BM, MODALITIES)
        if not keep_BM.any():
            continue
        inputs = {m: x for m, x in clip.inputs.items() if keep_BM[0, MODALITIES.index(m)]}
        logits = model.fuse(model.encode(inputs, keep_BM), keep_BM, keep_BM)
        scores = {head: values[0].double().log_softmax(0) for head, values in logits.items()}
        joint = (scores["verb"][:, None] + scores["noun"][None, :]).flatten()
        truth = {head: int(clip.labels[head]) for head in HEADS}
        for head, of in losses.items():
            of.append(-float(scores[head][truth[head]]))
        for name, values, true in (
            ("verb", scores["verb"], truth["verb"]),
            ("noun", scores["noun"], truth["noun"]),
            ("action", joint, truth["verb"] * HEADS["noun"] + truth["noun"]),
        ):
            places[name].append(torch.argsort(values, descending=True, stable=True).tolist().index(true))
    return {"num_clips": len(places["verb"])} | {
        f"{name}_top{k}": 100.0 * sum(p < k for p in of) / len(of) for name, of in places.items() for k in (1, 5)
    } | {f"{head}_loss": pytest.approx(float(np.mean(of)), rel=1e-12) for head, of in losses.items()}

CONDITIONS = build_conditions(MODALITIES, subsets=True, sweep=True, num_seeds=2)
ALL_CONDITIONS = build_conditions(
    MODALITIES, subsets=True, sweep=True, num_seeds=2, missing=["audio:0.4", "video:0.8"]
)
"""The conditions, and those in which a share of the clips lacks one modality."""


def make_results(
    skill: float, seed: int, num_clips: int = 400, conditions: list[Condition] = CONDITIONS, **changes: object
) -> Results:
    """A model that is right with probability `skill` times the share of kept modalities."""
    random = np.random.default_rng(seed)
    keys = changes.pop("keys", None) or [f"clip_{number:04d}" for number in range(num_clips)]
    heads = changes.pop("heads", HEADS)
    present_BM = np.ones((num_clips, 3), dtype=bool)
    present_BM[::7, 2] = False
    kept = [keep(one, keys, torch.from_numpy(present_BM), MODALITIES).numpy() for one in conditions]
    masks_BK = np.stack([of_BM @ (1 << np.arange(3)) for of_BM in kept], axis=1).astype(np.uint8)
    share_BK = np.stack([of_BM.mean(axis=1) for of_BM in kept], axis=1)
    ranks_BK = np.where(random.random((num_clips, 1)) < skill * share_BK, 0, 4).astype(np.int32)
    ranks_BK[masks_BK == 0] = -1
    names = ("action", *heads)
    scores = BatchScores(
        keys=list(keys),
        labels={head: np.arange(num_clips) % num for head, num in heads.items()},
        present_BM=present_BM,
        masks_BK=masks_BK,
        ranks=dict.fromkeys(names, ranks_BK),
        losses={head: np.ones(masks_BK.shape) for head in heads},
        confidence=dict.fromkeys(names, np.full(masks_BK.shape, 0.5, dtype=np.float32)),
        damage=[],
    )
    return add_intervals(score_rows(scores, conditions, MODALITIES, heads, ()), num_draws=200)


def predict(num: int = 37, batch_size: int = 8) -> tuple[Predictions, Results]:
    """Return predictions of exact models and the rows computed from them."""
    collector = PredictionCollector(MODALITIES, ALL_CONDITIONS)
    batches = make_batches(num, batch_size)
    results = evaluate(Fusion(), batches, ALL_CONDITIONS, device="cpu", predictions=collector)
    return collector.finish(), results
