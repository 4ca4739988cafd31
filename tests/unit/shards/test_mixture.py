"""Several folders as one: clips, heads and modalities of all, and one line where they do not fit together."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest

from karmma_dist.errors import UserError
from karmma_dist.recipe import DataRecipe
from karmma_dist.shards.folder import ShardFolder
from karmma_dist.shards.format import DamageError
from karmma_dist.shards.mixture import Mixture, open_datasets


def opened(mixture: dict[str, Any], **data: Any) -> Mixture:
    folder = open_datasets(DataRecipe.model_validate({"mixture": mixture, **data}))
    assert isinstance(folder, Mixture)
    return folder


@pytest.fixture
def mixture(shards: Path, actions: Path) -> Mixture:
    return opened({
        "kitchen": {"shards": str(shards), "weight": 1},
        "actions": {"shards": str(actions), "weight": 1, "heads": {"action": "pair"}},
    })  # fmt: skip


def test_clips_of_all_datasets_have_different_names_and_own_labels(
    mixture: Mixture, shards: Path, actions: Path
) -> None:
    clips = mixture.clips("train")
    stored = {"actions": ShardFolder(actions).clips("train"), "kitchen": ShardFolder(shards).clips("train")}
    assert [clip.key for clip in clips] == [f"{name}/{clip.key}" for name, own in stored.items() for clip in own]
    assert mixture.count(clips) == {"actions": 20, "kitchen": 30}
    assert {tuple(clip.labels) for clip in clips[:20]} == {("pair",)}
    assert [clip.labels for clip in clips[20:]] == [clip.labels for clip in stored["kitchen"]]
    assert list(mixture.classes) == ["pair", "verb", "noun"]
    assert [list(mixture.classes_of(clip)) for clip in (clips[0], clips[-1])] == [["pair"], ["verb", "noun"]]
    assert mixture.heads_vary


def test_a_modality_that_a_dataset_does_not_declare_is_absent(mixture: Mixture) -> None:
    assert mixture.modalities == ["video", "flow", "audio"]
    clips = mixture.clips("train")
    assert not any(clip.has("flow") for clip in clips[:20])
    assert any(clip.has("flow") for clip in clips[20:])


@pytest.mark.parametrize("through_pickle", [False, True])
def test_every_clip_is_read_from_its_own_folder(
    mixture: Mixture, shards: Path, actions: Path, through_pickle: bool
) -> None:
    mixture = pickle.loads(pickle.dumps(mixture)) if through_pickle else mixture
    folders = {"actions": ShardFolder(actions), "kitchen": ShardFolder(shards)}
    stored = {name: {clip.key: clip for clip in folder.clips("train")} for name, folder in folders.items()}
    for clip in mixture.clips("train"):
        name, _, key = clip.key.partition("/")
        assert mixture.metadata(clip) == folders[name].metadata(stored[name][key])
        for modality in filter(clip.has, ("video", "audio")):
            assert mixture.read(clip, modality) == folders[name].read(stored[name][key], modality)


def test_the_order_in_which_datasets_are_written_has_no_effect(shards: Path, actions: Path) -> None:
    both = {"b": {"shards": str(shards), "weight": 1}, "a": {"shards": str(actions), "weight": 2}}
    one, other = opened(both), opened(dict(reversed(both.items())))
    assert one.clips("train") == other.clips("train")
    assert list(one.classes) == list(other.classes) == ["action", "verb", "noun"]


def test_a_dataset_may_have_splits_of_its_own(shards: Path, actions: Path) -> None:
    mixture = opened({
        "kitchen": {"shards": str(shards), "weight": 1, "train_split": "validation"},
        "actions": {"shards": str(actions), "weight": 1},
    })  # fmt: skip
    assert mixture.count(mixture.clips("train")) == {"actions": 20, "kitchen": 10}
    assert mixture.count(mixture.clips("validation")) == {"actions": 6, "kitchen": 10}


def test_the_same_head_in_two_datasets_is_one_head(shards: Path) -> None:
    mixture = opened({name: {"shards": str(shards), "weight": 1} for name in ("a", "b")})
    assert mixture.classes == ShardFolder(shards).classes
    assert not mixture.heads_vary


def test_damage_names_the_dataset(shards: Path, actions: Path, tmp_path: Path) -> None:
    shutil.copytree(actions, tmp_path / "copy")
    (tmp_path / "copy/train-000000.tar").write_bytes(b"")
    mixture = opened({
        "kitchen": {"shards": str(shards), "weight": 1}, "cut": {"shards": str(tmp_path / "copy"), "weight": 1},
    })  # fmt: skip
    clip = mixture.clips("train")[0]
    for read in (lambda: mixture.read(clip, "video"), lambda: mixture.metadata(clip)):
        with pytest.raises(DamageError, match=rf"^cut/train-000000.tar: clip {clip.key}: .*: cut: 0 of "):
            read()
    assert mixture.metadata(mixture.clips("train")[-1]).key


def test_heads_that_disagree_are_named_with_both_folders(shards: Path, actions: Path) -> None:
    both = {
        "a": {"shards": str(shards), "weight": 1, "heads": {"noun": "action"}},
        "b": {"shards": str(actions), "weight": 1},
    }  # fmt: skip
    message = (
        rf"^data\.mixture: head 'action' of {shards} and of {actions} is not the same, class 0 is 'plate' and "
        r"'slide plate': if they are two heads, rename one, e\.g\. data\.mixture\.b\.heads: \{action: b_action\}$"
    )
    with pytest.raises(UserError, match=message):
        opened(both)
    renamed = {**both, "b": {**both["b"], "heads": {"action": "b_action"}}}
    assert list(opened(renamed).classes) == ["verb", "action", "b_action"]


def test_heads_with_more_classes_in_one_dataset_disagree(
    shards: Path, actions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verbs = ShardFolder(shards).classes["verb"]
    classes = {shards: {"verb": verbs}, actions: {"verb": verbs[:-1]}}
    monkeypatch.setattr(ShardFolder, "classes", property(lambda self: classes[self.root]))
    with pytest.raises(UserError, match=r"head 'verb' of .* is not the same, they have 4 and 3 classes: if"):
        opened({"a": {"shards": str(shards), "weight": 1}, "b": {"shards": str(actions), "weight": 1}})


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ({"verbs": "x"}, r"^data\.mixture\.a\.heads: the shards have no head 'verbs', but verb, noun: "),
        ({"verb": "noun"}, r"^data\.mixture\.a\.heads: 'verb' cannot be called 'noun', as another head is: "),
    ],
)
def test_renamings_that_cannot_be_are_refused(shards: Path, heads: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        opened({"a": {"shards": str(shards), "weight": 1, "heads": heads}})
    assert list(opened({"a": {"shards": str(shards), "weight": 1, "heads": {"verb": "noun", "noun": "verb"}}}).classes)


def test_a_folder_that_does_not_exist_is_named_with_its_dataset(shards: Path) -> None:
    with pytest.raises(UserError, match=r"^data\.mixture\.b: nowhere: no such shards folder"):
        opened({"a": {"shards": str(shards), "weight": 1}, "b": {"shards": "nowhere", "weight": 1}})
