"""The dataset on which a model is evaluated that was trained on a mixture: one at a time, with its own heads."""

from __future__ import annotations

import logging
import os

from karmma_dist.errors import UserError, masked
from karmma_dist.io.download import is_url
from karmma_dist.models.karmma import KarmmaModel
from karmma_dist.models.model_card import ModelCard
from karmma_dist.recipe import DataRecipe
from karmma_dist.shards.folder import Shards
from karmma_dist.shards.mixture import Dataset
from karmma_dist.shards.remote import open_folder

_logger = logging.getLogger(__name__)


def dataset_of_mixture(data: DataRecipe, shards: str | None, card: ModelCard) -> tuple[DataRecipe, Dataset]:
    """Return the data section for one dataset of a mixture, and its shards, whose heads have the model's names.

    Shards in another place than those of the mixture are taken for the dataset with the same classes.

    Args:
        data: The run's data section, with a mixture.
        shards: Shards of one of its datasets; None: those of the only one.
        card: Description of the model.

    Raises:
        UserError: no shards are named, they cannot be opened, or several datasets with other heads have their classes.
    """
    names = sorted(data.mixture)
    shown = ", ".join(f"{masked(data.mixture[name].shards)} ({name})" for name in names)
    if shards is None and len(names) > 1:
        raise UserError(f"the model was trained on a mixture: name the shards of one dataset with --shards: {shown}")
    location = shards or data.mixture[names[0]].shards
    folder = open_folder(data.of_dataset(names[0]).model_copy(update={"shards": location}))
    fitting = [name for name in names if _place(data.mixture[name].shards) == _place(location)]
    if not fitting:
        fitting = [name for name in names if _fits(data, name, Dataset(folder), card)]
    renamings = [data.mixture[name].heads for name in fitting]
    if any(renaming != renamings[0] for renaming in renamings):
        raise UserError(
            f"{folder.where}: the classes are those of several datasets of the mixture, whose heads have other names: "
            f"name the folder as the run does: {shown}"
        )
    name = fitting[0] if fitting else names[0]
    dataset = Dataset(folder, heads=data.mixture[name].heads if fitting else None)
    own = data.of_dataset(name).model_copy(update={"shards": location})
    missing = [modality for modality in card.modalities if modality not in dataset.modalities]
    if missing:
        _logger.warning("%s: all clips lack %s, which this dataset does not have", dataset.where, ", ".join(missing))
    return own if "noun" in dataset.classes else own.model_copy(update={"drop_nouns": []}), dataset


def with_heads_of(model: KarmmaModel, card: ModelCard, dataset: Shards) -> tuple[KarmmaModel, ModelCard]:
    """Return a model, and its description, with only those heads that a dataset of its mixture has.

    Raises:
        UserError: the dataset has none of them.
    """
    heads = [head for head in card.heads if head in dataset.classes]
    others = [head for head in card.heads if head not in heads]
    if not heads:
        raise UserError(
            f"{dataset.where}: the shards have none of the model's heads {', '.join(card.heads)} (they have "
            f"{', '.join(dataset.classes)}): name shards of a dataset that it was trained on"
        )
    if others:
        _logger.warning(
            "%s: the model is asked for %s; its other heads, %s, are of other datasets", dataset.where,
            ", ".join(heads), ", ".join(others),
        )  # fmt: skip
    known = {head: names for head, names in card.classes.items() if head in heads}
    own = card.model_copy(update={"heads": {head: card.heads[head] for head in heads}, "classes": known})
    return model.with_heads(heads), own


def _fits(data: DataRecipe, name: str, dataset: Dataset, card: ModelCard) -> bool:
    """Return True if the model has every head of a dataset, as the mixture renames them, with the same classes."""
    renaming = data.mixture[name].heads
    if not set(renaming) <= set(dataset.classes):
        return False
    classes = {renaming.get(head, head): names for head, names in dataset.classes.items()}
    return all(
        len(names) == card.heads.get(head) and card.classes.get(head, names) == names for head, names in classes.items()
    )


def _place(shards: str) -> str:
    return shards.rstrip("/") if is_url(shards) else os.path.realpath(shards)
