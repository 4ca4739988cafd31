"""The typed study: the rows and columns of one table, read from recipes/DATASET/studies/NAME.yaml.

    title: KARMMA on GRID
    rows:
      - {label: Baseline, recipe: grid_epic/baseline, published: {V: 32.10}}
      - {label: student, recipe: grid_epic/distill, set: [training.epochs=50]}
    evaluate: {subsets: true, sweep: true}
    columns:
      - {name: V, at: V}
      - {name: average, at: average, tested: true}
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from karmma_dist.errors import UserError, nearest
from karmma_dist.evaluation.metrics import ACTION, find_figure, known_figure, metric_table
from karmma_dist.modalities import LETTERS
from karmma_dist.settings import Settings, find_file, load_settings

FOLDER = "studies"
"""Folder of a dataset's studies beside its recipes, and of all reports below `runs_dir`."""

COSTS = {"gflops": "GFLOPs", "params": "parameters (M)", "trainable": "trainable (M)", "memory": "memory (GB)",
         "fusion_memory": "fusion block (GB)", "fusion_memory_unfused": "fusion block (GB)"}  # fmt: skip
"""Metrics that need no training, and their headings."""

OVER = ("average", "relative drop", "area", "fall")
"""Figures over several conditions."""

_DROP = re.compile(r"drop (0(?:\.\d+)?|1(?:\.0+)?)")

Positive = Annotated[int, Field(gt=0)]


class Column(Settings):
    """A column of the table."""

    name: str
    """Heading, and the key of the published figures."""
    metric: str = "action_top1"
    """An accuracy in percent (`action_top1`, `verb_top5`, ...), or a cost that needs no training: `gflops` of a forward
    pass, `params` and `trainable` in millions, `memory` of inference with one clip in fp32 in GB (weights and
    activations), `fusion_memory` of the fusion block's tokens and activations with 32 clips in fp32 in GB, and
    `fusion_memory_unfused` of the same with attention that makes its matrix of weights."""
    at: str = "all"
    """What is there: `all` modalities of the model, a subset such as `V+F`, or `drop 0.5`: each is lost with that
    probability. Over several conditions: `average` over all subsets, `relative drop` (average loss of the proper
    subsets against the full set, in percent of it), `area` and `fall` of the curve over the drop probability."""
    tested: bool = False
    """True if rows are tested against each other on this column. No column: the first accuracy."""

    @property
    def is_cost(self) -> bool:
        """True if the figure follows from the architecture alone."""
        return self.metric in COSTS

    @property
    def lower_is_better(self) -> bool:
        """True if less is better."""
        if self.is_cost:
            return True
        return find_figure(self.metric).metric.lower_is_better != (self.at in ("relative drop", "fall"))

    @property
    def drop_prob(self) -> float | None:
        """Drop probability of `drop P`; None: it is another kind of column."""
        found = _DROP.fullmatch(self.at)
        return None if found is None else float(found[1])

    @property
    def subset(self) -> tuple[str, ...] | None:
        """Modalities of a subset such as `V+F`; None: it is another kind of column."""
        parts = self.at.split("+")
        return tuple(LETTERS[part] for part in parts) if all(part in LETTERS for part in parts) else None

    @model_validator(mode="after")
    def _is_known(self) -> Column:
        if not self.is_cost and not ((figure := known_figure(self.metric)) and figure.metric.is_per_clip):
            accuracies = [f"{ACTION}_{name}" for name, metric in metric_table().items() if metric.is_per_clip]
            raise ValueError(
                f"column '{self.name}': metric '{self.metric}' is neither an accuracy ({', '.join(accuracies)}, or of "
                f"a head) nor a cost ({', '.join(COSTS)}){nearest(self.metric, [*COSTS, *accuracies])}"
            )
        is_condition = self.at == "all" or self.subset is not None
        if not is_condition and (self.is_cost or (self.at not in OVER and self.drop_prob is None)):
            raise ValueError(
                f"column '{self.name}': at '{self.at}' is not 'all', a subset such as V+F"
                + ("" if self.is_cost else f", 'drop 0.5', or one of {', '.join(OVER)}")
            )
        if self.is_cost and self.tested:
            raise ValueError(f"column '{self.name}': a cost has no spread that could be tested: remove 'tested'")
        return self


class Row(Settings):
    """A row of the table: one model, trained once per seed."""

    label: str
    """Name in the table."""
    recipe: str
    """Recipe of the model: a name under recipes/, or a path."""
    set: list[str] = []
    """Overrides `a.b=c` of that recipe alone."""
    set_of: dict[str, list[str]] = {}
    """Overrides of recipes that it comes after, by their names."""
    suffix: Annotated[str, Field(pattern=r"^[\w.-]+$")] | None = None
    """Ends the run's name where overrides change what is learned; None: made from the overrides."""
    weights: Literal["last", "best"] = "last"
    """Which weights are evaluated: those of the last epoch, or of the best validation."""
    published: dict[str, float] = {}
    """Published figures by column name."""
    note: str | None = None
    """Said below the table."""


class Evaluate(Settings):
    """What every run is evaluated under. Everything present is always among it."""

    subsets: bool = False
    """Every subset of the modalities."""
    sweep: bool = False
    """Drop probabilities 0.0, 0.1, ... 0.9, with a figure."""
    drop_seeds: Positive = 3
    """Random draws per drop probability."""
    modalities: list[str] | None = None
    """Letters or names of the modalities that are shown to the models; None: all of theirs."""


class Study(Settings):
    """One table."""

    title: str
    """First line of the report."""
    caption: str = ""
    """Where the table is published, and what it is of."""
    seeds: Positive = 1
    """Trainings of each row, from seed 0 on; `--seeds` wins."""
    clips: Positive | None = None
    """Training clips, for the cost of a plan made where the shards are not."""
    heads: dict[str, Positive] = {}
    """Classes per head, likewise, where the recipes do not say them."""
    rows: Annotated[list[Row], Field(min_length=1)]
    """Rows, in the order of the table."""
    evaluate: Evaluate = Evaluate()
    """Conditions."""
    columns: Annotated[list[Column], Field(min_length=1)]
    """Columns, in the order of the table."""
    tests: list[tuple[str, str]] | None = None
    """Pairs of labels to test, the second against the first; None: every row against every earlier one."""
    notes: list[str] = []
    """Sentences below the table."""

    @property
    def is_measured(self) -> bool:
        """True if a column needs trained models."""
        return any(not column.is_cost for column in self.columns)

    @property
    def tested_columns(self) -> list[Column]:
        """Columns on which rows are tested against each other."""
        accuracies = [column for column in self.columns if not column.is_cost]
        return [column for column in accuracies if column.tested] or accuracies[:1]

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Labels of the rows that are tested, the second of a pair against the first."""
        if self.tests is not None:
            return self.tests
        labels = [row.label for row in self.rows]
        return [(labels[i], label) for j, label in enumerate(labels) for i in range(j)]

    def row(self, label: str) -> Row:
        """Return the row of a label."""
        return next(row for row in self.rows if row.label == label)

    @model_validator(mode="after")
    def _fits_together(self) -> Study:
        labels = [row.label for row in self.rows]
        names = [column.name for column in self.columns]
        for kind, values in (("rows", labels), ("columns", names)):
            twice = next((value for value in values if values.count(value) > 1), None)
            if twice is not None:
                raise ValueError(f"two {kind} are called '{twice}'")
        for row in self.rows:
            odd = next((name for name in row.published if name not in names), None)
            if odd is not None:
                raise ValueError(f"row '{row.label}': published names no column '{odd}'{nearest(odd, names)}")
        for label in (label for pair in self.tests or () for label in pair):
            if label not in labels:
                raise ValueError(f"tests name no row '{label}'{nearest(label, labels)}")
        for column in self.columns:
            self._check_conditions(column)
        return self

    def _check_conditions(self, column: Column) -> None:
        if column.is_cost:
            return
        needs_subsets = column.at in ("average", "relative drop") or column.subset is not None
        if needs_subsets and not self.evaluate.subsets:
            raise ValueError(f"column '{column.name}': at '{column.at}' needs evaluate.subsets: true")
        if (column.at in ("area", "fall") or column.drop_prob is not None) and not self.evaluate.sweep:
            raise ValueError(f"column '{column.name}': at '{column.at}' needs evaluate.sweep: true")


@dataclass(frozen=True)
class StudyFile:
    """A study and where it was found."""

    path: Path
    study: Study

    @property
    def name(self) -> str:
        """`DATASET/NAME` of recipes/DATASET/studies/NAME.yaml; of any other file its bare name."""
        parent = self.path.resolve().parent
        return f"{parent.parent.name}/{self.path.stem}" if parent.name == FOLDER else self.path.stem


def load_study(name: str) -> StudyFile:
    """Load a study by path, or as DATASET/NAME from recipes/DATASET/studies/NAME.yaml.

    Raises:
        UserError: no such file, an unknown key, a wrong value, two rows or columns of one name.
    """
    path = _find(name)
    return StudyFile(path, load_settings(path, Study))


def choose_rows(file: StudyFile, labels: tuple[str, ...]) -> list[str]:
    """Return the labels asked for, or all of them where none was.

    Raises:
        UserError: no such row.
    """
    known = [row.label for row in file.study.rows]
    for label in labels:
        if label not in known:
            raise UserError(f"{file.path}: no row '{label}'{nearest(label, known)}; there are {', '.join(known)}")
    return [label for label in known if not labels or label in labels]


def _find(name: str) -> Path:
    if Path(name).is_file():
        return Path(name)
    dataset, slash, rest = name.removesuffix(".yaml").rpartition("/")
    is_short = bool(slash) and dataset.rpartition("/")[2] != FOLDER
    return find_file(f"{dataset}/{FOLDER}/{rest}" if is_short else name, "recipes")
