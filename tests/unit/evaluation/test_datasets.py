"""A model of a mixture is evaluated on one dataset at a time, by the heads that this dataset has."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from karmma_dist.cli import main
from karmma_dist.deploy.model_file import read_model_file
from karmma_dist.deploy.predict import predict_exported
from karmma_dist.evaluation.predict.predict import predict
from karmma_dist.models.model_card import save_model
from karmma_dist.models.weights import build_model
from karmma_dist.recipe import Recipe, read_run_recipe, save_recipe
from karmma_dist.shards.folder import ShardFolder
from karmma_dist.shards.mixture import open_datasets
from kits.mixtures import mixture_recipe


def save_run(runs: Path, mixture: dict[str, Any], name: str, **data: Any) -> Path:
    """Save an untrained model of a mixture as a run folder; return the folder."""
    recipe = mixture_recipe(runs, mixture, name=name, data=data)
    classes = open_datasets(recipe.data).classes
    save_model(build_model(recipe, classes), recipe.run_dir, recipe=recipe, classes=classes)
    save_recipe(recipe, recipe.run_dir / "recipe.yaml")
    return recipe.run_dir


@pytest.fixture(scope="module")
def run(shards: Path, actions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    mixture = {
        "kitchen": {"shards": str(shards), "weight": 1},
        "pairs": {"shards": str(actions), "weight": 1, "heads": {"action": "pair"}},
    }
    return save_run(tmp_path_factory.mktemp("runs"), mixture, "mixed", drop_nouns=[0])


def results(run: Path, out: Path, *arguments: str) -> dict[str, Any]:
    assert main(["eval", str(run), "--out", str(out), *arguments]) == 0
    content: dict[str, Any] = json.loads((out / "results.json").read_text())
    return content


def test_each_dataset_is_scored_by_its_own_heads(
    run: Path, shards: Path, actions: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        kitchen = results(run, tmp_path / "kitchen", "--shards", str(shards))
        pairs = results(run, tmp_path / "pairs", "--shards", str(actions), "--subsets")
    assert list(kitchen["summary"]["num_classes"]) == ["action", "verb", "noun"]
    assert kitchen["summary"]["num_classes"]["action"] == 20
    assert kitchen["summary"]["num_pruned"] > 0
    assert pairs["summary"]["num_classes"] == {"action": 20}
    assert pairs["summary"]["num_clips"] == 6
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        f"{shards}: the model's heads pair are of other datasets: ignored",
        f"{actions}: all clips lack flow, which this dataset does not have",
        f"{actions}: the model's heads verb, noun are of other datasets: ignored",
    ]
    only_flow = next(row for row in pairs["rows"] if row["modalities"] == ["flow"])
    assert (only_flow["num_clips"], only_flow["action_top1"]) == (0, None)


def test_scores_are_those_of_a_model_with_these_heads_alone(run: Path, shards: Path, tmp_path: Path) -> None:
    """Compare with the same weights, saved without the head of the other dataset and without its recipe."""
    recipe = Recipe.model_validate({"name": "x", "stage": "supervised", **_sections(run)})
    model = build_model(recipe, open_datasets(recipe.data).classes)
    classes = ShardFolder(shards).classes
    save_model(model.with_heads({head: head for head in classes}), tmp_path / "alone", classes=classes)
    expected = results(tmp_path / "alone", tmp_path / "a", "--shards", str(shards), "--subsets")
    other = save_run(tmp_path, _sections(run)["data"]["mixture"], "again")
    assert results(other, tmp_path / "b", "--shards", str(shards), "--subsets")["rows"] == expected["rows"]


def _sections(run: Path) -> dict[str, Any]:
    return read_run_recipe(run).model_dump(mode="json", include={"data", "model", "inputs", "seed"})


def test_a_copy_of_a_datasets_folder_is_known_by_its_classes(run: Path, actions: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(actions, tmp_path / "copy")
    one = results(run, tmp_path / "one", "--shards", str(actions))
    other = results(run, tmp_path / "other", "--shards", str(copy))
    assert one["rows"] == other["rows"]


def test_a_model_of_a_mixture_is_compared_with_one_of_the_dataset_alone(
    run: Path, shards: Path, actions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Compare on the dataset whose head the mixture has renamed, and with a model that lacks a head."""
    alone = tmp_path / "alone"
    classes, sections = ShardFolder(actions).classes, _sections(run)
    sections["data"]["modalities"] = ["video", "audio"]
    recipe = Recipe.model_validate({"name": "x", "stage": "supervised", **sections})
    save_model(build_model(recipe, classes), alone, classes=classes)
    for order in ([run, alone], [alone, run]):
        words = ["eval", *map(str, order), "--shards", str(actions), "--modalities", "V,A"]
        assert main([*words, "--out", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    comparison = json.loads((tmp_path / "out/comparison.json").read_text())
    assert set(comparison["models"]) == {"alone", "mixed"}
    verbs = {"verb": ShardFolder(shards).classes["verb"]}
    save_model(build_model(recipe, verbs), tmp_path / "verbs", classes=verbs)
    line = refused(capsys, "eval", str(tmp_path / "verbs"), str(run), "--shards", str(shards), "--modalities", "V,A")
    assert "have different classes (verb 4, noun 5; verb 4): only models of one dataset can be compared" in line


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(list(arguments)) == 2
    line = capsys.readouterr().err.strip()
    assert "\n" not in line
    return line


def test_without_shards_the_datasets_are_named(
    run: Path, shards: Path, actions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = f"name the shards of one dataset with --shards: {shards} (kitchen), {actions} (pairs)"
    assert message in refused(capsys, "eval", str(run))
    assert message in refused(capsys, "predict", str(run), "P01_01_0")


def test_shards_of_no_dataset_of_the_mixture_are_refused(
    shards: Path, actions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = {name: {"shards": str(shards), "weight": 1} for name in ("a", "b")}
    run = save_run(tmp_path, both, "kitchens")
    line = refused(capsys, "eval", str(run), "--shards", str(actions))
    assert "the shards have none of the model's heads verb, noun (they have action)" in line
    twins = {"a": both["a"], "b": {**both["b"], "heads": {"verb": "b_verb", "noun": "b_noun"}}}
    run = save_run(tmp_path, twins, "twins")
    copy = shutil.copytree(shards, tmp_path / "copy")
    assert "could be of several datasets of the mixture" in refused(capsys, "eval", str(run), "--shards", str(copy))
    assert "could be of several datasets of the mixture" in refused(capsys, "eval", str(run), "--shards", str(shards))


def test_a_clip_is_predicted_by_the_heads_of_its_dataset(
    run: Path, shards: Path, actions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = ShardFolder(actions).clips("validation")[0].key
    for folder, heads in ((shards, {"verb", "noun"}), (actions, {"action"})):
        assert main(["predict", str(run), key, "--shards", str(folder), "--json"]) == 0
        (prediction,) = json.loads(capsys.readouterr().out)["clips"]
        actions_named = [action["names"] for guess in prediction["guesses"] for action in guess["actions"]]
        assert {head for names in actions_named for head in names} == heads
        assert ("flow" in prediction["absent"]) == (folder == actions)


def test_an_exported_file_has_the_heads_of_one_dataset(
    run: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "model.onnx"
    assert "name the shards of one dataset with --shards" in refused(capsys, "export", str(run), "--out", str(file))
    assert main(["export", str(run), "--out", str(file), "--shards", str(shards)]) == 0
    _, header = read_model_file(file)
    assert header.heads == {head: len(names) for head, names in ShardFolder(shards).classes.items()}
    key = ShardFolder(shards).clips("validation")[0].key
    (of_run,) = predict(run, [key], shards=str(shards))
    (of_file,) = predict_exported(file, [key], shards=str(shards))
    assert of_file.labels == of_run.labels
    for ours, theirs in zip(of_file.guesses, of_run.guesses, strict=True):
        probabilities = [sorted(action.probability for action in guess.actions) for guess in (ours, theirs)]
        assert probabilities[0] == pytest.approx(probabilities[1], abs=1e-4)


def test_a_model_with_fewer_heads_shares_all_parameters(run: Path) -> None:
    recipe = Recipe.model_validate({"name": "x", "stage": "supervised", **_sections(run)})
    model = build_model(recipe, open_datasets(recipe.data).classes).train()
    part = model.with_heads({"what": "verb"})
    assert list(model.heads) == ["verb", "noun", "pair"]
    assert list(part.heads) == list(part.classifiers) == ["what"]
    own = {id(parameter) for parameter in model.parameters()}
    assert {id(parameter) for parameter in part.parameters()} < own
    inputs = {"audio": model.blank_clip("audio")}
    present_BM = torch.tensor([[False, False, True]])
    with torch.no_grad():
        assert torch.equal(part(inputs, present_BM)["what"], model(inputs, present_BM)["verb"])
