"""The IMU of the synthetic kitchen: what a sensor at the wrist of the person in `scene.py` would measure.

The verb is the axis along which the hand accelerates and turns, the noun a tremor whose pitch falls with the object's
weight; pitches of different nouns overlap. Accelerometer and gyroscope have clocks of their own.
"""

from __future__ import annotations

import numpy as np

from karmma_dist.packing.synthetic.scene import VERBS, Event

RATE_HZ = 99.0
ACCELEROMETER, GYROSCOPE = ("AcclX", "AcclY", "AcclZ"), ("GyroX", "GyroY", "GyroZ")

_TREMOR_HZ = (6.0, 9.0, 14.0, 21.0, 32.0)
_GRAVITY = 9.81


def motion(
    events: list[Event], stop_s: float, difficulty: float, random: np.random.Generator
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Make the moments and samples of accelerometer (m/s2) and gyroscope (rad/s) of one recording.

    Args:
        events: Actions in order of time.
        stop_s: Moment at which both sensors stop.
        difficulty: Difficulty of the scene; 0 is clean.
        random: Generator that decides everything else; its state advances.

    Returns:
        Milliseconds (T,) with two decimals, and samples (3, T) with three, for either sensor.
    """
    clocks = [_clock(stop_s, random) for _ in range(2)]
    noise = (0.6 * difficulty, 0.15 * difficulty)
    samples = [random.normal(0, 1, (3, len(times_T))) * level for times_T, level in zip(clocks, noise, strict=True)]
    tilt = np.radians(random.normal(0, 8 * difficulty, 2))
    gravity = _GRAVITY * np.array([np.sin(tilt[0]), np.sin(tilt[1]), np.cos(tilt[0]) * np.cos(tilt[1])])
    samples[0] += gravity[:, None]
    for event in events:
        turns_s, phase = random.uniform(0.8, 1.4), random.uniform(0, 2 * np.pi)
        reach, direction = random.uniform(1.0, 2.5), random.choice((-1, 1))
        tremor_hz = _TREMOR_HZ[event.noun] * 2 ** random.normal(0, 0.2 * difficulty)
        shake = random.normal(0, 1, (2, 3))
        for sensor, (times_T, values_3T) in enumerate(zip(clocks, samples, strict=True)):
            inside = (times_T >= event.start_s) & (times_T < event.stop_s)
            elapsed_s = times_T[inside] - event.start_s
            angle = 2 * np.pi * turns_s * elapsed_s + phase
            moved = _moved(VERBS[event.verb], sensor, angle, direction)
            tremor = np.sin(2 * np.pi * tremor_hz * elapsed_s + phase) * 0.5 * shake[sensor][:, None]
            values_3T[:, inside] += (reach * moved + tremor) * (1.0, 0.25)[sensor]
    sensors = zip(clocks, samples, strict=True)
    return [(np.round(1000 * times_T, 2), np.round(values_3T, 3)) for times_T, values_3T in sensors]


def _clock(stop_s: float, random: np.random.Generator) -> np.ndarray:
    """Draw ascending moments in seconds that are about a period apart."""
    steps_s = (1 + random.uniform(-0.1, 0.1, int(stop_s * RATE_HZ))) / RATE_HZ
    return np.cumsum(steps_s) - steps_s[0] + random.uniform(0, 0.005)


def _moved(verb: str, sensor: int, angle: np.ndarray, direction: int) -> np.ndarray:
    """Return what accelerometer (0) or gyroscope (1) show of a verb, of amplitude 1: (3, T)."""
    still, wave, quarter = np.zeros_like(angle), np.sin(angle), np.cos(angle)
    if verb == "slide":
        return np.stack([wave, still, still] if sensor == 0 else [still, still, 0.5 * quarter])
    if verb == "lift":
        return np.stack([still, wave, still] if sensor == 0 else [0.5 * quarter, still, still])
    if verb == "stir":
        return np.stack([wave, direction * quarter, still] if sensor == 0 else [still, still, direction + still])
    return np.stack([still, still, wave] if sensor == 0 else [still, 0.5 * quarter, still])
