"""Predictions per clip: collected during the only pass over the clips, written as one `.npz` (or Parquet) file.

A clip has at most 2^M - 1 distinct masks, whatever the number of conditions. Each of these predictions is stored once,
and every condition refers to its prediction. For 9,644 clips, 3 modalities and 97 + 300 classes this takes 107 MB in
memory and on disk (twice that in memory while sorting); a copy per condition (34 of them) would take 520 MB.

Predictions are made with intact sensors only; conditions with a broken sensor have rows but no predictions.

Arrays of the `.npz`, all plain (`numpy.load` with `allow_pickle=False`); N clips in the order of their keys, K
conditions, M modalities, R pairs of a clip and a mask, C classes:

    keys                (N,)  str       clip key
    modalities          (M,)  str       order of every M and of the mask's bits
    present             (N, M) bool     the dataset has the modality
    label_HEAD          (N,)  int64     class, -1 = unlabelled
    condition_modalities (K, M) bool    the condition names the modality
    condition_drop_prob (K,)  float64
    condition_seed      (K,)  int64
    condition_missing   (K,)  str       modality that a share of the clips lacks, such as "audio:0.5"; "" = none
    prediction          (N, K) int64    row of the arrays below, -1 = the clip has none of the condition's modalities
    clip                (R,)  int64     row of `keys`
    mask                (R,)  uint8     bit m set = modality m was used
    log_probs_HEAD      (R, C) float32  natural logarithm of the class probabilities

    log_probs_BC = file["log_probs_verb"][file["prediction"][:, k]]    # condition k, where prediction >= 0

Parquet (`pip install 'karmma-dist[parquet]'`) has one self-contained row per clip and mask, in the same order. Clips
without a prediction are only in the `.npz`:

    key             string
    present         list<string>    modalities of the clip in the dataset
    modalities      list<string>    modalities that were used: the mask
    conditions      list<struct<modalities: list<string>, drop_prob: double, seed: int64, missing: string>>
                                    all conditions that leave the clip with this mask
    label_HEAD      int64           class, -1 = unlabelled
    log_probs_HEAD  fixed_size_list<float>[C]

    frame = pandas.read_parquet(path).explode("conditions")            # one row per clip and condition
    half = frame[frame.conditions.map(lambda c: c["drop_prob"] == 0.5 and c["seed"] == 0)]
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from karmma_dist.errors import UserError
from karmma_dist.evaluation.conditions import Condition
from karmma_dist.io.files import write_whole


@dataclass(frozen=True)
class Predictions:
    """All predictions of one evaluation; the fields are the arrays that the module describes."""

    modalities: list[str]
    conditions: list[Condition]
    keys: list[str]
    present_NM: np.ndarray
    labels: dict[str, np.ndarray]
    prediction_NK: np.ndarray
    clip_R: np.ndarray
    mask_R: np.ndarray
    log_probs: dict[str, np.ndarray]

    def of_condition(self, number: int) -> tuple[list[str], dict[str, np.ndarray]]:
        """Return keys and log-probabilities, float32 (B, C) per head, of the clips shown under condition `number`."""
        rows_N = self.prediction_NK[:, number]
        shown_N = rows_N >= 0
        keys = list(itertools.compress(self.keys, shown_N))
        return keys, {head: values[rows_N[shown_N]] for head, values in self.log_probs.items()}


@dataclass(frozen=True)
class _Part:
    """The predictions of one batch, each distinct mask of a clip once."""

    keys: list[str]
    present_BM: np.ndarray
    labels: dict[str, np.ndarray]
    masks_BK: np.ndarray
    clip_R: np.ndarray
    mask_R: np.ndarray
    log_probs: dict[str, np.ndarray]


class PredictionCollector:
    """Collector of one evaluation's predictions, batch by batch in any order; `gather` joins those of several ranks."""

    def __init__(self, modalities: Sequence[str], conditions: Sequence[Condition]) -> None:
        self.modalities, self.conditions = list(modalities), list(conditions)
        self._parts: list[_Part] = []

    def add(
        self,
        keys: Sequence[str],
        present_BM: np.ndarray,
        labels: Mapping[str, np.ndarray],
        masks_BK: np.ndarray,
        masks_BP: np.ndarray,
        log_probs: Mapping[str, np.ndarray],
    ) -> None:
        """Keep one batch's predictions.

        Args:
            keys: B clip keys.
            present_BM: bool, True = the dataset has the modality.
            labels: int64 (B,) per head, -1 = unlabelled.
            masks_BK: Mask under every condition, 0 = the clip has none of its modalities.
            masks_BP: Mask in every pass of the fusion block, 0 = no pass; a mask may occur twice.
            log_probs: Log-probabilities (B, P, C) per head.
        """
        first_BP = masks_BP > 0
        for column in range(1, masks_BP.shape[1]):
            first_BP[:, column] &= (masks_BP[:, :column] != masks_BP[:, column : column + 1]).all(axis=1)
        clip_R, pass_R = np.nonzero(first_BP)
        kept = {head: values[clip_R, pass_R].astype(np.float32) for head, values in log_probs.items()}
        mask_R = masks_BP[clip_R, pass_R]
        self._parts.append(_Part(list(keys), present_BM, dict(labels), masks_BK, clip_R, mask_R, kept))

    def gather(self, gather: Callable[[list[Any]], list[Any]]) -> None:
        """Take over the predictions of all ranks, which have no clip in common. Every rank must call this.

        Args:
            gather: Function that returns the concatenated lists of all ranks.
        """
        self._parts = gather(self._parts)

    def finish(self) -> Predictions:
        """Return all predictions, sorted by clip key and then by mask.

        Raises:
            UserError: no prediction was added.
        """
        parts = self._parts
        keys = [key for part in parts for key in part.keys]
        if not keys:
            raise UserError("no clip to predict: the split is empty or none of its clips can be read")
        order_N = np.argsort(np.array(keys), kind="stable")
        place_N = np.empty_like(order_N)
        place_N[order_N] = np.arange(len(keys))
        starts = np.cumsum([0, *(len(part.keys) for part in parts)])
        clip_R = np.concatenate([place_N[part.clip_R + start] for part, start in zip(parts, starts, strict=False)])
        mask_R = np.concatenate([part.mask_R for part in parts]).astype(np.uint8)
        order_R = np.lexsort((mask_R, clip_R))
        clip_R, mask_R = clip_R[order_R], mask_R[order_R]
        masks_NK = np.concatenate([part.masks_BK for part in parts])[order_N].astype(np.int64)
        wanted_NK = np.arange(len(keys))[:, None] * 256 + masks_NK
        row_NK = np.searchsorted(clip_R * 256 + mask_R, wanted_NK)
        heads = list(parts[0].labels)
        return Predictions(
            modalities=self.modalities,
            conditions=self.conditions,
            keys=[keys[place] for place in order_N],
            present_NM=np.concatenate([part.present_BM for part in parts])[order_N],
            labels={head: np.concatenate([part.labels[head] for part in parts])[order_N] for head in heads},
            prediction_NK=np.where(masks_NK > 0, row_NK, -1),
            clip_R=clip_R,
            mask_R=mask_R,
            log_probs={head: np.concatenate([part.log_probs[head] for part in parts])[order_R] for head in heads},
        )


def check_path(path: Path) -> None:
    """Check, before anything is computed, that predictions can be written to `path`.

    Raises:
        UserError: the suffix is neither `.npz` nor `.parquet`, pyarrow is needed but cannot be imported, or the folder
            is missing.
    """
    if path.suffix not in (".npz", ".parquet"):
        raise UserError(f"--predictions {path}: name a file that ends in .npz or .parquet")
    if path.suffix == ".parquet":
        try:
            importlib.import_module("pyarrow.parquet")
        except ImportError:
            advice = "pip install 'karmma-dist[parquet]', or name a .npz"
            message = f"--predictions {path}: Parquet needs pyarrow, which cannot be imported: {advice}"
            raise UserError(message) from None
    if not path.absolute().parent.is_dir():
        raise UserError(f"--predictions {path}: no folder {path.parent}: create it first")


def write_predictions(predictions: Predictions, path: Path) -> None:
    """Write the file, whole or not at all.

    Raises:
        UserError: see `check_path`.
    """
    check_path(path)
    write = _write_npz if path.suffix == ".npz" else _write_parquet
    write_whole(path, lambda temporary: write(predictions, temporary))


def _write_npz(predictions: Predictions, path: Path) -> None:
    conditions = predictions.conditions
    arrays: dict[str, Any] = {
        "keys": np.array(predictions.keys),
        "modalities": np.array(predictions.modalities),
        "present": predictions.present_NM,
        "condition_modalities": np.array([[m in c.modalities for m in predictions.modalities] for c in conditions]),
        "condition_drop_prob": np.array([condition.drop_prob for condition in conditions], dtype=np.float64),
        "condition_seed": np.array([condition.seed for condition in conditions], dtype=np.int64),
        "condition_missing": np.array([condition.missing or "" for condition in conditions]),
        "prediction": predictions.prediction_NK,
        "clip": predictions.clip_R,
        "mask": predictions.mask_R,
    }
    arrays |= {f"label_{head}": labels_N for head, labels_N in predictions.labels.items()}
    arrays |= {f"log_probs_{head}": values_RC for head, values_RC in predictions.log_probs.items()}
    with open(path, "wb") as file:
        np.savez(file, **arrays)


def _write_parquet(predictions: Predictions, path: Path) -> None:
    pyarrow, parquet = (importlib.import_module(name) for name in ("pyarrow", "pyarrow.parquet"))
    names, texts = predictions.modalities, pyarrow.list_(pyarrow.string())
    condition = pyarrow.struct(
        [("modalities", texts), ("drop_prob", pyarrow.float64()), ("seed", pyarrow.int64()),
         ("missing", pyarrow.string())]
    )  # fmt: skip
    used = [[m for bit, m in enumerate(names) if mask >> bit & 1] for mask in predictions.mask_R.tolist()]
    present = [list(itertools.compress(names, present_M)) for present_M in predictions.present_NM]
    columns = {
        "key": [predictions.keys[clip] for clip in predictions.clip_R],
        "present": pyarrow.array([present[clip] for clip in predictions.clip_R], texts),
        "modalities": pyarrow.array(used, texts),
        "conditions": pyarrow.array(_conditions_of_rows(predictions), pyarrow.list_(condition)),
    }
    columns |= {f"label_{head}": labels_N[predictions.clip_R] for head, labels_N in predictions.labels.items()}
    for head, values_RC in predictions.log_probs.items():
        flat = pyarrow.array(values_RC.reshape(-1))
        columns[f"log_probs_{head}"] = pyarrow.FixedSizeListArray.from_arrays(flat, values_RC.shape[1])
    parquet.write_table(pyarrow.table(columns), path)


def _conditions_of_rows(predictions: Predictions) -> list[list[dict[str, Any]]]:
    """Return the conditions that refer to each of the R predictions."""
    described = [
        {"modalities": list(condition.modalities), "drop_prob": condition.drop_prob, "seed": condition.seed,
         "missing": condition.missing}
        for condition in predictions.conditions
    ]
    conditions: list[list[dict[str, Any]]] = [[] for _ in predictions.clip_R]
    for rows_K in predictions.prediction_NK.tolist():
        for condition, row in zip(described, rows_K, strict=True):
            if row >= 0:
                conditions[row].append(condition)
    return conditions
