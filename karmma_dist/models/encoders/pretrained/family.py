"""Families of published models of the package transformers, and the base of their adapters.

A `Family` is everything that an adapter must know about such models: classes, sizes, names of parameters, pixels and
tokens. The architecture comes from the record and the recipe alone, so that FLOPs are counted, and a run's weights
loaded, without the published folder; the folder's config.json must say the same, field by field.

transformers is imported when such an encoder is built.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from karmma_dist.errors import UserError, nearest, one_line, quoted
from karmma_dist.models.encoders.encoder import Encoder
from karmma_dist.settings import Settings

_INNER = "model."
"""Prefix of a published model's keys in an adapter."""
_TRAINING_ONLY = ("*dropout*", "*drop_path*", "initializer_range")
"""Fields of every config.json that do not change what a frozen model computes."""


@dataclass(frozen=True)
class Normalisation:
    """Mean and standard deviation by which a model's input is normalised, one of each per channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


class PretrainedOptions(Settings):
    """Options of the encoders of transformers."""

    architecture: str | None = None
    """Published architecture, a row of the family's record. None: its first row."""
    config: dict[str, Any] = {}
    """Fields of the published config.json that differ from those of the architecture, e.g. {num_hidden_layers: 6}."""
    mean: list[float] | None = None
    """Mean of the model's own input normalisation, one number per channel. None: the family's."""
    std: list[float] | None = None
    """Standard deviation of the model's own input normalisation. None: the family's."""


@dataclass(frozen=True)
class Family:
    """A family of published models of transformers."""

    name: str
    """Name in the table of encoders."""
    model_type: str
    """`model_type` of config.json."""
    config_class: str
    model_class: str
    """Dotted names of the classes in transformers."""
    architectures: Mapping[str, Mapping[str, Any]]
    """Published architectures: fields of config.json that differ from the defaults of `config_class`, or that matter
    most."""
    normalisation: Normalisation
    prefixes: tuple[str, ...]
    """Prefixes of the encoder's keys in published files; the first that a key has is removed."""
    dropped: tuple[str, ...]
    """Patterns of published keys that the encoder does not need: heads and decoders."""
    free: tuple[str, ...]
    """Patterns of fields of config.json that do not change the encoder, or that follow the recipe's inputs."""
    renamed: Mapping[str, str | Callable[[re.Match[str]], str]] = field(default_factory=dict)
    """Regular expressions of published keys that some versions of transformers name otherwise, with replacements."""
    part: str = ""
    """Attribute of the model that is the encoder; empty: the model itself."""


class PretrainedModel(Encoder):
    """The base of adapters of models of transformers.

    Args:
        family: The family's record.
        modality: Modality that is encoded, for messages.
        options: Options of the recipe.
        sizes: Fields of the configuration that follow the recipe's inputs.

    Raises:
        UserError: transformers is not installed or too old, or the options fit no architecture.
    """

    reads_folders = True

    def __init__(
        self, family: Family, modality: str, options: PretrainedOptions, sizes: Mapping[str, Any]
    ) -> None:
        super().__init__()
        self.family, self.where = family, f"model.encoders.{modality}"
        self.normalisation = _normalisation(family, options, self.where)
        self.config = _configuration(family, options, sizes, self.where)
        try:
            model = _class(family, family.model_class, self.where)(self.config)
        except ValueError as error:
            raise UserError(f"{self.where}.options.config: {one_line(error)}") from None
        self.model: nn.Module = getattr(model, family.part) if family.part else model
        self.width = int(self.config.hidden_size)

    def check_config(self, config: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> None:
        """Check that config.json and preprocessor_config.json of a published folder describe this encoder.

        Raises:
            UserError: they describe another one; the message names the first field that differs.
        """
        if config.get("model_type") != self.family.model_type:
            raise UserError(
                f"config.json is of model_type {quoted(config.get('model_type'))}, and {self.family.name} is "
                f"'{self.family.model_type}': name another encoder or folder"
            )
        ours, theirs = _fields(self.config), _fields(_read_configuration(type(self.config), config))
        for name, value in ours.items():
            is_free = any(fnmatchcase(name, pattern) for pattern in (*self.family.free, *_TRAINING_ONLY))
            if not is_free and not _same(value, theirs.get(name)):
                raise UserError(
                    f"config.json says {name} {quoted(theirs.get(name))} and the recipe {quoted(value)}: correct "
                    f"{self.where}.options.config.{name}, or options.architecture"
                )
        check_normalisation(preprocessor, self.normalisation, self.where)

    def from_published(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Drop heads and decoders, and name the other entries as this version of transformers does."""
        own = set(self.state_dict())
        kept = {}
        for key, tensor in state.items():
            if not any(fnmatchcase(key, pattern) for pattern in self.family.dropped):
                kept[self._own_key(key, own)] = tensor
        return kept

    def _own_key(self, key: str, own: set[str]) -> str:
        prefix = next((prefix for prefix in self.family.prefixes if key.startswith(prefix)), "")
        name = _INNER + key.removeprefix(prefix)
        if name in own:
            return name
        renamed = name
        for pattern, replacement in self.family.renamed.items():
            renamed = re.sub(pattern, replacement, renamed)
        return renamed if renamed in own else name


class Renormalise(nn.Module):
    """A change of normalisation: channels of one mean and standard deviation get those that a model was trained with.

    Args:
        given: Normalisation of the input.
        wanted: Normalisation of the output.
    """

    scale_C: Tensor
    shift_C: Tensor

    def __init__(self, given: Normalisation, wanted: Normalisation) -> None:
        super().__init__()
        self.is_idle = given == wanted
        scales = [own / other for own, other in zip(given.std, wanted.std, strict=True)]
        means = zip(given.mean, wanted.mean, wanted.std, strict=True)
        shifts = [(own - other) / std for own, other, std in means]
        self.register_buffer("scale_C", torch.tensor(scales), persistent=False)
        self.register_buffer("shift_C", torch.tensor(shifts), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Change (N, C, ...), or nothing if the two normalisations are the same."""
        if self.is_idle:
            return x
        per_channel = (-1, *[1] * (x.ndim - 2))
        return x * self.scale_C.view(per_channel) + self.shift_C.view(per_channel)


def check_normalisation(preprocessor: Mapping[str, Any], normalisation: Normalisation, where: str) -> None:
    """Check that a published folder's preprocessing normalises as its adapter does; it may say nothing of it.

    Args:
        preprocessor: Fields of preprocessor_config.json, or those of the same meaning.
        normalisation: Normalisation of the adapter.
        where: Field of the encoder in the recipe, for the message.

    Raises:
        UserError: mean or standard deviation differ.
    """
    for name, ours in (("mean", normalisation.mean), ("std", normalisation.std)):
        theirs = preprocessor.get(f"image_{name}", preprocessor.get(name))
        listed = list(theirs) if isinstance(theirs, list | tuple) else [theirs]
        if theirs is not None and not _same(list(ours), listed):
            raise UserError(
                f"its preprocessing has {name} {quoted(theirs)} and the encoder {list(ours)}: set "
                f"{where}.options.{name}: {quoted(listed)}"
            )


def side_of(value: Any, name: str, where: str) -> int:
    """Return the side of a square that a configuration gives as a number or as a pair.

    Raises:
        UserError: it is no square.
    """
    sides = set(value) if isinstance(value, list | tuple) else {value}
    if len(sides) != 1 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise UserError(f"{where}.options.config.{name}: {quoted(value)} is no square: give one number")
    return int(sides.pop())


def _normalisation(family: Family, options: PretrainedOptions, where: str) -> Normalisation:
    own = family.normalisation
    chosen = Normalisation(tuple(options.mean or own.mean), tuple(options.std or own.std))
    if (len(chosen.mean), len(chosen.std)) != (len(own.mean), len(own.std)) or min(chosen.std) <= 0:
        raise UserError(f"{where}.options: mean and std have {len(own.mean)} numbers each, and std is positive")
    return chosen


def _class(family: Family, name: str, where: str) -> Any:
    """Import a class of transformers."""
    module, _, class_name = f"transformers.{name}".rpartition(".")
    try:
        return getattr(importlib.import_module(module), class_name)
    except (ImportError, AttributeError):
        raise UserError(
            f"{where}.name: {family.name} needs {class_name} of transformers: pip install -U 'karmma-dist[encoders]'"
        ) from None


def _configuration(family: Family, options: PretrainedOptions, sizes: Mapping[str, Any], where: str) -> Any:
    """Return the configuration of the architecture, with the recipe's fields and sizes."""
    name = options.architecture or next(iter(family.architectures))
    if name not in family.architectures:
        known = list(family.architectures)
        raise UserError(
            f"{where}.options.architecture: unknown architecture '{name}'{nearest(name, known)}; there are "
            f"{', '.join(known)}"
        )
    config_class = _class(family, family.config_class, where)
    known = list(_fields(config_class()))
    for key in options.config:
        if key not in known:
            raise UserError(f"{where}.options.config: unknown field '{key}'{nearest(key, known)} of {family.name}")
        if key in sizes:
            raise UserError(f"{where}.options.config.{key}: it follows the recipe's inputs: remove it")
    try:
        return config_class(**{**family.architectures[name], **options.config, **sizes})
    except Exception as error:  # each check of huggingface_hub raises exceptions of its own
        raise UserError(f"{where}.options.config: {one_line(error, 300)}") from None


def _read_configuration(config_class: Any, config: Mapping[str, Any]) -> Any:
    try:
        return config_class(**config)
    except Exception as error:  # each check of huggingface_hub raises exceptions of its own
        raise UserError(f"config.json is no {config_class.__name__}: {one_line(error, 300)}") from None


def _fields(config: Any) -> dict[str, Any]:
    """Return a configuration's fields of the architecture, without those that every configuration has."""
    common = set(type(config).__mro__[1]().to_dict())
    return {name: value for name, value in config.to_dict().items() if name not in common}


def _same(ours: Any, theirs: Any) -> bool:
    """Return True for equal values; a list equals a tuple, and numbers may differ in their last digits."""
    if isinstance(ours, Sequence) and isinstance(theirs, Sequence) and not isinstance(ours, str):
        return len(ours) == len(theirs) and all(_same(*pair) for pair in zip(ours, theirs, strict=True))
    if isinstance(ours, float) and isinstance(theirs, int | float):
        return abs(ours - theirs) <= 1e-6 * max(abs(ours), abs(theirs))
    return bool(ours == theirs)
