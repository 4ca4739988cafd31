"""Diagnoses whether this machine can pack and train. Every check has a time limit, never raises, and says what to do.

This file checks the Python side: packages, devices and decoder, each in a separate process. `machine.py` has the rest.
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
"""Default time limit: importing torch and DeepSpeed from a cold network file system can take minutes."""


def diagnose(chain: Sequence[Recipe] = (), limit_s: float = LIMIT_S) -> list[Check]:
    """Run all checks of this machine concurrently.

    Args:
        chain: recipes to be trained here; their shards, run folders and needs are checked too.
        limit_s: time limit of each check in seconds.
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
        "rendezvous": machine.check_rendezvous,
    }
    waits = [bounded(name, check, limit_s) for name, check in checks.items()]
    return [check for wait in waits for check in wait()]


def print_checks(checks: Sequence[Check]) -> None:
    """Print a table of the checks, and below it one line of advice per check."""
    advice = [f"{check.state}: {check.name}: {check.advice}" for check in checks if check.advice]
    rows = [[check.name, check.state, check.found] for check in checks]
    print_table(["check", "", "found"], rows, footer=advice)


def to_json(checks: Sequence[Check]) -> dict[str, Any]:
    """Return `{"ok": true if nothing must be fixed, "checks": [...]}`."""
    return {"ok": is_fit(checks), "checks": [asdict(check) for check in checks]}


def is_fit(checks: Iterable[Check]) -> bool:
    """Return True if nothing must be fixed."""
    return all(check.state != "fix" for check in checks)


def exit_code(checks: Sequence[Check]) -> int:
    """Return 0 if nothing must be fixed, 2 if only the recipe's batch must be (the GPUs do not divide it), else 1."""
    broken = {check.name for check in checks if check.state == "fix"}
    return 0 if not broken else 2 if broken == {machine.BATCH} else 1


def run_probe(name: str, limit_s: float) -> tuple[list[dict[str, Any]], str | None]:
    """Run a probe of `probes.py` in a process; return its results, and why it ended early (None if it did not)."""
    command = [sys.executable, "-m", "karmma_dist.launching.doctor.probes", name]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", errors="replace"
    ) as process:
        try:
            out, err = process.communicate(timeout=limit_s)
            ended = None
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            ended = f"did not answer within {limit_s:.0f} s"
    if ended is None and process.returncode:
        last = next((line.strip() for line in reversed(err.splitlines()) if line.strip()), "no message")
        failure = f"was killed by signal {-process.returncode}" if process.returncode < 0 else "failed"
        ended = f"{failure} ({last[:300]})"
    return [json.loads(line) for line in out.splitlines() if line.endswith("}")], ended


def check_python() -> list[Check]:
    """Report the Python interpreter."""
    return [Check("python", "ok", f"{platform.python_version()}, {sys.executable}")]


def check_packages(limit_s: float) -> list[Check]:
    """Check that required packages are installed, recent enough, and can be imported."""
    results, ended = run_probe("packages", limit_s)
    done = [result for result in results if "begun" not in result]
    wrong = []
    for result in done:
        name, version, required = result["package"], result["version"], result["required"]
        if result["error"]:
            wrong.append(Check(name, "fix", result["error"], f"reinstall it: pip install --force-reinstall {name}"))
        elif required and _numbers(version) < _numbers(required):
            wrong.append(Check(name, "fix", f"{version} is older than {required}", f"pip install -U {name}"))
    if ended:
        culprit = results[-1]["package"] if results else "python"
        wrong.append(Check(culprit, "fix", f"its import {ended}", f"pip install --force-reinstall {culprit}"))
    good = [f"{result['package']} {result['version']}" for result in done if not result["error"]]
    return [Check("packages", "ok" if good else "fix", ", ".join(good) or "none can be imported"), *wrong]


def check_devices(limit_s: float, chain: Sequence[Recipe] = ()) -> list[Check]:
    """Check the GPUs, if any, NCCL, and that the GPUs divide the batches of a chain of recipes."""
    results, ended = run_probe("devices", limit_s)
    if ended or not results:
        return [Check("devices", "fix", f"looking for GPUs {ended}", "see nvidia-smi, and: python -c 'import torch'")]
    probed = results[0]
    driver = _driver()
    cores = f"CPU with {len(os.sched_getaffinity(0))} cores"
    if not probed["gpus"]:
        if driver:
            advice = f"torch was built for CUDA {probed['cuda']}: update the driver, or install a torch built for it"
            return [Check("devices", "fix", f"driver {driver} is loaded, but torch sees no GPU", advice)]
        return [
            Check("devices", "note", cores, "no GPU: demo and tests work, but training the paper's models is slow"),
            Check("NCCL", "note", f"{probed['nccl'] or 'none'}; without GPUs, ranks communicate through gloo"),
            *machine.check_batch(chain, 0),
        ]
    checks = []
    for number, gpu in enumerate(probed["gpus"]):
        shown = f"{gpu['name']}, {gpu['memory_bytes'] / 2**30:.0f} GiB, capability {gpu['capability']}, driver {driver}"
        if gpu["error"]:
            checks.append(Check(f"GPU {number}", "fix", f"{shown}: {gpu['error']}", "see nvidia-smi"))
        else:
            checks.append(Check(f"GPU {number}", "ok", shown))
    nccl = Check("NCCL", "ok", probed["nccl"]) if probed["nccl"] else Check(
        "NCCL", "fix", "missing in this torch", "install a torch built for CUDA: training on several GPUs needs NCCL"
    )  # fmt: skip
    return [*checks, Check("CPU", "ok", cores), nccl, *machine.check_batch(chain, len(probed["gpus"]))]


def check_decoder(limit_s: float) -> list[Check]:
    """Check that video and audio survive encoding and decoding in the formats of shards."""
    results, ended = run_probe("decoder", limit_s)
    advice = "reinstall PyAV from its wheel: pip install --force-reinstall --only-binary :all: av"
    if ended or not results:
        return [Check("decoder", "fix", f"PyAV {ended or 'gave no result'}", advice)]
    probed = results[0]
    wrong = [codec for codec in ("H.264", "FLAC") if not probed[codec]]
    if wrong:
        return [Check("decoder", "fix", f"{' and '.join(wrong)}: the decoded data differ from the original", advice)]
    return [Check("decoder", "ok", f"H.264 and FLAC encode and decode (FFmpeg {probed['ffmpeg']})")]


def _driver() -> str | None:
    """Return the version of NVIDIA's kernel driver, or None if it is not loaded."""
    try:
        words = Path("/proc/driver/nvidia/version").read_text("utf-8").split()
    except OSError:
        return None
    return next((word for word in words if word.count(".") >= 1 and word[0].isdigit()), "of unknown version")


def _numbers(version: str) -> tuple[int, ...]:
    """Parse a version: `2.15.0+cu132` -> (2, 15, 0)."""
    parts = version.partition("+")[0].split(".")
    return tuple(int(part) for part in parts if part.isdigit())
