"""An exported file predicts like its run, also where nothing but the extra `runtime` is installed."""

from __future__ import annotations

import configparser
import json
import re
import subprocess
import sys
from importlib.metadata import Distribution, distribution
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement

import karmma_dist
from karmma_dist.cli import main
from karmma_dist.deploy.export import export_run
from karmma_dist.deploy.predict import predict_exported
from karmma_dist.deploy.runtime import Runtime
from karmma_dist.errors import UserError
from karmma_dist.evaluation.predict.predict import predict
from kits.evaluation import flat, make_place
from kits.patience import HANGS_S

ROOT = Path(karmma_dist.__file__).parents[1]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return packed clips, and a student exported with their packing settings."""
    root = make_place(tmp_path_factory.mktemp("runtime"))
    export_run(root / "student", root / "student.onnx", shards=str(root / "shards"))
    return root


def ask(run: Path, file: Path, clips: list[str], **options: str | float | None) -> list[list[dict]]:
    """Return the predictions of a run and of its file; probabilities by action, since equal ones have no order."""
    kinds = [predict(run, clips, **options), predict_exported(file, clips, **options)]  # type: ignore[arg-type]
    trees = [[prediction.to_dict() for prediction in predictions] for predictions in kinds]
    for guess in (guess for tree in trees for clip in tree for guess in clip["guesses"]):
        guess["actions"] = {" ".join(action["names"].values()): action["probability"] for action in guess["actions"]}
    return trees


@pytest.mark.parametrize("modalities", [None, "V,A"])
def test_a_file_predicts_like_its_run(place: Path, modalities: str | None) -> None:
    folder, file, shards = place / "student", place / "student.onnx", str(place / "shards")
    media = [str(place / "raw/one.mp4"), str(place / "raw/sound.m4a")]
    expected, actual = ask(folder, file, media, modalities=modalities, start_s=0.1, shards=shards)
    assert flat(actual) == pytest.approx(flat(expected), abs=1e-4)
    packed_like = [predict_exported(file, media, modalities=modalities, shards=named) for named in (None, shards)]
    assert packed_like[0] == packed_like[1]
    expected, actual = ask(folder, file, ["one_0", "silent_0", "sound_0"], modalities=modalities, shards=shards)
    assert flat(actual) == pytest.approx(flat(expected), abs=1e-4)


def test_predictions_need_only_what_the_extra_installs(place: Path, tmp_path: Path) -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    folder = tmp_path / "packages"
    folder.mkdir()
    (folder / "karmma_dist").symlink_to(ROOT / "karmma_dist")
    for name in installed_with(setup["options.extras_require"]["runtime"].split()):
        place_package(distribution(name), folder)

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command, environment = [sys.executable, "-S", *words], {"PYTHONPATH": str(folder), "PATH": "/usr/bin:/bin"}
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=HANGS_S, check=False
        )

    absent = run("-c", "import torch")
    assert absent.stderr.endswith("No module named 'torch'\n")
    clip, file = str(place / "raw/one.mp4"), place / "student.onnx"
    done = run("-m", "karmma_dist", "predict", str(file), clip, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["clips"] == [each.to_dict() for each in predict_exported(file, [clip])]
    refused = run("-m", "karmma_dist", "predict", str(place / "student"), clip)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1), refused.stderr
    assert refused.stderr.startswith("error: torch is not installed: the extra 'runtime' alone serves predict")


def installed_with(requirements: list[str]) -> set[str]:
    """Return the names of the packages that pip installs for requirements."""
    names: set[str] = set()
    waiting = [Requirement(text) for text in requirements]
    while waiting:
        requirement = waiting.pop()
        if requirement.marker is not None and not any(
            requirement.marker.evaluate({"extra": extra}) for extra in ("", "http")
        ):
            continue
        if requirement.name not in names:
            names.add(requirement.name)
            waiting += [Requirement(text) for text in distribution(requirement.name).requires or []]
    return names


def place_package(package: Distribution, folder: Path) -> None:
    """Link a package's files into a folder."""
    for name in {file.parts[0] for file in package.files or []} - {"..", "__pycache__"}:
        if not (folder / name).exists():
            (folder / name).symlink_to(str(package.locate_file(name)))


@pytest.fixture(scope="module")
def student(place: Path) -> Runtime:
    return Runtime.open(place / "student.onnx", threads=1)


def test_an_absent_modality_changes_nothing_but_its_share(student: Runtime) -> None:
    arrays = {each.modality: np.ones(each.shape, each.dtype) for each in student.header.modalities}
    subsets = ["video"], list(arrays), ["video"]
    seen = [student.logits({name: arrays[name] for name in names})["verb"] for names in subsets]
    assert np.array_equal(seen[0], seen[2])
    assert not np.array_equal(seen[0], seen[1])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({}, "no sensor is present: the model needs one of video, flow, audio"),
        ({"vido": np.zeros(1)}, "the model has no modality 'vido' (did you mean 'video'?); it has video, flow, audio"),
        ({"video": np.zeros((4, 32, 32, 3))}, "video is float64 (4, 32, 32, 3), expected uint8 (4, 32, 32, 3): frames"),
        ({"video": np.zeros((4, 32), np.uint8)}, "video is uint8 (4, 32), expected uint8 (4, 32, 32, 3): frames, rows"),
        ({"audio": [0, 1]}, "audio is list, expected int16 (4, 4800): windows, samples"),
    ],
)
def test_arrays_of_other_sensors_or_kinds_are_refused(student: Runtime, arrays: dict, message: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        student.logits(arrays)


def test_a_bad_request_is_one_line(place: Path, capsys, monkeypatch) -> None:
    def refusal(*words: str) -> str:
        assert main(["predict", str(place / "student.onnx"), *words]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "it knows no shards: name those of the clips with --shards DIR" in refusal("one_0")
    assert "unknown modality 'X'" in refusal("one_0", "--modalities", "X")
    assert "modality 'detections' is not one of this model's" in refusal("one_0", "--modalities", "D")
    assert "no such file" in refusal("nothing.mp4")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert "onnxruntime is not installed: pip install 'karmma-dist[runtime]'" in refusal("one_0")


def test_shards_of_other_classes_are_refused(place: Path, tmp_path: Path) -> None:
    for path in (place / "shards").iterdir():
        (tmp_path / path.name).symlink_to(path)
    manifest = json.loads((place / "shards/manifest.json").read_text())
    manifest["heads"]["verb"].reverse()
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="class 0 of 'verb' is 'open' in the shards, 'close' in the model"):
        predict_exported(place / "student.onnx", ["one_0"], shards=str(tmp_path))


def test_a_provider_that_this_onnxruntime_lacks_is_named(place: Path) -> None:
    with pytest.raises(UserError, match=r"^this onnxruntime has no QuantumExecutionProvider; it has .*CPU"):
        Runtime.open(place / "student.onnx", providers=["QuantumExecutionProvider"])
