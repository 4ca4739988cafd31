"""The runs that a study needs, in training order: each recipe with its overrides once per seed, shared by all rows.

The name of a run consists of its recipe, the changes by its overrides, and its seed:
`grid_epic/teacher+epochs50-1f3a@seed1`. References between recipes (a teacher, starting weights, `after`) are changed
to these names, so all rows of a study, and all studies, share the same training.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from karmma_dist.errors import UserError
from karmma_dist.recipe import Recipe, load_recipe, read_run_recipe
from karmma_dist.runs.folder import BEST, read_state
from karmma_dist.runs.name import check_place
from karmma_dist.studies.memories import with_memories
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
    """Resolved recipe, with the name of the run."""
    needs: tuple[str, ...]
    """Names of the runs that must be finished first."""
    group: str
    """Name without the seed; runs of a group differ only in their seed."""
    labels: list[str] = field(default_factory=list)
    """Labels of the rows that need the run, directly or indirectly."""

    @property
    def name(self) -> str:
        """Name under `runs_dir`."""
        return self.recipe.name

    def state(self) -> State:
        """Return the state of the run on disk.

        Raises:
            UserError: the folder holds a run of another recipe, or may not hold one.
        """
        check_place(self.recipe)
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
    """Runs by name, each after the runs that it needs."""
    cells: dict[tuple[str, int], str]
    """Name of the run for each row label and seed."""
    chosen: list[str]
    """Labels of the rows to train; other rows are reported if they are finished."""
    overrides: tuple[str, ...]
    """Overrides of all runs, from the command line."""

    @property
    def out(self) -> Path:
        """Default folder of the report."""
        return Path(next(iter(self.runs.values())).recipe.runs_dir) / FOLDER / self.file.name

    @property
    def chosen_runs(self) -> list[StudyRun]:
        """Runs that the chosen rows need."""
        return [run for run in self.runs.values() if set(run.labels) & set(self.chosen)]

    def weights_of(self, label: str, seed: int) -> Path:
        """Return the folder of the weights that are evaluated for a row and seed."""
        folder = self.runs[self.cells[label, seed]].recipe.run_dir
        return folder / BEST if self.file.study.row(label).weights == "best" else folder


def plan_study(
    file: StudyFile, num_seeds: int | None = None, only: tuple[str, ...] = (), overrides: Sequence[str] = ()
) -> StudyPlan:
    """Resolve the recipes of all rows for every seed, name their runs, and let them share memories.

    Args:
        file: The study.
        num_seeds: Trainings of each row; None: the study's number.
        only: Labels of the rows to train; empty: all rows.
        overrides: Overrides `a.b=c` of every run.

    Raises:
        UserError: a recipe is missing, a field is unknown, or two trainings have the same name; the message names study
            and row.
    """
    chosen = choose_rows(file, only)
    planner = _Planner(tuple(overrides))
    cells: dict[tuple[str, int], str] = {}
    seeds = list(range(num_seeds or file.study.seeds))
    for seed in seeds:
        for row in file.study.rows:
            with _naming(file, row):
                cells[row.label, seed] = planner.add(row, seed)
    recipes = {name: run.recipe for name, run in planner.runs.items()}
    remembering = with_memories(recipes, automatic=file.study.memory)
    runs = {name: replace(run, recipe=remembering[name]) for name, run in planner.runs.items()}
    return StudyPlan(file, seeds, runs, cells, chosen, tuple(overrides))


@contextmanager
def _naming(file: StudyFile, row: Row) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise UserError(f"{file.path}: row '{row.label}': {error}") from None


@dataclass(frozen=True)
class _Place:
    """The run to which a recipe's name was resolved."""

    run: str
    suffix: str


class _Planner:
    """Collector of the runs of a study, each once."""

    def __init__(self, overrides: tuple[str, ...]) -> None:
        self.runs: dict[str, StudyRun] = {}
        self._overrides = overrides
        self._known: dict[str, str] = {}
        self._visited: dict[tuple[str, str, int], _Place] = {}
        """Runs of earlier recipes by recipe, label of the row and seed: several recipes may come after the same."""

    def add(self, row: Row, seed: int) -> str:
        """Add the runs of a row and return the name of its own.

        Raises:
            UserError: see `plan_study`.
        """
        used: set[str] = set()
        name = self._visit(row.recipe, row, seed, used, waiting=()).run
        unused = next((other for other in row.set_of if other not in used), None)
        if unused is not None:
            raise UserError(
                f"set_of names '{unused}', which {row.recipe} does not come after: it comes after {', '.join(used)}"
            )
        return name

    def _visit(self, source: str, row: Row, seed: int, used: set[str], waiting: tuple[str, ...]) -> _Place:
        plain = load_recipe(source)
        if plain.name in waiting:
            raise UserError(f"recipes wait for each other: {' -> '.join([*waiting, plain.name])}")
        changes = row.set if not waiting else row.set_of.get(plain.name, [])
        used |= {plain.name} if waiting else set()
        recipe = load_recipe(source, [*changes, *self._overrides, f"seed={seed}"])
        if recipe.data.mixture:
            raise UserError(f"{source} trains on data.mixture, but a study evaluates all of its runs on one dataset")
        row_recipe = load_recipe(source, [*changes, f"seed={seed}"]) if self._overrides else recipe
        earlier: dict[str, _Place] = {}
        for name in recipe.after:
            key = name, row.label, seed
            if key not in self._visited:
                self._visited[key] = self._visit(name, row, seed, used, (*waiting, plain.name))
            earlier[load_recipe(name).name] = self._visited[key]
        below = [place.suffix for place in earlier.values()]
        given = row.suffix if not waiting else None
        suffix = _suffix(plain, recipe, below) if given is None else f"+{given}"
        if given is not None:
            suffix += _suffix(row_recipe, recipe, []).replace("+", "-", 1)
        group = f"{plain.name}{suffix}"
        return _Place(self._enter(_referring(recipe, earlier), group, plain.name, earlier, row, seed), suffix)

    def _enter(
        self, recipe: Recipe, group: str, plain_name: str, earlier: Mapping[str, _Place], row: Row, seed: int
    ) -> str:
        content = json.dumps(recipe.model_copy(update={"name": plain_name}).model_dump(mode="json"), sort_keys=True)
        name = self._known.setdefault(content, f"{group}@seed{seed}")
        needs = tuple(dict.fromkeys(place.run for place in earlier.values()))
        run = StudyRun(recipe.model_copy(update={"name": name}), needs, name.rpartition("@")[0])
        known = self.runs.setdefault(name, run)
        if known.recipe != run.recipe:
            fields = ", ".join(differing_fields(known.recipe, run.recipe)) or "settings"
            raise UserError(
                f"row '{known.labels[0]}' has a run of the same name {name}, but with other {fields}: give one of the "
                "rows another suffix"
            )
        if row.label not in known.labels:
            known.labels.append(row.label)
        return name


def _suffix(plain: Recipe, recipe: Recipe, below: Sequence[str]) -> str:
    """Return a suffix for the run's name that describes changed fields that affect learning; empty without changes.

    `below` holds the suffixes of the runs that this run builds on.
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
    """Return the recipe with its references to other recipes changed to the runs of the study."""
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
