"""Inspecting shards: numbers that add up, a clip by its key, a contact sheet."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from karmma_dist.errors import UserError
from karmma_dist.io.files import sha256_of, write_json
from karmma_dist.modalities.detections.draw import draw_box
from karmma_dist.modalities.detections.store import HAND, OBJECT
from karmma_dist.modalities.flow.draw import flow_colours
from karmma_dist.packing.inspect.inspect import contact_sheet, describe, describe_clip
from karmma_dist.packing.pack import pack
from karmma_dist.packing.spec import PackingSpec
from karmma_dist.shards.folder import ShardFolder
from karmma_dist.shards.format import DamageError, index_path
from kits.packing import write_frames


def test_the_description_adds_up_and_is_json(shards: Path) -> None:
    described = describe(ShardFolder(shards))
    assert json.loads(json.dumps(described)) == described
    assert described["failures"] == 0
    for split, numbers in described["splits"].items():
        assert numbers["clips"] == sum(numbers["subsets"].values())
        assert numbers["bytes"] == sum(path.stat().st_size for path in shards.glob(f"{split}-*.tar"))
        for counts in numbers["label_counts"].values():
            assert sum(counts) == numbers["clips"]
        for modality, clips in numbers["modality_clips"].items():
            assert (numbers["modality_bytes"][modality] > 0) == (clips > 0)
        assert 0.9 * numbers["clips"] < numbers["seconds"] < 2.5 * numbers["clips"]


def test_a_clip_is_described_with_its_place_and_class_names(shards: Path) -> None:
    folder = ShardFolder(shards)
    for clip in folder.clips("validation"):
        described = describe_clip(folder, clip.key)
        assert described["shard"] == clip.shard
        assert described["narration"] == " ".join(described["label_names"].values())
        assert set(described["offsets"]) == {"json"} | {m for m, d in described["modalities"].items() if d}


def test_an_unknown_key_names_the_nearest(shards: Path) -> None:
    folder = ShardFolder(shards)
    key = folder.clips("train")[0].key
    with pytest.raises(UserError, match="did you mean"):
        describe_clip(folder, f"{key}x")


def test_a_sheet_shows_absent_and_damaged_clips_without_failing(shards: Path, tmp_path: Path) -> None:
    folder = ShardFolder(shards)
    contact_sheet(folder, tmp_path / "whole.png", clips=4)
    copy = tmp_path / "copy"
    shutil.copytree(shards, copy)
    for tar in copy.glob("train-*.tar"):
        os.truncate(tar, tar.stat().st_size // 2)
        assert index_path(tar).is_file()
    contact_sheet(ShardFolder(copy), tmp_path / "cut.png", clips=4)
    whole, cut = imread(tmp_path / "whole.png"), imread(tmp_path / "cut.png")
    assert min(whole.shape[:2]) > 100
    assert min(cut.shape[:2]) > 100


def test_a_sheet_of_named_clips_has_a_row_for_each(shards: Path, tmp_path: Path) -> None:
    folder = ShardFolder(shards)
    keys = [clip.key for clip in folder.clips("train")[:3]]
    contact_sheet(folder, tmp_path / "three.png", keys=keys)
    contact_sheet(folder, tmp_path / "one.png", keys=keys[:1])
    assert imread(tmp_path / "three.png").shape[0] > 1.5 * imread(tmp_path / "one.png").shape[0]
    with pytest.raises(UserError, match="no clip 'nobody'"):
        contact_sheet(folder, tmp_path / "none.png", keys=["nobody"])
    with pytest.raises(UserError, match="cannot be written"):
        contact_sheet(folder, tmp_path / "no folder" / "x.png", keys=keys)


def test_flow_colours_are_white_at_rest_and_differ_by_direction() -> None:
    directions = np.array([[[0, 0], [4, 0], [-4, 0], [0, 4]]], np.float32)
    colours = flow_colours(directions, 4.0)[0]
    assert (colours[0] == 255).all()
    assert len({tuple(colour) for colour in colours.tolist()}) == 4


def test_boxes_stand_out_on_light_and_on_dark_pictures() -> None:
    for shade in (0, 128, 255):
        picture = np.full((240, 426, 3), shade, np.uint8)
        for category in (HAND, OBJECT):
            drawn = picture.copy()
            draw_box(drawn, [0.25, 0.25, 0.75, 0.75, category, 1.0])
            edge = drawn[120, 100:113].astype(int)
            assert np.ptp(edge, axis=0).max() > 100
            assert (drawn[120, 213] == shade).all()


def test_a_clip_with_a_dollar_in_its_narration_is_drawn(tmp_path: Path) -> None:
    labels = tmp_path / "labels"
    labels.mkdir()
    (labels / "labels.json").write_text('{"Paying something": "0"}')
    (labels / "train.json").write_text('[{"id": "1", "template": "Paying [something]", "label": "paying $1 or $2"}]')
    write_frames(tmp_path / "flow" / "1", list(range(1, 9)), ("u", "v"))
    base = {"reader": "something_something", "dataset": "ss", "raw": str(tmp_path), "out": str(tmp_path / "out")}
    pack(PackingSpec.model_validate(base))
    folder = ShardFolder(tmp_path / "out")
    assert folder.metadata(folder.clips("train")[0]).stop_s is None
    contact_sheet(folder, tmp_path / "sheet.png")
    assert imread(tmp_path / "sheet.png").min() < 0.5


def test_a_sheet_shows_a_clip_whose_label_is_no_class(shards: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(shards, copy)
    path = index_path(copy / "train-000000.tar")
    index = json.loads(path.read_bytes())
    index["clips"][0]["labels"]["verb"] = 99
    write_json(path, index)
    manifest = json.loads((copy / "manifest.json").read_bytes())
    manifest["splits"]["train"]["shards"][0]["index_sha256"] = sha256_of(path)
    write_json(copy / "manifest.json", manifest)
    contact_sheet(ShardFolder(copy), tmp_path / "sheet.png", keys=[index["clips"][0]["key"]])
    with pytest.raises(DamageError, match="labels are"):
        describe_clip(ShardFolder(copy), index["clips"][0]["key"])
