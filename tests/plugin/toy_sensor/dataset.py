"""The reader `kinetics_like`: a CSV of label and clip name per split, a folder of media per label."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from karmma_dist.modalities.recording import ClipRecord, MediaFile, Recording
from karmma_dist.packing.readers import Reader
from karmma_dist.packing.records import Plan
from karmma_dist.settings import Settings


class KineticsPaths(Settings):
    splits: list[str] = ["train", "validation"]


def read(spec: Any) -> Plan:
    raw, recordings, labels, rows = Path(spec.raw), [], {}, []
    for split in spec.kinetics_like.splits:
        with open(raw / f"{split}.csv", newline="") as file:
            rows += [(split, row) for row in csv.DictReader(file)]
    labels = {label: number for number, label in enumerate(sorted({row["label"] for _, row in rows}))}
    for split, row in rows:
        clip = ClipRecord(row["youtube_id"], split, 0.0, None, {"action": labels[row["label"]]})
        place = raw / split / row["label"] / row["youtube_id"]
        video, toy = place.with_suffix(".mp4"), place.with_suffix(".npy")
        media = {"toy": MediaFile(toy)} if toy.is_file() else {}
        recordings.append(Recording(clip.key, "", (clip,), video if video.is_file() else None, media=media))
    return Plan(tuple(recordings), {"action": list(labels)}, tuple(spec.kinetics_like.splits))


KINETICS_LIKE = Reader(KineticsPaths, read, ("video", "flow", "audio"), takes_participants=False)
