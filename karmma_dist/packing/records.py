"""The plan that a reader of a raw dataset hands to the packer: recordings, each with the clips to cut from it.

Nothing is decoded for it: a plan depends on the annotation files and on which media files exist.
"""

from __future__ import annotations

import errno
import os
import stat
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from karmma_dist.errors import UserError
from karmma_dist.io.json_fields import JsonObject
from karmma_dist.modalities import MODALITIES
from karmma_dist.modalities.recording import ClipRecord, MediaFile, Recording
from karmma_dist.shards.format import check_key, label_problem


@dataclass(frozen=True, slots=True)
class Plan:
    """All recordings to pack, in the order of the annotation files."""

    recordings: tuple[Recording, ...]
    classes: dict[str, list[str]]
    """Class names per head, by id."""
    splits: tuple[str, ...]
    """Splits whose annotations exist."""
    notes: tuple[str, ...] = ()
    """Sentences for the user: splits skipped, settings without effect."""
    sought: Path | None = None
    """First path at which a medium was looked for; None if none was."""

    def problem(self) -> str:
        """Return in words what a reader did wrong in the plan, naming the clip; empty if nothing."""
        seen: set[str] = set()
        for recording in self.recordings:
            unknown = next((name for name in recording.media if name not in MODALITIES), None)
            if unknown is not None:
                return f"recording {recording.name} has media of the unknown modality '{unknown}'"
            for clip in recording.clips:
                if clip.key in seen:
                    return f"two clips have the key {clip.key}"
                seen.add(clip.key)
                problem = self._clip_problem(clip)
                if problem:
                    return f"clip {clip.key}: {problem}"
        return ""

    def _clip_problem(self, clip: ClipRecord) -> str:
        try:
            check_key(clip.key)
        except UserError as error:
            return str(error)
        if clip.split not in self.splits:
            return f"its split '{clip.split}' is none of {', '.join(self.splits)}"
        return label_problem(self.classes, clip.labels)

    def keys(self, split: str) -> list[str]:
        """Return the keys of a split's planned clips, sorted."""
        return sorted(clip.key for recording in self.recordings for clip in recording.clips if clip.split == split)


UNEXPECTED = "unexpected"
"""Stage of a failure that is perhaps no damage of the media but a bug, or too little memory."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A clip that is left out of the shards, because some of its media cannot be read."""

    key: str
    split: str
    modality: str
    stage: str
    """Step that failed: open, decode, cut or parse; UNEXPECTED for an error that no decoder or parser raised."""
    error: str

    @classmethod
    def from_fields(cls, fields: JsonObject) -> Failure:
        """Read a failure from parsed JSON.

        Raises:
            ValueError: a field is missing or is not a string.
        """
        return cls(*(fields.text(name) for name in ("key", "split", "modality", "stage", "error")))


@dataclass(slots=True)
class CutClip:
    """A clip's members as the tar holds them, with the description of each for KEY.json."""

    record: ClipRecord
    payloads: dict[str, bytes]
    """Bytes of every present modality."""
    described: dict[str, dict[str, Any]]
    """Description of every present modality, without bytes and crc32."""
    stop_s: float | None
    """End of the clip, in seconds; measured in the media where the annotations give none."""


def inside(raw: Path, relative: str, place: str) -> Path:
    """Return `raw / relative`, which must not leave `raw`.

    Raises:
        UserError: the path leaves it; `place` names the file and row, or the key, that gives the path.
    """
    path = Path(os.path.normpath(raw / relative))
    if not path.is_relative_to(os.path.normpath(raw)):
        raise UserError(f"{place}: path '{relative}' leaves the raw folder {raw}")
    return path


def file_type(path: Path) -> str | None:
    """Return "file", "folder", or None if nothing has this name: absence is ENOENT of the path itself, nothing else.

    Raises:
        OSError: something has this name but is neither, or whether it exists cannot be told (a link to something that
            does not exist, here or in a folder above, a link loop, a bad sector, no permission); `strerror` says what.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        _check_links(path)
        return None
    if stat.S_ISREG(mode):
        return "file"
    if stat.S_ISDIR(mode):
        return "folder"
    kinds = {stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
    kind = kinds.get(stat.S_IFMT(mode), "a device")
    raise OSError(errno.EINVAL, f"is {kind}, neither a file nor a folder", str(path))


def _check_links(path: Path) -> None:
    """Check that a path which does not exist is not, and is not below, a link to something that does not exist.

    Raises:
        OSError: it is.
    """
    for part in (path, *path.parents):
        try:
            is_link = stat.S_ISLNK(os.lstat(part).st_mode)
        except FileNotFoundError:
            continue
        try:
            os.stat(part)
        except FileNotFoundError:
            if is_link:
                target = f"is a link to {os.readlink(part)}, which does not exist"
                raise OSError(errno.ENOENT, target, str(part)) from None
        return


def raw_file(raw: Path, relative: str, place: str) -> Path | None:
    """Return the file `relative` inside `raw`, or the one with `.gz` appended; None if neither exists.

    Raises:
        UserError: one exists but is not a file, or it cannot be told whether one exists.
    """
    path = inside(raw, relative, place)
    for candidate in (path, path.with_name(f"{path.name}.gz")):
        if shared_file(candidate) is not None:
            return candidate
    return None


def shared_file(path: Path, or_folder: bool = False) -> str | None:
    """Return the type of a file that all recordings need; None if nothing has its name.

    Raises:
        UserError: something has this name but is no file (with `or_folder`: nor folder), or whether it exists cannot
            be told.
    """
    try:
        kind = file_type(path)
    except OSError as error:
        raise UserError(_problem(path, error)) from None
    if kind == "folder" and not or_folder:
        raise UserError(f"{path}: is a folder, not a file")
    return kind


def _problem(path: Path, error: OSError) -> str:
    name = error.filename if isinstance(error.filename, str) else str(path)
    return f"{name}: {error.strerror or error}"


class MediaFinder:
    """A search for media in the raw folder, which tells absence from everything else.

    A name is also found in the other Unicode form (composed or decomposed), and a file if the case of its suffix
    differs, unless several files match.

    Attributes:
        raw: The raw folder, normalised.
        sought: First path that was looked for.
    """

    def __init__(self, raw: Path) -> None:
        self.sought: Path | None = None
        self.raw = Path(os.path.normpath(raw))
        self._problems: dict[Path, str] = {}
        self._listings: dict[Path, dict[tuple[str, str], list[Path]]] = {}
        self._renamed: list[tuple[str, str]] = []

    def file(self, relative: str, place: str) -> Path | None:
        """Return the file `relative` inside the raw folder, also if it cannot be used (see `problems`); None if absent.

        Raises:
            UserError: the path leaves the raw folder; `place` names what gives the path.
        """
        path = inside(self.raw, relative, place)
        self.sought = self.sought or path
        return self._find(path, "file")

    def frames(self, relative: str, place: str) -> Path | None:
        """Return the tar (`relative` + .tar) or folder of numbered frames; None if both are absent.

        Raises:
            UserError: the path leaves the raw folder; `place` names what gives the path.
        """
        folder = inside(self.raw, relative, place)
        self.sought = self.sought or folder
        return self._find(folder.with_name(f"{folder.name}.tar"), "file") or self._find(folder, "folder")

    def problems(self, paths: Iterable[Path | None]) -> dict[Path, str]:
        """Return for those of the paths that exist but cannot be used the reason."""
        return {path: self._problems[path] for path in paths if path in self._problems}

    def notes(self) -> list[str]:
        """Return a sentence for the user if media were found under other names."""
        if not self._renamed:
            return []
        wanted, name = self._renamed[0]
        return [f"{len(self._renamed)} media found under another spelling; the first is {name} for {wanted}"]

    def _find(self, path: Path, wanted: str) -> Path | None:
        candidates = self._spellings(path)
        if wanted == "file" and not any(os.path.lexists(candidate) for candidate in candidates):
            found = [self._listing(each.parent).get(_spelled(each.name), []) for each in candidates]
            matching = list(dict.fromkeys(match for matches in found for match in matches))
            if len(matching) > 1:
                names = " and ".join(match.name for match in matching)
                self._problems[path] = f"{path}: does not exist, but {names} do: rename one or give its name"
                return path
            candidates += matching
        for candidate in candidates:
            try:
                kind = file_type(candidate)
            except OSError as error:
                self._problems[candidate] = _problem(candidate, error)
                return candidate
            if kind is not None:
                if kind != wanted:
                    self._problems[candidate] = f"{candidate}: is a {kind}, not a {wanted}"
                elif candidate != path:
                    self._renamed.append((path.name, candidate.name))
                return candidate
        return None

    def _spellings(self, path: Path) -> list[Path]:
        """Return a path, then the same name in the other Unicode forms."""
        relative = str(path.relative_to(self.raw))
        if relative.isascii():
            return [path]
        forms = [self.raw / unicodedata.normalize(form, relative) for form in ("NFC", "NFD")]
        return list(dict.fromkeys([path, *forms]))

    def _listing(self, folder: Path) -> dict[tuple[str, str], list[Path]]:
        """Return the files of a folder by their names without regard to Unicode form and case of the suffix."""
        if folder not in self._listings:
            names: dict[tuple[str, str], list[Path]] = {}
            try:
                for name in sorted(os.listdir(folder)):
                    names.setdefault(_spelled(name), []).append(folder / name)
            except OSError:
                names = {}
            self._listings[folder] = names
        return self._listings[folder]


def _spelled(name: str) -> tuple[str, str]:
    stem, suffix = os.path.splitext(unicodedata.normalize("NFC", name))
    return stem, suffix.lower()


def with_named_files(plan: Plan, raw: Path, sections: Mapping[str, Any]) -> Plan:
    """Add the media whose files the sections of the specification name (`Storage.files`), whatever the reader.

    A recording has such a modality if all of its files exist.

    Args:
        plan: The reader's plan.
        raw: The raw folder.
        sections: Sections of the specification, by modality.

    Raises:
        UserError: a path leaves the raw folder.
    """
    patterns = {
        name: MODALITIES[name].storage.files(section) for name, section in sections.items() if section.source != "none"
    }
    patterns = {name: files for name, files in patterns.items() if files}
    if not patterns:
        return plan
    finder, recordings, notes = MediaFinder(raw), [], []
    for recording in plan.recordings:
        media, problems = dict(recording.media), dict(recording.problems)
        for name, files in patterns.items():
            named = (
                file.replace("{participant}", recording.participant).replace("{recording}", recording.name)
                for file in files
            )
            paths = [finder.file(path, f"recording {recording.name}: {name}") for path in named]
            existing = [path for path in paths if path is not None]
            if len(existing) == len(paths):
                media[name] = MediaFile(existing[0], others=tuple(existing[1:]))
                problems |= finder.problems(existing)
        recordings.append(replace(recording, media=media, problems=problems))
    for name, files in patterns.items():
        if not any(name in recording.media for recording in recordings):
            notes.append(f"no {name}: no recording has {' and '.join(files)}")
    sought = plan.sought or finder.sought
    return replace(plan, recordings=tuple(recordings), notes=(*plan.notes, *notes, *finder.notes()), sought=sought)
