"""One clip while the pass over its movie goes on: which picture is stored for which of its moments."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from karmma_dist.packing.media import num_frames_between
from karmma_dist.packing.movie import Movie, Picture
from karmma_dist.packing.pictures import ClipPictures, CutPictures
from karmma_dist.packing.records import ClipRecord, MediaError
from karmma_dist.packing.spec import FlowSpec, VideoSpec

EARLY_S = 2e-3
"""A frame this much after a stored frame's moment counts as shown: many containers round to milliseconds."""


class MovieClip:
    """A clip while the pass goes over it: which of its stored frames come next."""

    def __init__(self, clip: ClipRecord, fps: Fraction, video: VideoSpec, computed_flow: FlowSpec | None) -> None:
        self.clip, self._fps = clip, float(fps)
        self._stored = ClipPictures(fps, video, computed_flow)
        self._wanted = None if clip.stop_s is None else num_frames_between(clip.start_s, clip.stop_s, fps)
        self._first_s = clip.start_s
        self._size: tuple[int, ...] | None = None
        self._problem: MediaError | None = None

    def show(self, picture: Picture, until_s: float) -> None:
        """`picture` is on until `until_s`: store it for every moment of the clip before that."""
        while not self.done and self.clip.start_s + self._stored.num_frames / self._fps < until_s - EARLY_S:
            image = picture.image()
            if self._stored.num_frames == 0:
                self._first_s, self._size = picture.time_s, image.shape
            elif image.shape != self._size:
                self._problem = MediaError("video", "decode", f"picture size changes at {picture.time_s:.2f} s")
                return
            self._stored.add(image, picture.colorspace)

    @property
    def done(self) -> bool:
        """No picture after this one is needed."""
        return self._problem is not None or self._stored.num_frames == self._wanted

    def finish(self, movie: Movie, size: tuple[int, int] | None) -> CutPictures | MediaError:
        """The clip's pictures, or what is wrong with them."""
        try:
            if self._problem is not None:
                raise self._problem
            movie.damage.check("video", *self._span(movie))
            if self._stored.num_frames == 0:
                text = f"starts at {self.clip.start_s:.2f} s, the video ends at {movie.end_s:.2f} s"
                raise MediaError("video", "cut", text)
        except MediaError as error:
            return error
        stop_s = self.clip.start_s + self._stored.num_frames / self._fps
        return CutPictures(*self._stored.finish(), size, movie.num_frames, round(stop_s, 6))

    def _span(self, movie: Movie) -> tuple[float, float]:
        """From the first picture shown to the last moment stored, or to the clip's end when the movie ends before."""
        if self.done:
            return self._first_s, self.clip.start_s + (self._stored.num_frames - 1) / self._fps
        return self._first_s, max(movie.end_s, self.clip.stop_s or 0.0)


def show_to_all(
    active: list[MovieClip], picture: Picture, until_s: float, movie: Movie, size: tuple[int, int] | None
) -> Iterator[tuple[ClipRecord, CutPictures | MediaError]]:
    """Show a picture to all active clips; yield and remove those that are done."""
    for cut in list(active):
        cut.show(picture, until_s)
        if cut.done:
            active.remove(cut)
            yield cut.clip, cut.finish(movie, size)
