"""The outcome of verification: one line per piece of damage, and a summary of what was checked."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Finding:
    """One piece of damage. `key` and `member` are None where the whole shard or folder is meant."""

    shard: str | None
    """File name of the tar, or of the file of the folder that is damaged."""
    key: str | None
    """Clip."""
    member: str | None
    """Modality, or "json" for the clip's metadata."""
    kind: str
    """`missing`, `unreadable`, `size`, `sha256`, `index`, `header`, `presence`, `undeclared`, `duplicate`, `unlisted`,
    `manifest`, `labels`, `lost`; with `--full` also `crc32`, `metadata`, `decode`, `length`."""
    what: str
    """What is wrong and, where there is something to do, what."""

    def __str__(self) -> str:
        where = [part for part in (self.shard, self.key and f"clip {self.key}", self.member) if part]
        return ": ".join([*where, self.kind, self.what])


@dataclass(slots=True)
class Verification:
    """The outcome for one folder."""

    folder: str
    full: bool
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Worth knowing, but no damage."""
    repaired: list[str] = field(default_factory=list)
    """Files written again."""
    splits: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    """Shards, clips and bytes by the manifest's word, per split."""

    @property
    def whole(self) -> bool:
        """Nothing is damaged."""
        return not self.findings

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "whole": self.whole, "findings": [asdict(finding) for finding in self.findings], "notes": self.notes,
            "repaired": self.repaired,
        }  # fmt: skip
