"""Sensors that are there but broken: which ways there are, how bad each can be, and how they are named.

    video:blur:3      SENSOR:KIND:SEVERITY, severity 1 (slight) to 5 (severe)

Each modality lists its own (`Modality.breakages`) and says what happens to its signal. Severities are monotone: what 2
spoils, 3 spoils too or more so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from karmma_dist.errors import UserError, nearest
from karmma_dist.modalities import LETTERS, MODALITIES

NUM_SEVERITIES = 5

SUITE = "suite"
"""Every kind of the model's sensors at `SUITE_SEVERITIES`."""

SUITE_SEVERITIES = (1, 3, 5)

@dataclass(frozen=True)
class Kind:
    """One way in which a sensor breaks."""

    effects: dict[str, str]
    """What happens to each modality that it reaches: the name of an effect of its breaker."""
    amounts: tuple[float, ...]
    """Per severity."""
    says: str
    """What an amount is, as a format of it."""
    is_random: bool
    """Whether the outcome depends on the seed."""


def _kinds() -> dict[str, Kind]:
    """Collect every modality's breakages; sensors behind several modalities come first."""
    kinds: dict[str, Kind] = {}
    breakages = [(modality.name, breakage) for modality in MODALITIES.values() for breakage in modality.breakages]
    for name, breakage in sorted(breakages, key=lambda item: item[1].sensor == item[0]):
        kind = kinds.setdefault(
            f"{breakage.sensor}:{breakage.kind}",
            Kind({}, breakage.amounts, breakage.meaning, breakage.is_random),
        )
        kind.effects[name] = breakage.effect
    return kinds


KINDS: dict[str, Kind] = _kinds()
"""`SENSOR:KIND` -> what it does. A sensor behind several modalities, such as the camera, breaks them at once."""


@dataclass(frozen=True)
class Corruption:
    """A kind at a severity."""

    name: str
    """`SENSOR:KIND`, a key of `KINDS`."""
    severity: int
    """1 to 5."""

    def __str__(self) -> str:
        """As it is written on the command line."""
        return f"{self.name}:{self.severity}"

    @cached_property
    def kind(self) -> Kind:
        """What it does."""
        return KINDS[self.name]

    @property
    def amount(self) -> float:
        """How much of it."""
        return self.kind.amounts[self.severity - 1]

    @property
    def meaning(self) -> str:
        """What the severity means: `20% of the clip, from a random moment on`."""
        return self.kind.says.format(self.amount)

    @property
    def modalities(self) -> list[str]:
        """The modalities it reaches."""
        return list(self.kind.effects)


def parse_corruption(text: str) -> Corruption:
    """`video:blur:3`, or `V:blur:3`.

    Raises:
        UserError: no such sensor, kind or severity.
    """
    sensor, _, rest = text.strip().partition(":")
    kind, _, severity = rest.partition(":")
    sensor = LETTERS.get(sensor.upper(), sensor.lower())
    name = f"{sensor}:{kind.lower()}"
    if name not in KINDS:
        of_sensor = [known for known in KINDS if known.startswith(f"{sensor}:")]
        known = ", ".join(of_sensor or KINDS)
        raise UserError(
            f"corruption '{text}': no '{name.rstrip(':')}'{nearest(name, list(KINDS))}; there are {known} "
            f"(as SENSOR:KIND:SEVERITY, severity 1 to {NUM_SEVERITIES}), and '{SUITE}'"
        )
    if not severity.isdecimal() or not 1 <= int(severity) <= NUM_SEVERITIES:
        raise UserError(
            f"corruption '{text}': severity '{severity}' is not 1 (slight) to {NUM_SEVERITIES} (severe): "
            f"for example {name}:3"
        )
    return Corruption(name, int(severity))


def parse_corruptions(texts: Sequence[str], available: Sequence[str]) -> list[Corruption]:
    """Each named corruption once, `suite` in full.

    Args:
        texts: As on the command line.
        available: The modalities to break.

    Raises:
        UserError: as `parse_corruption`, or one that reaches none of `available`.
    """
    found: list[Corruption] = []
    for text in texts:
        if text.strip().lower() == SUITE:
            found += _suite(available)
            continue
        corruption = parse_corruption(text)
        if not set(corruption.modalities) & set(available):
            breaks = " and ".join(corruption.modalities)
            raise UserError(
                f"corruption '{corruption}' breaks {breaks}, which is not evaluated here: {', '.join(available)}"
            )
        found.append(corruption)
    return list(dict.fromkeys(found))




def _suite(available: Sequence[str]) -> list[Corruption]:
    """Of a sensor behind several modalities only where all of them are there: else it would repeat one of them."""
    names = [name for name, kind in KINDS.items() if set(kind.effects) <= set(available)]
    return [Corruption(name, severity) for name in names for severity in SUITE_SEVERITIES]
