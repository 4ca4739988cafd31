"""An exported model's file: an ONNX model whose metadata say what it takes, and vouch for every byte of it.

    metadata of the ONNX model
      karmma_dist           the `ModelHeader`, as JSON
      karmma_dist.sha256    sha256 of the whole file with 64 zeros in this place

Reading a header needs neither ONNX nor its runtime: metadata are read from the file as protobuf has them
(https://protobuf.dev/programming-guides/encoding, `ModelProto` in onnx.proto).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from karmma_dist.errors import UserError
from karmma_dist.io.files import json_text, read_file
from karmma_dist.io.json_fields import JsonObject
from karmma_dist.io.protobuf import walk_fields

FORMAT = 1
"""Version of the format."""
HEADER, DIGEST = "karmma_dist", "karmma_dist.sha256"
"""Names of the metadata."""
BLANK = "0" * 64
"""The digest's place while the digest is computed."""
MOST_BYTES = (1 << 31) - 1
"""Largest size of a protobuf message."""

_METADATA_PROPS, _KEY, _VALUE = 14, 1, 2
"""Numbers of fields in onnx.proto."""


@dataclass(frozen=True)
class ModelInput:
    """The array of a modality that an exported model takes."""

    modality: str
    letter: str
    """Letter of the modality on the command line."""
    shape: tuple[int, ...]
    dtype: str
    """NumPy's name of the type of its values."""
    axes: str
    """Names of the axes, and the meaning of the values."""
    rate_hz: float | None
    """Samples per second along the last axis; None if it is no axis of time."""

    @property
    def name(self) -> str:
        """Name of the array among the inputs of the ONNX model."""
        return self.modality

    @property
    def flag(self) -> str:
        """Name of the input that says whether the modality is present, bool ()."""
        return f"has_{self.modality}"

    @classmethod
    def parse(cls, fields: JsonObject) -> ModelInput:
        """Read an entry of the header.

        Raises:
            ValueError: a field is missing or of another type.
        """
        rate_hz = None if fields.is_null("rate_hz") else float(fields.number("rate_hz"))
        return cls(
            fields.text("modality"), fields.text("letter"), tuple(fields.wholes("shape")), fields.text("dtype"),
            fields.text("axes"), rate_hz,
        )  # fmt: skip


@dataclass(frozen=True)
class ModelHeader:
    """The description of an exported model."""

    run: str
    """Name of the run."""
    precision: str
    """Type of the stored weights: fp32 or fp16."""
    modalities: tuple[ModelInput, ...]
    """Inputs, in the model's order."""
    heads: dict[str, int]
    """Number of classes by head."""
    classes: dict[str, list[str]]
    """Class names by head, in the order of their ids; may be empty."""
    inputs: dict[str, Any]
    """The recipe's `inputs`: number and sampling of frames, sizes, rates."""
    packing: dict[str, Any] | None
    """Settings with which the run's shards were packed, and a media file is to be; None if they were not at hand."""
    recipe_sha256: str | None
    """sha256 of the run's recipe.yaml; None without one."""
    weights_sha256: str
    """sha256 of the run's weights."""
    versions: dict[str, str]
    """Versions of the software that wrote the file."""

    @staticmethod
    def output(head: str) -> str:
        """Return the name of a head's logits, float32 (C,), among the outputs of the ONNX model."""
        return f"logits_{head}"

    def to_json(self) -> str:
        """Return the JSON of the metadata."""
        return json_text({"format": FORMAT, **asdict(self)})

    @classmethod
    def parse(cls, text: str) -> ModelHeader:
        """Read the JSON of the metadata.

        Raises:
            ValueError: it is of another format, or a field is missing or of another type.
        """
        fields = JsonObject.parse(text)
        if (version := fields.whole("format")) != FORMAT:
            raise ValueError(f"it has format {version}, and this version reads format {FORMAT}: export the run again")
        heads, classes = fields.nested("heads"), fields.nested("classes")
        versions = fields.nested("versions")
        return cls(
            run=fields.text("run"),
            precision=fields.text("precision"),
            modalities=tuple(map(ModelInput.parse, fields.objects("modalities"))),
            heads={head: heads.whole(head) for head in heads},
            classes={head: classes.texts(head) for head in classes},
            inputs=fields.nested("inputs").unchecked(),
            packing=None if fields.is_null("packing") else fields.nested("packing").unchecked(),
            recipe_sha256=None if fields.is_null("recipe_sha256") else fields.text("recipe_sha256"),
            weights_sha256=fields.text("weights_sha256"),
            versions={name: versions.text(name) for name in versions},
        )


def is_model_file(path: Path) -> bool:
    """Return True for a path by whose name a user means an exported model and not a run or its weights."""
    return path.suffix == ".onnx"


def read_model_file(path: Path) -> tuple[bytes, ModelHeader]:
    """Read an exported model, check its digest, and return its bytes and its header.

    Raises:
        UserError: the file does not exist, is no exported model, is damaged, or has another format.
    """
    if not path.is_file():
        problem = "is a folder" if path.is_dir() else "no such file"
        raise UserError(f"{path}: {problem}: name a file that karmma-dist export wrote")
    content = read_file(path, MOST_BYTES)
    try:
        entries = dict(_metadata(content))
    except ValueError as error:
        raise UserError(f"{path}: no ONNX model, or one that is damaged ({error}): export the run again") from None
    if HEADER not in entries or DIGEST not in entries:
        raise UserError(f"{path}: holds no header of karmma-dist export, or is damaged: export the run again")
    start, stop = entries[DIGEST]
    if content[start:stop] != _digest(content, start, stop).encode():
        raise UserError(f"{path}: damaged: its bytes differ from those that were written: copy or export it again")
    try:
        return content, ModelHeader.parse(content[slice(*entries[HEADER])].decode())
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def seal(content: bytes) -> bytes:
    """Return a serialised ONNX model with its digest, for which its metadata have `BLANK`."""
    start, stop = dict(_metadata(content))[DIGEST]
    return b"".join((content[:start], _digest(content, start, stop).encode(), content[stop:]))


def _digest(content: bytes, start: int, stop: int) -> str:
    view = memoryview(content)
    digest = hashlib.sha256(view[:start])
    digest.update(BLANK.encode())
    digest.update(view[stop:])
    return digest.hexdigest()


def _metadata(content: bytes) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield the names of a serialised ONNX model's metadata, and the place of each value.

    Raises:
        ValueError: the content is no protobuf message.
    """
    for number, start, stop in walk_fields(content):
        if number == _METADATA_PROPS:
            parts = {field: place for field, *place in walk_fields(content, start, stop)}
            if {_KEY, _VALUE} <= parts.keys():
                value_start, value_stop = parts[_VALUE]
                yield content[slice(*parts[_KEY])].decode(), (value_start, value_stop)
