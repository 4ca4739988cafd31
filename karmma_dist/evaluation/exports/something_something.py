"""Predictions in the format of Something-Something V2's test leaderboard: one line per clip, `id;c1;c2;c3;c4;c5`.

The file has no header. A line holds the clip's id and the numbers of its five most probable classes, the most probable
first, separated by semicolons. The numbers are those of `labels.json`, which equal the class ids of the shards. The
test scripts of published models write this format (https://github.com/mit-han-lab/temporal-shift-module,
test_models.py --csv_file).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from karmma_dist.errors import UserError
from karmma_dist.io.files import write_whole

NUM_LABELS = 5
"""Number of classes listed per clip."""


def check_heads(heads: dict[str, int], path: Path) -> None:
    """Check, before anything is computed, that a model's predictions fit the format.

    Raises:
        UserError: the model does not have exactly one head, the head has fewer than five classes, or `path` does not
            end in `.csv`.
    """
    where = f"--submission something-something {path}"
    if path.suffix != ".csv":
        raise UserError(f"{where}: name a file that ends in .csv")
    if len(heads) != 1 or next(iter(heads.values())) < NUM_LABELS:
        listed = ", ".join(f"{head} {num}" for head, num in heads.items())
        raise UserError(f"{where}: the format needs one head of at least {NUM_LABELS} classes; this model has {listed}")


def write_submission(path: Path, ids: list[str], log_probs: dict[str, np.ndarray]) -> None:
    """Write the CSV, whole or not at all.

    Args:
        path: File that ends in `.csv`.
        ids: N clip keys, which are the ids of the videos.
        log_probs: Log-probabilities of the only head, float32 (N, C). Equal values are ordered by class.

    Raises:
        UserError: see `check_heads`.
    """
    check_heads({head: values.shape[1] for head, values in log_probs.items()}, path)
    (values_NC,) = log_probs.values()
    best_N5 = np.argsort(-values_NC, axis=1, kind="stable")[:, :NUM_LABELS]
    lines = [";".join([key, *map(str, best)]) for key, best in zip(ids, best_N5.tolist(), strict=True)]
    write_whole(path, "".join(f"{line}\n" for line in lines).encode())
