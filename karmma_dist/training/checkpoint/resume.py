"""Prepares a run folder before training: another process may own it; it may be new, hold another run, be finished, or
be resumed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from karmma_dist.distributed.collectives import gather, on_main
from karmma_dist.distributed.world import World
from karmma_dist.errors import UserError, masked
from karmma_dist.io.disk_errors import make_folder
from karmma_dist.io.files import remove
from karmma_dist.progress import Report, silent
from karmma_dist.recipe import NOT_LEARNED, Recipe, read_run_recipe, save_recipe
from karmma_dist.runs.folder import BEST, ENSEMBLE, TRACKED, read_state, write_state
from karmma_dist.runs.name import check_place
from karmma_dist.runs.owner import Ownership, owned
from karmma_dist.settings import flat, unmarked
from karmma_dist.training.checkpoint.checkpoint import checkpoints, find_damage, newest_undamaged, set_latest


@contextmanager
def own_run_dir(recipe: Recipe, world: World, report: Report = silent) -> Iterator[Ownership | None]:
    """Own the run folder while the block runs; yield the ownership on the main rank, None on the others.

    Every rank must call this.

    Raises:
        UserError: the run's name is unsafe, another process owns the folder, or it cannot be written.
    """
    with ExitStack() as stack:

        def own() -> Ownership:
            check_place(recipe)  # before anything is written or removed
            return stack.enter_context(owned(recipe.run_dir, "is being trained", report))

        yield on_main(own, world)


def prepare_run_dir(recipe: Recipe, world: World, resume: str, report: Report = silent) -> str:
    """Make or check the run folder; return the checkpoint to resume from, "" to start afresh, or "finished".

    Every rank must call this; the main rank checks the folder and decides for all.

    Raises:
        UserError: the folder holds another run, or the checkpoint to resume from is damaged.
    """
    try:
        decision = [_check_and_prepare(recipe, resume, report), ""] if world.is_main else []
    except UserError as error:
        decision = ["", str(error)]
    except OSError as error:
        decision = ["", f"{error.filename or recipe.run_dir}: {error.strerror or error}"]
    start, problem = gather(decision)
    if problem:
        raise UserError(problem)
    return str(start)


def _check_and_prepare(recipe: Recipe, resume: str, report: Report) -> str:
    run_dir = recipe.run_dir
    saved = read_run_recipe(run_dir) if (run_dir / "recipe.yaml").is_file() else None
    start = ""
    if resume == "auto" and saved is not None:
        finished = read_state(run_dir).get("state") == "finished"
        if finished or checkpoints(run_dir):
            refuse_other_recipe(saved, recipe)
        if finished:
            return "finished"

        def report_damage(name: str, damage: str) -> None:
            report(f"{recipe.name}: {name}", 0, 1, f"is damaged and skipped: {damage}")

        start = str(newest_undamaged(run_dir, report_damage) or "")
    elif resume not in ("auto", "never"):
        start = resume
        if damage := find_damage(Path(start)):
            raise UserError(f"{start}: not an intact checkpoint: {damage}: resume another one, or use --resume auto")
    if start:
        read_state(run_dir / BEST)  # a damaged record of the best validation is found now, not hours later
    else:
        names = ("checkpoints", "metrics.jsonl", "damage.jsonl", BEST, ENSEMBLE, TRACKED)
        for name in names:
            remove(run_dir / name)
    make_folder(run_dir)
    save_recipe(recipe, run_dir / "recipe.yaml")
    write_state(run_dir, "running")
    if start and Path(start).resolve().parent == (run_dir / "checkpoints").resolve():
        set_latest(Path(start))
    return start


def refuse_other_recipe(saved: Recipe, recipe: Recipe) -> None:
    """Refuse to continue a run with another recipe.

    Raises:
        UserError: fields without the mark NOT_LEARNED differ; the first five are named with both values.
    """
    differing = [f"{key}: {before} -> {now}" for key, (before, now) in differing_fields(saved, recipe).items()]
    if differing:
        raise UserError(
            f"{recipe.run_dir}: holds a run of another recipe ({'; '.join(differing[:5])}): "
            "give this run another name (--set name=...) or start over with --resume never"
        )


def differing_fields(first: Recipe, second: Recipe) -> dict[str, tuple[Any, Any]]:
    """Return the fields without the mark NOT_LEARNED that differ, with both values, in alphabetical order."""
    before, now = (
        {
            key: masked(value) if isinstance(value, str) else value  # a new password or signature is not a difference
            for key, value in flat(unmarked(recipe, NOT_LEARNED)).items()
        }
        for recipe in (first, second)
    )
    return {
        key: (before.get(key), now.get(key))
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    }
