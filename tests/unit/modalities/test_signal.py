"""Signals: every number is stored as it was given, what is not covered is absent, and windows follow the view."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from karmma_dist.errors import UserError
from karmma_dist.modalities import MODALITIES, DecodeError, StoredError, View
from karmma_dist.modalities.pictures import CutPictures
from karmma_dist.modalities.recording import ClipRecord, MediaError
from karmma_dist.modalities.signal import SIGNAL, SignalDescription, SignalInput
from karmma_dist.modalities.signal.csv_file import read_track
from karmma_dist.modalities.signal.decode import TIME, VALUE, window_start_s
from karmma_dist.modalities.signal.member import Channel, SignalMember, Track, read_member, write_member
from karmma_dist.modalities.signal.store import SignalSource
from karmma_dist.recipe import InputRecipe, ViewsRecipe
from karmma_dist.streaming.views import evaluation_views, training_view
from kits.signals import member_of, ramp, recorded, signal_spec, track_spec, write_csv

DECODER, BREAKER = SIGNAL.decoder, SIGNAL.breaker
numbers = st.floats(-1e25, 1e25) | st.integers(-(10**6), 10**6).map(lambda n: n / 1000) | st.floats(-1e9, 1e9, width=32)
texts = st.text(min_size=1, max_size=15)


@st.composite
def tracks(draw: st.DrawFn) -> Track:
    num_samples, num_channels = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    moments = st.floats(-1e9, 1e9) | st.integers(-(10**9), 10**9).map(lambda n: n / 1000)
    times = sorted(draw(st.lists(moments, min_size=num_samples, max_size=num_samples)))
    values = draw(st.lists(st.lists(numbers, min_size=num_samples, max_size=num_samples),
                           min_size=num_channels, max_size=num_channels))  # fmt: skip
    channels = [Channel(draw(texts), draw(texts), draw(texts), draw(numbers), draw(st.floats(1e-9, 1e9)))
                for _ in range(num_channels)]  # fmt: skip
    return Track(tuple(channels), draw(st.sampled_from([1.0, 1e-3, 1e-9])), np.array(times), np.array(values))


members = st.builds(
    SignalMember, st.floats(0, 1e5), st.floats(1e-3, 1e5), st.lists(tracks(), min_size=1, max_size=3).map(tuple)
)


@given(members)
def test_a_member_gives_back_every_number_and_text(member: SignalMember) -> None:
    read = read_member(write_member(member))
    assert (read.start_s, read.span_s) == (member.start_s, member.span_s)
    for track, other in zip(read.tracks, member.tracks, strict=True):
        assert (track.channels, track.tick_s) == (other.channels, other.tick_s)
        assert np.array_equal(track.times_T, other.times_T)
        assert np.array_equal(track.values_CT, other.values_CT)


def test_decimals_take_the_place_of_whole_numbers() -> None:
    times = np.arange(600) * 5.05 + 1e6
    values = np.round(np.random.default_rng(0).normal(0, 3, (3, 600)), 3)
    channels = tuple(Channel(name, "m/s2", "acceleration", 0.0, 1.0) for name in "xyz")
    data = write_member(SignalMember(1000.0, 3.0, (Track(channels, 1e-3, np.round(times, 3), values),)))
    assert len(data) < 600 * (4 + 3 * 2) + 200


@given(members, st.data())
@settings(max_examples=40)
def test_no_other_bytes_are_a_member_or_anything_but_a_decode_error(member: SignalMember, data: st.DataObject) -> None:
    stored = write_member(member)
    for other in (stored[: data.draw(st.integers(0, len(stored) - 1))], stored + b"\0", b"RIFF" + stored[4:]):
        with pytest.raises(DecodeError):
            read_member(other)
    place = data.draw(st.integers(0, len(stored) - 1))
    try:
        read_member(stored[:place] + bytes([stored[place] ^ 1 << data.draw(st.integers(0, 7))]) + stored[place + 1 :])
    except DecodeError as error:
        assert "\n" not in str(error)  # noqa: PT017 - the change may be one that gives another member


def test_sizes_beyond_the_bytes_are_refused_before_they_are_read() -> None:
    stored = bytearray(write_member(member_of(([0, 1], [[5, 6]]))))
    stored[26:30] = struct.pack("<I", 2**32 - 1)
    with pytest.raises(DecodeError, match="bytes early"):
        read_member(bytes(stored))


def test_a_file_is_read_to_the_sample_whatever_its_spelling(tmp_path: Path) -> None:
    rows = ramp(0, 2)
    plain = read_track(write_csv(tmp_path / "a.csv", rows), track_spec())
    assert plain.times_T.tolist() == [row[0] for row in rows]
    assert plain.values_CT.tolist() == [[row[1] for row in rows], [row[2] for row in rows]]
    text = "note,tilt (deg), force [N] ,time[s]\r\n" + "".join(f'"a, b",{c},{b},{a}\r\n\r\n' for a, b, c in rows)
    (tmp_path / "b.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    other = read_track(tmp_path / "b.csv", track_spec())
    assert np.array_equal(other.times_T, plain.times_T)
    assert np.array_equal(other.values_CT, plain.values_CT)


def test_a_column_may_be_several_channels(tmp_path: Path) -> None:
    channels = [{"name": name, "column": column, "unit": "s", "word": "time"}
                for name, column in (("a", "time"), ("b", "x"), ("c", "time"))]  # fmt: skip
    read = read_track(write_csv(tmp_path / "s.csv", [(0, 5), (1, 6)], "time,x"), track_spec(channels=channels))
    assert read.times_T.tolist() == [0, 1]
    assert read.values_CT.tolist() == [[0, 1], [5, 6], [0, 1]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "s.csv: is empty (0 bytes)"),
        (b"time,force,tilt\n", "s.csv: has a header and no sample"),
        (b"time,force\n0,1\n", "s.csv, line 1: column 'tilt' is missing"),
        (b"time,force,Tilt\n0,1,2\n", "s.csv, line 1: column 'tilt' is missing (did you mean 'Tilt'?)"),
        (b"time,force,tilt,tilt\n0,1,2,3\n", "s.csv, line 1: column 'tilt' occurs twice"),
        (b"time,force [kN],tilt\n0,1,2\n", "s.csv, line 1: column 'force' is in kN, declared is N"),
        (b"time (ms),force,tilt\n0,1,2\n", "s.csv, line 1: column 'time' is in ms, declared is s"),
        (b"time;force;tilt\n0;1;2\n", "s.csv, line 1: its fields are separated by ';': save it with commas"),
        (b"time,force,tilt\n0,1,2\n\n1,2\n", "s.csv, line 4: has 2 fields, none for 'tilt'"),
        (b"time,force,tilt\n0,1,2\n1,,2\n", "s.csv, line 3: force is '', not a number"),
        (b"time,force,tilt\n0,1,2\n1,x,2\n", "s.csv, line 3: force is 'x', not a number"),
        (b"time,force,tilt\n0,nan,2\n", "s.csv, line 2: no line of it has finite numbers only"),
        (b"time,force,tilt\n0,1,2\n1e9,1,2\n", "s.csv: its clock goes from 0 to 1000000000 s: longer than a day"),
        (b"time,force,tilt\n0,1,\xff\n", "s.csv, line 2: is not UTF-8"),
        (b"version https://git-lfs.github.com/spec/v1\n", "s.csv: is a Git LFS pointer"),
        (b"\x1f\x8b\x08", "s.csv: is gzip-compressed"),
    ],
)
def test_a_file_of_another_form_is_damage_with_its_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "s.csv").write_bytes(content)
    with pytest.raises(MediaError) as caught:
        read_track(tmp_path / "s.csv", track_spec())
    assert caught.value.error.startswith(message)
    assert "\n" not in str(caught.value)


def source(path: Path, rows: list[Any], **fields: Any) -> SignalSource:
    section = signal_spec(**fields)
    return SignalSource(section, [read_track(write_csv(path, rows), section.tracks[0])])


def cut(of: SignalSource, start_s: float, stop_s: float) -> SignalMember | None:
    stored = of.cut(ClipRecord("k", "train", start_s, stop_s, {}), stop_s, CutPictures())
    if stored is None:
        return None
    data, entry = stored
    description = SignalDescription.parse(entry)
    DECODER.check(data, description)
    assert description.length_s == stop_s - start_s
    return read_member(data)


@pytest.mark.parametrize("bad", ["nan", "inf", "-inf", "1e300"])
def test_a_sample_that_is_not_finite_fails_the_clips_that_meet_it(tmp_path: Path, bad: str) -> None:
    rows: list[Any] = ramp(0, 10)
    rows[250] = (rows[250][0], bad, 1)
    of = source(tmp_path / "s.csv", rows)
    with pytest.raises(MediaError, match=r"decode: damaged at 4\.98 s: s\.csv, line 252: force is -?(nan|inf|1e\+300)"):
        cut(of, 4, 6)
    assert cut(of, 1, 4.9) is not None
    assert cut(of, 5.1, 9) is not None


def test_a_clock_that_runs_backwards_fails_all_clips_from_there_on(tmp_path: Path) -> None:
    of = source(tmp_path / "s.csv", [*ramp(0, 5), *ramp(4, 10)])
    assert cut(of, 1, 4.9) is not None
    for span in ((4.5, 5.5), (8, 9), (20, 21)):
        with pytest.raises(MediaError, match=r"s\.csv, line 253: the clock runs backwards, from 5 to 4 s"):
            cut(of, *span)


@given(st.floats(0, 9), st.floats(0.05, 3), st.sampled_from([7, 50, 198]))
@settings(max_examples=40, deadline=None)
def test_a_clip_holds_exactly_its_samples_and_one_more_at_each_end(
    tmp_path_factory: pytest.TempPathFactory, start_s: float, length_s: float, rate_hz: float
) -> None:
    rows = ramp(0, 13, rate_hz)
    of = source(tmp_path_factory.mktemp("s") / "s.csv", rows, max_gap_s=0.2)
    member = cut(of, start_s, start_s + length_s)
    assert member is not None
    (track,) = member.tracks
    times = [row[0] for row in rows]
    inside = [place for place, time_s in enumerate(times) if start_s < time_s < start_s + length_s]
    first = max(place for place, time_s in enumerate(times) if time_s <= start_s)
    last = min(place for place, time_s in enumerate(times) if time_s >= start_s + length_s)
    assert set(inside) <= set(range(first, last + 1))
    assert track.times_T.tolist() == times[first : last + 1]
    assert track.values_CT.T.tolist() == [list(row[1:]) for row in rows[first : last + 1]]


def test_what_the_samples_do_not_cover_is_absent(tmp_path: Path) -> None:
    rows = [*ramp(1, 5), *ramp(5.5, 9)]
    of = source(tmp_path / "s.csv", rows)
    assert of.end_s == 9
    present = {span: cut(of, *span) is not None for span in [
        (1, 5), (5.5, 9),
        (0, 0.5), (9.5, 10), (5.1, 5.4),  # no sample in it
        (4, 6), (4.99, 5.51), (3, 9),  # the gap is inside
        (4, 5.1), (0.9, 2), (8, 9.1), (5.45, 7),  # a tenth of it is not covered at one end
        (4, 5.2), (0.5, 2), (8, 9.5), (5.2, 7),
    ]}  # fmt: skip
    assert {span for span, has in present.items() if has} == {
        (1, 5), (5.5, 9), (4, 5.1), (0.9, 2), (8, 9.1), (5.45, 7),
    }  # fmt: skip
    patient = source(tmp_path / "s.csv", rows, max_gap_s=0.5)
    assert cut(patient, 4, 6) is not None
    strict = source(tmp_path / "s.csv", rows, min_coverage=1.0)
    assert cut(strict, 1, 5) is not None
    assert cut(strict, 4, 5.1) is None


def test_samples_as_far_apart_as_the_limit_are_no_gap(tmp_path: Path) -> None:
    assert cut(source(tmp_path / "s.csv", ramp(0, 10, 10)), 0.33, 9.77) is not None


def test_statistics_are_the_recordings_unless_they_are_given(tmp_path: Path) -> None:
    rows = ramp(0, 4)
    member = cut(source(tmp_path / "s.csv", rows), 1, 2)
    assert member is not None
    forces = np.array([row[1] for row in rows])
    assert (member.channels[0].mean, member.channels[0].std) == pytest.approx((forces.mean(), forces.std()), rel=1e-5)
    channels = [{"name": "force", "unit": "N", "word": "force", "mean": 3.5, "std": 0.25}]
    given_member = cut(source(tmp_path / "s.csv", rows, tracks=[track_spec(channels=channels).model_dump()]), 1, 2)
    assert given_member is not None
    assert [(channel.mean, channel.std) for channel in given_member.channels] == [(3.5, 0.25)]


def test_a_channel_that_never_changes_is_not_divided_by_zero(tmp_path: Path) -> None:
    member = cut(source(tmp_path / "s.csv", [(t, 7, 1) for t, *_ in ramp(0, 2)]), 0, 1)
    assert member is not None
    assert (member.channels[0].mean, member.channels[0].std) == (7, 1)


def decoded(member: SignalMember, **fields: Any) -> tuple[np.ndarray, SignalDescription, SignalInput]:
    inputs = SignalInput(num_channels=len(member.channels), **fields)
    description = SignalDescription.parse(recorded(member))
    return DECODER.decode(write_member(member), description, inputs), description, inputs


@given(st.floats(0.5, 20), st.integers(1, 40), st.integers(0, 5))
def test_the_middle_is_evaluated_and_any_part_is_trained_on(length_s: float, num_frames: int, epoch: int) -> None:
    inputs = InputRecipe.model_validate({"video": {"num_frames": num_frames}, "signal": {"num_samples": 100}})
    signal = inputs.section("signal")
    free_s = length_s - signal.window_s
    views = evaluation_views(inputs.video, 0, ViewsRecipe(temporal=3), is_wide=True)
    starts = [window_start_s(view, length_s, signal) for view in views]
    assert starts == pytest.approx([free_s / 6, free_s / 2, free_s * 5 / 6])
    start_s = window_start_s(training_view(inputs.video, 0, 0, epoch, "k"), length_s, signal)
    assert min(free_s, 0) - 1e-9 <= start_s <= max(free_s, 0) + 1e-9


def test_windows_are_interpolated_on_a_regular_clock_each_track_by_its_own() -> None:
    first, second = np.array([0, 0.1, 0.35, 0.6, 1.0]), np.array([0, 0.5, 1.0])
    member = member_of((first + 7, [10 * first, -first]), (second + 7, [3 * second]), start_s=7.0)
    arrays, description, inputs = decoded(member, rate_hz=20, num_samples=12)
    view = View(np.array([0.5]), 0.5, 0.5, False, np.ones(3, np.float32))
    (window,) = DECODER.cut(arrays, description, inputs, [view], 1.0)
    moments = np.arange(12) / 20 + 0.2
    assert window.dtype == np.float32
    assert window == pytest.approx(np.stack([10 * moments, -moments, 3 * moments]), abs=1e-5)
    (padded,) = DECODER.cut(arrays, description, inputs, [view], 0.3)
    outside = np.arange(12) / 20 - 0.15 < 0
    assert (padded[:, outside] == 0).all()
    assert (padded[:, ~outside][:, 1:] != 0).all()


def test_models_receive_channels_of_mean_0_and_variance_1(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    rows = [(n / 100, a, b) for n, (a, b) in enumerate(random.normal((50, -3), (7, 0.1), (1001, 2)).tolist())]
    of = source(tmp_path / "s.csv", rows)
    stored = of.cut(ClipRecord("k", "train", 0.0, 10.0, {}), 10.0, CutPictures())
    assert stored is not None
    inputs = SignalInput(num_channels=2, num_samples=1000)
    array = DECODER.decode(stored[0], SignalDescription.parse(stored[1]), inputs)[:, VALUE]
    assert array.mean(axis=1) == pytest.approx([0, 0], abs=1e-4)
    assert array.std(axis=1) == pytest.approx([1, 1], abs=1e-4)


def test_another_number_of_channels_than_the_recipes_is_no_damage() -> None:
    member = member_of(([0, 1], [[1, 2], [3, 4]]))
    description = SignalDescription.parse(recorded(member))
    with pytest.raises(UserError, match=r"inputs\.signal\.num_channels is 6, but the shards have 2 channels: c0 \[u\]"):
        DECODER.decode(write_member(member), description, SignalInput())


@pytest.mark.parametrize(
    ("field", "value", "kind"),
    [
        ("num_samples", 3, "length"), ("num_channels", 1, "length"), ("span_s", 2.0, "decode"),
        ("channels", "x", "decode"),
    ],
)  # fmt: skip
def test_a_member_of_another_size_than_described_is_found(field: str, value: Any, kind: str) -> None:
    member = member_of(([0, 1], [[1, 2], [3, 4]]))
    DECODER.check(write_member(member), SignalDescription.parse(recorded(member)))
    with pytest.raises(StoredError) as caught:
        DECODER.check(write_member(member), SignalDescription.parse(recorded(member) | {field: value}))
    assert caught.value.kind == kind


def broken(effect: str, amount: float, whole: np.ndarray, key: str = "k", seed: int = 0) -> np.ndarray:
    before = whole.copy()
    result: np.ndarray = BREAKER.break_uncut(effect, amount, whole, key, seed)  # type: ignore[attr-defined]
    assert np.array_equal(whole, before)
    assert result.shape == whole.shape
    return result


@pytest.mark.parametrize("breakage", SIGNAL.breakages, ids=lambda breakage: breakage.kind)
def test_a_signal_is_broken_more_with_every_severity_and_for_one_clip_alone(breakage: Any) -> None:
    random = np.random.default_rng(0)
    times, values = np.arange(200) / 50, np.cumsum(random.normal(0, 1, (6, 200)), axis=1)
    arrays, description, inputs = decoded(member_of((times, values)), num_samples=300)
    view = View(np.array([0.5]), 0.5, 0.5, False, np.ones(3, np.float32))

    def window(whole: np.ndarray) -> np.ndarray:
        cut_window: np.ndarray = DECODER.cut(whole, description, inputs, [view], 4.0)[0]
        return cut_window

    distances = [0.0]
    for amount in breakage.amounts:
        result = broken(breakage.effect, amount, arrays)
        assert np.array_equal(result, broken(breakage.effect, amount, arrays))
        assert np.isfinite(window(result)).all()
        distances.append(float(np.abs(window(result) - window(arrays)).mean()))
    assert distances == sorted(distances)
    assert distances[1] > 0
    outcomes = {broken(breakage.effect, breakage.amounts[0], arrays, key).tobytes() for key in "abcdefgh"}
    assert breakage.is_random == (len(outcomes) > 1)


def test_what_breaks_is_what_the_kind_says() -> None:
    times, values = np.arange(200) / 50, np.random.default_rng(0).normal(0, 1, (5, 200))
    whole = decoded(member_of((times, values)))[0]
    frozen = broken("frozen", 0.4, whole)[:, VALUE]
    assert sum((channel == channel[0]).all() for channel in frozen) == 2
    moved = broken("bias", 0.5, whole)[:, VALUE] - whole[:, VALUE]
    assert np.abs(moved) == pytest.approx(0.5 * np.ones_like(moved))
    assert np.array_equal(broken("late", 0.25, whole)[:, TIME], whole[:, TIME] + 0.25)
    lost = broken("lost", 0.5, whole)
    kept = [set(zip(*channel.tolist(), strict=True)) for channel in lost]
    assert all(pairs <= set(zip(*channel.tolist(), strict=True)) for pairs, channel in zip(kept, whole, strict=True))
    packets = {round(time_s * 1e6) // 100_000 for time_s, _ in kept[0] if time_s > 0}
    assert 5 < len(packets) < 35
    assert {len(pairs) for pairs in kept} == {len(kept[0])}


def test_the_table_has_the_signal_last_of_its_own() -> None:
    assert list(MODALITIES)[:5] == ["video", "flow", "audio", "detections", "signal"]
    assert MODALITIES["signal"].letter == "S"
