"""The tracker `csv`: a line per figure in figures.csv of the run folder."""

from __future__ import annotations

import csv
from typing import Any

from karmma_dist.training.trackers import Tracker, TrackerType


class CsvTracker(Tracker):
    def __init__(self, recipe: Any, resumed: int) -> None:
        self.file = open(recipe.run_dir / "figures.csv", "a", newline="")  # noqa: SIM115 - closed by `close`

    def write(self, kind: str, step: int, epoch: int, values: Any) -> None:
        csv.writer(self.file).writerows([kind, step, name, value] for name, value in values.items())

    def close(self) -> None:
        self.file.close()


CSV = TrackerType(CsvTracker)
