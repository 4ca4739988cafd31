"""Folders of published models in the layout of the Hugging Face hub, on disk or at a URL.

    FOLDER/ or hf://owner/name@revision
      config.json                      the architecture
      preprocessor_config.json         how pixels or spectrograms are normalised; may be missing
      model.safetensors                the weights, or on disk the parts that model.safetensors.index.json lists

Pickles (pytorch_model.bin) are not read: reading them can run code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from karmma_dist.errors import UserError, masked
from karmma_dist.io.cache import FetchError, NotFoundError
from karmma_dist.io.download import fetch_json, is_url
from karmma_dist.io.files import read_file
from karmma_dist.io.json_fields import parse_strictly

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_MOST_BYTES = 16 << 20
"""Bytes of a JSON file: an index lists tens of thousands of keys."""

ReadWeights = Callable[[str], dict[str, Tensor]]
"""Function that reads the tensors of a .safetensors file at a path or URL."""


@dataclass(frozen=True)
class HubFolder:
    """The content of a published folder."""

    config: dict[str, Any]
    preprocessor: dict[str, Any]
    """Empty if the folder says nothing of its inputs."""
    state: dict[str, Tensor]
    """Tensors by published key."""


def is_hub_folder(source: str) -> bool:
    """Return True for a folder with a config.json, and for a URL of a folder instead of a .safetensors file."""
    if is_url(source):
        return not source.rstrip("/").endswith(".safetensors")
    return (Path(source) / CONFIG).is_file()


def read_hub_folder(source: str, read: ReadWeights, has_sha256: bool) -> HubFolder:
    """Read a published folder.

    Args:
        source: Path or URL of the folder.
        read: Reads the weights.
        has_sha256: True if `read` checks the hash of the one file of weights.

    Raises:
        UserError: a file is missing or cannot be read, or is a pickle.
    """
    if is_url(source):
        return _read_url(source.rstrip("/"), read)
    folder = Path(source)
    config, preprocessor = _local(folder, CONFIG), {}
    if (folder / PREPROCESSOR).is_file():
        preprocessor = _local(folder, PREPROCESSOR)
    if (folder / _WEIGHTS).is_file():
        return HubFolder(config, preprocessor, read(str(folder / _WEIGHTS)))
    if not (folder / _INDEX).is_file():
        pickle = next((item.name for item in sorted(folder.iterdir()) if item.suffix in (".bin", ".pth", ".pt")), None)
        advice = "" if pickle is None else f" ({pickle} is a pickle, which can run code: save it as {_WEIGHTS})"
        raise UserError(f"{folder}: holds no {_WEIGHTS}{advice}")
    if has_sha256:
        raise UserError(f"{folder}: weights_sha256 is the hash of one file, and its weights are in several: remove it")
    state: dict[str, Tensor] = {}
    for name in _parts(folder):
        state |= read(str(folder / name))
    return HubFolder(config, preprocessor, state)


def _parts(folder: Path) -> list[str]:
    """Return the names of the files that the index lists, all of them in the folder itself."""
    listed = _local(folder, _INDEX).get("weight_map")
    names = sorted({str(name) for name in listed.values()}) if isinstance(listed, dict) else []
    for name in names:
        if name != Path(name).name or not name.endswith(".safetensors"):
            raise UserError(f"{folder / _INDEX}: lists '{name[:80]}', which is no .safetensors file of its folder")
    if not names:
        raise UserError(f"{folder / _INDEX}: lists no file: copy the folder again")
    return names


def _local(folder: Path, name: str) -> dict[str, Any]:
    try:
        return _object(read_file(folder / name, _MOST_BYTES), str(folder / name))
    except OSError as error:
        raise UserError(f"{folder / name}: cannot be read: {error.strerror or error}") from None


def _read_url(url: str, read: ReadWeights) -> HubFolder:
    config = _fetched(url, CONFIG)
    assert config is not None
    preprocessor = _fetched(url, PREPROCESSOR, may_be_missing=True) or {}
    return HubFolder(config, preprocessor, read(f"{url}/{_WEIGHTS}"))


def _fetched(url: str, name: str, may_be_missing: bool = False) -> dict[str, Any] | None:
    shown = f"{masked(url)}/{name}"
    try:
        return _object(fetch_json(f"{url}/{name}", _MOST_BYTES), shown)
    except FetchError as error:
        if may_be_missing and isinstance(error, NotFoundError):
            return None
        advice = "check URL and network, or download the folder and give its path"
        raise UserError(f"{shown}: {error.what}: {advice}") from None


def _object(content: bytes, shown: str) -> dict[str, Any]:
    try:
        value = parse_strictly(content)
    except ValueError as error:
        raise UserError(f"{shown}: is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{shown}: is no JSON object")
    return value
