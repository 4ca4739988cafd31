"""Waveform windows -> the spectrograms of published audio models, in batch and on the device, without torchaudio.

    kaldi    log mel filter banks of Kaldi, as AST (arXiv 2104.01778) sees them: 25 ms every 10 ms, 20 Hz to 8 kHz, no
             padding, normalised as (log + 4.268) / 9.138, AudioSet's mean and twice its standard deviation
    whisper  log mel spectrogram of Whisper (arXiv 2212.04356): 25 ms every 10 ms, reflected ends, Slaney's mel scale,
             at most 8 decades below the loudest value of a window, (log10 + 4) / 4

Legend: W windows of all clips, T steps, M mel bands.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from karmma_dist.modalities.audio import FRAME, SAMPLE_RATE, STEP

KALDI_MEAN, KALDI_STD = -4.2677393, 4.5689974
"""AudioSet's mean and standard deviation of kaldi's log filter banks."""
_FFT, _PREEMPHASIS, _KALDI_LOWEST_HZ, _KALDI_FLOOR = 512, 0.97, 20.0, 1.192092955078125e-07
_WHISPER_FLOOR, _WHISPER_RANGE = 1e-10, 8.0
_BREAK_HZ, _BREAK_MEL = 1000.0, 15.0
"""The point from which on Slaney's mel scale is logarithmic."""
_LOG_STEP = math.log(6.4) / 27
"""Natural logarithm of the ratio of frequencies one mel apart in that part."""


def kaldi_filter_banks(waves_WS: Tensor, num_mels: int) -> Tensor:
    """Return normalised log filter banks (W, M, T) of float waves (W, samples) with full scale 1."""
    frames = waves_WS.unfold(1, FRAME, STEP)  # (W, T, FRAME)
    frames = frames - frames.mean(dim=2, keepdim=True)
    first, rest = frames[..., :1] * (1 - _PREEMPHASIS), frames[..., 1:] - _PREEMPHASIS * frames[..., :-1]
    window = torch.hann_window(FRAME, periodic=False, device=waves_WS.device)
    spectrum = torch.fft.rfft(torch.cat([first, rest], dim=2) * window, n=_FFT)
    power = spectrum.real.square() + spectrum.imag.square()  # (W, T, _FFT / 2 + 1)
    banks = (power @ kaldi_filters(num_mels).to(power)).clamp_min(_KALDI_FLOOR).log()
    return ((banks - KALDI_MEAN) / (2 * KALDI_STD)).transpose(1, 2)


def whisper_spectrogram(waves_WS: Tensor, num_mels: int) -> Tensor:
    """Return normalised log mel spectrograms (W, M, T) of float waves (W, samples) with full scale 1."""
    window = torch.hann_window(FRAME, device=waves_WS.device)
    spectrum = torch.stft(waves_WS, FRAME, STEP, window=window, return_complex=True)[..., :-1]
    power = spectrum.real.square() + spectrum.imag.square()  # (W, FRAME / 2 + 1, T)
    decades = (whisper_filters(num_mels).to(power).T @ power).clamp_min(_WHISPER_FLOOR).log10()
    loudest = decades.amax(dim=(1, 2), keepdim=True)
    return (torch.maximum(decades, loudest - _WHISPER_RANGE) + 4) / 4


@functools.cache
def kaldi_filters(num_mels: int) -> Tensor:
    """Return triangular filters (_FFT / 2 + 1, M), triangular on the mel scale."""
    bins = _kaldi_mel(torch.arange(_FFT // 2 + 1, dtype=torch.float64) * SAMPLE_RATE / _FFT)
    ends = _kaldi_mel(torch.tensor([_KALDI_LOWEST_HZ, SAMPLE_RATE / 2], dtype=torch.float64))
    return _triangles(bins, torch.linspace(float(ends[0]), float(ends[1]), num_mels + 2, dtype=torch.float64)).float()


@functools.cache
def whisper_filters(num_mels: int) -> Tensor:
    """Return triangular filters (FRAME / 2 + 1, M) of equal area."""
    bins = torch.linspace(0, SAMPLE_RATE / 2, FRAME // 2 + 1, dtype=torch.float64)
    top = float(_slaney_mel(torch.tensor(SAMPLE_RATE / 2, dtype=torch.float64)))
    edges = _slaney_hertz(torch.linspace(0, top, num_mels + 2, dtype=torch.float64))
    return (_triangles(bins, edges) * 2 / (edges[2:] - edges[:-2])).float()


def _triangles(bins: Tensor, edges: Tensor) -> Tensor:
    rising = (bins[:, None] - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - bins[:, None]) / (edges[2:] - edges[1:-1])
    return torch.minimum(rising, falling).clamp_min(0)


def _kaldi_mel(hertz: Tensor) -> Tensor:
    return 1127 * torch.log1p(hertz / 700)


def _slaney_mel(hertz: Tensor) -> Tensor:
    above = _BREAK_MEL + torch.log(hertz.clamp_min(_BREAK_HZ) / _BREAK_HZ) / _LOG_STEP
    return torch.where(hertz < _BREAK_HZ, hertz * _BREAK_MEL / _BREAK_HZ, above)


def _slaney_hertz(mels: Tensor) -> Tensor:
    above = _BREAK_HZ * torch.exp(_LOG_STEP * (mels - _BREAK_MEL))
    return torch.where(mels < _BREAK_MEL, mels * _BREAK_HZ / _BREAK_MEL, above)
