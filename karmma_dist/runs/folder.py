"""Files of a run's folder: its state, its best weights, its metrics."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from karmma_dist.io.disk_errors import DiskError
from karmma_dist.io.files import write_json
from karmma_dist.io.json_fields import JsonObject
from karmma_dist.recipe import Recipe
from karmma_dist.runs.process import process_info

STATE = "state.json"
"""File name of a run's state."""
BEST = "best"
"""Name of the subfolder of the weights with the best validation metric."""
ENSEMBLE = "ensemble.json"
"""File name of the losses and weights of several experts, computed when their distillation began."""

_TAIL_BYTES = 16_384


def step_of(line: str) -> int:
    """Return the step of a metrics line; a line cut by a crash counts as later than any step."""
    try:
        return JsonObject.parse(line).whole("step")
    except ValueError:
        return 2**62


def write_state(run_dir: Path, state: str, **values: Any) -> None:
    """Write state.json: the state, the time, the process that writes it, and `values`.

    Args:
        run_dir: Folder of the run, or its best/.
        state: `running`, `finished` or `failed`; `preempted`, `interrupted` or `stopped` for a run that ended early
            after saving; `best` in best/.
        values: Further fields.

    Raises:
        DiskError: the disk is full or fails; not for a run that failed, whose own reason matters more.
    """
    try:
        write_json(run_dir / STATE, {"state": state, "time": time.time(), **process_info(), **values})
    except DiskError:
        if state not in ("failed", "interrupted"):
            raise


def run_places(run: Path) -> tuple[Path, Path]:
    """Return the folder of the weights and the folder of their run, which is its parent for weights in best/."""
    folder = run if run.is_dir() else run.parent
    return folder, folder.resolve().parent if folder.resolve().name == BEST else folder


def read_state(run_dir: Path) -> dict[str, Any]:
    """Return state.json of a run folder; empty if the file is missing or cannot be read."""
    try:
        state: dict[str, Any] = json.loads((run_dir / STATE).read_text())
    except (OSError, ValueError):
        return {}
    return state


def epoch_under_way(run_dir: Path) -> int:
    """Return the 0-based epoch of the last line of metrics.jsonl; 0 if the file has no line yet."""
    try:
        with open(run_dir / "metrics.jsonl", "rb") as file:
            file.seek(max(0, file.seek(0, 2) - _TAIL_BYTES))
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return 0
    last = lines[-2] if len(lines) > 1 else b""  # the text after the last newline is still being written
    return int(json.loads(last)["epoch"]) if last.startswith(b"{") else 0


def finished_names(chain: Iterable[Recipe]) -> set[str]:
    """Return the names of a chain's recipes whose runs are finished and will not be trained again."""
    return {recipe.name for recipe in chain if read_state(recipe.run_dir).get("state") == "finished"}


def validation_at(run_dir: Path, step: int) -> dict[str, float] | None:
    """Return the validation metrics in metrics.jsonl after an optimizer step, or None."""
    path = run_dir / "metrics.jsonl"
    metrics = None
    for line in path.read_text().splitlines() if path.exists() else []:
        if step_of(line) == step and json.loads(line)["kind"] == "validation":
            metrics = {name: v for name, v in json.loads(line).items() if name not in ("kind", "step", "epoch")}
    return metrics
