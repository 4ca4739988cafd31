"""Folders and tars of numbered JPEG frames: pictures, or optical flow with components u (horizontal) and v (vertical).

`#` is a number of any width; names in tars may start with `./` or a folder.

    pictures      frame_#.jpg  img_#.jpg  image_#.jpg  #.jpg
    flow, pairs   u/frame_#.jpg + v/frame_#.jpg, also x/ + y/, flow_x/ + flow_y/, flow_u/ + flow_v/, and in them any of
                  frame_# flow_# img_# flow_x_# #; or side by side flow_x_#.jpg + flow_y_#.jpg, flow_u_ + flow_v_,
                  x_ + y_, u_ + v_
    flow, packed  flow_#.jpg in colour: red is u, green is v

Pictures next to flow, as in dense_flow's folders, are ignored; two layouts of the same modality are refused.
"""

from __future__ import annotations

import os
import re
import tarfile
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import cv2
import numpy as np

from karmma_dist.modalities.encode import num_frames_between
from karmma_dist.modalities.recording import CUT_TOLERANCE_S, MOST_PIXELS, ClipRecord, MediaError, media_error

_NUMBER = r"(\d+)\.jpe?g$"
_PICTURE = re.compile(rf"(?:frame_|img_|image_)?{_NUMBER}", re.IGNORECASE)
_PAIR = re.compile(rf"(?:flow_)?[uvxy](?:_|/(?:[a-z]+_)*){_NUMBER}", re.IGNORECASE)
_PACKED = re.compile(rf"flow_{_NUMBER}", re.IGNORECASE)
_COMPONENT = re.compile(r"(?<![a-z])[uvxy](?=[_/])", re.IGNORECASE)
_COMPONENT_FOLDER = re.compile(r"(?:flow_)?[uvxy]", re.IGNORECASE)
_EXPECTED = {"video": "frame_0000000001.jpg", "flow": "u/frame_0000000001.jpg, flow_x_00001.jpg or flow_00001.jpg"}


_MOST_BYTES = 1 << 28
"""Largest size in bytes of the file of one frame."""


class FrameNumbers:
    """The numbers of the frames that one recording has in a file, tar or folder."""

    path: Path
    modality: str
    first: int
    """Lowest number."""
    last: int
    """Highest number."""

    def clamped(self, start: int, stop: int | None, num_lacking: int = 0) -> range:
        """Return the file numbers from start up to (not including) stop, limited to those from the first to the last.

        A clip whose stop is its start has one frame.

        Args:
            start: First number; 0 for the first that exists.
            stop: Number after the last; None for all that follow.
            num_lacking: Numbers that may be missing at either end. A partly extracted folder or tar lacks more.

        Raises:
            MediaError: none of the frames exist, or too many are missing.
        """
        stop = self.last + 1 if stop is None else max(stop, start + 1)
        numbers = range(max(start, self.first), min(stop, self.last + 1))
        if not numbers:
            raise MediaError(
                self.modality, "cut",
                f"{self.path.name} has frames {self.first} to {self.last}, the clip is {start} to {stop - 1}",
            )  # fmt: skip
        if stop - numbers.stop > num_lacking or (start > 0 and numbers.start - start > num_lacking):
            raise MediaError(
                self.modality, "cut",
                f"{self.path.name} ends too early or starts too late: it has frames {self.first} to {self.last}, "
                f"the clip is {start} to {stop - 1}",
            )  # fmt: skip
        return numbers


class NumberedFrames(FrameNumbers):
    """The frames of one recording, opened for random access.

    Args:
        path: Folder or tar.
        modality: "video" (pictures) or "flow"; it selects the layouts.

    Raises:
        MediaError: the tar cannot be read to its end, or the folder or tar has no frame or frames in several layouts.
    """

    def __init__(self, path: Path, modality: str = "video") -> None:
        self.path, self.modality = path, modality
        self._tar: tarfile.TarFile | None = None
        self._members: dict[tuple[str, int], tarfile.TarInfo | Path] = {}
        self._names: dict[tuple[str, int], str] = {}
        self._layout = ""
        """Names without number and suffix, with {u} and {x} for the letters of the component."""
        self._width = 0
        """Number of digits."""
        self._packed: tuple[int, np.ndarray] | None = None
        if path.is_dir():
            self._list_folder()
        else:
            self._list_tar()
        if not self._members:
            raise MediaError(modality, "open", f"{path.name}: no {_EXPECTED[modality]} or other frame in it")
        numbers = [number for _, number in self._members]
        self.first, self.last = min(numbers), max(numbers)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._tar is not None:
            self._tar.close()

    def read(self, number: int, component: str = "") -> np.ndarray:
        """Decode one frame: uint8 (H, W, 3) RGB, or (H, W) of flow's component "u" or "v".

        Raises:
            MediaError: the frame is missing or does not decode.
        """
        if component and ("", number) in self._members:
            if self._packed is None or self._packed[0] != number:
                self._packed = (number, self._decode(number, ""))
            return self._packed[1][..., "uv".index(component)]
        return self._decode(number, component)

    def _decode(self, number: int, component: str) -> np.ndarray:
        member = self._members.get((component, number))
        if member is None:
            raise MediaError(self.modality, "decode", f"{self.path.name}: {self._name(component, number)} is missing")
        name = f"{self.path.name}: {self._names[component, number]}"
        data = self._bytes(member)
        # OpenCV silently fills a truncated JPEG with gray: look for the end-of-image marker.
        if not data.startswith(b"\xff\xd8") or b"\xff\xd9" not in data.rstrip(b"\0")[-64:]:
            raise MediaError(self.modality, "decode", f"{name} is not a complete JPEG")
        packed = self.modality == "flow" and not component
        flag = cv2.IMREAD_UNCHANGED if packed else cv2.IMREAD_GRAYSCALE if component else cv2.IMREAD_COLOR
        width, height = _jpeg_size(data)
        if width * height > MOST_PIXELS:
            raise MediaError(self.modality, "decode", f"{name} declares {width}x{height} pixels: too large")
        picture = cv2.imdecode(np.frombuffer(data, np.uint8), flag)
        if picture is None:
            raise MediaError(self.modality, "decode", f"{name} does not decode")
        if packed and picture.ndim != 3:
            raise MediaError(self.modality, "decode", f"{name} is gray: flow in one file is in colour, red u, green v")
        return picture if component else cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)

    def _name(self, component: str, number: int) -> str:
        """Return the expected file name of a missing frame."""
        return f"{_filled(self._layout, component)}{number:0{self._width}d}.jpg"

    def _bytes(self, member: tarfile.TarInfo | Path) -> bytes:
        try:
            size = member.stat().st_size if isinstance(member, Path) else member.size
            if size > _MOST_BYTES:
                problem = f"{self.path.name}: {member.name} has {size:,} bytes, too many for a frame"
                raise MediaError(self.modality, "decode", problem)
            if isinstance(member, Path):
                return member.read_bytes()
            file = self._open_member(member)
            return file.read() if file else b""
        except (OSError, tarfile.TarError) as error:
            raise media_error(error, self.modality, "decode", f"{self.path.name}: {error}") from None

    def _open_member(self, member: tarfile.TarInfo) -> IO[bytes] | None:
        assert self._tar is not None
        try:
            return self._tar.extractfile(member)
        except KeyError:  # of tarfile, for the target of a link
            problem = f"{self.path.name}: {member.name} links to {member.linkname}, which is not in the tar"
            raise MediaError(self.modality, "decode", problem) from None

    def _list_folder(self) -> None:
        try:
            names = sorted(os.listdir(self.path))
            folders = [name for name in names if _COMPONENT_FOLDER.fullmatch(name) and (self.path / name).is_dir()]
            inner = [f"{folder}/{name}" for folder in folders for name in sorted(os.listdir(self.path / folder))]
        except OSError as error:
            raise media_error(error, self.modality, "open", f"{self.path.name}: {error.strerror}") from None
        for name in names + inner:
            self._add(name, self.path / name)

    def _list_tar(self) -> None:
        try:
            self._tar = tarfile.open(self.path, "r:")  # noqa: SIM115 - stays open for random access
            for info in self._tar:
                if info.isfile() or info.islnk() or info.issym():
                    self._add(info.name, info)
            with open(self.path, "rb") as file:
                file.seek(self._tar.offset)
                # tarfile takes a cut between two members for the end, but a complete tar ends with a block of zeros.
                if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    raise tarfile.ReadError("no end-of-archive mark")
        except (OSError, tarfile.TarError) as error:
            raise media_error(error, self.modality, "open", f"{self.path.name}: not a complete tar: {error}") from None

    def _add(self, name: str, member: tarfile.TarInfo | Path) -> None:
        parsed = _parse(name, self.modality)
        if parsed is None:
            return
        layout, component, digits = parsed
        number = int(digits)
        if self._members and layout != self._layout:
            first, second = (f"{_filled(each, 'u')}#.jpg" for each in (self._layout, layout))
            raise MediaError(
                self.modality, "open", f"{self.path.name}: frames in two layouts, {first} and {second}: keep one"
            )
        name = name.removeprefix("./")
        known = self._names.setdefault((component, number), name)
        if known != name:
            raise MediaError(self.modality, "open", f"{self.path.name}: {known} and {name} have the same number")
        self._layout, self._width = layout, len(digits)
        self._members[component, number] = member


def _jpeg_size(data: bytes) -> tuple[int, int]:
    """Return width and height by a JPEG's start-of-frame marker (ITU-T T.81, B.2.2); (0, 0) if it has none."""
    place = 2
    while place + 9 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = (int.from_bytes(data[place + at : place + at + 2], "big") for at in (5, 7))
            return width, height
        # Fill bytes and markers without a length are stepped over one by one.
        has_length = marker not in (0x01, 0xFF) and not 0xD0 <= marker <= 0xD9
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big") if has_length else 1 if marker == 0xFF else 2
    return 0, 0


def _parse(name: str, modality: str) -> tuple[str, str, str] | None:
    """Return layout, component ("u", "v" or "") and digits of a file; None if it is not a frame of the modality."""
    name = name.removeprefix("./")
    folder, file = name.rpartition("/")[::2]
    above, inner = folder.rpartition("/")[::2]
    top, tail = (above, f"{inner}/{file}") if _COMPONENT_FOLDER.fullmatch(inner) else (folder, file)
    component = ""
    match = _PICTURE.fullmatch(tail) if modality == "video" else _PAIR.fullmatch(tail) or _PACKED.fullmatch(tail)
    if match is None:
        return None
    layout = tail[: match.start(1)]
    letters = {"u" if letter.lower() in "ux" else "v" for letter in _COMPONENT.findall(layout)}
    if len(letters) > 1:
        return None
    if letters:
        component = letters.pop()
        layout = _COMPONENT.sub(lambda letter: "{u}" if letter[0].lower() in "uv" else "{x}", layout)
    return f"{top}/{layout}".lstrip("/"), component, match[1]


def _filled(layout: str, component: str) -> str:
    """Return a layout with the letters of one component filled in."""
    letters = {"u": ("u", "x"), "v": ("v", "y")}.get(component, ("", ""))
    return layout.replace("{u}", letters[0]).replace("{x}", letters[1])


def numbers_shown(
    clip: ClipRecord, frames: FrameNumbers, start: int, stop: int | None, nominal: Fraction, fps: Fraction
) -> list[int]:
    """Return the file numbers that show the clip at `fps`, as many as a video file would give.

    A clip of an untrimmed recording lasts from its start to its stop in seconds, as in a video file, so that both
    sources give the same number of frames; a clip that is its whole recording lasts as long as its files.

    Raises:
        MediaError: the clip has none of the frames.
    """
    existing = frames.clamped(start, stop, round(CUT_TOLERANCE_S * nominal))
    stop_s = clip.start_s + len(existing) / float(nominal) if clip.stop_s is None else clip.stop_s
    wanted = [
        existing.start + int(place * nominal / fps) for place in range(num_frames_between(clip.start_s, stop_s, fps))
    ]
    return [number for number in wanted if number <= frames.last]


def numbers_held(
    clip: ClipRecord, frames: FrameNumbers, stop_s: float, nominal: Fraction, fps: Fraction
) -> list[int]:
    """Return the file number of every moment of the clip at `fps`; at moments before and after all files, the nearest.

    The moments are those of stored pictures, so that what is stored without a clock keeps their time.

    Raises:
        MediaError: the clip has none of the frames, or too many are missing.
    """
    frames.clamped(clip.start_frame, clip.stop_frame, round(CUT_TOLERANCE_S * nominal))
    places = range(num_frames_between(clip.start_s, stop_s, fps))
    return [min(max(clip.start_frame + int(place * nominal / fps), frames.first), frames.last) for place in places]
