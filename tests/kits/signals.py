"""Signals of recordings as CSV files, and their specification."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from karmma_dist.modalities.signal import SignalSpec, TrackSpec
from karmma_dist.modalities.signal.member import Channel, SignalMember, Track

FORCE = {"name": "force", "unit": "N", "word": "force"}
TILT = {"name": "tilt", "unit": "deg", "word": "angle"}
TRACK: dict[str, Any] = {"file": "signals/{recording}.csv", "channels": [FORCE, TILT]}
SECTION: dict[str, Any] = {"tracks": [TRACK]}


def track_spec(**fields: Any) -> TrackSpec:
    return TrackSpec.model_validate(TRACK | fields)


def signal_spec(**fields: Any) -> SignalSpec:
    return SignalSpec.model_validate(SECTION | fields)


def write_csv(path: Path, rows: Sequence[Sequence[Any]], header: str = "time,force,tilt") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n")
    return path


def ramp(start_s: float, stop_s: float, rate_hz: float = 50) -> list[tuple[float, float, float]]:
    """Return rows of moments, a force that counts ten per second, and a tilt that falls by one per second."""
    numbers = np.arange(round(start_s * rate_hz), round(stop_s * rate_hz) + 1)
    return [(t, round(10 * t, 6), round(-t, 6)) for t in np.round(numbers / rate_hz, 6).tolist()]


def member_of(*tracks: tuple[Sequence[float], Sequence[Sequence[float]]], start_s: float = 0.0) -> SignalMember:
    """Return a member of tracks of (moments, samples per channel), which models receive as they are."""
    made = []
    for times, values in tracks:
        channels = tuple(Channel(f"c{number}", "u", "word", 0.0, 1.0) for number in range(len(values)))
        made.append(Track(channels, 1.0, np.array(times, float), np.array(values, float)))
    span_s = max(times[-1] for times, _ in tracks) - start_s
    return SignalMember(start_s, span_s, tuple(made))


def recorded(member: SignalMember) -> dict[str, Any]:
    """Return the description that packing gives a member."""
    names = ", ".join(f"{channel.name} [{channel.unit}]" for channel in member.channels)
    sizes = {"num_channels": len(member.channels), "num_samples": member.num_samples}
    return {**sizes, "span_s": member.span_s, "channels": names}


