"""Tests of `karmma-dist bench loader`: it measures the training loader, names its inputs, and fails in one line."""

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


def test_the_datasets_recipe_is_measured(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = bench(capsys, str(shards), "--workers", "2", "--batches", "4", "--headspace")
    assert result["inputs"] == "recipe demo/distill"
    assert result["num_clips"] == 4 * result["batch_size"]
    assert result["drop_prob"] == 0.5
    assert set(result["decode_ms"]) == {"video", "flow", "audio"}
    assert min(result["decode_ms"].values()) > 0
    assert result["clips_per_s"] * result["seconds"] == pytest.approx(result["num_clips"])
    assert 0 <= result["wait_share"] <= 1
    assert 0 <= result["queue_depth"] <= 4
    assert result["damaged_clips"] == 0
    assert result["headspace_clips_per_s"] > 0
    sizes = [sum(m.size for m in clip.members.values() if m) for clip in ShardFolder(shards).clips("train")]
    assert 0 < result["read_kb_per_clip"] < max(sizes) / 1e3


def test_damaged_clips_are_counted_and_replaced(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "s"
    shutil.copytree(shards, copy)
    os.truncate(copy / "train-000001.tar", 0)
    lost = sum(clip.shard == "train-000001.tar" for clip in ShardFolder(copy).clips("train"))
    options = ["--workers", "0", "--batches", "3", "--drop-prob", "0", "--recipe", "demo/audio"]
    result = bench(capsys, str(copy), *options)
    assert result["modalities"] == ["audio"]
    assert 0 < result["damaged_clips"] <= lost
    assert result["headspace_clips_per_s"] is None


def test_default_inputs_are_used_and_named_without_a_fitting_recipe(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "s"
    shutil.copytree(shards, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**manifest, "dataset": "attic"}))
    result = bench(capsys, str(copy), "--workers", "0", "--batches", "1")
    assert result["inputs"].startswith("default inputs (attic/distill: no such file")


def test_the_table_names_what_was_measured(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "loader", str(shards), "--workers", "0", "--batches", "1", "--headspace"]) == 0
    shown = capsys.readouterr().out
    texts = ("clips/s", "decoding video", "ms per clip", "MB/s", "damaged clips", "recipe demo/distill", "no model")
    for text in texts:
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
