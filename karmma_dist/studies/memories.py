"""The memories of a study's runs: which runs share one, where it lies, and how much it will hold.

    runs/memories/epic_kitchens-teacher@seed0-1f3a5b7c/    the teacher's answers, for every student with its views

Runs that ask the same frozen teachers about the same views of the same clips share a memory of the answers, unless
their recipes say otherwise: the first that trains fills it, the others read it, and all learn what they would without
it.

A folder that a recipe names for tokens of an encoder has a subfolder for everything that decides them, such as the
seed: `memories/video/seed1-1f3a5b7c`. One that it names for a teacher's answers is used as it is, unless several runs
name it for different answers: then each has its own subfolder, too.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from karmma_dist.errors import masked
from karmma_dist.recipe import NOT_LEARNED, Recipe
from karmma_dist.recipe.model import EncoderMemory
from karmma_dist.settings import unmarked
from karmma_dist.training.memories.facts import decoder_versions

FOLDER = "memories"
"""Folder of the memories in `runs_dir`."""

Kind = Literal["logits", "tokens"]

_LONGEST_NAME = 80


@dataclass(frozen=True)
class Use:
    """A memory that a recipe names."""

    modality: str | None
    """Modality of the encoder; None: the memory is of the teachers' answers."""
    path: str
    content: str
    """Hash of everything that decides what the memory holds."""


def with_memories(recipes: Mapping[str, Recipe], *, automatic: bool) -> dict[str, Recipe]:
    """Return the recipes of a study, each with the memories that it shares with others.

    Args:
        recipes: Recipe of each run, by name.
        automatic: True: runs that ask the same teachers about the same views get a memory if their recipes do not set
            `distill.memory`, be it to null.
    """
    shared = _shared_answers(recipes) if automatic else {}
    named = {name: _with_answers(recipe, shared.get(name)) for name, recipe in recipes.items()}
    contents: dict[str, set[str]] = {}
    for use in (use for recipe in named.values() for use in uses(recipe)):
        contents.setdefault(os.path.abspath(use.path), set()).add(use.content)
    crowded = {path for path, held in contents.items() if len(held) > 1}
    return {name: _apart(recipe, crowded) for name, recipe in named.items()}


def uses(recipe: Recipe) -> Iterator[Use]:
    """Yield the memories that a recipe names."""
    if recipe.distill is not None and recipe.distill.memory is not None:
        yield Use(None, recipe.distill.memory, _digest(_answer_facts(recipe)))
    for modality in recipe.modalities:
        memory = recipe.model.encoders[modality].memory
        if memory is not None:
            yield Use(modality, memory.path, _digest(_token_facts(recipe, modality)))


def unremembered(recipe: Recipe) -> list[str]:
    """Return the modalities whose encoder is frozen and has no memory."""
    encoders = recipe.model.encoders
    return [name for name in recipe.modalities if encoders[name].frozen and encoders[name].memory is None]


def with_token_memories(recipe: Recipe) -> Recipe:
    """Return the recipe with a memory for each frozen encoder, of the default number of views if it has none yet.

    Encoders of several recipes have the same path if they can share a memory.
    """
    known = next((encoder.memory for encoder in recipe.model.encoders.values() if encoder.memory), None)
    views = EncoderMemory(path=FOLDER).views if known is None else known.views
    added = {name: EncoderMemory(path=FOLDER, views=views) for name in unremembered(recipe)}
    remembering = _with_tokens(recipe, added)
    digests = {name: _digest(_token_facts(remembering, name)) for name in added}
    return _with_tokens(
        remembering, {name: memory.model_copy(update={"path": digests[name]}) for name, memory in added.items()}
    )


def without_memories(recipe: Recipe) -> Recipe:
    """Return the recipe without any memory."""
    plain = {name: encoder.model_copy(update={"memory": None}) for name, encoder in recipe.model.encoders.items()}
    changes: dict[str, object] = {"model": recipe.model.model_copy(update={"encoders": plain})}
    if recipe.distill is not None:
        changes["distill"] = recipe.distill.model_copy(update={"memory": None})
    return recipe.model_copy(update=changes)


@dataclass
class Held:
    """The expected content of a memory while the runs of a study train one after another."""

    kind: Kind
    """`logits` of teachers, or `tokens` of an encoder."""
    clips: int
    """Number of clips of the split."""
    record_bytes: int
    """Bytes of a record."""
    looks: dict[int, dict[int, float]] = field(default_factory=dict)
    """Probability that a run has looked at a clip, by view and epoch."""

    @property
    def num_records(self) -> float:
        """Expected number of records per clip; draws of different epochs are independent."""
        missed = (math.prod(1.0 - probability for probability in looks.values()) for looks in self.looks.values())
        return sum(1.0 - probability for probability in missed)

    @property
    def disk_bytes(self) -> float:
        """Expected number of bytes on disk."""
        return self.clips * self.num_records * self.record_bytes

    def extend(self, probability: float, epochs: int, views: int) -> float:
        """Add what a run looks at; return the expected number of records per clip that it has to compute.

        Runs of one seed draw the same numbers for modality dropout: where the one with the higher probability of
        keeping a modality drops it, the other drops it too. With a new view in each epoch, a batch is computed as a
        whole if one of its records is missing.

        Args:
            probability: Probability that an epoch of the run looks at a clip.
            epochs: Number of the run's epochs.
            views: Number of views that its epochs take in turn; 0: a new one in each epoch.
        """
        before, computed = self.num_records, 0.0
        for epoch in range(epochs):
            looks = self.looks.setdefault(epoch % views if views else epoch, {})
            earlier = looks.get(epoch, 0.0)
            computed += probability if earlier < probability else 0.0
            looks[epoch] = max(earlier, probability)
        return self.num_records - before if views else computed


def _shared_answers(recipes: Mapping[str, Recipe]) -> dict[str, str]:
    """Return the path of a memory for each run that can share its teachers' answers with another."""
    paths = {
        name: _answers_path(recipe) for name, recipe in recipes.items()
        if recipe.distill is not None and "memory" not in recipe.distill.model_fields_set
    }  # fmt: skip
    counts = Counter(paths.values())
    return {name: path for name, path in paths.items() if counts[path] > 1}


def _answers_path(recipe: Recipe) -> str:
    assert recipe.distill is not None
    first, *others = recipe.distill.names
    name = f"{first}-and-{len(others)}-more" if others else first
    readable = re.sub(r"[^\w.@+]+", "-", name.encode(errors="replace").decode()).strip("-.")[-_LONGEST_NAME:]
    return str(Path(recipe.runs_dir) / FOLDER / f"{readable}-{_digest(_answer_facts(recipe))}")


def _answer_facts(recipe: Recipe) -> dict[str, Any]:
    """Return everything that decides what the teachers are asked, and in which order their answers are stored.

    Answers for all subsets of the modalities serve any modality dropout.
    """
    assert recipe.distill is not None
    data = {**unmarked(recipe.data, NOT_LEARNED), "shards": masked(str(recipe.data.shards))}
    del data["mixture"]  # a mixture has no memory
    drawn = {
        "modalities": recipe.modalities,  # each clip keeps one of them at least
        "batch_size": recipe.training.batch_size if recipe.data.order.lanes else None,
    }  # fmt: skip
    if recipe.distill.memory_subsets == "all":
        drawn = {}
        data = {name: value for name, value in data.items() if name not in ("modality_dropout", "order")}
    return {
        "teachers": recipe.distill.names, "views": recipe.model.num_views, "data": data, **drawn,
        **_view_facts(recipe), "subsets": recipe.distill.memory_subsets,
    }  # fmt: skip


def _token_facts(recipe: Recipe, modality: str) -> dict[str, Any]:
    """Return everything that decides the tokens of an encoder."""
    encoder = recipe.model.encoders[modality]
    changed = {"weights": encoder.weights and masked(encoder.weights), "memory": None}  # any number of views may share
    return {
        "modality": modality, "encoder": {**unmarked(encoder, NOT_LEARNED), **changed},
        "dtype": encoder.memory and encoder.memory.dtype,
        "tau": recipe.model.tau, "grouping": recipe.model.grouping,
        "fusion": "mean" if recipe.model.fusion == "mean" else "transformer",  # all others take the same tokens
        "shards": masked(str(recipe.data.shards)), "split": recipe.data.train_split,
        **_view_facts(recipe),
    }  # fmt: skip


def _view_facts(recipe: Recipe) -> dict[str, Any]:
    """Return what decides the arrays of a view and the numbers in which a model computes."""
    return {
        "seed": recipe.seed, "inputs": unmarked(recipe.inputs, NOT_LEARNED), "precision": recipe.training.precision,
        "decoders": decoder_versions(),
    }  # fmt: skip


def _digest(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]


def _apart(recipe: Recipe, crowded: set[str]) -> Recipe:
    """Return the recipe with a subfolder for each memory of tokens, and of answers where the folder is crowded."""
    own = {
        use.modality: os.path.join(use.path, f"seed{recipe.seed}-{use.content}")
        for use in uses(recipe) if use.modality is not None or os.path.abspath(use.path) in crowded
    }  # fmt: skip
    tokens = {
        name: memory.model_copy(update={"path": own[name]})
        for name, encoder in recipe.model.encoders.items() if name in own and (memory := encoder.memory) is not None
    }  # fmt: skip
    return _with_answers(_with_tokens(recipe, tokens), own.get(None))


def _with_answers(recipe: Recipe, path: str | None) -> Recipe:
    """Return the recipe with another `distill.memory`; None: as it is."""
    if path is None or recipe.distill is None:
        return recipe
    return recipe.model_copy(update={"distill": recipe.distill.model_copy(update={"memory": path})})


def _with_tokens(recipe: Recipe, memories: Mapping[str, EncoderMemory]) -> Recipe:
    """Return the recipe with other memories of some encoders."""
    if not memories:
        return recipe
    changed = {
        name: encoder.model_copy(update={"memory": memories.get(name, encoder.memory)})
        for name, encoder in recipe.model.encoders.items()
    }
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"encoders": changed})})
