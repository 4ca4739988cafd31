"""The packing specification: which raw files become shards, and how they are stored.

    spec = load_spec("epic_kitchens", raw="/data/epic", out="/scratch/shards/epic")

A specification is a file of `shards/`; the shards' manifest records all of it but the fields marked NOT_IN_BYTES.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from karmma_dist.modalities import MODALITIES
from karmma_dist.modalities.audio import AudioSpec
from karmma_dist.modalities.detections import DetectionsSpec
from karmma_dist.modalities.flow import FlowSpec
from karmma_dist.modalities.video import VideoSpec
from karmma_dist.settings import (
    Positive,
    Settings,
    check_other_sections,
    find_file,
    flat,
    load_settings,
    mark,
    unmarked,
)

Fraction = Annotated[float, Field(ge=0, le=1)]

NOT_IN_BYTES = mark("not_in_bytes")
"""Mark of the fields that do not decide the bytes of shards: a manifest neither records nor compares them."""


_NOT_READ = {
    "epic_kitchens": ("detections",),
    "something_something": ("audio", "participants"),
    "plain": ("detections",),
}
"""Sections of the specification that say nothing to a reader."""


class EpicKitchensPaths(Settings):
    """Where Epic-Kitchens keeps things, relative to the raw folder."""

    splits: dict[str, str] = {
        "train": "annotations/EPIC_100_train.csv",
        "validation": "annotations/EPIC_100_validation.csv",
        "test": "annotations/EPIC_100_test_timestamps.csv",
    }
    """CSV per split (or the same name with .gz); a split whose CSV is absent is skipped and said so."""
    unlabelled_splits: list[str] = ["test"]
    """Splits whose CSV has no class columns."""
    heads: dict[str, str] = {
        "verb": "annotations/EPIC_100_verb_classes.csv",
        "noun": "annotations/EPIC_100_noun_classes.csv",
    }
    """Class file per head (columns id and key); the splits' column is HEAD_class."""
    movies: str = "EPIC-KITCHENS/{participant}/videos/{recording}.MP4"
    """Untrimmed video with sound."""
    rgb_frames: str = "EPIC-KITCHENS/{participant}/rgb_frames/{recording}"
    """Folder of frame_%010d.jpg, or the same name with .tar."""
    flow_frames: str = "EPIC-KITCHENS/{participant}/flow_frames/{recording}"
    """Folder of u/frame_%010d.jpg and v/frame_%010d.jpg, or the same name with .tar."""
    audio_hdf5: str = "EPIC-KITCHENS-100_audio.hdf5"
    """Sound as auditory-slow-fast keeps it: one mono dataset per recording. Needs the extra `hdf5`."""
    audio_hdf5_rate: Positive = 24_000
    """Samples per second in it, which the file does not say."""
    pruned_splits: list[str] = []
    """Splits from which clips are left out whose class, of any head, never occurs in `train`: the paper's evaluation
    drops 24 of 9,668 validation clips so (nouns 205, 240, 288 and 295)."""
    hold_out: dict[str, Fraction] = {}
    """Further splits taken from `train`: name -> share of its recordings, chosen by a hash of their names so that no
    recording is on both sides. {validation: 0.1} with the official validation as `test` is Epic-Kitchens*."""

    @model_validator(mode="after")
    def _splits_fit_together(self) -> EpicKitchensPaths:
        if (self.pruned_splits or self.hold_out) and ("train" not in self.splits or "train" in self.unlabelled_splits):
            raise ValueError("pruned_splits and hold_out need a labelled split 'train'")
        for split in self.pruned_splits:
            if split not in self.splits:
                raise ValueError(f"pruned_splits: there is no split '{split}'")
            if split == "train" or split in self.unlabelled_splits:
                raise ValueError(f"pruned_splits: '{split}' has nothing to prune")
        for split in self.hold_out:
            if split in self.splits:
                raise ValueError(f"hold_out: '{split}' is a split already")
        if sum(self.hold_out.values()) >= 1:
            raise ValueError("hold_out: nothing is left of 'train'")
        return self


class SomethingSomethingPaths(Settings):
    """Where Something-Something V2 keeps things, relative to the raw folder."""

    splits: dict[str, str] = {
        "train": "labels/train.json",
        "validation": "labels/validation.json",
        "test": "labels/test.json",
    }
    """JSON per split (or the same name with .gz); a split whose JSON is absent is skipped and said so. In downloads
    with names like something-something-v2-train.json, give those here and in `heads`."""
    unlabelled_splits: list[str] = ["test"]
    """Splits whose entries have no template."""
    heads: dict[str, str] = {"action": "labels/labels.json"}
    """Class file of the one head: template without brackets -> id."""
    movies: str = "20bn-something-something-v2/{recording}.webm"
    """One clip per file."""
    flow_frames: str = "flow/{recording}"
    """Folder, or the same name with .tar, of u/frame_%010d.jpg and v/..., flow_x_%05d.jpg and flow_y_..., flow_%05d.jpg
    (red u, green v) or other layouts of `numbered_frames`; the i-th file is the flow from the i-th frame."""
    boxes: str = "boxes.json"
    """Something-Else's annotated boxes or STLT's compact lists; or a folder of such .json files."""
    frames_per_second: Positive = 12
    """Frame rate of flow files."""


class PlainPaths(Settings):
    """Where any other dataset keeps things, relative to the raw folder."""

    splits: dict[str, str] = {"train": "train.csv", "validation": "validation.csv", "test": "test.csv"}
    """CSV per split (or the same name with .gz) with columns key, media, start, stop and one per head; a split whose
    CSV is absent is skipped and said so."""
    unlabelled_splits: list[str] = ["test"]
    """Splits whose CSV has no columns of heads."""
    heads: Annotated[dict[str, str], Field(min_length=1)] = {"action": ""}
    """Class file per head (CSV with columns id and key); empty: the class names of the first labelled split, sorted."""

    @field_validator("heads")
    @classmethod
    def _heads_are_not_other_columns(cls, heads: dict[str, str]) -> dict[str, str]:
        for taken in ("key", "media", "start", "stop", "recording", "participant", "narration"):
            if taken in heads:
                raise ValueError(f"a head cannot be called '{taken}': that column holds something else")
        return heads


class PackingSpec(Settings):
    """How a raw dataset becomes shards. Modalities of other packages have sections of their own, by their names."""

    model_config = ConfigDict(extra="allow")

    reader: Literal["epic_kitchens", "something_something", "plain"]
    """Layout of the raw folder."""
    dataset: str
    """Name recorded in the manifest."""
    raw: Annotated[str, NOT_IN_BYTES]
    """Raw folder; ${VARIABLES} are expanded."""
    out: Annotated[str, NOT_IN_BYTES]
    """Folder the shards are written to; ${VARIABLES} are expanded."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the permutation that spreads clips over shards."""
    clips_per_shard: Positive = 512
    """Most clips in one shard."""
    participants: list[str] = []
    """Keep only the recordings of these participants; empty: all of them."""
    video: VideoSpec = VideoSpec()
    """Frames."""
    flow: FlowSpec = FlowSpec()
    """Optical flow."""
    audio: AudioSpec = AudioSpec()
    """Sound; Something-Something has none."""
    detections: DetectionsSpec = DetectionsSpec()
    """Boxes; only Something-Something has them in its annotations."""
    epic_kitchens: EpicKitchensPaths | None = None
    """Sub-paths of the reader epic_kitchens."""
    something_something: SomethingSomethingPaths | None = None
    """Sub-paths of the reader something_something."""
    plain: PlainPaths | None = None
    """Sub-paths of the reader plain."""

    @field_validator("raw", "out")
    @classmethod
    def _expand_home(cls, path: str) -> str:
        return str(Path(path).expanduser())

    @model_validator(mode="after")
    def _other_sections(self) -> PackingSpec:
        own = {name: m.storage.settings for name, m in MODALITIES.items() if name not in type(self).model_fields}
        check_other_sections(self, own)
        return self

    @model_validator(mode="after")
    def _only_what_the_reader_reads(self) -> PackingSpec:
        for other in {"epic_kitchens", "something_something", "plain"} - {self.reader}:
            if getattr(self, other) is not None:
                raise ValueError(f"section '{other}' has no effect with reader '{self.reader}': remove it")
        for section in _NOT_READ[self.reader]:
            if section in self.model_fields_set:
                raise ValueError(f"'{section}' has no effect with reader '{self.reader}': remove it")
        if self.reader == "epic_kitchens":
            self.epic_kitchens = self.epic_kitchens or EpicKitchensPaths()
        elif self.reader == "something_something":
            self.something_something = self.something_something or SomethingSomethingPaths()
        else:
            self.plain = self.plain or PlainPaths()
            if self.audio.source == "hdf5":
                raise ValueError("audio.source 'hdf5': only reader 'epic_kitchens' has such a file")
            if self.flow.source == "files":
                raise ValueError("flow.source 'files': reader 'plain' has no flow files: choose auto, compute or none")
        if not self.modalities:
            raise ValueError("every modality's source is 'none': nothing would be stored")
        return self

    @property
    def modalities(self) -> list[str]:
        """Modalities every clip declares, present or null."""
        sections = self.sections()
        return [name for name in sections if name not in _NOT_READ[self.reader] and sections[name].source != "none"]

    def sections(self) -> dict[str, Any]:
        """Return the section of every modality, by name, in the order of the table; those of others where given."""
        return {name: getattr(self, name) for name in MODALITIES if hasattr(self, name)}

    def recorded(self) -> dict[str, Any]:
        """Return the settings as the manifest records them: all that decide bytes, no machine's paths."""
        return {name: value for name, value in unmarked(self, NOT_IN_BYTES).items() if value is not None}

    def differences(self, recorded: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Return the settings that differ from a manifest's, by dotted name: the recorded value and this one.

        A setting that is not recorded, because there was none of that name then, counts as its default. One that is
        recorded and not known here differs, with None as the value here.
        """
        former, now = flat(_with_defaults(self, None, recorded)), flat(self.recorded())
        names = [*now, *(name for name in former if name not in now)]
        return {
            name: (former.get(name), now.get(name)) for name in names if former.get(name) != now.get(name)
        }


def _with_defaults(section: Settings, default: Settings | None, recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recorded settings of a section with the defaults of those that are not recorded.

    Args:
        section: as it is now; says which sections there are.
        default: as it is where nothing is set; None: as its class says.
        recorded: from a manifest.

    Raises:
        TypeError: a value is recorded where there is a section.
    """
    default = type(section).model_construct() if default is None else default
    filled = dict(recorded)
    for name in unmarked(section, NOT_IN_BYTES):
        now, usual = getattr(section, name), getattr(default, name, None)
        if isinstance(now, Settings):
            inner = recorded.get(name, {})
            if not isinstance(inner, Mapping):
                raise TypeError(f"{name}: {inner!r} is no section")
            filled[name] = _with_defaults(now, usual if isinstance(usual, Settings) else None, inner)
        elif name not in recorded and usual is not None:
            filled[name] = default.model_dump(mode="json", include={name})[name]
    return filled


def load_spec(
    name: str, *, raw: str | Path | None = None, out: str | Path | None = None, overrides: Sequence[str] = ()
) -> PackingSpec:
    """Read the specification `name` (a path, or a name inside `shards/`), with another raw or out folder if given.

    Raises:
        UserError: no such file, an unknown or wrong key, an environment variable that is not set.
    """
    folders = [f"{key}={json.dumps(str(path))}" for key, path in (("raw", raw), ("out", out)) if path is not None]
    return load_settings(find_file(name, "shards"), PackingSpec, [*overrides, *folders])
