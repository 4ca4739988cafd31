"""A folder with one changed field is refused by name or read as before; no command ends in a traceback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from karmma_dist.errors import UserError
from karmma_dist.io.files import json_bytes, sha256_of
from karmma_dist.packing.inspect.inspect import contact_sheet, describe
from karmma_dist.packing.pack import difference_between
from karmma_dist.packing.spec import load_spec
from karmma_dist.packing.tars.writer import write_tar
from karmma_dist.packing.verify.repair import repair
from karmma_dist.packing.verify.verify import verify
from karmma_dist.shards.folder import ShardFolder
from karmma_dist.shards.format import MANIFEST, Clip, DamageError, index_path
from karmma_dist.shards.index import build_index
from karmma_dist.shards.manifest import Manifest
from kits.json_trees import Harm, harms
from kits.packing import folder_bytes

TAR = "train-000001.tar"
INDEX = str(index_path(Path(TAR)))
properties = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def copy(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the shards; every test restores the copy that it damages."""
    out = tmp_path_factory.mktemp("copy") / "shards"
    shutil.copytree(shards, out)
    return out


@contextmanager
def harmed(folder: Path, name: str, harm: Harm) -> Iterator[dict[str, Any]]:
    """Change one field of a file, and its hash in the manifest; restore both after the block."""
    before = {path: path.read_bytes() for path in folder.glob("*.json")}
    values = harm.apply(json.loads((folder / name).read_bytes()))
    (folder / name).write_bytes(json_bytes(values))
    if name != MANIFEST:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        entry = next(shard for shard in manifest["splits"]["train"]["shards"] if shard["name"] == TAR)
        entry["index_sha256"] = sha256_of(folder / name)
        (folder / MANIFEST).write_bytes(json_bytes(manifest))
    try:
        yield values
    finally:
        for path in folder.glob("*.json"):
            path.unlink()
        for path, content in before.items():
            path.write_bytes(content)


def everything(folder: ShardFolder) -> list[Any]:
    """Return everything that a reader of the folder gets."""
    read: list[Any] = [folder.modalities, folder.classes, folder.splits]
    for clip in (clip for split in folder.splits for clip in folder.clips(split)):
        present = {name: member for name, member in clip.members.items() if member is not None}
        read.append([clip.key, clip.shard, clip.labels, present, folder.metadata(clip)])
    return read


def everything_or_error(path: Path) -> list[Any] | UserError | DamageError:
    try:
        return everything(ShardFolder(path))
    except (UserError, DamageError) as error:
        return error


def drawn_harm(data: st.DataObject, tree: Any) -> Harm:
    return data.draw(st.sampled_from(list(harms(tree))))


@pytest.mark.parametrize("name", [MANIFEST, INDEX])
@properties
@given(data=st.data())
def test_a_changed_field_is_refused_or_changes_nothing_read(
    shards: Path, copy: Path, tmp_path: Path, name: str, data: st.DataObject
) -> None:
    harm = drawn_harm(data, json.loads((shards / name).read_bytes()))
    with harmed(copy, name, harm):
        for inspect in (describe, lambda folder: contact_sheet(folder, tmp_path / "sheet.png", clips=1)):
            if data.draw(st.integers(0, 9)) == 0:  # slow
                try:
                    inspect(ShardFolder(copy))
                except (UserError, DamageError):
                    continue
        read = everything_or_error(copy)
    if isinstance(read, UserError | DamageError):
        assert "manifest" in str(read) or TAR in str(read) or name in str(read)
    else:
        assert read == everything(ShardFolder(shards))


@pytest.mark.parametrize("name", [MANIFEST, INDEX])
@properties
@given(data=st.data())
def test_verify_finds_a_changed_field(shards: Path, copy: Path, name: str, data: st.DataObject) -> None:
    original = json.loads((shards / name).read_bytes())
    harm = drawn_harm(data, original)
    with harmed(copy, name, harm) as values:
        is_unchanged = json_bytes(values) == json_bytes(original)
        is_known = is_unchanged or (harm.path == ("manifest",) and harm.is_deletion)  # an index may lack the copy
        assert verify(copy).whole == is_known
        repair(copy)
        if verify(copy).whole and not is_known and folder_bytes(copy) != folder_bytes(shards):
            assert not verify(copy, full=True).whole


@properties
@given(data=st.data())
def test_other_settings_in_a_manifest_differ_by_name(shards: Path, kitchen: Path, data: st.DataObject) -> None:
    spec = load_spec("demo", raw=kitchen, out=shards, overrides=["clips_per_shard=8"])
    values = json.loads((shards / MANIFEST).read_bytes())
    plan = Manifest.parse(json_bytes(values)).header.plan
    harm = drawn_harm(data, values["settings"])
    try:
        header = Manifest.parse(json_bytes(values | {"settings": harm.apply(values["settings"])})).header
        difference = difference_between(header, spec, plan)
    except ValueError as error:
        difference = str(error).removeprefix("settings").removeprefix(".")
    name = ".".join(part for part in harm.path if isinstance(part, str))
    assert difference.startswith(name) or (harm.is_deletion and not difference)


class Changed(ShardFolder):
    """A folder whose metadata is replaced when it is read."""

    content = b""

    def read(self, clip: Clip, modality: str) -> bytes:
        """Return the changed metadata, as if its crc32 were right."""
        return self.content if modality == "json" else super().read(clip, modality)


@properties
@given(data=st.data())
def test_changed_metadata_is_damage_wherever_it_is_read(shards: Path, tmp_path: Path, data: st.DataObject) -> None:
    folder = Changed(shards)
    whole = ShardFolder(shards)
    clips = [clip for clip in folder.clips("train") if clip.shard == TAR]
    clip = data.draw(st.sampled_from(clips))
    values = json.loads(whole.read(clip, "json"))
    harm = drawn_harm(data, values)
    folder.content = json_bytes(harm.apply(values))
    with suppress(DamageError):
        metadata = folder.metadata(clip)
        is_right_type = (harm.path[-1], harm.value) in (("stop_s", None), ("fps", 1.5), ("bound", 1.5))
        assert metadata == whole.metadata(clip) or is_right_type, "only the crc32 can tell another value"
    samples = [
        (each.key, {name: whole.read(each, name) for name, member in each.members.items() if member is not None})
        for each in clips
    ]
    dict(samples)[clip.key]["json"] = folder.content
    write_tar(tmp_path / TAR, samples)
    with suppress(DamageError):
        index = build_index(tmp_path / TAR, folder.manifest.header.modalities)
        labels = {each.key: each.labels for each in index.clips}
        assert all(labels[each.key] == each.labels for each in clips if each.key != clip.key)
