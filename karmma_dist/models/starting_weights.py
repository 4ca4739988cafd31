"""Starting weights of one encoder: from a run, a published checkpoint, or the URL of either.

A URL is downloaded once per node into CACHE/weights (see `karmma_dist.cache`) and stays there: name its
`weights_sha256` where the file behind a URL may change.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from torch import Tensor

from karmma_dist.cache import Cache, Content, FetchError, cache_root
from karmma_dist.download import fetch, is_url, masked
from karmma_dist.errors import UserError
from karmma_dist.models.encoder import Encoder
from karmma_dist.models.weight_files import Say, any_weights, load_exactly, read_weights
from karmma_dist.progress import Report, silent
from karmma_dist.shards import sha256_of

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
