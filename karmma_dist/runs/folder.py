"""Files of a run's folder: its state, its best weights, where it stands."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from karmma_dist.io.files import write_json
from karmma_dist.io.json_fields import JsonObject
from karmma_dist.recipe import Recipe
from karmma_dist.runs.process import whereabouts

STATE = "state.json"
"""File name of a run's state."""
BEST = "best"
"""Folder, in a run's, of the weights that did best in validation."""
ENSEMBLE = "ensemble.json"
"""File of a distillation from several experts: their losses and weights, decided when it began."""

_TAIL_BYTES = 16_384


def step_of(line: str) -> int:
    """Return the step of a metrics line; a line cut by a crash counts as later than any."""
    try:
        return JsonObject.parse(line).whole("step")
    except ValueError:
        return 2**62


def write_state(run_dir: Path, state: str, **values: Any) -> None:
    """Write state.json: a state, the time, who wrote it and what else is known.

    `running`, `finished`, `failed`; saved and ended early: `preempted`, `interrupted`, `stopped`; in best/: `best`.
    """
    write_json(run_dir / STATE, {"state": state, "time": time.time(), **whereabouts(), **values})


def run_places(run: Path) -> tuple[Path, Path]:
    """Return the folder of the weights, and that of the run: the one above where these are its best."""
    folder = run if run.is_dir() else run.parent
    return folder, folder.resolve().parent if folder.resolve().name == BEST else folder


def read_state(run_dir: Path) -> dict[str, Any]:
    """state.json of a run folder, or an empty dictionary where there is none."""
    try:
        state: dict[str, Any] = json.loads((run_dir / STATE).read_text())
    except (OSError, ValueError):
        return {}
    return state


def epoch_under_way(run_dir: Path) -> int:
    """Return the epoch, counted from 0, that the last line of metrics.jsonl is of; 0 where there is none."""
    try:
        with open(run_dir / "metrics.jsonl", "rb") as file:
            file.seek(max(0, file.seek(0, 2) - _TAIL_BYTES))
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return 0
    whole = lines[-2] if len(lines) > 1 else b""  # what follows the last newline is being written
    return int(json.loads(whole)["epoch"]) if whole.startswith(b"{") else 0


def finished_names(chain: Iterable[Recipe]) -> set[str]:
    """Return the names of those recipes of a chain whose runs are finished: they are not trained again."""
    return {recipe.name for recipe in chain if read_state(recipe.run_dir).get("state") == "finished"}


def validation_at(run_dir: Path, step: int) -> dict[str, float] | None:
    """The validation that metrics.jsonl holds for an optimizer step, or None."""
    path = run_dir / "metrics.jsonl"
    found = None
    for line in path.read_text().splitlines() if path.exists() else []:
        if step_of(line) == step and json.loads(line)["kind"] == "validation":
            found = {name: v for name, v in json.loads(line).items() if name not in ("kind", "step", "epoch")}
    return found
