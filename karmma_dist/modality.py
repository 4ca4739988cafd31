"""The one table of modalities: what each is called, its letter on the command line, and how it is stored.

Everything that iterates over modalities does so in the order of a dataset's own list, which is a
sub-sequence of :data:`MODALITIES`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from karmma_dist.errors import UserError, nearest


@dataclass(frozen=True)
class Modality:
    """One kind of sensor signal."""

    name: str
    """Name in recipes, manifests and batches."""
    letter: str
    """Letter on the command line and in tables (`--modalities V,F`)."""
    member: str
    """Suffix of the clip's member in the tar: `KEY.<member>`."""
    layout: str
    """Array a model receives, N present clips."""


MODALITIES: dict[str, Modality] = {
    m.name: m
    for m in (
        Modality("video", "V", "video.mp4", "float (N, 3, frames, height, width), ImageNet-normalised RGB"),
        Modality("flow", "F", "flow.mp4", "float (N, 3, frames, height, width): u, v, 0, by inputs.video.flow_scale"),
        Modality("audio", "A", "audio.flac", "float (N, windows, mels, time), normalised dB"),
        Modality("detections", "D", "detections.json", "float (N, frames, boxes, 6): x0 y0 x1 y1 category score"),
    )
}

LETTERS: dict[str, str] = {m.letter: m.name for m in MODALITIES.values()}


def parse_modalities(text: str, available: Sequence[str]) -> tuple[str, ...]:
    """Turn `V,F` or `video,flow` into names, in the order of `available`.

    Raises:
        UserError: an unknown letter or name, one that `available` lacks, or none at all.
    """
    names = set()
    for part in (p.strip() for p in text.split(",")):
        if not part:
            continue
        name = LETTERS.get(part.upper(), part.lower())
        if name not in MODALITIES:
            known = ", ".join(f"{m.letter} ({m.name})" for m in MODALITIES.values())
            raise UserError(f"unknown modality '{part}'{nearest(part, list(MODALITIES))}; there are {known}")
        if name not in available:
            raise UserError(f"modality '{name}' is not one of this model's: {', '.join(available)}")
        names.add(name)
    if not names:
        raise UserError("no modality given: name at least one, for example V,F")
    return tuple(name for name in available if name in names)


def letters(modalities: Iterable[str]) -> str:
    """`("video", "audio")` -> `"V+A"`, for tables and plots."""
    return "+".join(MODALITIES[name].letter for name in modalities)


def subsets(modalities: Sequence[str]) -> list[tuple[str, ...]]:
    """All 2^M - 1 non-empty subsets, smallest first, each in the order of `modalities`."""
    return [
        subset for size in range(1, len(modalities) + 1) for subset in itertools.combinations(modalities, size)
    ]
