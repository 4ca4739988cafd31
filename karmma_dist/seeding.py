"""Randomness that is a function of what it is for, and of nothing else."""

from __future__ import annotations

import hashlib

import numpy as np


def uniform(seed: int, key: str, modality: str) -> float:
    """Return a number in [0, 1) that depends on nothing but its arguments: the top 53 bits of a BLAKE2b hash."""
    digest = hashlib.blake2b(f"{seed}\0{key}\0{modality}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) * 2.0**-53


def generator(text: str) -> np.random.Generator:
    """Return a generator of a text: Philox, keyed by 16 bytes of its BLAKE2b hash."""
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest, dtype=np.uint64)))
