"""A disk that is full, over a quota, read-only or failing is one line with file and remedy, whatever library wrote."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from karmma_dist.cli import cli, main
from karmma_dist.errors import UserError
from karmma_dist.io.disk_errors import DiskError, make_folder, naming
from karmma_dist.io.files import append_whole, read_file, whole_file, whole_folder, write_whole
from karmma_dist.packing.inspect.inspect import contact_sheet
from karmma_dist.runs.folder import read_state, write_state
from karmma_dist.shards.folder import ShardFolder
from kits.disk_writers import TEXT, WRITERS, file_limit
from kits.patience import HANGS_S

OF_THE_DISK = [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE]
KINDS = [kind for kind in WRITERS if kind != "parquet" or importlib.util.find_spec("pyarrow") is not None]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def expect_whole(folder: Path, before: dict[str, bytes]) -> None:
    """Check that nothing temporary is left, and that no earlier file has changed."""
    assert not list(folder.rglob("*.partial*"))
    now = contents(folder)
    assert {name: now.get(name) for name in before} == before


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_too_large_for_the_disk_is_one_line_with_the_files_final_name(tmp_path: Path, kind: str) -> None:
    (tmp_path / "whole").mkdir()
    WRITERS[kind](tmp_path / "whole")
    largest = max(map(len, contents(tmp_path / "whole").values()))
    # The limit must not let the largest file through, whose size varies a little from one writing to the next.
    for limit in (0, largest // 2):
        folder = tmp_path / str(limit)
        folder.mkdir()
        with file_limit(limit), pytest.raises(DiskError) as caught:
            WRITERS[kind](folder)
        error = caught.value
        assert error.errno == errno.EFBIG
        assert Path(error.filename).is_relative_to(folder)
        nearest = next(above for above in Path(error.filename).parents if above.is_dir())
        assert nearest.is_relative_to(folder)
        assert str(error) == (
            f"{error.filename}: File too large: raise the limit on the size of files in {nearest} "
            "(ulimit -f, or its disk's), then run the same command again to resume"
        )
        expect_whole(folder, {})
        WRITERS[kind](folder)
        assert contents(folder).keys() >= {n for n in contents(tmp_path / "whole") if "tfevents" not in n}


REPLACING = [kind for kind in KINDS if kind not in ("end", "damage", "events", "folder", "log", "media", "trace")]
"""Kinds that put a new file in the place of an earlier one."""


@pytest.mark.parametrize("kind", REPLACING)
def test_an_earlier_file_survives_a_full_disk(tmp_path: Path, kind: str) -> None:
    WRITERS[kind](tmp_path)
    before = contents(tmp_path)
    with file_limit(1), pytest.raises(DiskError):
        WRITERS[kind](tmp_path)
    expect_whole(tmp_path, before)


def test_a_contact_sheet_names_its_file(shards: Path, tmp_path: Path) -> None:
    with file_limit(1000), pytest.raises(DiskError, match=r"sheet\.png: File too large: raise"):
        contact_sheet(ShardFolder(shards), tmp_path / "sheet.png", clips=1)
    assert list(tmp_path.iterdir()) == []


@given(st.lists(st.integers(0, 200), max_size=5), st.integers(0, 300))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_appended_is_there_as_a_whole_or_not_at_all(tmp_path: Path, lengths: list[int], limit: int) -> None:
    path = tmp_path / "log"
    path.unlink(missing_ok=True)
    expected = b""
    for number, length in enumerate(lengths):
        content = bytes([number]) * length
        with file_limit(limit):
            if len(expected) + length <= limit:
                append_whole(path, content)
                expected += content
            else:
                with pytest.raises(DiskError):
                    append_whole(path, content)
        assert path.read_bytes() == expected


@pytest.fixture(scope="module")
def on_real_disks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each kind of file said on small, nameless and read-only file systems, in a process with its own mounts."""
    folder = tmp_path_factory.mktemp("disk")
    own_mounts = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])]
    trial = ["sh", "-c", 'mount -t tmpfs -o size=64k tmpfs "$0"', str(folder)]
    if shutil.which("unshare") is None or subprocess.run([*own_mounts, *trial], check=False).returncode:
        pytest.skip("no file system can be mounted here")
    command = [*own_mounts, sys.executable, "-m", "kits.disk_writers", str(folder)]
    paths = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": paths}, stdout=subprocess.PIPE, check=True, timeout=HANGS_S
    )
    assert list(folder.iterdir()) == []
    results = [json.loads(line) for line in done.stdout.splitlines()]
    return [result for result in results if result["kind"] in KINDS]


def test_every_kind_of_file_names_itself_on_a_real_full_disk(on_real_disks: list[dict]) -> None:
    failed = [result for result in on_real_disks if result["error"] is not None]
    assert {result["kind"] for result in failed if result["disk"] == "full"} == set(KINDS)
    for result in failed:
        assert (result["error"], result["left"]) == ("DiskError", []), result
        assert ".partial" not in result["text"], result
        assert result["text"].startswith(f"{result['file']}: "), result
    for result in on_real_disks:
        assert result["disk"] != "full" or result["again"] == {"error": None}, result


@pytest.mark.parametrize(
    ("disk", "code", "said"),
    [
        ("full", "ENOSPC", "No space left on device: free some space in "),
        ("names", "ENOSPC", "No space left on device: the disk takes no more files: remove some in "),
        ("read-only", "EROFS", "Read-only file system: make "),
    ],
)
def test_a_real_disk_says_what_to_do(on_real_disks: list[dict], disk: str, code: str, said: str) -> None:
    failed = [result for result in on_real_disks if result["disk"] == disk and result["error"] is not None]
    assert len(failed) >= len(KINDS)
    for result in failed:
        assert result["errno"] == code, result
        assert said in result["text"], result
        assert "then run the same command again to resume" in result["text"], result


class LibraryError(Exception):
    """An exception of a library that is no OSError."""


AS_THEY_COME: dict[str, Callable[[int], Exception]] = {
    "plain": lambda number: OSError(number, os.strerror(number)),
    "rust": lambda number: LibraryError(f"Error: I/O error: {os.strerror(number)} (os error {number})"),
    "arrow": lambda number: OSError(number, f"Error writing bytes to file. Detail: [errno {number}] something"),
}


@pytest.mark.parametrize("number", OF_THE_DISK, ids=errno.errorcode.get)
@pytest.mark.parametrize("form", AS_THEY_COME)
def test_errors_of_the_disk_are_one_line_in_any_form(tmp_path: Path, number: int, form: str) -> None:
    def fail(_: Path) -> None:
        raise AS_THEY_COME[form](number)

    with pytest.raises(DiskError) as caught:
        write_whole(tmp_path / "weights", fail)
    error = caught.value
    assert isinstance(error, UserError)
    assert (error.errno, error.strerror, error.filename) == (number, os.strerror(number), str(tmp_path / "weights"))
    assert str(error).startswith(f"{tmp_path / 'weights'}: {os.strerror(number)}: ")
    assert str(tmp_path) in str(error).split(": ", 2)[2]
    assert "then run the same command again to resume" in str(error)
    assert "\n" not in str(error)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)  # from a process of a pool
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_prints_it_and_exits_with_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def invoke(**_: object) -> None:
        with file_limit(0):
            write_whole(tmp_path / "file", TEXT)

    monkeypatch.setattr(cli.commands["runs"], "callback", invoke)
    assert main(["runs"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"error: {tmp_path / 'file'}: File too large: ")


@pytest.mark.parametrize(
    "bug",
    [
        ValueError("of no error"), AttributeError("x"), KeyError(28), RuntimeError("[Errno 28] No space left"),
        OSError("encoder error -2"), LibraryError("HeaderTooLarge"), ZeroDivisionError(),
    ],
    ids=repr,
)  # fmt: skip
def test_a_bug_stays_what_it_is(tmp_path: Path, bug: Exception) -> None:
    def fail(_: Path) -> None:
        raise bug

    with pytest.raises(type(bug)) as caught:
        write_whole(tmp_path / "file", fail)
    assert caught.value is bug
    with pytest.raises(type(bug)) as caught, whole_file(tmp_path / "file"):
        raise bug
    assert caught.value is bug


def test_errors_of_other_files_keep_their_names(tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(TEXT)

    def read(_: Path) -> None:
        read_file(tmp_path / "large", 10)

    with pytest.raises(OSError, match="has more than 10 bytes") as caught:
        write_whole(tmp_path / "file", read)
    assert not isinstance(caught.value, DiskError)
    with pytest.raises(FileNotFoundError) as missing, whole_file(tmp_path / "file"):
        read_file(tmp_path / "none")
    assert missing.value.filename == str(tmp_path / "none")


def test_a_read_error_in_the_block_is_not_the_written_files(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="Input/output error") as caught, whole_file(tmp_path / "file"):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    assert not isinstance(caught.value, DiskError)


def test_other_errors_name_the_final_file_and_stay_of_their_type(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        write_whole(tmp_path / "none" / "file", TEXT)
    assert caught.value.filename == str(tmp_path / "none" / "file")
    with pytest.raises(OSError, match="Permission denied") as denied, naming(tmp_path / "file"):
        raise LibraryError("I/O error: Permission denied (os error 13)")
    assert isinstance(denied.value, PermissionError)
    assert denied.value.filename == str(tmp_path / "file")


def test_files_in_a_folder_have_their_final_names(tmp_path: Path) -> None:
    def write() -> None:
        with whole_folder(tmp_path / "raw") as partial:
            make_folder(partial / "a" / "b")
            write_whole(partial / "a" / "b" / "file", TEXT)

    with file_limit(10), pytest.raises(DiskError) as caught:
        write()
    assert caught.value.filename == str(tmp_path / "raw" / "a" / "b" / "file")


def test_a_failure_that_cannot_be_recorded_does_not_hide_its_reason(tmp_path: Path) -> None:
    write_state(tmp_path, "running")
    with file_limit(0):
        for state in ("failed", "interrupted"):
            write_state(tmp_path, state, error="x")
        with pytest.raises(DiskError):
            write_state(tmp_path, "finished")
    assert read_state(tmp_path)["state"] == "running"
