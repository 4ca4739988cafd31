"""Diagnoses whether this machine is fit to pack and train. Every check has a time limit, never raises, says what to do.

Python's part is here: packages, devices, decoder, each tried in a process of its own; the rest is `machine.py`.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from karmma_dist.launching.doctor import machine
from karmma_dist.launching.doctor.check import Check, bounded
from karmma_dist.recipe import Recipe
from karmma_dist.terminal import print_table

LIMIT_S = 120.0
"""Importing torch and DeepSpeed from a cold network file system takes minutes rather than seconds."""


def diagnose(chain: Sequence[Recipe] = (), limit_s: float = LIMIT_S) -> list[Check]:
    """All checks of this machine, all at once.

    Args:
        chain: recipes to be trained here; their shards, run folders and needs are looked at too.
        limit_s: seconds that any check may take.
    """
    checks: dict[str, Callable[[], Iterable[Check]]] = {
        "python": check_python,
        "packages": lambda: check_packages(limit_s),
        "devices": lambda: check_devices(limit_s, chain),
        "decoder": lambda: check_decoder(limit_s),
        "compiler": machine.check_compiler,
        "Slurm": machine.check_slurm,
        "disk": lambda: machine.check_disk(chain),
        "shards": lambda: machine.check_shards(chain),
        "shared memory": lambda: [machine.check_shared_memory(chain)],
        "limits": machine.check_limits,
    }
    waits = [bounded(name, check, limit_s) for name, check in checks.items()]
    return [check for wait in waits for check in wait()]


def print_checks(checks: Sequence[Check]) -> None:
    """Print a table, and what to do below it, a line each."""
    advice = [f"{check.state}: {check.name}: {check.advice}" for check in checks if check.advice]
    rows = [[check.name, check.state, check.found] for check in checks]
    print_table(["check", "", "found"], rows, footer=advice)


def to_json(checks: Sequence[Check]) -> dict[str, Any]:
    """`{"ok": whether nothing must be fixed, "checks": [...]}`."""
    return {"ok": is_fit(checks), "checks": [asdict(check) for check in checks]}


def is_fit(checks: Iterable[Check]) -> bool:
    """Whether nothing must be fixed."""
    return all(check.state != "fix" for check in checks)


def exit_code(checks: Sequence[Check]) -> int:
    """Return 0: nothing must be fixed; 1: something must; 2: only the recipe, whose batch the GPUs do not divide."""
    broken = {check.name for check in checks if check.state == "fix"}
    return 0 if not broken else 2 if broken == {machine.BATCH} else 1


def run_probe(name: str, limit_s: float) -> tuple[list[dict[str, Any]], str | None]:
    """Run a probe of `probes.py`; returns what it found, and what ended it early, if anything did."""
    command = [sys.executable, "-m", "karmma_dist.launching.doctor.probes", name]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            out, err = process.communicate(timeout=limit_s)
            ended = None
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            ended = f"did not answer within {limit_s:.0f} s"
    if ended is None and process.returncode:
        last = next((line.strip() for line in reversed(err.splitlines()) if line.strip()), "no message")
        how = f"was killed by signal {-process.returncode}" if process.returncode < 0 else "failed"
        ended = f"{how} ({last[:300]})"
    return [json.loads(line) for line in out.splitlines() if line.endswith("}")], ended


def check_python() -> list[Check]:
    """The interpreter."""
    return [Check("python", "ok", f"{platform.python_version()}, {sys.executable}")]


def check_packages(limit_s: float) -> list[Check]:
    """Whether what this package needs is there, recent enough, and can be imported."""
    answers, ended = run_probe("packages", limit_s)
    done = [answer for answer in answers if "begun" not in answer]
    wrong = []
    for answer in done:
        name, version, required = answer["package"], answer["version"], answer["required"]
        if answer["error"]:
            wrong.append(Check(name, "fix", answer["error"], f"install it again: pip install --force-reinstall {name}"))
        elif required and _numbers(version) < _numbers(required):
            wrong.append(Check(name, "fix", f"{version} is older than {required}", f"pip install -U {name}"))
    if ended:
        culprit = answers[-1]["package"] if answers else "python"
        wrong.append(Check(culprit, "fix", f"its import {ended}", f"pip install --force-reinstall {culprit}"))
    good = [f"{answer['package']} {answer['version']}" for answer in done if not answer["error"]]
    return [Check("packages", "ok" if good else "fix", ", ".join(good) or "none can be imported"), *wrong]


def check_devices(limit_s: float, chain: Sequence[Recipe] = ()) -> list[Check]:
    """GPUs, or that there are none, and NCCL; and whether the GPUs divide the batches of a chain of recipes."""
    answers, ended = run_probe("devices", limit_s)
    if ended or not answers:
        return [Check("devices", "fix", f"looking for GPUs {ended}", "see nvidia-smi, and: python -c 'import torch'")]
    found = answers[0]
    driver = _driver()
    cores = f"CPU with {len(os.sched_getaffinity(0))} cores"
    if not found["gpus"]:
        if driver:
            advice = f"torch was built for CUDA {found['cuda']}: update the driver, or install a torch for it"
            return [Check("devices", "fix", f"driver {driver} is loaded, but torch sees no GPU", advice)]
        return [
            Check("devices", "note", cores, "no GPU here: demo and tests run, training the paper's models is slow"),
            Check("NCCL", "note", f"{found['nccl'] or 'none'}; ranks talk through gloo without GPUs"),
            *machine.check_batch(chain, 0),
        ]
    checks = []
    for number, gpu in enumerate(found["gpus"]):
        shown = f"{gpu['name']}, {gpu['memory_bytes'] / 2**30:.0f} GiB, capability {gpu['capability']}, driver {driver}"
        if gpu["error"]:
            checks.append(Check(f"GPU {number}", "fix", f"{shown}: {gpu['error']}", "see nvidia-smi"))
        else:
            checks.append(Check(f"GPU {number}", "ok", shown))
    nccl = Check("NCCL", "ok", found["nccl"]) if found["nccl"] else Check(
        "NCCL", "fix", "none in this torch", "install a torch built for CUDA: several GPUs need NCCL"
    )  # fmt: skip
    return [*checks, Check("CPU", "ok", cores), nccl, *machine.check_batch(chain, len(found["gpus"]))]


def check_decoder(limit_s: float) -> list[Check]:
    """Video and sound in the formats of shards, there and back."""
    answers, ended = run_probe("decoder", limit_s)
    advice = "install PyAV again from its wheel: pip install --force-reinstall --only-binary :all: av"
    if ended or not answers:
        return [Check("decoder", "fix", f"PyAV {ended or 'gave no answer'}", advice)]
    found = answers[0]
    wrong = [what for what in ("H.264", "FLAC") if not found[what]]
    if wrong:
        return [Check("decoder", "fix", f"{' and '.join(wrong)} come back other than they went in", advice)]
    return [Check("decoder", "ok", f"H.264 and FLAC, there and back (FFmpeg {found['ffmpeg']})")]


def _driver() -> str | None:
    """Version of NVIDIA's kernel driver; None where it is not loaded."""
    try:
        words = Path("/proc/driver/nvidia/version").read_text().split()
    except OSError:
        return None
    return next((word for word in words if word.count(".") >= 1 and word[0].isdigit()), "of unknown version")


def _numbers(version: str) -> tuple[int, ...]:
    """`2.15.0+cu132` -> (2, 15, 0)."""
    parts = version.partition("+")[0].split(".")
    return tuple(int(part) for part in parts if part.isdigit())
