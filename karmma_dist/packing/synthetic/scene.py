"""Frames and audio of the synthetic kitchen: the verb is the motion of an object, the noun its appearance.

Every cue is weak: the object is partly hidden, among other objects, in noise, before a shaking camera; the audio tells
the verb by pitch and the noun by rhythm, and pitches and rhythms of different classes overlap. No single modality
suffices, and the modalities complement each other.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass

import cv2
import numpy as np

VERBS = ("slide", "lift", "stir", "bring")
"""Verbs; the motions are left and right, up and down, in circles, and nearer."""

NOUNS = ("plate", "board", "knife", "pan", "sponge")
"""Nouns; they look like a disc, striped square, slanted bar, ring with a handle, and checkered square."""

WIDTH, HEIGHT, FPS, SOUND_RATE = 96, 72, 15, 24_000

_SPRITE = 48
_ROOM = (320, 240)
_MARGIN = 16
_PITCH_HZ = (196.0, 277.0, 392.0, 554.0)
_RHYTHM_HZ = (2.6, 3.8, 5.5, 8.0, 11.5)
_HUES = (20, 55, 95, 130, 165)


@dataclass(frozen=True, slots=True)
class Event:
    """One action in a recording."""

    start_s: float
    stop_s: float
    verb: int
    noun: int


class Scene:
    """The frames of one recording.

    Args:
        events: Actions in order of time.
        difficulty: 0 is clean, 1 the default, more is harder.
        random: Generator that decides everything else; its state advances.
    """

    def __init__(self, events: list[Event], difficulty: float, random: np.random.Generator) -> None:
        self._difficulty, self._random = difficulty, random
        self._background = _room(random)
        self._noise = random.normal(0, 1, (8, HEIGHT, WIDTH, 3)).astype(np.float32)
        self._actors = [(event, _Actor(event, difficulty, random)) for event in events]
        # The wearer looks at another part of the room for each action.
        room = np.array([_ROOM[0] - WIDTH, _ROOM[1] - HEIGHT]) - 2 * _MARGIN
        self._gaze_times = [event.start_s - 0.1 for event in events]
        self._gazes = np.cumsum(random.normal(0, 30, (len(events) + 1, 2)), axis=0) + room / 2
        self._gazes = _MARGIN + np.clip(self._gazes, 0, room)
        self._shake = np.zeros(2)

    def frame(self, time_s: float) -> np.ndarray:
        """Draw the frame at a time: uint8 (HEIGHT, WIDTH, 3) RGB. Call in order of time: the camera drifts."""
        random = self._random
        self._shake = 0.85 * self._shake + random.normal(0, 0.5 * self._difficulty, 2)
        dx, dy = np.clip(self._shake, -_MARGIN, _MARGIN)
        left, top = self._gazes[bisect.bisect(self._gaze_times, time_s)]
        shift = np.array([[1, 0, dx - left], [0, 1, dy - top]], np.float32)
        picture = cv2.warpAffine(self._background, shift, (WIDTH, HEIGHT), borderMode=cv2.BORDER_REFLECT)
        for event, actor in self._actors:
            if event.start_s <= time_s < event.stop_s:
                actor.draw(picture, time_s, (dx, dy))
        noise = np.roll(self._noise[random.integers(8)], tuple(random.integers(0, 72, 2)), (0, 1))
        noisy = cv2.GaussianBlur(picture, (3, 3), 0) + 8 * self._difficulty * noise
        result: np.ndarray = np.clip(noisy, 0, 255).astype(np.uint8)
        return result


class _Actor:
    """The object of one event, with its path and its occluder."""

    def __init__(self, event: Event, difficulty: float, random: np.random.Generator) -> None:
        self._event = event
        self._sprite = _sprite(event.noun, random)
        self._centre = np.array([WIDTH / 2, HEIGHT / 2]) + random.normal(0, 6, 2)
        self._reach = random.uniform(10, 18)
        self._turns_s, self._phase = random.uniform(0.8, 1.4), random.uniform(0, 2 * np.pi)
        self._size, self._angle = random.uniform(0.6, 0.9), random.uniform(-25, 25)
        self._direction = random.choice((-1, 1))
        hidden = random.uniform(0, 0.7 * difficulty)
        self._occluder = random.uniform(70, 150) + random.uniform(-20, 20, 3).astype(np.float32)
        self._bar = (random.uniform(0.2, 0.8), hidden * 30, bool(random.integers(2)))

    def draw(self, picture: np.ndarray, time_s: float, shake: tuple[float, float]) -> None:
        """Draw object and occluder into a float picture."""
        elapsed_s, length_s = time_s - self._event.start_s, self._event.stop_s - self._event.start_s
        angle = 2 * np.pi * self._turns_s * elapsed_s + self._phase
        centre, size = self._centre + shake, self._size
        verb = VERBS[self._event.verb]
        if verb == "slide":
            centre = centre + np.array([self._reach * np.sin(angle), 0])
        elif verb == "lift":
            centre = centre + np.array([0, self._reach * np.sin(angle)])
        elif verb == "stir":
            centre = centre + 0.8 * self._reach * np.array([np.cos(angle), self._direction * np.sin(angle)])
        else:
            size = size * (0.6 + 0.9 * elapsed_s / length_s)
        _paste(picture, self._sprite, centre, size, self._angle)
        position, width, upright = self._bar
        extent = WIDTH if upright else HEIGHT
        start, stop = (round(position * extent + side * width / 2) for side in (-1, 1))
        if upright:
            picture[:, max(start, 0) : max(stop, 0)] = self._occluder
        else:
            picture[max(start, 0) : max(stop, 0)] = self._occluder


def sound(events: list[Event], duration_s: float, difficulty: float, random: np.random.Generator) -> np.ndarray:
    """Make a recording's audio: float32 (duration_s * SOUND_RATE,) in [-1, 1]; a tenth of the events are silent."""
    num = round(duration_s * SOUND_RATE)
    samples = 0.02 * difficulty * np.cumsum(random.normal(0, 1, num).astype(np.float32))
    samples -= cv2.blur(samples[None], (801, 1))[0]
    samples = 0.05 * difficulty * samples / max(float(samples.std()), 1e-6)
    samples += 0.03 * difficulty * random.normal(0, 1, num).astype(np.float32)
    for event in events:
        first, last = round(event.start_s * SOUND_RATE), min(round(event.stop_s * SOUND_RATE), num)
        time_s = np.arange(last - first, dtype=np.float32) / SOUND_RATE
        pitch = _PITCH_HZ[event.verb] * 2 ** random.normal(0, 0.28 * difficulty)
        rhythm = _RHYTHM_HZ[event.noun] * 2 ** random.normal(0, 0.28 * difficulty)
        silent, phase, level = random.random() < 0.1, random.uniform(0, 2 * np.pi), random.uniform(0.08, 0.2)
        if silent:
            continue
        beats = np.clip(np.sin(2 * np.pi * rhythm * time_s + phase), 0, 1) ** 2
        wave = sum(np.sin(2 * np.pi * pitch * k * time_s) / k for k in (1, 2, 3))
        samples[first:last] += (level * (0.15 + beats) * wave).astype(np.float32)
    clipped: np.ndarray = np.clip(samples, -1, 1).astype(np.float32)
    return clipped


def _room(random: np.random.Generator) -> np.ndarray:
    """Draw a plain surface with small objects that belong to no action; float32 RGB of size _ROOM."""
    rough = random.uniform(60, 160, (18, 24, 1)) + random.uniform(-15, 15, (18, 24, 3))
    room: np.ndarray = cv2.resize(rough.astype(np.float32), _ROOM, interpolation=cv2.INTER_CUBIC)
    for _ in range(16):
        place = random.uniform((0, 0), _ROOM)
        sprite = _sprite(int(random.integers(len(NOUNS))), random)
        _paste(room, sprite, place, random.uniform(0.25, 0.4), random.uniform(0, 90))
    return room


def _sprite(noun: int, random: np.random.Generator) -> np.ndarray:
    """Draw an object as float32 (48, 48, 4): RGB and opacity in [0, 1]."""
    hue = (_HUES[noun] + random.normal(0, 14)) % 180
    shades = np.array([[[hue, random.uniform(60, 160), value] for value in (220, 110)]], np.uint8)
    light, dark = cv2.cvtColor(shades, cv2.COLOR_HSV2RGB)[0].astype(float).tolist()
    colour = np.zeros((_SPRITE, _SPRITE, 3), np.float32)
    opacity = np.zeros((_SPRITE, _SPRITE), np.float32)
    rows, columns = np.mgrid[:_SPRITE, :_SPRITE]
    colour[:] = light
    name = NOUNS[noun]
    if name == "plate":
        cv2.circle(opacity, (24, 24), 18, 1.0, -1)
        cv2.circle(colour, (24, 24), 10, dark, 2)
    elif name == "board":
        opacity[8:40, 8:40] = 1
        colour[(rows // 6) % 2 == 1] = dark
    elif name == "knife":
        cv2.line(opacity, (6, 42), (42, 6), 1.0, 9)
        colour[(rows + columns) % 16 < 4] = dark
    elif name == "pan":
        cv2.circle(opacity, (20, 28), 15, 1.0, 6)
        cv2.line(opacity, (30, 18), (45, 3), 1.0, 5)
    else:
        opacity[8:40, 8:40] = 1
        colour[((rows // 8) + (columns // 8)) % 2 == 1] = dark
    return np.dstack([colour, opacity])


def _paste(picture: np.ndarray, sprite: np.ndarray, centre: np.ndarray, size: float, angle: float) -> None:
    """Blend a sprite into a float picture, in place."""
    move: np.ndarray = cv2.getRotationMatrix2D((_SPRITE / 2, _SPRITE / 2), angle, size)
    move[:, 2] = move[:, 2] + centre - _SPRITE / 2
    moved = cv2.warpAffine(sprite, move, picture.shape[1::-1])
    opacity = moved[..., 3:]
    picture[:] = picture * (1 - opacity) + moved[..., :3] * opacity
