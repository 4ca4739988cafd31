"""Types and marks of the fields of a recipe."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from karmma_dist.settings import mark

Probability = Annotated[float, Field(ge=0, le=1)]

NOT_LEARNED = mark("not_learned")
"""Mark of the fields and sections that change neither the weights a run ends with (but for rounding) nor those in
best/: where things are, speed, memory, logs, checkpoints, limits, and what comes after training. They may change when a
run is resumed, and are no part of the name of a study's run; all others are refused."""

SHARED = mark("shared_by_chain")
"""Mark of the fields that say where things are: an override of one holds for every recipe of a chain."""
