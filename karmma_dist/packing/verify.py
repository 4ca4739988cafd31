"""Is a folder of shards what was packed? Every difference is one finding; damage is never mistaken for absence.

    verification = verify(Path("shards/epic_kitchens"), full=True)

Fast: sizes, indexes, tar headers, keys, labels, counts; no payload is read. Full: every byte of the tars too, and the
media decode to what is declared.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from karmma_dist.errors import UserError
from karmma_dist.packing.check_clip import Shown, check_clip, early_ends
from karmma_dist.packing.check_tar import check_headers
from karmma_dist.packing.findings import Finding, Verification
from karmma_dist.packing.manifest import copied_facts, count_labels, facts_of, label_problem, read_index, read_manifest
from karmma_dist.packing.pack import FAILURES, STAGING, lost_clips, read_failures
from karmma_dist.progress import Report, silent
from karmma_dist.shards import MANIFEST, Clip, ShardFolder, index_path, sha256_of

_REPAIR = "a lost or wrong index or manifest is written again by: karmma-dist verify {} --repair"
_REPACK = "a damaged tar cannot be mended: remove it and pack again into the same folder, only its clips are cut again"
_REPAIRABLE = {"index", "manifest"}


def verify(root: Path, *, full: bool = False, progress: Report | None = None) -> Verification:
    """Compare a shards folder with what its manifest, indexes and clips declare. Changes nothing.

    Args:
        root: the folder.
        full: read and decode the payloads too.
        progress: told after every shard, or with `full` every clip.

    Raises:
        UserError: no such folder, nothing packed in it, or a newer schema.
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
        _Check(root, manifest, result, progress or silent).run()
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
            raise UserError(f"{root}: no {MANIFEST} and no tar: nothing is packed here") from None
        result.findings.append(Finding(MANIFEST, None, None, "manifest", "lost: no such file"))
    else:
        result.findings.append(Finding(MANIFEST, None, None, "manifest", f"cannot be read: {error}"))


class _Check:
    """One look at a folder whose manifest can be read."""

    def __init__(self, root: Path, manifest: dict[str, Any], result: Verification, progress: Report) -> None:
        self.root, self.manifest, self.result, self.progress = root, manifest, result, progress
        self.full = result.full
        self.folder = ShardFolder(root)
        self.facts = facts_of(manifest)
        self.keys: dict[str, str] = {}
        """Shard of every clip whose tar is there."""
        self.lost: dict[str, str] = {}
        """Shard of every clip whose tar is not."""
        self.shown: list[Shown] = []
        self.copies_differ = False
        self.total = sum(len(e["shards"]) if not self.full else e["clips"] for e in manifest["splits"].values())
        self.done = 0

    def run(self) -> None:
        """Fill the result."""
        self.progress("verify", 0, self.total)
        for split, entry in self.manifest["splits"].items():
            shards = entry["shards"]
            self.result.splits[split] = (len(shards), entry["clips"], sum(shard["bytes"] for shard in shards))
            labels = [self._shard(split, shard) for shard in shards]
            if entry["clips"] != sum(shard["clips"] for shard in shards):
                self._add(MANIFEST, "manifest", f"split {split} has another number of clips than its shards")
            if None not in labels:
                counts = count_labels(self.facts["heads"], (one for some in labels for one in some or ()))
                if counts != self.manifest["label_counts"][split]:
                    self._add(MANIFEST, "manifest", f"label counts of split {split} are not those of its clips")
        self._others()
        self._lost_clips()
        self.result.findings += early_ends(self.shown)
        self.progress("verify", self.total, self.total)

    def _add(self, shard: str, kind: str, what: str, key: str | None = None, member: str | None = None) -> None:
        self.result.findings.append(Finding(shard, key, member, kind, what))

    def _shard(self, split: str, entry: dict[str, Any]) -> list[dict[str, int | None]] | None:
        """Check one shard. Returns the labels of its clips, or None when its index is damaged."""
        tar = self.root / entry["name"]
        clips = self._index(tar, entry)
        there = tar.is_file()
        if not there:
            self._add(tar.name, "missing", f"no such file: {entry['clips']} clips")
            self.lost |= {clip.key: tar.name for clip in clips or ()}
        elif tar.stat().st_size != entry["bytes"]:
            self._add(tar.name, "size", f"{tar.stat().st_size} bytes, the manifest says {entry['bytes']}")
        if there and self.full:
            self._sha256(tar, entry)
        sound = clips is not None
        for clip in clips or ():
            sound &= self._clip(clip, there)
        if there and clips is not None:
            found = list(check_headers(tar, clips))
            self.result.findings += found
            if self.full:
                self._payloads(clips, split, {(finding.key, finding.member) for finding in found})
        if not self.full:
            self._advance()
        return [clip.labels for clip in clips] if clips is not None and sound else None

    def _index(self, tar: Path, entry: dict[str, Any]) -> list[Clip] | None:
        path = index_path(tar)
        try:
            index, clips = read_index(tar)
            if sha256_of(path) != entry["index_sha256"]:
                raise ValueError("its sha256 is not the manifest's")
        except FileNotFoundError:
            self._add(path.name, "index", "lost: no such file")
            return None
        except (OSError, ValueError) as error:
            self._add(path.name, "index", f"cannot be used: {error}")
            return None
        if (len(clips), index["bytes"]) != (entry["clips"], entry["bytes"]):
            said = f"the manifest says {entry['clips']} in {entry['bytes']}"
            self._add(path.name, "manifest", f"{len(clips)} clips in {index['bytes']} bytes, {said}")
        copy = copied_facts(index)
        if copy is not None and copy != self.facts and not self.copies_differ:
            self.copies_differ = True
            name = next(name for name, value in copy.items() if value != self.facts[name])
            self._add(MANIFEST, "manifest", f"'{name}' is not what the copy in {path.name} says")
        return clips

    def _sha256(self, tar: Path, entry: dict[str, Any]) -> None:
        try:
            if sha256_of(tar) != entry["sha256"]:
                self._add(tar.name, "sha256", "not the bytes that were packed")
        except OSError as error:
            self._add(tar.name, "unreadable", f"cannot be read: {error.strerror}")

    def _clip(self, clip: Clip, there: bool) -> bool:
        """Check what the index says of a clip."""
        if there:
            if clip.key in self.keys:
                self._add(clip.shard, "duplicate", f"also in {self.keys[clip.key]}", clip.key)
            self.keys[clip.key] = clip.shard
        declared = {"json", *self.facts["modalities"]}
        if set(clip.members) != declared or clip.members.get("json") is None:
            what = f"declares {', '.join(clip.members)}, not json and each of {', '.join(self.facts['modalities'])}"
            self._add(clip.shard, "presence", what, clip.key)
        problem = label_problem(self.facts["heads"], clip.labels)
        if problem:
            self._add(clip.shard, "labels", problem, clip.key)
        return not problem

    def _payloads(self, clips: list[Clip], split: str, blamed: set[tuple[str | None, str | None]]) -> None:
        """Read and decode; members whose header or place is damaged are not named again."""
        for clip in clips:
            for found in check_clip(self.folder, clip, split):
                if isinstance(found, Shown):
                    self.shown.append(found)
                elif (found.key, found.member) not in blamed:
                    self.result.findings.append(found)
            self._advance()

    def _others(self) -> None:
        """Files that nothing in the manifest speaks of."""
        listed = {shard["name"] for entry in self.manifest["splits"].values() for shard in entry["shards"]}
        for tar in sorted(self.root.glob("*.tar")):
            if tar.name not in listed and not tar.name.startswith("."):
                self._add(tar.name, "unlisted", "the manifest does not list this tar")
        for path in sorted(self.root.glob("*.index.json")):
            tar = path.with_name(path.name.removesuffix(".index.json") + ".tar")
            if tar.name in listed or path.name.startswith("."):
                continue
            self._add(path.name, "unlisted", "the manifest does not list the tar of this index")
            try:
                self.lost |= {clip.key: tar.name for clip in read_index(tar)[1]}
            except (OSError, ValueError):
                continue  # its own finding is there already
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
        except KeyError as error:
            self._add(MANIFEST, "manifest", f"split {error} is planned but has no shards")
            return
        for split, num in lost.items():
            if num:
                what = f"split {split}: {num} planned clips are neither in a shard nor in {FAILURES}"
                self._add(MANIFEST, "lost", what if num > 0 else f"split {split}: {-num} clips more than were planned")

    def _advance(self) -> None:
        self.done += 1
        self.progress("verify", min(self.done, self.total), self.total)


def damaged_files(findings: Iterable[Finding]) -> dict[str, dict[str, int]]:
    """Per file with damage: findings of each kind."""
    files: dict[str, dict[str, int]] = {}
    for finding in findings:
        kinds = files.setdefault(finding.shard or "?", {})
        kinds[finding.kind] = kinds.get(finding.kind, 0) + 1
    return files
