"""Work that survives a kill: each unit of recordings is cut into a tar of its own, complete once its result exists.

OUT/.staging/
  UNIT.tar            the unit's clips
  UNIT.result.json    digest of settings and raw files, index of the tar, failures; written last
  UNIT.start          a line per recording that was started: number of the worker process, name
  manifest.json       the former manifest while shards are being mended
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import av
import cv2

from karmma_dist import __version__
from karmma_dist.io.files import append_whole, read_file, write_json
from karmma_dist.io.json_fields import JsonObject
from karmma_dist.modalities.recording import Recording, is_of_the_machine
from karmma_dist.packing.clip_cutter import cut_recording, unexpected_failure
from karmma_dist.packing.records import Failure, Plan
from karmma_dist.packing.spec import PackingSpec
from karmma_dist.packing.tars.writer import Sample, clip_sample, write_tar
from karmma_dist.shards.format import Clip
from karmma_dist.shards.index import ShardIndex, build_index

_UNIT_CLIPS = 32
"""Number of clips that closes a unit: a unit per recording would make too many files of single-clip recordings."""
_LONGEST_NAME = 100


@dataclass(frozen=True, slots=True)
class Unit:
    """Recordings that are cut together by one worker."""

    number: int
    """Position in the plan."""
    name: str
    recordings: tuple[Recording, ...]
    digest: str
    """Digest of everything that decides its bytes: settings, clips, sizes and times of raw files."""

    @property
    def keys(self) -> set[str]:
        """Keys of the unit's planned clips."""
        return {clip.key for recording in self.recordings for clip in recording.clips}


@dataclass(frozen=True, slots=True)
class Staged:
    """A unit's result."""

    tar: Path
    clips: tuple[Clip, ...]
    failures: list[Failure]


def units(plan: Plan, spec: PackingSpec) -> list[Unit]:
    """Divide the plan into units, the same way in every run."""
    groups: list[list[Recording]] = [[]]
    for recording in plan.recordings:
        groups[-1].append(recording)
        if sum(len(r.clips) for r in groups[-1]) >= _UNIT_CLIPS:
            groups.append([])
    settings = {name: section.model_dump() for name, section in spec.sections().items()}
    return [
        Unit(number, f"{number:06d}-{_file_name(group[0].name)}", tuple(group), _digest(group, settings))
        for number, group in enumerate(groups)
        if group
    ]


def _file_name(recording: str) -> str:
    """Return a recording's name as part of the name of a file; the unit's number tells units apart."""
    return re.sub(r"[^A-Za-z0-9_-]", "-", recording)[:_LONGEST_NAME]


def load_staged(folder: Path, unit: Unit) -> Staged | None:
    """Return a unit's result; None if it is missing, of other settings or raw files, or its tar is incomplete."""
    tar = folder / f"{unit.name}.tar"
    try:
        result = JsonObject.parse(read_file(_result_path(folder, unit)))
        index = ShardIndex.from_fields(result.nested("index"), tar.name)
        failures = [Failure.from_fields(failure) for failure in result.objects("failures")]
        is_whole = result.text("digest") == unit.digest and tar.stat().st_size == index.num_bytes
    except (OSError, ValueError) as error:
        if is_of_the_machine(error):
            raise
        return None
    return Staged(tar, index.clips, failures) if is_whole else None


def stage(folder: Path, unit: Unit, spec: PackingSpec) -> int:
    """Cut a unit's clips into its tar, write its result, and return the number of clips; runs in a worker process."""
    threads, level = cv2.getNumThreads(), av.logging.get_level()
    cv2.setNumThreads(1)
    av.logging.set_level(av.logging.PANIC)  # each failure holds its error; FFmpeg would print it again
    try:
        return _stage(folder, unit, spec)
    finally:
        cv2.setNumThreads(threads)
        av.logging.set_level(level)


def _stage(folder: Path, unit: Unit, spec: PackingSpec) -> int:
    tar = folder / f"{unit.name}.tar"
    failures: list[Failure] = []

    def samples() -> Iterator[tuple[str, Sample]]:
        for recording in unit.recordings:
            _note_start(folder, unit, recording)
            for cut in cut_recording(recording, spec):
                if isinstance(cut, Failure):
                    failures.append(cut)
                    continue
                try:
                    sample = clip_sample(cut, recording, spec.modalities)
                except Exception as error:
                    failures.append(unexpected_failure(cut.record, error, recording, spec))
                    continue
                yield cut.record.key, sample

    num = write_tar(tar, samples())
    index = build_index(tar, tuple(spec.modalities))
    failed = [asdict(failure) for failure in sorted(failures, key=lambda failure: failure.key)]
    write_json(_result_path(folder, unit), {"digest": unit.digest, "index": index.to_dict(), "failures": failed})
    return num + len(failures)


def _note_start(folder: Path, unit: Unit, recording: Recording) -> None:
    """Leave the name of the recording that this worker process starts to cut, for `cut_last`."""
    if multiprocessing.parent_process() is not None:
        append_whole(_start_path(folder, unit), f"{os.getpid()} {recording.name}\n".encode())


def cut_last(folder: Path, todo: Sequence[Unit]) -> dict[int, str]:
    """Return the name of the last recording that each worker process started to cut, by process number.

    Notes of units that were finished do not count.
    """
    names: dict[int, str] = {}
    for unit in todo:
        try:
            last = read_file(_start_path(folder, unit)).decode().splitlines()[-1]
            process, name = last.split(" ", 1)
            if load_staged(folder, unit) is None:
                names[int(process)] = name
        except (OSError, ValueError, IndexError):  # not started, or not written to the end
            continue
    return names


def forget(folder: Path, unit: Unit) -> None:
    """Remove a unit's result, so that it is cut again."""
    _result_path(folder, unit).unlink(missing_ok=True)


def _start_path(folder: Path, unit: Unit) -> Path:
    return folder / f"{unit.name}.start"


def _result_path(folder: Path, unit: Unit) -> Path:
    return folder / f"{unit.name}.result.json"


def _digest(recordings: Sequence[Recording], settings: dict[str, Any]) -> str:
    described = []
    for recording in recordings:
        paths = {"video_file": recording.video_file, "frames": recording.frames}
        for name, file in recording.media.items():
            numbers = ("", *(f".{number}" for number in range(1, len(file.paths))))
            paths |= {f"media.{name}{number}": path for number, path in zip(numbers, file.paths, strict=True)}
        stamps = {name: None if path is None else _stamp(path) for name, path in paths.items()}
        rates = {name: file.rate for name, file in recording.media.items()}
        clips = [dataclasses.asdict(clip) for clip in recording.clips]
        described.append([recording.name, recording.nominal_fps, rates, stamps, clips])
    text = json.dumps([__version__, settings, described], sort_keys=True)  # other versions may cut otherwise
    return hashlib.sha256(text.encode()).hexdigest()


def _stamp(path: Path) -> list[int] | str:
    """Return size and time of a file or folder, or why it has none; cutting then says what is wrong with it."""
    try:
        status = os.stat(path)
    except OSError as error:
        return str(error.errno)
    return [status.st_size, status.st_mtime_ns]
