"""Files of a run's folder: its state, its best weights, its metrics."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from karmma_dist.errors import UserError
from karmma_dist.io.disk_errors import DiskError
from karmma_dist.io.files import read_file, write_json
from karmma_dist.io.json_fields import JsonObject, parse_strictly, read_json
from karmma_dist.recipe import Recipe
from karmma_dist.runs.process import process_info

STATE = "state.json"
"""File name of a run's state."""
BEST = "best"
"""Name of the subfolder of the weights with the best validation metric."""
METRICS = "metrics.jsonl"
"""File name of a run's metrics, a line per logged step and per validation."""
ENSEMBLE = "ensemble.json"
"""File name of the losses and weights of several experts, computed when their distillation began."""
TRACKED = "tracked.json"
"""File name of the identifiers under which trackers know a run."""

_NO_RUNS = {"checkpoints", "eval", BEST, "trace", "trackio", "wandb"}
"""Subfolders of a run that never hold another run."""
_TAIL_BYTES = 16_384
_STATE_BYTES = 16 << 20
"""Bytes that a state.json may have."""
_METRICS_BYTES = 1 << 30
"""Bytes that a metrics.jsonl may have."""
_FIELDS = {
    "time": "number", "host": "text", "pid": "whole", "ranks": "whole", "machine": "text", "started": "whole",
    "job_id": "text", "nodes": "whole", "why": "text", "error": "text", "reason": "text", "rank": "whole",
    "step": "whole", "epoch": "whole", "metric": "text", "value": "number", "metrics": "nested", "best": "nested",
    "checkpoint_s": "number",
}  # fmt: skip
"""Fields of a state.json that may be missing or null, and the type of each, a method of `JsonObject`."""


@dataclass(frozen=True)
class MetricsLine:
    """A line of metrics.jsonl."""

    kind: str
    """`train`, `validation`, or the kind of another event."""
    step: int
    """Optimizer steps done."""
    epoch: int
    """0-based epoch."""
    values: dict[str, Any]
    """The other fields; None for a number that is not finite."""

    @classmethod
    def parse(cls, line: bytes | str) -> MetricsLine:
        """Parse a line.

        Raises:
            ValueError: it is no line of metrics: cut by a crash, or damaged.
        """
        fields = JsonObject(parse_strictly(line, with_gaps=True))
        values = fields.others("kind", "step", "epoch")
        return cls(fields.text("kind"), fields.whole("step"), fields.whole("epoch"), values)

    def number(self, name: str) -> float | None:
        """Return a measured value, or None if it is missing or was not finite.

        Raises:
            ValueError: it is no number.
        """
        return None if self.values.get(name) is None else JsonObject(self.values).number(name)

    def numbers(self) -> dict[str, float]:
        """Return all values, which must be numbers; NaN for those that were not finite.

        Raises:
            ValueError: one is no number.
        """
        return _numbers(JsonObject(self.values))


def metrics_lines(run_dir: Path) -> list[bytes]:
    """Return the lines of metrics.jsonl, the last of which may be cut; none if the file does not exist.

    Raises:
        OSError: the file cannot be read, is no regular file or too large.
    """
    try:
        return read_file(run_dir / METRICS, _METRICS_BYTES).split(b"\n")
    except FileNotFoundError:
        return []


def step_of(line: bytes | str) -> int:
    """Return the step of a metrics line; a line cut by a crash counts as later than any step."""
    try:
        return MetricsLine.parse(line).step
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


def run_folders(folder: Path) -> Iterator[tuple[Path, OSError | None]]:
    """Yield every run folder in and below `folder`, and every folder there that cannot be listed, with the cause."""
    refused: list[OSError] = []
    for parent, folders, files in os.walk(folder, onerror=refused.append):
        if {STATE, "recipe.yaml"} & {*files, *folders}:
            yield Path(parent), None
            folders[:] = [name for name in folders if name not in _NO_RUNS]
        folders[:] = sorted(name for name in folders if not name.startswith("."))
    for error in refused:
        yield Path(error.filename), error


def read_state(run_dir: Path) -> dict[str, Any]:
    """Return state.json of a run folder, without the fields that are null; empty if there is no such file.

    A measured value that was not finite is NaN among `metrics`, and missing elsewhere.

    Raises:
        UserError: the file is damaged, so nobody knows whether the run is finished.
    """
    path = run_dir / STATE
    try:
        fields = read_json(path, _STATE_BYTES, with_gaps=True)
        state = {name: value for name, value in fields.unchecked().items() if value is not None}
        if not fields.text("state"):
            raise fields.problem("state")
        if type(state.get("job_id")) is int:
            state["job_id"] = str(state["job_id"])
        checked = JsonObject(state)
        for name in state.keys() & _FIELDS.keys():
            getattr(checked, _FIELDS[name])(name)
        if "best" in state:
            state["best"] = _checked_record(checked.nested("best"))
        if "metrics" in state:
            state["metrics"] = _numbers(checked.nested("metrics"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        cause = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{path} cannot be read: {cause}: restore it, or remove it to let the run resume") from None
    return state


def _checked_record(record: JsonObject) -> dict[str, Any]:
    """Return the description of the best validation, without the fields that are null."""
    present = {name: value for name, value in record.unchecked().items() if value is not None}
    for name in present.keys() & _FIELDS.keys():
        getattr(record, _FIELDS[name])(name)
    return present


def _numbers(metrics: JsonObject) -> dict[str, float]:
    """Return measured values; NaN for those that are null, which were not finite."""
    return {name: math.nan if metrics.is_null(name) else metrics.number(name) for name in metrics}


def epoch_under_way(run_dir: Path) -> int:
    """Return the 0-based epoch of the last whole line of metrics.jsonl, for a display of progress.

    It is 0 while the file does not exist, has no line yet, or has none at its end that can be read: the run itself
    reports damage.
    """
    try:
        descriptor = os.open(run_dir / METRICS, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            size = os.fstat(descriptor).st_size
            tail = os.pread(descriptor, _TAIL_BYTES, max(0, size - _TAIL_BYTES)) if size else b""
        finally:
            os.close(descriptor)
    except OSError:
        return 0
    for line in reversed(tail.split(b"\n")[:-1]):  # the text after the last newline is still being written
        try:
            return MetricsLine.parse(line).epoch
        except ValueError:
            continue
    return 0


def finished_names(chain: Iterable[Recipe]) -> set[str]:
    """Return the names of a chain's recipes whose runs are finished and will not be trained again.

    Raises:
        UserError: a state.json is damaged.
    """
    return {recipe.name for recipe in chain if read_state(recipe.run_dir).get("state") == "finished"}


def validation_at(run_dir: Path, step: int) -> dict[str, float] | None:
    """Return the validation metrics in metrics.jsonl after an optimizer step, or None; NaN for a value not finite.

    Raises:
        OSError: the file cannot be read.
    """
    metrics = None
    for line in metrics_lines(run_dir):
        if b'"validation"' in line and step_of(line) == step:
            entry = MetricsLine.parse(line)
            if entry.kind == "validation":
                metrics = entry.numbers()
    return metrics
