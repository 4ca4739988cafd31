"""Tests that damage is never taken for absence: a clip is delivered exactly as packed, or it is left out and named."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from karmma_dist.errors import UserError
from karmma_dist.modalities.stored_frames import FramesDecoder
from karmma_dist.packing.pack import pack
from karmma_dist.packing.spec import load_spec
from karmma_dist.recipe import DataRecipe, InputRecipe
from karmma_dist.shards.folder import ShardFolder
from karmma_dist.shards.format import Clip
from karmma_dist.streaming.batch import Batch
from karmma_dist.streaming.loader import EvaluationClips, TrainingClips, open_shards
from karmma_dist.streaming.order import Slice

INPUTS = InputRecipe.model_validate(
    {
        "video": {"num_frames": 2, "short_side": 16, "crop": 12},
        "audio": {"num_windows": 1, "window_s": 0.1, "num_mels": 8},
    }
)
BLOCK = 512
"""Size of a tar's blocks in bytes."""

Content = dict[str, dict[str, bytes]]
"""Bytes of the array, by key and modality."""


def content(batch: Batch) -> Content:
    """Return the arrays of a batch, without padding."""
    delivered: Content = {key: {} for key in batch.keys if key}
    for column, name in enumerate(("video", "flow", "audio")):
        rows = [row for row, present in enumerate(batch.present_BM[:, column].tolist()) if present]
        for place, row in enumerate(rows):
            delivered[batch.keys[row]][name] = batch.inputs[name][place].numpy().tobytes()
    return delivered


class Readers:
    """Training and evaluation clips of one folder, a shard of each to damage, and their content before the damage."""

    def __init__(self, root: Path) -> None:
        data = DataRecipe(shards=str(root), max_damaged_fraction=1.0)
        folder = open_shards(data)
        self.root = root
        self.training = TrainingClips(folder, data, INPUTS, seed=1, batch_size=1)
        self.evaluation = EvaluationClips(folder, data, INPUTS, "validation")
        self.tars = {split: root / f"{split}-000000.tar" for split in ("train", "validation")}
        self.bytes = {split: tar.read_bytes() for split, tar in self.tars.items()}
        self.whole: Content = {}
        self.places: dict[str, int] = {}
        for place in range(len(self.training.clips)):
            delivered = content(self.training.batch(Slice(0, 0, place, place + 1)))
            self.whole |= delivered
            self.places[next(iter(delivered))] = place
        self.whole |= content(self.evaluation.batch(Slice(0, 0, 0, len(self.evaluation.clips))))
        self.clips: dict[str, list[Clip]] = {
            split: [clip for clip in folder.clips(split) if clip.shard == tar.name] for split, tar in self.tars.items()
        }

    def check(self, is_readable: Callable[[int, int], bool]) -> None:
        """Check that each clip of the damaged shards is delivered if and only if all its bytes are intact.

        Args:
            is_readable: Function that returns True if the bytes [start, stop) of the shard are those that were written.
        """
        names = {split: {clip.key for clip in clips} for split, clips in self.clips.items()}
        lost = {
            clip.key
            for clips in self.clips.values()
            for clip in clips
            if not all(is_readable(m.offset, m.offset + m.size) for m in clip.members.values() if m is not None)
        }
        for key in sorted(names["train"]):
            batch = self.training.batch(Slice(0, 0, self.places[key], self.places[key] + 1))
            assert len(batch.keys) == 1
            assert batch.valid_B.all()
            assert (batch.keys != [key]) == (key in lost)
            self._delivers_only_whole_clips(batch)
            assert {event.key for event in batch.damage} <= lost
            assert bool(batch.damage) == (key in lost)
        batch = self.evaluation.batch(Slice(0, 0, 0, len(self.evaluation.clips)))
        self._delivers_only_whole_clips(batch)
        assert {clip.key for clip in self.evaluation.clips} - set(batch.keys) == lost & names["validation"]
        assert {event.key for event in batch.damage} == lost & names["validation"]
        assert all((key == "") == (not valid) for key, valid in zip(batch.keys, batch.valid_B.tolist(), strict=True))
        for event in batch.damage:
            assert event.shard == self.tars["validation"].name
            assert event.member.startswith(f"{event.key}.")

    def _delivers_only_whole_clips(self, batch: Batch) -> None:
        for key, arrays in content(batch).items():
            assert arrays == self.whole[key]


@pytest.fixture
def readers(tiny: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Readers:
    """Return readers of a copy of the shards; each different member is decoded only once."""
    root = tmp_path_factory.mktemp("damaged") / "s"
    shutil.copytree(tiny, root)
    decode = cache(lambda arguments: reader_decode(*pickle.loads(arguments)))
    monkeypatch.setattr(FramesDecoder, "decode_views", lambda *arguments: decode(pickle.dumps(arguments)))
    return Readers(root)


reader_decode: Callable[..., np.ndarray] = FramesDecoder.decode_views


@pytest.fixture(scope="module")
def tiny(kitchen: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pack the kitchen in small pictures, two clips per shard."""
    out = tmp_path_factory.mktemp("tiny") / "s"
    small = ["clips_per_shard=2", "video.short_side=16", "video.max_fps=2", "flow.bound=2"]
    pack(load_spec("demo", raw=kitchen, out=out, overrides=small))
    return out


def test_shards_cut_at_any_block_deliver_complete_clips_only(readers: Readers) -> None:
    size = max(map(len, readers.bytes.values()))
    for cut in range(size - size % BLOCK, -1, -BLOCK):
        for tar in readers.tars.values():
            os.truncate(tar, min(cut, tar.stat().st_size))
        readers.check(lambda _, stop, cut=cut: stop <= cut)  # type: ignore[misc]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=8), st.integers(1, 255))
@example([0], 1)
def test_flipped_bytes_anywhere_deliver_complete_clips_only(readers: Readers, places: list[int], mask: int) -> None:
    size = min(map(len, readers.bytes.values()))
    flipped = {place % size for place in places}
    for split, tar in readers.tars.items():
        damaged = bytearray(readers.bytes[split])
        for place in flipped:
            damaged[place] ^= mask
        tar.write_bytes(damaged)
    readers.check(lambda start, stop: not any(start <= place < stop for place in flipped))


def test_a_clip_without_an_undamaged_replacement_is_one_line(readers: Readers) -> None:
    for tar in readers.root.glob("train-*.tar"):
        os.truncate(tar, 0)
    with pytest.raises(UserError, match=r"30 clips in a row are damaged, the last: train-.*: clip ") as caught:
        readers.training.batch(Slice(0, 0, 0, 1))
    assert "\n" not in str(caught.value)


def copied(tiny: Path, tmp_path: Path) -> Path:
    root = tmp_path / "s"
    shutil.copytree(tiny, root)
    return root


def rewrite_index(root: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change an index to that of another version of the folder."""
    path = root / "train-000000.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


def remove_a_modality(index: dict[str, Any]) -> None:
    for clip in index["clips"]:
        del clip["members"]["audio"]


def declare_a_modality_absent(index: dict[str, Any]) -> None:
    index["clips"][0]["members"]["audio"] = None


@pytest.mark.parametrize("change", [remove_a_modality, declare_a_modality_absent, lambda index: index["clips"].pop()])
def test_an_index_that_contradicts_the_manifest_is_refused(
    tiny: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    root = copied(tiny, tmp_path)
    rewrite_index(root, change)
    refused(root, r"train-000000\.index\.json: not the index that the manifest names")


def test_an_index_of_another_tar_is_refused(tiny: Path, tmp_path: Path) -> None:
    root = copied(tiny, tmp_path)
    shutil.copy(root / "train-000001.index.json", root / "train-000000.index.json")
    refused(root, r"train-000000\.index\.json: not the index that the manifest names")


def test_an_index_that_is_lost_or_cut_is_refused(tiny: Path, tmp_path: Path) -> None:
    root = copied(tiny, tmp_path)
    os.truncate(root / "train-000000.index.json", 100)
    refused(root, r"train-000000\.index\.json: not the index")
    (root / "train-000000.index.json").unlink()
    refused(root, r"train-000000\.index\.json: index cannot be read")


def test_a_tar_larger_than_declared_is_refused(tiny: Path, tmp_path: Path) -> None:
    root = copied(tiny, tmp_path)
    with open(root / "train-000000.tar", "ab") as tar:
        tar.write(b"\0" * BLOCK)
    refused(root, r"train-000000\.tar: \d+ bytes, \d+ by the manifest .*of another tar")


def test_fewer_shards_than_the_manifest_names_are_refused(tiny: Path, tmp_path: Path) -> None:
    root = copied(tiny, tmp_path)
    (root / "train-000003.tar").unlink()
    (root / "train-000003.index.json").unlink()
    refused(root, r"train-000003\.tar: no such shard, but the manifest names it")


def test_shards_of_another_manifest_are_refused(tiny: Path, shards: Path, tmp_path: Path) -> None:
    root = copied(tiny, tmp_path)
    shutil.copy(shards / "manifest.json", root)
    refused(root, r"train-000000\.(index\.json: not the index that the manifest names|tar: )")


def refused(root: Path, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        ShardFolder(root).clips("train")
    assert "\n" not in str(caught.value)


def test_undamaged_clips_are_delivered_as_packed(readers: Readers) -> None:
    """Check the reference: every clip of both splits, with the modalities that its shard declares."""
    declared = {clip.key: {m for m in ("video", "flow", "audio") if clip.has(m)}
                for split in ("train", "validation") for clip in ShardFolder(readers.root).clips(split)}  # fmt: skip
    assert {key: set(arrays) for key, arrays in readers.whole.items()} == declared
    digests = {hashlib.sha256(b"".join(arrays.values())).digest() for arrays in readers.whole.values()}
    assert len(digests) == len(declared)
