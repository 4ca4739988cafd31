"""The views of a clip: its frames, crop and colour jitter, as a function of (seed, epoch, key).

Video and flow share one `View`; audio windows are centred on the same moments.
"""

from __future__ import annotations

import numpy as np

from karmma_dist.modalities.contract import View
from karmma_dist.modalities.video import VideoInput
from karmma_dist.recipe import ViewsRecipe
from karmma_dist.seeding import view_draws
from karmma_dist.shards.format import ClipMetadata

_LAST = float(np.nextafter(1.0, 0.0))
"""Largest position of a crop; positions are fractions in [0, 1)."""


def training_view(video: VideoInput, num_stored: int, seed: int, epoch: int, key: str) -> View:
    """Draw a random view: a random frame in each segment (or a random dense window), random crop, flip and jitter.

    Args:
        video: The recipe's `inputs.video`.
        num_stored: Number of the clip's stored frames, used by dense sampling only. A clip without frames is sampled
            in segments.
        seed: Seed of the run.
        epoch: Epoch, counted from 0.
        key: Key of the clip.
    """
    draws = view_draws(6 + video.num_frames, seed, epoch, key)
    top, left, flip = draws[:3].tolist()
    jitter = 1 + video.jitter * (2 * draws[3:6] - 1)
    if video.sampling == "segments" or num_stored == 0:
        times = (np.arange(video.num_frames) + draws[6:]) / video.num_frames
    else:
        times = _dense_times(video, num_stored, float(draws[6]))
    return View(times, top, left, video.horizontal_flip and flip < 0.5, jitter.astype(np.float32))


def evaluation_view(video: VideoInput, num_stored: int) -> View:
    """Return the single view of evaluation: middle of each segment (or the middle window), centre crop, no jitter."""
    return evaluation_views(video, num_stored, ViewsRecipe(), is_wide=True)[0]


def evaluation_views(video: VideoInput, num_stored: int, views: ViewsRecipe, *, is_wide: bool) -> list[View]:
    """Return every evaluation view of a clip, sampling by sampling with all crops each, not jittered or mirrored.

    Sampling t of T takes each segment's frame at (t + 1/2) / T of the segment, or the dense window at that fraction of
    all its positions. The first of three crops lies at the start of the longer side and the last at its end.

    Args:
        video: The recipe's `inputs.video`.
        num_stored: Number of the clip's stored frames.
        views: Numbers of temporal samplings and spatial crops.
        is_wide: True if the longer side is the width.
    """
    sampled = []
    for sampling in range(views.temporal):
        place = (sampling + 0.5) / views.temporal
        if video.sampling == "segments" or num_stored == 0:
            times = (np.arange(video.num_frames) + place) / video.num_frames
        else:
            times = _dense_times(video, num_stored, place)
        for edge in (0.5,) if views.spatial == 1 else (0.0, 0.5, _LAST):
            top, left = (0.5, edge) if is_wide else (edge, 0.5)
            sampled.append(View(times, top, left, False, np.ones(3, dtype=np.float32)))
    return sampled


def num_stored_frames(metadata: ClipMetadata) -> int:
    """Return the number of a clip's stored frames, 0 if it has no pictures."""
    return 0 if metadata.pictures is None else metadata.pictures.num_frames


def _dense_times(video: VideoInput, num_stored: int, place: float) -> np.ndarray:
    """Return the frame centres of a window with a stride; a window longer than the clip repeats its last frame."""
    span = (video.num_frames - 1) * video.stride + 1
    start = int(place * (max(num_stored - span, 0) + 1))
    frames = np.minimum(start + np.arange(video.num_frames) * video.stride, num_stored - 1)
    return (frames + 0.5) / num_stored
