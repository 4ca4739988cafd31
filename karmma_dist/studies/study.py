"""The typed study: rows and columns of one table, read from recipes/DATASET/studies/NAME.yaml.

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

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from karmma_dist.errors import UserError, nearest
from karmma_dist.evaluation.conditions import MissingShare
from karmma_dist.evaluation.metrics import ACTION, find_figure, known_figure, metric_table
from karmma_dist.io.named_file import find_file
from karmma_dist.modalities import LETTERS, MODALITIES
from karmma_dist.settings import PathText, Positive, Settings, load_settings

FOLDER = "studies"
"""Name of the folder of studies among a dataset's recipes, and of the folder of their reports in `runs_dir`."""

COSTS = {"gflops": "GFLOPs", "params": "parameters (M)", "trainable": "trainable (M)", "memory": "memory (GB)",
         "fusion_memory": "fusion block (GB)", "fusion_memory_unfused": "fusion block (GB)"}  # fmt: skip
"""Metrics that need no training, with their headings."""

OVER = ("average", "relative drop", "area", "fall")
"""Figures over several conditions."""

_DROP = re.compile(r"drop (0(?:\.\d+)?|1(?:\.0+)?)")
_MISSING = re.compile(r"missing (\S+)")

Seeds = Annotated[int, Field(gt=0, le=1000)]
"""A number of seeds, each of which is a training or an evaluation."""


class Column(Settings):
    """A column of the table."""

    name: str
    """Heading, and key of the published figures."""
    metric: str = "action_top1"
    """An accuracy in percent (`action_top1`, `verb_top5`, ...), or a cost that needs no training: `gflops` of a forward
    pass, `params` and `trainable` in millions, `memory` of inference with one clip in fp32 in GB (weights and
    activations), `fusion_memory` of the fusion block's tokens and activations with 32 clips in fp32 in GB, and
    `fusion_memory_unfused` of the same with attention that materializes its weight matrix."""
    at: str = "all"
    """Modalities present: `all` of the model, a subset such as `V+F`, or `drop 0.5`: each is dropped with that
    probability; or `missing A:0.5`: that share of the clips lacks the modality. Figures over several conditions:
    `average` over all subsets, `relative drop` (average loss of the proper subsets against the full set, in percent of
    it), `area` and `fall` of the curve over the drop probability."""
    tested: bool = False
    """True if rows are tested against each other on this column. If no column sets it, the first accuracy is tested."""

    @property
    def is_cost(self) -> bool:
        """True if the figure depends only on the architecture."""
        return self.metric in COSTS

    @property
    def lower_is_better(self) -> bool:
        """True if a lower figure is better."""
        if self.is_cost:
            return True
        return find_figure(self.metric).metric.lower_is_better != (self.at in ("relative drop", "fall"))

    @property
    def drop_prob(self) -> float | None:
        """Drop probability of `drop P`; None for other columns."""
        match = _DROP.fullmatch(self.at)
        return None if match is None else float(match[1])

    @property
    def missing(self) -> MissingShare | None:
        """Missing modality of `missing A:0.5`; None for other columns."""
        match = _MISSING.fullmatch(self.at)
        return None if match is None else MissingShare.parse(match[1], tuple(MODALITIES))

    @property
    def subset(self) -> tuple[str, ...] | None:
        """Modalities of a subset such as `V+F`; None for other columns."""
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
        try:
            is_drawn = self.drop_prob is not None or self.missing is not None
        except UserError as error:
            raise ValueError(f"column '{self.name}': {error}") from None
        is_condition = self.at == "all" or self.subset is not None
        if not is_condition and (self.is_cost or (self.at not in OVER and not is_drawn)):
            raise ValueError(
                f"column '{self.name}': at '{self.at}' is not 'all', a subset such as V+F"
                + ("" if self.is_cost else f", 'drop 0.5', 'missing A:0.5', or one of {', '.join(OVER)}")
            )
        if self.is_cost and self.tested:
            raise ValueError(f"column '{self.name}': a cost does not vary, so it cannot be tested: remove 'tested'")
        return self


class Row(Settings):
    """A row of the table: one model, trained once per seed."""

    label: str
    """Name in the table."""
    recipe: PathText
    """Recipe of the model: a name under recipes/, or a path."""
    set: list[str] = []
    """Overrides `a.b=c` of this recipe only."""
    set_of: dict[str, list[str]] = {}
    """Overrides of recipes that must be trained first, by their names."""
    suffix: Annotated[str, Field(pattern=r"^[\w.-]+$", max_length=60)] | None = None
    """Suffix of the run's name if overrides change what is learned; None: derived from the overrides."""
    weights: Literal["last", "best"] = "last"
    """Weights to evaluate: those of the last epoch, or of the best validation."""
    published: dict[str, float] = {}
    """Published figures by column name."""
    note: str | None = None
    """Note below the table."""


class Evaluate(Settings):
    """The conditions under which every run is evaluated; all modalities present is always one of them."""

    subsets: bool = False
    """True to evaluate every subset of the modalities."""
    sweep: bool = False
    """True to evaluate the drop probabilities 0.0, 0.1, ... 0.9 and to plot them."""
    missing: list[str] = []
    """Modalities that a share of the clips lacks, such as `A:0.5`: each is a condition of its own."""
    drop_seeds: Seeds = 3
    """Number of random draws per drop probability and missing share."""
    modalities: list[str] | None = None
    """Letters or names of the modalities shown to the models; None: all modalities of each model."""

    @property
    def missing_shares(self) -> list[MissingShare]:
        """The parsed `missing`."""
        return [MissingShare.parse(text, tuple(MODALITIES)) for text in self.missing]

    @field_validator("missing")
    @classmethod
    def _is_known(cls, missing: list[str]) -> list[str]:
        for text in missing:
            try:
                MissingShare.parse(text, tuple(MODALITIES))
            except UserError as error:
                raise ValueError(str(error)) from None
        return missing


class Study(Settings):
    """A study: one table."""

    title: str
    """First line of the report."""
    caption: str = ""
    """Source and content of the table."""
    seeds: Seeds = 1
    """Number of trainings of each row, from seed 0 on; `--seeds` overrides it."""
    clips: Annotated[int, Field(gt=0, le=10**12)] | None = None
    """Number of training clips, used for the cost of a plan if the shards are not available."""
    heads: dict[str, Positive] = {}
    """Number of classes per head, used for the cost of a plan if neither shards nor recipes give them."""
    rows: Annotated[list[Row], Field(min_length=1)]
    """Rows, in the order of the table."""
    memory: bool = True
    """True: runs that ask the same frozen teachers about the same views share a memory of the answers, in
    `runs_dir`/memories, unless their recipes set distill.memory. What is learned does not depend on it."""
    evaluate: Evaluate = Evaluate()
    """Conditions of the evaluation."""
    columns: Annotated[list[Column], Field(min_length=1)]
    """Columns, in the order of the table."""
    tests: list[tuple[str, str]] | None = None
    """Pairs of labels to test, the second against the first; None: every row against every earlier row."""
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
        """Pairs of labels to test, the second against the first."""
        if self.tests is not None:
            return self.tests
        labels = [row.label for row in self.rows]
        return [(labels[i], label) for j, label in enumerate(labels) for i in range(j)]

    def row(self, label: str) -> Row:
        """Return the row with this label."""
        return next(row for row in self.rows if row.label == label)

    @model_validator(mode="after")
    def _fits_together(self) -> Study:
        labels = [row.label for row in self.rows]
        names = [column.name for column in self.columns]
        for plural, values in (("rows", labels), ("columns", names)):
            duplicate = next((value for value in values if values.count(value) > 1), None)
            if duplicate is not None:
                raise ValueError(f"two {plural} are called '{duplicate}'")
        for row in self.rows:
            unknown = next((name for name in row.published if name not in names), None)
            if unknown is not None:
                raise ValueError(f"row '{row.label}': published: no column '{unknown}'{nearest(unknown, names)}")
        for label in (label for pair in self.tests or () for label in pair):
            if label not in labels:
                raise ValueError(f"tests: no row '{label}'{nearest(label, labels)}")
        for column in self.columns:
            self._check_conditions(column)
        return self

    def _check_conditions(self, column: Column) -> None:
        if column.is_cost:
            return
        needs_subsets = column.at in ("average", "relative drop") or column.subset is not None
        if needs_subsets and not self.evaluate.subsets:
            raise ValueError(f"column '{column.name}': at '{column.at}' needs evaluate.subsets: true")
        if column.missing is not None and column.missing not in self.evaluate.missing_shares:
            raise ValueError(f"column '{column.name}': at '{column.at}' needs evaluate.missing: [{column.missing}]")
        if (column.at in ("area", "fall") or column.drop_prob is not None) and not self.evaluate.sweep:
            raise ValueError(f"column '{column.name}': at '{column.at}' needs evaluate.sweep: true")


@dataclass(frozen=True)
class StudyFile:
    """A study and its path."""

    path: Path
    study: Study

    @property
    def name(self) -> str:
        """`DATASET/NAME` for recipes/DATASET/studies/NAME.yaml; for any other file its stem."""
        parent = self.path.resolve().parent
        return f"{parent.parent.name}/{self.path.stem}" if parent.name == FOLDER else self.path.stem


def load_study(name: str) -> StudyFile:
    """Load a study by path, or as DATASET/NAME from recipes/DATASET/studies/NAME.yaml.

    Raises:
        UserError: the file is missing, a key is unknown, a value is wrong, or two rows or columns have the same name.
    """
    path = _find(name)
    return StudyFile(path, load_settings(path, Study))


def choose_rows(file: StudyFile, labels: tuple[str, ...]) -> list[str]:
    """Return the requested labels in the order of the table, or all labels if `labels` is empty.

    Raises:
        UserError: a row does not exist.
    """
    known = [row.label for row in file.study.rows]
    for label in labels:
        if label not in known:
            raise UserError(f"{file.path}: no row '{label}'{nearest(label, known)}; choose from {', '.join(known)}")
    return [label for label in known if not labels or label in labels]


def _find(name: str) -> Path:
    if os.path.isfile(name):
        return Path(name)
    dataset, slash, rest = name.removesuffix(".yaml").rpartition("/")
    is_short = bool(slash) and dataset.rpartition("/")[2] != FOLDER
    return find_file(f"{dataset}/{FOLDER}/{rest}" if is_short else name, "recipes")
