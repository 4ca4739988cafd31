"""Signals in shards: files that a specification names are found for any reader, packed, checked, drawn, streamed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from karmma_dist.errors import UserError
from karmma_dist.evaluation.predict.predict import predict
from karmma_dist.models.karmma import KarmmaModel
from karmma_dist.models.model_card import save_model
from karmma_dist.packing.inspect.inspect import contact_sheet, describe_clip
from karmma_dist.packing.pack import make_plan, pack, read_failures
from karmma_dist.packing.spec import PackingSpec
from karmma_dist.packing.verify.verify import verify
from karmma_dist.recipe import DataRecipe, InputRecipe, ModelRecipe
from karmma_dist.shards.folder import ShardFolder
from karmma_dist.streaming.loader import EvaluationClips, evaluation_batches, open_shards
from kits.packing import write_movie
from kits.signals import SECTION, TRACK, ramp, write_csv

OTHER = {"file": "pose/{participant}/{recording}.csv", "time_unit": "ms", "time_column": "t",
         "channels": [{"name": "x", "unit": "m", "word": "position"}]}  # fmt: skip
INPUTS = InputRecipe.model_validate(
    {
        "video": {"num_frames": 2, "short_side": 32, "crop": 32},
        "signal": {"rate_hz": 50, "num_samples": 50, "num_channels": 2},
    }
)


def write_table(raw: Path, split: str, rows: list[str]) -> None:
    raw.mkdir(parents=True, exist_ok=True)
    (raw / f"{split}.csv").write_text("\n".join(["key,media,start,stop,action,participant", *rows]) + "\n")


def spec(raw: Path, **fields: Any) -> PackingSpec:
    base = {"reader": "plain", "dataset": "test", "raw": str(raw), "out": str(raw / "out"), "flow": {"source": "none"}}
    return PackingSpec.model_validate({**base, "signal": SECTION, **fields})


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A movie with a signal that ends early, a movie without, a signal alone, and one whose file is damaged."""
    root = tmp_path_factory.mktemp("raw")
    for name in ("one", "two"):
        write_movie(root / f"{name}.mp4", frames=100)
    write_csv(root / "signals" / "one.csv", ramp(0, 2.6))
    write_csv(root / "signals" / "alone.csv", ramp(0, 6))
    write_csv(root / "signals" / "broken.csv", [(0, 1, 2), (1, 2)])
    rows = ["one_0,one.mp4,0.5,1.5,a,p", "one_1,one.mp4,2,4,b,p", "two_0,two.mp4,1,2,a,p"]
    rows += ["alone_0,alone.mp4,1,3,b,p", "alone_1,alone.mp4,2,,b,p", "broken_0,broken.mp4,0,1,a,p"]
    write_table(root, "train", rows)
    write_table(root, "validation", ["alone_2,alone.mp4,3,4,a,p"])
    pack(spec(root))
    return root


def test_clips_have_the_signals_that_cover_them(raw: Path) -> None:
    folder = ShardFolder(raw / "out")
    clips = {clip.key: clip for split in folder.splits for clip in folder.clips(split)}
    has = {key: [name for name in folder.modalities if clip.has(name)] for key, clip in clips.items()}
    assert has == {
        "one_0": ["video", "signal"], "one_1": ["video"], "two_0": ["video"],
        "alone_0": ["signal"], "alone_1": ["signal"], "alone_2": ["signal"],
    }  # fmt: skip
    (failure,) = read_failures(raw / "out" / "failures.jsonl")
    assert (failure.key, failure.modality) == ("broken_0", "signal")
    assert failure.error == "broken.csv, line 3: has 2 fields, none for 'tilt'"
    assert folder.metadata(clips["alone_1"]).length_s == 4
    assert verify(raw / "out", full=True).whole
    entry = describe_clip(folder, "one_0")["modalities"]["signal"]
    assert entry["channels"] == "force [N], tilt [deg]"
    assert (entry["num_channels"], entry["span_s"]) == (2, 1.0)


def test_the_manifest_records_the_tracks_and_a_changed_one_is_refused(raw: Path) -> None:
    recorded = ShardFolder(raw / "out").manifest.header.settings["signal"]
    assert recorded["tracks"][0]["file"] == TRACK["file"]
    assert pack(spec(raw)).status == "already packed"
    with pytest.raises(UserError, match=r"packed with another signal\.max_gap_s"):
        pack(spec(raw, signal={**SECTION, "max_gap_s": 0.5}))


def test_without_a_section_nothing_about_signals_is_recorded(raw: Path, tmp_path: Path) -> None:
    plain = PackingSpec.model_validate(
        {"reader": "plain", "dataset": "test", "raw": str(raw), "out": str(tmp_path), "flow": {"source": "none"}}
    )
    pack(plain)
    for path in tmp_path.rglob("*"):
        assert b"signal" not in path.read_bytes()
    assert make_plan(plain).recordings[0].media == {}


def test_a_contact_sheet_draws_signals(raw: Path, tmp_path: Path) -> None:
    contact_sheet(ShardFolder(raw / "out"), tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_signals_are_streamed_with_the_clips_that_have_them(raw: Path, num_workers: int) -> None:
    data = DataRecipe(shards=str(raw / "out"), modalities=["video", "signal"], num_workers=num_workers)
    clips = EvaluationClips(open_shards(data), data, INPUTS, "train")
    with evaluation_batches(clips, 5) as batches:
        (batch,) = list(batches)
    assert not batch.damage
    signals = dict(zip([key for key, has in zip(batch.keys, batch.present_BM[:, 1], strict=True) if has],
                       batch.inputs["signal"], strict=True))  # fmt: skip
    assert set(signals) == {"one_0", "alone_0", "alone_1"}
    assert signals["one_0"].shape == (2, 50)
    assert torch.allclose(signals["one_0"][0].diff(), signals["one_0"][0].diff()[0], atol=1e-5)  # a straight line
    assert float(signals["one_0"][0, 1]) > float(signals["one_0"][0, 0])
    assert float(signals["one_0"][1, 1]) < float(signals["one_0"][1, 0])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_recipe_of_other_channels_ends_in_one_line_and_is_no_damage(raw: Path, num_workers: int) -> None:
    data = DataRecipe(shards=str(raw / "out"), modalities=["signal"], num_workers=num_workers)
    clips = EvaluationClips(open_shards(data), data, InputRecipe(), "train")
    message = "num_channels is 6, but the shards have 2"
    with pytest.raises(UserError, match=message), evaluation_batches(clips, 5) as batches:
        list(batches)


def test_a_model_of_signals_is_asked_by_key(raw: Path, tmp_path: Path) -> None:
    encoders = {"signal": {"name": "signal_cnn", "options": {"width": 4}}}
    sizes = {"width": 8, "num_heads": 2, "feedforward": 8, "fc_width": 8}
    recipe = ModelRecipe.model_validate({"encoders": encoders, **sizes})
    save_model(KarmmaModel(recipe, INPUTS, ["signal"], {"action": 2}), tmp_path, classes={"action": ["a", "b"]})
    (prediction,) = predict(tmp_path, ["alone_0"], shards=str(raw / "out"))
    assert (prediction.found, prediction.seconds, prediction.labels) == (["signal"], 2.0, {"action": "b"})


def test_a_recording_that_lacks_one_of_its_files_has_no_signal(tmp_path: Path) -> None:
    write_table(tmp_path, "train", ["a_0,a.mp4,0,1,x,anna", "b_0,b.mp4,0,1,y,bert"])
    for name in "ab":
        write_movie(tmp_path / f"{name}.mp4", frames=30)
        write_csv(tmp_path / "signals" / f"{name}.csv", ramp(0, 2))
    write_csv(tmp_path / "pose" / "anna" / "a.csv", [(1000 * t, t) for t, *_ in ramp(0, 2)], "t,x")
    both = spec(tmp_path, signal={"tracks": [TRACK, OTHER]})
    media = {recording.name: recording.media for recording in make_plan(both).recordings}
    assert [path.name for path in media["a"]["signal"].paths] == ["a.csv", "a.csv"]
    assert media["b"] == {}
    pack(both)
    folder = ShardFolder(tmp_path / "out")
    assert {clip.key: clip.has("signal") for clip in folder.clips("train")} == {"a_0": True, "b_0": False}
    # The second file decides as well whether a recording is cut again.
    write_csv(tmp_path / "pose" / "anna" / "a.csv", [(0, "nan")], "t,x")
    (tmp_path / "out" / "train-000000.tar").unlink()
    assert [failure.key for failure in pack(both).failures] == ["a_0"]


def test_what_is_no_file_is_damage_and_what_leaves_the_folder_is_refused(tmp_path: Path) -> None:
    write_table(tmp_path, "train", ["a_0,a.mp4,0,1,x,anna"])
    write_movie(tmp_path / "a.mp4", frames=30)
    (tmp_path / "signals" / "a.csv").mkdir(parents=True)
    (failure,) = pack(spec(tmp_path)).failures
    assert failure.modality == "signal"
    assert "is a folder, not a file" in failure.error
    with pytest.raises(UserError, match="leaves the raw folder"):
        make_plan(spec(tmp_path, signal={"tracks": [{**TRACK, "file": "../{recording}.csv"}]}))


def test_a_dataset_without_any_file_says_so(tmp_path: Path) -> None:
    write_table(tmp_path, "train", ["a_0,a.mp4,0,1,x,anna"])
    write_movie(tmp_path / "a.mp4", frames=30)
    note = "no signal: no recording has signals/{recording}.csv"
    assert note in make_plan(spec(tmp_path)).notes
    assert note not in make_plan(spec(tmp_path, signal={**SECTION, "source": "none"})).notes


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({}, "key 'tracks' is missing"),
        ({"tracks": [TRACK, TRACK]}, "two channels are called 'force'"),
        ({"tracks": [{**TRACK, "time_unit": "min"}]}, "time_unit"),
        ({"tracks": [{**TRACK, "channels": []}]}, "channels"),
        ({"tracks": [{**TRACK, "rate": 1}]}, "rate"),
    ],
)
def test_a_wrong_section_is_refused_in_one_line(tmp_path: Path, section: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"signal|train") as caught:
        spec(tmp_path, signal=section)
    assert message in str(caught.value)
