"""Annotations of Epic-Kitchens: the rows that are read, and those that are refused with file and row."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from karmma_dist.errors import UserError
from karmma_dist.modalities.recording import ClipRecord, Recording
from karmma_dist.packing.clip_cutter import cut_recording
from karmma_dist.packing.pack import make_plan
from karmma_dist.packing.readers.epic_kitchens import read_epic_kitchens
from karmma_dist.packing.readers.epic_recordings import nominal_fps
from karmma_dist.packing.records import CutClip, Plan
from kits.packing import (
    COLUMNS,
    decode,
    epic_spec,
    movie_path,
    read_number,
    row,
    write_epic,
    write_frames,
    write_movie,
)


def _one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ({"stop_timestamp": "00:00:00.10"}, "not after"),
        ({"start_timestamp": "0.1"}, "start_timestamp '0.1'"),
        ({"start_timestamp": "00:00:61.00"}, "HH:MM:SS"),
        ({"stop_frame": 3}, "stop_frame 3 is before start_frame 7"),
        ({"start_frame": "x"}, "start_frame 'x'"),
        ({"verb_class": 2}, "verb_class 2 is not in the class file: it has 0 to 1"),
        ({"noun_class": -1}, "noun_class -1"),
        ({"noun_class": "cup"}, "noun_class 'cup'"),
        ({"narration_id": "P01_01_0"}, "already that of"),
        ({"narration_id": "P01.01"}, "narration_id 'P01.01'"),
        ({"video_id": "../../etc"}, "video_id '../../etc'"),
        ({"participant_id": ".."}, r"participant_id '..'"),
    ],
)
def test_a_bad_row_is_named_with_its_file(tmp_path: Path, bad: dict, named: str) -> None:
    write_epic(tmp_path, [row("P01_01_0"), row("P01_01_1") | bad])
    with pytest.raises(UserError) as caught:
        read_epic_kitchens(epic_spec(tmp_path))
    text = _one_line(caught)
    assert "EPIC_100_train.csv, row 3" in text
    assert named in text


@pytest.mark.parametrize(
    "column", [name for name in COLUMNS if name not in ("narration", "verb", "noun", "narration_timestamp")]
)
def test_a_missing_column_is_named(tmp_path: Path, column: str) -> None:
    write_epic(tmp_path, [row("P01_01_0")], columns=[name for name in COLUMNS if name != column])
    with pytest.raises(UserError, match=f"EPIC_100_train.csv: column '{column}' is missing"):
        read_epic_kitchens(epic_spec(tmp_path))


def test_a_key_is_unique_over_all_splits(tmp_path: Path) -> None:
    write_epic(tmp_path, [row("P01_01_0")], [row("P01_01_0")])
    with pytest.raises(UserError, match=r"validation.csv, row 2: .*train.csv, row 2"):
        read_epic_kitchens(epic_spec(tmp_path))


def test_gzipped_annotations_give_the_same_plan(tmp_path: Path) -> None:
    write_epic(tmp_path, [row("P01_01_0"), row("P01_02_0", "P01_02")])
    plain = read_epic_kitchens(epic_spec(tmp_path))
    path = tmp_path / "annotations" / "EPIC_100_train.csv"
    path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    assert read_epic_kitchens(epic_spec(tmp_path)) == plain


def test_an_absent_split_is_noted_and_none_is_refused(tmp_path: Path) -> None:
    write_epic(tmp_path, [row("P01_01_0")])
    plan = read_epic_kitchens(epic_spec(tmp_path))
    assert plan.splits == ("train",)
    assert any("'validation' skipped" in note for note in plan.notes)
    (tmp_path / "annotations" / "EPIC_100_train.csv").unlink()
    with pytest.raises(UserError, match="no annotations"):
        read_epic_kitchens(epic_spec(tmp_path))


def test_a_missing_raw_folder_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such raw folder.*--raw"):
        read_epic_kitchens(epic_spec(tmp_path / "nowhere"))


def test_a_class_file_with_a_gap_is_refused(tmp_path: Path) -> None:
    write_epic(tmp_path, [row("P01_01_0")])
    (tmp_path / "annotations" / "EPIC_100_verb_classes.csv").write_text("id,key\n0,take\n2,put\n")
    with pytest.raises(UserError, match="without a gap"):
        read_epic_kitchens(epic_spec(tmp_path))


@pytest.mark.parametrize("name", ["../secret.csv", "/etc/passwd", "annotations/../../x.csv"])
def test_no_path_of_a_specification_leaves_the_raw_folder(tmp_path: Path, name: str) -> None:
    write_epic(tmp_path, [row("P01_01_0")])
    spec = epic_spec(tmp_path, epic_kitchens={"splits": {"train": name}})
    with pytest.raises(UserError, match="leaves the raw folder"):
        read_epic_kitchens(spec)


def test_an_unlabelled_split_needs_no_class_columns(tmp_path: Path) -> None:
    write_epic(tmp_path, [row("P01_01_0")])
    test = "narration_id,participant_id,video_id,start_timestamp,stop_timestamp,start_frame,stop_frame\n"
    test += "P01_101_0,P01,P01_101,00:00:01.00,00:00:02.00,50,100\n"
    (tmp_path / "annotations" / "EPIC_100_test_timestamps.csv").write_text(test)
    clips = [c for r in read_epic_kitchens(epic_spec(tmp_path)).recordings for c in r.clips if c.split == "test"]
    assert [clip.labels for clip in clips] == [{"verb": None, "noun": None}]


def test_frame_numbers_count_at_the_nominal_rates(tmp_path: Path) -> None:
    write_epic(tmp_path, [row("P01_01_0"), row("P01_101_0", "P01_101")])
    for name in ("P01_01", "P01_101"):
        write_frames(tmp_path / "EPIC-KITCHENS/P01/flow_frames" / name, [1], ("u", "v"))
    slow, fast = read_epic_kitchens(epic_spec(tmp_path)).recordings
    assert (slow.nominal_fps, slow.media["flow"].rate) == (60, 2)
    assert (fast.nominal_fps, fast.media["flow"].rate) == (50, 1)
    assert [nominal_fps(name) for name in ("P01_01", "P01_101", "P37_103", "P09_99")] == [60, 50, 50, 60]


def test_participants_keeps_only_those(tmp_path: Path) -> None:
    write_epic(tmp_path, [row("P01_01_0"), row("P02_01_0", "P02_01")])
    plan = read_epic_kitchens(epic_spec(tmp_path, participants=["P02", "P99"]))
    assert [recording.name for recording in plan.recordings] == ["P02_01"]
    assert any("P99" in note for note in plan.notes)


def test_recordings_without_any_file_are_left_out_with_note(tmp_path: Path) -> None:
    write_epic(tmp_path, [row("P01_01_0"), row("P02_01_0", "P02_01"), row("P02_01_1", "P02_01")])
    with pytest.raises(UserError, match="no media file"):
        make_plan(epic_spec(tmp_path))
    write_frames(tmp_path / "EPIC-KITCHENS/P01/rgb_frames/P01_01", [1])
    plan = make_plan(epic_spec(tmp_path))
    assert [recording.name for recording in plan.recordings] == ["P01_01"]
    assert any("1 recordings (2 clips) left out" in note for note in plan.notes)


def test_limit_takes_the_first_clips_of_each_split(tmp_path: Path) -> None:
    write_epic(tmp_path, [row(f"P01_01_{n}") for n in range(5)], [row(f"P01_01_{n}") for n in range(5, 9)])
    movie_path(tmp_path).parent.mkdir(parents=True)
    movie_path(tmp_path).touch()
    plan = make_plan(epic_spec(tmp_path), limit=2)
    assert plan.keys("train") == ["P01_01_0", "P01_01_1"]
    assert plan.keys("validation") == ["P01_01_5", "P01_01_6"]
    with pytest.raises(UserError, match="limit 0"):
        make_plan(epic_spec(tmp_path), limit=0)


def _split_of(plan: Plan) -> dict[str, str]:
    return {clip.key: clip.split for recording in plan.recordings for clip in recording.clips}


def _star(share: float, **fields: object) -> dict[str, object]:
    splits = {"train": "annotations/EPIC_100_train.csv", "test": "annotations/EPIC_100_validation.csv"}
    return {"splits": splits, "unlabelled_splits": [], "hold_out": {"validation": share}, **fields}


def test_pruning_leaves_out_clips_of_classes_without_training(tmp_path: Path) -> None:
    train = [row("P01_01_0", verb_class=0, noun_class=1), row("P01_01_1", verb_class=1, noun_class=0)]
    seen = row("P01_02_0", "P01_02", verb_class=1, noun_class=1)
    unseen = row("P01_02_1", "P01_02", verb_class=1, noun_class=2)
    write_epic(tmp_path, train, [seen, unseen])
    plan = read_epic_kitchens(epic_spec(tmp_path, epic_kitchens={"pruned_splits": ["validation"]}))
    assert _split_of(plan) == {"P01_01_0": "train", "P01_01_1": "train", "P01_02_0": "validation"}
    assert any("1 clips left out" in note for note in plan.notes)
    assert "P01_02_1" in _split_of(read_epic_kitchens(epic_spec(tmp_path)))
    kept = epic_spec(tmp_path, epic_kitchens={"pruned_splits": ["validation"]}, participants=["P99"])
    assert any("1 clips left out" in note for note in read_epic_kitchens(kept).notes)


def test_pruning_needs_the_training_annotations(tmp_path: Path) -> None:
    write_epic(tmp_path, [], [row("P01_01_0")])
    with pytest.raises(UserError, match=r"EPIC_100_train\.csv: has a header and no row"):
        read_epic_kitchens(epic_spec(tmp_path, epic_kitchens={"pruned_splits": ["validation"]}))
    (tmp_path / "annotations" / "EPIC_100_train.csv").unlink()
    with pytest.raises(UserError, match="pruned_splits"):
        read_epic_kitchens(epic_spec(tmp_path, epic_kitchens={"pruned_splits": ["validation"]}))


@given(
    videos=st.sets(st.integers(1, 99), min_size=1, max_size=30),
    share=st.floats(0, 0.99),
    other=st.sets(st.integers(1, 99), max_size=10),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
def test_held_out_recordings_do_not_depend_on_other_recordings(
    tmp_path: Path, videos: set[int], share: float, other: set[int]
) -> None:
    def split_per_video(numbers: set[int]) -> dict[str, set[str]]:
        rows = [row(f"P01_{v:02d}_{n}", f"P01_{v:02d}") for v in sorted(numbers) for n in range(2)]
        write_epic(tmp_path, rows)
        plan = read_epic_kitchens(epic_spec(tmp_path, epic_kitchens=_star(share)))
        return {r.name: {clip.split for clip in r.clips} for r in plan.recordings}

    alone, among = split_per_video(videos), split_per_video(videos | other)
    assert all(len(splits) == 1 for splits in alone.values())
    assert alone == {name: among[name] for name in alone}


def test_the_held_out_share_is_about_the_given_one(tmp_path: Path) -> None:
    write_epic(tmp_path, [row(f"P{p:02d}_{v:02d}_0", f"P{p:02d}_{v:02d}") for p in range(1, 38) for v in range(1, 30)])
    for share in (0.0, 0.1, 0.5):
        plan = read_epic_kitchens(epic_spec(tmp_path, epic_kitchens=_star(share)))
        assert plan.splits == ("train", "validation")
        held_out = sum(split == "validation" for split in _split_of(plan).values()) / (37 * 29)
        assert abs(held_out - share) <= 0.03 * (share > 0)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"pruned_splits": ["valid"]}, "'valid' is not a split"),
        ({"pruned_splits": ["train"]}, "nothing to prune"),
        ({"pruned_splits": ["test"]}, "nothing to prune"),
        ({"hold_out": {"test": 0.1}}, "is already a split"),
        ({"hold_out": {"a": 0.5, "b": 0.5}}, "nothing is left"),
        ({"hold_out": {"a": 0.5}, "splits": {"training": "t.csv"}}, "need a labelled split 'train'"),
    ],
)
def test_splits_that_do_not_fit_together_are_refused(tmp_path: Path, fields: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        epic_spec(tmp_path, epic_kitchens=fields)


@given(start=st.floats(0, 1.5), seconds=st.floats(0.02, 1.4))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20, deadline=None)
def test_a_movie_and_its_numbered_frames_give_the_same_clip(
    tmp_path_factory: pytest.TempPathFactory, start: float, seconds: float
) -> None:
    """Expect as many frames, each within one frame of the nominal rate: official numbers are rounded down."""
    root = tmp_path_factory.getbasetemp() / "both"
    movie = root / "P01_01.MP4"
    if not movie.exists():
        write_movie(movie, frames=180, fps=60)
        write_frames(root / "frames", list(range(1, 181)))
    start, stop = round(start, 2), round(start + seconds + 0.01, 2)
    clip = ClipRecord(
        "a", "train", start, stop, {}, start_frame=max(1, int(start * 60 + 1e-6)), stop_frame=int(stop * 60 + 1e-6)
    )
    spec = epic_spec(root, flow={"source": "none"}, audio={"source": "none"})
    (by_time,) = cut_recording(Recording("P01_01", "P01", (clip,), video_file=movie), spec)
    (by_number,) = cut_recording(Recording("P01_01", "P01", (clip,), frames=root / "frames"), spec)
    assert isinstance(by_time, CutClip)
    assert isinstance(by_number, CutClip)
    assert by_time.described == by_number.described
    times = [read_number(picture) for picture in decode(by_time.payloads["video"])]
    numbers = [read_number(picture) - 1 for picture in decode(by_number.payloads["video"])]
    assert len(times) == len(numbers)
    assert all(0 <= shown - file <= 1 for shown, file in zip(times, numbers, strict=True))
