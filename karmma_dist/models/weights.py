"""Weights: files are read without running code in them, all keys are loaded or none, and models start from them.

Starting weights of an encoder come from a run, a published checkpoint, or the URL of either. A URL is downloaded once
per node into CACHE/weights (see `karmma_dist.io.cache`) and stays there: set `weights_sha256` if the file behind a URL
may change.
"""

from __future__ import annotations

import logging
import os
import pickle
import re
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from karmma_dist.errors import UserError, masked
from karmma_dist.io.cache import Cache, Content, FetchError, cache_root
from karmma_dist.io.download import fetch, is_url
from karmma_dist.io.files import sha256_of
from karmma_dist.models.encoders.encoder import Encoder
from karmma_dist.models.hub_folder import is_hub_folder, read_hub_folder
from karmma_dist.models.karmma import KarmmaModel
from karmma_dist.progress import Report, silent
from karmma_dist.recipe import Recipe


def build_model(
    recipe: Recipe, classes: dict[str, list[str]], report: Report = silent, is_main: bool = True
) -> KarmmaModel:
    """Build the recipe's model with its starting weights, as a function of the recipe and the seed.

    `report` shows downloads; only the main rank logs a warning on weights that did not carry over.
    """
    torch.manual_seed(recipe.seed)
    heads = {head: len(names) for head, names in classes.items()}
    model = KarmmaModel(recipe.model, recipe.inputs, recipe.modalities, heads)
    for modality in recipe.modalities:
        start = recipe.model.encoders[modality]
        encoder = model.encoders[modality]
        assert isinstance(encoder, Encoder)
        if start.weights is None and (start.weights_ignore or start.weights_sha256) and is_main:
            _logger.warning(
                "model.encoders.%s: weights_ignore and weights_sha256 have no effect without weights", modality
            )
        if start.weights is not None:
            source = start.weights
            if not is_url(source):
                run_dir = recipe.find_run(source)
                if not run_dir.exists():
                    check_published(Path(source), f"model.encoders.{modality}.weights")
                source = str(run_dir)
            load_encoder_weights(
                encoder, modality, source, ignore=start.weights_ignore, sha256=start.weights_sha256,
                cache_dir=recipe.data.cache_dir, report=report, log=_logger.warning if is_main else _logger.debug,
            )  # fmt: skip
    return model


WEIGHTS = "weights.safetensors"
"""File name of a run's weights."""
MOST_BYTES = 32 << 30
"""Largest size of a file of weights at a URL."""

Log = Callable[[str], object]
"""Function that logs one line for the user."""

_SHOWN = 30
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
_PREFIXES = ("module.", "_orig_mod.")
"""Prefixes that DistributedDataParallel and torch.compile add to every key."""


def own_weights(path: Path) -> Path:
    """Return the weights file of a run folder, or `path` itself if it is a file.

    Raises:
        UserError: the file does not exist.
    """
    if path.is_dir():
        if not (path / WEIGHTS).is_file():
            raise UserError(f"{path}: holds no {WEIGHTS}: finish that run first")
        return path / WEIGHTS
    if not path.is_file():
        raise UserError(f"{path}: no such run folder or weights file")
    return path


def any_weights(path: Path) -> Path:
    """Return the weights file of any folder, or `path` itself if it is a file.

    It is weights.safetensors, else the only .safetensors file, else the only .pth, .pt or .bin file.

    Raises:
        UserError: the folder has no weights file, or several of one format.
    """
    if not path.is_dir() or (path / WEIGHTS).is_file():
        return own_weights(path)
    for suffixes in ((".safetensors",), (".pth", ".pt", ".bin")):
        names = sorted(item.name for item in path.iterdir() if item.suffix in suffixes)
        if len(names) > 1:
            raise UserError(f"{path}: holds several weights files ({', '.join(names)}): name one of them")
        if names:
            return path / names[0]
    return own_weights(path)


def read_weights(path: Path, shown: str = "") -> dict[str, Tensor]:
    """Read the tensors of a .safetensors file, or of a file that torch.save wrote, as a flat dictionary.

    The rest of a training checkpoint (epoch, optimizer) is ignored, and the prefixes of wrappers are removed.

    Args:
        path: The file; its content tells its format.
        shown: Name of the file in messages.

    Raises:
        UserError: the file holds no tensors, or holds Python objects, which could run code when read.
    """
    shown = shown or str(path)
    try:
        content: Any = load_file(path) if _is_safetensors(path) else _load_tensors(path)
    except (
        SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError,
        TypeError, AttributeError,
    ) as error:  # fmt: skip
        raise UserError(f"{shown}: cannot be read as weights: {_reason(error)}") from None
    while isinstance(content, dict) and (inner := _wrapped(content)) is not None:
        content = inner
    if not isinstance(content, dict):
        type_name = type(content).__name__
        raise UserError(f"{shown}: cannot be read as weights: not a dictionary of tensors but a {type_name}")
    tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        keys = _some(list(map(str, content))) or "nothing"
        raise UserError(f"{shown}: cannot be read as weights: not a dictionary of tensors: it holds {keys}")
    while prefix := next((p for p in _PREFIXES if all(key.startswith(p) for key in tensors)), ""):
        tensors = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
    return tensors


def load_exactly(
    module: nn.Module, state: dict[str, Tensor], source: str, ignore: Sequence[str] = (), log: Log | None = None
) -> None:
    """Load a state dictionary if every key and shape fits; otherwise raise a one-line error and change nothing.

    Args:
        module: Module that receives the weights, in place.
        state: Tensors by key.
        source: Name of `state` in messages.
        ignore: Glob patterns of keys that may be missing, unknown or of another size. The module keeps its values of
            these keys.
        log: Receives lines on the ignored keys, and on the patterns without a match.

    Raises:
        UserError: other keys are missing, unknown or of another size, or no key is left to load.
    """
    wanted = module.state_dict()
    missing = [key for key in wanted if key not in state]
    unknown = [key for key in state if key not in wanted]
    resized = [key for key in wanted if key in state and state[key].shape != wanted[key].shape]
    tolerated = {key for key in missing + unknown + resized if any(fnmatchcase(key, pattern) for pattern in ignore)}
    parts = [
        f"{len(keys)} {problem} ({_some(keys)})"
        for problem, keys in (
            ("keys are missing", [key for key in missing if key not in tolerated]),
            ("keys are unknown", [key for key in unknown if key not in tolerated]),
        )
        if keys
    ]
    if parts:
        raise UserError(f"{source}: not weights of this architecture: {' and '.join(parts)}")
    other = [
        f"{key} is {tuple(state[key].shape)}, expected {tuple(wanted[key].shape)}"
        for key in resized
        if key not in tolerated
    ]
    if other:
        advice = "" if log is None else ": add keys that may start at random to weights_ignore"
        raise UserError(f"{source}: weights of other sizes: {_some(other)}{advice}")
    loaded = {key: state[key] for key in wanted if key in state and key not in tolerated}
    if wanted and not loaded:
        raise UserError(f"{source}: weights_ignore ({', '.join(ignore)}) leaves no key to load")
    if log is not None:
        _log_ignored(log, source, missing, unknown, resized, tolerated, ignore)
    module.load_state_dict(loaded, strict=False)


def _log_ignored(
    log: Log,
    source: str,
    missing: list[str],
    unknown: list[str],
    resized: list[str],
    tolerated: set[str],
    ignore: Sequence[str],
) -> None:
    """Log the ignored keys; every missing, unknown or resized key is in `tolerated` by now."""
    if missing or resized:
        reason = f"{len(missing)} are not in the file, {len(resized)} have another size there"
        log(f"{source}: these start at random: {_some(missing + resized)} ({reason})")
    if unknown:
        log(f"{source}: in the file and not used: {_some(unknown)}")
    idle = [pattern for pattern in ignore if not any(fnmatchcase(key, pattern) for key in tolerated)]
    if idle:
        log(f"{source}: no ignored key matches {', '.join(repr(pattern) for pattern in idle)}")


def _is_safetensors(path: Path) -> bool:
    """Return True by suffix, or by the JSON after the 8 bytes of its length: a file in a cache has no suffix."""
    if path.suffix == ".safetensors":
        return True
    with open(path, "rb") as file:
        head = file.read(10)
    return head[8:] == b'{"' and not head.startswith(b"PK")


def _load_tensors(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _wrapped(content: dict[Any, Any]) -> dict[Any, Any] | None:
    """Return the state dictionary inside a training checkpoint, or None."""
    return next((content[name] for name in _WRAPPERS if isinstance(content.get(name), dict)), None)


def _reason(error: Exception) -> str:
    text = str(error).strip()
    if match := re.search(r"GLOBAL ([\w.]+)", text):
        return (
            f"it holds a Python object ({match[1]}), and reading it can run code: "
            "if you trust the file, save its tensors as .safetensors"
        )
    # For a file that is not a pickle, torch's message advises unsafe loading or shows its parser's internal error.
    if text.startswith("Weights only load failed") or isinstance(error, LookupError | TypeError | AttributeError):
        return "neither .safetensors nor tensors that torch.save wrote"
    return text.splitlines()[0] if text else type(error).__name__


def _some(items: Iterable[str]) -> str:
    listed = list(items)
    return ", ".join(listed[:_SHOWN]) + (", ..." if len(listed) > _SHOWN else "")


_logger = logging.getLogger(__name__)

PUBLISHED = {
    "swin_tiny_patch244_window877_kinetics400_1k.pth": "github.com/SwinTransformer/storage, release v1.0.4",
    "swin_base_patch244_window877_kinetics400_1k.pth": "github.com/SwinTransformer/storage, release v1.0.4",
    "stlt_action_genome.pth": "github.com/gorjanradevski/revisiting-spatial-temporal-layouts (STLT, Action Genome)",
    "vjepa2-vitl-fpc64-256": "huggingface.co/facebook/vjepa2-vitl-fpc64-256 (config.json and model.safetensors)",
}
"""Places where the public weights of recipes are published, by name of the file or folder."""


def check_published(source: Path, field: str) -> None:
    """Check that a public weights file exists; the error names the place where it is published.

    Raises:
        UserError: `source` is one of `PUBLISHED` and does not exist.
    """
    if source.name in PUBLISHED and not source.exists():
        raise UserError(
            f"{field}: {source} does not exist: download {source.name} from {PUBLISHED[source.name]} to this path, or "
            f"start at random with --set {field}=null"
        )


def load_encoder_weights(
    encoder: Encoder,
    modality: str,
    source: str,
    *,
    ignore: Sequence[str] = (),
    sha256: str | None = None,
    cache_dir: str | None = None,
    report: Report = silent,
    log: Log = _logger.warning,
) -> None:
    """Load starting weights into one encoder, in place and completely. Ranks need not call this together.

    Args:
        encoder: Encoder from `build_encoder`.
        modality: Modality of the run's encoder to use. A run with one other modality gives its only encoder.
        source: Run folder, its weights.safetensors, a published checkpoint of the encoder's architecture
            (.safetensors, .pth or .pt; see the encoder's `from_published`), or the URL of such a file. For encoders
            that read them, a published folder or its URL; see `hub_folder`.
        ignore: Glob patterns of the encoder's keys that need not fit; see `load_exactly`.
        sha256: Expected sha256 of the file.
        cache_dir: Cache folder, see `DataRecipe.cache_dir`.
        report: Progress callback of a download.
        log: Receives lines on weights that did not carry over.

    Raises:
        UserError: the file is missing, has another sha256, or its keys and shapes do not fit the encoder; or the folder
            is of another architecture.
    """
    shown, moved = masked(source), ""
    read = partial(_read_source, sha256=sha256, cache_dir=cache_dir, report=report)
    if encoder.reads_folders and is_hub_folder(source):
        folder = read_hub_folder(source, read, sha256 is not None)
        try:
            encoder.check_config(folder.config, folder.preprocessor)
        except UserError as error:
            raise UserError(f"{shown}: {error}") from None
        load_exactly(
            encoder, encoder.from_published(folder.state), f"{shown} (for the {modality} encoder)", ignore, log
        )
        return
    state = read(source)
    if any(key.startswith("encoders.") for key in state):
        state = _encoder_of_run(state, modality, shown)
    elif encoder.reads_folders:
        raise UserError(f"{shown}: not the weights of a run: give a published folder, with its config.json")
    elif not set(state) <= (own := set(encoder.state_dict())):
        moved = encoder.moved_rows(state)
        try:
            state = encoder.from_published(state)
        except UserError as error:
            if own.isdisjoint(state):
                raise UserError(f"{shown}: {error}") from None
    load_exactly(encoder, state, f"{shown} (for the {modality} encoder)", ignore, log)
    if moved:
        log(f"{shown}: {moved}")


def _read_source(
    source: str, sha256: str | None, cache_dir: str | None, report: Report
) -> dict[str, Tensor]:
    return _download(source, sha256, cache_dir, report) if is_url(source) else _read(Path(source), sha256)


def _read(source: Path, sha256: str | None) -> dict[str, Tensor]:
    path = any_weights(source)
    if problem := _sha256_problem(path, sha256):
        raise UserError(f"{path}: {problem}: correct one of the two")
    return read_weights(path)


def _download(url: str, sha256: str | None, cache_dir: str | None, report: Report) -> dict[str, Tensor]:
    """Return the weights at a URL; one process of a node downloads the file, the others wait for it."""
    cache, content = Cache(cache_root(cache_dir) / "weights"), Content(sha256, None, url, MOST_BYTES)
    if sha256:
        cache.remove_if_damaged(content)
    try:
        os.close(cache.open(content, partial(_fetch, url, sha256, report, cache)))
    except FetchError as error:
        advice = "" if error.damaged else ": check URL, network and password, or download the file and give its path"
        raise UserError(f"{masked(url)}: {error.what}{advice}") from None
    try:
        return read_weights(cache.root / content.name, masked(url))
    except UserError as error:
        cache.remove(content)
        raise UserError(f"{error} (removed from the cache)") from None


def _fetch(url: str, sha256: str | None, report: Report, cache: Cache, path: Path) -> None:
    """Download and check a file. A wrong hash is most likely the recipe's fault, so the download is not repeated."""
    name = Path(urlsplit(url).path).name
    _logger.warning("%s: downloading into %s", masked(url), cache.root)

    def moved(done: int, total: int) -> None:
        report(f"download {name}", done // 10**6, total // 10**6, "MB")

    fetch(url, Content(None, None, url, MOST_BYTES), path, moved)
    if problem := _sha256_problem(path, sha256):
        raise FetchError(f"{problem}: removed; correct the URL or the hash", damaged=True)


def _sha256_problem(path: Path, expected: str | None) -> str:
    actual = sha256_of(path) if expected else None
    return "" if actual == expected else f"its sha256 is {actual}, weights_sha256 says {expected}"


def _encoder_of_run(state: dict[str, Tensor], modality: str, source: str) -> dict[str, Tensor]:
    modalities = sorted({key.split(".")[1] for key in state if key.startswith("encoders.")})
    chosen = modalities[0] if len(modalities) == 1 else modality
    if chosen not in modalities:
        raise UserError(f"{source}: holds encoders for {', '.join(modalities)}, none for {modality}")
    prefix = f"encoders.{chosen}."
    return {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
