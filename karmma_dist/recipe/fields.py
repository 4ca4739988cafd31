"""Types and marks of recipe fields."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from karmma_dist.settings import mark

Probability = Annotated[float, Field(ge=0, le=1)]

NOT_LEARNED = mark("not_learned")
"""Mark of fields and sections that change neither the final weights of a run (except by rounding) nor those in best/:
locations, speed, memory, logs, checkpoints, limits, and everything after training. Only marked fields may change when a
run is resumed; they are not part of the name of a study's run."""

SHARED = mark("shared_by_chain")
"""Mark of fields that hold locations: their overrides apply to every recipe of a chain."""
