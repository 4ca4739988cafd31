"""The dataset on which a model is evaluated that was trained on a mixture: one at a time, by its own heads."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass

from karmma_dist.errors import UserError, masked
from karmma_dist.io.download import is_url
from karmma_dist.models.karmma import KarmmaModel
from karmma_dist.models.model_card import ModelCard
from karmma_dist.recipe import DataRecipe
from karmma_dist.shards.folder import ShardFolder
from karmma_dist.shards.remote import open_folder

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OneDataset:
    """A model as one dataset of its mixture sees it: it could have been trained on that alone."""

    model: KarmmaModel
    """The model with the dataset's heads alone, called as the dataset calls them. It shares all parameters."""
    card: ModelCard
    """Its description."""
    data: DataRecipe
    """The data section for the dataset."""
    folder: ShardFolder
    """The dataset's shards."""


def choose_dataset(model: KarmmaModel, card: ModelCard, data: DataRecipe, shards: str | None) -> OneDataset:
    """Return the model of a mixture for one of the mixture's datasets.

    Shards in another place than those of the mixture are taken for the dataset with the same classes.

    Args:
        model: The model.
        card: Its description.
        data: The run's data section, with a mixture.
        shards: Shards of the dataset; None: those of the only one.

    Raises:
        UserError: no shards are named, they cannot be opened, they have none of the model's heads, or they could be of
            several datasets whose heads the mixture calls differently.
    """
    names = sorted(data.mixture)
    shown = ", ".join(f"{masked(data.mixture[name].shards)} ({name})" for name in names)
    if shards is None and len(names) > 1:
        raise UserError(f"the model was trained on a mixture: name the shards of one dataset with --shards: {shown}")
    location = shards or data.mixture[names[0]].shards
    folder = open_folder(data.of_dataset(names[0]).model_copy(update={"shards": location}))
    fitting = [name for name in names if _place(data.mixture[name].shards) == _place(location)]
    fitting = fitting or [name for name in names if _fits(data.mixture[name].heads, folder, card)]
    renamings = [data.mixture[name].heads for name in fitting]
    if any(renaming != renamings[0] for renaming in renamings):
        raise UserError(
            f"{folder.where}: could be of several datasets of the mixture, which calls their heads differently: name "
            f"the folder as the run does: {shown}"
        )
    heads = _heads_of(folder, renamings[0] if renamings else {}, card)
    dropped = data.drop_nouns if "noun" in heads else []
    own_data = data.of_dataset(fitting[0] if fitting else names[0])
    _note_differences(folder, heads, card)
    own_card = card.model_copy(update={
        "heads": {own: card.heads[head] for own, head in heads.items()},
        "classes": {own: card.classes[head] for own, head in heads.items() if head in card.classes},
    })  # fmt: skip
    own_data = own_data.model_copy(update={"shards": location, "drop_nouns": dropped})
    return OneDataset(model.with_heads(heads), own_card, own_data, folder)


def _heads_of(folder: ShardFolder, renaming: Mapping[str, str], card: ModelCard) -> dict[str, str]:
    """Return the model's name of each head of the shards that the model has.

    Raises:
        UserError: the shards have no such head.
    """
    known = {own: renaming.get(own, own) for own in folder.classes if renaming.get(own, own) in card.heads}
    if not known:
        raise UserError(
            f"{folder.where}: the shards have none of the model's heads {', '.join(card.heads)} (they have "
            f"{', '.join(folder.classes)}): name shards of a dataset that it was trained on"
        )
    return known


def _note_differences(folder: ShardFolder, heads: Mapping[str, str], card: ModelCard) -> None:
    """Say once which of the model's modalities and heads the dataset does not have."""
    lacked = [modality for modality in card.modalities if modality not in folder.modalities]
    if lacked:
        _logger.warning("%s: all clips lack %s, which this dataset does not have", folder.where, ", ".join(lacked))
    unused = [head for head in card.heads if head not in heads.values()]
    if unused:
        _logger.warning("%s: the model's heads %s are of other datasets: ignored", folder.where, ", ".join(unused))


def _fits(renaming: Mapping[str, str], folder: ShardFolder, card: ModelCard) -> bool:
    """Return True if the model has all heads of the shards, if they are renamed like this, with the same classes."""
    if not set(renaming) <= set(folder.classes):
        return False
    classes = {renaming.get(head, head): names for head, names in folder.classes.items()}
    return all(
        len(names) == card.heads.get(head) and card.classes.get(head, names) == names for head, names in classes.items()
    )


def _place(shards: str) -> str:
    return shards.rstrip("/") if is_url(shards) else os.path.realpath(shards)
