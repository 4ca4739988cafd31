"""Predictions in the format of Something-Something V2's test leaderboard: one line per clip, `id;c1;c2;c3;c4;c5`.

No header; the clip's id, then the numbers of its five most probable classes, the most probable first, separated by
semicolons. Numbers are those of `labels.json`, which are the shards' class ids. Format as written by the published
models' test scripts (https://github.com/mit-han-lab/temporal-shift-module, test_models.py --csv_file).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from karmma_dist.errors import UserError
from karmma_dist.io.files import write_whole

NUM_LABELS = 5
"""Classes per clip."""


def check_heads(heads: dict[str, int], path: Path) -> None:
    """Check, before anything is computed, that a model's predictions fit the format.

    Raises:
        UserError: not one head of at least five classes, or `path` is no `.csv`.
    """
    where = f"--submission something-something {path}"
    if path.suffix != ".csv":
        raise UserError(f"{where}: name a file that ends in .csv")
    if len(heads) != 1 or next(iter(heads.values())) < NUM_LABELS:
        said = ", ".join(f"{head} {num}" for head, num in heads.items())
        raise UserError(f"{where}: it takes one head of at least {NUM_LABELS} classes; this model has {said}")


def write_submission(path: Path, ids: list[str], log_probs: dict[str, np.ndarray]) -> None:
    """Write the CSV, whole or not at all.

    Args:
        path: ends in `.csv`.
        ids: N clip keys, which are the videos' ids.
        log_probs: the one head's, float32 (N, C). Equal ones are ordered by class.

    Raises:
        UserError: as `check_heads`.
    """
    check_heads({head: values.shape[1] for head, values in log_probs.items()}, path)
    (values_NC,) = log_probs.values()
    best_N5 = np.argsort(-values_NC, axis=1, kind="stable")[:, :NUM_LABELS]
    lines = [";".join([key, *map(str, best)]) for key, best in zip(ids, best_N5.tolist(), strict=True)]
    write_whole(path, "".join(f"{line}\n" for line in lines).encode())
