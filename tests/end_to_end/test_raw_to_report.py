"""The main job on real files: pack -> encoder -> teacher -> distil -> evaluate, through the Python entry point."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from karmma_dist.cli import main
from karmma_dist.demo import Timings, compare_students
from karmma_dist.errors import UserError
from karmma_dist.shards.folder import ShardFolder

BASE = {
    "data": {"shards": "shards", "modalities": ["video", "audio"], "num_workers": 0},
    "inputs": {
        "video": {"num_frames": 4, "short_side": 32, "crop": 32},
        "audio": {"num_windows": 1, "window_s": 1.0, "num_mels": 16},
    },
    "model": {"width": 16, "num_heads": 2, "feedforward": 16, "fc_width": 16},
    "optimizer": {"warmup_epochs": 0, "lr": 0.001},
    "training": {"epochs": 1, "batch_size": 8, "log_every_steps": 1, "threads": 1},
}
VIDEO = {"name": "small_video", "options": {"width": 4}}
AUDIO = {"name": "small_audio", "options": {"width": 4}}
RECIPES = {
    "sound": {
        "stage": "supervised",
        "data": {"modalities": ["audio"]},
        "model": {"encoders": {"audio": AUDIO}, "missing": "leave_out"},
    },
    "teacher": {
        "stage": "teacher",
        "after": ["sound"],
        "model": {
            "encoders": {"video": {**VIDEO, "frozen": True}, "audio": {**AUDIO, "frozen": True, "weights": "sound"}},
            "missing": "leave_out",
            "attention_dropout": 0.3,
        },
    },
    "student": {
        "stage": "distill",
        "after": ["teacher"],
        "data": {"modality_dropout": {"probability": 0.5}},
        "model": {"encoders": {"video": VIDEO, "audio": AUDIO}, "missing": "stand_in"},
        "distill": {"teacher": "teacher"},
        "training": {"epochs": 2},
    },
}


@pytest.fixture(scope="module")
def workplace(kitchen: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with recipes, packed shards and all three runs finished."""
    root = tmp_path_factory.mktemp("workplace")
    (root / "recipes").mkdir()
    (root / "recipes" / "base.yaml").write_text(yaml.safe_dump(BASE))
    for name, recipe in RECIPES.items():
        text = yaml.safe_dump({"extends": "base.yaml", "name": name, **recipe})
        (root / "recipes" / f"{name}.yaml").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert main(["shard", "demo", "--raw", str(kitchen), "--out", "shards", "--workers", "2"]) == 0
        assert main(["train", "student"]) == 0
    return root


def run(workplace: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run `karmma-dist ARGUMENTS` in the workplace; return the exit code."""
    monkeypatch.chdir(workplace)
    return main(list(arguments))


def test_training_the_student_trains_what_it_builds_on_first(workplace: Path) -> None:
    for name in RECIPES:
        folder = workplace / "runs" / name
        assert json.loads((folder / "state.json").read_text())["state"] == "finished"
        assert (folder / "weights.safetensors").is_file()
        assert yaml.safe_load((folder / "recipe.yaml").read_text())["name"] == name
    lines = [json.loads(line) for line in (workplace / "runs/student/metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    for line in steps:
        assert line["loss"] == pytest.approx(0.7 * line["cross_entropy"] + 0.3 * line["kl"], rel=1e-5)


def test_a_finished_run_is_not_trained_again(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = workplace / "runs/student/weights.safetensors"
    before = weights.stat().st_mtime_ns
    assert run(workplace, monkeypatch, "train", "student") == 0
    assert weights.stat().st_mtime_ns == before


def test_a_run_folder_of_another_recipe_names_the_field(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(workplace, monkeypatch, "train", "student", "--set", "optimizer.lr=0.5") == 2
    assert re.search(r"optimizer\.lr.*0\.001.*0\.5", capsys.readouterr().err)


def test_eval_takes_the_newest_finished_run_and_drops_sensors(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(workplace, monkeypatch, "eval", "--drop-prob", "0.5", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    stored = json.loads((workplace / "runs/student/eval/results.json").read_text())
    assert printed == stored
    (row,) = stored["rows"]
    assert row["modalities"] == ["video", "audio"]
    assert (row["drop_prob"], row["seed"], row["num_clips"]) == (0.5, 0, 10)
    assert 0 <= row["action_top1"] <= row["action_top5"] <= 100
    assert row["action_top1"] <= min(row["verb_top1"], row["noun_top1"])


def test_several_runs_make_one_report_and_keep_their_own(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "comparison"
    runs = ["runs/teacher", "runs/student"]
    choices = ["--subsets", "--sweep", "--corrupt", "video:blur:3", "--json", "--out", str(out)]
    assert run(workplace, monkeypatch, "eval", *runs, *choices) == 0
    printed = json.loads(capsys.readouterr().out)
    assert list(printed["models"]) == ["teacher", "student"]
    for name, results in printed["models"].items():
        assert json.loads((workplace / "runs" / name / "eval/results.json").read_text()) == results
        low, high = results["rows"][0]["action_top1_ci"]
        assert 0 <= low <= results["rows"][0]["action_top1"] <= high <= 100
    (pair,) = printed["comparison"]["pairs"]
    assert pair["models"] == ["teacher", "student"]
    assert len(pair["conditions"]) == len(printed["models"]["student"]["rows"]) == (3 + 9) + (2 + 9)
    assert [test["corrupt"] for test in pair["conditions"]] == [None] * 12 + ["video:blur:3"] * 11
    assert json.loads((out / "comparison.json").read_text()) == printed
    report = (out / "report.md").read_text()
    assert "| present | clips | teacher | student |" in report
    assert "average rank" in report
    assert "Significance of the differences" in report
    assert "| video:blur:3 | a Gaussian of 4.0% of the picture's side" in report
    assert "Action top-1 per corrupted sensor" in (out / "report.html").read_text()
    assert (out / "drop_curve.png").is_file()


def test_the_demo_evaluates_only_students_that_changed(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(workplace)
    runs = {"The teacher": tmp_path / "teacher", "The student": tmp_path / "student"}
    for folder in runs.values():
        folder.mkdir()
        for name in ("weights.safetensors", "model.yaml", "recipe.yaml"):
            shutil.copy(workplace / "runs" / folder.name / name, folder)
    evaluated: list[str] = []

    def note(stage: str, *_: object) -> None:
        evaluated.append(stage)

    def compare_again() -> dict[str, Any]:
        evaluated.clear()
        return compare_students(tmp_path, runs, Timings(tmp_path / "timings.json"), note)

    found = compare_again()
    assert set(evaluated) == {"eval teacher", "eval student"}
    assert list(json.loads((tmp_path / "timings.json").read_text())) == [f"evaluate {title}" for title in runs]
    assert list(found["models"]) == found["comparison"]["pairs"][0]["models"] == list(runs)
    assert found["comparison"]["pairs"][0]["drop_curve_fall"] is not None
    stored = json.loads((tmp_path / "comparison.json").read_text())
    assert found == stored
    assert compare_again() == stored
    assert evaluated == []

    weights, results = (tmp_path / "student" / name for name in ("weights.safetensors", "eval/results.json"))
    after = results.stat().st_mtime_ns + 10**9
    os.utime(weights, ns=(after, after))
    assert compare_again() == stored
    assert evaluated
    os.utime(weights, ns=(0, 0))
    content = json.loads(results.read_text())
    results.write_text(json.dumps(content | {"rows": content["rows"][:1]}))
    assert compare_again() == stored
    assert evaluated
    (tmp_path / "comparison.json").write_text("{")
    with pytest.raises(UserError, match=r"comparison\.json.*JSON"):
        compare_again()


def test_runs_that_cannot_be_compared_are_one_line(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def copy(name: str, classes: dict[str, list[str]] | None = None, **data: object) -> str:
        """The student's run in a folder of its own, called `name`, with other class names or data."""
        student, folder = workplace / "runs/student", tmp_path / f"a copy called {name}"
        folder.mkdir()
        shutil.copy(student / "weights.safetensors", folder)
        card, recipe = (yaml.safe_load((student / f"{part}.yaml").read_text()) for part in ("model", "recipe"))
        card["classes"] = classes or card["classes"]
        recipe = {**recipe, "name": name, "data": {**recipe["data"], **data}}
        for part, tree in zip(("model", "recipe"), (card, recipe), strict=True):
            (folder / f"{part}.yaml").write_text(yaml.safe_dump(tree))
        return str(folder)

    def refused(named: str, *runs: str) -> None:
        capsys.readouterr()
        assert run(workplace, monkeypatch, "eval", *runs, "--out", str(tmp_path / "out")) == 2
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1
        assert named in errors[0]
        assert not (tmp_path / "out").exists()

    classes = yaml.safe_load((workplace / "runs/student/model.yaml").read_text())["classes"]
    nouns = list(range(len(classes["noun"])))
    classes["verb"][:2] = reversed(classes["verb"][:2])
    refused("different classes", "runs/teacher", copy("other classes", classes))
    refused("are both called 'student'", "runs/student", copy("student"))
    refused("fewer is evaluated on", "runs/teacher", copy("fewer", drop_nouns=nouns[:1]))
    refused("drop_nouns leaves no clip to score", copy("none", drop_nouns=nouns))


def test_unseen_participants_get_figures_of_their_own(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shards = ShardFolder(workplace / "shards")
    people = [shards.metadata(clip).participant for clip in shards.clips("validation")]
    unseen = max(people)
    lists = tmp_path / "lists"
    lists.mkdir()
    (lists / "EPIC_100_unseen_participant_ids_validation.csv").write_text(f"participant_id\n{unseen}\n")
    out = tmp_path / "out"
    arguments = ["eval", "runs/student", "--annotations", str(lists), "--out", str(out)]
    assert run(workplace, monkeypatch, *arguments) == 0
    (row,) = json.loads((out / "results.json").read_text())["rows"]
    assert row["num_unseen"]["action"] == people.count(unseen) > 0
    assert 0 <= row["action_top1_unseen"] <= 100
    assert "num_tail" not in row
    assert "action top-1, unseen participants" in (out / "report.md").read_text()
    copy = tmp_path / "student"
    shutil.copytree(workplace / "runs/student", copy)
    recipe = yaml.safe_load((copy / "recipe.yaml").read_text())
    recipe["evaluation"]["annotations"] = str(lists)
    (copy / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert run(workplace, monkeypatch, "eval", str(copy)) == 0
    assert json.loads((copy / "eval/results.json").read_text())["rows"] == [row]


def test_every_subset_and_drop_probability_is_in_the_report(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = str(tmp_path / "report")
    assert run(workplace, monkeypatch, "eval", "runs/student", "--subsets", "--sweep", "--out", out) == 0
    rows = json.loads((tmp_path / "report/results.json").read_text())["rows"]
    assert {tuple(row["modalities"]) for row in rows if row["drop_prob"] == 0} == {
        ("video",), ("audio",), ("video", "audio")
    }  # fmt: skip
    assert sorted({row["drop_prob"] for row in rows}) == [tenth / 10 for tenth in range(10)]
    report = (tmp_path / "report/report.md").read_text()
    assert "V+A" in report
    assert list((tmp_path / "report").glob("*.png"))


def test_a_weights_file_can_be_evaluated_on_other_shards(
    workplace: Path, shards: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("weights.safetensors", "model.yaml"):
        (tmp_path / name).write_bytes((workplace / "runs/student" / name).read_bytes())
    weights = str(tmp_path / "weights.safetensors")
    assert run(workplace, monkeypatch, "eval", weights) == 2
    assert run(workplace, monkeypatch, "eval", weights, "--shards", str(shards), "--modalities", "A") == 0


def test_weights_of_another_dataset_are_refused_by_their_classes(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    card = yaml.safe_load((workplace / "runs/student/model.yaml").read_text())
    for name in ("weights.safetensors", "recipe.yaml"):
        (tmp_path / name).write_bytes((workplace / "runs/student" / name).read_bytes())
    card["classes"]["verb"].reverse()
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(card))
    assert run(workplace, monkeypatch, "eval", str(tmp_path)) == 2
    assert "'verb'" in capsys.readouterr().err


@pytest.fixture(scope="module")
def unlabelled(kitchen: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kitchen's validation split packed without its labels."""
    out = tmp_path_factory.mktemp("unlabelled") / "shards"
    options = ["--set", "epic_kitchens.unlabelled_splits=[validation]"]
    assert main(["shard", "demo", "--raw", str(kitchen), "--out", str(out), *options]) == 0
    return out


def test_a_split_without_labels_is_predicted_not_scored(
    workplace: Path,
    unlabelled: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    assert run(workplace, monkeypatch, "eval", "runs/student", "--shards", str(unlabelled)) == 2
    assert re.search("'validation' .*labels", capsys.readouterr().err)
    files = ["--predictions", str(tmp_path / "p.npz"), "--submission", "epic-kitchens", str(tmp_path / "p.pkl")]
    out = ["--out", str(tmp_path / "report")]
    broken = ["--corrupt", "audio:mute:3"]
    assert run(workplace, monkeypatch, "eval", "runs/student", "--shards", str(unlabelled), *files, *broken) == 2
    assert "--corrupt" in capsys.readouterr().err
    assert run(workplace, monkeypatch, "eval", "runs/student", "--shards", str(unlabelled), *files, *out) == 0
    assert "predictions" in capsys.readouterr().err
    assert not (tmp_path / "report").exists()
    with np.load(tmp_path / "p.npz", allow_pickle=False) as file:
        assert len(file["keys"]) == len(file["log_probs_verb"]) == 10
        assert (file["label_noun"] == -1).all()
        assert np.exp(file["log_probs_noun"]).sum(axis=1) == pytest.approx(np.ones(10), rel=1e-5)
        read = pickle.loads((tmp_path / "p.pkl").read_bytes())
        assert read["narration_id"].tolist() == file["keys"].tolist()
        assert (read["verb_output"] == file["log_probs_verb"]).all()


def test_views_are_averaged_by_recipe_or_by_command(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def rows(run_dir: str, *options: str) -> tuple[list[dict], dict]:
        out = tmp_path / f"report{len(list(tmp_path.iterdir()))}"
        assert run(workplace, monkeypatch, "eval", run_dir, "--subsets", "--out", str(out), *options) == 0
        results = json.loads((out / "results.json").read_text())
        return results["rows"], results["summary"]["views"]

    copy = tmp_path / "copy"
    shutil.copytree(workplace / "runs/student", copy)
    recipe = yaml.safe_load((copy / "recipe.yaml").read_text())
    recipe["evaluation"]["views"] = {"temporal": 2, "spatial": 3}
    (copy / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    one = rows("runs/student")
    assert one[1] == {"temporal": 1, "spatial": 1}
    six = rows("runs/student", "--views", "2x3")
    assert six[1] == {"temporal": 2, "spatial": 3}
    assert six[0] != one[0]
    assert rows(str(copy)) == six
    assert rows(str(copy), "--views", "1x1") == one


def test_a_damaged_clip_is_not_counted_but_reported(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    copy = tmp_path / "damaged"
    shutil.copytree(workplace / "shards", copy)
    tar = copy / "validation-000000.tar"
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 2])
    out = str(tmp_path / "report")
    assert run(workplace, monkeypatch, "eval", "runs/student", "--shards", str(copy), "--out", out) == 1
    assert re.search(r"damaged.*validation-000000\.tar", capsys.readouterr().err)
    results = json.loads((tmp_path / "report/results.json").read_text())
    assert results["rows"][0]["num_clips"] + results["summary"]["num_damaged"] == 10


def test_inspect_and_recipe_show_print_shards_and_recipe(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(workplace, monkeypatch, "inspect", "shards", "--json", "--sheet", "sheet.png") == 0
    assert json.loads(capsys.readouterr().out)["splits"]["train"]["clips"] == 30
    assert (workplace / "sheet.png").stat().st_size > 10_000
    assert run(workplace, monkeypatch, "recipe", "show", "student", "--set", "distill.alpha=0.25") == 0
    assert yaml.safe_load(capsys.readouterr().out)["distill"]["alpha"] == 0.25


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["shard", "demo", "--raw", "nowhere"], "nowhere"),
        (["shard", "dmo"], "'demo'"),
        (["shard", "demo", "--part", "3/2"], "I/N"),
        (["train", "student", "--set", "training.epoch=3"], "'training.epoch'"),
        (["train", "studnt"], "'student'"),
        (["train", "student", "--set", "name=other", "--set", "data.shards=empty"], "manifest.json"),
        (["train", "student", "--set", "name=other", "--set", "distill.teacher=nobody"], "nobody"),
        (["eval", "--drop-prob", "1.5"], "1.5"),
        (["eval", "--modalities", "V,X"], "'X'"),
        (["eval", "--modalities", "F"], "'flow'"),
        (["eval", "empty"], "empty"),
        (["eval", "nowhere"], "nowhere"),
        (["eval", "--split", "exam"], "'exam'"),
        (["eval", "--views", "3x2"], "TEMPORALxSPATIAL"),
        (["eval", "--sls", "1,1,1"], "--sls"),
        (["eval", "--predictions", "p.csv"], ".npz"),
        (["eval", "--submission", "epic-kitchens", "s.zip"], "verb 97, noun 300"),
        (["eval", "--submission", "epic-kitchens", "s.pkl", "--subsets"], " 3"),
        (["eval", "--submission", "something-something", "s.csv"], "one head"),
        (["eval", "--shards", "nowhere"], "nowhere"),
        (["eval", "--annotations", "nowhere"], "nowhere"),
        (["eval", "runs/student", "runs/student"], "runs/student"),
        (["eval", "runs/student", "nowhere"], "nowhere"),
        (["eval", "runs/student", "runs/sound", "--modalities", "V"], "'video'"),
        (["inspect", "shards", "P99_01_0"], "P99_01_0"),
        (["inspect", "empty"], "manifest.json"),
        (["launch", "student"], "--local N"),
        (["launch", "student", "--local", "2", "--nodes", "2"], "--slurm"),
        (["recipe", "show", "nothing"], "no such file"),
        (["nonsense"], "nonsense"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    workplace: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    named: str,
) -> None:
    (workplace / "empty").mkdir(exist_ok=True)
    assert run(workplace, monkeypatch, *arguments) == 2
    *progress, error = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ")
    assert named in error
    assert not any("Traceback" in line or line.startswith("error: ") for line in progress)


def test_launch_shows_the_command_it_would_run(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(workplace, monkeypatch, "launch", "student", "--local", "3", "--dry-run") == 0
    local = capsys.readouterr().out
    assert [line.split()[:3] for line in local.splitlines()] == [
        [f"RANK={rank}", f"LOCAL_RANK={rank}", "WORLD_SIZE=3"] for rank in range(3)
    ]
    assert local.count("karmma_dist train student") == 3
    command = ["launch", "student", "--slurm", "--nodes", "4", "--gpus-per-node", "0", "--set", "seed=1", "--dry-run"]
    assert run(workplace, monkeypatch, *command) == 0
    slurm = capsys.readouterr().out
    assert slurm.startswith("sbatch --job-name=student --nodes=4 --gpus-per-node=0 --ntasks-per-node=1 ")
    assert slurm.rstrip().endswith("slurm/distill.sh student --set=seed=1")


def test_a_video_student_learns_from_an_audiovisual_teacher(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is evaluated, asked and profiled as the model of one modality that it is."""
    only_video = ["--set=model.modalities=[video]"]
    assert run(workplace, monkeypatch, "train", "student", "--set=name=watcher", *only_video) == 0
    state = json.loads((workplace / "runs" / "watcher" / "state.json").read_text())
    assert state["state"] == "finished"
    assert yaml.safe_load((workplace / "runs" / "watcher" / "model.yaml").read_text())["modalities"] == ["video"]
    lines = [json.loads(line) for line in (workplace / "runs" / "watcher" / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if line["kind"] == "train"]
    assert all(line["present_video"] == 1.0 for line in trained)
    assert any(0 < line["present_audio"] < 1 for line in trained)
    assert all(line["kl"] > 0 for line in trained)

    assert run(workplace, monkeypatch, "eval", "runs/watcher", "--subsets") == 0
    rows = json.loads((workplace / "runs" / "watcher" / "eval" / "results.json").read_text())["rows"]
    assert {tuple(row["modalities"]) for row in rows} == {("video",)}
    key = ShardFolder(workplace / "shards").clips("validation")[0].key
    assert run(workplace, monkeypatch, "predict", "runs/watcher", key) == 0
    capsys.readouterr()
    assert run(workplace, monkeypatch, "profile", "student", "--json", *only_video) == 0
    profiled = json.loads(capsys.readouterr().out)["rows"]
    assert {tuple(row["modalities"]) for row in profiled if row["model"] == "student"} == {("video",)}
    assert ["video", "audio"] in [row["modalities"] for row in profiled if row["model"] == "teacher"]


def test_experts_that_held_clips_out_teach_a_pooled_student(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Distil as Radevski et al. do, from the best epochs of the experts."""
    pooled = ["--set=model.fusion=mean", "--set=data.hold_out=0.4"]
    sees = ["--set=data.modalities=[video]", f"--set=model.encoders.video={json.dumps(VIDEO)}"]
    assert run(workplace, monkeypatch, "train", "sound", "--set=name=hears", *pooled) == 0
    assert run(workplace, monkeypatch, "train", "sound", "--set=name=sees", *pooled, *sees) == 0
    taught = [
        "--set=name=pooled", "--set=model.modalities=[video]", "--set=model.fusion=mean", "--set=distill.teacher=null",
        "--set=distill.teachers=[sees/best, hears/best]", "--set=distill.alpha=0", "--set=distill.average=logits",
        "--set=after=[]",
    ]  # fmt: skip
    assert run(workplace, monkeypatch, "train", "student", *taught) == 0
    ensemble = json.loads((workplace / "runs" / "pooled" / "ensemble.json").read_text())
    assert {len(losses) for losses in ensemble["losses"].values()} == {2}
    for head, losses in ensemble["losses"].items():
        odds = np.exp(-np.array(losses))
        assert ensemble["weights"][head] == pytest.approx(odds / odds.sum(), rel=1e-5)
    state = json.loads((workplace / "runs" / "pooled" / "state.json").read_text())
    assert state["state"] == "finished"
