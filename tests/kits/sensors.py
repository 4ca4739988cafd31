"""Clips whose sensors tests break, and a model that averages what it is given."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from karmma_dist.evaluation.conditions import Condition, build_conditions
from karmma_dist.evaluation.corruptions.batches import Sensors
from karmma_dist.evaluation.corruptions.kinds import KINDS, parse_corruption
from karmma_dist.modalities import MODALITIES as ALL
from karmma_dist.modalities import View
from karmma_dist.modalities.audio import SAMPLE_RATE, AudioDescription
from karmma_dist.recipe import InputRecipe
from karmma_dist.streaming.batch import Batch, Sample, UncutSignal, collate
from kits.decoding import break_arrays, break_sound

MODALITIES = ["video", "flow", "audio", "detections"]
HEADS = {"verb": 3, "noun": 4}
INPUTS = InputRecipe.model_validate(
    {
        "video": {"num_frames": 6, "short_side": 24, "crop": 24},
        "audio": {"num_windows": 3, "window_s": 0.2, "num_mels": 8},
        "detections": {"num_frames": 6, "max_boxes": 4},
    }
)
PIXELS = [(name, modality, effect) for name, kind in KINDS.items() for modality, effect in kind.effects.items()
          if modality in ("video", "flow")]  # fmt: skip
seeds = st.integers(0, 1000)
keys = st.text("abc_0123", min_size=1, max_size=8)
shares = st.floats(0.01, 1)


def pixels(modality: str, num: int = 3, seed: int = 0, num_frames: int = 6) -> Tensor:
    """Return moving pictures that all differ."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num, num_frames, 24, 24, 3 if modality == "video" else 2), generator=generator).byte()


def sound(num: int = SAMPLE_RATE, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-3000, 3000, num).astype(np.int16)


def uncut(samples: np.ndarray, moments_s: tuple[float, ...] = (0.2, 0.5, 0.8)) -> UncutSignal:
    view = View(np.array(moments_s), 0.5, 0.5, False, np.ones(3, np.float32))
    return UncutSignal(samples, AudioDescription(SAMPLE_RATE, len(samples)), view, 1.0)


def windows_of(signal: UncutSignal) -> np.ndarray:
    return signal.cut(ALL["audio"].decoder, INPUTS.audio)


def boxes(num: int = 3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(num, 6, 4, 6, generator=generator) + 0.5


def sample(number: int, has: list[str]) -> Sample:
    arrays = {
        "video": pixels("video", 1, number)[0].numpy(),
        "flow": pixels("flow", 1, number)[0].numpy(),
        "detections": boxes(1, number)[0].numpy(),
    }
    heard = uncut(sound(seed=number))
    arrays["audio"] = windows_of(heard)
    labels: dict[str, int | None] = {"verb": number % 3, "noun": number % 4}
    kept = {name: arrays[name] for name in has}
    return Sample(f"clip_{number}", labels, kept, np.ones(3, np.float32), {"audio": heard} if "audio" in has else {})


def make_batches(num: int = 10, batch_size: int = 4) -> list[Batch]:
    """Return batches of clips that lack different modalities or none; the last batch is padded."""
    clips: list[Sample | None] = []
    for number in range(num):
        lacking = MODALITIES[number % 5] if number % 5 < 4 else None
        clips.append(sample(number, [name for name in MODALITIES if name != lacking]))
    clips += [None] * (-num % batch_size)
    return [collate(clips[first : first + batch_size], MODALITIES, list(HEADS)) for first in range(0, num, batch_size)]


class Average(nn.Module):
    """An encoder whose tokens are a few random projections of a whole input."""

    def __init__(self) -> None:
        super().__init__()
        self.modalities, self.heads = list(MODALITIES), dict(HEADS)
        self.num_encoded = dict.fromkeys(MODALITIES, 0)

    def encode(self, inputs: dict[str, Tensor], present_BM: Tensor) -> dict[str, Tensor]:
        tokens = {}
        for column, name in enumerate(self.modalities):
            assert len(inputs.get(name, ())) == int(present_BM[:, column].sum())
            if name in inputs:
                self.num_encoded[name] += len(inputs[name])
                generator = torch.Generator().manual_seed(column)
                flat = inputs[name].flatten(1)
                tokens[name] = flat @ torch.randn(flat.shape[1], 7, generator=generator)
        return tokens

    def fuse(self, tokens: dict[str, Tensor], present_BM: Tensor, keep_BM: Tensor) -> dict[str, Tensor]:
        total = torch.zeros(len(present_BM), 7)
        for column, name in enumerate(self.modalities):
            if name in tokens:
                part = torch.zeros(len(present_BM), 7)
                part[present_BM[:, column]] = tokens[name]
                total = total + part * keep_BM[:, column : column + 1]
        return {"verb": total[:, :3], "noun": total[:, 3:]}

SENSORS = Sensors(MODALITIES, INPUTS, "cpu")


def conditions_for(*corrupt: str, **choices: object) -> list[Condition]:
    return build_conditions(MODALITIES, corrupt=corrupt, **choices)  # type: ignore[arg-type]

HERE = [name for name, kind in KINDS.items() if set(kind.effects) <= set(MODALITIES)]
"""Kinds that break sensors of these clips."""
EVERY = [f"{name}:3" for name in HERE]


def recorded_with(batch: Batch, condition: Condition) -> Batch:
    """Return a prepared batch whose sensors are broken explicitly, clip by clip."""
    spoiled = dict(batch.inputs)
    corruption = None if condition.corrupt is None else parse_corruption(condition.corrupt)
    for modality, effect in {} if corruption is None else corruption.kind.effects.items():
        assert corruption is not None
        there = batch.present_BM[:, MODALITIES.index(modality)]
        names = [key for key, has in zip(batch.keys, there.tolist(), strict=True) if has]
        seed, amount, clips = condition.seed, corruption.amount, batch.inputs[modality]
        if modality == "audio":
            numbers = [int(name.removeprefix("clip_")) for name in names]
            changed = [
                windows_of(uncut(break_sound(effect, amount, sound(seed=number), name, seed)))
                for number, name in zip(numbers, names, strict=True)
            ]
            spoiled[modality] = torch.from_numpy(np.stack(changed))
        else:
            spoiled[modality] = break_arrays(modality, effect, amount, clips, names, seed)
    return SENSORS.intact(replace(batch, inputs=spoiled))

