"""What a shards folder says of itself: the manifest, and the copy of its facts that every index carries.

The tars hold no class names and no settings. With a copy in each index a lost manifest can be written again, byte for
byte, from any index and the tars; with a manifest, any index.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from karmma_dist.modality import MODALITIES
from karmma_dist.shards import MANIFEST, SCHEMA, Clip, Member, build_index, check_key, check_manifest, index_path

_FACTS = ("dataset", "modalities", "heads", "settings", "plan", "made_with")
_COPY = "manifest"


def facts_of(manifest: dict[str, Any]) -> dict[str, Any]:
    """What the tars cannot tell: dataset, modalities, class names, settings, plan, versions.

    Raises:
        KeyError: it is no manifest of this format.
    """
    return {name: manifest[name] for name in _FACTS}


def copied_facts(index: dict[str, Any]) -> dict[str, Any] | None:
    """The facts that an index carries, or None when it has no copy of them."""
    copy = index.get(_COPY)
    return copy if isinstance(copy, dict) and set(copy) == set(_FACTS) else None


def shard_index(tar: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Read a whole tar and return its index with a copy of the facts.

    Raises:
        DamageError: as `build_index`.
    """
    return with_facts(build_index(tar, facts["modalities"]), facts)


def with_facts(index: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    """An index with a copy of the facts."""
    return {**index, _COPY: facts}


def whole_manifest(facts: dict[str, Any], splits: dict[str, Any], label_counts: dict[str, Any]) -> dict[str, Any]:
    """The manifest: facts, the shards of each split, and clips per class."""
    first = {name: facts[name] for name in ("dataset", "modalities", "heads")}
    identity = {name: facts[name] for name in ("settings", "plan")}
    return {
        "schema": SCHEMA, **first, "splits": splits, **identity, "label_counts": label_counts,
        "made_with": facts["made_with"],
    }  # fmt: skip


def count_labels(classes: dict[str, list[str]], labels: Iterable[dict[str, int | None]]) -> dict[str, list[int]]:
    """Clips per class of every head, from each clip's labels."""
    counts = {head: [0] * len(names) for head, names in classes.items()}
    for clip_labels in labels:
        for head, label in clip_labels.items():
            if label is not None:
                counts[head][label] += 1
    return counts


def label_problem(classes: dict[str, list[str]], labels: dict[str, int | None]) -> str:
    """What is wrong with a clip's labels, or an empty string."""
    if set(labels) != set(classes):
        return f"heads are {', '.join(sorted(labels)) or 'none'}, the manifest's {', '.join(sorted(classes)) or 'none'}"
    for head, label in labels.items():
        if label is not None and not 0 <= label < len(classes[head]):
            return f"{head} {label} is none of its {len(classes[head])} classes"
    return ""


def read_manifest(root: Path) -> dict[str, Any]:
    """Read a folder's manifest and check its shape, so that what follows can rely on it.

    Raises:
        UserError: it is of a newer schema.
        OSError: it cannot be read.
        ValueError: it is no manifest.
    """
    path = root / MANIFEST
    manifest = check_manifest(path.read_bytes(), str(path))
    try:
        _check_facts(facts_of(manifest))
        for split, entry in manifest["splits"].items():
            _expect(entry["clips"], int)
            _expect(manifest["label_counts"][split], dict)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a manifest of packed shards: {error!r}") from None
    return manifest


def read_index(tar: Path) -> tuple[dict[str, Any], list[Clip]]:
    """Read the index beside a tar, and its clips.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no index.
    """
    index = json.loads(index_path(tar).read_bytes())
    try:
        _expect(index["bytes"], int)
        clips = [
            Clip(
                check_key(entry["key"]),
                tar.name,
                {head: _optional_int(label) for head, label in entry["labels"].items()},
                {name: None if member is None else _member(*member) for name, member in entry["members"].items()},
            )
            for entry in index["clips"]
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not an index: {error!r}") from None
    return index, clips


def _check_facts(facts: dict[str, Any]) -> None:
    for modality in facts["modalities"]:
        if modality not in MODALITIES:
            raise ValueError(f"modality {modality!r}")
    for names in facts["heads"].values():
        for name in names:
            _expect(name, str)
    for split, planned in facts["plan"]["clips"].items():
        _expect(split, str)
        _expect(planned, int)
    _expect(facts["settings"], dict)


def _expect(value: Any, kind: type) -> None:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{value!r} is not of type {kind.__name__}")


def _optional_int(value: Any) -> int | None:
    if value is None:
        return None
    _expect(value, int)
    return int(value)


def _member(offset: Any, size: Any, crc32: Any) -> Member:
    for value in (offset, size, crc32):
        _expect(value, int)
        if value < 0:
            raise ValueError(f"member [{offset}, {size}, {crc32}]")
    return Member(offset, size, crc32)
