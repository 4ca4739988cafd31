"""Trains: joins the ranks, and for each recipe of a chain streams batches, steps, validates, saves, writes weights.

    runs/NAME/
      recipe.yaml  state.json  metrics.jsonl  events.out.tfevents.*  damage.jsonl  ensemble.json  trace/
      checkpoints/step-N/      to resume from
      weights.safetensors      model.yaml         to evaluate and to teach with
      best/                    the same, of the best validation
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch
from torch import nn

from karmma_dist.distributed.collectives import barrier, gather, highest, mean_over_ranks, store
from karmma_dist.distributed.graph_check import GraphCheck
from karmma_dist.distributed.heartbeat import START_S, mark
from karmma_dist.distributed.process_group import process_group
from karmma_dist.distributed.world import World, find_world
from karmma_dist.errors import Stopped
from karmma_dist.models.karmma import KarmmaModel
from karmma_dist.models.model_card import save_model
from karmma_dist.models.weights import build_model
from karmma_dist.progress import Progress, Report, silent
from karmma_dist.recipe import Recipe
from karmma_dist.recipe.micro_batches import check_batches, divide_batch
from karmma_dist.runs.folder import finished_names, read_state, validation_at, write_state
from karmma_dist.seeding import forward_seed
from karmma_dist.shards.folder import ShardFolder
from karmma_dist.streaming.batch import Batch, prepare
from karmma_dist.streaming.loader import TrainingClips, check_heads, open_shards, training_batches
from karmma_dist.streaming.order import Position, Schedule
from karmma_dist.streaming.prefetch import on_device
from karmma_dist.training.checkpoint.async_saver import Saver
from karmma_dist.training.checkpoint.best import BestWeights
from karmma_dist.training.checkpoint.checkpoint import data_state, load_checkpoint
from karmma_dist.training.checkpoint.resume import prepare_run_dir
from karmma_dist.training.engine import Engine, Update, whole_model
from karmma_dist.training.fault_tolerance.damaged_clips import DamageLog
from karmma_dist.training.fault_tolerance.preemption import Interruption, Stop, refuse_stop_file
from karmma_dist.training.fault_tolerance.skipped_steps import Skips, Suspect, describe
from karmma_dist.training.objectives import build_objective, soft_targets_of
from karmma_dist.training.optim import learning_rate
from karmma_dist.training.profiler import tracing
from karmma_dist.training.teacher import build_teacher, members_of
from karmma_dist.training.throughput import Throughput
from karmma_dist.training.trackers import RunLog
from karmma_dist.training.tracking import Averages, loading_sums, pace

_logger = logging.getLogger(__name__)


class Validate(Protocol):
    """Measures a model on the recipe's validation split."""

    def metrics(self, heads: Collection[str]) -> Mapping[str, bool]:
        """Return the names of what it measures, the one that models are compared by first; True if less is better."""

    def __call__(self, model: nn.Module, recipe: Recipe, world: World, between: Callable[[], None]) -> dict[str, float]:
        """Return the metrics in that order; every rank calls it and gets the same numbers.

        It calls `between` now and then, equally often on every rank, and lets through what that raises.
        """



def train(
    recipe: Recipe,
    world: World,
    validate: Validate,
    *,
    resume: str = "auto",
    report: Report = silent,
    interruption: Interruption | None = None,
) -> dict[str, float]:
    """Train to the end of the recipe, resuming where an earlier call was cut off. Every rank must call this.

    Args:
        recipe: the run.
        world: this rank; `engine.process_group` must be open.
        validate: measures the model.
        resume: "auto" continues from the newest checkpoint, "never" starts over, a path resumes from that checkpoint.
        report: progress, on the main rank.
        interruption: what may stop it early; None: only a file STOP.

    Returns:
        The last validation's metrics.

    Raises:
        UserError: bad shards, another recipe in the run folder, a teacher that does not fit, too much damage, too many
            steps that are not finite, ranks whose graphs differ, a file STOP in the run folder.
        Stopped: interrupted, after saving.
    """
    refuse_stop_file(recipe.run_dir)
    folder = open_shards(recipe.data)
    check_heads(recipe.data, folder)
    start = prepare_run_dir(recipe, world, resume, report)
    if start == "finished":
        report(f"train {recipe.name}", 1, 1, "already finished (start over with --resume never)")
        return dict(read_state(recipe.run_dir).get("metrics", {}))
    trainer = Trainer(recipe, world, folder, validate, report, interruption or Interruption(world.rank, None, highest))
    if start:
        trainer.resume(Path(start))
    try:
        return trainer.run()
    except BaseException as error:
        if world.is_main and not isinstance(error, Stopped):
            state = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            write_state(recipe.run_dir, state, error=f"{type(error).__name__}: {error}")
        raise
    finally:
        trainer.saver.close()


class _StopAsked(Exception):
    """Leaves validation, on every rank at the same batch."""

    def __init__(self, stop: Stop) -> None:
        self.stop = stop


@dataclass(frozen=True)
class ForwardPass:
    """What one forward and backward pass leaves behind."""

    keys: list[str]
    values: dict[str, Any]
    """For the log: floats and 0-d tensors, `loss` among them."""
    update: Update


class Trainer:
    """Everything one rank holds while it trains."""

    def __init__(
        self,
        recipe: Recipe,
        world: World,
        folder: ShardFolder,
        validate: Validate,
        report: Report,
        interruption: Interruption,
    ) -> None:
        self.recipe, self.world, self.validate, self.report = recipe, world, validate, report
        self.interruption = interruption
        if recipe.training.threads:
            torch.set_num_threads(recipe.training.threads)
        self.clips = TrainingClips(
            folder, recipe.data, recipe.inputs, recipe.seed, recipe.training.batch_size, recipe.modalities
        )
        self.division = divide_batch(recipe, world.size)
        self.schedule = Schedule(
            len(self.clips.clips), recipe.training.batch_size, world.size, self.division.accumulation
        )
        self.steps_per_epoch = self.schedule.steps_per_epoch
        self.total_steps = self.steps_per_epoch * recipe.training.epochs
        self.classes = folder.classes
        self.data_state = data_state(recipe, folder)
        self.best = BestWeights(recipe, self.classes, validate.metrics(self.classes))
        self.engine = Engine(build_model(recipe, self.classes, report, world.is_main), recipe, world)
        heads = {head: len(names) for head, names in self.classes.items()}
        teacher = None
        if recipe.distill is not None:
            teacher = build_teacher(
                recipe, heads, self.engine, world, lambda model, changed: validate(model, changed, world, lambda: None)
            )
        self.objective = build_objective(recipe, None if teacher is None else soft_targets_of(teacher))
        assert isinstance(self.engine.model, KarmmaModel)
        self.throughput = Throughput(
            self.engine.model, [] if teacher is None else members_of(teacher), self.engine.device, self.engine.dtype,
            recipe.training.peak_tflops, say=world.is_main,
        )  # fmt: skip
        self.position = Position(0, 0)
        self._is_warm = False
        self.saver = Saver(recipe, world, self.steps_per_epoch, self.data_state)
        self.damage = DamageLog(recipe.run_dir, len(self.clips.clips), recipe.data.max_damaged_fraction, world.rank)
        self.averages = Averages()
        self.skips = Skips(recipe.training.max_skipped_steps, gather, self.engine.dtype == torch.float16)
        self.graph_check = GraphCheck(
            self.engine.model, store(), world.rank, world.size, recipe.training.guard_every_steps,
            gathers=recipe.training.zero_stage == 3,
        )  # fmt: skip
        self.metrics: dict[str, float] = {}
        self.resumed = ""

    def resume(self, checkpoint: Path) -> None:
        """Continue from a checkpoint."""
        saved = load_checkpoint(self.engine, checkpoint, self.recipe, self.world, self.data_state)
        self.position, self.metrics = saved.position, saved.state["metrics"]
        accumulation = self.schedule.accumulation
        passes = Fraction(accumulation, saved.state.get("accumulation", accumulation))
        self.averages.restore(saved.averages, self.world.rank, self.world.size, passes)
        self.saver.total_s = saved.state["checkpoint_s"]
        self.resumed = saved.note
        self.damage.remember(gather(self.damage.written() if self.world.is_main else []))

    def run(self) -> dict[str, float]:
        """Train from the current position to the end; returns the last validation's metrics."""
        done = self.position.epoch * self.steps_per_epoch + self.position.step
        self.log = RunLog(self.recipe, done) if self.world.is_main else None
        left_out = self.schedule.dropped_clips
        notes = [f"{left_out} of {self.schedule.num_clips} clips left out of each epoch"] if left_out else []
        notes += [f"batch {self.division}"] if self.division.accumulation > 1 else []
        notes += [note for note in (self.division.warning, self.resumed) if note]
        self._say(done, f"({'; '.join(notes)})" if notes else "")
        loaded = training_batches(
            self.clips, self.schedule, self.world.rank, self.position, self.recipe.training.epochs
        )
        self.engine.model.train()
        try:
            self._catch_up(done)
            traced = self.recipe.training.profile_steps if self.world.is_main else None
            with (
                tracing(traced, self.recipe.run_dir, done, self.total_steps) as trace,
                on_device(loaded, self.engine.device) as batches,
            ):
                for step in range(done, self.total_steps):
                    trace.at(step)
                    self._step(batches, step, self.schedule.accumulation)
        finally:
            self.damage.flush()
        self.saver.finish()
        if self.log:
            self.log.close()
            write_state(
                self.recipe.run_dir, "finished", step=self.total_steps, metrics=self.metrics, best=self.best.record,
                checkpoint_s=self.saver.total_s,
            )  # fmt: skip
        barrier()
        return self.metrics

    def _step(self, batches: Iterator[Batch], step: int, accumulation: int) -> None:
        """One optimizer step and what is due after it."""
        began = time.perf_counter()
        waited = flops = 0.0
        passes = []
        for micro in range(accumulation):
            asked = time.perf_counter()
            self._mark(f"waiting for a batch of step {step + 1}")
            batch = next(batches)
            waited += time.perf_counter() - asked
            self._mark(f"in the forward pass of step {step + 1}")
            self.damage.note(batch)
            self.averages.add(loading_sums(batch, self.recipe.data.modalities))
            flops += self.throughput.flops(batch)
            passes.append(self._forward_backward(batch, step * accumulation + micro, step))
        self._is_warm = True
        self._account(passes, step)
        seconds = time.perf_counter() - began
        self.averages.add({"wait_s": waited, "step_s": seconds, "flops": flops})
        self.interruption.took(step_s=seconds)
        self._after_step(step + 1)

    def _mark(self, doing: str) -> None:
        """Say what this rank does; a process's first step may take long: kernels are compiled, connections made."""
        mark(doing, None if self._is_warm else START_S)

    def _account(self, passes: list[ForwardPass], step: int) -> None:
        """Take the passes of an optimizer step into the averages, or write down that it was skipped.

        Raises:
            UserError: too many in a row were.
        """
        if not passes[-1].update.skipped:
            self.skips.applied()
            for one in passes:
                self.averages.add(one.values)
            return
        bad = [one for one in passes if not math.isfinite(float(one.values["loss"]))]
        clips = [key for one in bad or passes for key in one.keys]
        event = self.skips.note(Suspect(self.world.rank, not bad, clips))
        if self.log:
            self.log.write_event("skipped", step + 1, step // self.steps_per_epoch, **event)
            self._say(step + 1, f"skipped: {describe(event)}")
        self.skips.give_up_after_too_many(event)

    def _forward_backward(self, raw: Batch, forward: int, step: int) -> ForwardPass:
        """One forward and backward pass; the last of an accumulation updates the parameters."""
        torch.manual_seed(forward_seed(self.recipe.seed, forward, self.world.rank, self.world.size))
        batch = prepare(raw, self.recipe.inputs, self.engine.device, self.engine.dtype)
        checked = self.graph_check.is_due(step)
        with self.graph_check.forward() if checked else contextlib.nullcontext():
            logits = self.engine.forward(*batch.only(self.recipe.modalities, self.recipe.data.modalities))
        loss, parts = self.objective.loss(logits, batch)
        if checked:
            self.graph_check.check(loss)
        self._mark(f"reducing the gradients of step {step + 1}")  # a rank that is not here yet keeps the others waiting
        self.engine.backward(loss)
        lr = learning_rate(
            self.recipe.optimizer, step, self.steps_per_epoch, self.total_steps, self.recipe.training.batch_size
        )
        update = self.engine.step(lr)
        shares = batch.present_BM.float().mean(dim=0).unbind()
        present = {f"present_{m}": share for m, share in zip(self.recipe.data.modalities, shares, strict=True)}
        extra = {"lr": lr} if update.norm is None else {"lr": lr, "grad_norm": update.norm}
        return ForwardPass(raw.keys, {"loss": loss.detach(), **parts, **present, **extra}, update)

    def _after_step(self, done: int) -> None:
        """Log, validate and save where they are due after `done` optimizer steps.

        Raises:
            Stopped: interrupted, after saving.
        """
        training = self.recipe.training
        epoch, step = divmod(done, self.steps_per_epoch)
        self._mark(f"after step {done}")
        self.saver.look()
        stop = self.interruption.agree(self.recipe.run_dir)
        if done % training.log_every_steps == 0 or step == 0:
            self._write_metrics(done)
        self._say(done)
        if stop:
            self._stop(stop, done)
        every_steps = training.checkpoint_every_steps
        save = bool(every_steps and done % every_steps == 0)
        if step:
            if save:
                self.save_now(done)
            return
        if self._is_validated_after(done):
            self._validate(done)
        if save or done == self.total_steps or epoch % training.checkpoint_every_epochs == 0:
            self.save_now(done)

    def _is_validated_after(self, done: int) -> bool:
        epoch, step = divmod(done, self.steps_per_epoch)
        every = self.recipe.training.validate_every_epochs
        return step == 0 and (done == self.total_steps or bool(every and epoch and epoch % every == 0))

    def _catch_up(self, done: int) -> None:
        """On resuming where a validation is due: take its numbers from the log, or do it, if that was cut off."""
        if not done or not self._is_validated_after(done):
            return
        known = gather([validation_at(self.recipe.run_dir, done)] if self.world.is_main else [])[0]
        if known is None:
            self._validate(done)
        else:
            self.metrics = known

    def save_now(self, done: int, *, wait: bool = False) -> None:
        """Save after `done` optimizer steps, between any two of them. Every rank must call this.

        Args:
            done: optimizer steps since the beginning of the run.
            wait: return when the checkpoint is whole; else it is written while training goes on.
        """
        began = time.monotonic()
        mark("saving", START_S)
        self.damage.share(gather(self.damage.take()))  # a resumed run does not meet these clips again
        passes = {"accumulation": self.schedule.accumulation}
        state = {"metrics": self.metrics, "checkpoint_s": self.saver.total_s, **passes}
        self.saver.save(self.engine, done, self.averages.state(), state)
        if wait:
            self.saver.finish()
        self.interruption.took(save_s=time.monotonic() - began)

    def _stop(self, stop: Stop, done: int) -> NoReturn:
        """Save and leave, on every rank."""
        self.save_now(done, wait=True)
        why = f"{stop.reason} on rank {stop.rank}"
        if self.log:
            self.log.close()
            write_state(self.recipe.run_dir, stop.state, why=why, reason=stop.reason, rank=stop.rank, step=done)
        raise Stopped(
            f"{self.recipe.name}: {stop.state} by {why} after step {done} of {self.total_steps}, saved: {stop.advice}",
            stop.exit_code,
        )

    def _write_metrics(self, done: int) -> None:
        values = mean_over_ranks(
            {
                **self.averages.take(),
                "damage_noted": float(self.damage.num_noted),
                "checkpoint_s": self.saver.take_seconds(),
                "checkpoint_failed": float(self.saver.failed),
            }
        )
        if values.pop("checkpoint_failed"):
            self.saver.finish()
        if values.pop("damage_noted"):
            self.damage.share(gather(self.damage.take()))
        seconds, flops = values.pop("step_s"), values.pop("flops")
        values |= self.throughput.metrics(flops, seconds)
        values["peak_memory_gb"] = max(gather([self.throughput.peak_memory_gb()]))
        values |= pace(values, seconds, self.recipe)
        values["damaged_clips"] = float(self.damage.num_damaged)
        self.latest = values
        if self.log:
            self.log.write("train", done, (done - 1) // self.steps_per_epoch, values)

    def _validate(self, done: int) -> None:
        """Measure the model and write its weights.

        Raises:
            Stopped: interrupted; the validation is done when the run is resumed.
        """
        model = whole_model(self.engine, self.recipe, self.classes)
        try:
            self.metrics = self.validate(model, self.recipe, self.world, self._between_batches)
        except _StopAsked as asked:
            self._stop(asked.stop, done)
        if self.log:
            self.log.write("validation", done, (done - 1) // self.steps_per_epoch, self.metrics)
            save_model(model, self.recipe.run_dir, recipe=self.recipe, classes=self.classes)
            self.best.offer(model, self.metrics, done, (done - 1) // self.steps_per_epoch)
        barrier()
        self.engine.model.train()

    def _between_batches(self) -> None:
        mark("validating", START_S)
        if stop := self.interruption.agree(self.recipe.run_dir):
            raise _StopAsked(stop)

    def _say(self, done: int, also: str = "") -> None:
        if not self.world.is_main:
            return
        loss = getattr(self, "latest", {}).get("loss")
        seen = f"epoch {done // self.steps_per_epoch}/{self.recipe.training.epochs}"
        scores = " ".join(f"{name} {value:.1f}" for name, value in itertools.islice(self.metrics.items(), 1))
        note = f"{seen} loss {loss:.3f} {scores}" if loss is not None else seen
        self.report(f"train {self.recipe.name}", done, self.total_steps, f"{note} {also}".rstrip())


def train_chain(
    chain: Sequence[Recipe],
    validate: Validate,
    resume: str = "auto",
    report: Report | None = None,
    deadline: float | None = None,
) -> dict[str, dict[str, float]]:
    """Train recipes one after the other on the ranks that the environment describes. Every rank must call this.

    What an earlier recipe of the chain has finished is taken as it is, whatever the settings it was trained with;
    `resume` holds for the last recipe.

    Args:
        chain: recipes, each after those it builds on.
        validate: measures a model in training.
        resume: "auto", "never" or a checkpoint.
        report: progress; None: this process's own. Only rank 0 reports.
        deadline: `time.monotonic()` by which the ranks should have saved and ended; None: no limit.

    Returns:
        Each run's last validation, on rank 0; nothing on the others.

    Raises:
        UserError: bad input, see `loop.train`; or a batch that the ranks do not divide.
        Stopped: by a signal, the deadline or a file STOP, after saving; or another rank is gone.
    """
    world = find_world(os.environ)
    last = chain[-1]
    taken = finished_names(chain) if resume == "auto" else finished_names(chain[:-1])
    check_batches(chain, world.size, taken)  # before the first is trained, and before any rank waits for another
    with contextlib.ExitStack() as stack:
        stack.enter_context(process_group(world, last.training.collective_timeout_s, partial(_note_loss, chain, world)))
        interruption = stack.enter_context(Interruption(world.rank, deadline, highest))
        shown = silent if not world.is_main else report or stack.enter_context(Progress())
        scores = {}
        for recipe in chain[:-1]:
            scores[recipe.name] = _train_unless_finished(recipe, world, validate, shown, interruption)
        scores[last.name] = train(last, world, validate, resume=resume, report=shown, interruption=interruption)
        return scores if world.is_main else {}


def _note_loss(chain: Sequence[Recipe], world: World, why: str) -> None:
    """Write down in the run that is being trained that another rank is gone."""
    for recipe in chain if world.is_main else ():
        if read_state(recipe.run_dir).get("state") == "running":
            write_state(recipe.run_dir, "failed", error=why)


def _train_unless_finished(
    recipe: Recipe, world: World, validate: Validate, report: Report, interruption: Interruption
) -> dict[str, float]:
    state = read_state(recipe.run_dir)
    barrier()  # every rank has looked before any trains
    if state.get("state") == "finished":
        report(f"train {recipe.name}", 1, 1, f"already finished in {recipe.run_dir}")
        return dict(state["metrics"])
    return train(recipe, world, validate, report=report, interruption=interruption)
