"""What a training step costs when frozen models are remembered: a teacher's answers, and the tokens of encoders.

    python tests/benchmarks/memories.py [--repeats N] [--threads N]

answers  a distillation step (recipes/epic_kitchens/distill.yaml, batch 8, modality dropout 0.5, short clips of few
         pixels) with the teacher's answers read from a full memory, and with answers that are stored, against the step
         whose teacher is asked. The soft targets are the same, which is checked first.
tokens   a step of the teacher with the tokens of its encoders read from a full memory, and with tokens that are stored,
         against the step that encodes; and reading the tokens against running the encoders.

Arms run in turn in one process; medians and ratios are printed. Without CUDA seconds are of CPU time, on one thread.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from training import (
    HEADS,
    SHORT_CLIPS,
    epic_recipe,
    make_teacher,
    plain_step,
    print_ratio,
    seconds_in_turn,
    synthetic_batch,
)

from karmma_dist.memory.header import MemoryHeader, open_header
from karmma_dist.memory.memory import AnswerMemory, Source
from karmma_dist.memory.tokens import TokenMemory
from karmma_dist.models.karmma import KarmmaModel
from karmma_dist.streaming.batch import Batch, RememberedTokens
from karmma_dist.training.memories.encoder_tokens import EncoderMemories
from karmma_dist.training.memories.teacher_answers import TeacherMemory
from karmma_dist.training.objectives import CrossEntropy, Distillation, soft_targets_of
from karmma_dist.training.teacher import Teacher

SHARD = "train-000000.tar"
SIZE = 8
"""Clips of a batch."""


def bench_answers(repeats: int, device: torch.device) -> None:
    """A remembered teacher, and one whose answers are stored, against one that is asked."""
    recipe = epic_recipe(f"training.batch_size={SIZE}", *SHORT_CLIPS)
    assert recipe.distill is not None
    torch.manual_seed(0)
    student = KarmmaModel(recipe.model, recipe.inputs, recipe.data.modalities, HEADS).to(device)
    teacher = Teacher([make_teacher(recipe)], recipe.data.modalities, {head: [0.0] for head in HEADS}, recipe.distill)
    teacher.eval().to(device)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-6)
    batch = _batch(device)
    with tempfile.TemporaryDirectory() as folder:
        header = MemoryHeader("logits", "float32", (1, sum(HEADS.values())), {SHARD: SIZE}, SIZE, {})
        memory = AnswerMemory(Path(folder), header)
        storing = TeacherMemory(memory, None)
        arms = {
            "asked": soft_targets_of(teacher),
            "asked and stored": soft_targets_of(teacher, storing),
            "remembered": soft_targets_of(teacher, TeacherMemory(memory, None)),
        }

        def step(name: str) -> None:
            if name == "asked and stored":
                _forget(Path(folder), [memory, storing])
            if name == "remembered":
                kept_BM = batch.present_BM.numpy()
                found = [memory.find(source, kept_BM[row], kept_BM[row]) for row, source in enumerate(batch.sources)]
                batch.answers_BEA = torch.stack([answer for answer in found if answer is not None]).to(device)
            plain_step(student, Distillation(recipe.distill, arms[name]), optimizer, batch)
            storing.flush()
            batch.answers_BEA = None

        taught = {name: soft_targets(batch) for name, soft_targets in list(arms.items())[:2]}
        assert all(torch.equal(taught["asked"][head], taught["asked and stored"][head]) for head in HEADS)
        seconds = seconds_in_turn({name: partial(step, name) for name in arms}, repeats, device)
    print(f"distillation step, batch {SIZE}, {repeats} repeats in turn")
    print_ratio(seconds, "remembered", "asked")
    print_ratio(seconds, "asked and stored", "asked")


def bench_tokens(repeats: int, device: torch.device) -> None:
    """A teacher's step whose encoders are remembered, and one that stores their tokens, against one that encodes."""
    recipe = epic_recipe(f"training.batch_size={SIZE}", *SHORT_CLIPS)
    torch.manual_seed(0)
    teacher = make_teacher(recipe).to(device).train()
    trained = [parameter for name, parameter in teacher.named_parameters() if not name.startswith("encoders.")]
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained, lr=1e-6)
    batch, modalities = _batch(device), recipe.data.modalities
    with tempfile.TemporaryDirectory() as folder:
        memories = {m: _token_memory(Path(folder) / m, teacher, m) for m in modalities}
        encoders = EncoderMemories(memories, torch.float32, None)

        def step(name: str) -> None:
            if name == "encoded and stored":
                _forget(Path(folder), [*memories.values(), encoders])
            seen = _remembered(memories, batch, device) if name == "remembered" else batch
            known = None if name == "encoded" else encoders.known(seen, modalities)
            loss, _ = CrossEntropy().loss(teacher(seen.inputs, seen.present_BM, known), seen)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            encoders.flush()

        def encode() -> None:
            with torch.no_grad():
                for modality, x in batch.inputs.items():
                    teacher.encoders[modality](x)

        def read() -> None:
            for known in encoders.known(_remembered(memories, batch, device), modalities).values():
                known.complete(None)

        arms: dict[str, Callable[[], object]] = {
            "encoded": partial(step, "encoded"), "encoded and stored": partial(step, "encoded and stored"),
            "remembered": partial(step, "remembered"), "encoders alone": encode, "reading alone": read,
        }  # fmt: skip
        seconds = seconds_in_turn(arms, repeats, device)
    print(f"teacher's step, batch {SIZE}, {repeats} repeats in turn")
    print_ratio(seconds, "remembered", "encoded")
    print_ratio(seconds, "encoded and stored", "encoded")
    print_ratio(seconds, "reading alone", "encoders alone")


def _batch(device: torch.device) -> Batch:
    recipe = epic_recipe(f"training.batch_size={SIZE}", *SHORT_CLIPS)
    return replace(
        synthetic_batch(recipe, SIZE, device, torch.float32), sources=[Source(0, SHARD, row) for row in range(SIZE)]
    )


def _token_memory(folder: Path, teacher: KarmmaModel, modality: str) -> TokenMemory:
    shape = (teacher.num_tokens[modality], teacher.encoder_width(modality))
    header = MemoryHeader("tokens", "bfloat16", shape, {SHARD: SIZE}, SIZE, {})
    open_header(folder, header)
    return TokenMemory(folder, header)


def _remembered(memories: dict[str, TokenMemory], batch: Batch, device: torch.device) -> Batch:
    """Return the batch with remembered tokens in the place of arrays."""
    tokens = {}
    for m, (modality, memory) in enumerate(memories.items()):
        sources = [source for source, present in zip(batch.sources, batch.present_BM[:, m], strict=True) if present]
        packed: list[Tensor] = [found for source in sources if (found := memory.find(source)) is not None]
        assert len(packed) == len(sources)
        if packed:
            known = torch.ones(len(packed), dtype=torch.bool)
            tokens[modality] = RememberedTokens(known, torch.stack(packed).to(device))
    return replace(batch, inputs={}, tokens=tokens)


def _forget(folder: Path, opened: list[AnswerMemory | TokenMemory | TeacherMemory | EncoderMemories]) -> None:
    """Empty the files of memories, so that their answers are stored anew."""
    for memory in opened:
        memory.close()
    for path in folder.rglob("*.answers"):
        path.unlink()


def main() -> None:
    """Run the arms."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="of torch on the CPU")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{torch.get_num_threads()} threads, load before {os.getloadavg()[0]:.1f}")
    bench_answers(arguments.repeats, device)
    bench_tokens(arguments.repeats, device)
    print(f"load after {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
