"""Evaluation conditions, and the modalities that each clip keeps under a condition.

A condition is a subset of the modalities and a drop probability. The modalities that a clip loses are a function of
(seed, clip key, modality) alone, equal for every model, batch size and world size. A condition can also name one
modality that a share of the clips lacks, or a sensor that is present but broken: see `corruptions`.

Legend: B clips, M modalities (columns in the model's order).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from karmma_dist.errors import UserError
from karmma_dist.evaluation.corruptions.kinds import parse_corruption, parse_corruptions
from karmma_dist.modalities import parse_modalities
from karmma_dist.modalities import subsets as all_subsets
from karmma_dist.seeding import uniform

DROP_PROBS: tuple[float, ...] = tuple(tenth / 10 for tenth in range(10))
"""The drop probabilities of a sweep (paper, Fig. 4)."""

_MISSING = re.compile(r"([^\s:,]+):([0-9]{1,3}(?:\.[0-9]{1,15})?)")

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MissingShare:
    """A share of the clips that lacks one modality.

    Raises:
        UserError: the share is not above 0 and at most 1.
    """

    modality: str
    share: float

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise UserError(f"missing {self.modality}:{self.share:g}: the share must lie above 0 and be at most 1")

    def __str__(self) -> str:
        return f"{self.modality}:{self.share:g}"

    @classmethod
    def parse(cls, text: str, available: Sequence[str]) -> MissingShare:
        """Parse `MODALITY:SHARE`, such as `audio:0.5` or `A:0.5`.

        Raises:
            UserError: the text has another form, the modality is not one of `available`, or the share is out of range.
        """
        match = _MISSING.fullmatch(text)
        if match is None:
            raise UserError(f"missing '{text}': give a modality and the share of clips that lacks it, as in audio:0.5")
        (modality,) = parse_modalities(match[1], available)
        return cls(modality, float(match[2]))


@dataclass(frozen=True)
class Condition:
    """The modalities present at inference, each dropped with probability `drop_prob`; at least one is kept.

    Raises:
        UserError: no modality is named or one is named twice, the probability lies outside [0, 1], the seed is
            negative, the corruption does not exist, or the missing modality is not named, is the only one, or is
            combined with a drop probability or a corruption.
    """

    modalities: tuple[str, ...]
    drop_prob: float = 0.0
    seed: int = 0
    corrupt: str | None = None
    """The broken sensor and its failure, such as `video:blur:3`; None: all sensors are intact."""
    missing: str | None = None
    """The modality that a share of the clips lacks, such as `audio:0.5`; None: no fixed modality is missing."""

    @property
    def is_plain(self) -> bool:
        """True if the condition consists of modalities and a drop probability only."""
        return self.corrupt is None and self.missing is None

    @property
    def missing_share(self) -> MissingShare | None:
        """The parsed `missing`."""
        return None if self.missing is None else MissingShare.parse(self.missing, self.modalities)

    def __post_init__(self) -> None:
        if not self.modalities or len(set(self.modalities)) != len(self.modalities):
            raise UserError(f"condition {list(self.modalities)}: name at least one modality, and each only once")
        if not 0 <= self.drop_prob <= 1:
            raise UserError(f"drop probability {self.drop_prob:g}: it must lie between 0 and 1")
        if self.seed < 0:
            raise UserError(f"seed {self.seed}: it must not be negative")
        if self.corrupt is not None:
            parse_corruption(self.corrupt)
        if self.missing_share is None:
            return
        if len(self.modalities) == 1:
            raise UserError(f"missing '{self.missing}': without another modality, no clip can lack it")
        if self.drop_prob or self.corrupt is not None:
            raise UserError(f"missing '{self.missing}': not together with a drop probability or a broken sensor")


def build_conditions(
    available: Sequence[str],
    *,
    modalities: Sequence[str] | None = None,
    drop_prob: float | None = None,
    subsets: bool = False,
    sweep: bool = False,
    num_seeds: int = 1,
    corrupt: Sequence[str] = (),
    missing: Sequence[str] = (),
) -> list[Condition]:
    """Build the conditions of one evaluation from its options, without duplicates, in the order of the report.

    Without options the only condition is everything in `available` present. `modalities` narrows that set.
    `subsets` takes every non-empty subset of the set, and `drop_prob` applies to each subset. `sweep` adds
    :data:`DROP_PROBS` on the full (narrowed) set. Only conditions that drop something are repeated for every seed
    (0 to `num_seeds` - 1).

    `corrupt` repeats all conditions that contain an affected modality, with that sensor broken. If the failure itself
    is random, these are repeated for every seed even if nothing is dropped.

    `missing` adds, to every set of modalities that contains the named one and another, a condition in which a share of
    the clips lacks it and nothing else is dropped, for every seed.

    Raises:
        UserError: a modality is not available, the probability or number of seeds is out of range, a corruption does
            not exist or affects no evaluated modality, or a missing modality is the only one of every set.
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
    shares = [MissingShare.parse(text, base) for text in missing]
    if all(_drops_nothing(*pair) for pair in wanted):
        if num_seeds > 1 and not shares and not any(corruption.kind.is_random for corruption in broken):
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
    conditions += [
        Condition(subset, seed=seed, missing=str(share))
        for share in shares
        for subset in _sets_with(share, [subset for subset, _ in wanted])
        for seed in range(num_seeds)
    ]
    return list(dict.fromkeys(conditions))


def _sets_with(missing: MissingShare, sets: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Return the distinct sets that contain the modality and another one.

    Raises:
        UserError: there is none.
    """
    chosen = [names for names in dict.fromkeys(sets) if missing.modality in names and len(names) > 1]
    if not chosen:
        raise UserError(f"missing '{missing}': without another modality, no clip can lack it")
    return chosen


def keep(condition: Condition, keys: Sequence[str], present_BM: Tensor, modalities: Sequence[str]) -> Tensor:
    """Return keep_BM, bool: True = the model may use this modality of this clip.

    A modality is kept if the clip has it, the condition names it, and it is not dropped. It is dropped if its uniform
    number u(seed, key, modality) lies below the drop probability; if that would drop all modalities, the modality with
    the largest u is kept. Given that all u lie below, the largest is a uniform choice, so the distribution equals
    independent drops where an empty draw is replaced by one random modality (the paper's protocol). The masks are
    nested: a modality dropped at 0.3 is also dropped at 0.4, so curves over the drop probability vary less.

    A modality that a share of the clips lacks is taken from the clips whose u lies below the share, unless they have no
    other modality. These clips are nested in the same way: a clip that lacks audio at 0.3 also lacks it at 0.4.

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
    missing = condition.missing_share
    if condition.drop_prob == 0 and missing is None:
        return eligible_BM
    uniforms_BM = _uniforms(condition.seed, tuple(keys), tuple(modalities)).to(present_BM.device)
    if missing is not None:
        column = list(modalities).index(missing.modality)
        lacks_B = (uniforms_BM[:, column] < missing.share) & (eligible_BM.sum(dim=1) > 1)
        eligible_BM[:, column] &= ~lacks_B
        return eligible_BM
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
