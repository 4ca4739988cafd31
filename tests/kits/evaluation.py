"""A small set of packed videos and untrained runs, for tests of evaluation and prediction."""

from __future__ import annotations

import csv
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from karmma_dist.models.karmma import KarmmaModel
from karmma_dist.models.model_card import save_model
from karmma_dist.packing.pack import pack
from karmma_dist.packing.spec import PackingSpec
from karmma_dist.recipe import DataRecipe, InputRecipe, ModelRecipe, ViewsRecipe
from karmma_dist.streaming.loader import EvaluationClips, open_shards
from kits.packing import write_movie

VERBS, NOUNS = ["close", "open"], ["cup", "door", "tap"]
SPANS = [("0.2", "1.2"), ("0.5", "2"), ("1", "")]
INPUTS = InputRecipe.model_validate(
    {
        "video": {"num_frames": 4, "short_side": 32, "crop": 32},
        "audio": {"num_windows": 4, "window_s": 0.3, "num_mels": 16},
    }
)


def save_run(folder: Path, modalities: list[str], missing: str = "stand_in") -> Path:
    """Write an untrained model as a run folder without a recipe."""
    names = {m: "small_audio" if m == "audio" else "small_video" for m in modalities}
    encoders = {m: {"name": name, "options": {"width": 4}} for m, name in names.items()}
    sizes = {"width": 16, "num_heads": 2, "feedforward": 16, "fc_width": 16, "missing": missing}
    recipe = ModelRecipe.model_validate({"encoders": encoders, **sizes})
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = KarmmaModel(recipe, INPUTS, modalities, {"verb": len(VERBS), "noun": len(NOUNS)})
        for parameter in model.parameters():  # far from zero, so that every input matters
            parameter.data += 0.3 * torch.randn_like(parameter)
    save_model(model, folder, classes={"verb": VERBS, "noun": NOUNS})
    return folder


def make_place(root: Path) -> Path:
    """Movies with and without sound, shards of their clips in settings of their own, and untrained runs."""
    write_movie(root / "raw/one.mp4", frames=60, bursts=[0.4, 1.3])
    write_movie(root / "raw/silent.mp4", frames=40)
    write_movie(root / "raw/sound.m4a", bursts=[0.1, 0.6], seconds=1.5)
    rows = [(f"one_{n}", "one.mp4", *span, "open", "tap") for n, span in enumerate(SPANS)]
    rows += [("silent_0", "silent.mp4", "0.3", "1.1", "close", "cup"), ("sound_0", "sound.m4a", "", "", "close", "cup")]
    for split, of in (("train", rows[1:]), ("validation", rows[:1])):
        with open(root / f"raw/{split}.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["key", "media", "start", "stop", "verb", "noun"])
            writer.writerows(of)
    for head, names in (("verb", VERBS), ("noun", NOUNS)):
        (root / f"raw/{head}.csv").write_text("id,key\n" + "".join(f"{n},{name}\n" for n, name in enumerate(names)))
    settings = {
        "video": {"region": [0.0, 0.1, 0.9, 1.0], "short_side": 40, "max_fps": 12.5},
        "flow": {"source": "compute", "bound": 3.0},
        "plain": {"heads": {"verb": "verb.csv", "noun": "noun.csv"}},
    }
    raw_and_out = {"raw": str(root / "raw"), "out": str(root / "shards")}
    pack(PackingSpec.model_validate({"reader": "plain", "dataset": "test", **raw_and_out, **settings}))
    save_run(root / "student", ["video", "flow", "audio"])
    save_run(root / "teacher", ["video", "flow", "audio"], "leave_out")
    save_run(root / "listener", ["audio"])
    return root


def flat(value: Any, place: str = "") -> dict[str, Any]:
    """Return every leaf of nested dataclasses, dictionaries and lists under its place, for `pytest.approx`."""
    if is_dataclass(value) and not isinstance(value, type):
        return flat(asdict(value), place)
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: leaf for name, item in items for key, leaf in flat(item, f"{place}/{name}").items()}
    return {place: value}


def but_for_rounding(value: Any) -> Any:
    """Return `flat` with a tolerance: batches of other sizes may be summed in another order."""
    return pytest.approx(flat(value))


def participant_of(key: str) -> str:
    return f"P{int(key.rsplit('_')[-1]) % 5:02d}"


def write_lists(folder: Path, verbs: list[int], nouns: list[int], **unseen: list[str]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "EPIC_100_tail_verbs.csv").write_text("verb\n" + "".join(f"{verb}\n" for verb in verbs))
    (folder / "EPIC_100_tail_nouns.csv").write_text("noun\n" + "".join(f"{noun}\n" for noun in nouns))
    for split, people in unseen.items():
        path = folder / f"EPIC_100_unseen_participant_ids_{split}.csv"
        path.write_text("participant_id\n" + "".join(f"{person}\n" for person in people))
    return folder


KITCHEN_INPUTS = InputRecipe.model_validate(
    {
        "video": {"num_frames": 4, "short_side": 28, "crop": 24},
        "audio": {"num_windows": 4, "window_s": 0.3, "num_mels": 16},
    }
)


def clips_of(shards: Path, views: ViewsRecipe | None = None) -> EvaluationClips:
    data = DataRecipe(shards=str(shards), modalities=["video", "flow", "audio"], num_workers=0)
    return EvaluationClips(open_shards(data), data, KITCHEN_INPUTS, "validation", views)

