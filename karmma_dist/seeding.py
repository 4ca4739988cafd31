"""All random draws of the package: each is a function of its purpose, with a separate derivation.

No draw comes from a shared stream, so none depends on the number of ranks or workers, on the order of decoding, or on
the step at which a run was interrupted.

    draw                                     follows from                 by
    clips of an epoch in a random order      seed, epoch                  Philox, key (seed, 2 epoch)
    clips of a pass over a mixture's dataset seed, dataset, pass          Philox, key (seed, 2 pass + dataset 2^40)
    modality dropout in training             seed, epoch, place           Philox, key (seed, 2 epoch + 1)
    the modality kept where all are dropped  seed, epoch, place           Philox, key (seed + 2^63, epoch)
    dropout inside the model                 seed, forward pass, rank     Philox, key (seed, number), then torch
    view of a training clip                  seed, epoch, clip            SHAKE-128
    sensors lost in evaluation               seed, clip, modality         BLAKE2b, 53 bits
    moment at which a sensor fails           seed, clip                   BLAKE2b, 53 bits
    noise and lost boxes of a broken sensor  seed, clip, modality         BLAKE2b, 128 bits, then Philox
    clips spread over shards                 seed, split                  BLAKE2b, 128 bits, then Philox
    recordings held out                      recording                    BLAKE2b, 64 bits
    bootstrap of clips and seeds             seed                         PCG64
    synthetic kitchen                        seed, split, recording       PCG64
    IMU of the synthetic kitchen             seed, split, recording       PCG64, with a further 1

Starting weights are what torch draws after `torch.manual_seed(seed)` (`models.weights.build_model`).

A derivation never changes: otherwise resumed runs, shards and reports would no longer be reproducible. A new draw gets
a new line, with a key or text that no other line uses.
"""

from __future__ import annotations

import hashlib
from typing import Literal

import numpy as np

_FALLBACK = 2**63
"""Offset of the seed; seeds of recipes are smaller, so that the sum differs from every run's seed."""
_DATASET = 2**40
"""Offset between the datasets of a mixture, more than twice the number of passes of any run."""


def order_words(num: int, seed: int, epoch: int) -> np.ndarray:
    """Draw the words that order an epoch's clips and shards: uint64 (num,)."""
    return _philox_words(num, seed, 2 * epoch)


def pass_words(num: int, seed: int, dataset: int, number: int) -> np.ndarray:
    """Draw the words that order a pass over the clips of one dataset of a mixture: uint64 (num,).

    The first dataset has the words of `order_words`, so that a dataset alone is a mixture of one.

    Args:
        num: Number of clips.
        seed: Seed of the run.
        dataset: Number of the dataset, counted from 0.
        number: Number of the pass, counted from 0.
    """
    return _philox_words(num, seed, 2 * number + dataset * _DATASET)


def dropout_words(num: int, seed: int, epoch: int) -> np.ndarray:
    """Draw the words that decide which modalities the places of an epoch keep: uint64 (num,)."""
    return _philox_words(num, seed, 2 * epoch + 1)


def fallback_words(num: int, seed: int, epoch: int) -> np.ndarray:
    """Draw a word per place of an epoch, for the modality that it keeps if all were dropped: uint64 (num,)."""
    return _philox_words(num, seed + _FALLBACK, epoch)


def forward_seed(seed: int, forward: int, rank: int, world_size: int) -> int:
    """Return the seed, in [0, 2^63), of torch's draws inside the model in one forward pass of one rank.

    Args:
        seed: Seed of the run.
        forward: Number of the pass, counted from the beginning of the run.
        rank: Rank, counted from 0.
        world_size: Number of ranks in the pass.
    """
    return int(_philox_words(1, seed, forward * world_size + rank)[0] >> 1)


def view_draws(num: int, seed: int, epoch: int, key: str) -> np.ndarray:
    """Draw `num` numbers from [0, 1) for the view of one clip in one epoch: float64 (num,).

    A generator object per clip costs half a millisecond between two decodes, SHAKE-128 a tenth of that.
    """
    words = np.frombuffer(hashlib.shake_128(f"{seed}/{epoch}/{key}".encode()).digest(8 * num), dtype="<u8")
    draws: np.ndarray = (words >> np.uint64(11)) * 2.0**-53
    return draws


def uniform(seed: int, key: str, purpose: str) -> float:
    """Draw a number from [0, 1) for one clip: the top 53 bits of a BLAKE2b hash of the arguments.

    Args:
        seed: Seed of the evaluation's condition.
        key: Key of the clip.
        purpose: A modality, which is lost if the number is below the drop probability; or "moment", the time at which a
            clip's sensors fail: one number for all of them, since a camera freezes all its modalities at once.
    """
    digest = hashlib.blake2b(f"{seed}\0{key}\0{purpose}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) * 2.0**-53


def generator(*parts: int | str) -> np.random.Generator:
    """Return a separate generator for these parts: Philox, keyed by 128 bits of a BLAKE2b hash of "part/part/...".

    (seed, clip key, modality) draws the noise or the lost boxes of a broken sensor, (seed, split) the permutation that
    spreads a split's clips over shards, ("export", modality) the noise that an exported file is tried on. Parts that
    are already joined give the same generator.
    """
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest, dtype=np.uint64)))


def hold_out_word(recording: str, purpose: Literal["packing", "training"]) -> int:
    """Return 64 uniform bits of a recording's name: a share s of the recordings lies below s * 2^64.

    Args:
        recording: Name of the recording.
        purpose: `packing` makes splits; `training` takes clips for weighing experts from the split that packing leaves.
            Their hashes differ: with one hash, packing would already have removed the recordings with low words.
    """
    person = {"packing": b"", "training": b"hold_out"}[purpose]
    return int.from_bytes(hashlib.blake2b(recording.encode(), digest_size=8, person=person).digest(), "big")


def bootstrap_generator(seed: int) -> np.random.Generator:
    """Return the generator of a bootstrap: with the same seed, every model's draws contain the same clips."""
    return np.random.default_rng(seed)


def kitchen_generator(seed: int, split: str, recording: int) -> np.random.Generator:
    """Return the generator of one recording of the synthetic kitchen.

    Args:
        seed: Seed of the kitchen.
        split: `train` or `validation`.
        recording: Number of the recording within its split, counted from 0.
    """
    return np.random.default_rng([seed, split == "validation", recording])


def motion_generator(seed: int, split: str, recording: int) -> np.random.Generator:
    """Return the generator of the IMU of one recording of the synthetic kitchen; see `kitchen_generator`."""
    return np.random.default_rng([seed, split == "validation", recording, 1])


def _philox_words(num: int, first: int, second: int) -> np.ndarray:
    """Draw uint64 (num,). Philox's raw output never changes, unlike the distributions that numpy derives from it."""
    return np.random.Philox(key=np.array([first, second], dtype=np.uint64)).random_raw(num)
