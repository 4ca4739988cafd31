"""Tests of stored pictures: cropping and turning treat all planes alike, colours and brightness are kept."""

from __future__ import annotations

from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter
from hypothesis import given
from hypothesis import strategies as st

from karmma_dist.modalities.recording import ClipRecord, Recording
from karmma_dist.modalities.yuv import Orientation, ToI420, cropped, gray, planes, size_of
from karmma_dist.packing.clip_cutter import cut_recording
from karmma_dist.packing.records import CutClip
from kits.packing import decode, epic_spec

half_sizes = st.integers(1, 20)


def _picture(height: int, width: int) -> np.ndarray:
    return np.arange(height * width * 3 // 2, dtype=np.uint32).astype(np.uint8).reshape(-1, width)


@given(half_sizes, half_sizes, st.booleans(), st.booleans(), st.booleans())
def test_every_plane_is_set_upright_alike(
    half_height: int, half_width: int, is_transposed: bool, mirrors_x: bool, mirrors_y: bool
) -> None:
    picture = _picture(2 * half_height, 2 * half_width)
    upright = Orientation(is_transposed, mirrors_x, mirrors_y).of_i420(picture)
    assert size_of(upright) == (size_of(picture)[::-1] if is_transposed else size_of(picture))
    for before, after in zip(planes(picture), planes(upright), strict=True):
        height, width = after.shape
        for y, x in ((0, 0), (height - 1, 0), (0, width - 1), (height // 2, width // 3)):
            source_y, source_x = height - 1 - y if mirrors_y else y, width - 1 - x if mirrors_x else x
            assert after[y, x] == (before[source_x, source_y] if is_transposed else before[source_y, source_x])


@given(st.data())
def test_cropping_cuts_the_same_region_out_of_every_plane(data: st.DataObject) -> None:
    half_height, half_width = data.draw(half_sizes), data.draw(half_sizes)
    top, left = data.draw(st.integers(0, half_height - 1)), data.draw(st.integers(0, half_width - 1))
    height, width = data.draw(st.integers(1, half_height - top)), data.draw(st.integers(1, half_width - left))
    picture = _picture(2 * half_height, 2 * half_width)
    result = cropped(picture, 2 * left, 2 * top, 2 * width, 2 * height)
    for scale, before, after in zip((2, 1, 1), planes(picture), planes(result), strict=True):
        expected = before[scale * top : scale * (top + height), scale * left : scale * (left + width)]
        np.testing.assert_array_equal(after, expected)


@given(st.integers(0, 255))
def test_gray_is_the_brightness_of_the_source(value: int) -> None:
    stored = ToI420().of_rgb(np.full((16, 16, 3), value, np.uint8))
    assert abs(int(gray(stored)[8, 8]) - value) <= 2


def _write_smooth_movie(path: Path, colorspace: int, color_range: int) -> list[np.ndarray]:
    """Write half a second of smooth colours with the given tags and return the RGB pictures that a player shows."""
    small = np.random.default_rng(0).integers(40, 215, (6, 8, 3), dtype=np.uint8)
    picture = cv2.resize(small, (160, 128), interpolation=cv2.INTER_CUBIC)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "4", "threads": "1"})
        stream.width, stream.height, stream.pix_fmt = 160, 128, "yuv420p"
        stream.codec_context.colorspace, stream.codec_context.color_range = colorspace, color_range
        reformatter = VideoReformatter()
        for number in range(12):
            frame = av.VideoFrame.from_ndarray(np.roll(picture, 4 * number, axis=1), format="rgb24")
            frame = reformatter.reformat(
                frame, format="yuv420p", dst_colorspace=colorspace, dst_color_range=color_range
            )
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


@pytest.mark.parametrize("colorspace", [Colorspace.ITU601, Colorspace.ITU709])
@pytest.mark.parametrize("color_range", [ColorRange.MPEG, ColorRange.JPEG])
@pytest.mark.parametrize("short_side", [128, 64])
def test_stored_colours_match_the_source_for_any_matrix_and_range(
    tmp_path: Path, colorspace: Colorspace, color_range: ColorRange, short_side: int
) -> None:
    path = tmp_path / "m.mp4"
    shown = _write_smooth_movie(path, int(colorspace), int(color_range))
    spec = epic_spec(tmp_path, flow={"source": "none"}, video={"short_side": short_side, "crf": 4})
    (clip,) = cut_recording(Recording("r", "p", (ClipRecord("a", "train", 0.0, None, {}),), video_file=path), spec)
    assert isinstance(clip, CutClip)
    stored = np.stack(decode(clip.payloads["video"])).astype(float)
    height, width = stored.shape[1:3]
    expected = np.stack([cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA) for picture in shown])
    assert np.abs((stored - expected).mean((0, 1, 2))).max() < 1.5
    assert 10 * np.log10(255**2 / np.square(stored - expected).mean()) > 34
