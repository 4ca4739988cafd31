"""Packs a raw dataset into a folder of shards: cut in parallel, assemble in a fixed order, resume after anything.

    summary = pack(load_spec("epic_kitchens"), workers=8)

The seed permutes the *planned* clips over the shards: the bytes depend neither on the number of workers nor on the
order in which they finish, and a clip that fails leaves a place that it can take later.
"""

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from karmma_dist.errors import UserError
from karmma_dist.io.disk_errors import make_folder
from karmma_dist.io.files import read_file, refuse_link, remove_left, write_whole
from karmma_dist.io.json_fields import JsonObject
from karmma_dist.modalities import MODALITIES, letters
from karmma_dist.modalities.recording import ClipRecord, Recording, is_of_the_machine
from karmma_dist.packing.readers import find_reader
from karmma_dist.packing.records import Failure, Plan, file_type, with_named_files
from karmma_dist.packing.spec import PackingSpec
from karmma_dist.packing.tars.assemble import Source, assemble, made_with, packed_clips, shards_are_whole
from karmma_dist.packing.tars.lock import folder_lock
from karmma_dist.packing.tars.staging import Unit, cut_last, forget, load_staged, stage, units
from karmma_dist.processes import submit_all, worker_pool
from karmma_dist.progress import Report, silent
from karmma_dist.shards.folder import ShardFolder
from karmma_dist.shards.format import MANIFEST, DamageError, split_problem
from karmma_dist.shards.manifest import DatasetHeader, Manifest, RecordedPlan


def make_plan(spec: PackingSpec, limit: int | None = None) -> Plan:
    """Return the annotated clips of all recordings that have media, at most `limit` clips per split.

    Raises:
        UserError: the raw folder or the annotations are missing, a row is bad, no media file exists, or a library is
            missing that the settings need.
    """
    for name, section in spec.sections().items():
        MODALITIES[name].storage.check_settings(section)
    plan = with_named_files(find_reader(spec.reader).read(spec), Path(spec.raw), spec.sections())
    planned = [*plan.splits, *(clip.split for recording in plan.recordings for clip in recording.clips)]
    if problem := split_problem(dict.fromkeys(planned)) or plan.problem():
        raise UserError(f"{spec.raw}: reader {spec.reader}: {problem}")
    return _limited(_with_media(plan, spec), limit)


def _identity(clip: ClipRecord, entry_fields: Mapping[str, str]) -> dict[str, Any]:
    """Return all fields of a clip, with its entries under the names that their modalities give them."""
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
    """Leave out recordings without any media file, and note how many."""
    sections = spec.sections()
    present = [r for r in plan.recordings if _has_media(r, sections)]
    if not present:
        sought = f": the first looked for is {plan.sought}" if plan.sought is not None else ""
        num = len(plan.recordings)
        raise UserError(f"{spec.raw}: no media file of any of the {num} annotated recordings exists{sought}")
    absent = [r for r in plan.recordings if not _has_media(r, sections)]
    if not absent:
        return plan
    num_clips = sum(len(recording.clips) for recording in absent)
    note = f"{len(absent)} recordings ({num_clips} clips) left out: no media file; the first is {absent[0].name}"
    return replace(plan, recordings=tuple(present), notes=(*plan.notes, note))


def _has_media(recording: Recording, sections: Mapping[str, Any]) -> bool:
    alone = (name for name in recording.media if not MODALITIES[name].storage.reads_pictures(sections.get(name)))
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
"""Folder of clips that are cut but not yet in a shard; it is removed when packing is finished."""


@dataclass(slots=True)
class PackSummary:
    """The result of a packing run."""

    out: Path
    status: str
    """`packed`, `already packed`, or `staged` (other parts are not cut yet)."""
    clips: dict[str, int] = field(default_factory=dict)
    """Number of clips per split."""
    shards: dict[str, int] = field(default_factory=dict)
    """Number of shards per split."""
    subsets: dict[str, dict[str, int]] = field(default_factory=dict)
    """Number of clips per split and set of present modalities ("V+F+A")."""
    num_bytes: int = 0
    """Size of all shards."""
    failures: list[Failure] = field(default_factory=list)
    """Clips left out because some of their media cannot be read; also in failures.jsonl."""
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

    A packing run can be killed at any moment and started again: recordings already cut are not cut again. If the
    shards of the same specification are complete, nothing is done.

    Args:
        spec: The packing specification.
        workers: Processes that cut; 1: cut in this process.
        limit: Maximum number of clips per split; None: all of them.
        part: (i, n), i from 1: cut only every n-th unit of recordings, in the same folder as the other parts; the
            last part to finish assembles.
        retry_failed: Cut the recordings of failed clips once more, and put the mended clips in their places.
        progress: Called with the stage and the number of clips done.

    Raises:
        UserError: annotations or paths are bad, the folder holds shards of another specification, another packer
            works in it, or the disk is full or fails.
    """
    started = time.monotonic()
    if workers < 1:
        raise UserError(f"workers {workers}: at least 1")
    if part is not None and not 1 <= part[0] <= part[1]:
        raise UserError(f"part {part[0]}/{part[1]}: I/N with 1 <= I <= N")
    plan = make_plan(spec, limit)
    out = Path(spec.out)
    try:
        make_folder(out)
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
    """One call of `pack` on a locked folder."""

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
        """Cut missing clips, then assemble unless other parts are not cut yet."""
        refuse_link(self.staging)
        remove_left(self.out)
        former = self._former_manifest()
        known = read_failures(self.out / FAILURES) if former else []
        finished = (
            former is not None
            and file_type(self.out / MANIFEST) == "file"
            and shards_are_whole(self.out, former)
            and not any(lost_clips(former, known).values())
        )
        if finished and not (retry_failed and known):
            shutil.rmtree(self.staging, ignore_errors=True)
            return self._summary("already packed", known)
        make_folder(self.staging)
        remove_left(self.staging)
        packed = packed_clips(self.out, former) if former else {}
        given_up = set() if retry_failed else {failure.key for failure in known}
        needed = [unit for unit in units(self.plan, self.spec) if unit.keys - packed.keys() - given_up]
        if retry_failed:
            for unit in _share(needed, part):
                staged = load_staged(self.staging, unit)
                if staged and staged.failures:
                    forget(self.staging, unit)
        self._cut([unit for unit in _share(needed, part) if load_staged(self.staging, unit) is None], workers)
        if any(load_staged(self.staging, unit) is None for unit in needed) or not may_assemble():
            return PackSummary(self.out, "staged", notes=list(self.plan.notes))
        results = [load_staged(self.staging, unit) for unit in needed]
        if None in results:  # another part has assembled between the look and the lock
            return self._summary("already packed", read_failures(self.out / FAILURES))
        sources = {clip.key: Source(staged.tar, clip) for staged in results if staged for clip in staged.clips} | packed
        failures = {failure.key: failure for failure in known}
        failures |= {failure.key: failure for staged in results if staged for failure in staged.failures}
        left_out = sorted((f for f in failures.values() if f.key not in sources), key=lambda f: (f.split, f.key))
        self._assemble(sources, left_out)
        return self._summary("packed", left_out)

    def _former_manifest(self) -> Manifest | None:
        """Return the manifest of earlier shards, also if a run that mended them was killed; None without any.

        Raises:
            UserError: the manifest is of another specification, or shards exist without a manifest.
        """
        for path in (self.out / MANIFEST, self.staging / MANIFEST):
            if file_type(path) == "file":
                break
        else:
            stray = next(self.out.glob("*-[0-9][0-9][0-9][0-9][0-9][0-9].tar"), None)
            if stray is not None and not self.staging.is_dir():
                raise UserError(f"{self.out}: holds {stray.name} but no {MANIFEST}: choose another --out or remove it")
            return None
        try:
            manifest = Manifest.parse(read_file(path), str(path))
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
        others, started = set(multiprocessing.active_children()), set[BaseProcess]()
        try:
            with worker_pool(min(workers, len(todo))) as pool:
                tasks = [(self.staging, unit, self.spec) for unit in todo]
                futures = submit_all(pool, stage, tasks)
                started = set(multiprocessing.active_children()) - others
                for future in as_completed(futures):
                    done += future.result()
                    self.progress("cut", done, total)
        except BrokenProcessPool:
            raise UserError(
                f"{self.out}: a worker was killed (out of memory?){self._killed_at(todo, started)}: pack again with "
                "fewer workers, what is cut is kept"
            ) from None

    def _killed_at(self, todo: list[Unit], workers: set[BaseProcess]) -> str:
        """Return `` while it cut RECORDING`` for the workers that were killed; empty if none had started one.

        When one is killed, `concurrent.futures` ends the others with SIGTERM.
        """
        names = cut_last(self.staging, todo)
        killed = [worker.pid for worker in workers if worker.exitcode not in (None, 0, 1, -signal.SIGTERM)]
        at = sorted({name for process, name in names.items() if process in killed} or set(names.values()))
        return f" while it cut {' or '.join(at)}" if at else ""

    def _assemble(self, sources: dict[str, Source], failures: list[Failure]) -> None:
        """Write the shards, then the failures, then the manifest, whose presence makes the folder complete."""
        if file_type(self.out / MANIFEST) == "file":
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
    """Return the units of one part, chosen by their number so that every part divides alike."""
    if part is None:
        return todo
    return [unit for unit in todo if unit.number % part[1] == part[0] - 1]


def read_failures(path: Path) -> list[Failure]:
    """Read the failures that a packing run wrote; a missing file means none.

    Raises:
        UserError: the file is not a list of failures.
    """
    try:
        lines = read_file(path).splitlines() if file_type(path) == "file" else []
        return [Failure.from_fields(JsonObject.parse(line)) for line in lines]
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a list of failures ({error}): remove it and pack again") from None


def lost_clips(manifest: Manifest, failures: list[Failure]) -> dict[str, int]:
    """Count per split the planned clips that are neither in a shard of the manifest nor among the failures."""
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
