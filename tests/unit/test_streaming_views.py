"""Frames, crops and spectrograms: functions of (seed, epoch, key)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from karmma_dist.recipe import AudioInput, VideoInput
from karmma_dist.streaming.augment import evaluation_view, training_view
from karmma_dist.streaming.spectrogram import HOP, RATE, mel_filters, mel_spectrogram


@given(st.integers(1, 40), st.integers(0, 9), st.text("abc_0", min_size=1))
def test_one_frame_comes_from_each_segment(num_frames: int, epoch: int, key: str) -> None:
    video = VideoInput(num_frames=num_frames)
    for view in (training_view(video, 50, 0, epoch, key), evaluation_view(video, 50)):
        assert (np.floor(view.times_F * num_frames) == np.arange(num_frames)).all()


@given(st.integers(1, 100), st.integers(1, 4), st.integers(0, 100))
def test_a_dense_window_keeps_its_stride_and_stays_inside_the_clip(stored: int, stride: int, epoch: int) -> None:
    video = VideoInput(num_frames=8, sampling="dense", stride=stride)
    frames = (training_view(video, stored, 0, epoch, "k").times_F * stored).astype(int)
    assert frames.min() >= 0
    assert frames.max() < stored
    if stored >= 7 * stride + 1:
        assert (np.diff(frames) == stride).all()


def test_a_view_depends_on_seed_epoch_and_key_and_nothing_else() -> None:
    video = VideoInput()
    same = [training_view(video, 90, 1, 2, "P01_01_3") for _ in range(2)]
    assert (same[0].times_F == same[1].times_F).all()
    assert same[0].left == same[1].left
    changed = ((2, 2, "P01_01_3"), (1, 3, "P01_01_3"), (1, 2, "P01_01_4"))
    others = [training_view(video, 90, *which) for which in changed]
    assert len({other.left for other in others} | {same[0].left}) == 4


def test_only_recipes_that_ask_for_it_flip() -> None:
    flips = [training_view(VideoInput(horizontal_flip=True), 9, 0, epoch, "k").flip for epoch in range(200)]
    assert 60 < sum(flips) < 140
    assert not any(training_view(VideoInput(), 9, 0, epoch, "k").flip for epoch in range(50))


def test_a_tone_lights_up_the_mel_band_of_its_frequency() -> None:
    num_mels = 64
    filters = mel_filters(num_mels)
    for frequency in (500, 1500, 4000):
        tone = torch.sin(2 * torch.pi * frequency * torch.arange(RATE) / RATE)[None, None]
        brightest = int(mel_spectrogram(tone, num_mels)[0, 0].mean(dim=1).argmax())
        centre = int(filters[:, brightest].argmax()) * RATE / 1024
        assert abs(centre - frequency) < 0.12 * frequency


def test_the_spectrogram_has_the_papers_shape_and_is_scaled_alike_for_int16_and_float() -> None:
    audio = AudioInput()
    windows = (torch.randn(2, 3, audio.window_samples) * 3000).to(torch.int16)
    mels = mel_spectrogram(windows, audio.num_mels)
    assert mels.shape == (2, 3, 128, 224) == (2, 3, audio.num_mels, audio.num_steps)
    torch.testing.assert_close(mels, mel_spectrogram(windows.double() / 32768, audio.num_mels), rtol=1e-4, atol=1e-4)


def test_silence_is_the_floor_and_finite() -> None:
    mels = mel_spectrogram(torch.zeros(1, 1, 4000, dtype=torch.int16), 40)
    assert torch.isfinite(mels).all()
    assert float(mels.max()) == pytest.approx((-100 + 28.1) / 16.6)


def test_a_click_appears_at_its_time() -> None:
    wave = torch.zeros(1, 1, RATE)
    wave[0, 0, 8000] = 1.0
    assert int(mel_spectrogram(wave, 40)[0, 0].sum(dim=0).argmax()) == pytest.approx(8000 / HOP, abs=1)
