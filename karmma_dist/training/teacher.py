"""The frozen teacher of a distillation: one model, or several experts of some of the modalities each, averaged.

Experts follow Radevski et al., ICCV 2023 (arXiv 2307.07483): per head the weight of an expert is softmin(its held-out
loss / temperature). There each expert sees every clip; here a clip may lack an expert's modality, so weights are
normalised over the experts that can judge the clip.

Legend: B clips, M modalities, E experts, C classes.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from karmma_dist.errors import UserError
from karmma_dist.models.karmma import KarmmaModel
from karmma_dist.models.layout import input_shape
from karmma_dist.models.pretrained import load_model
from karmma_dist.recipe import DistillRecipe, InputRecipe, Recipe, read_run_recipe
from karmma_dist.shards import write_json
from karmma_dist.training.collectives import barrier
from karmma_dist.training.engine import Engine, ShardedModule
from karmma_dist.training.rendezvous import World
from karmma_dist.training.run_log import ENSEMBLE, read_state

Measure = Callable[[KarmmaModel, Recipe], dict[str, float]]
"""Validates a model on a recipe's validation split; every rank calls it and gets the same numbers."""

_logger = logging.getLogger(__name__)

_INPUTS = {"video": "video", "flow": "video", "audio": "audio", "detections": "detections"}


class Teacher(nn.Module):
    """Class distributions of one frozen model, or of several averaged.

    Args:
        members: the models, frozen and in eval mode; each judges the clips that have one of its modalities.
        modalities: columns of `present_BM`; every one of them is some member's.
        losses: per head the members' validation losses.
        recipe: temperatures and what is averaged.
    """

    def __init__(
        self, members: Sequence[KarmmaModel], modalities: Sequence[str], losses: Mapping[str, Sequence[float]],
        recipe: DistillRecipe,
    ) -> None:  # fmt: skip
        super().__init__()
        self.members = nn.ModuleList(members)
        self.recipe = recipe
        self._columns = [[list(modalities).index(name) for name in member.modalities] for member in members]
        # No buffer: it stays float32 where the members' parameters are cast.
        self._scores = {head: -torch.tensor(of) / recipe.weight_temperature for head, of in losses.items()}

    def run_everything(self) -> None:
        """From now on run every encoder of every member in each call, as parameters in pieces over the ranks need."""
        for member in self.members:
            assert isinstance(member, KarmmaModel)
            member.runs_every_encoder = True

    def weights(self) -> dict[str, list[float]]:
        """Per head the members' weights on a clip that has all modalities."""
        return {head: scores_E.softmax(dim=0).tolist() for head, scores_E in self._scores.items()}

    def forward(self, inputs: dict[str, Tensor], present_BM: Tensor) -> dict[str, Tensor]:
        """Log-probabilities (B, C) per head, float32, at the recipe's temperature. See `KarmmaModel.encode`."""
        present_BM = present_BM.cpu()
        seen_BE = torch.stack([present_BM[:, columns].any(dim=1) for columns in self._columns], dim=1)
        outputs = [self._judge(e, inputs, present_BM, seen_BE[:, e]) for e in range(len(self.members))]
        return {head: self._average(head, [output[head] for output in outputs], seen_BE) for head in self._scores}

    def _judge(self, e: int, inputs: dict[str, Tensor], present_BM: Tensor, seen_B: Tensor) -> dict[str, Tensor]:
        """Logits (B, C) per head of one member, float32, zeros for the clips that it does not see."""
        member = self.members[e]
        assert isinstance(member, KarmmaModel)
        device = member._like.device
        judged = {}
        if bool(seen_B.any()):
            given = {name: inputs[name] for name in member.modalities if name in inputs}
            judged = member(given, present_BM[seen_B][:, self._columns[e]])
        elif member.runs_every_encoder:
            member(*_blank_clip(member))
        if bool(seen_B.all()):
            return {head: logits.float() for head, logits in judged.items()}
        rows = seen_B.nonzero().flatten().to(device)
        whole = {head: torch.zeros(len(seen_B), num, device=device) for head, num in member.heads.items()}
        return {h: zeros.index_copy(0, rows, judged[h].float()) if judged else zeros for h, zeros in whole.items()}

    def _average(self, head: str, logits: list[Tensor], seen_BE: Tensor) -> Tensor:
        """Log-probabilities (B, C) from the members' logits (B, C)."""
        scores_E = self._scores[head].to(logits[0].device)
        unseen_BE = ~seen_BE.to(scores_E.device)
        log_weights_BE1 = scores_E.expand(unseen_BE.shape).masked_fill(unseen_BE, -torch.inf).log_softmax(1)[:, :, None]
        logits_BEC = torch.stack(logits, dim=1) / self.recipe.temperature
        if self.recipe.average == "logits":
            return (log_weights_BE1.exp() * logits_BEC).sum(dim=1).log_softmax(dim=-1)
        return torch.logsumexp(log_weights_BE1 + logits_BEC.log_softmax(dim=-1), dim=1)


def _blank_clip(member: KarmmaModel) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs of one clip of zeros that has everything."""
    inputs = {m: member._like.new_zeros(1, *input_shape(m, member.inputs)) for m in member.modalities}
    return inputs, torch.ones(1, len(member.modalities), dtype=torch.bool)


def build_teacher(
    recipe: Recipe, heads: dict[str, int], engine: Engine, world: World, measure: Measure
) -> Teacher | ShardedModule:
    """Load a distill recipe's teacher, in the precision and on the device of `engine`. Every rank must call this.

    Args:
        recipe: the distillation.
        heads: number of classes per head.
        engine: the student's.
        world: this rank.
        measure: called for experts of which no validation loss on the recipe's validation split is known.

    Raises:
        UserError: a teacher is missing, or was trained on other classes, modalities or inputs.
    """
    assert recipe.distill is not None
    paths = [recipe.find_run(name) for name in recipe.distill.teachers or [str(recipe.distill.teacher)]]
    members = [load_member(path, recipe, heads).to(dtype=engine.dtype) for path in paths]
    for note in _undropped(paths, recipe) if world.is_main else ():
        _logger.warning(note)
    if recipe.distill.teachers:
        _check_every_modality(members, recipe)
        losses = _ensemble_losses(paths, members, recipe, heads, engine.device, measure)
    else:
        losses = {head: [0.0] for head in heads}
    teacher = Teacher(members, recipe.data.modalities, losses, recipe.distill).eval()
    if recipe.distill.teachers and world.is_main:
        write_json(recipe.run_dir / ENSEMBLE, {"losses": losses, "weights": teacher.weights()})
    if not recipe.distill.shard_teacher:
        return teacher.to(engine.device)
    teacher.run_everything()
    return ShardedModule(teacher, recipe, world)


def _undropped(paths: Sequence[Path], recipe: Recipe) -> list[str]:
    """Return a line about each teacher of several modalities trained without dropout, where the student has it."""
    if not recipe.data.modality_dropout.probability:
        return []
    runs = {path: path if (path / "recipe.yaml").is_file() else path.parent for path in paths}
    known = {path: read_run_recipe(run).data for path, run in runs.items() if (run / "recipe.yaml").is_file()}
    return [
        f"{path}: this teacher was trained without modality dropout, but teaches under it: it has not seen most of the "
        "subsets that it judges (data.modality_dropout of its recipe)"
        for path, data in known.items()
        if len(data.modalities) > 1 and not data.modality_dropout.probability
    ]


def load_member(path: Path, recipe: Recipe, heads: dict[str, int]) -> KarmmaModel:
    """A teacher or expert, frozen and in eval mode, checked against the student's data."""
    assert recipe.distill is not None
    member, card = load_model(path)
    mine, students = list(member.modalities), recipe.data.modalities
    if dict(member.heads) != heads:
        raise UserError(f"{path}: the teacher's heads {dict(member.heads)} are not the shards' {heads}")
    if not set(mine) <= set(students) if recipe.distill.teachers else mine != students:
        raise UserError(
            f"{path}: the teacher's modalities {', '.join(mine)} are not the student's {', '.join(students)}"
        )
    differing = [name for name in mine if _input_of(name, card.inputs) != _input_of(name, recipe.inputs)]
    if differing:
        raise UserError(
            f"{path}: the teacher was trained on other inputs: inputs.{_INPUTS[differing[0]]} must be equal in the two "
            "recipes"
        )
    return member.requires_grad_(False).eval()


def _input_of(modality: str, inputs: InputRecipe) -> object:
    return getattr(inputs, _INPUTS[modality])


def _check_every_modality(members: Sequence[KarmmaModel], recipe: Recipe) -> None:
    known = {name for member in members for name in member.modalities}
    unknown = [name for name in recipe.data.modalities if name not in known]
    if unknown:
        raise UserError(
            f"distill.teachers: none knows {unknown[0]}, which the student has: add an expert of it, or leave it out "
            "of data.modalities"
        )


def _ensemble_losses(
    paths: Sequence[Path], members: Sequence[KarmmaModel], recipe: Recipe, heads: dict[str, int],
    device: torch.device, measure: Measure,
) -> dict[str, list[float]]:  # fmt: skip
    """Per head the experts' losses on the recipe's validation split: those this run began with, if it is resumed."""
    before = recipe.run_dir / ENSEMBLE
    losses: dict[str, list[float]] = json.loads(before.read_text())["losses"] if before.is_file() else {}
    barrier()  # every rank has looked before the main rank writes
    if losses:
        return losses
    measured = []
    for path, member in zip(paths, members, strict=True):
        found = _recorded(path, recipe, heads)
        if not found:
            data = recipe.data.model_copy(update={"modalities": list(member.modalities)})
            found = measure(member.to(device), recipe.model_copy(update={"data": data}))
            member.cpu()  # one at a time: all of them may not fit on the device
        measured.append(found)
    return {head: [scores[f"{head}_loss"] for scores in measured] for head in heads}


def _recorded(path: Path, recipe: Recipe, heads: dict[str, int]) -> dict[str, float]:
    """What an expert's last validation said, if it was on the clips of the recipe's validation split."""
    metrics: dict[str, float] = read_state(path).get("metrics", {}) if (path / "recipe.yaml").is_file() else {}
    if not all(f"{head}_loss" in metrics for head in heads):
        return {}
    theirs, ours = read_run_recipe(path).data, recipe.data
    same = all(getattr(theirs, name) == getattr(ours, name) for name in ("shards", "validation_split", "drop_nouns"))
    return metrics if same else {}
