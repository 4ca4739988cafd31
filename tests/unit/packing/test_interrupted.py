"""Packing that is stopped by a full disk, Ctrl-C or a kill: the folder never looks complete, no process is left, and
the same command gives the bytes of a run that was never stopped."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from karmma_dist.cli import main
from karmma_dist.errors import UserError
from karmma_dist.io import files, locks
from karmma_dist.modalities.recording import ClipRecord, Recording
from karmma_dist.packing.clip_cutter import cut_recording
from karmma_dist.packing.pack import pack
from karmma_dist.packing.records import CutClip
from karmma_dist.packing.spec import PackingSpec
from karmma_dist.packing.tars import staging
from karmma_dist.packing.tars.lock import folder_lock
from karmma_dist.packing.verify.repair import repair
from karmma_dist.packing.verify.verify import verify
from karmma_dist.shards.folder import ShardFolder
from kits.packing import epic_spec, folder_bytes, movie_path, row, write_epic, write_frames, write_movie
from kits.patience import HANGS_S

UNIT_CLIPS = 32
"""Clips of a recording that fills a unit: two such recordings keep two workers busy."""


class SmallDisk:
    """`open`, `fsync` and `mkdir` of a disk that has room for a number of writes."""

    def __init__(self, room: int, *, freed: bool) -> None:
        self.left, self.freed, self.was_full = room, freed, False
        """`freed`: one write fails, and later writes have room again."""

    def use(self) -> None:
        self.left -= 1
        if self.left < 0 and not (self.freed and self.was_full):
            self.was_full = True
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def open(self, file: Path | int, mode: str = "r", **arguments: Any) -> IO[Any]:
        if "r" not in mode:
            self.use()
        return open(file, mode, **arguments)  # what is written is a lock, which stays empty

    def create(self, path: Path, temporary: Path, descriptor: int) -> io.FileIO:
        try:
            self.use()
        except OSError:
            os.close(descriptor)
            raise
        return _SmallFile(path, temporary, descriptor, self)

    @contextmanager
    def filled(self) -> Iterator[None]:
        """Write the files of the block to this disk, and expect one clear error if it gets full."""
        message = ""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(files, "_NamedFile", self.create)
            patch.setattr(locks, "open", self.open, raising=False)
            patch.setattr(os, "fsync", self._counted(os.fsync))
            patch.setattr(os, "mkdir", self._counted(os.mkdir, lambda path, *_: not Path(path).exists()))
            try:
                yield
            except UserError as error:
                message = str(error)
        assert ("disk full" in message) == self.was_full

    def _counted(self, function: Any, writes: Callable[..., bool] = lambda *_: True) -> Any:
        """Wrap a function whose writing calls take room; creating a folder that exists takes none."""

        def counted(*arguments: Any, **named: Any) -> Any:
            if writes(*arguments):
                self.use()
            return function(*arguments, **named)

        return counted


class _SmallFile(files._NamedFile):
    def __init__(self, path: Path, temporary: Path, descriptor: int, disk: SmallDisk) -> None:
        super().__init__(path, temporary, descriptor)
        self._disk = disk

    def write(self, data: Any) -> int:
        try:
            self._disk.use()
        except OSError:
            super().write(bytes(data)[: len(data) // 2])  # the part that fits is on the disk
            raise
        return super().write(data)


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write three recordings of two clips, quick to pack, and a fourth that is not a video file."""
    root = tmp_path_factory.mktemp("sounds")
    names = ("P01_01", "P01_02", "P02_01")
    for name in names:
        write_movie(movie_path(root, name), bursts=[0.5], seconds=2.0)
    movie_path(root, "P03_01").parent.mkdir(parents=True)
    movie_path(root, "P03_01").write_bytes(b"no movie")
    train = [row(f"{name}_{n}", name, f"00:00:00.{20 * n:02d}", "00:00:01.10") for name in names for n in range(2)]
    return write_epic(root, train, [row("P03_01_0", "P03_01")])


def sound_spec(raw: Path, out: Path) -> PackingSpec:
    return epic_spec(raw, out, clips_per_shard=3, video={"source": "none"}, flow={"source": "none"})


@pytest.fixture(scope="module")
def packed_sounds(sounds: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("packed_sounds")
    pack(sound_spec(sounds, out))
    return folder_bytes(out)


def expect_nothing_looks_whole(out: Path, reference: dict[str, str]) -> None:
    """Expect no manifest, and that every tar or index with its final name is complete."""
    for name, digest in folder_bytes(out).items() if out.is_dir() else ():
        assert name != "manifest.json"
        assert reference[name] == digest
    with pytest.raises(UserError):
        verify(out)
    with pytest.raises(UserError):
        ShardFolder(out)


def test_a_disk_full_at_any_write_leaves_nothing_complete(
    sounds: Path, packed_sounds: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "_UNIT_CLIPS", 2)
    room, failed = 0, 0
    while True:
        out = tmp_path / str(room)
        disk = SmallDisk(room, freed=room % 2 == 1)
        with disk.filled():
            pack(sound_spec(sounds, out))
        if not disk.was_full:
            break
        expect_nothing_looks_whole(out, packed_sounds)
        assert pack(sound_spec(sounds, out)).status == "packed"
        assert folder_bytes(out) == packed_sounds
        shutil.rmtree(out)
        room += 1
        failed += 1
    # At least the tar, its fsync and the result of each unit, and the tar, index and fsyncs of each shard.
    assert failed > 3 * 4 + 4 * 2
    assert folder_bytes(out) == packed_sounds


REDIRECTION = """
import os
plain_open = os.open
def redirected(path, flags, *arguments, **named):
    if flags & os.O_CREAT and os.path.basename(path).startswith({name!r}):
        return plain_open({to!r}, os.O_WRONLY)
    return plain_open(path, flags, *arguments, **named)
os.open = redirected
"""


NO_FLOCK = """
import fcntl, os
def flock(*_):
    raise OSError({code}, os.strerror({code}))
fcntl.flock = flock
"""


@contextmanager
def running_first(code: str, folder: Path) -> Iterator[None]:
    """Let this process run some code that replaces functions, and those that it starts before all else."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(code)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", os.open)  # both are put back at the end
        patch.setattr(fcntl, "flock", fcntl.flock)
        patch.setenv("PYTHONPATH", os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]))
        exec(code, {})
        yield


def redirected(name: str, to: Path, folder: Path) -> AbstractContextManager[None]:
    """Let this process and those it starts write to another place what they create under names that begin so."""
    return running_first(REDIRECTION.format(name=name, to=str(to)), folder)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_disk_full_while_cutting_is_one_line(
    frames: Path, packed_frames: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], workers: int
) -> None:
    out = tmp_path / "out"
    with redirected(".000001-P02_01.tar.", Path("/dev/full"), tmp_path / "site"):
        assert main(command(frames, out, workers=workers)) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if not line.startswith(("cut: ", "write: "))]
    assert errors == [f"error: {out}: disk full: free some space and pack again, what is cut is kept"]
    assert not (out / "failures.jsonl").exists()
    assert (out / ".staging/000000-P01_01.result.json").is_file() or workers > 1  # the other may not be done yet
    expect_nothing_looks_whole(out, packed_frames)
    assert main(command(frames, out, workers=workers)) == 0
    assert folder_bytes(out) == packed_frames


def test_after_a_failing_disk_the_rerun_completes(sounds: Path, packed_sounds: dict[str, str], tmp_path: Path) -> None:
    def fails(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fails)
        with pytest.raises(UserError, match=r"000000-P01_01\.tar: Input/output error: mend that and pack again"):
            pack(sound_spec(sounds, tmp_path))
    expect_nothing_looks_whole(tmp_path, packed_sounds)
    pack(sound_spec(sounds, tmp_path))
    assert folder_bytes(tmp_path) == packed_sounds


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EMFILE, errno.ESTALE, errno.EIO])
def test_machine_errors_end_the_run_but_bad_sectors_fail_clips(
    frames: Path, packed_frames: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], code: int
) -> None:
    """ENOSPC may come from the cache of a network disk."""
    read, hit = Path.read_bytes, frames / "EPIC-KITCHENS/P02/rgb_frames/P02_01/frame_0000000021.jpg"

    def fails(path: Path) -> bytes:
        if path == hit:
            raise OSError(code, os.strerror(code), str(path))
        return read(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "read_bytes", fails)
        status = main(command(frames, tmp_path, workers=1))
    errors = [line for line in capsys.readouterr().err.splitlines() if not line.startswith(("cut: ", "write: "))]
    if code == errno.EIO:
        assert (status, errors) == (1, [])
        failed = [json.loads(line) for line in (tmp_path / "failures.jsonl").read_text().splitlines()]
        assert {failure["key"].rpartition("_")[0] for failure in failed} == {"P02_01"}
        assert 0 < len(failed) < UNIT_CLIPS
        assert all("Input/output error" in failure["error"] for failure in failed)
        status = main([*command(frames, tmp_path, workers=1), "--retry-failed"])
    else:
        message = "disk full" if code == errno.ENOSPC else f"frame_0000000021.jpg: {os.strerror(code)}: mend that"
        assert (status, len(errors)) == (2, 1)
        assert message in errors[0]
        expect_nothing_looks_whole(tmp_path, packed_frames)
        status = main(command(frames, tmp_path, workers=1))
    assert status == 0
    assert folder_bytes(tmp_path) == packed_frames


@contextmanager
def no_more_files() -> Iterator[None]:
    """Let this process open no further file."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    held: list[int] = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 1, before[1]))
        with suppress(OSError):
            while True:
                held.append(os.open(os.devnull, os.O_RDONLY))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        for descriptor in held:
            os.close(descriptor)


def test_too_many_open_files_are_no_damage_of_a_movie(tmp_path: Path) -> None:
    movie = write_movie(tmp_path / "m.mp4", frames=10, bursts=[0.1])
    recording = Recording("r", "p", (ClipRecord("a", "train", 0.0, 0.3, {"verb": 0}),), video_file=movie)
    spec = epic_spec(tmp_path, flow={"source": "none"})
    with no_more_files(), pytest.raises(OSError, match="Too many open files") as caught:
        list(cut_recording(recording, spec))
    assert caught.value.errno == errno.EMFILE
    assert [type(cut) for cut in cut_recording(recording, spec)] == [CutClip]


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 60), st.booleans())
@example(0, False)
@example(0, True)
@example(1, False)
@example(1, True)
def test_a_disk_that_is_full_while_mending_loses_nothing(
    sounds: Path, tmp_path_factory: pytest.TempPathFactory, room: int, freed: bool
) -> None:
    root = tmp_path_factory.mktemp("mending")
    raw, out, whole = root / "raw", root / "out", root / "whole"
    shutil.copytree(sounds, raw)
    pack(sound_spec(raw, out))
    shutil.copy(movie_path(raw, "P01_01"), movie_path(raw, "P03_01"))
    pack(sound_spec(raw, whole))
    disk = SmallDisk(room, freed=freed)
    with disk.filled():
        pack(sound_spec(raw, out), retry_failed=True)
    assert disk.was_full or folder_bytes(out) == folder_bytes(whole)
    pack(sound_spec(raw, out), retry_failed=True)
    assert folder_bytes(out) == folder_bytes(whole)
    assert verify(out, full=True).whole


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 12), st.booleans())
@example(0, False)
@example(0, True)
@example(1, False)
@example(1, True)
def test_after_a_disk_full_while_repairing_repair_completes(
    sounds: Path, packed_sounds: dict[str, str], tmp_path_factory: pytest.TempPathFactory, room: int, freed: bool
) -> None:
    out = tmp_path_factory.mktemp("repairing")
    pack(sound_spec(sounds, out))
    (out / "manifest.json").unlink()
    (out / "train-000000.index.json").unlink()
    disk = SmallDisk(room, freed=freed)
    with disk.filled():
        repair(out)
    assert disk.was_full or folder_bytes(out) == packed_sounds
    repair(out)
    assert folder_bytes(out) == packed_sounds


@pytest.fixture(scope="module")
def frames(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write two recordings of numbered frames, each with the clips of one unit."""
    root = tmp_path_factory.mktemp("frames")
    train = []
    for name in ("P01_01", "P02_01"):
        write_frames(root / "EPIC-KITCHENS" / name[:3] / "rgb_frames" / name, list(range(1, 61)))
        for n in range(UNIT_CLIPS):
            times = [f"00:00:0{frame / 60:.4f}" for frame in (n, n + 7.5)]
            train.append(row(f"{name}_{n}", name, *times, start_frame=1 + n, stop_frame=9 + n))
    write_epic(root, train)
    (root / "spec.json").write_text(
        json.dumps(
            {"reader": "epic_kitchens", "dataset": "test", "raw": "-", "out": "-", "clips_per_shard": 40}
            | {"flow": {"source": "none"}}
        )
    )
    return root


@pytest.fixture(scope="module")
def packed_frames(frames: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("packed_frames")
    assert main(command(frames, out, workers=1)) == 0
    return folder_bytes(out)


def command(raw: Path, out: Path, workers: int = 2) -> list[str]:
    return ["shard", str(raw / "spec.json"), "--raw", str(raw), "--out", str(out), "--workers", str(workers)]


@pytest.fixture
def stuck(frames: Path, tmp_path: Path) -> tuple[Path, list[Path]]:
    """Return a raw folder in which one frame of each recording is a pipe, whose reader waits, and the pipes."""
    raw = tmp_path / "raw"
    shutil.copytree(frames, raw)
    pipes = [path for path in sorted(raw.rglob("frame_*")) if path.stem.endswith("20")]
    for path in pipes:
        path.unlink()
        os.mkfifo(path)
    return raw, pipes


def start(raw: Path, out: Path) -> subprocess.Popen[str]:
    """Start packing with two workers in a new session, as from a terminal."""
    words = [sys.executable, "-m", "karmma_dist", *command(raw, out)]
    return subprocess.Popen(words, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)


def end_of(process: subprocess.Popen[str]) -> tuple[str, list[str]]:
    """Return a process's output and its errors except progress. Both are complete only after all its workers end."""
    out, err = process.communicate(timeout=HANGS_S)
    # The empty line is click's: it ends the line on which a terminal shows ^C.
    return out, [line for line in err.splitlines() if line and not line.startswith(("cut: ", "write: "))]


def mend(frames: Path, raw: Path, pipes: list[Path]) -> None:
    for path in pipes:
        path.unlink()
        shutil.copy(frames / path.relative_to(raw), path)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda how: how.name)
def test_after_two_workers_are_stopped_the_rerun_completes(
    frames: Path,
    packed_frames: dict[str, str],
    stuck: tuple[Path, list[Path]],
    tmp_path: Path,
    how: signal.Signals,
) -> None:
    raw, pipes = stuck
    process = start(raw, tmp_path / "out")
    held = [open(path, "wb") for path in pipes]  # noqa: SIM115 - each waits for the worker that reads it
    if how == signal.SIGINT:
        os.killpg(process.pid, how)
    else:
        os.kill(process.pid, how)
    out, errors = end_of(process)
    for file in held:
        file.close()
    if how == signal.SIGINT:
        assert (process.returncode, out) == (130, "")
        assert errors == ["interrupted: run the same command again to go on"]
    else:
        assert process.returncode == -how
    expect_nothing_looks_whole(tmp_path / "out", packed_frames)
    mend(frames, raw, pipes)
    assert main(command(raw, tmp_path / "out", workers=1)) == 0
    assert folder_bytes(tmp_path / "out") == packed_frames


def test_ctrl_c_while_workers_start_is_one_line(stuck: tuple[Path, list[Path]], tmp_path: Path) -> None:
    process = start(stuck[0], tmp_path / "out")
    assert process.stderr is not None
    assert process.stderr.readline().startswith("cut: 0/")
    os.killpg(process.pid, signal.SIGINT)
    out, errors = end_of(process)
    assert (process.returncode, out) == (130, "")
    assert errors == ["interrupted: run the same command again to go on"]


@contextmanager
def killed_inside_the_second_shard(frames: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], IO[bytes]]]:
    """Yield a packer that writes its second shard, and the pipe that it writes to; it is killed after the block."""
    out, pipe = tmp_path / "out", tmp_path / "pipe"
    os.mkfifo(pipe)
    with redirected(".train-000001.tar.", pipe, tmp_path / "site"):
        process = start(frames, out)
    with open(pipe, "rb", buffering=0) as shard:  # waits for the packer that writes it
        yield process, shard
        os.kill(process.pid, signal.SIGKILL)
        end_of(process)


def test_after_a_kill_inside_a_shard_the_rerun_completes(
    frames: Path, packed_frames: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with killed_inside_the_second_shard(frames, tmp_path) as (_, shard):
        assert shard.read(512).startswith(b"P0")
    assert (out / "train-000000.tar").is_file()
    assert not (out / "train-000001.tar").exists()
    expect_nothing_looks_whole(out, packed_frames)
    assert main(command(frames, out, workers=1)) == 0
    assert folder_bytes(out) == packed_frames


def test_exit_code_and_output_give_the_number_of_failures(
    frames: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = tmp_path / "raw"
    shutil.copytree(frames, raw)
    next(raw.rglob("frame_0000000020.jpg")).unlink()
    lost = sum(1 + n <= 20 < 9 + n and (20 - n - 1) % 2 == 0 for n in range(UNIT_CLIPS))
    assert main(command(raw, tmp_path / "out", workers=1)) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert f"{lost} clips failed and were left out (video, decode {lost})" in said
    assert f"train {2 * UNIT_CLIPS - lost} " in said
    assert main(command(raw, tmp_path / "out")) == 1
    assert f"{lost} clips failed" in capsys.readouterr().out
    failures = [json.loads(line) for line in (tmp_path / "out" / "failures.jsonl").read_text().splitlines()]
    assert len(failures) == lost
    assert main(command(frames, tmp_path / "whole", workers=1)) == 0
    assert "failed" not in capsys.readouterr().out


def test_a_second_packer_is_one_line_and_exit_code_2(
    frames: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with folder_lock(tmp_path, None):
        assert main(command(frames, tmp_path)) == 2
    shown = capsys.readouterr()
    assert (shown.out, shown.err.count("\n")) == ("", 1)
    assert "another packer works" in shown.err


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, 524])
def test_on_a_file_system_without_flock_two_workers_pack_the_same_bytes_and_say_once_how(
    frames: Path, packed_frames: dict[str, str], tmp_path: Path, code: int
) -> None:
    out = tmp_path / "out"
    with running_first(NO_FLOCK.format(code=code), tmp_path / "site"):
        process = start(frames, out)
        _, errors = end_of(process)
    assert process.returncode == 0
    (said,) = errors
    assert said.startswith(f"{out}: this file system has no flock (")
    assert folder_bytes(out) == packed_frames
    assert [path.name for path in out.iterdir() if path.name.startswith(".")] == []


def test_without_flock_a_second_packer_is_refused_and_a_killed_one_blocks_nobody(
    frames: Path, packed_frames: dict[str, str], stuck: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    (raw, pipes), out = stuck, tmp_path / "out"
    with running_first(NO_FLOCK.format(code=errno.ENOSYS), tmp_path / "site"):
        process = start(raw, out)
        held = [open(path, "wb") for path in pipes]  # noqa: SIM115 - each waits for the worker that reads it
        second = start(frames, out)
        _, errors = end_of(second)
        assert second.returncode == 2
        assert errors[-1] == f"error: {out}: another packer works in this folder: wait for it or choose another --out"
        os.kill(process.pid, signal.SIGKILL)
        end_of(process)
        for file in held:
            file.close()
        expect_nothing_looks_whole(out, packed_frames)
        mend(frames, raw, pipes)
        assert main(command(raw, out, workers=1)) == 0
    assert folder_bytes(out) == packed_frames
    assert [path.name for path in out.iterdir() if path.name.startswith(".")] == []


def test_a_part_that_comes_late_leaves_what_another_has_assembled(
    frames: Path, packed_frames: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    first, second = ([*command(frames, out, workers=1), "--part", f"{number}/2"] for number in (1, 2))

    @contextmanager
    def outrun(folder: Path, part: tuple[int, int] | None) -> Iterator[Callable[[], bool]]:
        with folder_lock(folder, part) as may_assemble:

            def after_the_other() -> bool:
                monkeypatch.undo()
                assert main(first) == 0
                return may_assemble()

            yield after_the_other

    assert main(first) == 0
    monkeypatch.setattr("karmma_dist.packing.pack.folder_lock", outrun)
    assert main(second) == 0
    assert folder_bytes(out) == packed_frames


def test_without_flock_parts_are_packed_side_by_side(
    frames: Path, packed_frames: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with running_first(NO_FLOCK.format(code=errno.ENOSYS), tmp_path / "site"):
        words = [sys.executable, "-m", "karmma_dist", *command(frames, out, workers=1), "--part"]
        parts = [subprocess.Popen([*words, f"{number}/2"]) for number in (1, 2)]
        assert [part.wait(HANGS_S) for part in parts] == [0, 0]
        if not (out / "manifest.json").is_file():  # both looked before the other one was done: neither assembled
            assert main([*command(frames, out, workers=1), "--part", "1/2"]) == 0
    assert folder_bytes(out) == packed_frames


PLANTED = [
    "manifest.json", "failures.jsonl", "train-000000.tar", "train-000000.index.json", ".staging/000000-P01_01.tar",
    ".staging/000000-P01_01.result.json", ".train-000000.tar.partial", ".manifest.json.partial",
    ".staging/.000000-P01_01.tar.partial",
]  # fmt: skip


def test_no_link_in_the_folder_is_written_through(sounds: Path, packed_sounds: dict[str, str], tmp_path: Path) -> None:
    out, victim = tmp_path / "out", tmp_path / "victim"
    (out / ".staging").mkdir(parents=True)
    victim.write_bytes(b"kept")
    for name in PLANTED:
        (out / name).symlink_to(victim)
    (out / "manifest.json").unlink()  # a manifest that is none is refused
    pack(sound_spec(sounds, out))
    assert victim.read_bytes() == b"kept"
    assert folder_bytes(out) == packed_sounds
    assert not any(path.is_symlink() for path in out.iterdir() if not path.name.startswith("."))


def test_staging_that_leads_elsewhere_is_refused(sounds: Path, tmp_path: Path) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    out.mkdir()
    elsewhere.mkdir()
    (elsewhere / "kept").write_bytes(b"kept")
    (out / ".staging").symlink_to(elsewhere)
    with pytest.raises(UserError, match=r"\.staging: is a symbolic link, .*: remove it"):
        pack(sound_spec(sounds, out))
    assert [path.name for path in elsewhere.iterdir()] == ["kept"]


def test_what_a_killed_packer_left_is_removed_by_the_next_one(
    frames: Path, packed_frames: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with killed_inside_the_second_shard(frames, tmp_path) as (process, shard):
        assert shard.read(1)
        for folder in (out, out / ".staging"):
            (folder / f".x.tar.{files._short_machine()}-{process.pid}-0123abcd.partial").write_bytes(b"half")
    assert main(command(frames, out, workers=1)) == 0
    assert folder_bytes(out) == packed_frames
    assert [path.name for path in out.iterdir() if path.name.startswith(".")] == []
