"""A second dataset for mixtures, made of the kitchen's clips: the same keys, but one other head and no flow."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from karmma_dist.io.files import write_whole
from karmma_dist.packing.tars.writer import write_shard
from karmma_dist.recipe import Recipe
from karmma_dist.shards.folder import ShardFolder
from karmma_dist.shards.format import Clip, count_labels, shard_name
from karmma_dist.shards.manifest import Manifest, SplitEntry
from kits.recipes import tiny_recipe

MODALITIES = ["video", "flow", "audio"]
STORED = ("video", "audio")
"""Modalities of the second dataset."""


def write_actions(kitchen: Path, out: Path, every: int = 3) -> Path:
    """Write shards of the kitchen's clips but each `every`-th, with the head `action`: all pairs of verb and noun."""
    folder = ShardFolder(kitchen)
    verbs, nouns = folder.classes["verb"], folder.classes["noun"]
    heads = {"action": [f"{verb} {noun}" for verb in verbs for noun in nouns]}
    header = replace(folder.manifest.header, dataset="actions", modalities=STORED, heads=heads)
    out.mkdir(parents=True)
    splits, counts = {}, {}
    for split in folder.splits:
        clips = [clip for number, clip in enumerate(folder.clips(split)) if number % every]
        samples = [(clip.key, _as_action(folder, clip, len(nouns))) for clip in clips]
        splits[split] = SplitEntry.of_shards([write_shard(out / shard_name(split, 0), samples, header)])
        counts[split] = count_labels(heads, [json.loads(sample["json"])["labels"] for _, sample in samples])
    write_whole(out / "manifest.json", Manifest(header, splits, counts).to_bytes())
    return out


def _as_action(folder: ShardFolder, clip: Clip, num_nouns: int) -> dict[str, bytes]:
    """Return a clip's members, with the label of the pair."""
    metadata = json.loads(folder.read(clip, "json"))
    metadata["labels"] = {"action": metadata["labels"]["verb"] * num_nouns + metadata["labels"]["noun"]}
    metadata["modalities"] = {name: metadata["modalities"][name] for name in STORED}
    members = {name: folder.read(clip, name) for name in STORED if clip.has(name)}
    return {"json": json.dumps(metadata).encode(), **members}


def mixture_recipe(runs: Path, mixture: dict[str, Any], **sections: Any) -> Recipe:
    """Return the recipe of a tiny model that is trained on a mixture, with `sections` merged into it field by field."""
    data = {"mixture": mixture, "keep_decoded": "100 MB", **sections.pop("data", {})}
    tree = tiny_recipe(
        MODALITIES, name=sections.pop("name", "mixed"), seed=5, runs_dir=str(runs), data=data,
        optimizer={"name": "sgd", "lr": 0.1, "clip": 1.0},
        training={"epochs": 2, "batch_size": 6, "log_every_steps": 1},
    )  # fmt: skip
    for section, values in sections.items():
        tree[section] = {**tree.get(section, {}), **values} if isinstance(values, dict) else values
    return Recipe.model_validate(tree)
