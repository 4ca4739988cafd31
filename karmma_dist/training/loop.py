"""One loop for all stages: batches in, optimizer steps, validation, checkpoints, weights out.

    runs/NAME/
      recipe.yaml  state.json  metrics.jsonl  events.out.tfevents.*  damage.jsonl
      checkpoints/step-N/      to resume from
      weights.safetensors      model.yaml         to evaluate and to teach with
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

from karmma_dist.models.encoder import Encoder
from karmma_dist.models.karmma import KarmmaModel
from karmma_dist.models.pretrained import load_encoder_weights, save_model
from karmma_dist.progress import Report, silent
from karmma_dist.recipe import Recipe
from karmma_dist.shards import ShardFolder
from karmma_dist.streaming.batch import Batch, prepare
from karmma_dist.streaming.loader import TrainingClips, open_shards, training_batches
from karmma_dist.streaming.order import Position, Schedule, random_words
from karmma_dist.streaming.prefetch import on_device
from karmma_dist.training.checkpoint import data_state, load_checkpoint
from karmma_dist.training.damage import DamageLog
from karmma_dist.training.engine import Engine, barrier, gather, mean_over_ranks
from karmma_dist.training.rendezvous import World
from karmma_dist.training.run_folder import prepare_run_dir
from karmma_dist.training.run_log import RunLog, read_state, write_state
from karmma_dist.training.saver import Saver
from karmma_dist.training.schedule import learning_rate
from karmma_dist.training.stages import build_stage
from karmma_dist.training.telemetry import Averages, loading_metrics, loading_sums

Validate = Callable[[nn.Module, Recipe, World], dict[str, float]]
"""Measures a model on the recipe's validation split; every rank calls it and gets the same numbers."""


def train(
    recipe: Recipe, world: World, validate: Validate, *, resume: str = "auto", report: Report = silent
) -> dict[str, float]:
    """Train to the end of the recipe, resuming where an earlier call was cut off. Every rank must call this.

    Args:
        recipe: the run.
        world: this rank; `engine.process_group` must be open.
        validate: measures the model.
        resume: "auto" continues from the newest checkpoint, "never" starts over, a path resumes from that checkpoint.
        report: progress, on the main rank.

    Returns:
        The last validation's metrics.

    Raises:
        UserError: bad shards, another recipe in the run folder, a teacher that does not fit, too much damage.
    """
    folder = open_shards(recipe.data)
    start = prepare_run_dir(recipe, world, resume, report)
    if start == "finished":
        report(f"train {recipe.name}", 1, 1, "already finished (start over with --resume never)")
        return dict(read_state(recipe.run_dir).get("metrics", {}))
    trainer = Trainer(recipe, world, folder, validate, report)
    if start:
        trainer.resume(Path(start))
    try:
        return trainer.run()
    except BaseException as error:
        if world.is_main:
            state = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            write_state(recipe.run_dir, state, error=f"{type(error).__name__}: {error}")
        raise
    finally:
        trainer.saver.close()


class Trainer:
    """Everything one rank holds while it trains."""

    def __init__(self, recipe: Recipe, world: World, folder: ShardFolder, validate: Validate, report: Report) -> None:
        self.recipe, self.world, self.validate, self.report = recipe, world, validate, report
        if recipe.training.threads:
            torch.set_num_threads(recipe.training.threads)
        self.clips = TrainingClips(folder, recipe.data, recipe.inputs, recipe.seed, recipe.training.batch_size)
        self.schedule = Schedule(
            len(self.clips.clips), recipe.training.batch_size, world.size, recipe.training.accumulation
        )
        self.steps_per_epoch = self.schedule.steps_per_epoch
        self.total_steps = self.steps_per_epoch * recipe.training.epochs
        self.classes = folder.classes
        self.data_state = data_state(recipe, folder)
        self.engine = Engine(build_model(recipe, self.classes), recipe, world)
        heads = {head: len(names) for head, names in self.classes.items()}
        self.stage = build_stage(recipe, heads, self.engine.device, self.engine.dtype)
        self.position = Position(0, 0)
        self.saver = Saver(recipe, world, self.steps_per_epoch, self.data_state)
        self.damage = DamageLog(recipe.run_dir, len(self.clips.clips), recipe.data.max_damaged_fraction, world.rank)
        self.averages = Averages()
        self.metrics: dict[str, float] = {}
        self.resumed = ""

    def resume(self, checkpoint: Path) -> None:
        """Continue from a checkpoint."""
        saved = load_checkpoint(self.engine, checkpoint, self.recipe, self.world, self.data_state)
        self.position, self.metrics = saved.position, saved.state["metrics"]
        self.averages.restore(saved.averages, self.world.rank, self.world.size)
        self.saver.total_s = saved.state["checkpoint_s"]
        self.resumed = saved.note
        self.damage.remember(gather(self.damage.written() if self.world.is_main else []))

    def run(self) -> dict[str, float]:
        """Train from the current position to the end; returns the last validation's metrics."""
        done = self.position.epoch * self.steps_per_epoch + self.position.step
        self.log = RunLog(self.recipe.run_dir, done) if self.world.is_main else None
        left_out = self.schedule.dropped_clips
        notes = [f"{left_out} of {self.schedule.num_clips} clips left out of each epoch"] if left_out else []
        notes += [self.resumed] if self.resumed else []
        self._say(done, f"({'; '.join(notes)})" if notes else "")
        epochs, accumulation = self.recipe.training.epochs, self.recipe.training.accumulation
        loaded = training_batches(self.clips, self.schedule, self.world.rank, self.position, epochs)
        self.engine.model.train()
        try:
            with on_device(loaded, self.engine.device) as batches:
                for step in range(done, self.total_steps):
                    self._step(batches, step, accumulation)
        finally:
            self.damage.flush()
        self.saver.finish()
        if self.log:
            self.log.close()
            write_state(
                self.recipe.run_dir, "finished", step=self.total_steps, metrics=self.metrics,
                checkpoint_s=self.saver.total_s,
            )  # fmt: skip
        barrier()
        return self.metrics

    def _step(self, batches: Iterator[Batch], step: int, accumulation: int) -> None:
        """One optimizer step and what is due after it."""
        began = time.perf_counter()
        waited = 0.0
        for micro in range(accumulation):
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            self.damage.note(batch)
            self.averages.add(loading_sums(batch, self.recipe.data.modalities))
            self._forward_backward(batch, step * accumulation + micro, step)
        self.averages.add({"wait_s": waited, "step_s": time.perf_counter() - began})
        self._after_step(step + 1)

    def _forward_backward(self, raw: Batch, forward: int, step: int) -> None:
        """One forward and backward pass; the last of an accumulation updates the parameters."""
        torch.manual_seed(int(random_words(1, self.recipe.seed, forward * self.world.size + self.world.rank)[0] >> 1))
        batch = prepare(raw, self.recipe.inputs, self.engine.device, self.engine.dtype)
        logits = self.engine.forward(batch.inputs, batch.present_BM)
        loss, parts = self.stage.loss(logits, batch)
        self.engine.backward(loss)
        lr = learning_rate(self.recipe.optimizer, step, self.steps_per_epoch, self.total_steps)
        norm = self.engine.step(lr)
        shares = batch.present_BM.float().mean(dim=0).unbind()
        present = {f"present_{m}": share for m, share in zip(self.recipe.data.modalities, shares, strict=True)}
        extra = {"lr": lr} if norm is None else {"lr": lr, "grad_norm": norm}
        self.averages.add({**parts, **present, **extra})

    def _after_step(self, done: int) -> None:
        """Log, validate and save where they are due after `done` optimizer steps."""
        training = self.recipe.training
        epoch, step = divmod(done, self.steps_per_epoch)
        self.saver.look()
        if done % training.log_every_steps == 0 or step == 0:
            self._write_metrics(done)
        self._say(done)
        every_steps = training.checkpoint_every_steps
        save = bool(every_steps and done % every_steps == 0)
        if step:
            if save:
                self.save_now(done)
            return
        last = done == self.total_steps
        every = training.validate_every_epochs
        if last or (every and epoch % every == 0):
            self._validate(done)
        if save or last or epoch % training.checkpoint_every_epochs == 0:
            self.save_now(done)

    def save_now(self, done: int, *, wait: bool = False) -> None:
        """Save after `done` optimizer steps, between any two of them. Every rank must call this.

        Args:
            done: optimizer steps since the beginning of the run.
            wait: return when the checkpoint is whole; else it is written while training goes on.
        """
        self.damage.share(gather(self.damage.take()))  # a resumed run does not meet these clips again
        state = {"metrics": self.metrics, "checkpoint_s": self.saver.total_s}
        self.saver.save(self.engine, done, self.averages.state(), state)
        if wait:
            self.saver.finish()

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
        values["clips_per_s"] = self.recipe.training.batch_size / values["step_s"]
        values["data_wait_share"] = values.pop("wait_s") / values.pop("step_s")
        values |= loading_metrics(values, self.recipe.data.modalities)
        values["damaged_clips"] = float(self.damage.num_damaged)
        self.latest = values
        if self.log:
            self.log.write("train", done, (done - 1) // self.steps_per_epoch, values)

    def _validate(self, done: int) -> None:
        """Measure the model and write its weights."""
        model = self._whole_model()
        self.metrics = self.validate(model, self.recipe, self.world)
        if self.log:
            self.log.write("validation", done, (done - 1) // self.steps_per_epoch, self.metrics)
            save_model(model, self.recipe.run_dir, recipe=self.recipe, classes=self.classes)
        barrier()
        self.engine.model.train()

    def _whole_model(self) -> KarmmaModel:
        """The model in training, or under ZeRO-3 a whole copy of it.

        Its forward hooks would gather parameters layer by layer, which needs every rank to make the same calls; in
        validation a rank whose last batch is all padding makes none.
        """
        model = self.engine.model
        if self.recipe.training.zero_stage == 3:
            heads = {head: len(names) for head, names in self.classes.items()}
            model = KarmmaModel(self.recipe.model, self.recipe.inputs, self.recipe.data.modalities, heads)
            model.to(device=self.engine.device, dtype=self.engine.dtype).load_state_dict(self.engine.whole_state())
        assert isinstance(model, KarmmaModel)
        return model

    def _say(self, done: int, also: str = "") -> None:
        if not self.world.is_main:
            return
        loss = getattr(self, "latest", {}).get("loss")
        seen = f"epoch {done // self.steps_per_epoch}/{self.recipe.training.epochs}"
        scores = " ".join(f"{name} {value:.1f}" for name, value in self.metrics.items() if name.endswith("action_top1"))
        note = f"{seen} loss {loss:.3f} {scores}" if loss is not None else seen
        self.report(f"train {self.recipe.name}", done, self.total_steps, f"{note} {also}".rstrip())


def build_model(recipe: Recipe, classes: dict[str, list[str]]) -> KarmmaModel:
    """The recipe's model with its starting weights: a function of the recipe and the seed."""
    torch.manual_seed(recipe.seed)
    heads = {head: len(names) for head, names in classes.items()}
    model = KarmmaModel(recipe.model, recipe.inputs, recipe.data.modalities, heads)
    for modality in recipe.data.modalities:
        source = recipe.model.encoders[modality].weights
        encoder = model.encoders[modality]
        assert isinstance(encoder, Encoder)
        if source is not None:
            load_encoder_weights(encoder, modality, str(recipe.find_run(source)))
    return model
