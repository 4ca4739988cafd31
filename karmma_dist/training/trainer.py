"""The trainer: streams batches, updates, validates and saves, in a run folder that is its own.

    runs/NAME/
      recipe.yaml  state.json  metrics.jsonl  events.out.tfevents.*  damage.jsonl  ensemble.json  trace/
      checkpoints/step-N/      for resuming
      weights.safetensors      model.yaml         for evaluation, and for use as a teacher
      best/                    the same files for the best validation
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch
from torch import nn

from karmma_dist.distributed.collectives import (
    barrier,
    gather,
    highest,
    mean_over_ranks,
    raise_on_all,
    store,
    sum_over_ranks,
)
from karmma_dist.distributed.graph_check import GraphCheck
from karmma_dist.distributed.heartbeat import START_S, mark
from karmma_dist.distributed.world import World
from karmma_dist.errors import Stopped, UserError
from karmma_dist.models.karmma import KarmmaModel
from karmma_dist.models.model_card import save_model
from karmma_dist.models.running_sums import running_sums
from karmma_dist.models.weights import build_model
from karmma_dist.progress import Report, silent
from karmma_dist.recipe import Recipe
from karmma_dist.recipe.micro_batches import divide_batch
from karmma_dist.runs.folder import read_state, validation_at, write_state
from karmma_dist.runs.owner import Ownership
from karmma_dist.seeding import forward_seed
from karmma_dist.shards.mixture import Mixture
from karmma_dist.streaming.batch import Batch, prepare
from karmma_dist.streaming.loader import TrainingClips, check_heads, open_shards, training_batches
from karmma_dist.streaming.order import Position, Schedule
from karmma_dist.streaming.prefetch import on_device
from karmma_dist.training.checkpoint.async_saver import AsyncSaver
from karmma_dist.training.checkpoint.best import BestWeights
from karmma_dist.training.checkpoint.checkpoint import data_state, load_checkpoint
from karmma_dist.training.checkpoint.resume import own_run_dir, prepare_run_dir
from karmma_dist.training.engine import Engine, Update, dtype_of, full_model
from karmma_dist.training.fault_tolerance.damaged_clips import DamageLog
from karmma_dist.training.fault_tolerance.preemption import PreemptionHandler, Stop, refuse_stop_file
from karmma_dist.training.fault_tolerance.skipped_steps import RankStep, SkippedSteps, describe
from karmma_dist.training.memories.encoder_tokens import EncoderMemories, open_tokens
from karmma_dist.training.memories.teacher_answers import TeacherMemory, open_answers
from karmma_dist.training.objectives import build_objective, check_labels, soft_targets_of
from karmma_dist.training.optim import learning_rate
from karmma_dist.training.profiler import tracing
from karmma_dist.training.teacher import build_teacher, members_of
from karmma_dist.training.throughput import Throughput
from karmma_dist.training.trackers.run_log import RunLog
from karmma_dist.training.tracking import Averages, answer_sums, loading_sums, over_labelled, pace, token_sums


class Validate(Protocol):
    """A function that measures a model on the recipe's validation split."""

    def metrics(
        self, heads: Collection[str], datasets: Mapping[str, Collection[str]] | None = None
    ) -> Mapping[str, bool]:
        """Return the metrics by name, the one that models are compared by first; True if lower is better.

        Args:
            heads: Heads of the model.
            datasets: Heads of each dataset of a mixture, by name.
        """

    def __call__(self, model: nn.Module, recipe: Recipe, world: World, between: Callable[[], None]) -> dict[str, float]:
        """Return the metrics in that order. Every rank must call this, and gets the same numbers.

        It calls `between` from time to time, equally often on every rank, and does not catch its exceptions.
        """


def train(
    recipe: Recipe,
    world: World,
    validate: Validate,
    *,
    resume: str = "auto",
    report: Report = silent,
    preemption: PreemptionHandler | None = None,
) -> dict[str, float]:
    """Train to the end of the recipe, resuming an earlier, interrupted call. Every rank must call this.

    Args:
        recipe: the run's recipe.
        world: this rank; `process_group` must be open.
        validate: measures the model.
        resume: "auto" continues from the newest checkpoint, "never" starts over, a path resumes from that checkpoint.
        report: receives progress, on the main rank.
        preemption: reasons to stop early; None: only a file STOP.

    Returns:
        The metrics of the last validation.

    Raises:
        UserError: the shards are bad, a clip has no label, another process owns the run folder, it holds another recipe
            or a file STOP, the teacher does not fit, too many clips are damaged, too many steps or a parameter are not
            finite, or the ranks' graphs differ.
        Stopped: the run was stopped, after saving.
    """
    refuse_stop_file(recipe.run_dir)
    folder = open_shards(recipe.data)
    check_heads(recipe.data, folder)
    clips = TrainingClips(
        folder, recipe.data, recipe.inputs, recipe.seed, recipe.training.batch_size, recipe.modalities,
        recipe.model.num_views,
    )  # fmt: skip
    check_labels(recipe, folder, clips.clips, world)
    with own_run_dir(recipe, world, report) as ownership:
        start = prepare_run_dir(recipe, world, resume, report)
        if start == "finished":
            report(f"train {recipe.name}", 1, 1, "already finished (start over with --resume never)")
            return dict(read_state(recipe.run_dir).get("metrics", {}))
        preemption = preemption or PreemptionHandler(world.rank, None, highest)
        trainer = Trainer(recipe, world, clips, validate, report, preemption, ownership)
        if start:
            trainer.resume(Path(start))
        try:
            return trainer.run()
        except BaseException as error:
            if ownership and not ownership.is_lost and not isinstance(error, Stopped):
                state = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
                write_state(recipe.run_dir, state, error=f"{type(error).__name__}: {error}")
            raise
        finally:
            trainer.saver.close()


class _StopRequested(Exception):
    """Raised to leave validation, on every rank at the same batch."""

    def __init__(self, stop: Stop) -> None:
        self.stop = stop


@dataclass(frozen=True)
class ForwardPass:
    """The results of one forward and backward pass."""

    keys: list[str]
    values: dict[str, Any]
    """Values for the log: floats and 0-d tensors, including `loss`."""
    update: Update


class Trainer:
    """The state of one rank during training."""

    def __init__(
        self,
        recipe: Recipe,
        world: World,
        clips: TrainingClips,
        validate: Validate,
        report: Report,
        preemption: PreemptionHandler,
        ownership: Ownership | None,
    ) -> None:
        self.recipe, self.world, self.validate, self.report = recipe, world, validate, report
        self.clips, self.preemption, self.ownership = clips, preemption, ownership
        if recipe.training.threads:
            torch.set_num_threads(recipe.training.threads)
        self.division = divide_batch(recipe, world.size)
        self.schedule = Schedule(
            clips.num_places, recipe.training.batch_size, world.size, self.division.accumulation
        )
        self.steps_per_epoch = self.schedule.steps_per_epoch
        self.total_steps = self.steps_per_epoch * recipe.training.epochs
        self.classes = clips.folder.classes
        self.data_state = data_state(recipe, clips.folder)
        datasets = clips.folder.datasets if isinstance(clips.folder, Mixture) else {}
        heads_of = {name: dataset.classes for name, dataset in datasets.items()}
        self.best = BestWeights(recipe, self.classes, validate.metrics(self.classes, heads_of))
        model = build_model(recipe, self.classes, report, world.is_main)
        tokens = open_tokens(recipe, clips, model, dtype_of(recipe), world)
        self.engine = Engine(model, recipe, world)
        heads = {head: len(names) for head, names in self.classes.items()}
        teacher = None
        if recipe.distill is not None:
            teacher = build_teacher(
                recipe, heads, self.engine, world, lambda model, changed: validate(model, changed, world, lambda: None)
            )
        clips_per_epoch = self.steps_per_epoch * recipe.training.batch_size
        answers = open_answers(recipe, clips.folder, self.engine.dtype, clips_per_epoch, world)
        clips.remember(answers, tokens, is_taught=teacher is not None)
        agree = highest if recipe.training.zero_stage == 3 else None
        self.tokens = EncoderMemories(tokens, self.engine.dtype, agree) if tokens else None
        self.answers = None
        if answers is not None and recipe.distill is not None:
            self.answers = TeacherMemory(answers, highest if recipe.distill.shard_teacher else None)
        soft_targets = None if teacher is None else soft_targets_of(teacher, self.answers)
        self.objective = build_objective(recipe, soft_targets)
        assert isinstance(self.engine.model, KarmmaModel)
        self.sums = running_sums(self.engine.model) + ([] if self.objective.sums is None else [self.objective.sums])
        self.throughput = Throughput(
            self.engine.model, [] if teacher is None else members_of(teacher), recipe.data.modalities,
            self.engine.device, self.engine.dtype, recipe.training.peak_tflops, verbose=world.is_main,
        )  # fmt: skip
        self.position = Position(0, 0)
        self._is_warm = self._save_is_due = False
        self.saver = AsyncSaver(recipe, world, self.steps_per_epoch, self.data_state)
        self.damage = DamageLog(recipe.run_dir, len(clips.clips), recipe.data.max_damaged_fraction, world.rank)
        self.averages = Averages()
        self.skips = SkippedSteps(recipe.training.max_skipped_steps, gather, self.engine.dtype == torch.float16)
        self.graph_check = GraphCheck(
            self.engine.model, store(), world.rank, world.size, recipe.training.guard_every_steps,
            gathers=recipe.training.zero_stage == 3,
        )  # fmt: skip
        self.metrics: dict[str, float] = {}
        self.resumed = ""

    @property
    def _memories(self) -> list[TeacherMemory | EncoderMemories]:
        """Memories that the run reads and extends."""
        return [memory for memory in (self.answers, self.tokens) if memory is not None]

    def resume(self, checkpoint: Path) -> None:
        """Load a checkpoint, so that `run` continues from there."""
        saved = load_checkpoint(self.engine, checkpoint, self.recipe, self.world, self.data_state)
        self.position = saved.position
        self.metrics = {name: math.nan if v is None else v for name, v in saved.state["metrics"].items()}
        self.objective.restore(saved.state, checkpoint)
        accumulation = self.schedule.accumulation
        passes = Fraction(accumulation, saved.state.get("accumulation", accumulation))
        self.averages.restore(saved.averages, self.world.rank, self.world.size, passes)
        self.saver.total_s = saved.state["checkpoint_s"]
        self.resumed = saved.note
        self.damage.remember(gather(self.damage.written() if self.world.is_main else []))

    def run(self) -> dict[str, float]:
        """Train from the current position to the end, and return the metrics of the last validation."""
        done = self.position.epoch * self.steps_per_epoch + self.position.step
        self.log = RunLog(self.recipe, done) if self.world.is_main else None
        num_dropped = self.schedule.dropped_clips
        notes = [f"{num_dropped} of {self.schedule.num_clips} clips are left out of each epoch"] if num_dropped else []
        notes += [f"{num} clips of each epoch from {name}" for name, num in self.clips.counts.items()]
        notes += [f"batch {self.division}"] if self.division.accumulation > 1 else []
        notes += [note for note in (self.division.warning, self.resumed) if note]
        self._report_progress(done, f"({'; '.join(notes)})" if notes else "")
        loaded = training_batches(
            self.clips, self.schedule, self.world.rank, self.position, self.recipe.training.epochs
        )
        self.engine.model.train()
        try:
            self._restore_validation(done)
            traced = self.recipe.training.profile_steps if self.world.is_main else None
            with (
                tracing(traced, self.recipe.run_dir, done, self.total_steps) as trace,
                on_device(loaded, self.engine.device) as batches,
            ):
                for step in range(done, self.total_steps):
                    trace.before_step(step)
                    self._step(batches, step, self.schedule.accumulation)
        finally:
            self.damage.flush()
            for memory in self._memories:
                memory.close()
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
        """Run one optimizer step and what is due after it."""
        began = time.perf_counter()
        waited = flops = 0.0
        passes = []
        for micro in range(accumulation):
            requested = time.perf_counter()
            self._mark(f"waiting for a batch of step {step + 1}")
            batch = next(batches)
            waited += time.perf_counter() - requested
            self._mark(f"in the forward pass of step {step + 1}")
            self.damage.note(batch)
            self.averages.add(loading_sums(batch, self.recipe.data.modalities))
            self.averages.add(answer_sums(batch) if self.answers else {})
            self.averages.add(token_sums(batch, self.tokens.modalities) if self.tokens else {})
            flops += self.throughput.flops(batch)
            passes.append(self._forward_backward(batch, step * accumulation + micro, step))
        self._is_warm = True
        for sums in self.sums:
            sums.commit(sum_over_ranks, keep=not passes[-1].update.skipped)
        self._record(passes, step)
        seconds = time.perf_counter() - began
        self.averages.add({"wait_s": waited, "step_s": seconds, "flops": flops})
        self.preemption.record_durations(step_s=seconds)
        self._after_step(step + 1)

    def _mark(self, doing: str) -> None:
        """Publish what this rank does; the first step may take long, since kernels are compiled and ranks connect."""
        mark(doing, None if self._is_warm else START_S)

    def _record(self, passes: list[ForwardPass], step: int) -> None:
        """Add the forward passes of an optimizer step to the averages, or record that the step was skipped.

        Raises:
            UserError: too many consecutive steps were skipped.
        """
        if not passes[-1].update.skipped:
            self.skips.record_update()
            for forward_pass in passes:
                self.averages.add(forward_pass.values)
            return
        bad = [forward_pass for forward_pass in passes if not math.isfinite(float(forward_pass.values["loss"]))]
        clips = [key for forward_pass in bad or passes for key in forward_pass.keys]
        event = self.skips.record_skip(RankStep(self.world.rank, not bad, clips))
        if self.log:
            self.log.write_event("skipped", step + 1, step // self.steps_per_epoch, **event)
            self._report_progress(step + 1, f"skipped: {describe(event)}")
        self.skips.give_up_after_too_many(event)

    def _forward_backward(self, raw: Batch, forward: int, step: int) -> ForwardPass:
        """Run one forward and backward pass; the last of an accumulation also updates the parameters."""
        torch.manual_seed(forward_seed(self.recipe.seed, forward, self.world.rank, self.world.size))
        batch = prepare(raw, self.recipe.inputs, self.engine.device, self.engine.dtype)
        checked = self.graph_check.is_due(step)
        with self.graph_check.forward() if checked else contextlib.nullcontext():
            known = self.tokens.known(batch, self.recipe.data.modalities) if self.tokens else None
            logits = self.engine.forward(*batch.only(self.recipe.modalities, self.recipe.data.modalities), known)
        loss, parts = self.objective.loss(logits, batch)
        if checked:
            self.graph_check.check(loss)
        self._mark(f"reducing the gradients of step {step + 1}")  # a slower rank keeps the others waiting here
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
        """Log, validate and save if due after `done` optimizer steps.

        Raises:
            Stopped: the run was stopped, after saving.
        """
        training = self.recipe.training
        epoch, step = divmod(done, self.steps_per_epoch)
        self._mark(f"after step {done}")
        if self.ownership:
            self.ownership.check()
        self.saver.poll()
        stop = self.preemption.agree(self.recipe.run_dir)
        if done % training.log_every_steps == 0 or step == 0:
            self._write_metrics(done)
        self._report_progress(done)
        if stop:
            self._stop(stop, done)
        every_steps = training.checkpoint_every_steps
        self._save_is_due |= bool(every_steps and done % every_steps == 0)
        if step == 0:
            if self._is_validated_after(done):
                self._validate(done)
            self._save_is_due |= done == self.total_steps or epoch % training.checkpoint_every_epochs == 0
        if self._save_is_due and not self.skips.is_skipping:  # a run that can only skip must not replace good states
            self._save_is_due = False
            self.save_now(done)

    def _is_validated_after(self, done: int) -> bool:
        epoch, step = divmod(done, self.steps_per_epoch)
        every = self.recipe.training.validate_every_epochs
        return step == 0 and (done == self.total_steps or bool(every and epoch and epoch % every == 0))

    def _restore_validation(self, done: int) -> None:
        """Read the metrics of a validation due at the resumed step from the log, or else run that validation."""
        if not done or not self._is_validated_after(done):
            return
        logged = gather([validation_at(self.recipe.run_dir, done)] if self.world.is_main else [])[0]
        if logged is None:
            self._validate(done)
        else:
            self.metrics = logged

    def save_now(self, done: int, *, wait: bool = False) -> None:
        """Save after `done` optimizer steps; allowed between any two steps. Every rank must call this.

        Args:
            done: optimizer steps since the beginning of the run.
            wait: True to return only when the checkpoint is complete; otherwise it is written while training continues.
        """
        began = time.monotonic()
        mark("saving", START_S)
        self.damage.share(gather(self.damage.take()))  # a resumed run does not read these clips again
        state = {
            "metrics": self.metrics, "checkpoint_s": self.saver.total_s, "accumulation": self.schedule.accumulation,
            **self.objective.state(),
        }  # fmt: skip
        self.saver.save(self.engine, done, self.averages.state(), state)
        if wait:
            self.saver.finish()
        self.preemption.record_durations(save_s=time.monotonic() - began)

    def _stop(self, stop: Stop, done: int) -> NoReturn:
        """Save, and raise `Stopped` on every rank."""
        saved = "saved"
        if self.skips.is_skipping:
            saved = "not saved, since its last steps were skipped"
        else:
            self.save_now(done, wait=True)
        reason = f"{stop.reason} on rank {stop.rank}"
        if self.log:
            self.log.close()
            write_state(self.recipe.run_dir, stop.state, why=reason, reason=stop.reason, rank=stop.rank, step=done)
        raise Stopped(
            f"{self.recipe.name}: {stop.state} by {reason} after step {done} of {self.total_steps}, {saved}: "
            f"{stop.advice}",
            stop.exit_code,
        )

    def _write_metrics(self, done: int) -> None:
        means = mean_over_ranks({
            **self.averages.take(), "damage_noted": float(self.damage.num_noted),
            "checkpoint_s": self.saver.take_seconds(), "checkpoint_failed": float(self.saver.failed),
        })  # fmt: skip
        values = over_labelled(means)
        if values.pop("checkpoint_failed"):
            self.saver.finish()
        if values.pop("damage_noted"):
            self.damage.share(gather(self.damage.take()))
        seconds, flops = values.pop("step_s"), values.pop("flops")
        if self._memories:
            read_mb = values.pop("answers_mb", 0.0) + values.pop("tokens_mb", 0.0)
            values["memory_mb_per_s"] = read_mb * self.schedule.accumulation / seconds
        values |= self.throughput.metrics(flops, seconds)
        values["peak_memory_gb"] = max(gather([self.throughput.peak_memory_gb()]))
        values |= pace(values, seconds, self.recipe)
        values["damaged_clips"] = float(self.damage.num_damaged)
        self.latest = values
        if self.log:
            self.log.write("train", done, (done - 1) // self.steps_per_epoch, values)

    def _validate(self, done: int) -> None:
        """Validate the model and write its weights.

        Raises:
            Stopped: the run was stopped; the validation is repeated when the run is resumed.
        """
        model = full_model(self.engine, self.recipe, self.classes)
        try:
            self.metrics = self.validate(model, self.recipe, self.world, self._between_batches)
        except _StopRequested as request:
            self._stop(request.stop, done)
        raise_on_all(self._keep_validated(model, done))
        self.engine.model.train()

    def _keep_validated(self, model: KarmmaModel, done: int) -> str | None:
        """Write the weights and metrics of a validation, on the main rank; return what prevents it."""
        if not self.log:
            return None
        epoch = (done - 1) // self.steps_per_epoch
        try:
            save_model(model, self.recipe.run_dir, recipe=self.recipe, classes=self.classes)
            self.best.save_if_better(model, self.metrics, done, epoch)
            self.log.write("validation", done, epoch, self.metrics)  # last: a validation in the log is not repeated
        except (OSError, UserError) as error:
            return str(error)
        return None

    def _between_batches(self) -> None:
        mark("validating", START_S)
        if stop := self.preemption.agree(self.recipe.run_dir):
            raise _StopRequested(stop)

    def _report_progress(self, done: int, details: str = "") -> None:
        if not self.world.is_main:
            return
        loss = getattr(self, "latest", {}).get("loss")
        epoch = f"epoch {done // self.steps_per_epoch}/{self.recipe.training.epochs}"
        scores = " ".join(f"{name} {value:.1f}" for name, value in itertools.islice(self.metrics.items(), 1))
        note = f"{epoch} loss {loss:.3f} {scores}" if loss is not None else epoch
        self.report(f"train {self.recipe.name}", done, self.total_steps, f"{note} {details}".rstrip())
