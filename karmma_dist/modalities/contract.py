"""The contract of a modality: the parts that its folder provides, so that no other code needs its name.

    Modality        name, letter, member, settings, and the parts below, each imported on first use
      Description   entry of a stored member in KEY.json
      Storage       raw media -> bytes and descriptions (`storage.py`)
      Decoder       bytes -> arrays of the requested views (no torch), and the check of stored bytes
      TensorMaker   arrays of a batch -> the tensor that encoders take, on the device
      Drawing       a cell of a contact sheet
      Breaker       arrays or whole signals -> the same, damaged on purpose

A part is named as `module:attribute`, so that listing modalities imports neither PyAV, Matplotlib nor torch.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar, cast

from karmma_dist.errors import UserError
from karmma_dist.settings import Settings

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from torch import Tensor

    from karmma_dist.modalities.storage import Storage


Part = TypeVar("Part")

_TYPES: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "str": (str,)}
"""Accepted types of a description's field, by its annotation."""


class DecodeError(Exception):
    """A member whose bytes contradict its description or cannot be decoded."""


class StoredError(Exception):
    """A failed check of stored bytes. `kind` is the kind of the problem: `length` or `decode`."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class View:
    """The sampled moments, crop and augmentation of one clip.

    All modalities share it, so that a frame, its flow and its audio belong together.
    """

    times_F: np.ndarray
    """Moments of the frames, as fractions of the clip in [0, 1)."""
    top: float
    """Upper edge of the crop, as a fraction in [0, 1) of the possible positions, which are equally likely."""
    left: float
    """Left edge of the crop, likewise."""
    flip: bool
    """True if mirrored horizontally."""
    jitter_3: np.ndarray
    """Factors of brightness, contrast, saturation; float32."""


@dataclass(frozen=True)
class Pictures:
    """Number, size and rate of a member's pictures."""

    num_frames: int
    width: int
    """Pixels."""
    height: int
    fps: float

    @property
    def length_s(self) -> float:
        """Seconds from the start of the first picture to the end of the last."""
        return float(self.num_frames / self.fps)


@dataclass(frozen=True)
class Description:
    """The entry of a stored member in KEY.json, without byte count and crc32. Fields are of type int, float or str."""

    @property
    def length_s(self) -> float | None:
        """Seconds of stored signal; None if the description does not tell."""
        return None

    @property
    def pictures(self) -> Pictures | None:
        """The member's pictures; None if it has none."""
        return None

    def problem_beside(self, others: Mapping[str, Description]) -> str:
        """Return how the entry contradicts those of the clip's other members, or an empty string.

        Args:
            others: Entries of all present members, by modality.
        """
        return ""

    @classmethod
    @cache
    def field_types(cls) -> list[tuple[dataclasses.Field[Any], tuple[type, ...]]]:
        """Return the fields with the types that their values may have.

        Raises:
            TypeError: a field is not annotated as int, float or str.
        """
        fields = dataclasses.fields(cls)
        names = {field.name: getattr(field.type, "__name__", str(field.type)) for field in fields}
        unknown = next((name for name, annotation in names.items() if annotation not in _TYPES), None)
        if unknown is not None:
            raise TypeError(
                f"{cls.__name__}.{unknown} is annotated as {names[unknown]}: a description has int, float and str"
            )
        return [(field, _TYPES[names[field.name]]) for field in fields]

    @classmethod
    def parse(cls, declared: Mapping[str, Any]) -> Self:
        """Read this class's fields from an entry of KEY.json and ignore all others.

        Raises:
            ValueError: a field is missing, has another type, or is a number that is too small.
        """
        values = {}
        for field, types in cls.field_types():
            value = declared.get(field.name)
            if isinstance(value, bool) or not isinstance(value, types):
                raise ValueError(f"{field.name} is {value!r}, not of type {types[-1].__name__}")
            if not isinstance(value, str) and not value > field.metadata.get("above", 0):
                raise ValueError(f"{field.name} is {value!r}, too small")
            values[field.name] = value
        return cls(**values)


@dataclass(frozen=True)
class ArrayType:
    """The array that a decoder gives for one view."""

    shape: tuple[int, ...]
    dtype: str
    """NumPy's name of the type of its values."""
    axes: str
    """Names of the axes, and the meaning of the values."""
    rate_hz: float | None = None
    """Samples per second along the last axis; None if it is no axis of time."""

    @property
    def num_bytes(self) -> int:
        """Size in bytes."""
        import numpy as np

        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


class Decoder(ABC):
    """The part that decodes a member's bytes to arrays. Every method raises `DecodeError` if decoding fails."""

    always_whole: ClassVar[bool] = False
    """True if members are always decoded as a whole, because cutting views from the whole costs nothing."""

    @abstractmethod
    def decode(self, data: bytes, description: Any, settings: Any) -> np.ndarray:
        """Decode everything that a view may need; `cut` cuts views from the result.

        Args:
            data: The member.
            description: Its entry, of the modality's `Description`.
            settings: The modality's section of the recipe's `inputs`.
        """

    @abstractmethod
    def cut(
        self, decoded: np.ndarray, description: Any, settings: Any, views: Sequence[View], length_s: float
    ) -> np.ndarray:
        """Cut the arrays of V views (V, ...) from the result of `decode`.

        Args:
            decoded: Result of `decode`; must not be modified.
            description: The member's entry.
            settings: The modality's section of the recipe's `inputs`.
            views: The V views.
            length_s: Length of the clip in seconds; the views' times are fractions of it.
        """

    def decode_views(
        self, data: bytes, description: Any, settings: Any, views: Sequence[View], length_s: float
    ) -> np.ndarray:
        """Return the same arrays as `cut`, bit for bit, decoding only the parts that the views show."""
        return self.cut(self.decode(data, description, settings), description, settings, views, length_s)

    def array(self, settings: Any) -> ArrayType:
        """Return shape and type of one view's array; files that `karmma-dist export` writes take it as their input.

        Raises:
            UserError: the decoder does not tell, so that a model of its modality cannot be exported.
        """
        raise UserError(f"{type(self).__name__} has no method 'array', which tells the shape and type of its arrays")

    def num_bytes(self, settings: Any) -> int:
        """Return the size of one view's array in bytes."""
        return self.array(settings).num_bytes

    @abstractmethod
    def check(self, data: bytes, description: Any) -> None:
        """Check that stored bytes decode to what their description declares, for `verify --full`.

        Raises:
            StoredError: the decoded signal differs from its description.
            DecodeError: the bytes cannot be decoded.
        """


class TensorMaker(ABC):
    """The part that turns the arrays of a batch into the tensor that encoders take."""

    @abstractmethod
    def shape(self, settings: Any) -> tuple[int, ...]:
        """Return the shape of one clip's tensor, without the batch dimension."""

    @abstractmethod
    def make(self, arrays_N: Tensor, settings: Any, jitter_N3: Tensor | None) -> Tensor:
        """Return float32 (N, *shape) on the device of `arrays_N`.

        Args:
            arrays_N: The decoder's arrays of N clips, stacked; must not be modified.
            settings: The modality's section of the recipe's `inputs`.
            jitter_N3: The views' jitter, for a modality whose `is_jittered` is True.
        """


class Sheet(ABC):
    """The rest of a drawing's clip, beyond the member that is drawn."""

    @abstractmethod
    def pictures(self, places: Callable[[int], Sequence[int]]) -> list[np.ndarray] | None:
        """Return some of the clip's pictures, uint8 RGB (H, W, 3), or None if no modality shows the scene.

        Args:
            places: Function from the number of frames to the indices of the wanted ones.
        """

    @abstractmethod
    def clock(self) -> Pictures | None:
        """Return the pictures that define the clip's times, or None if the clip has none."""


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
            DecodeError: the member cannot be decoded.
        """

    def draw_legend(self, axis: Axes) -> None:  # noqa: B027 - most columns need none
        """Draw the meaning of the column's colours next to its title."""

    def pictures(self, data: bytes, places: Callable[[int], Sequence[int]]) -> list[np.ndarray] | None:
        """Return pictures that other drawings may draw on, uint8 RGB; None if the modality shows no scene."""
        return None


NUM_SEVERITIES = 5
"""Number of severities of a breakage, from 1 (slight) to 5 (severe)."""


@dataclass(frozen=True)
class Breakage:
    """One way in which a sensor breaks, `SENSOR:KIND` on the command line, and its effect on this modality."""

    sensor: str
    """Name of the modality, or of a sensor behind several modalities, such as `camera`."""
    kind: str
    effect: str
    """The breaker's name of what happens to the signal."""
    amounts: tuple[float, ...]
    """Amount per severity, from slight to severe; a larger amount damages at least what a smaller one does."""
    meaning: str
    """Format string that explains an amount."""
    is_random: bool
    """True if the outcome depends on the seed."""

    def __post_init__(self) -> None:
        if len(self.amounts) != NUM_SEVERITIES:
            raise ValueError(
                f"breakage {self.sensor}:{self.kind} has {len(self.amounts)} amounts, not {NUM_SEVERITIES}: one for "
                "each severity"
            )


class Breaker(ABC):  # noqa: B024 - the base of the two kinds below
    """The part that breaks signals on purpose, before anything is computed from them; presence never changes.

    Random choices depend on (seed, clip key) alone, not on the severity.
    """


class ArraysBreaker(Breaker):
    """A breaker of the views' arrays."""

    @abstractmethod
    def break_arrays(self, effect: str, amount: float, arrays_N: Tensor, keys: Sequence[str], seed: int) -> Tensor:
        """Return the decoder's arrays of N clips, broken, on any device; the given tensor is not modified."""


class SignalBreaker(Breaker):
    """A breaker of whole signals, from which the views are cut again."""

    @abstractmethod
    def break_uncut(self, effect: str, amount: float, decoded: np.ndarray, key: str, seed: int) -> np.ndarray:
        """Return one clip's whole decoded signal, broken; the given array is not modified."""


@dataclass(frozen=True)
class Modality:
    """One kind of sensor signal and the parts that handle it."""

    name: str
    """Name in recipes, manifests and batches."""
    letter: str
    """Letter on the command line and in tables (`--modalities V,F`)."""
    member: str
    """Suffix of the clip's member in the tar: `KEY.<member>`."""
    array: str
    """Kind of array that a model receives, by which encoders say what they take. Ours, with the fields of the section
    that encoders read: `frames` (3, num_frames, crop, crop), `spectrograms` (num_windows, num_mels, num_steps), `boxes`
    (num_frames, max_boxes, 6), `series` (num_channels, num_samples); other kinds are for encoders of other packages."""
    layout: str
    """Axes of that array for N present clips, and what its values are."""
    settings: type[Settings]
    """Section of the recipe's `inputs`."""
    section: str
    """Name of that section; modalities that share a section share its settings."""
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
    """True if a stored member lasts as long as its clip; otherwise it may end with its recording."""
    is_jittered: bool = False
    """True if the view's colour jitter applies to its tensors."""

    def __post_init__(self) -> None:
        if len(self.letter) != 1 or self.letter != self.letter.upper():
            raise ValueError(f"modality '{self.name}': its letter '{self.letter}' is not one upper-case letter")
        self.description.field_types()

    @cached_property
    def storage(self) -> Storage:
        """The part that packs."""
        from karmma_dist.modalities.storage import Storage

        return self._part("storage", self.storage_part, Storage)

    @cached_property
    def decoder(self) -> Decoder:
        """The part that decodes."""
        return self._part("decoder", self.decoder_part, Decoder)

    @cached_property
    def tensors(self) -> TensorMaker:
        """The part that makes tensors; imports torch."""
        return self._part("tensors", self.tensors_part, TensorMaker)

    @cached_property
    def drawing(self) -> Drawing:
        """The part that draws; imports Matplotlib."""
        return self._part("drawing", self.drawing_part, Drawing)

    @cached_property
    def breaker(self) -> Breaker:
        """The part that breaks the signal on purpose; imports torch."""
        return self._part("breaker", self.breaker_part, Breaker)

    def _part(self, name: str, reference: str, part_type: Callable[..., Part]) -> Part:
        assert isinstance(part_type, type)
        module_name, _, attribute = reference.partition(":")
        part = getattr(importlib.import_module(module_name), attribute, None)
        if not isinstance(part, part_type):
            raise TypeError(
                f"modality '{self.name}': its part '{name}' is missing: {reference} is {type(part).__name__}, "
                f"not a {part_type.__name__} ({part_type.__module__})"
            )
        return cast(Part, part)
