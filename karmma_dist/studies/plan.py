"""The runs that a study needs, in order: each recipe with its overrides once per seed, however many rows use it.

A run is named after its recipe, what its overrides change, and its seed: `grid_epic/teacher+epochs50-1f3a@seed1`. What
recipes say of each other's runs (a teacher, starting weights, `after`) follows these names, so the same training is
shared by all rows of a study, and by all studies.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from karmma_dist.errors import UserError
from karmma_dist.recipe import Recipe, load_recipe, read_run_recipe
from karmma_dist.runs.folder import BEST, read_state
from karmma_dist.studies.study import FOLDER, Row, StudyFile, choose_rows
from karmma_dist.training.checkpoint.checkpoint import checkpoints
from karmma_dist.training.checkpoint.resume import differing_fields, refuse_other_recipe

State = Literal["finished", "to resume", "to train"]

_NO_PART_OF_A_NAME = ("name", "seed", "data.shards")
_LONGEST_SLUG = 40


@dataclass(frozen=True)
class StudyRun:
    """One training."""

    recipe: Recipe
    """Resolved, under the run's own name."""
    needs: tuple[str, ...]
    """Names of the runs that have to be finished before."""
    group: str
    """The name without its seed: runs of a group differ in nothing else."""
    labels: list[str] = field(default_factory=list)
    """Rows that it is trained for, in part or whole."""

    @property
    def name(self) -> str:
        """Name under `runs_dir`."""
        return self.recipe.name

    def state(self) -> State:
        """Look whether it is finished.

        Raises:
            UserError: its folder holds a run of another recipe.
        """
        folder = self.recipe.run_dir
        is_finished = read_state(folder).get("state") == "finished"
        if not (folder / "recipe.yaml").is_file() or not (is_finished or checkpoints(folder)):
            return "to train"
        refuse_other_recipe(read_run_recipe(folder), self.recipe)
        return "finished" if is_finished else "to resume"


@dataclass(frozen=True)
class StudyPlan:
    """All runs of a study."""

    file: StudyFile
    seeds: list[int]
    runs: dict[str, StudyRun]
    """By name, each after those it needs."""
    cells: dict[tuple[str, int], str]
    """The run of each row and seed."""
    chosen: list[str]
    """Labels of the rows to train; the others are reported where they are finished."""
    overrides: tuple[str, ...]
    """Of all runs, from the command line."""

    @property
    def out(self) -> Path:
        """Default folder of the report."""
        return Path(next(iter(self.runs.values())).recipe.runs_dir) / FOLDER / self.file.name

    @property
    def chosen_runs(self) -> list[StudyRun]:
        """Runs that the chosen rows need."""
        return [run for run in self.runs.values() if set(run.labels) & set(self.chosen)]

    def weights_of(self, label: str, seed: int) -> Path:
        """Return the folder of the weights that a row shows for one seed."""
        folder = self.runs[self.cells[label, seed]].recipe.run_dir
        return folder / BEST if self.file.study.row(label).weights == "best" else folder


def plan_study(
    file: StudyFile, num_seeds: int | None = None, only: tuple[str, ...] = (), overrides: Sequence[str] = ()
) -> StudyPlan:
    """Resolve the recipes of all rows for every seed, and name their runs.

    Args:
        file: The study.
        num_seeds: Trainings of each row; None: as the study says.
        only: Labels of the rows to train; none: all of them.
        overrides: `a.b=c`, of every run.

    Raises:
        UserError: naming study and row: no such recipe, an unknown field, two trainings under one name.
    """
    chosen = choose_rows(file, only)
    planner = _Planner(tuple(overrides))
    cells: dict[tuple[str, int], str] = {}
    seeds = list(range(num_seeds or file.study.seeds))
    for seed in seeds:
        for row in file.study.rows:
            with _naming(file, row):
                cells[row.label, seed] = planner.add(row, seed)
    return StudyPlan(file, seeds, planner.runs, cells, chosen, tuple(overrides))


@contextmanager
def _naming(file: StudyFile, row: Row) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise UserError(f"{file.path}: row '{row.label}': {error}") from None


@dataclass(frozen=True)
class _Place:
    """What a name of a recipe became."""

    run: str
    suffix: str


class _Planner:
    """Collects runs, each once."""

    def __init__(self, overrides: tuple[str, ...]) -> None:
        self.runs: dict[str, StudyRun] = {}
        self._overrides = overrides
        self._known: dict[str, str] = {}

    def add(self, row: Row, seed: int) -> str:
        """Add the runs of a row and return the name of its own.

        Raises:
            UserError: see `plan_study`.
        """
        used: set[str] = set()
        name = self._visit(row.recipe, row, seed, used, waiting=()).run
        unused = next((other for other in row.set_of if other not in used), None)
        if unused is not None:
            raise UserError(f"set_of names '{unused}', which {row.recipe} does not come after: {', '.join(used)} are")
        return name

    def _visit(self, source: str, row: Row, seed: int, used: set[str], waiting: tuple[str, ...]) -> _Place:
        plain = load_recipe(source)
        if plain.name in waiting:
            raise UserError(f"recipes wait for each other: {' -> '.join([*waiting, plain.name])}")
        own = row.set if not waiting else row.set_of.get(plain.name, [])
        used |= {plain.name} if waiting else set()
        recipe = load_recipe(source, [*own, *self._overrides, f"seed={seed}"])
        of_row = load_recipe(source, [*own, f"seed={seed}"]) if self._overrides else recipe
        earlier = {
            load_recipe(name).name: self._visit(name, row, seed, used, (*waiting, plain.name))
            for name in recipe.after
        }
        below = [place.suffix for place in earlier.values()]
        given = row.suffix if not waiting else None
        suffix = _suffix(plain, recipe, below) if given is None else f"+{given}"
        if given is not None:
            suffix += _suffix(of_row, recipe, []).replace("+", "-", 1)
        group = f"{plain.name}{suffix}"
        return _Place(self._enter(_referring(recipe, earlier), group, plain.name, earlier, row, seed), suffix)

    def _enter(
        self, recipe: Recipe, group: str, plain_name: str, earlier: Mapping[str, _Place], row: Row, seed: int
    ) -> str:
        content = json.dumps(recipe.model_copy(update={"name": plain_name}).model_dump(mode="json"), sort_keys=True)
        name = self._known.setdefault(content, f"{group}@seed{seed}")
        needs = tuple(dict.fromkeys(place.run for place in earlier.values()))
        run = StudyRun(recipe.model_copy(update={"name": name}), needs, name.rpartition("@")[0])
        there = self.runs.setdefault(name, run)
        if there.recipe != run.recipe:
            what = ", ".join(differing_fields(there.recipe, run.recipe)) or "settings"
            raise UserError(
                f"its run {name} is also that of row '{there.labels[0]}', with other {what}: give one of them another "
                "suffix"
            )
        if row.label not in there.labels:
            there.labels.append(row.label)
        return name


def _suffix(plain: Recipe, recipe: Recipe, below: Sequence[str]) -> str:
    """What overrides change of what is learned, for the run's name; empty: nothing.

    `below` are the suffixes of the runs that this one builds on.
    """
    changes = {
        key: after
        for key, (_, after) in differing_fields(plain, recipe).items()
        if not any(key == other or key.startswith(f"{other}.") for other in _NO_PART_OF_A_NAME)
    }
    if not changes and not any(below):
        return ""
    digest = hashlib.sha256(json.dumps([changes, sorted(below)], sort_keys=True).encode()).hexdigest()[:4]
    words = [f"{key.rpartition('.')[2]}{value}" for key, value in changes.items()]
    slug = re.sub(r"[^A-Za-z0-9.]+", "-", "-".join(words)).strip("-.")[:_LONGEST_SLUG].rstrip("-.") or "below"
    return f"+{slug}-{digest}"


def _referring(recipe: Recipe, earlier: Mapping[str, _Place]) -> Recipe:
    """The recipe with its references following the runs of the study."""
    runs_dir = Path(recipe.runs_dir)

    def follow(reference: str | None) -> str | None:
        for name, place in earlier.items():
            for old, new in ((name, place.run), (str(runs_dir / name), str(runs_dir / place.run))):
                if reference == old or (reference or "").startswith(f"{old}/"):
                    return new + (reference or "")[len(old) :]
        return reference

    encoders = {
        modality: encoder.model_copy(update={"weights": follow(encoder.weights)})
        for modality, encoder in recipe.model.encoders.items()
    }
    changes: dict[str, object] = {
        "model": recipe.model.model_copy(update={"encoders": encoders}),
        "after": [str(runs_dir / place.run / "recipe.yaml") for place in earlier.values()],
    }
    if recipe.distill is not None:
        taught = {
            "teacher": follow(recipe.distill.teacher), "teachers": [follow(name) for name in recipe.distill.teachers],
        }  # fmt: skip
        changes["distill"] = recipe.distill.model_copy(update=taught)
    return recipe.model_copy(update=changes)
