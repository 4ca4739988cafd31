"""Weights: files read without running any code in them, loaded key by key or not at all, and models that start there.

Starting weights of an encoder come from a run, a published checkpoint, or the URL of either. A URL is downloaded once
per node into CACHE/weights (see `karmma_dist.io.cache`) and stays there: name its `weights_sha256` where the file
behind a URL may change.
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
from karmma_dist.models.karmma import KarmmaModel
from karmma_dist.progress import Report, silent
from karmma_dist.recipe import Recipe


def build_model(
    recipe: Recipe, classes: dict[str, list[str]], report: Report = silent, is_main: bool = True
) -> KarmmaModel:
    """The recipe's model with its starting weights: a function of the recipe and the seed.

    `report` shows downloads; only the main rank says which weights did not carry over.
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
                found = recipe.find_run(source)
                if not found.exists():
                    check_published(Path(source), f"model.encoders.{modality}.weights")
                source = str(found)
            load_encoder_weights(
                encoder, modality, source, ignore=start.weights_ignore, sha256=start.weights_sha256,
                cache_dir=recipe.data.cache_dir, report=report, say=_logger.warning if is_main else _logger.debug,
            )  # fmt: skip
    return model


WEIGHTS = "weights.safetensors"
"""File name of a run's weights."""

Say = Callable[[str], object]
"""Takes one line that a user should read."""

_SHOWN = 30
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
_PREFIXES = ("module.", "_orig_mod.")
"""What DistributedDataParallel and torch.compile put before every key."""


def own_weights(path: Path) -> Path:
    """The weights file of a run folder, or `path` itself.

    Raises:
        UserError: there is none.
    """
    if path.is_dir():
        if not (path / WEIGHTS).is_file():
            raise UserError(f"{path}: holds no {WEIGHTS}: train that run to its end first")
        return path / WEIGHTS
    if not path.is_file():
        raise UserError(f"{path}: no such run folder or weights file")
    return path


def any_weights(path: Path) -> Path:
    """As `own_weights`, for any folder: its weights.safetensors, else its one .safetensors, else its one .pth or .pt.

    Raises:
        UserError: there is none, or several of one kind.
    """
    if not path.is_dir() or (path / WEIGHTS).is_file():
        return own_weights(path)
    for suffixes in ((".safetensors",), (".pth", ".pt", ".bin")):
        found = sorted(item.name for item in path.iterdir() if item.suffix in suffixes)
        if len(found) > 1:
            raise UserError(f"{path}: holds several weights files ({', '.join(found)}): name one of them")
        if found:
            return path / found[0]
    return own_weights(path)


def read_weights(path: Path, shown: str = "") -> dict[str, Tensor]:
    """A flat dictionary of the tensors in a .safetensors file, or in what torch.save wrote.

    What else a training checkpoint holds (epoch, optimizer) is left out; so is what wrappers put before every key.

    Args:
        path: The file; its content tells its format.
        shown: What messages call it.

    Raises:
        UserError: it holds no tensors, or Python objects, which could run code of their own when read.
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
        kind = type(content).__name__
        raise UserError(f"{shown}: cannot be read as weights: not a dictionary of tensors but a {kind}")
    tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        found = _some(list(map(str, content))) or "nothing"
        raise UserError(f"{shown}: cannot be read as weights: not a dictionary of tensors: it holds {found}")
    while prefix := next((p for p in _PREFIXES if all(key.startswith(p) for key in tensors)), ""):
        tensors = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
    return tensors


def load_exactly(
    module: nn.Module, state: dict[str, Tensor], where: str, ignore: Sequence[str] = (), say: Say | None = None
) -> None:
    """`load_state_dict` that reports on one line and changes nothing unless every key and shape fits.

    Args:
        module: Gets the weights, in place.
        state: Its keys and tensors.
        where: What messages call `state`.
        ignore: Glob patterns of keys that may be missing, unknown or of another size. Those of `module` keep the values
            they have.
        say: Told which keys were left out, and which patterns matched none.

    Raises:
        UserError: other keys are missing, unknown or of another size, or there is nothing left to load.
    """
    wanted = module.state_dict()
    missing = [key for key in wanted if key not in state]
    unknown = [key for key in state if key not in wanted]
    resized = [key for key in wanted if key in state and state[key].shape != wanted[key].shape]
    tolerated = {key for key in missing + unknown + resized if any(fnmatchcase(key, pattern) for pattern in ignore)}
    parts = [
        f"{len(keys)} {what} ({_some(keys)})"
        for what, keys in (
            ("keys are missing", [key for key in missing if key not in tolerated]),
            ("keys are unknown", [key for key in unknown if key not in tolerated]),
        )
        if keys
    ]
    if parts:
        raise UserError(f"{where}: not weights of this architecture: {' and '.join(parts)}")
    other = [
        f"{key} is {tuple(state[key].shape)}, expected {tuple(wanted[key].shape)}"
        for key in resized
        if key not in tolerated
    ]
    if other:
        advice = "" if say is None else ": what may start at random goes into weights_ignore"
        raise UserError(f"{where}: weights of other sizes: {_some(other)}{advice}")
    loaded = {key: state[key] for key in wanted if key in state and key not in tolerated}
    if wanted and not loaded:
        raise UserError(f"{where}: nothing is left to load beside what may be left out ({', '.join(ignore)})")
    if say is not None:
        _say_left_out(say, where, missing, unknown, resized, tolerated, ignore)
    module.load_state_dict(loaded, strict=False)


def _say_left_out(
    say: Say,
    where: str,
    missing: list[str],
    unknown: list[str],
    resized: list[str],
    tolerated: set[str],
    ignore: Sequence[str],
) -> None:
    """Tell what `ignore` let pass; every missing, unknown or resized key is one of `tolerated` by now."""
    if missing or resized:
        why = f"{len(missing)} are not in the file, {len(resized)} of another size there"
        say(f"{where}: these start at random: {_some(missing + resized)} ({why})")
    if unknown:
        say(f"{where}: in the file and not used: {_some(unknown)}")
    idle = [pattern for pattern in ignore if not any(fnmatchcase(key, pattern) for key in tolerated)]
    if idle:
        say(f"{where}: nothing to leave out matches {', '.join(repr(pattern) for pattern in idle)}")


def _is_safetensors(path: Path) -> bool:
    """By suffix, or by the JSON that follows the 8 bytes of its length: a file in a cache has no suffix."""
    if path.suffix == ".safetensors":
        return True
    with open(path, "rb") as file:
        head = file.read(10)
    return head[8:] == b'{"' and not head.startswith(b"PK")


def _load_tensors(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _wrapped(content: dict[Any, Any]) -> dict[Any, Any] | None:
    """The dictionary inside a training checkpoint."""
    return next((content[name] for name in _WRAPPERS if isinstance(content.get(name), dict)), None)


def _reason(error: Exception) -> str:
    text = str(error).strip()
    if found := re.search(r"GLOBAL ([\w.]+)", text):
        return (
            f"it holds a Python object ({found[1]}), and reading those can run code: "
            "save its tensors as .safetensors where you trust it"
        )
    # Of what is no pickle at all torch says how to load it in a way that could run code, or how its parser stumbled.
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
}
"""Where the public weights that recipes name are published, by file name."""


def check_published(source: Path, field: str) -> None:
    """Refuse a public weights file that is not there yet, saying where to get it.

    Raises:
        UserError: `source` is one of `PUBLISHED` and does not exist.
    """
    if source.name in PUBLISHED and not source.exists():
        raise UserError(
            f"{field}: {source} is not there: {source.name} is published at {PUBLISHED[source.name]}: put it there, or "
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
    say: Say = _logger.warning,
) -> None:
    """Load starting weights into one encoder, in place and completely. Ranks need not call this together.

    Args:
        encoder: What `build_encoder` made.
        modality: Which encoder of a run to take. A run of one other modality gives its only encoder.
        source: Run folder, its weights.safetensors, a published checkpoint of the encoder's architecture
            (.safetensors, .pth or .pt; see the encoder's `from_published`), or the URL of such a file.
        ignore: Glob patterns of the encoder's keys that need not fit: see `load_exactly`.
        sha256: What the file must hash to.
        cache_dir: As `DataRecipe.cache_dir`.
        report: Progress of a download.
        say: Told what did not carry over.

    Raises:
        UserError: nothing there, nothing that fits, another sha256, or keys and shapes that are not the encoder's.
    """
    shown, moved = masked(source), ""
    state = _download(source, sha256, cache_dir, report) if is_url(source) else _read(Path(source), sha256)
    if any(key.startswith("encoders.") for key in state):
        state = _encoder_of_run(state, modality, shown)
    elif not set(state) <= (own := set(encoder.state_dict())):
        moved = encoder.moved_rows(state)
        try:
            state = encoder.from_published(state)
        except UserError as error:
            if own.isdisjoint(state):
                raise UserError(f"{shown}: {error}") from None
    load_exactly(encoder, state, f"{shown} (for the {modality} encoder)", ignore, say)
    if moved:
        say(f"{shown}: {moved}")


def _read(source: Path, sha256: str | None) -> dict[str, Tensor]:
    path = any_weights(source)
    if wrong := _other_sha256(path, sha256):
        raise UserError(f"{path}: {wrong}: correct one of the two")
    return read_weights(path)


def _download(url: str, sha256: str | None, cache_dir: str | None, report: Report) -> dict[str, Tensor]:
    """The weights at a URL; of the processes of a node that ask, one downloads and the others wait for it."""
    cache, content = Cache(cache_root(cache_dir) / "weights"), Content(sha256, None, url)
    if sha256:
        cache.remove_if_damaged(content)
    try:
        os.close(cache.open(content, partial(_fetch, url, sha256, report, cache)))
    except FetchError as error:
        advice = "" if error.damaged else ": check URL, network and password, or name a file that you downloaded"
        raise UserError(f"{masked(url)}: {error.what}{advice}") from None
    try:
        return read_weights(cache.root / content.name, masked(url))
    except UserError as error:
        cache.remove(content)
        raise UserError(f"{error} (removed from the cache)") from None


def _fetch(url: str, sha256: str | None, report: Report, cache: Cache, path: Path) -> None:
    """Download and check. A wrong hash is most likely the recipe's, so it is not tried again."""
    name = Path(urlsplit(url).path).name
    _logger.warning("%s: downloading into %s", masked(url), cache.root)

    def moved(done: int, total: int) -> None:
        report(f"download {name}", done // 10**6, total // 10**6, "MB")

    fetch(url, Content(None, None, url), path, moved)
    if wrong := _other_sha256(path, sha256):
        raise FetchError(f"{wrong}: removed; correct the URL or the hash", damaged=True)


def _other_sha256(path: Path, expected: str | None) -> str:
    found = sha256_of(path) if expected else None
    return "" if found == expected else f"its sha256 is {found}, weights_sha256 says {expected}"


def _encoder_of_run(state: dict[str, Tensor], modality: str, source: str) -> dict[str, Tensor]:
    found = sorted({key.split(".")[1] for key in state if key.startswith("encoders.")})
    chosen = found[0] if len(found) == 1 else modality
    if chosen not in found:
        raise UserError(f"{source}: holds encoders for {', '.join(found)}, none for {modality}")
    prefix = f"encoders.{chosen}."
    return {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
