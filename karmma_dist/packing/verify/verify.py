"""Compares a shards folder with its declarations. Every difference is one finding; damage never counts as absence.

    verification = verify(Path("shards/epic_kitchens"), full=True)

Fast: sizes, indexes, tar headers, keys, labels, counts; no payload is read. Full: every byte of the tars too, and the
media decode to what is declared.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path

from karmma_dist.errors import UserError
from karmma_dist.packing.pack import FAILURES, STAGING, lost_clips, read_failures
from karmma_dist.packing.verify.clip import Shown, early_ends
from karmma_dist.packing.verify.problems import Finding, Verification
from karmma_dist.packing.verify.shard import ShardReport, check_shard
from karmma_dist.processes import submit_all, worker_pool
from karmma_dist.progress import Report, silent
from karmma_dist.shards.format import MANIFEST, count_labels, index_path
from karmma_dist.shards.index import read_index
from karmma_dist.shards.manifest import Manifest, read_manifest

_REPAIR = "a lost or wrong index or manifest is written again by: karmma-dist verify {} --repair"
_REPACK = "a damaged tar cannot be repaired: remove it and pack again into the same folder: only its clips are cut"
_REPAIRABLE = {"index", "manifest"}


def verify(root: Path, *, full: bool = False, workers: int = 1, progress: Report | None = None) -> Verification:
    """Compare a shards folder with what its manifest, indexes and clips declare. Change nothing.

    Args:
        root: The folder.
        full: Read and decode the payloads too.
        workers: Processes that check shards in parallel; the findings are the same for any number.
        progress: Called after every shard, and with `full` and one worker after every clip.

    Raises:
        UserError: the folder does not exist, holds nothing packed or a newer schema, or a worker was killed.
    """
    if not root.is_dir():
        raise UserError(f"{root}: no such shards folder (pack one with: karmma-dist shard)")
    result = Verification(str(root), full)
    try:
        manifest = read_manifest(root)
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        _without_manifest(root, result, error)
    else:
        try:
            _Check(root, manifest, result, progress or silent).run(workers)
        except BrokenProcessPool:
            raise UserError(f"{root}: a worker was killed (out of memory?): verify again with fewer workers") from None
    kinds = {finding.kind for finding in result.findings}
    if kinds & _REPAIRABLE:
        result.notes.append(_REPAIR.format(root))
    if kinds - _REPAIRABLE:
        result.notes.append(_REPACK)
    return result


def _without_manifest(root: Path, result: Verification, error: Exception) -> None:
    if isinstance(error, FileNotFoundError):
        if (root / STAGING).is_dir():
            raise UserError(f"{root}: packing is not finished: run the same karmma-dist shard again") from None
        if not any(root.glob("*.tar")):
            raise UserError(f"{root}: no {MANIFEST} and no tar: nothing is packed in this folder") from None
        result.findings.append(Finding(MANIFEST, None, None, "manifest", "lost: no such file"))
    else:
        result.findings.append(Finding(MANIFEST, None, None, "manifest", f"cannot be read: {error}"))


class _Check:
    """One check of a folder whose manifest can be read."""

    def __init__(self, root: Path, manifest: Manifest, result: Verification, progress: Report) -> None:
        self.root, self.manifest, self.result, self.progress = root, manifest, result, progress
        self.keys: dict[str, str] = {}
        """Shard of every clip whose tar exists."""
        self.lost: dict[str, str] = {}
        """Shard of every clip whose tar is missing."""

    def run(self, workers: int) -> None:
        """Fill the result: each shard in the manifest's order, then the folder as a whole."""
        reports = self._check_shards(workers)
        shown: list[Shown] = []
        copies_differ = False
        for split, entry in self.manifest.splits.items():
            shards = entry.shards
            self.result.splits[split] = (len(shards), entry.num_clips, entry.num_bytes)
            split_reports = [reports.pop(0) for _ in shards]
            for report in split_reports:
                self._take(report)
                shown += report.shown
                if report.other_field and not copies_differ:
                    copies_differ = True
                    path = index_path(self.root / report.shard)
                    self._add(MANIFEST, "manifest", f"'{report.other_field}' differs from the copy in {path.name}")
            if entry.num_clips != sum(shard.num_clips for shard in shards):
                self._add(MANIFEST, "manifest", f"split {split} does not have as many clips as its shards")
            labels = [report.labels for report in split_reports if report.labels is not None]
            if len(labels) == len(shards):
                heads = self.manifest.header.heads
                counts = count_labels(heads, (clip_labels for shard_labels in labels for clip_labels in shard_labels))
                if counts != self.manifest.label_counts[split]:
                    self._add(MANIFEST, "manifest", f"label counts of split {split} are not those of its clips")
        self._others()
        self._lost_clips()
        self.result.findings += early_ends(shown)

    def _check_shards(self, workers: int) -> list[ShardReport]:
        """Return the report of every shard, in the manifest's order."""
        full, header, splits = self.result.full, self.manifest.header, self.manifest.splits
        tasks = [(self.root, split, shard, header, full) for split, entry in splits.items() for shard in entry.shards]
        sizes = [shard.num_clips if full else 1 for _, _, shard, _, _ in tasks]
        total, done = sum(sizes), 0
        self.progress("verify", 0, total)
        reports: dict[int, ShardReport] = {}
        if workers == 1 or len(tasks) <= 1:
            for place, task in enumerate(tasks):
                within = partial(self._clips_read, done, sizes[place], total) if full else None
                reports[place] = check_shard(*task, progress=within)
                done += sizes[place]
                self.progress("verify", done, total)
        else:
            with worker_pool(min(workers, len(tasks))) as pool:
                places = {future: place for place, future in enumerate(submit_all(pool, check_shard, tasks))}
                for future in as_completed(places):
                    reports[places[future]] = future.result()
                    done += sizes[places[future]]
                    self.progress("verify", done, total)
        return [reports[place] for place in range(len(tasks))]

    def _clips_read(self, before: int, size: int, total: int, num: int) -> None:
        """Report that `num` clips of a shard of `size` clips are read."""
        self.progress("verify", before + min(num, size), total)

    def _add(self, shard: str, kind: str, problem: str, key: str | None = None) -> None:
        self.result.findings.append(Finding(shard, key, None, kind, problem))

    def _take(self, report: ShardReport) -> None:
        """Add a shard's findings, and compare its keys with those of the earlier shards."""
        self.result.findings += report.findings
        for key in report.keys:
            if not report.exists:
                self.lost[key] = report.shard
                continue
            if key in self.keys:
                self._add(report.shard, "duplicate", f"also in {self.keys[key]}", key)
            self.keys[key] = report.shard

    def _others(self) -> None:
        """Report files that the manifest does not list."""
        listed = {shard.name for shard in self.manifest.shards}
        for tar in sorted(self.root.glob("*.tar")):
            if tar.name not in listed and not tar.name.startswith("."):
                self._add(tar.name, "unlisted", "the manifest does not list this tar")
        for path in sorted(self.root.glob("*.index.json")):
            tar = path.with_name(path.name.removesuffix(".index.json") + ".tar")
            if tar.name in listed or path.name.startswith("."):
                continue
            self._add(path.name, "unlisted", "the manifest does not list the tar of this index")
            try:
                self.lost |= {clip.key: tar.name for clip in read_index(tar).clips}
            except (OSError, ValueError):
                continue  # the index is reported already
        left = sorted(path.name for path in self.root.glob(".*.partial"))
        if (self.root / STAGING).is_dir():
            left.append(STAGING)
        if left:
            self.result.notes.append(f"left over by an interrupted packing run: {', '.join(left)}")

    def _lost_clips(self) -> None:
        for key, shard in self.lost.items():
            if key not in self.keys:
                self._add(shard, "lost", "in no shard of this folder", key)
        try:
            failures = read_failures(self.root / FAILURES)
            lost = lost_clips(self.manifest, failures)
        except UserError as error:
            self._add(FAILURES, "unreadable", str(error))
            return
        for split, num in lost.items():
            if num:
                missing = f"split {split}: {num} planned clips are neither in a shard nor in {FAILURES}"
                surplus = f"split {split}: {-num} clips more than were planned"
                self._add(MANIFEST, "lost", missing if num > 0 else surplus)


def damaged_files(findings: Iterable[Finding]) -> dict[str, dict[str, int]]:
    """Count the findings of each kind per damaged file."""
    files: dict[str, dict[str, int]] = {}
    for finding in findings:
        kinds = files.setdefault(finding.shard or "?", {})
        kinds[finding.kind] = kinds.get(finding.kind, 0) + 1
    return files
