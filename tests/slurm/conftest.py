"""The cluster of two nodes, started once per session, and a user's folder on it."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import slurm_cluster
from slurm_cluster import Cluster

ROOT = Path(__file__).resolve().parents[2]

_PROGRAM = """\
#!{python}
# karmma-dist as installed, but training appends the keys of every forward pass to a file of this rank and start.
import json, os, sys
from karmma_dist.cli import main

if "KEYS_FOLDER" in os.environ and sys.argv[1] == "train":
    from karmma_dist.training import trainer

    name = "-".join(os.environ.get(part, "0") for part in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_PROCID"))
    prepare = trainer.prepare

    def prepare_and_record(raw, *arguments):
        with open(os.path.join(os.environ["KEYS_FOLDER"], name), "a") as file:
            file.write(json.dumps(raw.keys) + "\\n")
        return prepare(raw, *arguments)

    trainer.prepare = prepare_and_record
sys.exit(main())
"""

_DATA = {"modalities": ["video", "flow", "audio"], "num_workers": 0}
_INPUTS = {
    "video": {"num_frames": 4, "short_side": 32, "crop": 32},
    "audio": {"num_windows": 1, "window_s": 1.0, "num_mels": 16},
}
_SIZES = {"width": 16, "num_heads": 2, "feedforward": 16, "fc_width": 16}
_ENCODERS = {"video": "small_video", "flow": "small_video", "audio": "small_audio"}
_OPTIMIZER = {"warmup_epochs": 0, "lr": 0.01, "clip": 1.0}
_TRAINING = {"batch_size": 6, "log_every_steps": 1, "validate_every_epochs": 0, "threads": 1}
EPOCHS, EPOCHS_PER_CHECKPOINT = 20, 4
_SLURM = {"nodes": 2, "gpus_per_node": 0, "cpus_per_task": 1}


def _recipe(frozen: bool) -> dict[str, object]:
    encoders = {m: {"name": name, "frozen": frozen, "options": {"width": 4}} for m, name in _ENCODERS.items()}
    return {
        "seed": 5, "data": dict(_DATA), "inputs": _INPUTS, "model": {"encoders": encoders, **_SIZES},
        "optimizer": _OPTIMIZER, "slurm": _SLURM,
    }  # fmt: skip


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The cluster with `karmma-dist` on its PATH. Its jobs see no GPU: two nodes on one machine would share it."""
    reason = slurm_cluster.missing()
    if reason is not None:
        if os.environ.get(slurm_cluster.REQUIRE) == "1":
            pytest.fail(f"{slurm_cluster.REQUIRE}=1, but {reason}")
        pytest.skip(reason)
    started = Cluster(tmp_path_factory.mktemp("cluster"))
    program = started.folder / "bin" / "karmma-dist"
    program.parent.mkdir()
    program.write_text(_PROGRAM.format(python=sys.executable))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    started.environment |= {
        "PATH": f"{program.parent}:{started.environment['PATH']}", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "",
        "KARMMA_DIST_PREFLIGHT": "0",  # it takes as long as these trainings; the chain of two jobs has it
    }  # fmt: skip
    try:
        started.start()
        yield started
    finally:
        started.stop()


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    """A user's folder with a teacher's recipe, and a student's of 100 steps of six clips."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "keys").mkdir()
    teacher = _recipe(frozen=True) | {"name": "teacher", "stage": "teacher", "training": {**_TRAINING, "epochs": 1}}
    student = _recipe(frozen=False) | {
        "name": "student", "stage": "distill", "after": ["teacher.yaml"], "distill": {"teacher": "teacher"},
        "training": {**_TRAINING, "epochs": EPOCHS, "checkpoint_every_epochs": EPOCHS_PER_CHECKPOINT},
    }  # fmt: skip
    for recipe in (teacher, student):
        recipe["data"]["shards"] = str(shards)  # type: ignore[index]
    student["data"]["modality_dropout"] = {"probability": 0.5}  # type: ignore[index]
    for recipe in (teacher, student):
        (folder / f"{recipe['name']}.yaml").write_text(yaml.safe_dump(recipe))
    return folder
