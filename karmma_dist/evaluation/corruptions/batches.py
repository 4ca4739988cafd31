"""One batch of clips under several sensor states: with intact sensors, and once more for each corruption.

Only the modalities that a corruption affects are prepared and encoded again; all other tokens are reused.

Legend: B clips of a batch, M modalities, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from karmma_dist.errors import UserError
from karmma_dist.evaluation.conditions import Condition
from karmma_dist.evaluation.corruptions.kinds import Corruption, parse_corruption
from karmma_dist.evaluation.scores import BatchScores
from karmma_dist.modalities import MODALITIES, ArraysBreaker, SignalBreaker
from karmma_dist.recipe import InputRecipe
from karmma_dist.streaming.batch import Batch, prepare


class SensorModel(Protocol):
    """A model with separate encoders and fusion block, such as `karmma_dist.models.karmma.KarmmaModel`."""

    @property
    def modalities(self) -> Sequence[str]:
        """Modalities, in the order of the columns of present_BM."""

    @property
    def heads(self) -> Mapping[str, int]:
        """Number of classes per head."""

    def encode(self, inputs: dict[str, Tensor], present_BM: Tensor) -> dict[str, Tensor]:
        """Return the tokens of the present clips, per modality."""

    def fuse(self, tokens: dict[str, Tensor], present_BM: Tensor, keep_BM: Tensor) -> dict[str, Tensor]:
        """Return logits (B, C) per head from the tokens of the kept modalities; every clip keeps at least one."""

    def modules(self) -> Iterator[torch.nn.Module]:
        """Return all modules, including the model itself."""

    def eval(self) -> Any:
        """Switch to evaluation mode."""


@dataclass(frozen=True)
class SensorState:
    """A state of the sensors, and the conditions that share it."""

    corruption: Corruption | None
    """The broken sensor; None: all sensors are intact."""
    seed: int
    places: list[int]
    """Indices of its conditions among all conditions."""
    conditions: list[Condition]


def sensor_states(conditions: Sequence[Condition]) -> list[SensorState]:
    """Group the conditions by sensor state: each batch is prepared once per state."""
    groups: dict[tuple[str | None, int], list[int]] = {}
    for place, condition in enumerate(conditions):
        is_random = condition.corrupt is not None and parse_corruption(condition.corrupt).kind.is_random
        groups.setdefault((condition.corrupt, condition.seed if is_random else 0), []).append(place)
    return [
        SensorState(
            None if corrupt is None else parse_corruption(corrupt), seed, places, [conditions[k] for k in places]
        )
        for (corrupt, seed), places in groups.items()
    ]


def uncut_modalities(conditions: Sequence[Condition]) -> set[str]:
    """Return the modalities whose uncut signals the conditions need."""
    return {
        modality
        for condition in conditions
        if condition.corrupt is not None
        for modality in parse_corruption(condition.corrupt).modalities
        if isinstance(MODALITIES[modality].breaker, SignalBreaker)
    }


@dataclass(frozen=True)
class Sensors:
    """Preparation of loader batches for a model, with intact sensors or with a broken sensor."""

    modalities: Sequence[str]
    """Modalities, in the order of the columns of present_BM."""
    inputs: InputRecipe
    device: torch.device | str
    dtype: torch.dtype = torch.float32

    def intact(self, batch: Batch) -> Batch:
        """Prepare the batch with intact sensors."""
        return prepare(batch, self.inputs, self.device, self.dtype)

    def broken(self, batch: Batch, intact: Batch, corruption: Corruption, seed: int) -> Batch:
        """Prepare the batch with a broken sensor.

        Args:
            batch: Batch as it left the loader, with the uncut signals that `uncut_modalities` names.
            intact: Result of `intact` for this batch; inputs that the corruption does not affect are taken from it.
            corruption: The broken sensor.
            seed: Seed of the random part of the corruption.
        """
        broken = {
            modality: self._break(modality, effect, corruption.amount, batch, seed)
            for modality, effect in corruption.kind.effects.items()
            if modality in batch.inputs
        }
        made = prepare(replace(batch, inputs=broken), self.inputs, self.device, self.dtype)
        return replace(intact, inputs=intact.inputs | made.inputs)

    def _break(self, modality: str, effect: str, amount: float, batch: Batch, seed: int) -> Tensor:
        present_B = batch.present_BM[:, list(self.modalities).index(modality)].tolist()
        keys = [key for key, present in zip(batch.keys, present_B, strict=True) if present]
        breaker = MODALITIES[modality].breaker
        if isinstance(breaker, ArraysBreaker):
            return breaker.break_arrays(effect, amount, batch.inputs[modality], keys, seed)
        assert isinstance(breaker, SignalBreaker)
        # All views of a clip share its signal, which is broken once.
        signals = dict(zip(keys, batch.uncut[modality], strict=True))
        broken = {
            key: breaker.break_uncut(effect, amount, signal.decoded, key, seed) for key, signal in signals.items()
        }
        decoder, settings = MODALITIES[modality].decoder, self.inputs.section(modality)
        cut = [
            signal.cut(decoder, settings, broken[key])
            for signal, key in zip(batch.uncut[modality], keys, strict=True)
        ]
        return torch.from_numpy(np.stack(cut))


class EncodeOnce:
    """A model that remembers the tokens of one batch's intact inputs, and encodes only other inputs again.

    Args:
        model: The model whose encoders run.
        inputs: Tensors whose tokens are kept after their first use; they are recognized by identity.
    """

    def __init__(self, model: SensorModel, inputs: Mapping[str, Tensor]) -> None:
        self._model, self._inputs = model, inputs
        self._tokens: dict[str, Tensor] = {}
        self.modalities, self.heads = model.modalities, model.heads

    def encode(self, inputs: dict[str, Tensor], present_BM: Tensor) -> dict[str, Tensor]:
        """Return the tokens of the present clips, per modality."""
        is_intact = {name: x is self._inputs.get(name) for name, x in inputs.items()}
        known = {name: self._tokens[name] for name, intact in is_intact.items() if intact and name in self._tokens}
        new = {name: x for name, x in inputs.items() if name not in known}
        if not new:
            return known
        columns_M = torch.tensor([name in new for name in self.modalities], device=present_BM.device)
        made = self._model.encode(new, present_BM & columns_M)
        self._tokens |= {name: tokens for name, tokens in made.items() if is_intact.get(name)}
        return known | {name: tokens for name, tokens in made.items() if name in new}

    def fuse(self, tokens: dict[str, Tensor], present_BM: Tensor, keep_BM: Tensor) -> dict[str, Tensor]:
        """Return logits (B, C) per head."""
        return self._model.fuse(tokens, present_BM, keep_BM)

    def modules(self) -> Iterator[torch.nn.Module]:
        """Return all modules of the model."""
        return self._model.modules()

    def eval(self) -> Any:
        """Switch to evaluation mode."""
        return self._model.eval()


def states_of(
    batch: Batch, states: Sequence[SensorState], sensors: Sensors | None
) -> tuple[Batch, Iterator[tuple[SensorState, Batch]]]:
    """Return the intact batch as the model takes it, and an iterator that makes the batch in each state.

    Without `sensors` the batch is prepared already, and no state may have a corruption.

    Raises:
        UserError: a state has a corruption, but `sensors` is None.
    """
    intact = batch if sensors is None else sensors.intact(batch)

    def state_batches() -> Iterator[tuple[SensorState, Batch]]:
        for state in states:
            if state.corruption is None:
                yield state, intact
            elif sensors is None:
                raise UserError(f"corruption '{state.corruption}': prepared batches have no sensor to break")
            else:
                yield state, sensors.broken(batch, intact, state.corruption, state.seed)

    return intact, state_batches()


def side_by_side(parts: Sequence[tuple[SensorState, BatchScores]]) -> BatchScores:
    """Join the scores of one batch in its states, in the order of the conditions."""
    first = parts[0][1]
    if len(parts) == 1:
        return first
    order = np.argsort(np.concatenate([state.places for state, _ in parts]))

    def joined(pick: Any) -> np.ndarray:
        columns: np.ndarray = np.concatenate([pick(scores) for _, scores in parts], axis=1)[:, order]
        return columns

    changed: dict[str, Any] = {"masks_BK": joined(lambda scores: scores.masks_BK)}
    for name in (field.name for field in fields(BatchScores)):
        value = getattr(first, name)
        if isinstance(value, dict) and all(array.ndim == 2 for array in value.values()):  # (B, K) per head
            changed[name] = {key: joined(lambda scores, n=name, k=key: getattr(scores, n)[k]) for key in value}
    return replace(first, **changed)
