"""Predictions in the formats of the Epic-Kitchens-100 action recognition challenge (C1).

Formats: https://github.com/epic-kitchens/C1-Action-Recognition (README, "Result data formats" and submission files).

* `PATH.zip`: the submission to the leaderboard, a zip with the member `test.json`:
  {"version": "0.2", "challenge": "action_recognition", "sls_pt": 0..5, "sls_tl": 0..5, "sls_td": 0..5,
  "results": {narration_id: {"verb": {"0": score, ...}, "noun": {"0": score, ...}, "action": {"v,n": score, ...}}}}.
  Actions may be left out for all segments; otherwise each segment has exactly 100. The leaderboard applies a softmax to
  verb and noun scores, so these are log-probabilities: their softmax is the model's probability. Action scores are only
  ranked; they are the probability of the pair.
* `PATH.pkl`: the input of the official `evaluate.py` and `create_submission.py`, a pickled
  {"verb_output": float32 (N, 97), "noun_output": float32 (N, 300), "narration_id": str (N,)}.

The key of a clip is its narration id.
"""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from karmma_dist.errors import UserError
from karmma_dist.io.files import write_whole

NUM_CLASSES = {"verb": 97, "noun": 300}
"""Number of classes of Epic-Kitchens-100, per head."""

NUM_ACTIONS = 100
"""Number of actions listed per segment."""

_MEMBER = "test.json"


@dataclass(frozen=True)
class SupervisionLevels:
    """Supervision levels of the submitted model, each from 0 to 5 (https://github.com/epic-kitchens/sls)."""

    pretraining: int = 2
    """`sls_pt`: 2 = public images and videos."""
    training_labels: int = 3
    """`sls_tl`: 3 = full supervision in time."""
    training_data: int = 3
    """`sls_td`: 3 = the training split."""


def parse_levels(text: str) -> SupervisionLevels:
    """Read `--sls pt,tl,td`, e.g. `"2,3,3"`.

    Raises:
        UserError: the text is not three numbers from 0 to 5.
    """
    parts = text.split(",")
    if len(parts) != 3 or not all(part.strip() in tuple("012345") for part in parts):
        raise UserError(f"--sls '{text}': give three levels from 0 to 5, pretraining,labels,data, e.g. 2,3,3")
    return SupervisionLevels(*(int(part) for part in parts))


def check_heads(heads: dict[str, int], path: Path) -> None:
    """Check, before anything is computed, that a model's predictions fit the format that `path` names.

    Raises:
        UserError: the head verb or noun is missing, the suffix is unknown, or the number of classes differs from the
            challenge's (zip only).
    """
    where = f"--submission epic-kitchens {path}"
    if path.suffix not in (".zip", ".pkl"):
        raise UserError(f"{where}: name a .zip for the leaderboard, or a .pkl for the official evaluate.py")
    listed = ", ".join(f"{head} {num}" for head, num in heads.items())
    if not set(NUM_CLASSES) <= set(heads):
        raise UserError(f"{where}: the format needs the heads verb and noun; this model's heads are {listed}")
    if path.suffix == ".zip" and any(heads[head] != num for head, num in NUM_CLASSES.items()):
        raise UserError(f"{where}: the challenge has verb 97, noun 300; this model has {listed}: name a .pkl instead")


def write_submission(
    path: Path, narration_ids: list[str], log_probs: dict[str, np.ndarray], levels: SupervisionLevels
) -> None:
    """Write the leaderboard's zip or the evaluator's pickle, whole or not at all.

    Args:
        path: File that ends in `.zip` or `.pkl`.
        narration_ids: N clip keys.
        log_probs: Log-probabilities for "verb" and "noun", float32 (N, C).
        levels: Supervision levels, written into the zip.

    Raises:
        UserError: see `check_heads`.
    """
    check_heads({head: values.shape[1] for head, values in log_probs.items()}, path)
    if path.suffix == ".zip":
        write_whole(path, lambda temporary: _write_zip(temporary, narration_ids, log_probs, levels))
    else:
        outputs = {f"{head}_output": log_probs[head] for head in NUM_CLASSES}
        write_whole(path, portable_pickle({**outputs, "narration_id": np.array(narration_ids)}))


def _write_zip(
    path: Path, narration_ids: list[str], log_probs: dict[str, np.ndarray], levels: SupervisionLevels
) -> None:
    """Write the zip segment by segment: as one object, the scores of 13,092 test segments would take gigabytes."""
    head = {
        "version": "0.2",
        "challenge": "action_recognition",
        "sls_pt": levels.pretraining,
        "sls_tl": levels.training_labels,
        "sls_td": levels.training_data,
    }
    with (
        zipfile.ZipFile(path, "w", compression=zipfile.ZIP_DEFLATED) as archive,
        archive.open(_MEMBER, "w", force_zip64=True) as member,
        io.TextIOWrapper(member, encoding="utf-8") as text,
    ):
        text.write(json.dumps(head)[:-1] + ', "results": {')
        segments = zip(narration_ids, log_probs["verb"], log_probs["noun"], strict=True)
        for number, (narration_id, verb_C, noun_C) in enumerate(segments):
            separator = ", " if number else ""
            text.write(f"{separator}{json.dumps(narration_id)}: {json.dumps(_segment(verb_C, noun_C))}")
        text.write("}}")


def _segment(verb_C: np.ndarray, noun_C: np.ndarray) -> dict[str, dict[str, float]]:
    joint_VN = verb_C.astype(np.float64)[:, None] + noun_C.astype(np.float64)
    best = np.argsort(-joint_VN, axis=None, kind="stable")[:NUM_ACTIONS]
    pairs = zip(*(place.tolist() for place in np.unravel_index(best, joint_VN.shape)), strict=True)
    scores = np.exp(joint_VN.reshape(-1)[best]).tolist()
    return {
        "verb": {str(number): score for number, score in enumerate(verb_C.tolist())},
        "noun": {str(number): score for number, score in enumerate(noun_C.tolist())},
        "action": {f"{verb},{noun}": score for (verb, noun), score in zip(pairs, scores, strict=True)},
    }


class _PortablePickler(pickle.Pickler):
    """A pickler whose files any numpy can read: they refer to `numpy.ndarray`, not to modules that numpy 2 moved."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, np.ndarray):
            array = np.ascontiguousarray(value)
            return np.ndarray, (array.shape, array.dtype.str, bytearray(array.tobytes()))
        return NotImplemented


def portable_pickle(value: Any) -> bytes:
    """Pickle dicts, strings and arrays so that old and new numpy versions can read them."""
    content = io.BytesIO()
    _PortablePickler(content, protocol=4).dump(value)
    return content.getvalue()
