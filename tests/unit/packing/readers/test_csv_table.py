"""The plain reader: a dataset needs one CSV per split; every error in it is named with file and row."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from karmma_dist.errors import UserError
from karmma_dist.packing.pack import pack
from karmma_dist.packing.readers.csv_table import _collected_classes, _label, read_plain
from karmma_dist.packing.spec import PackingSpec, load_spec
from karmma_dist.packing.verify.verify import verify
from karmma_dist.shards.folder import ShardFolder
from kits.packing import decode, decode_sound, read_number, write_movie

FULL = ("key", "media", "start", "stop", "action", "recording", "participant", "narration")


def write_table(path: Path, rows: list[dict[str, object]], columns: tuple[str, ...] = FULL) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", restval="")
        writer.writeheader()
        writer.writerows(rows)


def row(key: str, **other: object) -> dict[str, object]:
    return {"key": key, "media": "a/one.mp4", "start": "0.2", "stop": "1.2", "action": "open"} | other


def spec(raw: Path, out: Path | None = None, **fields: object) -> PackingSpec:
    base = {"reader": "plain", "dataset": "test", "raw": str(raw), "out": str(out or raw / "out")}
    return PackingSpec.model_validate(base | {"flow": {"source": "none"}} | fields)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Write two good clips of one file."""
    root = tmp_path / "raw"
    write_table(root / "train.csv", [row("k0"), row("k1", start="", stop="", action="close")])
    return root


def test_clips_come_out_as_the_table_says(raw: Path, tmp_path: Path) -> None:
    write_movie(raw / "a/one.mp4", frames=50, bursts=[0.5])
    write_movie(raw / "sound.m4a", bursts=[0.1], seconds=1.5)
    write_table(raw / "validation.csv", [row("k2", media="sound.m4a", start="0.5", stop="")])
    write_table(raw / "test.csv", [row("k3", start="1")], ("key", "media", "start", "stop"))
    out = tmp_path / "out"
    assert pack(spec(raw, out)).clips == {"train": 2, "validation": 1, "test": 1}
    assert verify(out, full=True).whole
    folder = ShardFolder(out)
    clips = {clip.key: clip for split in folder.splits for clip in folder.clips(split)}
    assert folder.classes == {"action": ["close", "open"]}
    assert {key: clip.labels["action"] for key, clip in clips.items()} == {"k0": 1, "k1": 0, "k2": 1, "k3": None}
    frames = {key: [read_number(p) for p in decode(folder.read(clips[key], "video"))] for key in ("k0", "k1", "k3")}
    assert frames == {"k0": list(range(5, 30)), "k1": list(range(50)), "k3": list(range(25, 30))}
    assert not clips["k2"].has("video")
    assert len(decode_sound(folder.read(clips["k2"], "audio"))) == pytest.approx(16_000, abs=800)
    assert folder.metadata(clips["k0"]).recording == "a-one"


def test_clips_of_one_file_are_one_recording_over_all_splits(raw: Path) -> None:
    write_table(raw / "validation.csv", [row("k2", media="a/./one.mp4"), row("k3", media="b.mp4", participant="anna")])
    one, other = read_plain(spec(raw)).recordings
    assert [clip.key for clip in one.clips] == ["k0", "k1", "k2"]
    assert (other.name, other.participant) == ("b", "anna")
    kept = read_plain(spec(raw, participants=["anna", "bert"]))
    assert [clip.key for r in kept.recordings for clip in r.clips] == ["k3"]
    assert any("bert" in note for note in kept.notes)


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ({"key": "a.b"}, "key 'a.b'"),
        ({"key": "a/b"}, "key 'a/b'"),
        ({"key": "k0"}, "train.csv, row 2"),
        ({"media": "../one.mp4"}, "leaves the raw folder"),
        ({"media": "/etc/passwd"}, "leaves the raw folder"),
        ({"media": ""}, "media is empty"),
        ({"media": "."}, "raw folder itself"),
        ({"start": "soon"}, "start 'soon'"),
        ({"start": "-1"}, "start '-1'"),
        ({"stop": "nan"}, "stop 'nan'"),
        ({"stop": "inf"}, "stop 'inf'"),
        ({"stop": "0.2"}, "not after 0.2"),
        ({"action": ""}, "action is empty"),
        ({"recording": "x y"}, "recording 'x y'"),
        ({"recording": "other"}, "recording 'other' of a/one.mp4 is 'a-one'"),
        ({"participant": "anna"}, "participant 'anna'"),
        ({"media": "a-one.mp4"}, "tell them apart"),
    ],
)
def test_a_bad_row_is_named_with_its_file(raw: Path, bad: dict[str, object], named: str) -> None:
    write_table(raw / "train.csv", [row("k0"), row("k1") | bad])
    with pytest.raises(UserError) as caught:
        read_plain(spec(raw))
    text = str(caught.value)
    assert "train.csv, row 3" in text
    assert named in text
    assert "\n" not in text


@pytest.mark.parametrize("column", ["key", "media", "start", "stop", "action"])
def test_a_missing_column_is_named(raw: Path, column: str) -> None:
    write_table(raw / "train.csv", [row("k0")], tuple(name for name in FULL if name != column))
    with pytest.raises(UserError, match=f"train.csv: column '{column}' is missing"):
        read_plain(spec(raw))


def test_an_unknown_class_is_refused_with_the_nearest(raw: Path) -> None:
    write_table(raw / "validation.csv", [row("k2", action="opem")])
    with pytest.raises(UserError, match=r"validation\.csv, row 2: action 'opem'.*did you mean 'open'"):
        read_plain(spec(raw))


def test_a_class_file_gives_names_and_takes_ids(raw: Path) -> None:
    (raw / "classes.csv").write_text("id,key\n0,wash\n1,open\n2,close\n")
    write_table(raw / "train.csv", [row("k0"), row("k1", action="2")])
    heads = {"plain": {"heads": {"action": "classes.csv"}}}
    plan = read_plain(spec(raw, **heads))
    assert plan.classes == {"action": ["wash", "open", "close"]}
    assert [clip.labels["action"] for r in plan.recordings for clip in r.clips] == [1, 2]
    write_table(raw / "train.csv", [row("k0", action="3")])
    with pytest.raises(UserError, match=r"train\.csv, row 2: action '3' is not among its 3 classes"):
        read_plain(spec(raw, **heads))


@given(st.lists(st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1), min_size=1))
def test_collected_classes_do_not_depend_on_the_order(
    tmp_path_factory: pytest.TempPathFactory, names: list[str]
) -> None:
    names = [name for name in names if not name.isdecimal()] or ["x"]
    table = tmp_path_factory.mktemp("t") / "t.csv"
    collected = []
    for order in (names, names[::-1]):
        write_table(table, [row(f"k{n}", action=name) for n, name in enumerate(order)])
        collected.append(_collected_classes(table, "action"))
    assert collected[0] == collected[1] == sorted(set(names))
    assert [collected[0][_label("", "action", name, collected[0])] for name in names] == names


def test_ids_without_a_class_file_stay_what_they_are(raw: Path) -> None:
    write_table(raw / "train.csv", [row("k0", action="3"), row("k1", action="0")])
    plan = read_plain(spec(raw))
    assert plan.classes == {"action": ["0", "1", "2", "3"]}
    assert [clip.labels["action"] for r in plan.recordings for clip in r.clips] == [3, 0]
    write_table(raw / "train.csv", [row("k0", action="20240101")])
    with pytest.raises(UserError, match="row 2: action '20240101' is too large"):
        read_plain(spec(raw))


def test_settings_without_effect_and_reserved_columns_are_refused(raw: Path) -> None:
    for fields, named in (
        ({"detections": {"max_boxes": 3}}, "detections"),
        ({"epic_kitchens": {}}, "epic_kitchens"),
        ({"flow": {"source": "files"}}, "flow files"),
        ({"plain": {"heads": {"start": ""}}}, "'start'"),
        ({"plain": {"heads": {}}}, "heads"),
    ):
        with pytest.raises(ValueError, match=named):
            spec(raw, **fields)


def test_the_shipped_example_reads_what_it_shows(tmp_path: Path) -> None:
    lines = (Path(__file__).parents[4] / "shards/plain.yaml").read_text().splitlines()
    table = [line.removeprefix("#   ") for line in lines if line.startswith("#   ")]
    (tmp_path / "train.csv").write_text("\n".join(table) + "\n")
    plan = read_plain(load_spec("plain", raw=tmp_path))
    assert [len(recording.clips) for recording in plan.recordings] == [2]
    assert plan.classes == {"action": ["close drawer", "open drawer"]}
