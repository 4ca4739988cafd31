"""The contract of a modality: what its folder has to say, so that nothing else need know its name.

    Modality        name, letter, member, settings, and the parts below, each loaded when it is first asked for
      Description   the entry of a stored member in KEY.json
      Storage       raw media -> bytes and descriptions (`storage.py`)
      Decoder       bytes -> arrays of the views that are asked for (no torch), and the check of stored bytes
      TensorMaker   arrays of a batch -> the tensor that encoders take, on the device
      Drawing       a cell of a contact sheet

A part is named as `module:attribute`, so that listing modalities imports neither PyAV, Matplotlib nor torch.
"""

from __future__ import annotations

import dataclasses
import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar, cast

from karmma_dist.settings import Settings

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from torch import Tensor

    from karmma_dist.modalities.storage import Storage


Part = TypeVar("Part")

_TYPES: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "str": (str,)}
"""Values that a field of a description takes, by its annotation."""


class DecodeError(Exception):
    """Bytes of a member are not what their description says, or cannot be decoded."""


class StoredError(Exception):
    """A check of stored bytes failed: `kind` is that of the finding (`length`, `decode`)."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class View:
    """How one clip is looked at. Modalities share it, so that a frame, its flow and its sound belong together."""

    times_F: np.ndarray
    """Moments of the frames, as fractions of the clip in [0, 1)."""
    top: float
    """In [0, 1): the crop's upper edge among the places there are, each of the same chance."""
    left: float
    """The crop's left edge, likewise."""
    flip: bool
    """True if mirrored horizontally."""
    jitter_3: np.ndarray
    """Factors of brightness, contrast, saturation; float32."""


@dataclass(frozen=True)
class Pictures:
    """The pictures of a member that is seen."""

    num_frames: int
    width: int
    """Pixels."""
    height: int
    fps: float

    @property
    def length_s(self) -> float:
        """Seconds from the first to the end of the last."""
        return float(self.num_frames / self.fps)


@dataclass(frozen=True)
class Description:
    """The entry of a stored member in KEY.json, without its bytes and crc32. Fields are of type int, float or str."""

    @property
    def length_s(self) -> float | None:
        """Seconds that are stored; None where nothing tells."""
        return None

    @property
    def pictures(self) -> Pictures | None:
        """The pictures, where the member has any."""
        return None

    def problem_beside(self, others: Mapping[str, Description]) -> str:
        """Return what of the entry cannot be true beside the clip's other members, or an empty string.

        Args:
            others: Entries of all present members, by modality.
        """
        return ""

    @classmethod
    def parse(cls, declared: Mapping[str, Any]) -> Self:
        """Read the fields of an entry; others are left alone.

        Raises:
            ValueError: one is missing, of another type, or a number that is not positive.
        """
        values = {}
        for field in dataclasses.fields(cls):
            value = declared.get(field.name)
            if isinstance(value, bool) or not isinstance(value, _TYPES[str(field.type)]):
                raise ValueError(f"{field.name} is {value!r}, not of type {field.type}")
            if not isinstance(value, str) and not value > field.metadata.get("above", 0):
                raise ValueError(f"{field.name} is {value!r}, too small")
            values[field.name] = value
        return cls(**values)


class Decoder(ABC):
    """From the bytes of a member to arrays. Everything raises `DecodeError` on bytes that it cannot decode."""

    always_whole: ClassVar[bool] = False
    """True if a member is always decoded whole, because views cut from the whole at no cost."""

    @abstractmethod
    def decode(self, data: bytes, description: Any, settings: Any) -> np.ndarray:
        """Decode everything that a view may ask for, to be kept and cut by `cut`.

        Args:
            data: The member.
            description: Its entry, of the modality's `Description`.
            settings: The modality's section of the recipe's `inputs`.
        """

    @abstractmethod
    def cut(
        self, decoded: np.ndarray, description: Any, settings: Any, views: Sequence[View], length_s: float
    ) -> np.ndarray:
        """Return the arrays of some views (V, ...), cut from what `decode` made.

        Args:
            decoded: From `decode`; not to be changed.
            description: The member's entry.
            settings: The modality's section of the recipe's `inputs`.
            views: V of them.
            length_s: Seconds that the views' times are fractions of.
        """

    def decode_views(
        self, data: bytes, description: Any, settings: Any, views: Sequence[View], length_s: float
    ) -> np.ndarray:
        """Return what `cut` would, bit for bit, decoding no more than the views ask for."""
        return self.cut(self.decode(data, description, settings), description, settings, views, length_s)

    @abstractmethod
    def num_bytes(self, settings: Any) -> int:
        """Return the bytes of one view's array."""

    @abstractmethod
    def check(self, data: bytes, description: Any) -> None:
        """Look whether stored bytes decode to what is declared, for `verify --full`.

        Raises:
            StoredError: they do not.
            DecodeError: they cannot be read.
        """


class TensorMaker(ABC):
    """From the arrays of a batch to the tensor that encoders take."""

    @abstractmethod
    def shape(self, settings: Any) -> tuple[int, ...]:
        """Return the shape of one clip's tensor, without the batch dimension."""

    @abstractmethod
    def make(self, arrays_N: Tensor, settings: Any, jitter_N3: Tensor | None) -> Tensor:
        """Return float32 (N, *shape) on the device of `arrays_N`.

        Args:
            arrays_N: What the decoder gave of N clips, stacked; may not be changed.
            settings: The modality's section of the recipe's `inputs`.
            jitter_N3: The views' jitter, for a modality whose `is_jittered` is True.
        """


class Sheet(ABC):
    """What a drawing may ask about its clip beyond its own member."""

    @abstractmethod
    def pictures(self, places: Callable[[int], Sequence[int]]) -> list[np.ndarray] | None:
        """Return the clip's pictures at some places, uint8 RGB (H, W, 3), or None where nothing of it is seen.

        Args:
            places: Gives the places among a number of frames.
        """

    @abstractmethod
    def clock(self) -> Pictures | None:
        """Return the pictures that the clip's times are counted by, where there are any."""


class Drawing(ABC):
    """A column of contact sheets."""

    @property
    @abstractmethod
    def title(self) -> str:
        """Heading of the column."""

    @abstractmethod
    def draw(self, axis: Axes, data: bytes, description: Any, sheet: Sheet) -> None:
        """Draw a member into a cell.

        Raises:
            DecodeError: it cannot be decoded.
        """

    def draw_legend(self, axis: Axes) -> None:  # noqa: B027 - most columns need none
        """Draw what the column's colours mean, beside its title."""

    def pictures(self, data: bytes, places: Callable[[int], Sequence[int]]) -> list[np.ndarray] | None:
        """Return pictures for others to draw on, uint8 RGB; None where the modality shows no scene."""
        return None


@dataclass(frozen=True)
class Breakage:
    """One way in which a sensor breaks, `SENSOR:KIND` on the command line, and what it does to this modality."""

    sensor: str
    """The modality's name, or that of a sensor behind several modalities, such as `camera`."""
    kind: str
    effect: str
    """What happens to the signal, by the breaker's name for it."""
    amounts: tuple[float, ...]
    """Per severity, from slight to severe; what a smaller one spoils, a larger one spoils too or more so."""
    meaning: str
    """What an amount is, as a format of it."""
    is_random: bool
    """True if the outcome depends on the seed."""


class Breaker(ABC):  # noqa: B024 - the base of the two kinds below
    """Breaks signals on purpose, before anything is computed from them; presence never changes.

    What is random follows from (seed, clip key) alone, and not from the severity.
    """


class ArraysBreaker(Breaker):
    """Breaks the arrays of the views."""

    @abstractmethod
    def break_arrays(self, effect: str, amount: float, arrays_N: Tensor, keys: Sequence[str], seed: int) -> Tensor:
        """Break what the decoder gave of N clips, on any device; the given tensor is kept."""


class SignalBreaker(Breaker):
    """Breaks whole signals, from which the views are cut again."""

    @abstractmethod
    def break_uncut(self, effect: str, amount: float, decoded: np.ndarray, key: str, seed: int) -> np.ndarray:
        """Break all that was decoded of one clip; the given array is kept."""


@dataclass(frozen=True)
class Modality:
    """One kind of sensor signal, and the parts that deal with it."""

    name: str
    """Name in recipes, manifests and batches."""
    letter: str
    """Letter on the command line and in tables (`--modalities V,F`)."""
    member: str
    """Suffix of the clip's member in the tar: `KEY.<member>`."""
    array: str
    """Kind of array that a model receives, by which encoders say what they take. Ours, with the fields of the section
    that encoders read: `frames` (3, num_frames, crop, crop), `spectrograms` (num_windows, num_mels, num_steps), `boxes`
    (num_frames, max_boxes, 6); another kind is for encoders of its own package."""
    layout: str
    """Axes of that array for N present clips, and what its values are."""
    settings: type[Settings]
    """Its section of the recipe's `inputs`."""
    section: str
    """Name of that section; modalities that share it are looked at alike."""
    description: type[Description]
    """Entry of a stored member in KEY.json."""
    storage_part: str
    """`module:attribute` of the storage."""
    decoder_part: str
    """`module:attribute` of the decoder."""
    tensors_part: str
    """`module:attribute` of the tensor maker."""
    drawing_part: str
    """`module:attribute` of the drawing."""
    breaker_part: str
    """`module:attribute` of the breaker."""
    breakages: tuple[Breakage, ...]
    """Ways in which its sensor breaks."""
    fills_clip: bool = False
    """True if what is stored lasts as long as its clip; else it may end with its recording."""
    is_jittered: bool = False
    """True if tensors take the view's jitter."""

    @cached_property
    def storage(self) -> Storage:
        """Part that packs."""
        from karmma_dist.modalities.storage import Storage

        return self._part("storage", self.storage_part, Storage)

    @cached_property
    def decoder(self) -> Decoder:
        """Part that decodes."""
        return self._part("decoder", self.decoder_part, Decoder)

    @cached_property
    def tensors(self) -> TensorMaker:
        """Part that makes tensors; loads torch."""
        return self._part("tensors", self.tensors_part, TensorMaker)

    @cached_property
    def drawing(self) -> Drawing:
        """Part that draws; loads Matplotlib."""
        return self._part("drawing", self.drawing_part, Drawing)

    @cached_property
    def breaker(self) -> Breaker:
        """Part that breaks the signal on purpose; loads torch."""
        return self._part("breaker", self.breaker_part, Breaker)

    def _part(self, name: str, place: str, kind: Callable[..., Part]) -> Part:
        assert isinstance(kind, type)
        module_name, _, attribute = place.partition(":")
        part = getattr(importlib.import_module(module_name), attribute, None)
        if not isinstance(part, kind):
            raise TypeError(
                f"modality '{self.name}': its part '{name}' is missing: {place} is {type(part).__name__}, "
                f"not a {kind.__name__} ({kind.__module__})"
            )
        return cast(Part, part)
