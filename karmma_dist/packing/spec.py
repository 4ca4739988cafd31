"""The packing specification: the raw files that become shards, and how they are stored.

    spec = load_spec("epic_kitchens", raw="/data/epic", out="/scratch/shards/epic")

A specification is a file of `shards/`; the manifest of the shards records all fields that are not marked NOT_IN_BYTES.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, field_validator, model_validator

from karmma_dist.io.named_file import find_file
from karmma_dist.modalities import MODALITIES
from karmma_dist.modalities.audio import AudioSpec
from karmma_dist.modalities.detections import DetectionsSpec
from karmma_dist.modalities.flow import FlowSpec
from karmma_dist.modalities.video import VideoSpec
from karmma_dist.packing.readers import find_reader, readers
from karmma_dist.packing.readers.csv_table import PlainPaths
from karmma_dist.packing.readers.epic_kitchens import EpicKitchensPaths
from karmma_dist.packing.readers.epic_sounds import EpicSoundsPaths
from karmma_dist.packing.readers.reader import RECORDED_IF_CHANGED
from karmma_dist.packing.readers.something_something import SomethingSomethingPaths
from karmma_dist.settings import (
    PathText,
    Positive,
    Settings,
    check_other_sections,
    flat,
    is_marked,
    load_settings,
    mark,
    unmarked,
)
from karmma_dist.shards.format import split_problem

Fraction = Annotated[float, Field(ge=0, le=1)]

NOT_IN_BYTES = mark("not_in_bytes")
"""Mark of the fields that do not decide the bytes of shards: the manifest does not record them."""


class PackingSpec(Settings):
    """Settings that turn a raw dataset into shards.

    A modality that is no field here has a section under its name, and is packed if that section is given.
    """

    model_config = ConfigDict(extra="allow")

    reader: str
    """Layout of the raw folder: the name of a reader, and of the section with its sub-paths."""
    dataset: str
    """Name recorded in the manifest."""
    raw: Annotated[PathText, NOT_IN_BYTES]
    """Raw folder; ${VARIABLES} are expanded."""
    out: Annotated[PathText, NOT_IN_BYTES]
    """Folder to write the shards to; ${VARIABLES} are expanded."""
    seed: Annotated[int, Field(ge=0, lt=2**62)] = 0
    """Seed of the permutation that spreads clips over shards."""
    clips_per_shard: Positive = 512
    """Maximum number of clips in one shard."""
    participants: list[str] = []
    """Participants whose recordings are packed; empty: all."""
    video: VideoSpec = VideoSpec()
    """Frames."""
    flow: FlowSpec = FlowSpec()
    """Optical flow."""
    audio: AudioSpec = AudioSpec()
    """Audio; Something-Something has none."""
    detections: DetectionsSpec = DetectionsSpec()
    """Boxes; annotated in Something-Something, detected in Epic-Kitchens."""
    epic_kitchens: EpicKitchensPaths | None = None
    """Sub-paths of the reader epic_kitchens."""
    epic_sounds: EpicSoundsPaths | None = None
    """Sub-paths of the reader epic_sounds."""
    something_something: SomethingSomethingPaths | None = None
    """Sub-paths of the reader something_something."""
    plain: PlainPaths | None = None
    """Sub-paths of the reader plain."""

    @field_validator("reader")
    @classmethod
    def _reader_is_known(cls, name: str) -> str:
        find_reader(name)
        return name

    @model_validator(mode="after")
    def _other_sections(self) -> PackingSpec:
        fields = type(self).model_fields
        others = {name: modality.storage.settings for name, modality in MODALITIES.items() if name not in fields}
        for name, section in others.items():
            if "source" not in section.model_fields:
                raise ValueError(f"modality '{name}': {section.__name__}, its section's class, has no field 'source'")
        others |= {name: reader.paths for name, reader in readers().items() if name not in fields}
        check_other_sections(self, others)
        return self

    @model_validator(mode="after")
    def _only_what_the_reader_reads(self) -> PackingSpec:
        reader = find_reader(self.reader)
        for other in readers():
            if other != self.reader and getattr(self, other, None) is not None:
                raise ValueError(f"section '{other}' has no effect with reader '{self.reader}': remove it")
        readable = {*reader.modalities, *reader.on_request}
        unread = [name for name in MODALITIES if name in type(self).model_fields and name not in readable]
        for section in [*unread, *([] if reader.takes_participants else ["participants"])]:
            if section in self.model_fields_set:
                raise ValueError(f"'{section}' has no effect with reader '{self.reader}': remove it")
        for name, source in reader.on_request.items():
            if name in self.model_fields_set and (given := getattr(self, name).source) not in (source, "none"):
                raise ValueError(f"{name}.source '{given}' has no effect with reader '{self.reader}': choose {source}")
        if getattr(self, self.reader, None) is None:
            setattr(self, self.reader, reader.paths())
        self._check_splits(self.reader)
        reader.check(self)
        if not self.modalities:
            raise ValueError("every modality's source is 'none': nothing would be stored")
        return self

    def _check_splits(self, reader: str) -> None:
        """Refuse names of splits that cannot begin the name of a shard; those that a reader takes from elsewhere later.

        Raises:
            ValueError: a field of the reader's section names such a split.
        """
        names: list[str] = []
        for field in ("splits", "hold_out"):
            named = getattr(getattr(self, reader), field, None)
            names += named if isinstance(named, Mapping) else ()
            if problem := split_problem(names):
                raise ValueError(f"{reader}.{field}: {problem}")

    @property
    def modalities(self) -> list[str]:
        """Modalities that every clip declares, present or null."""
        reader, fields = find_reader(self.reader), type(self).model_fields
        asked = {name for name, source in reader.on_request.items() if getattr(self, name).source == source}
        offered = asked.union(reader.modalities)
        return [
            name
            for name, section in self.sections().items()
            if (name in offered or name not in fields) and section.source != "none"
        ]

    def sections(self) -> dict[str, Any]:
        """Return the section of every modality by name, in table order; other packages' only where given."""
        return {name: getattr(self, name) for name in MODALITIES if hasattr(self, name)}

    def recorded(self) -> dict[str, Any]:
        """Return the settings as the manifest records them: all that decide bytes, without paths of this machine."""
        recorded = {name: value for name, value in unmarked(self, NOT_IN_BYTES).items() if value is not None}
        return _without_unchanged(self, recorded)

    def differences(self, recorded: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Return the settings that differ from those of a manifest: dotted name -> recorded value and present value.

        A setting that is not recorded, because it did not exist then, counts as its default. A recorded setting that
        is unknown now differs; its present value is None.

        Raises:
            ValueError: a value is recorded in place of a section.
        """
        former, present = (flat(_with_defaults(self, None, each)) for each in (recorded, self.recorded()))
        names = [*present, *(name for name in former if name not in present)]
        return {name: (former.get(name), present.get(name)) for name in names if former.get(name) != present.get(name)}


def _without_unchanged(section: Settings, recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recorded settings of a section without fields of their default that are marked RECORDED_IF_CHANGED."""
    kept = dict(recorded)
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if is_marked(field, RECORDED_IF_CHANGED) and value == field.default:
            del kept[name]
        elif isinstance(value, Settings) and name in kept:
            kept[name] = _without_unchanged(value, kept[name])
    return kept


def _with_defaults(section: Settings, default: Settings | None, recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recorded settings of a section, completed with the defaults of the others.

    Args:
        section: The present section, which tells the names of its settings.
        default: The section with nothing set; None: the defaults of its class.
        recorded: The section in a manifest.

    Raises:
        ValueError: a value is recorded in place of a section.
    """
    default = type(section).model_construct() if default is None else default
    filled = dict(recorded)
    for name in unmarked(section, NOT_IN_BYTES):
        value, default_value = getattr(section, name), getattr(default, name, None)
        if isinstance(value, Settings):
            inner = recorded.get(name, {})
            if not isinstance(inner, Mapping):
                raise ValueError(f"settings.{name} is {inner!r}, not a section")
            inner_default = default_value if isinstance(default_value, Settings) else None
            filled[name] = _with_defaults(value, inner_default, inner)
        elif name not in recorded and default_value is not None:
            filled[name] = default.model_dump(mode="json", include={name})[name]
    return filled


def load_spec(
    name: str, *, raw: str | Path | None = None, out: str | Path | None = None, overrides: Sequence[str] = ()
) -> PackingSpec:
    """Read the specification `name`, a path or a name inside `shards/`, with another raw or out folder if given.

    Raises:
        UserError: the file does not exist, a key is unknown or wrong, or an environment variable is not set.
    """
    folders = [f"{key}={json.dumps(str(path))}" for key, path in (("raw", raw), ("out", out)) if path is not None]
    return load_settings(find_file(name, "shards"), PackingSpec, [*overrides, *folders])
