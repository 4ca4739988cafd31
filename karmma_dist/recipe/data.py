"""The recipe sections that define the clips and their form: `data` and `inputs`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import ByteSize, ConfigDict, Field, model_validator

from karmma_dist.errors import quoted
from karmma_dist.modalities import MODALITIES
from karmma_dist.modalities.audio import AudioInput
from karmma_dist.modalities.detections import DetectionsInput
from karmma_dist.modalities.video import VideoInput
from karmma_dist.recipe.fields import NOT_LEARNED, SHARED, Probability
from karmma_dist.settings import PathText, Positive, Seconds, Settings, check_other_sections, validate


class InputRecipe(Settings):
    """Settings of each modality's input tensor. The teacher and the student of a distillation share them.

    Modalities that are no field here have their own sections, checked by their `settings`.
    """

    model_config = ConfigDict(extra="allow")

    video: VideoInput = VideoInput()
    """Video and flow, which share frames and crop."""
    audio: AudioInput = AudioInput()
    """Audio."""
    detections: DetectionsInput = DetectionsInput()
    """Object boxes."""

    @model_validator(mode="after")
    def _other_sections(self) -> InputRecipe:
        check_other_sections(self, {m.section: m.settings for m in MODALITIES.values()}, "inputs.")
        return self

    def section(self, modality: str) -> Any:
        """Return the settings of a modality."""
        entry = MODALITIES[modality]
        section = getattr(self, entry.section, None)
        return entry.settings() if section is None else section

    def completed(self, modalities: Sequence[str]) -> InputRecipe:
        """Return the settings with the sections of all these modalities, also of those that are no field here."""
        sections = {MODALITIES[name].section: self.section(name) for name in modalities}
        missing = {name: section for name, section in sections.items() if getattr(self, name, None) is None}
        return self.model_copy(update=missing) if missing else self



class ModalityDropout(Settings):
    """Training-time modality dropout, drawn once per clip, before decoding, for both teacher and student."""

    probability: Probability = 0.0
    """Probability of dropping a modality; at least one modality of each clip is kept [paper: 0.5]."""
    draw: Literal["independent", "stratified"] = "stratified"
    """`independent`: drawn independently for each clip [paper]. `stratified`: every 2^M consecutive positions contain
    each pattern in proportion to its probability, shuffled; the distribution per clip is the same, and no rank is
    slower than others [ours]."""



class OrderRecipe(Settings):
    """Order of the training clips: batches mix the clips of the entire split, or only those of a few shards.

    Leave both at 0 if the shards are on a file system, or if every node's cache holds the entire split. On an object
    store, set `lanes` to the number of nodes (or a multiple), so that a node fetches only its own part of the shards,
    each once per epoch, and set `window` as large as the cache allows: a node holds at most 2 x window shards per lane.
    A batch is drawn from lanes x window shards, which determines how well clips are mixed. From 64 shards of 512 clips,
    two clips of a batch share a batch again in the next epoch as often as in a random order; from 16 shards, 1.25 to
    1.5 times as often; from 4 shards, 8 times as often.
    """

    lanes: Annotated[int, Field(ge=0)] = 0
    """Number of equal parts of a batch, each drawn from its own shards; must divide training.batch_size. 0: one
    permutation of all clips [ours]."""
    window: Annotated[int, Field(ge=0)] = 0
    """Number of shards of a lane whose clips are mixed. Requires lanes [ours]."""

    @model_validator(mode="after")
    def _both_or_neither(self) -> OrderRecipe:
        if (self.lanes == 0) != (self.window == 0):
            raise ValueError(f"lanes {self.lanes} with window {self.window}: set both, or leave both at 0")
        return self



_DATASET = re.compile(r"[a-z0-9_][a-z0-9_-]{0,31}")
_HEAD = re.compile(r"[A-Za-z0-9_-]{1,100}")


class MixtureDataset(Settings):
    """One of the datasets that a run is trained on together."""

    shards: Annotated[PathText, SHARED]
    """Folder of packed shards, or its URL, as `data.shards`."""
    weight: Annotated[float, Field(gt=0)]
    """Share of the training clips that come from this dataset, relative to the weights of the others: of weights 3 and
    1, three quarters and one quarter of every epoch, and of every batch but for a clip or two."""
    train_split: str | None = None
    """Split to train on; None: data.train_split."""
    validation_split: str | None = None
    """Split to validate on during training; None: data.validation_split."""
    heads: dict[str, str] = {}
    """Other names for heads, e.g. {action: ssv2_action}: heads of two datasets with the same name are one head of the
    model, and must have the same classes."""

    @model_validator(mode="after")
    def _names_of_heads(self) -> MixtureDataset:
        wrong = next((name for name in self.heads.values() if not _HEAD.fullmatch(name)), None)
        if wrong is not None:
            raise ValueError(f"heads: {quoted(wrong)} is no name of a head: take letters, digits, '_' and '-'")
        twice = next((name for name in self.heads.values() if list(self.heads.values()).count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"heads: two heads cannot both be called '{twice}'")
        return self


class DataRecipe(Settings):
    """Clips, their modalities, and their loading."""

    shards: Annotated[PathText | None, SHARED] = None
    """Folder of packed shards, or its URL: https://..., s3://..., or any other that fsspec opens. None: those of
    `mixture`."""
    mixture: dict[str, MixtureDataset] = {}
    """Several datasets to train on together, by name, instead of `shards`; their order has no effect. Every dataset has
    a fixed share of each epoch, which has as many clips as all datasets together, and comes once through before any of
    its clips comes again. A clip trains the heads that its dataset has [ours]."""
    cache_dir: Annotated[PathText | None, NOT_LEARNED, SHARED] = None
    """Folder on each node that caches shards from a URL; None: $KARMMA_DIST_CACHE or ~/.cache/karmma-dist."""
    cache_bytes: Annotated[ByteSize, Field(gt=0), NOT_LEARNED, SHARED] = ByteSize(200_000_000_000)
    """Maximum size of the cache: bytes, or a string such as "200 GB". The least recently used shards are removed
    first."""
    keep_decoded: Annotated[ByteSize, NOT_LEARNED] = ByteSize(0)
    """Memory in which each decoding process may keep decoded clips (frames at short_side, audio, boxes): bytes, or a
    string such as "2 GB". A dataset that fits is decoded only once; batches are identical, bit for bit. 0: none."""
    train_split: str = "train"
    """Split to train on."""
    hold_out: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Fraction of the training recordings that are excluded from training, selected by a hash of the recording and thus
    equal in every run; clips of one recording stay together. Experts are weighted by their loss on these clips
    (distill.expert_weights)."""
    validation_split: str = "validation"
    """Split to validate on during training. If it is the training split: the clips excluded by hold_out."""
    test_split: Annotated[str | None, NOT_LEARNED] = None
    """Default split of `karmma-dist eval`; None: the validation split."""
    modalities: list[str] = ["video", "flow", "audio"]
    """Modalities to load, out of those that the shards declare. All clips of a mixture's dataset lack the modalities
    that the dataset does not declare."""
    heads: Annotated[dict[str, Positive], NOT_LEARNED] = {}
    """Number of classes per head, e.g. {verb: 97, noun: 300}, for `profile` without shards. Training refuses shards
    with other numbers of classes. Empty: taken from the shards."""
    modality_dropout: ModalityDropout = ModalityDropout()
    """Training-time modality dropout."""
    order: OrderRecipe = OrderRecipe()
    """Order of the training clips."""
    num_workers: Annotated[int, Field(ge=0, le=1000), NOT_LEARNED, SHARED] = 1
    """Decoding processes per rank."""
    stall_s: Annotated[Seconds, NOT_LEARNED] = 120
    """Seconds without a batch after which the run ends and reports what the decoding process was doing; 0: no limit.
    Requires num_workers of 1 or more."""
    max_damaged_fraction: Annotated[Probability, NOT_LEARNED] = 0.001
    """Maximum fraction of damaged clips in the split; if it is exceeded, the run ends and lists them."""
    drop_nouns: list[int] = []
    """Noun classes whose clips are left out of validation: Epic-Kitchens nouns that never occur in training [paper]."""

    @property
    def locations(self) -> list[str]:
        """Folders and URLs of the shards: one, or those of the mixture."""
        return [dataset.shards for _, dataset in sorted(self.mixture.items())] or [str(self.shards)]

    def of_dataset(self, name: str) -> DataRecipe:
        """Return the data section for one dataset of the mixture alone. The heads have the names in its shards."""
        dataset = self.mixture[name]
        splits = {
            "train_split": dataset.train_split or self.train_split,
            "validation_split": dataset.validation_split or self.validation_split,
        }
        return self.model_copy(update={"shards": dataset.shards, "mixture": {}, **splits})

    @model_validator(mode="after")
    def _shards_or_mixture(self) -> DataRecipe:
        if self.shards is None and not self.mixture:
            raise ValueError("name a folder of packed shards in 'shards', or several datasets in 'mixture'")
        if self.shards is not None and self.mixture:
            raise ValueError(
                f"shards {quoted(self.shards)} and mixture exclude each other: set shards to null, or remove one"
            )
        wrong = next((name for name in self.mixture if not _DATASET.fullmatch(name)), None)
        if wrong is not None:
            raise ValueError(
                f"mixture: {quoted(wrong)} is no name of a dataset: take at most 32 lower-case letters, digits, '_' "
                "and '-', not '-' first"
            )
        if self.mixture and self.order.lanes:
            raise ValueError(
                f"order.lanes {self.order.lanes} is for the shards of one dataset, not for a mixture: set order.lanes "
                "and order.window to 0"
            )
        return self

    @model_validator(mode="after")
    def _known_modalities(self) -> DataRecipe:
        unknown = [m for m in self.modalities if m not in MODALITIES]
        if unknown:
            raise ValueError(f"unknown modality '{unknown[0]}'; known are {', '.join(MODALITIES)}")
        if not self.modalities:
            raise ValueError("modalities is empty: list at least one")
        order = [m for m in MODALITIES if m in self.modalities]
        if order != self.modalities:
            raise ValueError(f"modalities must be listed once each and in this order: {', '.join(order)}")
        return self


def data_of(shards: str, modalities: Sequence[str] | None = None) -> DataRecipe:
    """Return the data section for shards that a user names, with defaults for everything else.

    Args:
        shards: Folder or URL of the shards.
        modalities: Modalities to use; None: the default.

    Raises:
        UserError: no shards can have this name.
    """
    chosen = {} if modalities is None else {"modalities": list(modalities)}
    return validate({"shards": shards, **chosen}, DataRecipe, "shards")
