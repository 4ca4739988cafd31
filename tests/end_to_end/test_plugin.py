"""A package apart adds a modality, a reader, an encoder, an objective, a tracker and a metric, all used in one run."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from karmma_dist.modalities import MODALITIES
from kits.packing import write_movie
from kits.patience import HANGS_S

ENTRY_POINTS = """\
[karmma_dist.modalities]
toy = toy_sensor.modality:TOY
[karmma_dist.encoders]
toy_conv = toy_sensor.encoder:TOY_CONV
[karmma_dist.readers]
kinetics_like = toy_sensor.dataset:KINETICS_LIKE
[karmma_dist.objectives]
smoothed = toy_sensor.objective:SMOOTHED
[karmma_dist.trackers]
csv = toy_sensor.tracker:CSV
[karmma_dist.metrics]
top2 = toy_sensor.metric:TOP2
"""
SPEC = """\
reader: kinetics_like
dataset: toys
raw: {raw}
out: {out}
video: {{short_side: 32}}
flow: {{source: none}}
audio: {{source: none}}
toy: {{source: auto}}
"""
RECIPE = """\
name: toys/baseline
stage: supervised
runs_dir: {runs}
data: {{shards: {shards}, modalities: [video, toy], num_workers: 0}}
inputs:
  video: {{num_frames: 4, short_side: 32, crop: 24}}
  toy: {{num_readings: 16}}
model:
  encoders:
    video: {{name: small_video, options: {{width: 4}}}}
    toy: {{name: toy_conv}}
  width: 16
  num_heads: 2
  num_layers: 1
  feedforward: 16
  fc_width: 16
  missing: stand_in
objective: {{name: smoothed, options: {{smoothing: 0.2}}}}
training: {{epochs: 2, batch_size: 4, trackers: [tensorboard, csv]}}
optimizer: {{warmup_epochs: 0}}
"""
SOURCE = Path(__file__).parent.parent / "plugin" / "toy_sensor"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An installed package, a raw folder in which clip 3 has no readings and clip 4 no video, and a recipe."""
    root = tmp_path_factory.mktemp("plugin")
    install(root / "site", SOURCE)
    for split, numbers in (("train", range(12)), ("validation", range(12, 18))):
        rows = [{"label": f"label{number % 2}", "youtube_id": f"clip{number}"} for number in numbers]
        with open(root / f"{split}.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, ["label", "youtube_id"])
            writer.writeheader()
            writer.writerows(rows)
        for number, row in zip(numbers, rows, strict=True):
            folder = root / "raw" / split / row["label"]
            folder.mkdir(parents=True, exist_ok=True)
            if number != 4:
                write_movie(folder / f"{row['youtube_id']}.mp4", frames=20, fps=25)
            if number != 3:
                np.save(folder / f"{row['youtube_id']}.npy", np.full(40, float(number % 2)))
        (root / f"{split}.csv").rename(root / "raw" / f"{split}.csv")
    (root / "toys.yaml").write_text(SPEC.format(raw=root / "raw", out=root / "shards"))
    (root / "recipe.yaml").write_text(RECIPE.format(runs=root / "runs", shards=root / "shards"))
    return root


def install(site: Path, source: Path) -> None:
    """Write what pip would install of the package."""
    (site / "toy_sensor-1.0.dist-info").mkdir(parents=True)
    (site / "toy_sensor-1.0.dist-info" / "entry_points.txt").write_text(ENTRY_POINTS)
    metadata = "Metadata-Version: 2.1\nName: toy-sensor\nVersion: 1.0\n"
    (site / "toy_sensor-1.0.dist-info" / "METADATA").write_text(metadata)
    (site / "toy_sensor").mkdir()
    for path in source.glob("*.py"):
        (site / "toy_sensor" / path.name).write_text(path.read_text())


COMMANDS = """
import json, sys
from karmma_dist.cli import main
for words in json.loads(sys.argv[1]):
    code = main(words)
    if code:
        sys.exit(f"{words}: exit code {code}")
"""


def karmma(site: Path, *commands: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    """Run commands one after another, in one process that finds the package."""
    path = os.pathsep.join([str(site), str(Path.cwd()), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", COMMANDS, json.dumps(commands)], env={**os.environ, "PYTHONPATH": path},
        capture_output=True, text=True, timeout=HANGS_S,
    )  # fmt: skip


def test_what_another_package_adds_goes_all_the_way(place: Path) -> None:
    site, shards, run = place / "site", place / "shards", place / "runs" / "toys" / "baseline"
    done = karmma(
        site,
        ("shard", str(place / "toys.yaml")),
        ("verify", str(shards), "--full"),
        ("inspect", str(shards), "--sheet", str(place / "sheet.png")),
        ("train", str(place / "recipe.yaml")),
        ("eval", str(run), "--subsets", "--corrupt", "toy:weak:3"),
        ("profile", str(place / "recipe.yaml"), "--modalities", "T"),
    )
    assert done.returncode == 0, (done.stdout, done.stderr)
    rows = json.loads((run / "eval" / "results.json").read_text())["rows"]
    assert {tuple(row["modalities"]) for row in rows} == {("video",), ("toy",), ("video", "toy")}
    assert {row["corrupt"] for row in rows} == {None, "toy:weak:3"}
    assert all("action_top2" in row for row in rows)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["smoothing"] for line in lines if line["kind"] == "train"] == pytest.approx([0.2] * 2)
    tracked = list(csv.reader((run / "figures.csv").read_text().splitlines()))
    assert {(kind, int(step)) for kind, step, *_ in tracked} == {(line["kind"], line["step"]) for line in lines}
    assert list(run.glob("events.out.tfevents.*"))
    manifest = json.loads((shards / "manifest.json").read_text())
    assert manifest["modalities"] == ["video", "toy"]
    assert manifest["settings"]["toy"] == {"source": "auto"}


def test_a_missing_part_of_a_modality_is_named() -> None:
    for part, name in (
        ("storage", "storage_part"), ("decoder", "decoder_part"), ("tensors", "tensors_part"),
        ("drawing", "drawing_part"), ("breaker", "breaker_part"),
    ):  # fmt: skip
        lacking = replace(MODALITIES["video"], name=f"without_{part}", **{name: f"{__name__}:MISSING"})
        with pytest.raises(TypeError, match=rf"without_{part}.*'{part}'"):
            getattr(lacking, part)


def test_a_missing_method_of_a_part_is_named_when_loaded(tmp_path: Path) -> None:
    method = "check"
    source = tmp_path / "source"
    source.mkdir()
    for path in SOURCE.glob("*.py"):
        (source / path.name).write_text(path.read_text())
    before, after = (source / "modality.py").read_text().split("class ToyDecoder")
    after = after.replace(f"def {method}(", f"def {method}_renamed(", 1)
    (source / "modality.py").write_text(f"{before}class ToyDecoder{after}")
    install(tmp_path / "site", source)
    done = karmma(tmp_path / "site", ("recipe", "show", "demo/video"))
    assert "exit code 2" in done.stderr
    assert "Traceback" not in done.stderr
    assert "toy" in done.stderr
    assert method in done.stderr


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        ('{"num_readings": len(part)}', '{"num_readings": len(part) * 0.5}', "num_readings"),
        ('{"num_readings": len(part)}', '{}', "num_readings"),
        ('letter="T"', 'letter="t"', "letter"),
        ("(0.1, 0.3, 0.5, 0.7, 0.9)", "(0.1, 0.3)", "amounts"),
        ('    source: Literal["auto", "none"] = "auto"', "    rate: int = 50", "source"),
        ("    num_readings: int\n\n    @property", "    num_readings: list\n\n    @property", "num_readings"),
    ],
)
def test_a_mistake_of_a_modality_is_named_when_packing(
    place: Path, tmp_path: Path, before: str, after: str, says: str
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for path in SOURCE.glob("*.py"):
        (source / path.name).write_text(path.read_text())
    text = (source / "modality.py").read_text()
    assert before in text
    (source / "modality.py").write_text(text.replace(before, after, 1))
    install(tmp_path / "site", source)
    done = karmma(tmp_path / "site", ("shard", str(place / "toys.yaml"), "--out", str(tmp_path / "shards")))
    failures = tmp_path / "shards" / "failures.jsonl"
    told = done.stderr + (failures.read_text() if failures.is_file() else "")
    assert done.returncode
    assert "Traceback" not in done.stderr
    assert "toy" in told
    assert says in told
