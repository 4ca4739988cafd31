"""The cost of a study before any training: FLOPs of every run, with and without memories, the bytes that these take,
and the figures of columns that need no training.

Costs are counted on the meta device, so neither shards nor weights are needed.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from karmma_dist.errors import UserError
from karmma_dist.memory.header import answer_bytes
from karmma_dist.memory.records import SEAL_BYTES
from karmma_dist.models.flops import ClipFlops, flops_per_clip, meta_clip, meta_model, meta_tokens
from karmma_dist.models.karmma import KarmmaModel
from karmma_dist.profiling.memory import FUSION_CLIPS, fusion_peak, inference_peak
from karmma_dist.recipe import Recipe, read_run_recipe
from karmma_dist.runs.folder import BEST
from karmma_dist.shards.folder import ShardFolder
from karmma_dist.shards.format import MANIFEST
from karmma_dist.studies.memories import Held, unremembered, uses, with_token_memories, without_memories
from karmma_dist.studies.plan import State, StudyPlan, StudyRun
from karmma_dist.studies.study import Column, Study


@dataclass(frozen=True)
class RunCost:
    """The computation of a full training run."""

    run: StudyRun
    state: State
    clips: int | None
    """Number of training clips; None: neither the shards nor the study give it."""
    flops: float | None
    """FLOPs of all forward and backward passes without any memory, including a teacher's forward passes; None if
    `clips` is None."""
    planned: float | None
    """FLOPs with the memories of the plan and what earlier runs stored in them."""
    advised: float | None
    """FLOPs if all frozen encoders had memories as well."""


@dataclass(frozen=True)
class StudyCosts:
    """The costs of a study, whose runs train one after another."""

    runs: list[RunCost]
    """Costs in training order."""
    planned: list[Held]
    """Memories of the plan, as the last run leaves them."""
    advised: list[Held]
    """Memories if all frozen encoders had one as well; empty if all have one, or none is frozen."""


class Counter:
    """Counter of the costs of a study's models; each architecture is counted once."""

    def __init__(self, study: Study) -> None:
        self._study = study
        self._counted: dict[str, ClipFlops] = {}
        self._token_shapes: dict[str, dict[str, tuple[int, int]]] = {}

    def heads(self, recipe: Recipe) -> dict[str, int]:
        """Return the number of classes per head, from the shards if they exist, else from the recipe or the study.

        Raises:
            UserError: the number is unknown.
        """
        folder = _shards(recipe)
        known = None if folder is None else {head: len(names) for head, names in folder.classes.items()}
        heads = known or dict(recipe.data.heads) or dict(self._study.heads)
        if not heads:
            raise UserError(
                f"{recipe.name}: the number of classes is unknown: {recipe.data.shards} has no shards, and neither "
                "data.heads nor the study's heads are set"
            )
        return heads

    def clips(self, recipe: Recipe) -> int | None:
        """Return the number of training clips, from the shards if they exist, else from the study; None: unknown."""
        folder = _shards(recipe)
        if folder is None:
            return self._study.clips
        split = folder.manifest.splits.get(recipe.data.train_split)
        return 0 if split is None else sum(shard.num_clips for shard in split.shards)

    def model(self, recipe: Recipe, modalities: Sequence[str] | None = None) -> KarmmaModel:
        """Return a recipe's model on the meta device, or a model with only some of its modalities."""
        return meta_model(recipe.model, recipe.inputs, modalities or recipe.modalities, self.heads(recipe))

    def clip_flops(self, recipe: Recipe) -> ClipFlops:
        """Return the FLOPs of one clip by part of the model."""
        return self._counted[self._count(recipe)]

    def token_shapes(self, recipe: Recipe) -> dict[str, tuple[int, int]]:
        """Return the number of a clip's tokens after the tau-average, and the width of their encoder, by modality."""
        return self._token_shapes[self._count(recipe)]

    def _count(self, recipe: Recipe) -> str:
        """Count a model unless it has been counted, and return its key."""
        plain = without_memories(recipe).model.model_dump()
        key = repr((plain, recipe.inputs.model_dump(), recipe.modalities, self.heads(recipe)))
        if key not in self._counted:
            model = self.model(recipe)
            self._counted[key] = flops_per_clip(model)
            sizes = {name: (model.num_tokens[name], model.encoder_width(name)) for name in model.modalities}
            self._token_shapes[key] = sizes
        return key

    def training_flops(self, run: StudyRun, runs: Mapping[str, StudyRun]) -> float | None:
        """Return the FLOPs of a full training without memories and with its teachers' forward passes; None: the number
        of clips is unknown."""
        recipe, clips = run.recipe, self.clips(run.recipe)
        if clips is None:
            return None
        present = _expected_present(recipe, clips)
        trained = self.clip_flops(recipe).training({m: present[m] for m in recipe.modalities}, clips)
        return float(recipe.training.epochs * (trained + self._teaching_flops(run, runs, clips)))

    def saved_flops(
        self, run: StudyRun, recipe: Recipe, runs: Mapping[str, StudyRun], held: MutableMapping[str, Held]
    ) -> float:
        """Return the FLOPs that a run's memories save it, and add to them what it stores.

        Args:
            run: The run.
            recipe: Its recipe, which names the memories.
            runs: All runs of the study, by name.
            held: Content of the memories before the run, by path and content; extended.
        """
        clips, epochs, views = self.clips(recipe) or 0, recipe.training.epochs, recipe.model.num_views
        kept, saved = _keep_probabilities(recipe), 0.0
        read_share = float(recipe.distill is None)  # of the epochs; a teacher that is asked needs every clip's arrays
        for use in uses(recipe):
            key = f"{use.path} {use.content}"
            if use.modality is None:
                memory = held.setdefault(key, Held("logits", clips, self._answer_bytes(recipe)))
                assert recipe.distill is not None
                is_drawn = recipe.distill.memory_subsets == "drawn" and recipe.data.modality_dropout.probability > 0
                # Where a view comes again with other modalities, the first answer stays and is of no use.
                lasting = min(epochs, views) if views and is_drawn else epochs
                num_asked = memory.extend(1.0, lasting, views)
                num_read = lasting - num_asked
                saved += num_read * self._teaching_flops(run, runs, clips)
                saved -= num_asked * self._storing_flops(run, recipe, runs, clips)
                read_share = num_read / epochs
                continue
            memory = held.setdefault(key, Held("tokens", clips, self._token_bytes(recipe, use.modality)))
            probability = kept[use.modality]
            remembered = epochs * probability - memory.extend(probability, epochs, views)
            saved += read_share * clips * remembered * self.clip_flops(recipe).encoders[use.modality]
        return saved

    def _teaching_flops(self, run: StudyRun, runs: Mapping[str, StudyRun], clips: int) -> int:
        """Return the FLOPs of the teachers' forward passes in an epoch."""
        present = _expected_present(run.recipe, clips)
        return sum(self.clip_flops(runs[name].recipe).teaching(present, clips) for name in _teachers(run))

    def _storing_flops(self, run: StudyRun, recipe: Recipe, runs: Mapping[str, StudyRun], clips: int) -> int:
        """Return the FLOPs that an epoch of asking the teachers costs more if answers for all subsets are stored."""
        assert recipe.distill is not None
        if recipe.distill.memory_subsets == "drawn":
            return 0
        counted = [self.clip_flops(runs[name].recipe) for name in _teachers(run)]
        per_clip = sum(flops.all_subsets(torch.ones(1, len(flops.encoders), dtype=torch.bool)) for flops in counted)
        return clips * per_clip - self._teaching_flops(run, runs, clips)

    def _answer_bytes(self, recipe: Recipe) -> int:
        """Return the bytes of a record of answers; precision auto counts as bf16."""
        assert recipe.distill is not None
        num_subsets = 2 ** len(recipe.data.modalities) - 1 if recipe.distill.memory_subsets == "all" else 1
        shape = (num_subsets, len(recipe.distill.names), sum(self.heads(recipe).values()))
        return answer_bytes("float32" if recipe.training.precision == "fp32" else "bfloat16", shape) + SEAL_BYTES

    def _token_bytes(self, recipe: Recipe, modality: str) -> int:
        """Return the bytes of a record of tokens."""
        memory = recipe.model.encoders[modality].memory
        assert memory is not None
        return answer_bytes(memory.dtype, self.token_shapes(recipe)[modality]) + SEAL_BYTES

    def cost_figure(self, recipe: Recipe, column: Column) -> float | None:
        """Return the figure of a column that needs no training; None: the model lacks the column's modalities."""
        modalities = recipe.modalities
        shown = column.subset or modalities
        if not set(shown) <= set(modalities):
            return None
        subset = tuple(m for m in modalities if m in shown)
        if column.metric == "gflops":
            return self.clip_flops(recipe).alone(subset) / 1e9
        model = self.model(recipe, subset).eval()
        sizes = {p: p.numel() for p in model.parameters()}
        if column.metric in ("params", "trainable"):
            return sum(n for p, n in sizes.items() if column.metric == "params" or p.requires_grad) / 1e6
        if column.metric.startswith("fusion_memory"):
            tokens_BTD = meta_tokens(model.fusion_block, sum(model.num_tokens.values()), FUSION_CLIPS)
            return fusion_peak(model.fusion_block, tokens_BTD, fused=column.metric == "fusion_memory") / 1e9
        clip = meta_clip(recipe.inputs, subset)
        activations = inference_peak(model, clip, torch.ones(1, len(subset), dtype=torch.bool))
        return (4 * sum(sizes.values()) + activations) / 1e9


def plan_costs(plan: StudyPlan) -> StudyCosts:
    """Return the costs of all runs of the chosen rows.

    A finished run counts with the memories that it was trained with.

    Raises:
        UserError: the number of classes is unknown, or a folder holds a run of another recipe.
    """
    counter = Counter(plan.file.study)
    planned: dict[str, Held] = {}
    advised: dict[str, Held] = {}
    costs = []
    for run in plan.chosen_runs:
        state, flops = run.state(), counter.training_flops(run, plan.runs)
        recipe = read_run_recipe(run.recipe.run_dir) if state == "finished" else run.recipe
        saved = counter.saved_flops(run, recipe, plan.runs, planned)
        could_save = counter.saved_flops(run, with_token_memories(recipe), plan.runs, advised)
        with_them, with_all = (None if flops is None else flops - part for part in (saved, could_save))
        costs.append(RunCost(run, state, counter.clips(run.recipe), flops, with_them, with_all))
    is_advised = any(unremembered(cost.run.recipe) for cost in costs)
    return StudyCosts(costs, list(planned.values()), list(advised.values()) if is_advised else [])


def _shards(recipe: Recipe) -> ShardFolder | None:
    """Return the recipe's shards if they are on this machine."""
    folder = Path(str(recipe.data.shards))
    return _opened(str(folder)) if (folder / MANIFEST).is_file() else None


@cache
def _opened(folder: str) -> ShardFolder:
    return ShardFolder(folder)


def _expected_present(recipe: Recipe, clips: int) -> dict[str, int]:
    """Return the expected number of clips per epoch with each modality, assuming that all clips have all modalities."""
    return {name: round(clips * probability) for name, probability in _keep_probabilities(recipe).items()}


def _keep_probabilities(recipe: Recipe) -> dict[str, float]:
    """Return the probability, by modality, that a clip keeps it; modality dropout keeps at least one of the model's."""
    p, num = recipe.data.modality_dropout.probability, len(recipe.modalities)
    kept = (1 - p) + p**num / num
    return {m: kept if m in recipe.modalities else 1 - p for m in recipe.data.modalities}


def _teachers(run: StudyRun) -> list[str]:
    """Return the names of the runs that teach a run online."""
    distill = run.recipe.distill
    if distill is None:
        return []
    named = [name.removesuffix(f"/{BEST}") for name in distill.names]
    return [need for need in run.needs for name in named if name == need or name.endswith(f"/{need}")]
