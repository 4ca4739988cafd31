"""Absence is that nothing has the name; whatever else the file system answers fails the clips of that recording."""

from __future__ import annotations

import errno
import os
import re
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from karmma_dist.errors import UserError
from karmma_dist.modalities.recording import ClipRecord, MediaFile, Recording
from karmma_dist.packing.clip_cutter import cut_recording
from karmma_dist.packing.pack import make_plan, pack
from karmma_dist.packing.records import Failure, MediaFinder, Plan, file_type
from karmma_dist.packing.spec import PackingSpec
from karmma_dist.shards.folder import ShardFolder
from kits.packing import epic_spec, movie_path, row, write_epic, write_frames, write_movie


def _socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the name of a socket has 108 bytes at most
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


OBSTACLES: dict[str, tuple[Callable[[Path], object], str]] = {
    "dangling link": (lambda path: path.symlink_to("/nowhere/at/all"), "is a link to /nowhere/at/all"),
    "loop": (lambda path: path.symlink_to(path), os.strerror(errno.ELOOP)),
    "FIFO": (os.mkfifo, "is a FIFO"),
    "socket": (_socket, "is a socket"),
    "device": (lambda path: path.symlink_to("/dev/null"), "is a device"),
}
ERRNOS = ("EIO", "EACCES", "ESTALE", "ELOOP", "ENOTDIR", "ENAMETOOLONG", "ENOTCONN", "ETIMEDOUT", "EPERM")


def _failing(monkeypatch: pytest.MonkeyPatch, path: Path, name: str) -> None:
    """Let the file system answer every question about a path with an error."""
    number, stat = getattr(errno, name), os.stat

    def answer(asked: object, *args: object, **options: object) -> os.stat_result:
        if str(asked) == str(path):
            raise OSError(number, os.strerror(number), str(path))
        return stat(asked, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "stat", answer)


@pytest.mark.parametrize("kind", OBSTACLES)
def test_what_is_neither_file_nor_folder_is_not_absent(tmp_path: Path, kind: str) -> None:
    make, named = OBSTACLES[kind]
    make(tmp_path / "x")
    with pytest.raises(OSError, match=r"\[Errno \d+\]") as caught:
        file_type(tmp_path / "x")
    assert named in caught.value.strerror


def test_only_a_name_that_nothing_has_is_absent(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "folder").symlink_to(tmp_path)
    assert [file_type(tmp_path / name) for name in ("file", "link", "folder", "x", "y/x", "folder/x")] == [
        "file", "file", "folder", None, None, None,
    ]  # fmt: skip
    (tmp_path / "purged").symlink_to("/scratch/purged")
    with pytest.raises(OSError, match="purged") as caught:
        file_type(tmp_path / "purged/a/b/x")
    assert caught.value.strerror == "is a link to /scratch/purged, which does not exist"
    with pytest.raises(NotADirectoryError):
        file_type(tmp_path / "file/x")
    with pytest.raises(OSError, match="too long"):
        file_type(tmp_path / ("n" * 300))


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Write two recordings of a clip each."""
    root = tmp_path / "raw"
    write_movie(movie_path(root), frames=40, bursts=[0.5])
    write_movie(movie_path(root, "P02_01"), frames=40)
    return write_epic(root, [row("a"), row("b", "P02_01")])


def _spec(root: Path, out: Path | None = None, **fields: object) -> PackingSpec:
    return epic_spec(root, out, **({"flow": {"source": "auto"}} | fields))


def _failures(spec: PackingSpec) -> dict[str, Failure]:
    """Pack, and return the failures; the other clip is packed with everything it has."""
    summary = pack(spec)
    folder = ShardFolder(Path(spec.out))
    assert {clip.key for clip in folder.clips("train")} == {"a", "b"} - {failure.key for failure in summary.failures}
    return {failure.key: failure for failure in summary.failures}


@pytest.mark.parametrize("kind", [*OBSTACLES, "folder"])
def test_a_movie_that_is_no_file_fails_its_clips_by_name(raw: Path, tmp_path: Path, kind: str) -> None:
    path = movie_path(raw)
    path.unlink()
    make, named = OBSTACLES.get(kind, (Path.mkdir, "is a folder, not a file"))
    make(path)
    (failure,) = _failures(_spec(raw, tmp_path / "out")).values()
    assert (failure.key, failure.modality, failure.stage) == ("a", "video", "open")
    assert named in failure.error
    assert "P01_01.MP4" in failure.error


@pytest.mark.parametrize("name", ERRNOS)
@pytest.mark.parametrize("medium", ["movie", "flow"])
def test_any_error_of_the_file_system_but_enoent_fails_the_clips(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, medium: str
) -> None:
    path = movie_path(raw) if medium == "movie" else raw / "EPIC-KITCHENS/P01/flow_frames/P01_01"
    _failing(monkeypatch, path, name)
    (failure,) = _failures(_spec(raw, tmp_path / "out")).values()
    assert failure.key == "a"
    assert failure.modality == ("video" if medium == "movie" else "flow")
    assert os.strerror(getattr(errno, name)) in failure.error


def test_a_purged_disk_does_not_make_flow_absent(raw: Path, tmp_path: Path) -> None:
    (raw / "EPIC-KITCHENS/P01/flow_frames").symlink_to("/scratch/purged")
    (failure,) = _failures(_spec(raw, tmp_path / "out")).values()
    assert (failure.key, failure.modality, failure.stage) == ("a", "flow", "open")
    assert "flow_frames: is a link to /scratch/purged, which does not exist" in failure.error
    assert not _failures(_spec(raw, tmp_path / "computed", flow={"source": "compute"}))
    (raw / "EPIC-KITCHENS/P01/flow_frames").unlink()
    write_frames(raw / "EPIC-KITCHENS/P01/flow_frames/P01_01", list(range(1, 60)), ("u", "v"))
    assert not pack(_spec(raw, tmp_path / "out"), retry_failed=True).failures
    clips = {clip.key: clip for clip in ShardFolder(tmp_path / "out").clips("train")}
    assert clips["a"].has("flow")


def test_frames_that_nothing_needs_do_not_fail_a_clip(raw: Path, tmp_path: Path) -> None:
    (raw / "EPIC-KITCHENS/P01/rgb_frames").symlink_to("/scratch/purged")
    assert not _failures(_spec(raw, tmp_path / "out"))
    movie_path(raw).unlink()
    assert _failures(_spec(raw, tmp_path / "again")).keys() == {"a"}


@pytest.mark.parametrize("place", ["tar", "folder"])
def test_numbered_frames_of_the_wrong_type_fail_their_clips(raw: Path, tmp_path: Path, place: str) -> None:
    path = raw / "EPIC-KITCHENS/P01/flow_frames/P01_01"
    path.parent.mkdir()
    if place == "tar":
        path.with_name("P01_01.tar").mkdir()
    else:
        path.touch()
    (failure,) = _failures(_spec(raw, tmp_path / "out")).values()
    assert ("is a folder, not a file" if place == "tar" else "is a file, not a folder") in failure.error


def test_a_file_that_vanishes_after_planning_fails_its_clips(raw: Path) -> None:
    spec = _spec(raw)
    recording = make_plan(spec).recordings[0]
    movie_path(raw).unlink()
    (failure,) = cut_recording(recording, spec)
    assert isinstance(failure, Failure)
    assert "P01_01.MP4" in failure.error


def test_without_any_medium_the_first_path_is_named(raw: Path) -> None:
    for name in ("P01_01", "P02_01"):
        movie_path(raw, name).unlink()
    with pytest.raises(UserError, match=r"of the 2 annotated.*the first looked for is .*/P01/videos/P01_01\.MP4"):
        make_plan(_spec(raw))


def test_the_exact_name_comes_before_other_spellings(tmp_path: Path) -> None:
    for name in ("m.mp4", "m.MP4", "n.MP4"):
        (tmp_path / name).touch()
    finder = MediaFinder(tmp_path)
    assert finder.file("m.mp4", "row") == tmp_path / "m.mp4"
    assert not finder.notes()
    assert finder.file("n.mp4", "row") == tmp_path / "n.MP4"
    assert finder.notes() == ["1 media found under another spelling; the first is n.MP4 for n.mp4"]
    assert finder.file("o.mp4", "row") is None
    assert finder.sought == tmp_path / "m.mp4"


def plan_of(**changes: Any) -> Plan:
    clip = ClipRecord("a", "train", 0.0, 1.0, {"action": 1})
    other = replace(ClipRecord("b", "train", 0.0, 1.0, {"action": 0}), **changes)
    return Plan((Recording("r", "", (clip, other)),), {"action": ["x", "y"]}, ("train",))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"key": "a"}, "two clips have the key a"),
        ({"key": "b.c"}, r"b\.c"),
        ({"key": "../b"}, r"\.\./b"),
        ({"split": "training"}, "split 'training' is none of train"),
        ({"labels": {"action": 2}}, "clip b: action is 2"),
        ({"labels": {"action": -1}}, "clip b: action is -1"),
        ({"labels": {"verb": 0}}, "clip b: the labels are of the heads verb"),
    ],
)
def test_what_a_reader_does_wrong_is_named_before_anything_is_cut(changes: dict[str, Any], says: str) -> None:
    assert plan_of().problem() == ""
    assert re.search(says, plan_of(**changes).problem())


def test_media_of_an_unknown_modality_are_named() -> None:
    recording = Recording("r", "", (), media={"fllow": MediaFile(Path("x"))})
    assert "'fllow'" in Plan((recording,), {}, ()).problem()
