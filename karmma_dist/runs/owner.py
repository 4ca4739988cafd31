"""The owner of a folder: the one process that may write results into it, wherever on a cluster it runs.

    with owned(run_dir, "is being trained") as ownership:
        ...
        ownership.check()  # before something is written that must not meet another process's files

    runs/NAME/.owner-RANDOM.json    an owner's host, pid, job and start; its modification time is a heartbeat

A process announces itself in a file of its own, whose name is never used again, and looks for others then: of two that
come together at least one sees the other. It is refused if another owns the folder, unless that owner is gone: its
process has ended on this machine, its Slurm job has ended or been requeued, or its heartbeat has stopped for `STALE_S`
seconds. A heartbeat that cannot be judged at once (the owner is on another machine) is watched until it beats or is
that old. Locks of the kernel would not do: on many parallel file systems each node has its own.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from karmma_dist.errors import UserError
from karmma_dist.io.disk_errors import DiskError, make_folder, naming
from karmma_dist.io.json_fields import JsonObject, parse_strictly
from karmma_dist.io.locks import STALE_S, Announcement
from karmma_dist.progress import Report, silent
from karmma_dist.runs.listing import ask_squeue, has_ended
from karmma_dist.runs.process import is_alive, process_info

_NAME = re.compile(r"\.owner-[0-9a-f]{16}\.json")
_LOOK_EVERY_S = 0.5
_MOST_BYTES = 16_384
_TRIES = 20
_PAUSE_S = (0.02, 0.2)
_FIELDS = {
    "pid": int, "started": int, "host": str, "machine": str, "job_id": str, "restarts": str, "owns": bool,
}  # fmt: skip

_pause = random.SystemRandom()  # processes that share a seed must not all come back in the same moment


class Ownership(Announcement):
    """This process's file in a folder; `owns` is written into it once no other owner is left."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / f".owner-{secrets.token_hex(8)}.json", _about(owns=False))

    @property
    def is_lost(self) -> bool:
        """True if another process has taken the folder over, because this one seemed to be gone, or removed the file.
        """
        return not self.path.exists()

    def check(self) -> None:
        """Refuse to go on if the folder is no longer this process's.

        Raises:
            UserError: another process has taken the folder over.
        """
        if self.is_lost:
            raise UserError(
                f"{self.path}: was removed, so another process may own this folder now: this one stops and writes "
                "nothing more"
            )


def _about(*, owns: bool) -> dict[str, Any]:
    """Return what an owner's file says: whether this process owns the folder or only asks for it."""
    return {**process_info(), "restarts": _restarts(), "owns": owns}


@contextmanager
def owned(folder: Path, doing: str, report: Report = silent) -> Iterator[Ownership]:
    """Own a folder while the block runs. The folder is made if it does not exist, and removed if it stays empty.

    Args:
        folder: The folder.
        doing: Words for the refusal, such as "is being trained".
        report: Called while the heartbeat of an owner on another machine is watched.

    Raises:
        DiskError: the disk is full or fails.
        UserError: another process owns the folder, or the folder cannot be written.
    """
    try:
        is_new = not folder.exists()
        make_folder(folder)
        with naming(folder):
            ownership = _take(folder, doing, report)
    except DiskError:
        raise
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror or error}: name another folder") from None
    try:
        yield ownership
    finally:
        ownership.withdraw()
        if is_new:
            with contextlib.suppress(OSError):  # it holds what the block has written
                folder.rmdir()


def _take(folder: Path, doing: str, report: Report) -> Ownership:
    """Announce this process and look for others, until it is alone or another owns the folder.

    Raises:
        UserError: another process owns the folder.
    """
    others: list[dict[str, Any]] = []
    for _ in range(_TRIES):
        own = Ownership(folder)
        try:
            others = list(_others(own, report))
            if not others:
                own.write(_about(owns=True))
                return own
        except BaseException:
            own.withdraw()
            raise
        own.withdraw()
        if any(map(_owns, others)):
            break
        time.sleep(_pause.uniform(*_PAUSE_S))
    owner = next(filter(_owns, others), others[0])
    raise UserError(f"{folder}: {doing} by {_owner_text(owner)}: wait until it has ended, or stop it")


def _owns(info: Mapping[str, Any]) -> bool:
    """Return False if a process only asks for the folder; a file that beats but says nothing is an owner's."""
    return bool(info.get("owns", True))


def _others(own: Ownership, report: Report) -> Iterator[dict[str, Any]]:
    """Yield the descriptions of other processes that own the folder or ask for it; remove the files of dead ones."""
    for name in os.listdir(own.path.parent):
        path = own.path.with_name(name)
        if not _NAME.fullmatch(name) or path == own.path:
            continue
        try:
            info = _read(path)
            is_gone = _has_gone(info)
            if is_gone is None:
                is_gone = _is_silent(path, own, report)
            if not is_gone:
                yield _read(path)
        except FileNotFoundError:
            continue  # it has just ended
        if is_gone:
            path.unlink(missing_ok=True)


def _has_gone(info: Mapping[str, Any]) -> bool | None:
    """Return True if the owner has ended, False if it runs, None if only its heartbeat can tell."""
    alive = is_alive(info)
    if alive is not None:
        return not alive
    job = info.get("job_id", "")
    if not job.isdigit():
        return None
    if job == os.environ.get("SLURM_JOB_ID") and info.get("restarts") != _restarts():
        return True  # this job, before it was requeued
    states = ask_squeue([job])
    return True if states is not None and has_ended(states.get(job)) else None


def _is_silent(path: Path, own: Ownership, report: Report) -> bool:
    """Watch a heartbeat from another machine; return False as soon as it beats, True if it has stopped for long.

    Raises:
        FileNotFoundError: the file was removed.
    """
    began = time.monotonic()
    beat = _stat(path).st_mtime
    silent_s = own.now() - beat
    while (left_s := STALE_S - silent_s - (time.monotonic() - began)) > 0:
        owner = _owner_text(_read(path))
        report(str(path.parent), 0, 1, f"waiting for a sign of its owner, {owner}, for {left_s:.0f} s")
        time.sleep(_LOOK_EVERY_S)
        if _stat(path).st_mtime != beat:
            return False
    return True


def _open(path: Path) -> int:
    """Open a file. A file that is opened, not only looked at, lets a network file system ask its server."""
    return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)


def _stat(path: Path) -> os.stat_result:
    descriptor = _open(path)
    try:
        return os.fstat(descriptor)
    finally:
        os.close(descriptor)


def _read(path: Path) -> dict[str, Any]:
    """Return the owner's description of itself, without fields of other types; empty if it is not written yet."""
    with open(_open(path), "rb") as file:
        content = file.read(_MOST_BYTES)
    try:
        fields = JsonObject(parse_strictly(content)).unchecked()
    except ValueError:
        return {}
    return {name: value for name, value in fields.items() if type(value) is _FIELDS.get(name)}


def _owner_text(info: Mapping[str, Any]) -> str:
    if "pid" not in info:
        return "a process that has not said its name yet"
    job = f", job {info['job_id']}" if "job_id" in info else ""
    return f"process {info['pid']} on {info.get('host')}{job}"


def _restarts() -> str:
    """Return how often Slurm has restarted this job."""
    return os.environ.get("SLURM_RESTART_COUNT", "0")
