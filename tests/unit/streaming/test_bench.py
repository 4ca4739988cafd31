"""`karmma-dist bench loader` measures the loader that trains, says with whose inputs, and fails in one line."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from karmma_dist.cli import main
from karmma_dist.shards.folder import ShardFolder


def bench(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    assert main(["bench", "loader", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_it_measures_the_datasets_own_recipe(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = bench(capsys, str(shards), "--workers", "2", "--batches", "4", "--headspace")
    assert found["inputs"] == "recipe demo/distill"
    assert found["num_clips"] == 4 * found["batch_size"]
    assert found["drop_prob"] == 0.5
    assert set(found["decode_ms"]) == {"video", "flow", "audio"}
    assert min(found["decode_ms"].values()) > 0
    assert found["clips_per_s"] * found["seconds"] == pytest.approx(found["num_clips"])
    assert 0 <= found["wait_share"] <= 1
    assert 0 <= found["queue_depth"] <= 4
    assert found["damaged_clips"] == 0
    assert found["headspace_clips_per_s"] > 0
    sizes = [sum(m.size for m in clip.members.values() if m) for clip in ShardFolder(shards).clips("train")]
    assert 0 < found["read_kb_per_clip"] < max(sizes) / 1e3


def test_it_counts_damaged_clips_and_goes_on(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "s"
    shutil.copytree(shards, copy)
    os.truncate(copy / "train-000001.tar", 0)
    lost = sum(clip.shard == "train-000001.tar" for clip in ShardFolder(copy).clips("train"))
    options = ["--workers", "0", "--batches", "3", "--drop-prob", "0", "--recipe", "demo/audio"]
    found = bench(capsys, str(copy), *options)
    assert found["modalities"] == ["audio"]
    assert 0 < found["damaged_clips"] <= lost
    assert found["headspace_clips_per_s"] is None


def test_without_a_recipe_that_fits_it_says_that_it_takes_the_defaults(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "s"
    shutil.copytree(shards, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**manifest, "dataset": "attic"}))
    found = bench(capsys, str(copy), "--workers", "0", "--batches", "1")
    assert found["inputs"].startswith("default inputs (attic/distill: no such file")


def test_the_table_names_what_was_measured(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "loader", str(shards), "--workers", "0", "--batches", "1", "--headspace"]) == 0
    shown = capsys.readouterr().out
    for text in ("clips/s", "decoding video", "ms a clip", "MB/s", "damaged clips", "recipe demo/distill", "no model"):
        assert text in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: no such shards folder"),
        (["SHARDS", "--recipe", "something_something/detections"], "not 'detections'"),
        (["SHARDS", "--recipe", "no/such"], "no/such: no such file"),
        (["SHARDS", "--batches", "0"], "--batches"),
    ],
)
def test_bad_input_is_one_line(
    shards: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["bench", "loader", *(str(shards) if word == "SHARDS" else word for word in arguments)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
