"""How many random cases a test makes: seconds of them in the suite, many more in `tests/benchmarks/fuzzing.py`."""

from __future__ import annotations

import os

VARIABLE = "KARMMA_DIST_FUZZING"
"""Environment variable with the factor of the long form."""


def cases(num: int) -> range:
    """Return the seeds of `num` cases, or of as many times more as the environment asks for."""
    return range(num * int(os.environ.get(VARIABLE, "1")))
