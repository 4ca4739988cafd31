"""The outcome of verification: one line per piece of damage, and a summary of what was checked."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Finding:
    """One piece of damage. `key` and `member` are None if it concerns the whole shard or folder."""

    shard: str | None
    """File name of the damaged tar, or of another damaged file of the folder."""
    key: str | None
    """Key of the clip."""
    member: str | None
    """Modality, or "json" for the clip's metadata."""
    kind: str
    """`missing`, `unreadable`, `size`, `sha256`, `index`, `header`, `presence`, `undeclared`, `duplicate`, `unlisted`,
    `manifest`, `labels`, `lost`; with `--full` also `crc32`, `metadata`, `decode`, `length`."""
    what: str
    """Description of the problem, with the remedy if there is any."""

    def __str__(self) -> str:
        place = [part for part in (self.shard, self.key and f"clip {self.key}", self.member) if part]
        return ": ".join([*place, self.kind, self.what])


@dataclass(slots=True)
class Verification:
    """The outcome of verifying one folder."""

    folder: str
    full: bool
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Sentences for the user that are not about damage."""
    repaired: list[str] = field(default_factory=list)
    """Files written again."""
    splits: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    """Number of shards, clips and bytes per split, as the manifest says."""

    @property
    def whole(self) -> bool:
        """True if nothing is damaged."""
        return not self.findings

    def to_dict(self) -> dict[str, Any]:
        """Return the outcome as JSON values, for `--json`."""
        return {
            "whole": self.whole, "findings": [asdict(finding) for finding in self.findings], "notes": self.notes,
            "repaired": self.repaired,
        }  # fmt: skip
