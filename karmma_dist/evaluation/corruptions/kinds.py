"""The kinds of corruption: sensors that are present but broken, their names and severities.

    video:blur:3      SENSOR:KIND:SEVERITY, severity 1 (slight) to 5 (severe)

Each modality lists its own corruptions (`Modality.breakages`) and defines their effect on its signal. Severities are
monotone: severity 3 corrupts at least as much as severity 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from karmma_dist.errors import UserError, nearest
from karmma_dist.modalities import LETTERS, MODALITIES
from karmma_dist.modalities.contract import NUM_SEVERITIES

SUITE = "suite"
"""Every kind of the model's sensors at `SUITE_SEVERITIES`."""

SUITE_SEVERITIES = (1, 3, 5)


@dataclass(frozen=True)
class Kind:
    """One way in which a sensor breaks."""

    effects: dict[str, str]
    """Effect on each modality that it affects: the name of an effect of the modality's breaker."""
    amounts: tuple[float, ...]
    """Strength at each severity."""
    meaning: str
    """Description of an amount, as a format string with the amount as its only argument."""
    is_random: bool
    """True if the result depends on the seed."""


def _kinds() -> dict[str, Kind]:
    """Collect the breakages of all modalities; sensors that feed several modalities come first."""
    kinds: dict[str, Kind] = {}
    breakages = [(modality.name, breakage) for modality in MODALITIES.values() for breakage in modality.breakages]
    for name, breakage in sorted(breakages, key=lambda item: item[1].sensor == item[0]):
        key = f"{breakage.sensor}:{breakage.kind}"
        new = Kind({}, breakage.amounts, breakage.meaning, breakage.is_random)
        kind = kinds.setdefault(key, new)
        if (kind.amounts, kind.is_random) != (new.amounts, new.is_random):
            raise UserError(
                f"modality '{name}': its breakage {key} has amounts {breakage.amounts}, those of another modality are "
                f"{kind.amounts}: a sensor breaks all of its modalities alike"
            )
        kind.effects[name] = breakage.effect
    return kinds


KINDS: dict[str, Kind] = _kinds()
"""Kinds by `SENSOR:KIND`. A sensor that feeds several modalities, such as the camera, breaks all of them at once."""


@dataclass(frozen=True)
class Corruption:
    """A kind at a severity."""

    name: str
    """`SENSOR:KIND`, a key of `KINDS`."""
    severity: int
    """1 to 5."""

    def __str__(self) -> str:
        """Return the corruption as it is written on the command line."""
        return f"{self.name}:{self.severity}"

    @cached_property
    def kind(self) -> Kind:
        """The kind of the corruption."""
        return KINDS[self.name]

    @property
    def amount(self) -> float:
        """The strength at this severity."""
        return self.kind.amounts[self.severity - 1]

    @property
    def meaning(self) -> str:
        """The severity in words: `20% of the clip, from a random moment on`."""
        return self.kind.meaning.format(self.amount)

    @property
    def modalities(self) -> list[str]:
        """The modalities that the corruption affects."""
        return list(self.kind.effects)


def parse_corruption(text: str) -> Corruption:
    """Read a corruption such as `video:blur:3` or `V:blur:3`.

    Raises:
        UserError: the sensor, kind or severity does not exist.
    """
    sensor, _, rest = text.strip().partition(":")
    kind, _, severity = rest.partition(":")
    sensor = LETTERS.get(sensor.upper(), sensor.lower())
    name = f"{sensor}:{kind.lower()}"
    if name not in KINDS:
        sensor_kinds = [known for known in KINDS if known.startswith(f"{sensor}:")]
        known = ", ".join(sensor_kinds or KINDS)
        raise UserError(
            f"corruption '{text}': no '{name.rstrip(':')}'{nearest(name, list(KINDS))}; choose from {known} "
            f"(as SENSOR:KIND:SEVERITY, severity 1 to {NUM_SEVERITIES}), or '{SUITE}'"
        )
    if not severity.isdecimal() or not 1 <= int(severity) <= NUM_SEVERITIES:
        raise UserError(
            f"corruption '{text}': severity '{severity}' is not 1 (slight) to {NUM_SEVERITIES} (severe): "
            f"for example {name}:3"
        )
    return Corruption(name, int(severity))


def parse_corruptions(texts: Sequence[str], available: Sequence[str]) -> list[Corruption]:
    """Read several corruptions without duplicates; `suite` stands for many.

    Args:
        texts: Corruptions as on the command line.
        available: The modalities that are evaluated.

    Raises:
        UserError: a corruption does not exist (see `parse_corruption`), or affects none of `available`.
    """
    corruptions: list[Corruption] = []
    for text in texts:
        if text.strip().lower() == SUITE:
            corruptions += _suite(available)
            continue
        corruption = parse_corruption(text)
        if not set(corruption.modalities) & set(available):
            breaks = " and ".join(corruption.modalities)
            raise UserError(
                f"corruption '{corruption}' breaks {breaks}, which is not evaluated here: {', '.join(available)}"
            )
        corruptions.append(corruption)
    return list(dict.fromkeys(corruptions))


def _suite(available: Sequence[str]) -> list[Corruption]:
    """Return every kind whose modalities are all available: otherwise the camera would repeat a single modality."""
    names = [name for name, kind in KINDS.items() if set(kind.effects) <= set(available)]
    return [Corruption(name, severity) for name in names for severity in SUITE_SEVERITIES]
