"""`doctor` finds what is broken, says what to do, and always ends within its time limit."""

from __future__ import annotations

import json
import os
import shutil
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from karmma_dist.cli import main
from karmma_dist.distributed.world import free_port
from karmma_dist.launching.doctor import doctor, machine, probes
from karmma_dist.launching.doctor.check import Check, bounded
from karmma_dist.recipe import Recipe
from kits.mixtures import mixture_recipe

LIMIT_S = 120.0


def recipe(shards: str, runs: Path, **training: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "student", "runs_dir": str(runs), "stage": "supervised",
            "data": {"shards": shards, "modalities": ["video", "audio"], "num_workers": 2},
            "model": {"encoders": {"video": {"name": "small_video"}, "audio": {"name": "small_audio"}}},
            "training": {"batch_size": 8, **training}, "slurm": {"nodes": 2},
        }
    )  # fmt: skip


def fake_commands(folder: Path, monkeypatch: pytest.MonkeyPatch, **scripts: str) -> None:
    """Put commands first on PATH."""
    for name, script in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def fake_probes(monkeypatch: pytest.MonkeyPatch, results: list[dict[str, Any]], ended: str | None = None) -> None:
    """Replace the results of all probes."""
    monkeypatch.setattr(doctor, "run_probe", lambda *_: (results, ended))


def test_this_machine_can_import_and_decode() -> None:
    """Run the real probes, in real processes."""
    assert [check.state for check in doctor.check_decoder(LIMIT_S)] == ["ok"]
    (packages,) = doctor.check_packages(LIMIT_S)
    assert packages.state == "ok"
    assert "torch " in packages.found
    assert "deepspeed " in packages.found
    devices = doctor.check_devices(LIMIT_S)
    assert all(check.found for check in devices)


def test_check_that_raises_must_be_fixed() -> None:
    def broken() -> list[Check]:
        raise OSError("stale\nfile handle")

    (check,) = bounded("disk", broken, LIMIT_S)()
    assert check.state == "fix"
    assert "OSError: stale file handle" in check.found


def test_check_that_hangs_must_be_fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("karmma_dist.launching.doctor.check._PROBE_GRACE_S", 0.0)
    release = threading.Event()
    try:
        (check,) = bounded("disk", lambda: [Check("disk", "ok", str(release.wait(100)))], 0.1)()
    finally:
        release.set()
    assert (check.name, check.state) == ("disk", "fix")
    assert "did not answer" in check.found


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ('echo \'{"package": "torch", "begun": true}\'; kill -SEGV $$', "was killed by signal 11"),
        ("echo 'No module named karmma_dist' >&2; exit 1", "failed (No module named karmma_dist)"),
    ],
)
def test_crashed_packages_probe_must_be_fixed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, expected: str
) -> None:
    fake_commands(tmp_path, monkeypatch, python=script)
    monkeypatch.setattr(doctor.sys, "executable", str(tmp_path / "python"))
    *_, check = doctor.check_packages(LIMIT_S)
    assert check.state == "fix"
    assert expected in check.found


@pytest.mark.parametrize("check", [doctor.check_devices, doctor.check_decoder])
def test_crashed_driver_or_decoder_must_be_fixed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, check: Callable[[float], list[Check]]
) -> None:
    fake_commands(tmp_path, monkeypatch, python="kill -SEGV $$")
    monkeypatch.setattr(doctor.sys, "executable", str(tmp_path / "python"))
    (result,) = check(LIMIT_S)
    assert result.state == "fix"
    assert "killed by signal 11" in result.found
    assert result.advice


def test_probe_that_hangs_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_commands(tmp_path, monkeypatch, python="exec sleep 100")
    monkeypatch.setattr(doctor.sys, "executable", str(tmp_path / "python"))
    assert doctor.run_probe("decoder", 0.2) == ([], "did not answer within 0 s")


def test_package_that_cannot_be_imported_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    good = {"package": "numpy", "version": "2.4.6", "required": "1.26", "error": None}
    bad = {"package": "torch", "version": "2.15.0", "required": "2.6", "error": "ImportError: libcudart.so.13"}
    fake_probes(monkeypatch, [good, bad])
    assert [(check.name, check.state) for check in doctor.check_packages(1)] == [("packages", "ok"), ("torch", "fix")]


@pytest.mark.parametrize(("version", "state"), [("2.5.1+cu121", "fix"), ("2.6.0", "ok"), ("2.15.0+cu132", "ok")])
def test_versions_are_compared_as_numbers(monkeypatch: pytest.MonkeyPatch, version: str, state: str) -> None:
    fake_probes(monkeypatch, [{"package": "torch", "version": version, "required": "2.6", "error": None}])
    assert doctor.check_packages(1)[-1].state == state


def test_required_versions_are_those_of_this_package() -> None:
    assert set(probes._required()) >= {"torch", "deepspeed", "timm", "webdataset", "av"}


GPU = {"name": "H200", "memory_bytes": 139 * 2**30, "capability": "9.0", "error": None}


def test_gpus_are_described(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_probes(monkeypatch, [{"cuda": "13.2", "gpus": [GPU, GPU], "nccl": "2.30.7", "available": True}])
    monkeypatch.setattr(doctor, "_driver", lambda: "595.10")
    checks = doctor.check_devices(1)
    assert [check.name for check in checks] == ["GPU 0", "GPU 1", "CPU", "NCCL"]
    assert checks[0].found == "H200, 139 GiB, capability 9.0, driver 595.10"
    assert doctor.is_fit(checks)


def test_failing_gpu_must_be_fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = {**GPU, "error": "CUDA error: uncorrectable ECC error"}
    fake_probes(monkeypatch, [{"cuda": "13.2", "gpus": [GPU, broken], "nccl": "2.30.7", "available": True}])
    assert [check.state for check in doctor.check_devices(1)] == ["ok", "fix", "ok", "ok"]


def test_driver_whose_gpu_torch_does_not_see_must_be_fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_probes(monkeypatch, [{"cuda": "13.2", "gpus": [], "nccl": "2.30.7", "available": False}])
    monkeypatch.setattr(doctor, "_driver", lambda: "470.1")
    (check,) = doctor.check_devices(1)
    assert check.state == "fix"
    assert "update the driver" in check.advice
    monkeypatch.setattr(doctor, "_driver", lambda: None)
    assert [check.state for check in doctor.check_devices(1)] == ["note", "note"]


def test_decoder_that_changes_audio_must_be_fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_probes(monkeypatch, [{"ffmpeg": "8", "H.264": True, "FLAC": False, "frames": 10}])
    (check,) = doctor.check_decoder(1)
    assert check.state == "fix"
    assert "FLAC" in check.found
    assert "H.264" not in check.found


def test_slurm_with_a_responding_controller_is_ok(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_commands(
        tmp_path, monkeypatch, sbatch="echo slurm-wlm 22.05.8", srun="", squeue="", sinfo="echo 'gpu* 2 idle'",
        scontrol="echo 'Slurmctld(primary) at localhost is UP'",
    )  # fmt: skip
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    (check,) = machine.check_slurm()
    assert check == Check("Slurm", "ok", "slurm-wlm 22.05.8, gpu* 2 idle, inside job 41")


@pytest.mark.parametrize(
    ("ping", "state", "expected"),
    [
        ("echo 'Slurmctld(primary) at head is DOWN'; exit 1", "fix", "head is DOWN"),
        ("echo 'scontrol: fatal: Could not establish a configuration source' >&2; exit 1", "note", "cluster"),
    ],
)
def test_slurm_without_a_responding_controller_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ping: str, state: str, expected: str
) -> None:
    fake_commands(tmp_path, monkeypatch, sbatch="echo slurm 22", srun="", squeue="", scontrol=ping)
    (check,) = machine.check_slurm()
    assert check.state == state
    assert expected in check.found
    assert check.advice


def test_missing_slurm_is_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    (check,) = machine.check_slurm()
    assert check.state == "note"


def test_missing_compiler_is_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.check_compiler()[0].state == "note"
    monkeypatch.setenv("CXX", "no-such-compiler")
    (check,) = machine.check_compiler()
    assert check.state == "note"
    assert "no-such-compiler" in check.found


def test_missing_python_headers_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_commands(tmp_path, monkeypatch, cc1="echo 'probe.cpp:1: fatal error: Python.h: No such file' >&2; exit 1")
    monkeypatch.setenv("CXX", str(tmp_path / "cc1"))
    assert "python3-dev" in machine.check_compiler()[0].advice


def test_free_space_is_read_from_the_nearest_existing_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def usage(path: Path) -> SimpleNamespace:
        asked.append(path)
        return SimpleNamespace(free=5e8)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    check = machine.check_room("runs", tmp_path / "a" / "b")
    assert asked == [tmp_path]
    assert check.state == "fix"
    assert "0.5 GB free" in check.found
    assert list(tmp_path.iterdir()) == []


def test_folder_below_a_file_is_not_writable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert machine.check_room("runs", tmp_path / "file" / "runs").state == "fix"


def test_shards_of_recipes_are_checked(shards: Path, tmp_path: Path) -> None:
    good, bad = recipe(str(shards), tmp_path), recipe(str(tmp_path / "none"), tmp_path)
    remote = recipe("https://user:secret@data.example.org/kitchen", tmp_path)
    checks = machine.check_shards([good, good, bad, remote])
    assert [check.state for check in checks] == ["ok", "fix", "ok"]
    assert "train 30" in checks[0].found
    assert "secret" not in checks[2].found


def test_shards_of_every_dataset_of_a_mixture_are_checked(shards: Path, actions: Path, tmp_path: Path) -> None:
    places = {"a": actions, "b": tmp_path / "none", "c": shards}
    mixed = mixture_recipe(tmp_path, {name: {"shards": str(place), "weight": 1} for name, place in places.items()})
    checks = machine.check_shards([mixed, recipe(str(shards), tmp_path)])
    assert [check.state for check in checks] == ["ok", "fix", "ok"]


def test_shared_memory_is_the_size_of_decoded_batches(tmp_path: Path) -> None:
    two_nodes = recipe("x", tmp_path)
    video, audio = 3 * 32 * 224 * 224, 2 * 32 * round(1.116 * 16_000)
    assert machine.clip_bytes(two_nodes.inputs, two_nodes.data.modalities) == video + audio
    # 8 clips over 2 nodes, 2 workers, 3 batches ahead
    assert machine.shared_memory_bytes(two_nodes) == 4 * (video + audio) * 2 * 3
    assert machine.shared_memory_bytes(recipe("x", tmp_path, accumulation=2)) == 2 * (video + audio) * 2 * 3


def test_clip_bytes_match_a_decoded_batch(shards: Path) -> None:
    from karmma_dist.streaming.loader import TrainingClips, open_shards, training_batches
    from karmma_dist.streaming.order import Position, Schedule

    small = {"num_frames": 4, "short_side": 32, "crop": 32, "jitter": 0}
    made = Recipe.model_validate(
        {
            "name": "x", "stage": "supervised",
            "data": {"shards": str(shards), "modalities": ["video", "flow", "audio"], "num_workers": 0},
            "inputs": {"video": small, "audio": {"num_windows": 2, "window_s": 0.5}},
            "model": {"encoders": {name: {"name": "small_video"} for name in ("video", "flow", "audio")}},
        }
    )  # fmt: skip
    clips = TrainingClips(open_shards(made.data), made.data, made.inputs, 0, 6)
    batches = training_batches(clips, Schedule(len(clips.clips), 6, 1, 1), 0, Position(0, 0), 1)
    with batches:
        batch = next(batches)
    num_bytes = {name: tensor[0].numel() * tensor.element_size() for name, tensor in batch.inputs.items()}
    assert num_bytes == {name: machine.clip_bytes(made.inputs, [name]) for name in num_bytes}
    assert num_bytes


def test_too_little_shared_memory_must_be_fixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room = SimpleNamespace(f_bavail=64, f_frsize=2**20)  # docker's default
    monkeypatch.setattr(os, "statvfs", lambda _: room)
    assert machine.check_shared_memory([], tmp_path).state == "fix"
    check = machine.check_shared_memory([recipe("x", tmp_path)], tmp_path)
    assert check.state == "fix"
    assert "--shm-size" in check.advice
    assert machine.check_shared_memory([], tmp_path / "none").state == "fix"


@pytest.mark.parametrize(("soft", "state"), [(256, "fix"), (1024, "note"), (65536, "ok"), (-1, "ok")])
def test_limit_of_open_files_is_checked(monkeypatch: pytest.MonkeyPatch, soft: int, state: str) -> None:
    monkeypatch.setattr(machine.resource, "getrlimit", lambda _: (soft, 1048576))
    check = machine.check_limits()[0]
    assert check.state == state
    assert ("ulimit -n 65536" in check.advice) == (state != "ok")


@pytest.mark.parametrize(("state", "code"), [("ok", 0), ("note", 0), ("fix", 1)])
def test_exit_code_is_1_if_something_must_be_fixed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], state: Any, code: int
) -> None:
    monkeypatch.setattr(doctor, "diagnose", lambda *_: [Check("disk", state, "full", "free some")])
    assert main(["doctor", "--json"]) == code
    assert json.loads(capsys.readouterr().out) == {
        "ok": code == 0, "checks": [{"name": "disk", "state": state, "found": "full", "advice": "free some"}]
    }  # fmt: skip
    assert main(["doctor"]) == code
    assert f"{state}: disk: free some" in capsys.readouterr().out


def test_advice_is_printed_on_one_line_verbatim(capsys: pytest.CaptureFixture[str]) -> None:
    advice = "pip install 'karmma-dist[s3]' " + "x" * 100
    doctor.print_checks([Check("disk", "fix", "[bold]", advice)])
    shown = capsys.readouterr().out
    assert f"fix: disk: {advice}" in shown.splitlines()
    assert "[bold]" in shown


def test_overrides_without_a_recipe_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--set", "seed=1"]) == 2
    assert "name one" in capsys.readouterr().err


def test_a_tmpdir_too_long_for_sockets_must_be_fixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / ("a" * (140 - len(str(tmp_path)) - 1))
    folder.mkdir()
    monkeypatch.setattr(machine.tempfile, "tempdir", str(folder))
    room, path = machine.check_temporary_files()
    assert room.state == "ok"
    assert path.state == "fix"
    assert "has 140 bytes" in path.found
    assert "TMPDIR" in path.advice
    alone = recipe("x", tmp_path)
    assert len(machine.check_temporary_files([alone])) == 2
    alone.data.num_workers = 0
    assert len(machine.check_temporary_files([alone])) == 1


def test_a_tmpdir_that_does_not_exist_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "none"))
    monkeypatch.setattr(machine.tempfile, "tempdir", None)
    check = machine.check_temporary_files()[-1]
    assert check.state == "note"
    assert str(tmp_path / "none") in check.found


def test_no_folder_for_temporary_files_must_be_fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(machine.tempfile, "gettempdir", refuse)
    (check,) = machine.check_temporary_files()
    assert check.state == "fix"
    assert "No usable temporary directory" in check.found


TORCHRUN = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}


def test_the_place_where_ranks_meet_is_checked() -> None:
    free = str(free_port())
    assert machine.check_rendezvous({}) == []
    assert machine.check_rendezvous({**TORCHRUN, "MASTER_PORT": free})[0].state == "ok"
    assert machine.check_rendezvous({**TORCHRUN, "MASTER_PORT": free, "WORLD_SIZE": "1"})[0].state == "ok"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        (check,) = machine.check_rendezvous({**TORCHRUN, "MASTER_PORT": port})
        assert "another program has this port" in check.advice
        assert machine.check_rendezvous({**TORCHRUN, "MASTER_PORT": port, "RANK": "1"})[0].state == "ok"


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        ({"MASTER_ADDR": "no-such-host.invalid"}, "does not resolve"),
        ({"MASTER_ADDR": "n 1"}, "MASTER_ADDR"),
        ({"MASTER_PORT": "70000"}, "1 to 65535"),
        ({"RANK": "2"}, "0 to 1"),
    ],
)
def test_variables_with_which_ranks_cannot_meet_must_be_fixed(changes: dict[str, str], advice: str) -> None:
    (check,) = machine.check_rendezvous({**TORCHRUN, "MASTER_PORT": str(free_port()), **changes})
    assert check.state == "fix"
    assert advice in check.advice
