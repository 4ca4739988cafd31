"""Manifest and index: writing gives the bytes that were parsed, and a wrong field is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from karmma_dist.errors import UserError
from karmma_dist.io.files import json_bytes
from karmma_dist.modalities import MODALITIES
from karmma_dist.shards.folder import ShardFolder
from karmma_dist.shards.format import MANIFEST, parse_metadata
from karmma_dist.shards.index import ShardIndex
from karmma_dist.shards.manifest import Manifest
from kits.json_trees import harms

names = st.text(st.characters(codec="utf-8"), max_size=8)
wholes = st.integers(0, 2**40)
hashes = st.text("0123456789abcdef", min_size=64, max_size=64)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | names,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=6,
)
later = st.dictionaries(st.sampled_from(["later", "newest"]), json_values, max_size=1)
"""Fields that this version does not know."""


@st.composite
def headers(draw: st.DrawFn, splits: list[str]) -> dict[str, Any]:
    """Draw the fields of a header, in the order of an index."""
    return {
        "dataset": draw(names),
        "modalities": draw(st.lists(st.sampled_from(list(MODALITIES)), unique=True)),
        "heads": draw(st.dictionaries(names, st.lists(names, max_size=3), max_size=3)),
        "settings": draw(st.dictionaries(names, json_values, max_size=3)),
        "plan": {
            "limit": draw(st.none() | wholes),
            "clips": {split: draw(wholes) for split in splits},
            "sha256": draw(hashes),
        },
        "made_with": draw(st.dictionaries(names, names, max_size=2)),
    }


@st.composite
def manifests(draw: st.DrawFn, extra: st.SearchStrategy[dict[str, Any]]) -> dict[str, Any]:
    """Draw the JSON values of a manifest, in the order of the file."""
    splits = draw(st.lists(st.sampled_from(["train", "validation", "test"]), unique=True))
    header = draw(headers(splits))
    entries = {}
    for split in splits:
        shards = [
            {
                "name": f"{split}-{number:06d}.tar",
                "clips": draw(wholes),
                "bytes": draw(wholes),
                "sha256": draw(hashes),
                "index_sha256": draw(hashes),
                **draw(extra),
            }
            for number in range(draw(st.integers(0, 2)))
        ]
        entries[split] = {"clips": draw(wholes), "shards": shards, **draw(extra)}
    counts = {
        split: {head: [draw(wholes) for _ in classes] for head, classes in header["heads"].items()} for split in splits
    }
    return {
        "schema": 1,
        **{name: header[name] for name in ("dataset", "modalities", "heads")},
        "splits": entries,
        "settings": header["settings"],
        "plan": header["plan"] | draw(extra),
        "label_counts": counts,
        "made_with": header["made_with"],
        **draw(extra),
    }


@st.composite
def indexes(draw: st.DrawFn) -> dict[str, Any]:
    """Draw the JSON values of an index, in the order of the file."""
    places = st.none() | st.lists(wholes, min_size=3, max_size=3)
    members = st.dictionaries(st.sampled_from(list(MODALITIES)), places)
    clips = [
        {
            "key": draw(st.text("abcXYZ019_-", min_size=1, max_size=8)),
            "labels": draw(st.dictionaries(names, st.none() | wholes, max_size=3)),
            "members": {"json": [draw(wholes), draw(wholes), draw(wholes)], **draw(members)},
        }
        for _ in range(draw(st.integers(0, 3)))
    ]
    copy = {"manifest": draw(headers([])) | draw(later)} if draw(st.booleans()) else {}
    return {"schema": 1, "shard": "train-000000.tar", "bytes": draw(wholes), "clips": clips, **copy}


def test_packed_manifest_and_indexes_are_written_as_they_were_read(shards: Path) -> None:
    content = (shards / MANIFEST).read_bytes()
    manifest = Manifest.parse(content)
    assert manifest.to_bytes() == content
    for path in shards.glob("*.index.json"):
        index = ShardIndex.parse(path.read_bytes(), path.name.replace(".index.json", ".tar"))
        assert index.to_bytes() == path.read_bytes()
        assert index.header == manifest.header


@given(manifests(st.just({})))
def test_any_manifest_is_written_as_it_was_read(values: dict[str, Any]) -> None:
    content = json_bytes(values)
    assert Manifest.parse(content).to_bytes() == content


@given(manifests(later))
def test_fields_of_a_later_version_survive_in_a_manifest(values: dict[str, Any]) -> None:
    assert json.loads(Manifest.parse(json_bytes(values)).to_bytes()) == values


@given(indexes())
def test_any_index_is_written_as_it_was_read(values: dict[str, Any]) -> None:
    content = json_bytes(values)
    index = ShardIndex.parse(content, "train-000000.tar")
    assert index.to_bytes() == content
    assert {clip.shard for clip in index.clips} <= {"train-000000.tar"}


def test_unknown_fields_of_an_index_copy_are_no_difference(shards: Path) -> None:
    header = Manifest.parse((shards / MANIFEST).read_bytes()).header
    assert replace(header, extra={"later": 1}) == header
    assert replace(header, extra={"later": 1}).first_difference(header) == ""
    assert replace(header, made_with={}, dataset="other").first_difference(header) == "dataset"


@pytest.mark.parametrize(
    ("parse", "name"),
    [
        (lambda content: Manifest.parse(content).to_dict(), MANIFEST),
        (lambda content: ShardIndex.parse(content, "train-000000.tar").to_dict(), "train-000000.index.json"),
    ],
)
def test_a_changed_field_is_refused_by_name_or_kept(shards: Path, parse: Any, name: str) -> None:
    values = json.loads((shards / name).read_bytes())
    refused = 0
    for harm in harms(values):
        changed = harm.apply(values)
        parsed = parsed_or_refused(parse, changed)
        if isinstance(parsed, ValueError):
            assert not isinstance(parsed, UserError), harm
            assert is_named(harm.path, str(parsed)), (harm, str(parsed))
            refused += 1
        else:
            assert parsed == changed, harm
    assert refused > 200


def test_a_changed_field_of_metadata_is_refused_by_name(shards: Path) -> None:
    folder = ShardFolder(shards)
    content = folder.read(folder.clips("train")[0], "json")
    values = json.loads(content)
    harmless = []
    for harm in harms(values):
        parsed = parsed_or_refused(parse_metadata, harm.apply(values))
        if isinstance(parsed, ValueError):
            assert is_named(harm.path, str(parsed)), (harm, str(parsed))
        elif parsed == parse_metadata(content):
            harmless.append(harm.path)
    assert {path[:1] for path in harmless} <= {("modalities",)}, "fields of a member that no description has"


def parsed_or_refused(parse: Callable[[bytes], Any], values: Any) -> Any:
    """Return what a parser makes of JSON values, or the error by which it refuses them."""
    try:
        return parse(json_bytes(values))
    except ValueError as error:
        return error


def is_named(path: tuple[str | int, ...], message: str) -> bool:
    """Return True if a message names the field at a path, or one that contains it."""
    named = [str(name) for name in path if isinstance(name, str)]
    return not named or any(name in message for name in named)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"null", b"\xff", b"[" * 100_000])
def test_content_that_is_no_json_object_is_refused(content: bytes) -> None:
    for parse in (Manifest.parse, lambda content: ShardIndex.parse(content, "a.tar"), parse_metadata):
        with pytest.raises(ValueError):
            parse(content)


@pytest.mark.parametrize("split", ["../evil", "", "a/b", "a\\b", "a\0b", "x" * 101, "manifest", "test-000001", "TRAIN"])
@pytest.mark.parametrize("place", ["splits", "plan.clips"])
def test_a_manifest_whose_splits_cannot_begin_a_file_is_refused(shards: Path, split: str, place: str) -> None:
    manifest = json.loads((shards / MANIFEST).read_bytes())
    fields = manifest["splits"] if place == "splits" else manifest["plan"]["clips"]
    fields[split] = fields["validation"]
    said = "differ only in case" if split == "TRAIN" else "is no name of a split"
    with pytest.raises(ValueError, match=f"^{place}: .*{said}"):
        Manifest.parse(json_bytes(manifest))
