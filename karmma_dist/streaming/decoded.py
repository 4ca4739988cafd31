"""A cache of decoded clips in memory, for datasets that fit: whole signals, from which any view can be cut.

The cache holds a clip's whole decoded members (all frames, resized to `short_side` and not yet cropped; all samples;
all boxes) and its metadata. Views cut from them are bit for bit those of a fresh decode. The first pass decodes whole
clips instead of the frames of one view, so damage anywhere in a clip shows up in that pass.

Every decoding process has its own cache: with W workers a clip is decoded up to W times and takes W times the memory.
"""

from __future__ import annotations

import numpy as np

from karmma_dist.shards.format import Clip, ClipMetadata


class DecodedClips:
    """Arrays by clip and modality, up to a number of bytes. Arrays that do not fit are not kept; none is evicted.

    A pass over a split visits every clip once, so an evicted clip would be needed before the clip that replaced it.

    Args:
        max_bytes: Largest size of all arrays together; 0 keeps none.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._is_full = max_bytes == 0
        self._arrays: dict[tuple[str, str, str], np.ndarray] = {}
        self._metadata: dict[tuple[str, str], ClipMetadata] = {}

    @property
    def takes_more(self) -> bool:
        """True if the next clip should be decoded as a whole and kept."""
        return not self._is_full

    def get(self, clip: Clip, modality: str) -> np.ndarray | None:
        """Return the kept array of a clip's modality, or None."""
        return self._arrays.get((clip.shard, clip.key, modality))

    def keep(self, clip: Clip, modality: str, whole: np.ndarray) -> None:
        """Keep an array if it fits; after the first that does not fit, no further array is kept."""
        key = (clip.shard, clip.key, modality)
        if key in self._arrays:  # another thread has decoded it as well
            return
        if self.num_bytes + whole.nbytes > self.max_bytes:
            self._is_full = True
            return
        self.num_bytes += whole.nbytes
        self._arrays[key] = whole

    def metadata(self, clip: Clip) -> ClipMetadata | None:
        """Return a clip's kept metadata, or None."""
        return self._metadata.get((clip.shard, clip.key))

    def keep_metadata(self, clip: Clip, metadata: ClipMetadata) -> None:
        """Keep a clip's metadata while the cache takes more clips; it is small and not counted."""
        if not self._is_full:
            self._metadata[clip.shard, clip.key] = metadata
