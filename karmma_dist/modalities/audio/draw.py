"""Audio in contact sheets: waveform above spectrogram."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes

from karmma_dist.modalities.audio import SAMPLE_RATE, AudioDescription
from karmma_dist.modalities.audio.decode import decode_flac
from karmma_dist.modalities.contract import Drawing, Sheet

_SPECTROGRAM_DB = 70.0
"""Range of the spectrogram's colours in dB, from the loudest value down."""


class AudioDrawing(Drawing):
    """A drawing of waveform and spectrogram on one time axis."""

    title = "audio: waveform, spectrogram"

    def draw(self, axis: Axes, data: bytes, description: AudioDescription, sheet: Sheet) -> None:
        """Draw both, the waveform scaled to its loudest sample."""
        axis.axis("off")
        samples = decode_flac(data)
        wave = samples.astype(np.float32) / 32768
        length_s = len(wave) / SAMPLE_RATE
        upper = axis.inset_axes((0.06, 0.64, 0.94, 0.36))
        lower = axis.inset_axes((0.06, 0.12, 0.94, 0.5))
        loudest = max(float(np.abs(wave).max()), 1 / 32768)
        upper.plot(np.arange(len(wave)) / SAMPLE_RATE, wave, linewidth=0.4)
        upper.set_ylim(-1.05 * loudest, 1.05 * loudest)
        upper.set_yticks([0], [f"\u00b1{loudest:.2f}"], fontsize=7)
        upper.set_xticks([])
        padded = np.pad(wave, (0, max(512 - len(wave), 0)))
        power, _, _, image = lower.specgram(padded + 1e-6, NFFT=512, Fs=SAMPLE_RATE / 1000, noverlap=384, cmap="magma")
        top_db = float(10 * np.log10(power.max() + 1e-12))
        image.set_clim(top_db - _SPECTROGRAM_DB, top_db)
        # specgram counts in milliseconds when the rate is in kHz.
        image.set_extent((0, len(padded) / SAMPLE_RATE, 0, SAMPLE_RATE / 2000))
        lower.set_yticks([0, 4], ["0", "4 kHz"], fontsize=7)
        lower.tick_params(axis="x", labelsize=7, pad=1, length=2)
        lower.xaxis.set_major_formatter("{x:g} s")
        for inset in (upper, lower):
            inset.set_xlim(0, length_s)
            inset.tick_params(axis="y", pad=1, length=2)


DRAWING = AudioDrawing()
