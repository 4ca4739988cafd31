"""The table of all modalities: one folder each, and those that other packages add (`karmma_dist.modalities`).

Other packages add a modality by an entry point of that group. All code iterates over modalities in the order of the
dataset's own list, which is a sub-sequence of :data:`MODALITIES`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from karmma_dist.errors import UserError, nearest
from karmma_dist.modalities.audio import AUDIO
from karmma_dist.modalities.contract import (
    ArraysBreaker,
    ArrayType,
    Breakage,
    Breaker,
    DecodeError,
    Decoder,
    Description,
    Drawing,
    Modality,
    Pictures,
    Sheet,
    SignalBreaker,
    StoredError,
    TensorMaker,
    View,
)
from karmma_dist.modalities.detections import DETECTIONS
from karmma_dist.modalities.flow import FLOW
from karmma_dist.modalities.signal import SIGNAL
from karmma_dist.modalities.video import VIDEO
from karmma_dist.plugins import with_plugins

__all__ = [
    "LETTERS", "MODALITIES", "ArrayType", "ArraysBreaker", "Breakage", "Breaker", "DecodeError", "Decoder",
    "Description", "Drawing", "Modality", "Pictures", "Sheet", "SignalBreaker", "StoredError", "TensorMaker", "View",
    "letters", "parse_modalities", "subsets",
]  # fmt: skip


def _table() -> dict[str, Modality]:
    own = {modality.name: modality for modality in (VIDEO, FLOW, AUDIO, DETECTIONS, SIGNAL)}
    table = with_plugins(own, "karmma_dist.modalities", Modality)
    for first, second in itertools.combinations(table.values(), 2):
        for name in ("letter", "member"):
            value = getattr(second, name)
            if getattr(first, name) == value:
                raise UserError(
                    f"modality '{second.name}': its {name} '{value}' is taken by '{first.name}': choose another"
                )
    return table


MODALITIES: dict[str, Modality] = _table()

LETTERS: dict[str, str] = {m.letter: m.name for m in MODALITIES.values()}


def parse_modalities(text: str, available: Sequence[str]) -> tuple[str, ...]:
    """Turn `V,F` or `video,flow` into names, in the order of `available`.

    Raises:
        UserError: a letter or name is unknown, a modality is not in `available`, or `text` names no modality.
    """
    names = set()
    for part in (p.strip() for p in text.split(",")):
        if not part:
            continue
        name = LETTERS.get(part.upper(), part.lower())
        if name not in MODALITIES:
            known = ", ".join(f"{m.letter} ({m.name})" for m in MODALITIES.values())
            raise UserError(f"unknown modality '{part}'{nearest(part, list(MODALITIES))}; known are {known}")
        if name not in available:
            raise UserError(f"modality '{name}' is not one of this model's: {', '.join(available)}")
        names.add(name)
    if not names:
        raise UserError("no modality given: name at least one, for example V,F")
    return tuple(name for name in available if name in names)


def letters(modalities: Iterable[str]) -> str:
    """Return the letters of modalities for tables and plots: `"V+A"` for `("video", "audio")`."""
    return "+".join(MODALITIES[name].letter for name in modalities)


def subsets(modalities: Sequence[str]) -> list[tuple[str, ...]]:
    """Return all 2^M - 1 non-empty subsets, smallest first, each in the order of `modalities`."""
    return [
        subset for size in range(1, len(modalities) + 1) for subset in itertools.combinations(modalities, size)
    ]
