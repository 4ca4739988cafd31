"""Threads decode at once without a crash, and each gets what it would get alone.

The read-ahead thread of training and a validation decode in one process where `num_workers` is 0 and a GPU trains. The
threads run in a child process: a crash of a decoder would take the tests along.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kits.patience import HANGS_S

THREADS = """
import hashlib, json, sys, threading
from concurrent.futures import ThreadPoolExecutor
import numpy as np
from karmma_dist.modalities import MODALITIES, stored_frames
from karmma_dist.recipe import DataRecipe, InputRecipe
from karmma_dist.streaming.loader import EvaluationClips, TrainingClips, evaluation_batches, open_shards
from karmma_dist.streaming.loader import training_batches
from karmma_dist.streaming.order import Position, Schedule
from karmma_dist.streaming.prefetch import Ahead

shards, modalities, script = sys.argv[1], sys.argv[2].split(","), sys.argv[3]
exec(script)

def recipe(keep):
    dropout = {"probability": 0.3 if len(modalities) > 1 else 0.0}
    return DataRecipe.model_validate({
        "shards": shards, "modalities": modalities, "num_workers": 0, "keep_decoded": keep, "modality_dropout": dropout,
    })

def inputs(short_side):
    video = {"num_frames": 8, "short_side": short_side, "crop": 24, "jitter": 0.4}
    return InputRecipe.model_validate({"video": video, "audio": {"num_windows": 2, "window_s": 0.5, "num_mels": 16}})

def digest(batches):
    state = hashlib.sha256()
    for batch in batches:
        state.update(json.dumps([batch.keys, [str(damage) for damage in batch.damage]]).encode())
        for tensor in batch.tensors():
            state.update(tensor.numpy().tobytes())
    return state.hexdigest()

folder = open_shards(recipe(0))
training = TrainingClips(folder, recipe(0), inputs(32), seed=3, batch_size=8)
kept = EvaluationClips(folder, recipe(2**22), inputs(40), "validation")
schedule = Schedule(len(training.clips), batch_size=8)

def epoch(number):
    return digest(Ahead(training_batches(training, schedule, 0, Position(number, 0), number + 1), lambda b: lambda: b))

def validation(_):
    return digest(evaluation_batches(kept, 4))

def other_size(number):
    clips = EvaluationClips(folder, recipe(0), inputs(26 + 6 * number), "validation")
    return digest(evaluation_batches(clips, 4))

tasks = [(epoch, 0), (validation, 0), (epoch, 1), (other_size, 0), (other_size, 1), (validation, 1)]
alone = [task(number) for task, number in tasks]
barrier = threading.Barrier(len(tasks))
sys.setswitchinterval(1e-6)  # threads alternate at every turn

def at_once(task, number):
    barrier.wait()
    return task(number)

kept._decoded = type(kept._decoded)(2**22)  # the threads fill it together
with ThreadPoolExecutor(len(tasks)) as pool:
    for turn in range(2):
        together = list(pool.map(lambda task: at_once(*task), tasks))
        assert together == alone, (turn, [a == b for a, b in zip(together, alone)])
arrays = kept._decoded._arrays.values()
assert kept._decoded.num_bytes == sum(array.nbytes for array in arrays), "counted twice"
print("equal")
"""


@pytest.mark.parametrize("modalities", ["audio", "video,flow,audio"])
def test_threads_that_decode_at_once_get_what_each_gets_alone(shards: Path, modalities: str) -> None:
    command = [sys.executable, "-X", "faulthandler", "-c", THREADS, str(shards), modalities, ""]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANGS_S)
    assert (done.returncode, done.stdout) == (0, "equal\n"), done.stderr
