"""Several folders of packed shards that are used together: one dataset each, with names for its clips and heads.

    mixture = open_datasets(data)   # data.mixture: {epic: {...}, ssv2: {..., heads: {action: ssv2_action}}}
    mixture.clips("train")          # clip epic/P01_01_3 of epic/train-000000.tar, ..., clip ssv2/1234
    mixture.classes                 # verb and noun of epic, ssv2_action

A clip has the labels of its own dataset's heads. What a dataset does not declare, a modality or a head, is absent from
all of its clips; that is no damage.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

from karmma_dist.errors import UserError
from karmma_dist.modalities import MODALITIES
from karmma_dist.recipe import DataRecipe
from karmma_dist.shards.folder import ShardFolder, Shards
from karmma_dist.shards.format import Clip, ClipMetadata, DamageError
from karmma_dist.shards.remote import open_folder


class Dataset:
    """One dataset of a mixture: a folder whose clips have its name before their own, and whose heads may be renamed.

    Args:
        folder: The folder.
        name: Name of the dataset; without one, clips keep the names that they have in the folder.
        heads: Other names for heads, by the name in the folder.
        splits: Other names for splits, by the name that `clips` is given.

    Raises:
        UserError: the folder has no such head, or two heads would have one name.
    """

    def __init__(
        self, folder: ShardFolder, name: str = "", heads: Mapping[str, str] | None = None,
        splits: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        self.folder, self.name, self.where = folder, name, folder.where
        self._prefix = f"{name}/" if name else ""
        self._heads, self._splits = dict(heads or {}), dict(splits or {})
        self._stored_heads = {new: old for old, new in self._heads.items()}
        field = f"data.mixture.{name}.heads" if name else "heads"
        for old, new in self._heads.items():
            if old not in folder.classes:
                raise UserError(
                    f"{field}: the shards have no head '{old}', but {', '.join(folder.classes) or 'none'}: {self.where}"
                )
            if new in folder.classes and new not in self._heads:
                raise UserError(f"{field}: '{old}' cannot be called '{new}', as another head is: {self.where}")

    @property
    def folders(self) -> list[ShardFolder]:
        """The folder."""
        return [self.folder]

    @property
    def modalities(self) -> list[str]:
        """Modalities that every clip declares, present or null."""
        return self.folder.modalities

    @property
    def classes(self) -> dict[str, list[str]]:
        """Class names per head, in the order of their ids."""
        return {self._heads.get(head, head): names for head, names in self.folder.classes.items()}

    def classes_of(self, clip: Clip) -> dict[str, list[str]]:  # noqa: ARG002
        """Return the class names per head, which all clips share."""
        return self.classes

    def clips(self, split: str) -> list[Clip]:
        """Return all clips of a split, in shard order; see `ShardFolder.clips`."""
        clips = self.folder.clips(self._splits.get(split, split))
        return [self._named(clip) for clip in clips] if self._prefix or self._heads else clips

    def read(self, clip: Clip, modality: str) -> bytes:
        """Return one member's bytes, checked against its crc32; see `ShardFolder.read`."""
        with self._naming(clip):
            return self.folder.read(self._stored(clip), modality)

    def metadata(self, clip: Clip) -> ClipMetadata:
        """Return the clip's KEY.json, with key and heads as the folder names them; see `ShardFolder.metadata`."""
        with self._naming(clip):
            return self.folder.metadata(self._stored(clip))

    def stored_head(self, head: str) -> str:
        """Return the name that a head has in the folder."""
        return self._stored_heads.get(head, head)

    def _named(self, clip: Clip) -> Clip:
        labels = {self._heads.get(head, head): label for head, label in clip.labels.items()}
        return replace(clip, key=self._prefix + clip.key, shard=self._prefix + clip.shard, labels=labels)

    def _stored(self, clip: Clip) -> Clip:
        key, shard = clip.key.removeprefix(self._prefix), clip.shard.removeprefix(self._prefix)
        labels = {self.stored_head(head): label for head, label in clip.labels.items()}
        return replace(clip, key=key, shard=shard, labels=labels)

    @contextmanager
    def _naming(self, clip: Clip) -> Iterator[None]:
        """Name the dataset in damage."""
        try:
            yield
        except DamageError as error:
            raise DamageError(clip.shard, clip.key, error.member, error.what) from None


class Mixture:
    """Several datasets as one: all their clips, the union of their modalities, and the union of their heads.

    Args:
        datasets: The datasets, with different names.

    Raises:
        UserError: two datasets have a head of the same name with other classes.
    """

    def __init__(self, datasets: Sequence[Dataset]) -> None:
        self.datasets = {dataset.name: dataset for dataset in datasets}
        self._classes: dict[str, list[str]] = {}
        owners: dict[str, Dataset] = {}
        for dataset in datasets:
            for head, names in dataset.classes.items():
                owner = owners.setdefault(head, dataset)
                if difference := _difference(owner.classes[head], names):
                    raise UserError(
                        f"data.mixture: head '{head}' of {owner.where} and of {dataset.where} is not the same, "
                        f"{difference}: if they are two heads, rename one, e.g. data.mixture.{dataset.name}.heads: "
                        f"{{{dataset.stored_head(head)}: {dataset.name}_{head}}}"
                    )
                self._classes[head] = names

    @property
    def where(self) -> str:
        """Names of the folders in messages."""
        return ", ".join(dataset.where for dataset in self.datasets.values())

    @property
    def folders(self) -> list[ShardFolder]:
        """Folders of all datasets."""
        return [dataset.folder for dataset in self.datasets.values()]

    @property
    def modalities(self) -> list[str]:
        """Modalities that clips of some dataset declare, present or null."""
        declared = {modality for dataset in self.datasets.values() for modality in dataset.modalities}
        return [modality for modality in MODALITIES if modality in declared]

    @property
    def classes(self) -> dict[str, list[str]]:
        """Class names per head of all datasets, in the order of their ids."""
        return {head: list(names) for head, names in self._classes.items()}

    @property
    def heads_vary(self) -> bool:
        """True if some dataset does not have all heads."""
        return any(set(dataset.classes) != set(self._classes) for dataset in self.datasets.values())

    def classes_of(self, clip: Clip) -> dict[str, list[str]]:
        """Return the class names per head of the clip's dataset."""
        return self._dataset_of(clip).classes

    def clips(self, split: str) -> list[Clip]:
        """Return all clips of a split, dataset by dataset; see `ShardFolder.clips`."""
        return [clip for dataset in self.datasets.values() for clip in dataset.clips(split)]

    def count(self, clips: Sequence[Clip]) -> dict[str, int]:
        """Return the number of clips by dataset."""
        counts = dict.fromkeys(self.datasets, 0)
        for clip in clips:
            counts[_name_of(clip)] += 1
        return counts

    def read(self, clip: Clip, modality: str) -> bytes:
        """Return one member's bytes, checked against its crc32; see `ShardFolder.read`."""
        return self._dataset_of(clip).read(clip, modality)

    def metadata(self, clip: Clip) -> ClipMetadata:
        """Return the clip's KEY.json, with key and heads as its dataset names them; see `ShardFolder.metadata`."""
        return self._dataset_of(clip).metadata(clip)

    def _dataset_of(self, clip: Clip) -> Dataset:
        return self.datasets[_name_of(clip)]


def open_datasets(data: DataRecipe) -> Shards:
    """Open the datasets of `data.mixture`, in the order of their names; without a mixture, `data.shards`.

    Raises:
        UserError: a folder cannot be opened (see `remote.open_folder`), or two datasets have a head of the same name
            with other classes.
    """
    if not data.mixture:
        return open_folder(data)
    return Mixture([open_dataset(data, name, named=True) for name in sorted(data.mixture)])


def open_dataset(data: DataRecipe, name: str, *, named: bool = False) -> Dataset:
    """Open one dataset of `data.mixture`.

    Args:
        data: The data section with the mixture.
        name: Name of the dataset.
        named: True for a part of the mixture: clips and shards have the dataset's name before their own, and
            `data.train_split` is the dataset's own training split.

    Raises:
        UserError: the folder cannot be opened (see `remote.open_folder`), or has no head that is to be renamed.
    """
    dataset, own = data.mixture[name], data.of_dataset(name)
    try:
        folder = open_folder(own)
    except UserError as error:
        raise UserError(f"data.mixture.{name}: {error}") from None
    if not named:
        return Dataset(folder, heads=dataset.heads)
    return Dataset(folder, name, dataset.heads, {data.train_split: own.train_split})


def _name_of(clip: Clip) -> str:
    return clip.key.partition("/")[0]


def _difference(first: Sequence[str], second: Sequence[str]) -> str:
    """Return how the classes of a head differ between two datasets, or an empty string."""
    for number, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return f"class {number} is '{one}' and '{other}'"
    return f"they have {len(first)} and {len(second)} classes" if len(first) != len(second) else ""
