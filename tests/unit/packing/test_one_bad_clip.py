"""One bad row or file never costs the run: its clips fail by name, a bug is told from damage, the others are packed."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
from pathlib import Path

import pytest

from karmma_dist.cli import main
from karmma_dist.errors import UserError
from karmma_dist.modalities.recording import ClipRecord, MediaFile, Recording
from karmma_dist.packing import clip_cutter
from karmma_dist.packing.clip_cutter import MOST_LATE_S, cut_recording
from karmma_dist.packing.pack import FAILURES, pack
from karmma_dist.packing.records import UNEXPECTED, CutClip, Failure
from karmma_dist.packing.spec import PackingSpec
from karmma_dist.packing.tars import staging
from karmma_dist.shards.folder import ShardFolder
from kits.packing import epic_spec, movie_path, row, write_epic, write_frames, write_movie

SECONDS = 2.0


def _cut(recording: Recording, **fields: object) -> dict[str, CutClip | Failure]:
    spec = epic_spec(Path("/nowhere"), **({"flow": {"source": "none"}} | fields))
    return {cut.key if isinstance(cut, Failure) else cut.record.key: cut for cut in cut_recording(recording, spec)}


def _recording(root: Path, medium: str, *spans: tuple[float, float | None]) -> Recording:
    clips = tuple(ClipRecord(f"c{n}", "train", *span, {"verb": 0}) for n, span in enumerate(spans))
    match medium:
        case "movie":
            return Recording("r", "p", clips, video_file=write_movie(root / "m.mp4", frames=50, bursts=[0.5]))
        case "sound":
            return Recording("r", "p", clips, video_file=write_movie(root / "m.m4a", bursts=[0.5], seconds=SECONDS))
        case "frames":
            return Recording("r", "p", clips, frames=write_frames(root / "m", list(range(1, 121))))
    flow = write_frames(root / "m", list(range(1, 121)), ("u", "v"))
    return Recording("r", "p", clips, media={"flow": MediaFile(flow)})


@pytest.mark.parametrize("stop_s", [13.0, 1_000.0, 1e9, 99_999 * 3600.0, 1e300, 1.7e308])
@pytest.mark.parametrize("medium", ["movie", "sound", "frames", "flow"])
def test_a_stop_far_after_the_end_fails_that_clip_alone(tmp_path: Path, medium: str, stop_s: float) -> None:
    recording = _recording(tmp_path, medium, (0.0, 1.0), (0.5, stop_s), (0.5, 1.5))
    cut = _cut(recording, flow={"source": "auto"})
    late = cut.pop("c1")
    assert isinstance(late, Failure)
    assert late.stage == "cut"
    assert f"stop {stop_s:.12g} s is after the end of m" in late.error
    assert len(late.error) < 200
    alone = _cut(_recording(tmp_path, medium, (0.0, 1.0), (0.5, 1.0), (0.5, 1.5)), flow={"source": "auto"})
    for key, other in cut.items():
        assert isinstance(other, CutClip)
        assert other.payloads == alone[key].payloads


@pytest.mark.parametrize("medium", ["movie", "sound", "frames"])
def test_milliseconds_given_for_seconds_are_named(tmp_path: Path, medium: str) -> None:
    cut = _cut(_recording(tmp_path, medium, (500.0, 1500.0), (500.0, None), (0.0, 1e9)))
    errors = [cut[key].error for key in ("c0", "c1", "c2")]
    assert "stop 1500 s is after the end" in errors[0]
    assert [error.endswith("are these milliseconds?") for error in errors[::2]] == [True, False]
    assert isinstance(cut["c1"], Failure) or medium == "frames"


@pytest.mark.parametrize("medium", ["movie", "sound"])
def test_a_stop_a_little_after_the_end_is_cut_as_before(tmp_path: Path, medium: str) -> None:
    for stop_s in (SECONDS + 0.3, SECONDS + MOST_LATE_S - 0.5):
        cut = _cut(_recording(tmp_path, medium, (1.0, stop_s)))["c0"]
        assert isinstance(cut, CutClip)
        assert cut.described["audio"]["num_samples"] == round((stop_s - 1.0) * 16_000)


def test_the_end_of_the_longest_medium_counts(tmp_path: Path) -> None:
    movie = write_movie(tmp_path / "m.mp4", frames=25, bursts=[0.5], seconds=30.0)
    clips = (ClipRecord("a", "train", 0.5, 29.0, {"verb": 0}), ClipRecord("b", "train", 0.5, 45.0, {"verb": 0}))
    cut = _cut(Recording("r", "p", clips, video_file=movie))
    assert isinstance(cut["a"], CutClip)
    assert isinstance(cut["b"], Failure)


def test_the_number_of_a_file_decides_no_allocation(tmp_path: Path) -> None:
    frames = write_frames(tmp_path / "m", [*range(1, 121), 9_999_999_999])
    clips = (ClipRecord("a", "train", 0.0, 1.0, {"verb": 0}, stop_frame=61), ClipRecord("b", "train", 0.0, 1e8, {}))
    cut = _cut(Recording("r", "p", clips, frames=frames))
    assert isinstance(cut["a"], CutClip)
    assert isinstance(cut["b"], Failure)
    assert "stop 100000000 s is after the end of m" in cut["b"].error


class _Bug(Exception):
    pass


BUGS = [MemoryError(), RecursionError("too deep"), KeyError("x"), _Bug("two\nlines"), ZeroDivisionError("0"),
        OSError(errno.ENOMEM, "no memory"), PermissionError(errno.EACCES, "not allowed")]  # fmt: skip


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Write two recordings of two clips each."""
    root = tmp_path / "raw"
    for name in ("P01_01", "P02_01"):
        write_movie(movie_path(root, name), frames=50, bursts=[0.5])
    return write_epic(root, [row(f"{name}_{n}", name) for name in ("P01_01", "P02_01") for n in range(2)])


def _spec(raw: Path, out: Path) -> PackingSpec:
    return epic_spec(raw, out, flow={"source": "none"})


def _fail_at(monkeypatch: pytest.MonkeyPatch, place: str, error: BaseException) -> None:
    """Let cutting the recording P01_01 raise an error: while it is opened, passed over, completed or written."""
    owner, name = {
        "open": (clip_cutter.VideoFile, "__init__"),
        "pass": (clip_cutter._Cutter, "pictures"),
        "complete": (clip_cutter._Cutter, "complete"),
        "write": (staging, "clip_sample"),
    }[place]
    usual = getattr(owner, name)

    def failing(*args: object) -> object:
        texts = [str(getattr(each, "_recording", each)) for each in args]
        if any("P01_01" in text for text in texts):
            raise error
        return usual(*args)

    monkeypatch.setattr(owner, name, failing)


@pytest.mark.parametrize("error", BUGS, ids=[type(error).__name__ for error in BUGS])
@pytest.mark.parametrize("place", ["open", "pass", "complete", "write"])
def test_any_error_of_a_recording_fails_its_clips_and_no_other(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, error: Exception
) -> None:
    _fail_at(monkeypatch, place, error)
    failures = pack(_spec(raw, tmp_path / "out")).failures
    assert {failure.key for failure in failures} == {"P01_01_0", "P01_01_1"}
    for failure in failures:
        assert failure.stage == UNEXPECTED
        assert type(error).__name__ in failure.error
        assert failure.error.startswith("P01_01.MP4: ")
        assert "\n" not in failure.error
        assert all(word in failure.error for word in (str(error.args[-1]).split() if error.args else []))
    assert {clip.key for clip in ShardFolder(tmp_path / "out").clips("train")} == {"P02_01_0", "P02_01_1"}


@pytest.mark.parametrize("place", ["open", "pass", "complete", "write"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), OSError(errno.ESTALE, "Stale")])
def test_errors_of_the_machine_end_the_run(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, error: OSError
) -> None:
    _fail_at(monkeypatch, place, error)
    with pytest.raises(UserError, match=r"disk full|Stale"):
        pack(_spec(raw, tmp_path / "out"))


@pytest.mark.parametrize("place", ["open", "pass", "complete", "write"])
def test_ctrl_c_ends_the_run(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    _fail_at(monkeypatch, place, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        pack(_spec(raw, tmp_path / "out"))


def test_the_command_tells_bugs_from_damage_and_exits_with_1(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _fail_at(monkeypatch, "complete", KeyError("x"))
    out = tmp_path / "out"
    assert main(["shard", "epic_kitchens", "--raw", str(raw), "--out", str(out), "--set", "flow.source=none"]) == 1
    printed = capsys.readouterr().out
    assert "2 clips failed and were left out (video, unexpected 2)" in printed
    assert "2 of them by no known damage, perhaps a bug; the first, P01_01_0: P01_01.MP4: KeyError: 'x'" in printed
    stored = [json.loads(line)["stage"] for line in (out / FAILURES).read_text().splitlines()]
    assert stored == [UNEXPECTED, UNEXPECTED]


class _KillingSpec(PackingSpec):
    """A specification that kills the worker which asks it for the modalities of a certain recording."""

    @property
    def modalities(self) -> list[str]:
        frame = sys._getframe()
        while frame is not None:
            recording = frame.f_locals.get("recording")
            is_cut = frame.f_code.co_name == "__init__" and isinstance(recording, Recording)
            if is_cut and recording.name == "P02_01":
                os.kill(os.getpid(), signal.SIGKILL)
            frame = frame.f_back  # type: ignore[assignment]
        return super().modalities


def test_a_killed_worker_names_the_recording_it_was_at(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "_UNIT_CLIPS", 2)
    spec = _KillingSpec.model_validate(_spec(raw, tmp_path / "out").model_dump(exclude_unset=True))
    with pytest.raises(UserError, match=r"was killed \(out of memory\?\) while it cut P02_01: pack again") as caught:
        pack(spec, workers=2)
    assert "P01_01" not in str(caught.value).replace(str(tmp_path), "")
    assert pack(_spec(raw, tmp_path / "out"), workers=2).clips == {"train": 4}
