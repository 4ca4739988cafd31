"""Waveform windows -> normalised mel spectrograms in dB, in batch and on the device (paper, Sec. IV).

n_fft 1024, window 160, hop 80, power 2, HTK mel scale over 0 to 8 kHz, reflected ends: torchaudio's `MelSpectrogram`
with its defaults, reimplemented because torchaudio is not a dependency. Normalised as (dB + 28.1) / 16.6.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from karmma_dist.modalities.audio import HOP, SAMPLE_RATE, AudioInput
from karmma_dist.modalities.audio.published import kaldi_filter_banks, whisper_spectrogram
from karmma_dist.modalities.contract import TensorMaker

N_FFT, WINDOW = 1024, 160
MEAN_DB, STD_DB, FLOOR = -28.1, 16.6, 1e-10
_AT_ONCE = 32
"""Number of windows transformed together: a spectrum is 30 times as large as its audio, and beyond its caches a CPU
takes twice as long."""


class AudioTensors(TensorMaker):
    """A maker of spectrograms (N, windows, mels, time) from int16 windows (N, windows, samples)."""

    def shape(self, settings: AudioInput) -> tuple[int, ...]:
        """Return (windows, mels, time)."""
        return (settings.num_windows, settings.num_mels, settings.num_steps)

    def make(self, arrays_N: Tensor, settings: AudioInput, jitter_N3: Tensor | None) -> Tensor:
        """Return the spectrograms of `AudioInput.spectrogram`; `jitter_N3` is ignored."""
        if settings.spectrogram == "paper":
            return mel_spectrogram(arrays_N, settings.num_mels)
        transform = kaldi_filter_banks if settings.spectrogram == "kaldi" else whisper_spectrogram
        parts = [transform(_waves(part), settings.num_mels) for part in arrays_N.flatten(0, 1).split(_AT_ONCE)]
        return torch.cat(parts).unflatten(0, arrays_N.shape[:2])


def mel_spectrogram(windows_NWS: Tensor, num_mels: int) -> Tensor:
    """Turn windows (N, W, samples), int16 (full scale 1) or float, into float32 (N, W, num_mels, samples // 80 + 1)."""
    windows = windows_NWS.flatten(0, 1)
    mels = torch.cat([_mel_power(part, num_mels) for part in windows.split(_AT_ONCE)])  # (N*W, mels, steps)
    decibels = 10 * torch.log10(mels.clamp_min(FLOOR))
    return ((decibels - MEAN_DB) / STD_DB).unflatten(0, windows_NWS.shape[:2])


def _mel_power(windows_WS: Tensor, num_mels: int) -> Tensor:
    waves = _waves(windows_WS)
    hann = torch.hann_window(WINDOW, device=waves.device)
    spectrum = torch.stft(
        waves, N_FFT, HOP, WINDOW, window=hann, center=True, pad_mode="reflect", return_complex=True
    )  # (W, N_FFT/2+1, steps)
    power = spectrum.real.square() + spectrum.imag.square()
    return mel_filters(num_mels).to(waves.device).T @ power  # (W, mels, steps)


def _waves(windows_WS: Tensor) -> Tensor:
    """Return float waves with full scale 1."""
    waves = windows_WS.float()
    return waves if windows_WS.is_floating_point() else waves / 32768


@functools.cache
def mel_filters(num_mels: int) -> Tensor:
    """Return triangular filters (N_FFT/2+1, num_mels), evenly spaced on the HTK mel scale, not area-normalised."""
    bins = torch.linspace(0, SAMPLE_RATE / 2, N_FFT // 2 + 1, dtype=torch.float64)
    top = 2595 * torch.log10(torch.tensor(1 + SAMPLE_RATE / 2 / 700, dtype=torch.float64))
    edges = 700 * (10 ** (torch.linspace(0, float(top), num_mels + 2, dtype=torch.float64) / 2595) - 1)
    rising = (bins[:, None] - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - bins[:, None]) / (edges[2:] - edges[1:-1])
    return torch.minimum(rising, falling).clamp_min(0).float()


TENSORS = AudioTensors()
