"""The name of a run, which is a path below `runs_dir`: only what is safe to create, fill and empty there.

    epic_kitchens/distill, grid_epic/teacher+epochs50-1f3a@seed1       names
    "", ".", a//b, ../a, /a, .hidden, -x, "a ", a/best, recipe.yaml    refused

`runs/name.py` adds what only the disk tells.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator

from karmma_dist.errors import quoted

OWN_NAMES = frozenset({
    "best", "checkpoints", "damage.jsonl", "ensemble.json", "environment.json", "eval", "metrics.jsonl", "model.yaml",
    "mlflow.db", "recipe.yaml", "report.html", "report.md", "state.json", "STOP", "trace", "tracked.json", "trackio",
    "wandb", "weights.safetensors",
})  # fmt: skip
"""Names that a run uses in its own folder; a run inside a run would be taken for one of them."""
_OWN_BEGINNINGS = ("events.out.tfevents.",)
_OTHER_FOLDERS = ("comparison", "memories", "studies")
"""Folders in `runs_dir` of reports, and of memories that runs share."""
_MOST_BYTES = 200
"""Bytes of a part, which leave room for what temporary files add to names."""

_MOST_BYTES_IN_ALL = 1_000
"""Bytes of a name, which with `runs_dir` and the files inside stay below Linux' PATH_MAX of 4,096."""


def check_run_name(name: str) -> str:
    """Return the name if a run's folder may have it.

    Raises:
        ValueError: a part of the name is empty, hidden, too long, one of a run's own files, or leads elsewhere.
    """
    if (first := name.partition("/")[0]) in _OTHER_FOLDERS:
        raise ValueError(f"begins with '{first}', a folder in runs_dir that holds no runs: choose another")
    parts = name.split("/")
    if {"", ".", ".."} & set(parts):
        raise ValueError(
            f"name {quoted(name)} must stay inside runs_dir, in a folder of its own: no part may be empty, '.' or '..'"
        )
    if len(name.encode(errors="replace")) > _MOST_BYTES_IN_ALL:
        raise ValueError(f"is too long: at most {_MOST_BYTES_IN_ALL:,} bytes")
    for part in parts:
        if problem := _problem(part):
            raise ValueError(problem if part == name else f"its part {quoted(part)} {problem}")
    return name


def job_name(name: str) -> str:
    """Return the name of a run's Slurm job, which is also in the name of its log: no slashes, at most 200 bytes."""
    return name.replace("/", "-").encode()[:_MOST_BYTES].decode(errors="ignore")


def _problem(part: str) -> str:
    """Return what a part of a name must not be; empty if it is fine."""
    if not part.isprintable():
        return "has a character that cannot be shown, such as a line break: use others"
    if part != part.strip():
        return "begins or ends with a space"
    if part[0] in ".-~":
        return f"begins with '{part[0]}': such names are hidden files, options or home folders"
    if len(part.encode()) > _MOST_BYTES:
        return f"is too long: at most {_MOST_BYTES} bytes from one / to the next"
    if part in OWN_NAMES or part.startswith(_OWN_BEGINNINGS):
        return "is a name that runs use in their own folders: choose another"
    return ""


RunName = Annotated[str, AfterValidator(check_run_name)]
"""A name that `check_run_name` accepts."""
