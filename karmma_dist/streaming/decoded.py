"""Clips decoded once and kept in memory, for datasets that fit: everything a view may ask for, before it is chosen.

What is kept of a clip: what its modalities' decoders make of whole members (all frames, resized to `short_side` and
not yet cropped; all samples; all boxes), and its metadata. Views cut from these are bit for bit those of a fresh
decode. The first pass decodes whole clips where it would decode the frames of one view alone, so a clip that is damaged
anywhere is damaged then.

Every decoding process keeps its own: with W workers a clip is decoded up to W times and takes W times the memory.
"""

from __future__ import annotations

import numpy as np

from karmma_dist.shards.format import Clip, ClipMetadata


class DecodedClips:
    """Arrays by clip and modality, up to a number of bytes; what no longer fits is not kept, and nothing is evicted.

    A pass over a split visits every clip once, so whatever were evicted would be missed before what took its place.

    Args:
        max_bytes: Size of all arrays together; 0: nothing is kept.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._is_full = max_bytes == 0
        self._arrays: dict[tuple[str, str, str], np.ndarray] = {}
        self._metadata: dict[tuple[str, str], ClipMetadata] = {}

    @property
    def takes_more(self) -> bool:
        """True if the next clip should be decoded whole, to be kept."""
        return not self._is_full

    def get(self, clip: Clip, modality: str) -> np.ndarray | None:
        """Return what `keep` was given for a clip's modality, or None."""
        return self._arrays.get((clip.shard, clip.key, modality))

    def keep(self, clip: Clip, modality: str, whole: np.ndarray) -> None:
        """Keep an array if it fits; the first that does not is the last that is tried."""
        if self.num_bytes + whole.nbytes > self.max_bytes:
            self._is_full = True
            return
        self.num_bytes += whole.nbytes
        self._arrays[clip.shard, clip.key, modality] = whole

    def metadata(self, clip: Clip) -> ClipMetadata | None:
        """Return a clip's metadata, or None where it was not kept."""
        return self._metadata.get((clip.shard, clip.key))

    def keep_metadata(self, clip: Clip, metadata: ClipMetadata) -> None:
        """Keep a clip's metadata as long as clips are kept; it is small beside them and not counted."""
        if not self._is_full:
            self._metadata[clip.shard, clip.key] = metadata
