"""Tests of views and spectrograms: frames and crops are functions of (seed, epoch, key)."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from karmma_dist.modalities.audio import AudioInput
from karmma_dist.modalities.audio.tensor import HOP, SAMPLE_RATE, mel_filters, mel_spectrogram
from karmma_dist.modalities.video import VideoInput
from karmma_dist.streaming.views import evaluation_view, training_view


@given(st.integers(1, 40), st.integers(0, 9), st.text("abc_0", min_size=1))
def test_one_frame_comes_from_each_segment(num_frames: int, epoch: int, key: str) -> None:
    video = VideoInput(num_frames=num_frames)
    for view in (training_view(video, 50, 0, epoch, key), evaluation_view(video, 50)):
        assert (np.floor(view.times_F * num_frames) == np.arange(num_frames)).all()


@given(st.integers(1, 100), st.integers(1, 4), st.integers(0, 100))
def test_a_dense_window_keeps_its_stride_inside_the_clip(stored: int, stride: int, epoch: int) -> None:
    video = VideoInput(num_frames=8, sampling="dense", stride=stride)
    frames = (training_view(video, stored, 0, epoch, "k").times_F * stored).astype(int)
    assert frames.min() >= 0
    assert frames.max() < stored
    if stored >= 7 * stride + 1:
        assert (np.diff(frames) == stride).all()


def test_a_view_depends_on_seed_epoch_and_key_only() -> None:
    video = VideoInput()
    same = [training_view(video, 90, 1, 2, "P01_01_3") for _ in range(2)]
    assert (same[0].times_F == same[1].times_F).all()
    assert same[0].left == same[1].left
    changed = ((2, 2, "P01_01_3"), (1, 3, "P01_01_3"), (1, 2, "P01_01_4"))
    others = [training_view(video, 90, *arguments) for arguments in changed]
    assert len({other.left for other in others} | {same[0].left}) == 4


def largest_gap(values: np.ndarray) -> float:
    """Return the Kolmogorov distance of `values` to the uniform distribution over [0, 1)."""
    steps = np.arange(len(values) + 1) / len(values)
    ordered = np.sort(values)
    return float(max((ordered - steps[:-1]).max(), (steps[1:] - ordered).max()))


def test_training_moments_are_uniform_and_independent_in_each_segment() -> None:
    video = VideoInput(num_frames=4)
    inside_KF = np.stack([training_view(video, 90, 0, 0, f"key_{k}").times_F * 4 % 1 for k in range(2000)])
    assert max(largest_gap(column) for column in inside_KF.T) < 0.04
    assert np.abs(np.corrcoef(inside_KF.T) - np.eye(4)).max() < 0.08


def test_crops_dense_windows_and_jitter_are_uniform() -> None:
    video = VideoInput(num_frames=4, stride=2, sampling="dense", jitter=0.3)
    views = [training_view(video, 17, 5, epoch, "key") for epoch in range(2200)]
    assert max(largest_gap(np.array([getattr(view, edge) for view in views])) for edge in ("top", "left")) < 0.04
    starts = np.bincount([int(view.times_F[0] * 17) for view in views])
    assert len(starts) == 11
    assert starts.min() > 140
    assert starts.max() < 260
    jitter = np.stack([view.jitter_3 for view in views])
    assert largest_gap((jitter.reshape(-1) - 0.7) / 0.6) < 0.03


@given(st.integers(1, 40), st.integers(1, 300))
def test_evaluation_takes_the_middle_of_segments_and_picture(num_frames: int, stored: int) -> None:
    view = evaluation_view(VideoInput(num_frames=num_frames, horizontal_flip=True), stored)
    np.testing.assert_allclose(view.times_F, (np.arange(num_frames) + 0.5) / num_frames)
    assert (view.top, view.left, view.flip) == (0.5, 0.5, False)
    assert (view.jitter_3 == 1).all()


def test_dense_evaluation_takes_the_middle_of_the_clip() -> None:
    view = evaluation_view(VideoInput(num_frames=5, stride=3, sampling="dense"), 33)
    assert (view.times_F * 33).astype(int).tolist() == [10, 13, 16, 19, 22]


def test_a_clip_without_pictures_is_sampled_in_segments() -> None:
    video = VideoInput(num_frames=8, sampling="dense")
    for view in (training_view(video, 0, 0, 0, "k"), evaluation_view(video, 0)):
        assert (np.floor(view.times_F * 8) == np.arange(8)).all()


def test_another_process_has_the_same_view() -> None:
    script = (
        "from karmma_dist.modalities.video import VideoInput; from karmma_dist.streaming.views import training_view;"
        "print(repr(training_view(VideoInput(num_frames=3, horizontal_flip=True), 50, 7, 3, 'P01_01_3')))"
    )
    expected = repr(training_view(VideoInput(num_frames=3, horizontal_flip=True), 50, 7, 3, "P01_01_3"))
    environment = os.environ | {"PYTHONHASHSEED": "17"}
    other = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert other.stdout.strip() == expected


def test_only_recipes_with_horizontal_flip_mirror_clips() -> None:
    flips = [training_view(VideoInput(horizontal_flip=True), 9, 0, epoch, "k").flip for epoch in range(200)]
    assert 60 < sum(flips) < 140
    assert not any(training_view(VideoInput(), 9, 0, epoch, "k").flip for epoch in range(50))


def test_a_tone_is_brightest_in_its_mel_band() -> None:
    num_mels = 64
    filters = mel_filters(num_mels)
    for frequency in (500, 1500, 4000):
        tone = torch.sin(2 * torch.pi * frequency * torch.arange(SAMPLE_RATE) / SAMPLE_RATE)[None, None]
        brightest = int(mel_spectrogram(tone, num_mels)[0, 0].mean(dim=1).argmax())
        centre = int(filters[:, brightest].argmax()) * SAMPLE_RATE / 1024
        assert abs(centre - frequency) < 0.12 * frequency


def test_the_spectrogram_has_the_papers_shape_for_any_dtype() -> None:
    audio = AudioInput()
    windows = (torch.randn(2, 3, audio.window_samples) * 3000).to(torch.int16)
    mels = mel_spectrogram(windows, audio.num_mels)
    assert mels.shape == (2, 3, 128, 224) == (2, 3, audio.num_mels, audio.num_steps)
    torch.testing.assert_close(mels, mel_spectrogram(windows.double() / 32768, audio.num_mels), rtol=1e-4, atol=1e-4)


@given(st.integers(1, 4), st.integers(1, 70))
@settings(max_examples=10, deadline=None)
def test_a_windows_spectrogram_does_not_depend_on_other_windows(num_clips: int, num_windows: int) -> None:
    random = torch.Generator().manual_seed(0)
    windows = (torch.randn(num_clips, num_windows, 1600, generator=random) * 3000).to(torch.int16)
    together = mel_spectrogram(windows, 20)
    assert together.shape == (num_clips, num_windows, 20, 21)
    alone = mel_spectrogram(windows[-1:, -1:], 20)
    torch.testing.assert_close(together[-1:, -1:], alone, rtol=1e-5, atol=1e-5)


def test_silence_is_the_floor_and_finite() -> None:
    mels = mel_spectrogram(torch.zeros(1, 1, 4000, dtype=torch.int16), 40)
    assert torch.isfinite(mels).all()
    assert float(mels.max()) == pytest.approx((-100 + 28.1) / 16.6)


def test_a_click_appears_at_its_time() -> None:
    wave = torch.zeros(1, 1, SAMPLE_RATE)
    wave[0, 0, 8000] = 1.0
    assert int(mel_spectrogram(wave, 40)[0, 0].sum(dim=0).argmax()) == pytest.approx(8000 / HOP, abs=1)
