"""Every subset and drop probability in one encoder pass, against the naive way; same answers, all arms in turn.

    python tests/benchmarks/one_pass_evaluation.py [RECIPE] [--repeats N] [--clips N] [--naive N] [--set K=V]

RECIPE is a recipe whose model is built with random weights (`epic_kitchens/distill` at its full clip size, or
`grid_epic/distill --set "data.heads={verb: 4, noun: 10}"`; 97 verbs and 300 nouns where it leaves the classes to its
shards); without it, a student with small encoders and the published fusion block. Inputs are random: the cost does not
depend on what is in them. The naive way takes away what a condition drops and runs the model on the rest, once per
condition. `--naive N` runs it on the first N clips only (0: not at all) and scales by clips. Prints CPU seconds on one
thread, medians and ratios, and how often each way runs an encoder. Nothing is decoded: where clips are, the one pass
costs even less by comparison.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from karmma_dist.evaluation.conditions import Condition, build_conditions, keep
from karmma_dist.evaluation.evaluate import evaluate
from karmma_dist.evaluation.metrics import find_figure
from karmma_dist.evaluation.results import ResultRow
from karmma_dist.models.encoders.table import input_shape
from karmma_dist.models.karmma import KarmmaModel
from karmma_dist.recipe import EncoderRecipe, InputRecipe, ModelRecipe, load_recipe
from karmma_dist.streaming.batch import Batch

MODALITIES = ("video", "flow", "audio")
HEADS = {"verb": 97, "noun": 300}
INPUTS = InputRecipe.model_validate(
    {
        "video": {"num_frames": 16, "short_side": 64, "crop": 64},
        "audio": {"num_windows": 1, "window_s": 2.4, "num_mels": 64},
    }
)


def make_model(recipe: str | None, overrides: list[str]) -> KarmmaModel:
    """The recipe's model, or a student with small encoders and the published fusion block."""
    torch.manual_seed(0)
    if recipe is not None:
        loaded = load_recipe(recipe, overrides)
        return KarmmaModel(loaded.model, loaded.inputs, loaded.data.modalities, loaded.data.heads or HEADS)
    names = {"video": "small_video", "flow": "small_video", "audio": "small_audio"}
    encoders = {modality: EncoderRecipe(name=name) for modality, name in names.items()}
    return KarmmaModel(ModelRecipe(encoders=encoders), INPUTS, MODALITIES, HEADS)


def make_batches(model: KarmmaModel, num_clips: int, batch_size: int) -> list[Batch]:
    """Random clips that have everything."""
    batches = []
    for start in range(0, num_clips, batch_size):
        size = min(batch_size, num_clips - start)
        batches.append(
            Batch(
                keys=[f"clip_{start + row}" for row in range(size)],
                present_BM=torch.ones(size, len(model.modalities), dtype=torch.bool),
                inputs={m: torch.randn(size, *input_shape(m, model.inputs)) for m in model.modalities},
                labels={head: torch.randint(0, num, (size,)) for head, num in model.heads.items()},
                valid_B=torch.ones(size, dtype=torch.bool),
                jitter={},
            )
        )
    return batches


def only_kept(batch: Batch, condition: Condition, modalities: Sequence[str]) -> Batch:
    """The batch as if what the condition drops had never been recorded."""
    keep_BM = keep(condition, batch.keys, batch.present_BM, modalities)
    inputs = {m: batch.inputs[m][keep_BM[:, c]] for c, m in enumerate(modalities) if bool(keep_BM[:, c].any())}
    return replace(batch, present_BM=keep_BM, inputs=inputs)


def answers(rows: list[ResultRow]) -> list[tuple[int, dict[str, float | None]]]:
    """What both ways must agree on, to the last digit: counts and accuracies. Losses differ by rounding."""
    return [
        (row.num_clips, {name: value for name, value in row.figures.items() if find_figure(name).metric.right})
        for row in rows
    ]


def encoder_runs(batches: list[Batch], conditions: list[Condition], modalities: Sequence[str]) -> int:
    """Clips that the naive way encodes, over all modalities and conditions."""
    kept = [keep(condition, b.keys, b.present_BM, modalities) for condition in conditions for b in batches]
    return sum(int(keep_BM.sum()) for keep_BM in kept)


def main() -> None:
    """Run the arms in turn and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", nargs="?")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--clips", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--naive", type=int)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="K=V")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = make_model(arguments.recipe, arguments.overrides)
    names = model.modalities
    batches = make_batches(model, arguments.clips, arguments.batch_size)
    num_naive = arguments.clips if arguments.naive is None else min(arguments.naive, arguments.clips)
    naive_batches = [first_rows(b, num_naive - n * arguments.batch_size) for n, b in enumerate(batches)]
    naive_batches = [b for b in naive_batches if b.keys]
    everything = build_conditions(names)
    conditions = build_conditions(names, subsets=True, sweep=True, num_seeds=3)

    def naive() -> list[ResultRow]:
        return [
            evaluate(model, [only_kept(b, one, names) for b in naive_batches], everything, device="cpu").rows[0]
            for one in conditions
        ]

    arms: dict[str, tuple[Callable[[], list[ResultRow]], float]] = {
        "everything present": (lambda: evaluate(model, batches, everything, device="cpu").rows, 1.0),
        "one pass, all conditions": (lambda: evaluate(model, batches, conditions, device="cpu").rows, 1.0),
    }
    if num_naive:
        arms["naive, once per condition"] = (naive, arguments.clips / num_naive)
    print(f"{arguments.recipe or 'small student'}: {len(conditions)} conditions, {arguments.clips} clips, CPU seconds")
    print(f"of {arguments.repeats} runs in turn on one thread; load before: {os.getloadavg()[0]:.1f}", flush=True)
    evaluate(model, [first_rows(batches[0], 1)], everything, device="cpu")  # what the first call alone pays for
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(arguments.repeats):
        for name, (arm, scale) in arms.items():
            started = time.process_time()
            rows = arm()
            seconds[name].append((time.process_time() - started) * scale)
            if arm is naive and answers(rows) != answers(
                evaluate(model, naive_batches, conditions, device="cpu").rows
            ):
                raise SystemExit("the two ways differ: do not believe the figures below")
    base = statistics.median(seconds["everything present"])
    for name, values in seconds.items():
        median = statistics.median(values)
        spread = f"min {min(values):.2f}, max {max(values):.2f}"
        print(f"{name:28} median {median:8.2f} s  {median / base:6.2f} x  ({spread})")
    ratio = encoder_runs(batches, conditions, names) / (arguments.clips * len(names))
    scaled = f"; timed on {num_naive} clips" if num_naive < arguments.clips else ""
    print(f"encoder runs, naive over one pass: {ratio:.2f} x{scaled}; load after: {os.getloadavg()[0]:.1f}")


def first_rows(batch: Batch, num: int) -> Batch:
    """At most the first `num` clips of a batch in which every clip has everything."""
    part = slice(0, max(0, num))
    return replace(
        batch,
        keys=batch.keys[part],
        present_BM=batch.present_BM[part],
        inputs={name: values[part] for name, values in batch.inputs.items()},
        labels={head: values[part] for head, values in batch.labels.items()},
        valid_B=batch.valid_B[part],
    )


if __name__ == "__main__":
    main()
