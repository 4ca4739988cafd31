"""Labels that a loss or a score cannot use are refused before the first step, with clip and head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from karmma_dist.distributed.process_group import process_group
from karmma_dist.distributed.world import World, free_port
from karmma_dist.errors import UserError
from karmma_dist.evaluation.run import validate
from karmma_dist.recipe import Recipe
from karmma_dist.shards.folder import ShardFolder
from karmma_dist.shards.format import Clip
from karmma_dist.training import trainer
from karmma_dist.training.engine import Engine
from kits.recipes import tiny_recipe


@pytest.fixture
def world() -> Iterator[World]:
    single = World(0, 0, 1, "127.0.0.1", free_port())
    with process_group(single):
        yield single


def relabel(monkeypatch: pytest.MonkeyPatch, split: str, change: Callable[[int, Clip], Clip]) -> None:
    """Let a split have other labels."""
    honest = ShardFolder.clips

    def clips(self: ShardFolder, name: str) -> list[Clip]:
        return [change(i, clip) if name == split else clip for i, clip in enumerate(honest(self, name))]

    monkeypatch.setattr(ShardFolder, "clips", clips)


def expect_refusal(tmp_path: Path, shards: Path, world: World, monkeypatch: pytest.MonkeyPatch, message: str) -> None:
    """Expect that training ends before the first step and before anything is written."""
    monkeypatch.setattr(Engine, "forward", lambda *_: pytest.fail("a step was made"))
    tree = tiny_recipe(["audio"], name="run", data={"shards": str(shards)}, training={"epochs": 1, "batch_size": 6})
    run = Recipe.model_validate({**tree, "runs_dir": str(tmp_path)})
    with pytest.raises(UserError, match=message):
        trainer.train(run, world, validate)
    assert list(tmp_path.iterdir()) == []


def one_other(place: int, **labels: int | None) -> Callable[[int, Clip], Clip]:
    return lambda i, clip: replace(clip, labels={**clip.labels, **labels}) if i == place else clip


@pytest.mark.parametrize("place", [0, 7, 29])
@pytest.mark.parametrize(
    ("label", "message"),
    [
        (None, r"clip \S+ of split 'train' has no label for head 'noun': train on a labelled split"),
        (10_000, r"clip \S+ of split 'train': noun is 10000, outside its \d+ classes"),
        (-1, r"clip \S+ of split 'train': noun is -1, outside its \d+ classes"),
    ],
)
def test_a_training_clip_without_a_usable_label(
    tmp_path: Path, shards: Path, world: World, monkeypatch: pytest.MonkeyPatch, place: int, label: int | None,
    message: str,
) -> None:  # fmt: skip
    relabel(monkeypatch, "train", one_other(place, noun=label))
    expect_refusal(tmp_path, shards, world, monkeypatch, message)


def test_a_validation_clip_of_a_class_that_does_not_exist(
    tmp_path: Path, shards: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    relabel(monkeypatch, "validation", one_other(3, verb=99))
    expect_refusal(tmp_path, shards, world, monkeypatch, r"clip \S+ of split 'validation': verb is 99")


def test_a_validation_split_without_labels(
    tmp_path: Path, shards: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads = ("verb", "noun")
    relabel(
        monkeypatch, "validation", lambda i, clip: replace(clip, labels={**clip.labels, heads[i % 2]: None})
    )
    expect_refusal(tmp_path, shards, world, monkeypatch, "no clip of split 'validation' has a label for every head")


def test_a_validation_split_that_does_not_exist(
    tmp_path: Path, shards: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = ShardFolder.clips
    monkeypatch.setattr(ShardFolder, "clips", lambda self, name: honest(self, "x" if name == "validation" else name))
    expect_refusal(tmp_path, shards, world, monkeypatch, "no split 'x'")
