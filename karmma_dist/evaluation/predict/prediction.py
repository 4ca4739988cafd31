"""The predictions of a model for a clip: the most probable actions by each modality and by all together, printed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import chain, zip_longest
from typing import Any

import numpy as np

from karmma_dist.errors import UserError
from karmma_dist.evaluation.metrics import ranked
from karmma_dist.modalities import MODALITIES, letters
from karmma_dist.terminal import print_line, print_table


def print_predictions(predictions: list[Prediction]) -> None:
    """Print the modalities of each clip, and the most probable actions by each modality and by all together."""
    for prediction in predictions:
        print_line(f"{prediction.clip} ({prediction.seconds:g} s): {_found(prediction)}")
        if prediction.labels and None not in prediction.labels.values():
            print_line(f"labelled: {' '.join(str(name) for name in prediction.labels.values())}")
        headings = [heading for guess in prediction.guesses for heading in ("%", f"{letters(guess.modalities)} says")]
        columns = [list(map(_cells, guess.actions)) for guess in prediction.guesses]
        lines = zip_longest(*columns, fillvalue=["", ""])
        print_table(headings, [list(chain.from_iterable(line)) for line in lines], right=["%"], footer=[""])


def _found(prediction: Prediction) -> str:
    """Return the modalities in words: `found video (V), audio (A); no flow; switched off: detections`."""
    found = ", ".join(f"{name} ({MODALITIES[name].letter})" for name in prediction.found)
    parts = [f"found {found}", *(f"no {name}" for name in prediction.absent)]
    if prediction.switched_off:
        parts.append(f"switched off: {', '.join(prediction.switched_off)}")
    return "; ".join(parts)


def _cells(action: Action) -> list[str]:
    return [f"{100 * action.probability:.1f}", " ".join(action.names.values())]


NUM_ACTIONS = 5
"""Number of actions shown."""


@dataclass(frozen=True)
class Action:
    """One of the most probable actions."""

    names: dict[str, str]
    """Class name per head, e.g. {"verb": "take", "noun": "cup"}."""
    classes: dict[str, int]
    """Class per head."""
    probability: float
    """Probability of the action; for several heads the product of their probabilities."""


@dataclass(frozen=True)
class Guess:
    """The model's prediction from some of the modalities."""

    modalities: list[str]
    actions: list[Action]
    """Most probable actions, in descending order."""


@dataclass(frozen=True)
class Prediction:
    """All predictions for one clip."""

    clip: str
    """File or key, as the caller named it."""
    seconds: float
    """Length of the clip."""
    found: list[str]
    """Modalities of the model that the clip has and that are not switched off."""
    absent: list[str]
    """Modalities of the model that the clip lacks."""
    switched_off: list[str]
    """Modalities of the model that were not requested."""
    labels: dict[str, str | None]
    """True class name per head, from the shards; empty for a file."""
    guesses: list[Guess]
    """One guess per modality found and, for several modalities, a last one from all of them together."""

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object."""
        return asdict(self)


def likeliest(
    log_probs: Mapping[str, np.ndarray], classes: Mapping[str, list[str]], num: int = NUM_ACTIONS
) -> list[Action]:
    """Return the `num` most probable actions.

    Args:
        log_probs: Log-probabilities (C,) per head.
        classes: Class names per head; without names, actions show class numbers.
        num: Number of actions.

    Raises:
        UserError: a prediction is NaN.
    """
    heads = ranked(list(log_probs))["action"]
    sizes = [len(log_probs[head]) for head in heads]
    joint = np.zeros(())
    for head in heads:
        joint = joint[..., None] + np.asarray(log_probs[head])
    if bool(np.isnan(joint).any()):
        raise UserError("the model predicts nan: the weights diverged; use an earlier checkpoint")
    # A stable sort puts the lower class first among equals, as the evaluation's ranks do.
    places = np.argsort(-joint.flatten(), kind="stable")[:num]
    actions = []
    for place in places.tolist():
        numbers = [int(n) for n in np.unravel_index(place, sizes)]
        chosen = dict(zip(heads, numbers, strict=True))
        names = {head: classes[head][n] if classes.get(head) else str(n) for head, n in chosen.items()}
        actions.append(Action(names, chosen, float(np.float32(math.exp(np.float32(joint.flat[place]))))))
    return actions
