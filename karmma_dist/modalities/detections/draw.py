"""Detections in contact sheets: boxes on the clip's pictures."""

from __future__ import annotations

import cv2
import numpy as np
from matplotlib.axes import Axes

from karmma_dist.modalities.contract import Drawing, Sheet
from karmma_dist.modalities.detections import HAND, DetectionsDescription
from karmma_dist.modalities.detections.decode import picture_size, read_frames
from karmma_dist.modalities.picture_strips import draw_strip, draw_times, fit_picture, shown_places

_HAND_COLOUR, _OBJECT_COLOUR = (255, 150, 30), (60, 190, 255)


class DetectionsDrawing(Drawing):
    """A drawing of boxes on the clip's pictures, or on gray if the clip has none."""

    title = "detections: hand orange, object blue"

    def draw(self, axis: Axes, data: bytes, description: DetectionsDescription, sheet: Sheet) -> None:
        """Draw the boxes of some frames."""
        frames, (width, height) = read_frames(data), picture_size(data)
        places = shown_places(len(frames))
        pictures = sheet.pictures(shown_places) or [np.full((height, width, 3), 230, np.uint8)] * len(places)
        drawn = []
        for place, picture in zip(places, pictures, strict=False):
            canvas = fit_picture(picture, len(places))
            for box in sorted(frames[place], key=lambda box: -box[4]):
                draw_box(canvas, box)
            drawn.append(canvas)
        draw_strip(axis, drawn)
        clock = sheet.clock()
        if clock is not None:
            draw_times(axis, clock)


def draw_box(canvas: np.ndarray, box: list[float]) -> None:
    """Draw a stored box (x0, y0, x1, y1 in [0, 1], category, score) into uint8 RGB (H, W, 3), with its category.

    A bright line inside a dark one is visible on light and on dark pictures.
    """
    height, width = canvas.shape[:2]
    x0, y0, x1, y1, category, _ = box
    text, colour = ("hand", _HAND_COLOUR) if category == HAND else ("object", _OBJECT_COLOUR)
    left, right = (min(max(round(x * width), 2), width - 3) for x in (x0, x1))
    top, bottom = (min(max(round(y * height), 2), height - 3) for y in (y0, y1))
    cv2.rectangle(canvas, (left, top), (right, bottom), (0, 0, 0), 4)
    cv2.rectangle(canvas, (left, top), (right, bottom), colour, 2)
    (wide, high), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, 0.4, 1)
    # The names of hands are at the top of their boxes, those of objects at the bottom, so that they seldom overlap.
    text_x = min(left, width - wide - 4)
    text_y = top + high + 4 if category == HAND else max(bottom - 4, high + 4)
    cv2.rectangle(canvas, (text_x, text_y - high - 3), (text_x + wide + 3, text_y + 3), colour, cv2.FILLED)
    cv2.putText(canvas, text, (text_x + 2, text_y), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (0, 0, 0), 1, cv2.LINE_AA)


DRAWING = DetectionsDrawing()
