"""One batch of clips under several states of the sensors: whole, and once more per corruption.

Only what a corruption reaches is made and encoded again; the tokens of everything else are those of the whole batch.

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
    """`karmma_dist.models.karmma.KarmmaModel` is one."""

    @property
    def modalities(self) -> Sequence[str]:
        """Columns of present_BM."""

    @property
    def heads(self) -> Mapping[str, int]:
        """Number of classes per head."""

    def encode(self, inputs: dict[str, Tensor], present_BM: Tensor) -> dict[str, Tensor]:
        """Tokens of the present clips, per modality."""

    def fuse(self, tokens: dict[str, Tensor], present_BM: Tensor, keep_BM: Tensor) -> dict[str, Tensor]:
        """Logits (B, C) per head from the tokens of the kept modalities; every clip keeps at least one."""

    def modules(self) -> Iterator[torch.nn.Module]:
        """All modules, the model itself among them."""

    def eval(self) -> Any:
        """Switch to evaluation mode."""


@dataclass(frozen=True)
class Variant:
    """A state of the sensors, and the conditions under it."""

    corruption: Corruption | None
    """None: all sensors are whole."""
    seed: int
    places: list[int]
    """Of its conditions among all."""
    conditions: list[Condition]


def variants(conditions: Sequence[Condition]) -> list[Variant]:
    """The conditions by what they do to the sensors: each is done once per batch."""
    groups: dict[tuple[str | None, int], list[int]] = {}
    for place, condition in enumerate(conditions):
        is_random = condition.corrupt is not None and parse_corruption(condition.corrupt).kind.is_random
        groups.setdefault((condition.corrupt, condition.seed if is_random else 0), []).append(place)
    return [
        Variant(
            None if corrupt is None else parse_corruption(corrupt), seed, places, [conditions[k] for k in places]
        )
        for (corrupt, seed), places in groups.items()
    ]


def uncut_modalities(conditions: Sequence[Condition]) -> set[str]:
    """Return the modalities of which the conditions need whole signals."""
    return {
        modality
        for condition in conditions
        if condition.corrupt is not None
        for modality in parse_corruption(condition.corrupt).modalities
        if isinstance(MODALITIES[modality].breaker, SignalBreaker)
    }


@dataclass(frozen=True)
class Sensors:
    """From batches as they leave the loader to what a model takes, with whole sensors or with a broken one."""

    modalities: Sequence[str]
    """Columns of present_BM."""
    inputs: InputRecipe
    device: torch.device | str
    dtype: torch.dtype = torch.float32

    def whole(self, batch: Batch) -> Batch:
        """The batch as it is."""
        return prepare(batch, self.inputs, self.device, self.dtype)

    def broken(self, batch: Batch, whole: Batch, corruption: Corruption, seed: int) -> Batch:
        """The batch with a broken sensor.

        Args:
            batch: As it left the loader; with the whole signals that `uncut_modalities` names.
            whole: What `whole` made of it: inputs that the corruption does not reach are taken from there.
            corruption: What is broken.
            seed: Of what is random in it.
        """
        spoiled = {
            modality: self._break(modality, effect, corruption.amount, batch, seed)
            for modality, effect in corruption.kind.effects.items()
            if modality in batch.inputs
        }
        made = prepare(replace(batch, inputs=spoiled), self.inputs, self.device, self.dtype)
        return replace(whole, inputs=whole.inputs | made.inputs)

    def _break(self, modality: str, effect: str, amount: float, batch: Batch, seed: int) -> Tensor:
        there_B = batch.present_BM[:, list(self.modalities).index(modality)].tolist()
        keys = [key for key, there in zip(batch.keys, there_B, strict=True) if there]
        breaker = MODALITIES[modality].breaker
        if isinstance(breaker, ArraysBreaker):
            return breaker.break_arrays(effect, amount, batch.inputs[modality], keys, seed)
        assert isinstance(breaker, SignalBreaker)
        # Views of a clip share its signal, which is broken once.
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
    """A model that knows the tokens of one batch's whole inputs, and encodes only others.

    Args:
        model: Whose encoders run.
        inputs: The tensors whose tokens are kept once they are made; known by identity.
    """

    def __init__(self, model: SensorModel, inputs: Mapping[str, Tensor]) -> None:
        self._model, self._inputs = model, inputs
        self._tokens: dict[str, Tensor] = {}
        self.modalities, self.heads = model.modalities, model.heads

    def encode(self, inputs: dict[str, Tensor], present_BM: Tensor) -> dict[str, Tensor]:
        """Tokens of the present clips, per modality."""
        is_whole = {name: x is self._inputs.get(name) for name, x in inputs.items()}
        known = {name: self._tokens[name] for name, whole in is_whole.items() if whole and name in self._tokens}
        new = {name: x for name, x in inputs.items() if name not in known}
        if not new:
            return known
        columns_M = torch.tensor([name in new for name in self.modalities], device=present_BM.device)
        made = self._model.encode(new, present_BM & columns_M)
        self._tokens |= {name: of for name, of in made.items() if is_whole.get(name)}
        return known | {name: of for name, of in made.items() if name in new}

    def fuse(self, tokens: dict[str, Tensor], present_BM: Tensor, keep_BM: Tensor) -> dict[str, Tensor]:
        """Logits (B, C) per head."""
        return self._model.fuse(tokens, present_BM, keep_BM)

    def modules(self) -> Iterator[torch.nn.Module]:
        """All modules of the model."""
        return self._model.modules()

    def eval(self) -> Any:
        """Switch to evaluation mode."""
        return self._model.eval()


def states_of(
    batch: Batch, states: Sequence[Variant], sensors: Sensors | None
) -> tuple[Batch, Iterator[tuple[Variant, Batch]]]:
    """The whole batch as the model takes it, and the batch in each state, made when it is asked for.

    Without `sensors` the batch is what the model takes already, and no state may have a corruption.

    Raises:
        UserError: it does.
    """
    whole = batch if sensors is None else sensors.whole(batch)

    def made() -> Iterator[tuple[Variant, Batch]]:
        for state in states:
            if state.corruption is None:
                yield state, whole
            elif sensors is None:
                raise UserError(f"corruption '{state.corruption}': prepared batches show no sensor to break")
            else:
                yield state, sensors.broken(batch, whole, state.corruption, state.seed)

    return whole, made()


def side_by_side(parts: Sequence[tuple[Variant, BatchScores]]) -> BatchScores:
    """One batch's scores in its different states, put together in the order of the conditions."""
    first = parts[0][1]
    if len(parts) == 1:
        return first
    order = np.argsort(np.concatenate([state.places for state, _ in parts]))

    def joined(pick: Any) -> np.ndarray:
        columns: np.ndarray = np.concatenate([pick(scores) for _, scores in parts], axis=1)[:, order]
        return columns

    changed: dict[str, Any] = {"masks_BK": joined(lambda scores: scores.masks_BK)}
    for name in (field.name for field in fields(BatchScores)):
        of = getattr(first, name)
        if isinstance(of, dict) and all(values.ndim == 2 for values in of.values()):  # (B, K) per head
            changed[name] = {key: joined(lambda scores, n=name, k=key: getattr(scores, n)[k]) for key in of}
    return replace(first, **changed)
