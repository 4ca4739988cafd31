"""Tests of stored optical flow: its unit and its declared error."""

from __future__ import annotations

from fractions import Fraction

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from karmma_dist.errors import UserError
from karmma_dist.modalities.flow import FlowSpec
from karmma_dist.modalities.flow.store import FlowEncoder, check_method, flow_of_files, quantise_flow, stored_flow
from karmma_dist.modalities.video import VideoSpec
from kits.packing import decode


def _field(number: int, size: tuple[int, int] = (48, 64), amplitude: float = 4.0) -> np.ndarray:
    y, x = np.mgrid[: size[0], : size[1]] / size[1]
    angle = number / 7
    return np.dstack([amplitude * np.cos(4 * x + angle), amplitude * np.sin(4 * y - angle)]).astype(np.float32)


@given(bound=st.floats(0.5, 64))
def test_published_values_at_the_same_bound_are_stored_unchanged(bound: float) -> None:
    gray = np.arange(256, dtype=np.uint8).reshape(16, 16)
    stored = quantise_flow(flow_of_files(np.dstack([gray, gray[::-1]]), bound), bound)
    np.testing.assert_array_equal(stored, np.concatenate([gray, gray[::-1]]))


@given(u=st.floats(-30, 30), bound=st.floats(1, 32))
def test_stored_flow_is_within_half_a_quantisation_step(u: float, bound: float) -> None:
    flow = np.full((2, 3, 2), (u, -u), np.float32)
    stored = stored_flow(quantise_flow(flow, bound), bound)
    assert np.abs(stored - np.clip(flow, -bound, bound)).max() <= bound / 255 + 1e-4


@settings(max_examples=8, deadline=None)
@given(frames=st.integers(1, 70), bound=st.sampled_from([2.0, 8.0]), crf=st.sampled_from([12, 30]))
def test_the_declared_error_is_that_of_the_decoded_member(frames: int, bound: float, crf: int) -> None:
    fields = [_field(number) for number in range(frames)]
    encoder = FlowEncoder(64, 48, Fraction(25), FlowSpec(bound=bound, crf=crf), VideoSpec())
    for flow in fields:
        encoder.add(flow)
    data, described = encoder.finish()
    stored = [stored_flow(picture, bound) for picture in decode(data, "gray")]
    assert len(stored) == frames == described["num_frames"]
    error = np.mean([np.abs(a - b).mean() for a, b in zip(stored, fields, strict=True)])
    # Only up to 16 frames are compared; the field turns evenly, so that they represent all frames.
    assert described["error_px"] == pytest.approx(error, rel=0.2)
    clipped = np.mean([np.abs(flow) > bound for flow in fields])
    assert described["clipped"] == pytest.approx(clipped, abs=0.05)


@pytest.mark.skipif(hasattr(cv2, "optflow"), reason="this OpenCV has TV-L1")
def test_a_method_that_is_not_installed_is_one_clear_error() -> None:
    with pytest.raises(UserError, match="tvl1"):
        check_method(FlowSpec(method="tvl1"))
    check_method(FlowSpec(method="tvl1", source="files"))


@pytest.mark.skipif(not hasattr(cv2, "optflow"), reason="OpenCV without its contrib modules")
@pytest.mark.parametrize("method", ["dis", "tvl1"])
def test_each_method_finds_a_known_motion(method: str) -> None:
    from karmma_dist.modalities.flow.store import flow_between

    base = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 255, (96, 128)).astype(np.float32), (0, 0), 3)
    gray = cv2.normalize(base, None, 0, 255, cv2.NORM_MINMAX).astype(np.uint8)
    moved = np.roll(gray, 3, axis=1)
    flow = flow_between(method).calc(gray, moved, None)[16:-16, 16:-16]
    assert np.median(flow[..., 0]) == pytest.approx(3, abs=0.3)
    assert np.median(flow[..., 1]) == pytest.approx(0, abs=0.3)
