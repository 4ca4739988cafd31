"""Evaluation conditions, and the modalities that each clip keeps under a condition.

A condition is a subset of the modalities and a drop probability. The modalities that a clip loses are a function of
(seed, clip key, modality) alone, equal for every model, batch size and world size. A condition can also name a sensor
that is present but broken: see `corruptions`.

Legend: B clips, M modalities (columns in the model's order).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from karmma_dist.errors import UserError
from karmma_dist.evaluation.corruptions.kinds import parse_corruption, parse_corruptions
from karmma_dist.modalities import subsets as all_subsets
from karmma_dist.seeding import uniform

DROP_PROBS: tuple[float, ...] = tuple(tenth / 10 for tenth in range(10))
"""The drop probabilities of a sweep (paper, Fig. 4)."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Condition:
    """The modalities present at inference, each dropped with probability `drop_prob`; at least one is kept.

    Raises:
        UserError: no modality is named or one is named twice, the probability lies outside [0, 1], the seed is
            negative, or the corruption does not exist.
    """

    modalities: tuple[str, ...]
    drop_prob: float = 0.0
    seed: int = 0
    corrupt: str | None = None
    """The broken sensor and its failure, such as `video:blur:3`; None: all sensors are intact."""

    def __post_init__(self) -> None:
        if not self.modalities or len(set(self.modalities)) != len(self.modalities):
            raise UserError(f"condition {list(self.modalities)}: name at least one modality, and each only once")
        if not 0 <= self.drop_prob <= 1:
            raise UserError(f"drop probability {self.drop_prob:g}: it must lie between 0 and 1")
        if self.seed < 0:
            raise UserError(f"seed {self.seed}: it must not be negative")
        if self.corrupt is not None:
            parse_corruption(self.corrupt)


def build_conditions(
    available: Sequence[str],
    *,
    modalities: Sequence[str] | None = None,
    drop_prob: float | None = None,
    subsets: bool = False,
    sweep: bool = False,
    num_seeds: int = 1,
    corrupt: Sequence[str] = (),
) -> list[Condition]:
    """Build the conditions of one evaluation from its options, without duplicates, in the order of the report.

    Without options the only condition is everything in `available` present. `modalities` narrows that set.
    `subsets` takes every non-empty subset of the set, and `drop_prob` applies to each subset. `sweep` adds
    :data:`DROP_PROBS` on the full (narrowed) set. Only conditions that drop something are repeated for every seed
    (0 to `num_seeds` - 1).

    `corrupt` repeats all conditions that contain an affected modality, with that sensor broken. If the failure itself
    is random, these are repeated for every seed even if nothing is dropped.

    Raises:
        UserError: a modality is not available, the probability or number of seeds is out of range, or a corruption
            does not exist or affects no evaluated modality.
    """
    if num_seeds < 1:
        raise UserError(f"number of seeds {num_seeds}: it must be at least 1")
    base = _in_order(available if modalities is None else modalities, available)
    wanted: list[tuple[tuple[str, ...], float]] = []
    if subsets or drop_prob is not None or not sweep:
        chosen = all_subsets(base) if subsets else [base]
        wanted += [(subset, drop_prob or 0.0) for subset in chosen]
    if sweep:
        wanted += [(base, probability) for probability in DROP_PROBS]
    broken = parse_corruptions(corrupt, base)
    if all(_drops_nothing(*pair) for pair in wanted):
        if num_seeds > 1 and not any(corruption.kind.is_random for corruption in broken):
            _logger.warning("%d seeds requested, but no condition drops anything at random: running one", num_seeds)
        if any(probability > 0 for _, probability in wanted):
            _logger.warning("the drop probability has no effect on a single modality: one modality is always kept")
    conditions = [
        Condition(subset, probability, seed)
        for subset, probability in dict.fromkeys(wanted)
        for seed in range(1 if _drops_nothing(subset, probability) else num_seeds)
    ]
    conditions += [
        Condition(subset, probability, seed, str(corruption))
        for corruption in broken
        for subset, probability in dict.fromkeys(wanted)
        if set(subset) & set(corruption.modalities)
        for seed in range(num_seeds if corruption.kind.is_random or not _drops_nothing(subset, probability) else 1)
    ]
    return list(dict.fromkeys(conditions))


def keep(condition: Condition, keys: Sequence[str], present_BM: Tensor, modalities: Sequence[str]) -> Tensor:
    """Return keep_BM, bool: True = the model may use this modality of this clip.

    A modality is kept if the clip has it, the condition names it, and it is not dropped. It is dropped if its uniform
    number u(seed, key, modality) lies below the drop probability; if that would drop all modalities, the modality with
    the largest u is kept. Given that all u lie below, the largest is a uniform choice, so the distribution equals
    independent drops where an empty draw is replaced by one random modality (the paper's protocol). The masks are
    nested: a modality dropped at 0.3 is also dropped at 0.4, so curves over the drop probability vary less.

    A clip that has none of the condition's modalities keeps none: it cannot be evaluated under this condition.

    Args:
        condition: The condition to apply.
        keys: B clip keys.
        present_BM: bool, True = the dataset has the modality; columns in the order of `modalities`.
        modalities: The model's modalities.

    Raises:
        UserError: the condition names a modality that is missing in `modalities`.
    """
    _in_order(condition.modalities, modalities)
    named_M = torch.tensor([name in condition.modalities for name in modalities], device=present_BM.device)
    eligible_BM = present_BM & named_M
    if condition.drop_prob == 0:
        return eligible_BM
    uniforms_BM = _uniforms(condition.seed, tuple(keys), tuple(modalities)).to(present_BM.device)
    last_B = uniforms_BM.masked_fill(~eligible_BM, -1.0).argmax(dim=1)
    is_last_BM = torch.nn.functional.one_hot(last_B, len(modalities)).bool()
    return eligible_BM & ((uniforms_BM >= condition.drop_prob) | is_last_BM)


@lru_cache(maxsize=64)
def _uniforms(seed: int, keys: tuple[str, ...], modalities: tuple[str, ...]) -> Tensor:
    """Return uniforms_BM, float64; cached, since a sweep needs the same batch at every drop probability."""
    flat = [uniform(seed, key, modality) for key in keys for modality in modalities]
    return torch.tensor(flat, dtype=torch.float64).reshape(len(keys), len(modalities))


def _drops_nothing(modalities: Sequence[str], drop_prob: float) -> bool:
    """Return True if the masks of such a condition are equal for every seed."""
    return drop_prob == 0 or len(modalities) == 1


def _in_order(names: Sequence[str], available: Sequence[str]) -> tuple[str, ...]:
    unknown = [name for name in names if name not in available]
    if unknown:
        raise UserError(f"modality '{unknown[0]}' is not one of this model's: {', '.join(available)}")
    return tuple(name for name in available if name in names)
