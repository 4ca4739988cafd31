"""Tests of audio from an HDF5 file: it gives the same clips as a video file, and no other file is ever read."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest

from karmma_dist.errors import UserError
from karmma_dist.packing.clip_cutter import cut_recording
from karmma_dist.packing.pack import make_plan
from karmma_dist.packing.records import CutClip, Failure
from kits.packing import decode_sound, epic_spec, movie_path, row, write_epic, write_movie

RATE = 24_000
TONE_HZ = 1000


def _bursts(bursts: list[float], seconds: float = 3.0) -> np.ndarray:
    times = np.arange(round(seconds * RATE)) / RATE
    on = np.any([(times >= start_s) & (times < start_s + 0.1) for start_s in bursts], axis=0)
    return (0.5 * on * np.sin(2 * np.pi * TONE_HZ * times)).astype(np.float32)


def _write(root: Path, **recordings: np.ndarray) -> Path:
    path = root / "EPIC-KITCHENS-100_audio.hdf5"
    with h5py.File(path, "w") as file:
        for name, samples in recordings.items():
            file.create_dataset(name, data=samples)
    return path


def _first(root: Path, **fields: object) -> CutClip | Failure:
    spec = epic_spec(root, flow={"source": "none"}, **fields)
    (clip,) = cut_recording(make_plan(spec).recordings[0], spec)
    return clip


def _onset_s(clip: CutClip | Failure) -> float:
    assert isinstance(clip, CutClip), clip
    samples = np.abs(decode_sound(clip.payloads["audio"]).astype(float))
    return float(np.argmax(samples > 0.25 * samples.max())) / 16_000


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int16])
@pytest.mark.parametrize("start", ["00:00:00.00", "00:00:00.37", "00:00:01.23"])
def test_the_hdf5_file_gives_the_same_clips_as_video_files(tmp_path: Path, dtype: type, start: str) -> None:
    write_epic(tmp_path, [row("a", start=start, stop="00:00:02.80")])
    write_movie(movie_path(tmp_path), frames=75, bursts=[1.5])
    samples = _bursts([1.5])
    _write(tmp_path, P01_01=(samples * 32767).astype(dtype) if dtype is np.int16 else samples.astype(dtype))
    by_movie, by_file = _first(tmp_path, audio={"source": "movie"}), _first(tmp_path, audio={"source": "hdf5"})
    assert isinstance(by_movie, CutClip)
    assert isinstance(by_file, CutClip)
    assert by_file.described == by_movie.described
    assert _onset_s(by_file) == pytest.approx(1.5 - float(start[6:]), abs=1e-3)
    assert _onset_s(by_movie) == pytest.approx(_onset_s(by_file), abs=0.02)


def test_audio_of_the_video_file_comes_before_the_hdf5_file(tmp_path: Path) -> None:
    write_epic(tmp_path, [row("a", stop="00:00:02.80"), row("b", "P01_02", stop="00:00:02.80")])
    write_movie(movie_path(tmp_path), frames=75, bursts=[1.0])
    write_movie(movie_path(tmp_path, "P01_02"), frames=75)
    _write(tmp_path, P01_01=_bursts([2.0]), P01_02=_bursts([2.0]))
    spec = epic_spec(tmp_path, flow={"source": "none"})
    onsets = [_onset_s(cut) for r in make_plan(spec).recordings for cut in cut_recording(r, spec)]
    assert onsets == pytest.approx([0.9, 1.9], abs=0.02)


def test_a_recording_is_packed_with_the_modalities_it_has(tmp_path: Path) -> None:
    write_epic(tmp_path, [row("a"), row("b", "P01_02")])
    write_movie(movie_path(tmp_path), frames=75)
    _write(tmp_path, P01_02=_bursts([0.5]))
    spec = epic_spec(tmp_path, flow={"source": "none"})
    present = {r.name: [set(cut.payloads) for cut in cut_recording(r, spec)] for r in make_plan(spec).recordings}
    assert present == {"P01_01": [{"video"}], "P01_02": [{"audio"}]}


@pytest.mark.parametrize("harm", ["external link", "soft link", "group", "two channels", "words", "nan", "other file"])
def test_only_valid_audio_inside_the_hdf5_file_is_read(tmp_path: Path, harm: str) -> None:
    write_epic(tmp_path, [row("a")])
    with h5py.File(tmp_path / "secret.hdf5", "w") as file:
        file["P01_01"] = _bursts([0.5])
    (tmp_path / "secret.raw").write_bytes(_bursts([0.5]).tobytes())
    with h5py.File(tmp_path / "EPIC-KITCHENS-100_audio.hdf5", "w") as file:
        match harm:
            case "external link":
                file["P01_01"] = h5py.ExternalLink("secret.hdf5", "/P01_01")
            case "soft link":
                file["other"] = _bursts([0.5])
                file["P01_01"] = h5py.SoftLink("/other")
            case "group":
                file.create_group("P01_01")
            case "two channels":
                file["P01_01"] = np.stack([_bursts([0.5])] * 2)
            case "words":
                file["P01_01"] = [b"a", b"b"]
            case "nan":
                file["P01_01"] = np.full(100, np.nan, np.float32)
            case "other file":
                samples = 3 * RATE
                external = [(str(tmp_path / "secret.raw"), 0, 4 * samples)]
                file.create_dataset("P01_01", (samples,), np.float32, external=external)
    clip = _first(tmp_path)
    assert isinstance(clip, Failure)
    assert (clip.modality, clip.stage) == ("audio", "open")
    assert "P01_01" in clip.error


def test_a_file_that_is_not_hdf5_is_one_clear_error(tmp_path: Path) -> None:
    write_epic(tmp_path, [row("a")])
    write_movie(movie_path(tmp_path), frames=50)
    (tmp_path / "EPIC-KITCHENS-100_audio.hdf5").write_bytes(b"no such thing")
    with pytest.raises(UserError, match="cannot be read as HDF5"):
        make_plan(epic_spec(tmp_path))
    assert make_plan(epic_spec(tmp_path, audio={"source": "movie"})).recordings


def test_a_missing_h5py_does_not_make_audio_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_epic(tmp_path, [row("a")])
    write_movie(movie_path(tmp_path), frames=50)
    _write(tmp_path, P01_01=_bursts([0.5]))
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UserError, match="needs h5py"):
        make_plan(epic_spec(tmp_path))


@pytest.mark.parametrize("harm", ["sparse", "empty", "hole", "a day", "huge chunk"])
def test_samples_that_are_declared_and_not_stored_fail_the_clip(tmp_path: Path, harm: str) -> None:
    write_epic(tmp_path, [row("a"), row("b", "P01_02")])
    with h5py.File(tmp_path / "EPIC-KITCHENS-100_audio.hdf5", "w") as file:
        file["P01_02"] = _bursts([0.5])
        match harm:
            case "sparse":
                file.create_dataset("P01_01", (2**40,), np.float32, chunks=(RATE,))
            case "empty":
                file.create_dataset("P01_01", (3 * RATE,), np.float32)
            case "hole":
                data = file.create_dataset("P01_01", (3 * RATE,), np.float32, chunks=(RATE,))
                data[:RATE], data[2 * RATE :] = 0.1, 0.1
            case "a day":
                file.create_dataset("P01_01", (RATE * 3600 * 25,), np.int16, chunks=(RATE,))
            case "huge chunk":
                file.create_dataset("P01_01", (2**28,), np.float32, chunks=(2**28,), compression="gzip")
    spec = epic_spec(tmp_path, flow={"source": "none"})
    cut = {r.name: next(iter(cut_recording(r, spec))) for r in make_plan(spec).recordings}
    failure = cut["P01_01"]
    assert isinstance(failure, Failure)
    assert (failure.modality, failure.stage) == ("audio", "open")
    assert "P01_01: declares" in failure.error or "has chunks of" in failure.error
    assert isinstance(cut["P01_02"], CutClip)


@pytest.mark.parametrize("options", [{}, {"chunks": (RATE,)}, {"chunks": (1000,), "compression": "gzip"}])
def test_samples_that_are_all_stored_are_read(tmp_path: Path, options: dict) -> None:
    write_epic(tmp_path, [row("a")])
    with h5py.File(tmp_path / "EPIC-KITCHENS-100_audio.hdf5", "w") as file:
        file.create_dataset("P01_01", data=np.append(_bursts([0.5]), np.float32(0)), **options)
    assert _onset_s(_first(tmp_path)) == pytest.approx(0.4, abs=1e-3)
