"""A media file as the very shard clip that packing would make of it: same region, size, frame rate, flow and sound."""

from __future__ import annotations

import csv
import logging
import math
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av

from karmma_dist.errors import UserError
from karmma_dist.modalities import MODALITIES
from karmma_dist.modalities.recording import MediaError
from karmma_dist.modalities.storage import MediaStream, Storage
from karmma_dist.modalities.video_file import VideoFile
from karmma_dist.packing.pack import pack
from karmma_dist.packing.spec import PackingSpec
from karmma_dist.shards.folder import ShardFolder

SPLIT, KEY = "clip", "clip"
"""Split and key of the only clip in the folder."""

LONG_S = 30.0
"""A model sees a fixed number of frames: of a longer clip it sees too little of any one action."""

_logger = logging.getLogger(__name__)


@contextmanager
def packed_media(
    path: Path,
    settings: Mapping[str, Any],
    modalities: Sequence[str],
    start_s: float = 0.0,
    stop_s: float | None = None,
) -> Iterator[ShardFolder]:
    """Pack one file into a temporary shards folder of one clip, gone with the block.

    Args:
        path: Video, with or without sound, or sound alone.
        settings: Those of the manifest whose shards it is to be like.
        modalities: What the model is to be given.
        start_s: Where the clip starts in the file.
        stop_s: Where it ends; None: at the file's end.

    Raises:
        UserError: no such file, not a media file, nothing in it for the model, damage, or an empty span.
    """
    for option, at_s in (("start", start_s), ("stop", stop_s)):
        if at_s is not None and not math.isfinite(at_s):
            raise UserError(f"{path}: {option} {at_s:g} is not a number of seconds")
    if stop_s is not None and stop_s <= start_s:
        raise UserError(f"{path}: stop {stop_s:g} s is not after start {start_s:g} s")
    _check_media(path, modalities, start_s, stop_s)
    with tempfile.TemporaryDirectory(prefix="karmma-dist-") as name:
        raw = Path(name) / "raw"
        raw.mkdir()
        media = f"media{path.suffix}"
        (raw / media).symlink_to(path.resolve())
        with open(raw / "clip.csv", "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["key", "media", "start", "stop"])
            writer.writerow([KEY, media, repr(start_s), "" if stop_s is None else repr(stop_s)])
        summary = pack(_spec(settings, modalities, raw, Path(name) / "shards"))
        if summary.failures:
            failure = summary.failures[0]
            raise UserError(f"{path}: {failure.modality}: {failure.error.replace(media, path.name)}")
        yield ShardFolder(Path(name) / "shards")


def _spec(settings: Mapping[str, Any], modalities: Sequence[str], raw: Path, out: Path) -> PackingSpec:
    sections = {
        name: {**settings.get(name, {}), "source": storage.media_source}
        if name in modalities or storage.has_clip_length
        else {"source": "none"}
        for name, storage in _from_media().items()
    }
    return PackingSpec.model_validate(
        {
            "reader": "plain",
            "dataset": "one file",
            "raw": str(raw),
            "out": str(out),
            **sections,
            "plain": {"splits": {SPLIT: "clip.csv"}, "unlabelled_splits": [SPLIT]},
        }
    )


def _from_media() -> dict[str, Storage]:
    """Return the storage of every modality that is made of a media file alone."""
    storages = {name: modality.storage for name, modality in MODALITIES.items()}
    return {name: storage for name, storage in storages.items() if storage.media_stream is not None}


def check_file(path: Path) -> None:
    """Check that a file exists and is not an archive, which FFmpeg would take for a video.

    Raises:
        UserError: the path is missing, a folder or an archive.
    """
    if path.is_dir():
        raise UserError(f"{path}: is a folder: name a video file in it, or a clip's key")
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if tarfile.is_tarfile(path):
        raise UserError(f"{path}: is a tar archive: name a video file, or a clip's key in the shards")


def _check_media(path: Path, modalities: Sequence[str], start_s: float, stop_s: float | None) -> None:
    check_file(path)
    level = av.logging.get_level()
    av.logging.set_level(av.logging.PANIC)
    try:
        with VideoFile(path) as movie:
            found = {MediaStream.PICTURES: movie.video is not None, MediaStream.SOUND: movie.has_audio}
            streams = [stream for stream, is_there in found.items() if is_there]
            if not streams:
                raise UserError(f"{path}: neither video nor sound in it")
            usable = [name for name, storage in _from_media().items() if storage.media_stream in streams]
            if not set(usable) & set(modalities):
                has = " and ".join(stream.value for stream in streams)
                raise UserError(f"{path}: it has {has}, but the model is to be given {', '.join(modalities)}")
            duration_s = movie.duration_s
    except MediaError as error:
        raise UserError(f"{path}: not a video file, or one that is damaged ({error.error})") from None
    finally:
        av.logging.set_level(level)
    end_s = stop_s if duration_s is None else min(stop_s or duration_s, duration_s)
    if end_s is not None and end_s - start_s > LONG_S:
        _logger.warning(
            "%s: %.0f s long: the model sees a few frames of it, meant for one action of seconds: "
            "name a part with --start and --stop", path, end_s - start_s,
        )  # fmt: skip
