"""The sections of a recipe that say which clips a model sees, and how: `data` and `inputs`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ByteSize, ConfigDict, Field, model_validator

from karmma_dist.modalities import MODALITIES
from karmma_dist.modalities.audio import AudioInput
from karmma_dist.modalities.detections import DetectionsInput
from karmma_dist.modalities.video import VideoInput
from karmma_dist.recipe.fields import NOT_LEARNED, SHARED, Probability
from karmma_dist.settings import Positive, Settings, check_other_sections


class InputRecipe(Settings):
    """What each modality's tensor looks like. Teacher and student of a distillation share it.

    Modalities of other packages have sections of their own, checked by their `settings`.
    """

    model_config = ConfigDict(extra="allow")

    video: VideoInput = VideoInput()
    """Video and flow: same frames, same crop."""
    audio: AudioInput = AudioInput()
    """Sound."""
    detections: DetectionsInput = DetectionsInput()
    """Boxes."""

    @model_validator(mode="after")
    def _other_sections(self) -> InputRecipe:
        check_other_sections(self, {m.section: m.settings for m in MODALITIES.values()}, "inputs.")
        return self

    def section(self, modality: str) -> Any:
        """Return the settings of a modality."""
        kind = MODALITIES[modality]
        found = getattr(self, kind.section, None)
        return kind.settings() if found is None else found



class ModalityDropout(Settings):
    """Training-time modality dropout: decided once per clip, before decoding, for teacher and student alike."""

    probability: Probability = 0.0
    """Probability that a modality is dropped; at least one that the clip has is kept [paper: 0.5]."""
    draw: Literal["independent", "stratified"] = "stratified"
    """`independent`: each clip on its own [paper]. `stratified`: every run of 2^M positions holds each pattern in
    proportion to its probability, shuffled: the same distribution per clip, no rank slower than others [ours]."""



class OrderRecipe(Settings):
    """Which clips meet in a batch: any of the split, or, where whole shards are fetched, those of a few shards.

    Leave both at 0 where shards lie on a file system, or where every node's cache holds the whole split. On an object
    store take the number of nodes (or a multiple) as `lanes`, so that a node fetches only its own part of the shards,
    each once per epoch, and the `window` that the cache allows: a node holds at most 2 x window shards per lane. Mixing
    goes by lanes x window, the shards a batch is drawn from: two clips that shared a batch share one again in the next
    epoch as often as in a random order from 64 shards, 1.25 to 1.5 times from 16, 8 times from 4 (512 clips each).
    """

    lanes: Annotated[int, Field(ge=0)] = 0
    """Equal parts of every batch, each with shards of its own; must divide training.batch_size. 0: one permutation of
    all clips [ours]."""
    window: Annotated[int, Field(ge=0)] = 0
    """Shards of a lane whose clips are mixed with each other. Needs lanes [ours]."""

    @model_validator(mode="after")
    def _both_or_neither(self) -> OrderRecipe:
        if (self.lanes == 0) != (self.window == 0):
            raise ValueError(f"lanes {self.lanes} with window {self.window}: set both, or leave both at 0")
        return self



class DataRecipe(Settings):
    """Which clips, in which form."""

    shards: Annotated[str, SHARED]
    """Folder of packed shards, or the URL of one: https://..., s3://..., or another that fsspec opens."""
    cache_dir: Annotated[str | None, NOT_LEARNED, SHARED] = None
    """Folder on this node that shards from a URL are kept in; None: $KARMMA_DIST_CACHE or ~/.cache/karmma-dist."""
    cache_bytes: Annotated[ByteSize, Field(gt=0), NOT_LEARNED, SHARED] = ByteSize(200_000_000_000)
    """Size the cache stays below: bytes, or a string such as "200 GB". The least recently used shards go first."""
    keep_decoded: Annotated[ByteSize, NOT_LEARNED] = ByteSize(0)
    """Bytes of decoded clips (frames at short_side, sound, boxes) that each decoding process may keep in memory, or a
    string such as "2 GB": a dataset that fits is decoded once, and batches stay the same bit for bit. 0: none."""
    train_split: str = "train"
    """Split to learn from."""
    hold_out: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Fraction of the training recordings not learned from, drawn by a hash of the recording, the same in every run:
    clips of one recording stay together. What experts are weighed on (distill.expert_weights)."""
    validation_split: str = "validation"
    """Split to validate on during training. The training split: the clips that hold_out holds out of it."""
    test_split: Annotated[str | None, NOT_LEARNED] = None
    """Split that `karmma-dist eval` takes by default; None: the validation split."""
    modalities: list[str] = ["video", "flow", "audio"]
    """Modalities the model uses, of those the shards declare."""
    heads: Annotated[dict[str, Positive], NOT_LEARNED] = {}
    """Number of classes per head, e.g. {verb: 97, noun: 300}: what `profile` goes by before there are shards. Training
    refuses shards of other classes. Empty: whatever the shards have."""
    modality_dropout: ModalityDropout = ModalityDropout()
    """Training-time modality dropout."""
    order: OrderRecipe = OrderRecipe()
    """How clips are mixed."""
    num_workers: Annotated[int, Field(ge=0), NOT_LEARNED, SHARED] = 1
    """Decoding processes per rank."""
    stall_s: Annotated[float, Field(ge=0), NOT_LEARNED] = 120
    """Seconds without a batch after which the run ends and says what the decoding process is at; 0: it waits for ever.
    Needs num_workers of 1 or more."""
    max_damaged_fraction: Annotated[Probability, NOT_LEARNED] = 0.001
    """Damaged clips tolerated, as a fraction of the split, before the run ends with a list."""
    drop_nouns: list[int] = []
    """Validation clips of these noun classes are left out: Epic-Kitchens nouns that never occur in training [paper]."""

    @model_validator(mode="after")
    def _known_modalities(self) -> DataRecipe:
        unknown = [m for m in self.modalities if m not in MODALITIES]
        if unknown:
            raise ValueError(f"unknown modality '{unknown[0]}'; there are {', '.join(MODALITIES)}")
        if not self.modalities:
            raise ValueError("modalities is empty: name at least one")
        order = [m for m in MODALITIES if m in self.modalities]
        if order != self.modalities:
            raise ValueError(f"modalities must be listed once each and in this order: {', '.join(order)}")
        return self
