"""The modality `toy`: an array of readings per recording, stored as .npy."""

from __future__ import annotations

import io
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from karmma_dist.modalities import (
    ArraysBreaker,
    Breakage,
    DecodeError,
    Decoder,
    Description,
    Drawing,
    Modality,
    StoredError,
    TensorMaker,
)
from karmma_dist.modalities.storage import Source, Storage
from karmma_dist.settings import Settings

RATE = 50


class ToyInput(Settings):
    num_readings: int = 16


class ToySpec(Settings):
    source: Literal["auto", "none"] = "auto"


@dataclass(frozen=True)
class ToyDescription(Description):
    num_readings: int

    @property
    def length_s(self) -> float:
        return self.num_readings / RATE


class Readings(Source):
    def __init__(self, path: Any) -> None:
        self.readings = np.load(path)

    def cut(self, clip: Any, stop_s: float | None, pictures: Any) -> Any:
        part = self.readings[round(clip.start_s * RATE) : None if stop_s is None else round(stop_s * RATE)]
        file = io.BytesIO()
        np.save(file, part)
        return (file.getvalue(), {"num_readings": len(part)}) if len(part) else None


class ToyStorage(Storage):
    settings = ToySpec

    def open(self, recording: Any, sections: Any, files: ExitStack, video_file: Any) -> Readings | None:
        return Readings(recording.media["toy"].path) if "toy" in recording.media else None


class ToyDecoder(Decoder):
    def decode(self, data: bytes, description: ToyDescription, settings: ToyInput) -> np.ndarray:
        try:
            return np.load(io.BytesIO(data), allow_pickle=False).astype(np.float32)
        except ValueError as error:
            raise DecodeError(str(error)) from None

    def cut(self, decoded: np.ndarray, description: Any, settings: ToyInput, views: Any, length_s: float) -> np.ndarray:
        places = ((np.arange(settings.num_readings) + 0.5) / settings.num_readings * len(decoded)).astype(int)
        return np.stack([decoded[places] for _ in views])

    def num_bytes(self, settings: ToyInput) -> int:
        return 4 * settings.num_readings

    def check(self, data: bytes, description: ToyDescription) -> None:
        if len(self.decode(data, description, ToyInput())) != description.num_readings:
            raise StoredError("length", "another number of readings than declared")


class ToyTensors(TensorMaker):
    def shape(self, settings: ToyInput) -> tuple[int, ...]:
        return (settings.num_readings,)

    def make(self, arrays_N: torch.Tensor, settings: ToyInput, jitter_N3: Any) -> torch.Tensor:
        return arrays_N


class ToyDrawing(Drawing):
    title = "toy: readings"

    def draw(self, axis: Any, data: bytes, description: Any, sheet: Any) -> None:
        axis.plot(np.load(io.BytesIO(data)))


class ToyBreaker(ArraysBreaker):
    def break_arrays(self, effect: str, amount: float, arrays_N: torch.Tensor, keys: Any, seed: int) -> torch.Tensor:
        return arrays_N * (1 - amount)


STORAGE, DECODER, TENSORS, DRAWING, BREAKER = ToyStorage(), ToyDecoder(), ToyTensors(), ToyDrawing(), ToyBreaker()

TOY = Modality(
    name="toy", letter="T", member="toy.npy", array="readings", layout="float (N, readings)", settings=ToyInput,
    section="toy", description=ToyDescription, storage_part=f"{__name__}:STORAGE", decoder_part=f"{__name__}:DECODER",
    tensors_part=f"{__name__}:TENSORS", drawing_part=f"{__name__}:DRAWING", breaker_part=f"{__name__}:BREAKER",
    breakages=(Breakage("toy", "weak", "weak", (0.1, 0.3, 0.5, 0.7, 0.9), "{:.0%} weaker", is_random=False),),
)  # fmt: skip
