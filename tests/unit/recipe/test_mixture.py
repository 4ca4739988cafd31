"""Recipes of mixtures: what contradicts itself is refused in one line, and overrides reach every recipe of a chain."""

from __future__ import annotations

from pathlib import Path

import pytest

from karmma_dist.errors import UserError
from karmma_dist.recipe import load_chain, load_recipe, read_run_recipe, save_recipe
from karmma_dist.recipe.files import shared_overrides

MIXED = """
name: t/mixed
stage: supervised
data:
  modalities: [audio]
  mixture:
    kitchen: {shards: one, weight: 3}
    films: {shards: other, weight: 1, heads: {action: films_action}}
model: {encoders: {audio: {name: small_audio}}}
"""
TWO_A = "data.mixture={a: {shards: x, weight: 1}, a: {shards: y, weight: 1}}"


@pytest.fixture
def mixed(tmp_path: Path) -> str:
    path = tmp_path / "mixed.yaml"
    path.write_text(MIXED)
    return str(path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.shards=x", r"'data': shards 'x' and mixture exclude each other: set shards to null, or remove one$"),
        ("data.mixture={}", r"'data': name a folder of packed shards in 'shards', or several datasets in 'mixture'$"),
        ("data.mixture.kitchen.weight=0", r"data\.mixture\.kitchen\.weight.*greater than 0 \(given: 0\)"),
        ("data.mixture.kitchen.weight=-1", r"data\.mixture\.kitchen\.weight.*greater than 0 \(given: -1\)"),
        ("data.mixture.kitchen.weight=.inf", r"data\.mixture\.kitchen\.weight.*and a finite one"),
        ("data.mixture.more.shards=x", r"key 'data\.mixture\.more\.weight' is missing"),
        ("data.mixture.kitchen.wait=1", r"unknown key 'data\.mixture\.kitchen\.wait' \(did you mean 'weight'\?\)"),
        ("data.mixture.Kitchen={shards: x, weight: 1}", r"mixture: 'Kitchen' is no name of a dataset: take at most 32"),
        ("data.mixture.-x={shards: x, weight: 1}", r"mixture: '-x' is no name of a dataset"),
        ("data.mixture.a/b={shards: x, weight: 1}", r"mixture: 'a/b' is no name of a dataset"),
        (TWO_A, "the key 'a' is already in line 1 of this section: keep one"),
        ("data.mixture.films.heads={a: x, b: x}", r"heads: two heads cannot both be called 'x'"),
        ("data.mixture.films.heads={a: x.y}", r"heads: 'x\.y' is no name of a head: take letters, digits, '_' and '-'"),
        ("data.order={lanes: 4, window: 1}", r"order\.lanes 4 is for the shards of one dataset, not for a mixture"),
        ("model.encoders.audio={name: small_audio, frozen: true, memory: {path: x}}",
         r"model\.encoders\.audio\.memory remembers the clips of one dataset.*: remove the memory"),
    ],
)  # fmt: skip
def test_a_mixture_that_cannot_be_is_refused_in_one_line(mixed: str, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_recipe(mixed, [override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("distill", "message"),
    [
        ("{teacher: t, memory: m}", r"distill\.memory remembers the clips of one dataset"),
        ("{teachers: [a, b]}", r"distill\.expert_weights softmin weighs experts .*: set it to per_sample or equal"),
    ],
)
def test_what_counts_the_clips_of_one_dataset_is_refused(mixed: str, distill: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_recipe(mixed, ["stage=distill", f"distill={distill}"])
    assert load_recipe(mixed, ["stage=distill", "distill={teachers: [a, b], expert_weights: equal}"]).data.mixture


def test_a_mixture_is_saved_and_read_back(mixed: str, tmp_path: Path) -> None:
    recipe = load_recipe(mixed)
    save_recipe(recipe, tmp_path / "recipe.yaml")
    assert read_run_recipe(tmp_path) == recipe
    assert recipe.data.locations == ["other", "one"]


def test_a_dataset_alone_has_its_own_splits(mixed: str) -> None:
    data = load_recipe(mixed, ["data.mixture.films.train_split=long"]).data
    alone = data.of_dataset("films")
    assert (alone.shards, alone.mixture) == ("other", {})
    assert (alone.train_split, alone.validation_split) == ("long", "validation")
    assert data.of_dataset("kitchen").train_split == "train"


@pytest.mark.usefixtures("mixed")
def test_overrides_of_a_datasets_folder_reach_all_recipes_that_have_it(tmp_path: Path) -> None:
    (tmp_path / "alone.yaml").write_text(
        "name: t/alone\nstage: supervised\ndata: {shards: alone, modalities: [audio]}\n"
        "model: {encoders: {audio: {name: small_audio}}}\n"
    )
    (tmp_path / "later.yaml").write_text("extends: mixed.yaml\nname: t/later\nafter: [mixed.yaml, alone.yaml]\n")
    overrides = ["data.mixture.films.shards=elsewhere", "data.mixture.films.weight=2"]
    assert shared_overrides(overrides) == overrides[:1]
    chain = {recipe.name: recipe.data for recipe in load_chain(str(tmp_path / "later.yaml"), overrides)}
    assert chain["t/alone"].locations == ["alone"]
    for name, weight in (("t/mixed", 1), ("t/later", 2)):
        assert chain[name].mixture["films"].shards == "elsewhere"
        assert chain[name].mixture["films"].weight == weight
