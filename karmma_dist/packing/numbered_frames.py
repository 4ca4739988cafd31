"""Folders and tars of numbered JPEG frames, as Epic-Kitchens publishes them: frame_0000000001.jpg, u/..., v/..."""

from __future__ import annotations

import os
import re
import tarfile
from pathlib import Path
from types import TracebackType
from typing import Self

import cv2
import numpy as np

from karmma_dist.packing.records import MediaError

_NAME = re.compile(r"(?:^|/)(?:([uv])/)?frame_(\d+)\.jpe?g$")


class NumberedFrames:
    """The frames of one recording, opened for random access.

    Raises:
        MediaError: the tar cannot be read to its end, or there is no frame in it.
    """

    def __init__(self, path: Path, modality: str) -> None:
        self.path, self.modality = path, modality
        self._tar: tarfile.TarFile | None = None
        self._members: dict[tuple[str, int], tarfile.TarInfo | Path] = {}
        if path.is_dir():
            self._list_folder()
        else:
            self._list_tar()
        if not self._members:
            raise MediaError(modality, "open", f"{path.name}: no frame_0000000001.jpg or other frame in it")
        numbers = [number for _, number in self._members]
        self.first, self.last = min(numbers), max(numbers)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._tar is not None:
            self._tar.close()

    def clamped(self, start: int, stop: int | None) -> range:
        """File numbers from start up to (not including) stop, of those between the first and last there are.

        A clip whose stop is its start has one frame.

        Raises:
            MediaError: the clip lies outside of them.
        """
        stop = self.last + 1 if stop is None else max(stop, start + 1)
        numbers = range(max(start, self.first), min(stop, self.last + 1))
        if not numbers:
            raise MediaError(
                self.modality, "cut",
                f"{self.path.name} has frames {self.first} to {self.last}, the clip is {start} to {stop - 1}",
            )  # fmt: skip
        return numbers

    def read(self, number: int, component: str = "") -> np.ndarray:
        """Decode one frame: uint8 (H, W, 3) RGB, or (H, W) gray for component "u" or "v".

        Raises:
            MediaError: it is missing or does not decode.
        """
        name = f"{component}/frame_{number:010d}.jpg".lstrip("/")
        member = self._members.get((component, number))
        if member is None:
            raise MediaError(self.modality, "decode", f"{self.path.name}: {name} is missing")
        data = self._bytes(member)
        # OpenCV fills a cut JPEG with gray without a word: look for the end-of-image marker.
        if not data.startswith(b"\xff\xd8") or b"\xff\xd9" not in data[-64:]:
            raise MediaError(self.modality, "decode", f"{self.path.name}: {name} is no whole JPEG")
        flag = cv2.IMREAD_GRAYSCALE if component else cv2.IMREAD_COLOR
        picture = cv2.imdecode(np.frombuffer(data, np.uint8), flag)
        if picture is None:
            raise MediaError(self.modality, "decode", f"{self.path.name}: {name} does not decode")
        return picture if component else cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)

    def _bytes(self, member: tarfile.TarInfo | Path) -> bytes:
        try:
            if isinstance(member, Path):
                return member.read_bytes()
            assert self._tar is not None
            file = self._tar.extractfile(member)
            return file.read() if file else b""
        except (OSError, tarfile.TarError) as error:
            raise MediaError(self.modality, "decode", f"{self.path.name}: {error}") from None

    def _list_folder(self) -> None:
        for folder in (self.path, self.path / "u", self.path / "v"):
            for name in sorted(os.listdir(folder)) if folder.is_dir() else ():
                path = folder / name
                self._add(str(path.relative_to(self.path)), path)

    def _list_tar(self) -> None:
        try:
            self._tar = tarfile.open(self.path, "r:")  # noqa: SIM115 - stays open for random access
            for info in self._tar:
                if info.isfile():
                    self._add(info.name, info)
            with open(self.path, "rb") as file:
                file.seek(self._tar.offset)
                # tarfile takes a cut between two members for the end: the end is marked by a block of zeros.
                if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    raise tarfile.ReadError("no end-of-archive mark")
        except (OSError, tarfile.TarError) as error:
            raise MediaError(self.modality, "open", f"{self.path.name}: not a whole tar: {error}") from None

    def _add(self, name: str, member: tarfile.TarInfo | Path) -> None:
        match = _NAME.search(name)
        if match:
            self._members[match[1] or "", int(match[2])] = member
