"""Every subset and drop probability in one encoder pass, against one pass per condition; same answers, both in turn.

    python tests/benchmarks/one_pass_evaluation.py [--repeats N] [--clips N]

Random weights and random inputs: the cost does not depend on what is in them. Prints CPU seconds, medians and ratios.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from karmma_dist.evaluation.conditions import build_conditions
from karmma_dist.evaluation.evaluate import evaluate
from karmma_dist.models.karmma import KarmmaModel
from karmma_dist.models.layout import input_shape
from karmma_dist.recipe import EncoderRecipe, InputRecipe, ModelRecipe
from karmma_dist.streaming.batch import Batch

MODALITIES = ("video", "flow", "audio")
HEADS = {"verb": 97, "noun": 300}
INPUTS = InputRecipe.model_validate(
    {
        "video": {"num_frames": 16, "short_side": 64, "crop": 64},
        "audio": {"num_windows": 1, "window_s": 2.4, "num_mels": 64},
    }
)


def make_model() -> KarmmaModel:
    """A student with small encoders and the published fusion block."""
    names = {"video": "small_video", "flow": "small_video", "audio": "small_audio"}
    encoders = {modality: EncoderRecipe(name=name) for modality, name in names.items()}
    torch.manual_seed(0)
    return KarmmaModel(ModelRecipe(encoders=encoders), INPUTS, MODALITIES, HEADS)


def make_batches(num_clips: int, batch_size: int = 16) -> list[Batch]:
    """Random clips that have everything."""
    batches = []
    for start in range(0, num_clips, batch_size):
        size = min(batch_size, num_clips - start)
        batches.append(
            Batch(
                keys=[f"clip_{start + row}" for row in range(size)],
                present_BM=torch.ones(size, len(MODALITIES), dtype=torch.bool),
                inputs={m: torch.randn(size, *input_shape(m, INPUTS)) for m in MODALITIES},
                labels={head: torch.randint(0, num, (size,)) for head, num in HEADS.items()},
                valid_B=torch.ones(size, dtype=torch.bool),
                jitter_N3=torch.ones(size, 3),
            )
        )
    return batches


def main() -> None:
    """Run the arms in turn and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--clips", type=int, default=32)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, batches = make_model(), make_batches(arguments.clips)
    everything = build_conditions(MODALITIES)
    conditions = build_conditions(MODALITIES, subsets=True, sweep=True, num_seeds=3)
    arms = {
        "everything present": lambda: evaluate(model, batches, everything, device="cpu").rows,
        "one pass, all conditions": lambda: evaluate(model, batches, conditions, device="cpu").rows,
        "one pass per condition": lambda: [
            evaluate(model, batches, [condition], device="cpu").rows[0] for condition in conditions
        ],
    }
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    answers = {}
    for _ in range(arguments.repeats):
        for name, arm in arms.items():
            started = time.process_time()
            answers[name] = arm()
            seconds[name].append(time.process_time() - started)
    if answers["one pass, all conditions"] != answers["one pass per condition"]:
        raise SystemExit("the two ways differ: do not believe the figures below")
    base = statistics.median(seconds["everything present"])
    print(f"{len(conditions)} conditions, {arguments.clips} clips, CPU seconds of {arguments.repeats} runs in turn")
    for name, values in seconds.items():
        median = statistics.median(values)
        spread = f"min {min(values):.2f}, max {max(values):.2f}"
        print(f"{name:28} median {median:8.2f} s  {median / base:6.2f} x  ({spread})")


if __name__ == "__main__":
    main()
