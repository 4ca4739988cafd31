"""Tests that no faulty file is stored as something else: it fails by name, is absent, or is stored as seen."""

from __future__ import annotations

import tarfile
import wave
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from karmma_dist.modalities import video_file
from karmma_dist.modalities.recording import ClipRecord, MediaFile, Recording
from karmma_dist.packing.clip_cutter import cut_recording
from karmma_dist.packing.records import CutClip, Failure
from kits.packing import (
    Beeps,
    decode,
    decode_sound,
    epic_spec,
    heard_late_s,
    number_picture,
    read_number,
    write_frames,
    write_movie,
)

SECONDS = 4.0


def cut(source: Path, start_s: float, stop_s: float | None, **fields: Any) -> CutClip | Failure:
    """Cut one clip out of a video file, or out of a folder or tar of frames at 60 a second."""
    spec = epic_spec(source.parent, **({"flow": {"source": "none"}, "video": {"crf": 5}} | fields))
    record = ClipRecord("c", "train", start_s, stop_s, {}, start_frame=round(60 * start_s) + 1,
                        stop_frame=None if stop_s is None else round(60 * stop_s) + 1)  # fmt: skip
    is_frames = source.is_dir() or source.suffix == ".tar"
    recording = Recording("r", "p", (record,), **({"frames": source} if is_frames else {"video_file": source}))
    (item,) = cut_recording(recording, spec)
    return item


def stored(source: Path, start_s: float, stop_s: float | None, **fields: Any) -> CutClip:
    item = cut(source, start_s, stop_s, **fields)
    assert isinstance(item, CutClip), item
    return item


def failure(source: Path, start_s: float, stop_s: float | None, **fields: Any) -> str:
    item = cut(source, start_s, stop_s, **fields)
    assert isinstance(item, Failure), item
    return f"{item.modality}: {item.error}"


def numbers(item: CutClip) -> list[int]:
    return [read_number(picture) for picture in decode(item.payloads["video"])]


def movie(path: Path, **changes: Any) -> Path:
    """Write four seconds of numbered frames at 25 a second, with beeps at 0.5, 1.5, ... s."""
    codec = {".webm": "libopus", ".flv": "aac"}.get(path.suffix, "aac")
    beeps = Beeps([0.5, 1.5, 2.5, 3.5], codec=codec, rate=48_000 if codec == "libopus" else 24_000)
    return write_movie(path, **({"frames": 100, "beeps": beeps} | changes))


@pytest.mark.parametrize("before_wrap_s", [0.7, 2.2, 3.9])
def test_a_clock_that_wraps_loses_no_picture(tmp_path: Path, before_wrap_s: float) -> None:
    start_s = 2**33 / 90_000 - before_wrap_s
    path = movie(tmp_path / "m.ts", beeps=None, times=[start_s + number / 25 for number in range(100)])
    with av.open(str(path)) as container:
        assert container.start_time < 0
    seen = numbers(stored(path, 0.0, None))
    assert seen[::25] == [0, 25, 50, 75]
    assert sorted(set(seen)) == list(range(100))


CUTS: dict[str, Callable[[bytes], bytes]] = {
    "by its streams' tags": lambda data: data,
    "by the header alone": lambda data: data.replace(b"DURATION", b"XURATION"),
}


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7])
@pytest.mark.parametrize("known", CUTS)
@pytest.mark.parametrize("name", ["m.mkv", "m.webm"])
@pytest.mark.parametrize("has_sound", [False, True])
def test_a_file_that_ends_before_its_header_says_is_damaged(
    tmp_path: Path, name: str, known: str, share: float, has_sound: bool
) -> None:
    path = movie(tmp_path / name, **({} if has_sound else {"beeps": None}))
    data = CUTS[known](path.read_bytes())
    path.write_bytes(data[: round(share * len(data))])
    assert "ends at" in failure(path, 0.0, None)
    assert numbers(stored(path, 0.08, 0.28)) == list(range(2, 7))


@pytest.mark.parametrize("name", ["m.mp4", "m.mov", "m.flv", "m.avi"])
def test_a_file_that_is_cut_is_damaged_in_other_containers_too(tmp_path: Path, name: str) -> None:
    path = movie(tmp_path / name, index_first=name != "m.avi", **({"beeps": None} if name == "m.avi" else {}))
    data = path.read_bytes()
    path.write_bytes(data[: round(0.7 * len(data))])
    failure(path, 0.0, SECONDS)


def test_a_stream_that_ends_before_the_others_by_itself_is_whole(tmp_path: Path) -> None:
    path = movie(tmp_path / "m.mkv", frames=50, seconds=SECONDS)
    path.write_bytes(path.read_bytes().replace(b"DURATION", b"XURATION"))
    item = stored(path, 0.0, 1.9)
    assert len(numbers(item)) == 48
    assert abs(heard_late_s(decode_sound(item.payloads["audio"]), 0.5)) < 0.02


def test_before_the_first_picture_there_is_none(tmp_path: Path) -> None:
    path = movie(tmp_path / "m.mkv", times=[3 + number / 25 for number in range(100)], seconds=7.0)
    item = stored(path, 0.0, 2.0)
    assert sorted(item.payloads) == ["audio"]
    assert abs(heard_late_s(decode_sound(item.payloads["audio"]), 1.5)) < 0.02
    assert "no picture before 3.00 s" in failure(path, 2.5, 3.5)
    assert numbers(stored(path, 3.0, 3.4)) == list(range(10))


def test_a_frame_or_two_before_the_first_picture_are_filled(tmp_path: Path) -> None:
    path = movie(tmp_path / "m.mkv", times=[0.08 + number / 25 for number in range(100)])
    assert numbers(stored(path, 0.0, 0.4))[:4] == [0, 0, 0, 1]


@pytest.mark.parametrize("name", ["m.mkv", "m.webm", "m.ts"])
def test_a_hole_between_pictures_is_damage(tmp_path: Path, name: str) -> None:
    times = [number / 25 + (2.0 if number >= 50 else 0.0) for number in range(100)]
    path = movie(tmp_path / name, times=times, beeps=None)
    assert "no picture until" in failure(path, 1.0, 3.0)
    assert "no picture until" in failure(path, 2.5, 3.5)
    assert numbers(stored(path, 1.0, 1.8))[-1] == 44
    assert numbers(stored(path, 4.2, 5.0))[:2] in ([55, 56], [54, 55])


def test_a_pause_that_the_container_declares_shows_the_picture_before_it(tmp_path: Path) -> None:
    times = [number / 25 + (8.0 if number >= 50 else 0.0) for number in range(100)]
    path = movie(tmp_path / "m.mp4", times=times, beeps=None)
    item = stored(path, 0.4, 1.8)
    assert item.described["video"]["fps"] == 25
    assert numbers(item) == list(range(10, 45))
    assert set(numbers(stored(path, 3.0, 9.0))) == {49}
    assert numbers(stored(path, 10.4, 11.4)) == list(range(60, 85))


def test_a_clock_that_jumps_back_is_named(tmp_path: Path) -> None:
    first, second = (movie(tmp_path / name, frames=50, seconds=2.0) for name in ("a.ts", "b.ts"))
    path = tmp_path / "m.ts"
    path.write_bytes(first.read_bytes() + second.read_bytes())
    assert "the clock jumps back" in failure(path, 0.0, None)
    assert "the clock jumps back" in failure(path, 2.5, 3.0)
    assert "audio" in stored(path, 0.3, 1.5).payloads


@pytest.mark.parametrize("name", ["m.mp4", "m.webm"])
def test_the_last_picture_is_shown_as_long_as_it_says(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with av.open(str(path), "w") as container:
        codec, options = ("libx264", {"bf": "0"}) if name == "m.mp4" else ("libvpx", {"cpu-used": "8"})
        stream = container.add_stream(codec, rate=25, options={**options, "g": "12", "threads": "1"})
        stream.width, stream.height, stream.pix_fmt = 80, 48, "yuv420p"
        packets = []
        for number in range(50):
            frame = av.VideoFrame.from_ndarray(number_picture(number), format="rgb24")
            frame.pts = number
            packets += stream.encode(frame)
        packets += stream.encode(None)
        for packet in packets:
            packet.duration = 51 if packet is packets[-1] else 1
            container.mux(packet)
    assert set(numbers(stored(path, 2.5, 3.5))) == {49}
    assert len(numbers(stored(path, 0.0, None))) == 100


def corners(path: Path) -> list[str]:
    """Return the colours of the corners of what is stored: top left, top right, bottom left, bottom right."""
    picture = decode(stored(path, 0.0, 0.4).payloads["video"])[0].astype(int)
    colours = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "gray": (128, 128, 128)}
    height, width = picture.shape[:2]
    return [
        min(colours, key=lambda name: np.abs(picture[y, x] - colours[name]).sum())
        for y in (4, height - 5) for x in (4, width - 5)
    ]  # fmt: skip


MATRICES = {
    (1, 0, 0, 1): ["red", "green", "blue", "gray"],
    (-1, 0, 0, 1): ["green", "red", "gray", "blue"],
    (1, 0, 0, -1): ["blue", "gray", "red", "green"],
    (-1, 0, 0, -1): ["gray", "blue", "green", "red"],
    (0, 1, -1, 0): ["blue", "red", "gray", "green"],
    (0, -1, 1, 0): ["green", "gray", "red", "blue"],
    (0, 1, 1, 0): ["red", "blue", "green", "gray"],
    (0, -1, -1, 0): ["gray", "green", "blue", "red"],
}


@pytest.mark.parametrize("matrix", MATRICES)
def test_every_display_matrix_is_followed(tmp_path: Path, matrix: tuple[int, ...]) -> None:
    picture = np.full((48, 80, 3), 128, np.uint8)
    picture[:16, :16], picture[:16, -16:], picture[-16:, :16] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    path = write_movie(tmp_path / "m.mp4", pictures=[picture] * 20)
    data = bytearray(path.read_bytes())
    place = data.index(b"tkhd") + 4 + 4 + 36  # version 0 (ISO 14496-12, 8.3.2): 40 bytes after the type
    a, b, c, d = (value << 16 for value in matrix)
    unit = 1 << 30
    data[place : place + 36] = np.array([a, b, 0, c, d, 0, 0, 0, unit], ">i4").tobytes()
    path.write_bytes(data)
    assert corners(path) == MATRICES[matrix]


def test_pixels_that_are_not_square_are_stored_as_seen_and_stated(tmp_path: Path) -> None:
    path = tmp_path / "m.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 80, 60, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(4, 3)
        for number in range(25):
            frame = av.VideoFrame.from_ndarray(number_picture(number, 80, 60), format="rgb24")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    described = stored(path, 0.0, 1.0, flow={"source": "compute"}).described
    for name in ("video", "flow"):
        assert (described[name]["width"], described[name]["height"]) == (106, 60)
        assert described[name]["pixel_aspect"] == "4/3"


def sound_file(path: Path, codec: str, rate: int) -> bytearray:
    write_movie(path, beeps=Beeps([0.5, 1.5, 2.5, 3.5], codec=codec, rate=rate), seconds=SECONDS)
    return bytearray(path.read_bytes())


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7])
def test_sound_whose_checksum_differs_is_damaged(tmp_path: Path, share: float) -> None:
    data = sound_file(tmp_path / "m.flac", "flac", 16_000)
    at = data.index(b"\xff\xf8", round(share * len(data))) + 40  # well inside of a frame
    data[at] ^= 1
    (tmp_path / "m.flac").write_bytes(data)
    assert failure(tmp_path / "m.flac", 0.0, None).startswith("audio:")


def test_a_hole_in_the_sound_is_damage_and_no_silence(tmp_path: Path) -> None:
    data = sound_file(tmp_path / "m.opus", "libopus", 48_000)
    pages = [place for place in range(len(data)) if data[place : place + 4] == b"OggS"]
    with av.open(str(tmp_path / "m.opus")) as container:
        starts = {packet.pos: float(packet.pts * packet.time_base) for packet in container.demux() if packet.size}
    for place in pages:
        if any(pos is not None and pos == place and 1.0 <= time_s < 3.0 for pos, time_s in starts.items()):
            data[place + 30] ^= 0xFF
    hit = bytes(data) != (tmp_path / "m.opus").read_bytes()
    assert hit
    (tmp_path / "m.opus").write_bytes(data)
    assert failure(tmp_path / "m.opus", 0.5, 3.5).startswith("audio:")
    whole = decode_sound(stored(tmp_path / "m.opus", 0.2, 0.9).payloads["audio"])
    assert abs(heard_late_s(whole, 0.3)) < 0.02


@pytest.mark.parametrize("num_channels", [1, 3, 9, 17, 64])
@pytest.mark.parametrize("width", [1, 2, 4])
def test_any_number_of_channels_is_mixed(tmp_path: Path, num_channels: int, width: int) -> None:
    rate = 8000
    times = np.arange(rate) / rate
    tone = np.where((times >= 0.5) & (times < 0.6), np.sin(2 * np.pi * 1000 * times), 0)
    scaled = tone * 100 + 128 if width == 1 else tone * 0.8 * 2.0 ** (8 * width - 1)
    samples = np.repeat(scaled[:, None], num_channels, axis=1).astype({1: "u1", 2: "<i2", 4: "<i4"}[width])
    with wave.open(str(tmp_path / "m.wav"), "wb") as file:
        file.setparams((num_channels, width, rate, 0, "NONE", ""))
        file.writeframes(samples.tobytes())
    heard = np.abs(decode_sound(stored(tmp_path / "m.wav", 0.0, 0.9).payloads["audio"]).astype(int))
    loud = np.flatnonzero(heard > 5000)
    assert abs(loud[0] / 16_000 - 0.5) < 0.02
    assert abs(loud[-1] / 16_000 - 0.6) < 0.02
    assert heard[: round(0.45 * 16_000)].max() < 300


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_frames_that_stop_early_fail_as_a_cut_movie_does(tmp_path: Path, kind: str) -> None:
    source = write_frames(tmp_path / "rgb", list(range(1, 81)))
    if kind == "tar":
        source = tmp_path / "rgb.tar"
        with tarfile.open(source, "w") as archive:
            archive.add(tmp_path / "rgb", "rgb")
    assert "frames 1 to 80" in failure(source, 0.5, 2.0)
    assert len(numbers(stored(source, 0.5, 1.5))) > 20
    flow = write_frames(tmp_path / "flow", list(range(1, 21)), ("u", "v"))
    record = ClipRecord("c", "train", 0.0, 1.2, {}, start_frame=1, stop_frame=73)
    whole = Recording("r", "p", (record,), frames=tmp_path / "rgb", media={"flow": MediaFile(flow, rate=2)})
    (item,) = cut_recording(whole, epic_spec(tmp_path))
    assert isinstance(item, Failure)
    assert item.modality == "flow"


def test_links_in_a_tar_are_followed_inside_of_it_only(tmp_path: Path) -> None:
    folder = write_frames(tmp_path / "rgb", list(range(1, 41)))
    with tarfile.open(tmp_path / "rgb.tar", "w") as archive:
        for number in range(1, 41):
            name = f"frame_{number:010d}.jpg"
            info = tarfile.TarInfo(name)
            if number in (20, 21):
                info.type, info.linkname = (tarfile.LNKTYPE, tarfile.SYMTYPE)[number % 2], "frame_0000000019.jpg"
                archive.addfile(info)
            elif number == 35:
                info.type, info.linkname = tarfile.SYMTYPE, str(folder / name)
                archive.addfile(info)
            else:
                archive.add(folder / name, name)
    shown = numbers(stored(tmp_path / "rgb.tar", 18 / 60, 22 / 60, video={"max_fps": 60, "crf": 5}))
    assert shown == [19, 19, 19, 22]
    assert "not in the tar" in failure(tmp_path / "rgb.tar", 30 / 60, 40 / 60, video={"max_fps": 60})


def test_a_jpeg_followed_by_zeros_decodes(tmp_path: Path) -> None:
    folder = write_frames(tmp_path / "rgb", list(range(1, 31)))
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes() + bytes(200))
    assert numbers(stored(folder, 0.0, 0.5))[0] == 1


NO_MEDIA = {
    "empty": (b"", "empty"),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "LFS"),
    "gzip": (b"\x1f\x8b\x08" + bytes(90), "gzip"),
    "page": (b"\n<!DOCTYPE html><html>404</html>", "HTML"),
    "zeros": (bytes(9000), "zeros"),
    "tar": (bytes(257) + b"ustar" + bytes(999), "tar"),
}


@pytest.mark.parametrize("kind", NO_MEDIA)
def test_a_file_that_is_no_media_is_called_what_it_is(tmp_path: Path, kind: str) -> None:
    content, says = NO_MEDIA[kind]
    (tmp_path / "m.mp4").write_bytes(content)
    assert says in failure(tmp_path / "m.mp4", 0.0, 1.0)


def test_an_mp4_without_its_index_is_called_unfinished(tmp_path: Path) -> None:
    path = movie(tmp_path / "m.mp4")
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"moov") - 4])
    assert "moov" in failure(path, 0.0, 1.0)


@pytest.mark.parametrize("playlist", ["#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:4,\n{}\n#EXT-X-ENDLIST\n",
                                      "ffconcat version 1.0\nfile '{}'\n"])  # fmt: skip
def test_a_playlist_opens_no_other_file(tmp_path: Path, playlist: str) -> None:
    secret = movie(tmp_path / "elsewhere" / "secret.ts")
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "m.mp4").write_text(playlist.format(secret))
    assert "playlist" in failure(tmp_path / "raw" / "m.mp4", 0.0, 1.0)


@pytest.mark.parametrize("name", ["file:..", "concat:a|b", "subfile,,start,0,end,9,,", "http:", "data:video"])
def test_a_name_is_never_taken_for_a_protocol(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    movie(tmp_path / "secret.mp4")
    raw = tmp_path / "raw"
    (raw / name).mkdir(parents=True)
    (raw / name / "secret.mp4").write_text("this is text and no movie at all\n" * 50)
    monkeypatch.chdir(raw)
    failure(Path(name) / "secret.mp4", 0.0, 1.0)
    movie(raw / name / "good.mp4")
    assert numbers(stored(Path(name) / "good.mp4", 0.0, 0.4)) == list(range(10))


def test_a_frame_that_declares_a_huge_picture_or_file_takes_no_memory(tmp_path: Path) -> None:
    folder = write_frames(tmp_path / "rgb", list(range(1, 31)))
    path = folder / "frame_0000000011.jpg"
    data = bytearray(path.read_bytes())
    place = next(place for marker in (b"\xff\xc0", b"\xff\xc2") if (place := data.find(marker)) > 0)
    data[place + 5 : place + 9] = (32_000).to_bytes(2, "big") * 2
    path.write_bytes(data)
    assert "32000x32000" in failure(folder, 0.1, 0.4)
    with open(path, "r+b") as file:
        file.truncate(8 << 30)
    assert "bytes" in failure(folder, 0.1, 0.4)


def test_a_movie_that_declares_a_huge_picture_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = movie(tmp_path / "m.mkv", beeps=None)
    monkeypatch.setattr(video_file, "MOST_PIXELS", 80 * 48 - 1)
    assert "80x48" in failure(path, 0.0, 1.0)
