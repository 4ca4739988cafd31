"""A mistake in an evaluation is reported in one line before the first clip is read, and leaves no partial files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from karmma_dist.cli import main
from karmma_dist.evaluation import run as evaluation_run
from karmma_dist.evaluation.conditions import build_conditions
from karmma_dist.evaluation.plan import plan_evaluation
from karmma_dist.io.files import sha256_of, write_json
from karmma_dist.packing.tars.writer import write_tar
from karmma_dist.recipe import Recipe, save_recipe
from karmma_dist.shards.folder import ShardFolder
from karmma_dist.shards.format import index_path
from karmma_dist.shards.index import build_index
from kits.evaluation import make_place, save_run


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_place(tmp_path_factory.mktemp("plan"))
    save_run(root / "watcher", ["video"])
    save_run(root / "unknown", ["video"])
    (root / "unknown/weights.safetensors").write_bytes(b"no weights")
    (root / "file").write_text("no folder")
    (root / "taken.npz").mkdir()
    return root


@pytest.fixture
def nothing_is_evaluated(monkeypatch: pytest.MonkeyPatch) -> None:
    def evaluate(*_: Any, **__: Any) -> None:
        raise AssertionError("a clip was evaluated")

    monkeypatch.setattr(evaluation_run, "evaluate", evaluate)


@pytest.mark.usefixtures("nothing_is_evaluated")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("student watcher --corrupt audio:mute:1", "breaks audio, which is not evaluated here: video"),
        ("student watcher --modalities A", "modality 'audio' is not one of this model's: video"),
        ("student watcher --split validation", "student and watcher have no condition in common"),
        ("student unknown --modalities V", "unknown/weights.safetensors: cannot be read as weights"),
        ("student listener --modalities A", "on 3 clips, student on 4: only student has clip silent_0"),
        ("student watcher --modalities V --out PLACE/file", "file: the report cannot be written (Not a directory)"),
        ("student --out PLACE/file/deep/er", "deep/er: the report cannot be written (Not a directory)"),
        ("student --out /proc/nothing", "/proc/nothing: the report cannot be written"),
        ("student --predictions PLACE/taken.npz", "taken.npz: cannot be written (Is a directory)"),
        ("student --predictions /proc/x.npz", "--predictions /proc/x.npz: cannot be written"),
        ("student --submission epic-kitchens /proc/x.pkl", "/proc/x.pkl: cannot be written"),
        ("student --submission epic-kitchens PLACE/x.pkl --modalities A", "1 of 4 have none of audio, the first: sil"),
        ("student --drop-prob nan", "drop probability nan: it must lie between 0 and 1"),
    ],
)  # fmt: skip
def test_bad_requests_are_one_line_before_the_first_clip(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str, message: str,
) -> None:
    shown = [str(place / word) if (place / word / "model.yaml").is_file() else word for word in words.split()]
    line = ["eval", "--shards", str(place / "shards"), "--split", "train"]
    line += [word.replace("PLACE", str(place)) for word in shown]
    out = [] if "--out" in line else ["--out", str(tmp_path / "out")]
    before = sorted(place.rglob("*"))
    assert main([*line, *out]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert message in error
    assert "\n" not in error
    assert sorted(place.rglob("*")) == before
    assert not (tmp_path / "out").exists()


def test_a_plan_knows_the_scored_clips(place: Path) -> None:
    def scored(**choices: Any) -> list[str]:
        plan = plan_evaluation(
            place / "listener", build_conditions, shards=str(place / "shards"), **choices
        )
        done = evaluation_run.carry_out(plan)
        assert done.results.per_clip.keys == plan.scored_keys
        return plan.scored_keys

    assert scored(split="train") == ["one_1", "one_2", "sound_0"]
    assert scored() == ["one_0"]


@pytest.mark.parametrize(
    ("test_split", "asked", "taken"),
    [("train", [], "train"), ("train", ["--split", "validation"], "validation"), (None, [], "validation")],
)
def test_the_test_split_is_the_default(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    test_split: str | None, asked: list[str], taken: str,
) -> None:  # fmt: skip
    run = save_run(tmp_path / "run", ["video"])
    data = {"shards": str(place / "shards"), "modalities": ["video"], "num_workers": 0, "test_split": test_split}
    model = {"encoders": {"video": {"name": "small_video", "options": {"width": 4}}}}
    recipe = {"name": "run", "stage": "supervised", "data": data, "model": model}
    save_recipe(Recipe.model_validate(recipe), run / "recipe.yaml")
    assert main(["eval", str(run), *asked, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["num_clips"] == {"train": 3, "validation": 1}[taken]


def test_a_submission_that_damage_forbids_costs_neither_results_nor_predictions(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards, out = tmp_path / "shards", tmp_path / "out"
    shutil.copytree(place / "shards", shards)
    folder = ShardFolder(shards)
    clip = next(clip for clip in folder.clips("train") if clip.key == "one_1")
    tar, member = shards / clip.shard, clip.members["video"]
    assert member is not None
    data = bytearray(tar.read_bytes())
    data[member.offset + member.size // 2] ^= 255
    tar.write_bytes(data)
    files = ["--predictions", str(tmp_path / "p.npz"), "--submission", "epic-kitchens", str(tmp_path / "s.pkl")]
    line = ["eval", f"{place}/student", "--shards", str(shards), "--split", "train"]
    assert main([*line, *files, "--out", str(out), "--json"]) == 2
    shown = capsys.readouterr()
    assert "not written, since every clip is needed: 1 of 4 have no prediction" in shown.err
    assert "the first: one_1" in shown.err
    results = json.loads((out / "results.json").read_text())
    assert results == json.loads(shown.out)
    assert results["summary"]["num_damaged"] == 1
    assert (tmp_path / "p.npz").is_file()
    assert not (tmp_path / "s.pkl").exists()
    progress = [text for text in shown.err.splitlines() if text.startswith("eval student: ")]
    assert progress[0].startswith("eval student: 0/4")
    assert progress[-1].startswith("eval student: 4/4")  # damaged clips count as done


def test_a_fully_damaged_split_names_its_first_damaged_clip(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = tmp_path / "shards"
    shutil.copytree(place / "shards", shards)
    for tar in shards.glob("train-*.tar"):
        tar.write_bytes(bytes(tar.stat().st_size))
    line = ["eval", f"{place}/student", "--shards", str(shards), "--split", "train"]
    assert main([*line, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "4 clips can be read, the first: train-000000.tar: clip one_1" in error
    assert not (tmp_path / "out").exists()


def test_a_split_without_labels_needs_no_report_folder(place: Path, tmp_path: Path) -> None:
    """A run of another user may be read-only."""
    shards = tmp_path / "shards"
    shutil.copytree(place / "shards", shards)
    folder = ShardFolder(shards)
    manifest = folder.manifest.to_dict()
    for entry in manifest["splits"]["train"]["shards"]:
        tar = shards / entry["name"]
        samples = []
        for clip in (clip for clip in folder.clips("train") if clip.shard == tar.name):
            members = {name: folder.read(clip, name) for name, member in clip.members.items() if member}
            metadata = json.loads(members["json"]) | {"labels": {"verb": None, "noun": None}}
            samples.append((clip.key, members | {"json": json.dumps(metadata).encode()}))
        write_tar(tar, samples)
        write_json(index_path(tar), build_index(tar, tuple(folder.modalities)).to_dict())
        entry |= {"bytes": tar.stat().st_size, "index_sha256": sha256_of(index_path(tar))}
    write_json(shards / "manifest.json", manifest)
    predictions = tmp_path / "p.npz"
    line = ["eval", f"{place}/student", "--shards", str(shards), "--split", "train"]
    assert main([*line, "--predictions", str(predictions), "--out", "/proc/nothing"]) == 0
    assert predictions.is_file()
