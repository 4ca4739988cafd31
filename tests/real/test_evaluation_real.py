"""Figures over the real Epic-Kitchens validation rows equal the official definition, written out here."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from karmma_dist.evaluation.conditions import Condition
from karmma_dist.evaluation.evaluate import evaluate
from karmma_dist.evaluation.groups import read_groups
from karmma_dist.streaming.batch import Batch
from real_data import real

HEADS = {"verb": 97, "noun": 300}
NEVER_TRAINED = (205, 240, 288, 295)
"""Nouns without a training clip, which the paper leaves out."""


class Given(nn.Module):
    """A model whose logits are its inputs: verb and noun scores side by side."""

    modalities = ("video",)
    heads = HEADS

    def encode(self, inputs: dict[str, Tensor], present_BM: Tensor) -> dict[str, Tensor]:  # noqa: ARG002
        return inputs

    def fuse(self, tokens: dict[str, Tensor], present_BM: Tensor, keep_BM: Tensor) -> dict[str, Tensor]:  # noqa: ARG002
        return {"verb": tokens["video"][:, :97], "noun": tokens["video"][:, 97:]}


def read_rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def make_batches(rows: list[dict[str, str]], scores_NC: np.ndarray, size: int = 512) -> Iterator[Batch]:
    for first in range(0, len(rows), size):
        part = rows[first : first + size]
        yield Batch(
            keys=[row["narration_id"] for row in part],
            present_BM=torch.ones(len(part), 1, dtype=torch.bool),
            inputs={"video": torch.from_numpy(scores_NC[first : first + size])},
            labels={head: torch.tensor([int(row[f"{head}_class"]) for row in part]) for head in HEADS},
            valid_B=torch.ones(len(part), dtype=torch.bool),
            jitter={},
        )


def softmax(scores_C: np.ndarray) -> np.ndarray:
    exponentials = np.exp(scores_C - scores_C.max())
    return exponentials / exponentials.sum()


def official(rows: list[dict[str, str]], scores_NC: np.ndarray, folder: Path) -> dict[str, float]:
    """Follow the challenge's definition: per clip, every verb with every noun, ranked by the product of softmaxes."""
    rare = {
        head: {int(row[head]) for row in read_rows(folder / f"EPIC_100_tail_{head}s.csv")} for head in HEADS
    }
    unseen = {row["participant_id"] for row in read_rows(folder / "EPIC_100_unseen_participant_ids_validation.csv")}
    right: dict[str, list[bool]] = {}

    def count(figure: str, hit: bool) -> None:
        right.setdefault(figure, []).append(hit)

    for row, scores_C in zip(rows, scores_NC, strict=True):
        verb, noun = int(row["verb_class"]), int(row["noun_class"])
        probabilities = {"verb": softmax(scores_C[:97]), "noun": softmax(scores_C[97:])}
        pairs = np.multiply.outer(probabilities["verb"], probabilities["noun"]).ravel()
        truth = {"verb": verb, "noun": noun, "action": verb * 300 + noun}
        in_tail = {"verb": verb in rare["verb"], "noun": noun in rare["noun"]}
        in_tail["action"] = in_tail["verb"] or in_tail["noun"]
        for name, values in (*probabilities.items(), ("action", pairs)):
            five = np.argpartition(-values, 5)[:5]
            best = five[np.argmax(values[five])]
            count(f"{name}_top1", best == truth[name])
            count(f"{name}_top5", truth[name] in five)
            if in_tail[name]:
                count(f"{name}_top1_tail", best == truth[name])
            if row["participant_id"] in unseen:
                count(f"{name}_top1_unseen", best == truth[name])
    return {name: 100 * sum(hits) / len(hits) for name, hits in right.items()}


@pytest.mark.parametrize(("pruned", "num_clips", "signal"), [(False, 9668, 0.0), (True, 9644, 4.0)])
def test_all_tail_and_unseen_accuracies_equal_the_official_definition(pruned, num_clips, signal):
    folder = real("annotations/epic100")
    rows = read_rows(folder / "EPIC_100_validation.csv")
    random = np.random.default_rng(0)
    scores_NC = random.standard_normal((len(rows), 397))
    for head, first in (("verb", 0), ("noun", 97)):
        scores_NC[np.arange(len(rows)), first + np.array([int(row[f"{head}_class"]) for row in rows])] += signal
    people = {row["narration_id"]: row["participant_id"] for row in rows}
    results = evaluate(
        Given(),
        make_batches(rows, scores_NC),
        [Condition(("video",))],
        device="cpu",
        drop_nouns=NEVER_TRAINED if pruned else (),
        groups=read_groups(folder, HEADS, people.__getitem__),
    )
    counted = [k for k, row in enumerate(rows) if not (pruned and int(row["noun_class"]) in NEVER_TRAINED)]
    expected = official([rows[k] for k in counted], scores_NC[counted], folder)
    row = results.rows[0].to_dict()
    assert row["num_clips"] == len(counted) == num_clips
    assert len(expected) == 12
    assert {name: row[name] for name in expected} == expected
    if signal:
        assert all(value > 5 for value in expected.values())
