"""Packs a raw dataset into a folder of shards: cut in parallel, assemble in a fixed order, resume after anything.

    summary = pack(load_spec("epic_kitchens"), workers=8)

Which clip goes to which shard is a permutation of the *planned* clips by the seed: the bytes depend neither on the
number of workers nor on the order in which they finish, and a clip that fails leaves a place that it can take later.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from karmma_dist.errors import UserError
from karmma_dist.io.files import write_whole
from karmma_dist.io.json_fields import JsonObject
from karmma_dist.modalities import MODALITIES, letters
from karmma_dist.modalities.recording import ClipRecord, Recording, is_of_the_machine
from karmma_dist.packing.readers import find_reader
from karmma_dist.packing.records import Failure, Plan
from karmma_dist.packing.spec import PackingSpec
from karmma_dist.packing.tars.assemble import Source, assemble, made_with, packed_clips, shards_are_whole
from karmma_dist.packing.tars.lock import folder_lock
from karmma_dist.packing.tars.staging import Unit, forget, load_staged, stage, units
from karmma_dist.processes import submit_all, worker_pool
from karmma_dist.progress import Report, silent
from karmma_dist.shards.folder import ShardFolder
from karmma_dist.shards.format import MANIFEST, DamageError
from karmma_dist.shards.manifest import DatasetHeader, Manifest, RecordedPlan


def make_plan(spec: PackingSpec, limit: int | None = None) -> Plan:
    """What the raw folder's annotations ask for, of recordings that have media, at most `limit` clips per split.

    Raises:
        UserError: no raw folder, no annotations, a bad row, no media at all, or a library that the settings need.
    """
    for name, section in spec.sections().items():
        MODALITIES[name].storage.check_settings(section)
    return _limited(_with_media(find_reader(spec.reader).read(spec), spec), limit)


def _identity(clip: ClipRecord, entry_fields: Mapping[str, str]) -> dict[str, Any]:
    """Return all of a clip, its entries under the names that their modalities have for them."""
    described = asdict(clip)
    entries = described.pop("entries")
    return described | {field: entries.get(name) for name, field in entry_fields.items()}


def recorded_plan(plan: Plan, limit: int | None) -> RecordedPlan:
    """Return the plan as the manifest records it."""
    fields = {name: m.storage.entry_field for name, m in MODALITIES.items() if m.storage.entry_field}
    clips = [[r.name, r.participant, _identity(clip, fields)] for r in plan.recordings for clip in r.clips]
    text = json.dumps([plan.classes, sorted(clips, key=lambda entry: entry[2]["key"])], sort_keys=True)
    num_clips = {split: len(plan.keys(split)) for split in plan.splits}
    return RecordedPlan(limit, num_clips, hashlib.sha256(text.encode()).hexdigest())


def difference_between(packed: DatasetHeader, spec: PackingSpec, plan: RecordedPlan) -> str:
    """Describe the first difference between packed shards and the shards to be packed; empty if they are the same.

    Args:
        packed: Header of the packed shards.
        spec: Specification to pack by.
        plan: Plan to pack.

    Raises:
        ValueError: the recorded settings have a value in place of a section.
    """
    if differing := spec.differences(packed.settings):
        name, (former, now) = next(iter(differing.items()))
        return f"{name} ({former}, now {now})"
    if packed.plan != plan:
        if packed.plan.limit != plan.limit:
            return f"limit ({packed.plan.limit}, now {plan.limit})"
        num_former, num_now = (sum(each.clips.values()) for each in (packed.plan, plan))
        return f"annotations or set of media files ({num_former} clips, now {num_now})"
    return ""


def _with_media(plan: Plan, spec: PackingSpec) -> Plan:
    """Leave out recordings of which no media file is there, and say how many."""
    there = [r for r in plan.recordings if _has_media(r)]
    if not there:
        raise UserError(f"{spec.raw}: no media file of any of the {len(plan.recordings)} annotated recordings is there")
    absent = [r for r in plan.recordings if not _has_media(r)]
    if not absent:
        return plan
    num_clips = sum(len(recording.clips) for recording in absent)
    note = f"{len(absent)} recordings ({num_clips} clips) left out: no media file; the first is {absent[0].name}"
    return replace(plan, recordings=tuple(there), notes=(*plan.notes, note))


def _has_media(recording: Recording) -> bool:
    alone = (name for name in recording.media if not MODALITIES[name].storage.needs_pictures)
    return recording.video_file is not None or recording.frames is not None or any(alone)


def _limited(plan: Plan, limit: int | None) -> Plan:
    """Keep the first `limit` clips of each split."""
    if limit is None:
        return plan
    if limit < 1:
        raise UserError(f"limit {limit}: at least 1 clip per split")
    taken: Counter[str] = Counter()

    def within(clip: ClipRecord) -> bool:
        taken[clip.split] += 1
        return taken[clip.split] <= limit

    recordings = [replace(r, clips=tuple(c for c in r.clips if within(c))) for r in plan.recordings]
    return replace(plan, recordings=tuple(r for r in recordings if r.clips))


FAILURES = "failures.jsonl"
"""One line per clip left out: key, split, modality, stage, error."""

STAGING = ".staging"
"""Folder of what is cut but not yet in a shard; it is gone when packing is finished."""


@dataclass(slots=True)
class PackSummary:
    """What a packing run did, or found done."""

    out: Path
    status: str
    """`packed`, `already packed`, or `staged` (other parts are still to be cut)."""
    clips: dict[str, int] = field(default_factory=dict)
    """Clips in the shards per split."""
    shards: dict[str, int] = field(default_factory=dict)
    """Shards per split."""
    subsets: dict[str, dict[str, int]] = field(default_factory=dict)
    """Per split, clips per set of modalities present ("V+F+A")."""
    num_bytes: int = 0
    """Of all shards."""
    failures: list[Failure] = field(default_factory=list)
    """Clips left out because existing media of theirs cannot be read; also in failures.jsonl."""
    notes: list[str] = field(default_factory=list)
    """Splits skipped, recordings without media."""
    seconds: float = 0.0


def pack(
    spec: PackingSpec,
    *,
    workers: int = 1,
    limit: int | None = None,
    part: tuple[int, int] | None = None,
    retry_failed: bool = False,
    progress: Report | None = None,
) -> PackSummary:
    """Pack a raw dataset into the folder `spec.out`.

    Can be killed at any moment and called again: recordings already cut are not cut again. Where shards of the same
    specification are whole, nothing is done.

    Args:
        spec: what becomes what.
        workers: processes that cut; 1 works in this one.
        limit: only the first clips of each split.
        part: (i, n), i from 1: cut only every n-th unit of recordings, in the same folder as the other parts; the
            last part to finish assembles.
        retry_failed: cut the recordings of failed clips once more and put the mended ones in their places.
        progress: told how far it is.

    Raises:
        UserError: bad annotations or paths, another specification's shards in the folder, another packer at work, a
            full or failing disk.
    """
    started = time.monotonic()
    if workers < 1:
        raise UserError(f"workers {workers}: at least 1")
    if part is not None and not 1 <= part[0] <= part[1]:
        raise UserError(f"part {part[0]}/{part[1]}: I/N with 1 <= I <= N")
    plan = make_plan(spec, limit)
    out = Path(spec.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with folder_lock(out, part) as may_assemble:
            summary = _Run(spec, plan, limit, progress or silent).run(workers, part, retry_failed, may_assemble)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"{out}: disk full: free some space and pack again, what is cut is kept") from None
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EEXIST):
            raise UserError(f"{error.filename or out}: {error.strerror}: choose another --out") from None
        if error.errno == errno.EIO or is_of_the_machine(error):
            raise UserError(
                f"{error.filename or out}: {error.strerror}: mend that and pack again, what is cut is kept"
            ) from None
        raise
    summary.seconds = round(time.monotonic() - started, 2)
    return summary


class _Run:
    """One call of `pack` on a folder it has locked."""

    def __init__(self, spec: PackingSpec, plan: Plan, limit: int | None, progress: Report) -> None:
        self.spec, self.plan, self.progress = spec, plan, progress
        self.out = Path(spec.out)
        self.staging = self.out / STAGING
        self.header = DatasetHeader(
            spec.dataset, tuple(spec.modalities), plan.classes, spec.recorded(), recorded_plan(plan, limit), made_with()
        )

    def run(
        self, workers: int, part: tuple[int, int] | None, retry_failed: bool, may_assemble: Callable[[], bool]
    ) -> PackSummary:
        """Cut what is missing, then assemble unless other parts have still to cut theirs."""
        former = self._former_manifest()
        known = read_failures(self.out / FAILURES) if former else []
        finished = (
            former is not None
            and (self.out / MANIFEST).is_file()
            and shards_are_whole(self.out, former)
            and not any(lost_clips(former, known).values())
        )
        if finished and not (retry_failed and known):
            shutil.rmtree(self.staging, ignore_errors=True)
            return self._summary("already packed", known)
        self.staging.mkdir(exist_ok=True)
        packed = packed_clips(self.out, former) if former else {}
        given_up = set() if retry_failed else {failure.key for failure in known}
        needed = [unit for unit in units(self.plan, self.spec) if unit.keys - packed.keys() - given_up]
        if retry_failed:
            for unit in _share(needed, part):
                staged = load_staged(self.staging, unit)
                if staged and staged.failures:
                    forget(self.staging, unit)
        self._cut([unit for unit in _share(needed, part) if load_staged(self.staging, unit) is None], workers)
        results = [load_staged(self.staging, unit) for unit in needed]
        if None in results or not may_assemble():
            return PackSummary(self.out, "staged", notes=list(self.plan.notes))
        sources = {clip.key: Source(staged.tar, clip) for staged in results if staged for clip in staged.clips} | packed
        failures = {failure.key: failure for failure in known}
        failures |= {failure.key: failure for staged in results if staged for failure in staged.failures}
        left_out = sorted((f for f in failures.values() if f.key not in sources), key=lambda f: (f.split, f.key))
        self._assemble(sources, left_out)
        return self._summary("packed", left_out)

    def _former_manifest(self) -> Manifest | None:
        """The manifest of shards that are there, also when a run that mended them was killed.

        Raises:
            UserError: it is of another specification, or there are shards without any manifest.
        """
        for path in (self.out / MANIFEST, self.staging / MANIFEST):
            if path.is_file():
                break
        else:
            stray = next(self.out.glob("*-[0-9][0-9][0-9][0-9][0-9][0-9].tar"), None)
            if stray is not None and not self.staging.is_dir():
                raise UserError(f"{self.out}: holds {stray.name} but no {MANIFEST}: choose another --out or remove it")
            return None
        try:
            manifest = Manifest.parse(path.read_bytes(), str(path))
            difference = difference_between(manifest.header, self.spec, self.header.plan)
        except UserError:
            raise
        except ValueError as error:
            raise UserError(f"{path}: not a manifest of packed shards: {error}: choose another --out") from None
        if difference:
            raise UserError(f"{self.out}: holds shards packed with another {difference}: choose another --out")
        return manifest

    def _cut(self, todo: list[Unit], workers: int) -> None:
        total = sum(len(unit.keys) for unit in todo)
        done = 0
        self.progress("cut", 0, total)
        if workers == 1 or len(todo) <= 1:
            for unit in todo:
                done += stage(self.staging, unit, self.spec)
                self.progress("cut", done, total)
            return
        try:
            with worker_pool(min(workers, len(todo))) as pool:
                tasks = [(self.staging, unit, self.spec) for unit in todo]
                for future in as_completed(submit_all(pool, stage, tasks)):
                    done += future.result()
                    self.progress("cut", done, total)
        except BrokenProcessPool:
            raise UserError(
                f"{self.out}: a worker was killed (out of memory?): pack again with fewer workers, what is cut is kept"
            ) from None

    def _assemble(self, sources: dict[str, Source], failures: list[Failure]) -> None:
        """Write the shards, then failures, then the manifest: the folder counts when its last file does."""
        if (self.out / MANIFEST).is_file():
            os.replace(self.out / MANIFEST, self.staging / MANIFEST)
        try:
            manifest = assemble(self.out, self.plan, sources, self.spec, self.header, self.progress)
        except DamageError as error:
            raise UserError(f"{error}: the disk lost what was cut: remove {self.staging} and pack again") from None
        _write_failures(self.out / FAILURES, failures)
        write_whole(self.out / MANIFEST, manifest.to_bytes())
        shutil.rmtree(self.staging)

    def _summary(self, status: str, failures: list[Failure]) -> PackSummary:
        folder = ShardFolder(self.out)
        summary = PackSummary(self.out, status, failures=failures, notes=list(self.plan.notes))
        for split, entry in folder.manifest.splits.items():
            summary.clips[split], summary.shards[split] = entry.num_clips, len(entry.shards)
            summary.num_bytes += entry.num_bytes
            present = Counter(letters(m for m in folder.modalities if clip.has(m)) for clip in folder.clips(split))
            summary.subsets[split] = dict(sorted(present.items()))
        return summary


def _share(todo: list[Unit], part: tuple[int, int] | None) -> list[Unit]:
    """The units of one part, by their own number so that every part divides alike."""
    if part is None:
        return todo
    return [unit for unit in todo if unit.number % part[1] == part[0] - 1]


def read_failures(path: Path) -> list[Failure]:
    """The failures written by a packing run; none when the file is not there.

    Raises:
        UserError: it is not such a file.
    """
    try:
        lines = path.read_bytes().splitlines() if path.is_file() else []
        return [Failure.from_fields(JsonObject.parse(line)) for line in lines]
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a list of failures ({error}): remove it and pack again") from None


def lost_clips(manifest: Manifest, failures: list[Failure]) -> dict[str, int]:
    """Per split, planned clips that are neither in a shard of the manifest nor among the failures."""
    failed = Counter(failure.split for failure in failures)
    return {
        split: planned - manifest.splits[split].num_clips - failed[split]
        for split, planned in manifest.header.plan.clips.items()
    }


def _write_failures(path: Path, failures: list[Failure]) -> None:
    if not failures:
        path.unlink(missing_ok=True)
        return
    lines = [json.dumps(asdict(failure), ensure_ascii=False) + "\n" for failure in failures]
    write_whole(path, "".join(lines).encode())
