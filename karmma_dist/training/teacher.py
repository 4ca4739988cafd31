"""The frozen teacher of a distillation: one model, or the average of several experts, each for some modalities.

Experts follow Radevski et al., ICCV 2023 (arXiv 2307.07483). The weight of an expert for a head is softmin(loss /
temperature), where the loss is measured on training clips that no expert learned from, or on the clip itself;
alternatively all experts have equal weights. In that paper each expert sees every clip; here a clip may lack an
expert's modality, so weights are normalised over the experts that have a modality of the clip.

Legend: B clips, M modalities, S = 2^M - 1 subsets of them, E experts, K modalities of an expert, C classes, A classes
of all heads.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from karmma_dist.distributed.collectives import barrier
from karmma_dist.distributed.world import World
from karmma_dist.errors import UserError
from karmma_dist.io.files import write_json
from karmma_dist.io.json_fields import JsonObject, read_json
from karmma_dist.memory.memory import set_of, sets_of
from karmma_dist.modalities import MODALITIES
from karmma_dist.models.encoders.transformer import at_least_float32
from karmma_dist.models.karmma import KarmmaModel
from karmma_dist.models.model_card import load_model
from karmma_dist.recipe import DataRecipe, DistillRecipe, Recipe, read_run_recipe
from karmma_dist.runs.folder import ENSEMBLE, run_places
from karmma_dist.training.engine import Engine, ShardedModule

Measure = Callable[[KarmmaModel, Recipe], dict[str, float]]
"""Returns the metrics of a model on a recipe's validation split (for the training split, on the clips held out of it).
Every rank must call it and gets the same numbers."""

_logger = logging.getLogger(__name__)


class Teacher(nn.Module):
    """One frozen model, or the weighted average of several.

    Args:
        members: the models, frozen and in eval mode; each classifies the clips that have one of its modalities.
        modalities: columns of `present_BM`; each must belong to at least one member.
        losses: per head, the members' losses, from which their weights follow; equal losses give equal weights.
        recipe: temperatures, and the quantity that is averaged.
    """

    def __init__(
        self, members: Sequence[KarmmaModel], modalities: Sequence[str], losses: Mapping[str, Sequence[float]],
        recipe: DistillRecipe,
    ) -> None:  # fmt: skip
        super().__init__()
        self.members = nn.ModuleList(members)
        self.recipe, self.modalities = recipe, tuple(modalities)
        self._heads = dict(members[0].heads)
        self._columns = [[list(modalities).index(name) for name in member.modalities] for member in members]
        # Not a buffer, so that it stays float32 when the members' parameters are cast.
        self._scores = {head: -torch.tensor(loss_E) / recipe.weight_temperature for head, loss_E in losses.items()}

    def run_everything(self) -> None:
        """Make every call run every encoder of every member, as parameters sharded over the ranks require."""
        for member in self.members:
            assert isinstance(member, KarmmaModel)
            member.runs_every_encoder = True

    def weights(self) -> dict[str, list[float]]:
        """Return, per head, the members' weights for a clip with all modalities, without regard to its labels."""
        return {head: scores_E.softmax(dim=0).tolist() for head, scores_E in self._scores.items()}

    def forward(
        self, inputs: dict[str, Tensor], present_BM: Tensor, labels: dict[str, Tensor] | None = None,
        *, answers_for: Literal["drawn", "all"] | None = None,
    ) -> dict[str, Tensor] | Tensor:  # fmt: skip
        """Return log-probabilities (B, C) per head, float32 or more, at the recipe's temperature.

        Args:
            inputs: per modality, the present clips only; see `KarmmaModel.encode`.
            present_BM: bool, True if the clip has the modality.
            labels: per head, int64 (B,); required if experts are weighted `per_sample`.
            answers_for: `drawn`: return the members' answers (B, E, A) instead, from which `log_probs` follow. `all`:
                return those for every subset of the modalities, (B, S, E, A), in the order of `sets_of` without the
                empty set, with zeros for subsets that a clip cannot have.
        """
        if answers_for == "all":
            return self._subset_answers(inputs, present_BM.cpu())
        answers_BEA = self._answers(inputs, present_BM.cpu())
        return answers_BEA if answers_for == "drawn" else self.log_probs(answers_BEA, present_BM, labels)

    def log_probs(
        self, answers_BEA: Tensor, present_BM: Tensor, labels: dict[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Return log-probabilities (B, C) per head of the members' answers; see `forward`.

        Args:
            answers_BEA: the members' logits of all heads side by side, in their own dtype; zeros for the clips that a
                member does not see.
            present_BM: see `forward`.
            labels: see `forward`.
        """
        seen_BE = self._seen(present_BM.cpu())
        sizes = [self._heads[head] for head in self._scores]
        log_probs = {}
        for head, part_BEC in zip(self._scores, answers_BEA.split(sizes, dim=2), strict=True):
            logits_BEC = at_least_float32(part_BEC)
            log_probs[head] = self._average(logits_BEC, self._scores_of(head, logits_BEC, labels), seen_BE)
        return log_probs

    def nothing(self) -> Tensor:
        """Return present_BM of one clip without any modality: no member sees it."""
        return torch.zeros(1, 1 + max(max(columns) for columns in self._columns), dtype=torch.bool)

    def _seen(self, present_BM: Tensor) -> Tensor:
        """Return bool (B, E), True if the clip has a modality of the member."""
        return torch.stack([present_BM[:, columns].any(dim=1) for columns in self._columns], dim=1)

    def _answers(self, inputs: dict[str, Tensor], present_BM: Tensor) -> Tensor:
        seen_BE = self._seen(present_BM)
        outputs = [self._member_logits(e, inputs, present_BM, seen_BE[:, e]) for e in range(len(self.members))]
        return torch.stack([self._side_by_side(output) for output in outputs], dim=1)

    def _side_by_side(self, logits: dict[str, Tensor]) -> Tensor:
        return torch.cat([logits[head] for head in self._scores], dim=1)  # (B, A)

    def _subset_answers(self, inputs: dict[str, Tensor], present_BM: Tensor) -> Tensor:
        """Return the members' answers for every subset, of which each sees its own modalities; see `forward`."""
        subsets_SM = sets_of(len(self.modalities))[1:]
        answers = []
        for e, columns in enumerate(self._columns):
            own_sets_S = torch.tensor([set_of(own_K.numpy()) for own_K in subsets_SM[:, columns]])
            logits = self._logits_by_set(e, inputs, present_BM[:, columns])
            answers.append(logits.index_select(1, own_sets_S.to(logits.device)))
        answers_BSEA = torch.stack(answers, dim=2)
        lacks_BS = (subsets_SM & ~present_BM[:, None]).any(dim=2).to(answers_BSEA.device)
        return answers_BSEA.masked_fill(lacks_BS[:, :, None, None], 0)

    def _logits_by_set(self, e: int, inputs: dict[str, Tensor], present_BK: Tensor) -> Tensor:
        """Return one member's logits (B, 2^K, A) for every set of its modalities, in the order of `sets_of`.

        Each clip is encoded once. The empty set, and sets that a clip cannot have, have zeros.
        """
        member = self.members[e]
        assert isinstance(member, KarmmaModel)
        tokens = member.encode({name: inputs[name] for name in member.modalities if name in inputs}, present_BK)
        nothing = member._like.new_zeros(len(present_BK), sum(member.heads.values()))
        by_set = [nothing]
        for set_K in sets_of(len(member.modalities))[1:]:
            rows_N = (present_BK | ~set_K).all(dim=1).nonzero().flatten()
            if len(rows_N):
                logits = member.fuse(*_tokens_of(rows_N, set_K, tokens, present_BK, member))
                by_set.append(nothing.index_copy(0, rows_N.to(nothing.device), self._side_by_side(logits)))
                continue
            by_set.append(nothing)
            if member.runs_every_encoder:
                member.fuse(*_blank_tokens(member))
        return torch.stack(by_set, dim=1)

    def _member_logits(
        self, e: int, inputs: dict[str, Tensor], present_BM: Tensor, seen_B: Tensor
    ) -> dict[str, Tensor]:
        """Return one member's logits (B, C) per head, with zeros for the clips it does not see."""
        member = self.members[e]
        assert isinstance(member, KarmmaModel)
        seen_logits = {}
        if bool(seen_B.any()):
            member_inputs = {name: inputs[name] for name in member.modalities if name in inputs}
            seen_logits = member(member_inputs, present_BM[seen_B][:, self._columns[e]])
        elif member.runs_every_encoder:
            member(*_blank_clip(member))
        if bool(seen_B.all()):
            return seen_logits
        logits = {head: member._like.new_zeros(len(seen_B), num) for head, num in member.heads.items()}
        if not seen_logits:
            return logits
        rows = seen_B.nonzero().flatten().to(member._like.device)
        return {head: zeros.index_copy(0, rows, seen_logits[head]) for head, zeros in logits.items()}

    def _scores_of(self, head: str, logits_BEC: Tensor, labels: dict[str, Tensor] | None) -> Tensor:
        """Return scores (B, E): the logarithms of the members' weights for each clip, up to a constant."""
        if self.recipe.expert_weights == "per_sample" and len(self.members) > 1:
            assert labels is not None
            labels_B = labels[head].clamp(min=0)  # the scores of a clip without the head weigh nothing
            rows_BE1 = labels_B[:, None, None].expand(-1, len(self.members), 1)
            return logits_BEC.log_softmax(dim=-1).gather(2, rows_BE1)[:, :, 0] / self.recipe.weight_temperature
        return self._scores[head].to(logits_BEC.device).expand(logits_BEC.shape[:2])

    def _average(self, logits_BEC: Tensor, scores_BE: Tensor, seen_BE: Tensor) -> Tensor:
        """Return log-probabilities (B, C), averaged over the members that see each clip."""
        unseen_BE = ~seen_BE.to(scores_BE.device)
        log_weights_BE1 = scores_BE.masked_fill(unseen_BE, -torch.inf).log_softmax(1)[:, :, None]
        logits_BEC = logits_BEC / self.recipe.temperature
        if self.recipe.average == "logits":
            return (log_weights_BE1.exp() * logits_BEC).sum(dim=1).log_softmax(dim=-1)
        return torch.logsumexp(log_weights_BE1 + logits_BEC.log_softmax(dim=-1), dim=1)


def _tokens_of(
    rows_N: Tensor, set_K: Tensor, tokens: dict[str, Tensor], present_BK: Tensor, member: KarmmaModel
) -> tuple[dict[str, Tensor], Tensor]:
    """Return the tokens and present_NK of some of a batch's clips, as if they had the modalities of a set alone.

    Args:
        rows_N: Rows of the clips, which have all modalities of the set.
        set_K: bool, True = in the set.
        tokens: Result of `KarmmaModel.encode` for all clips.
        present_BK: bool, True = the clip has the modality.
        member: The model, for its modalities.
    """
    chosen = {}
    for k in set_K.nonzero().flatten().tolist():
        name, places_B = member.modalities[k], present_BK[:, k].cumsum(dim=0) - 1
        places_N = places_B[rows_N]
        is_everything = len(places_N) == len(tokens[name])
        chosen[name] = tokens[name] if is_everything else tokens[name][places_N.to(tokens[name].device)]
    return chosen, set_K.expand(len(rows_N), -1)


def _blank_tokens(member: KarmmaModel) -> tuple[dict[str, Tensor], Tensor]:
    """Return the tokens of one clip with every modality, all zeros."""
    tokens = {m: member._like.new_zeros(1, num, member.width) for m, num in member.num_tokens.items()}
    return tokens, torch.ones(1, len(tokens), dtype=torch.bool)


def _blank_clip(member: KarmmaModel) -> tuple[dict[str, Tensor], Tensor]:
    """Return the inputs of one all-zero clip with every modality."""
    inputs = {m: member.blank_clip(m) for m in member.modalities}
    return inputs, torch.ones(1, len(member.modalities), dtype=torch.bool)


def build_teacher(
    recipe: Recipe, heads: dict[str, int], engine: Engine, world: World, measure: Measure
) -> Teacher | ShardedModule:
    """Load the teacher of a distill recipe, in the precision and on the device of `engine`. Every rank must call this.

    Args:
        recipe: the student's recipe.
        heads: number of classes per head.
        engine: the student's engine.
        world: this rank.
        measure: called for experts that are weighted by their loss on held-out clips.

    Raises:
        UserError: a teacher is missing, was trained on other classes, modalities or inputs, or held out no clips to
            determine its weight from.
    """
    assert recipe.distill is not None
    paths = [recipe.find_run(name) for name in recipe.distill.names]
    members = [load_member(path, recipe, heads).to(dtype=engine.dtype) for path in paths]
    for note in _undropped(paths, recipe) if world.is_main else ():
        _logger.warning(note)
    if recipe.distill.teachers:
        _check_every_modality(members, recipe)
    if recipe.distill.teachers and recipe.distill.expert_weights == "softmin":
        losses = _held_out_losses(paths, members, recipe, heads, engine.device, measure)
    else:
        losses = {head: [0.0] * len(members) for head in heads}
    teacher = Teacher(members, recipe.data.modalities, losses, recipe.distill).eval()
    if recipe.distill.teachers and world.is_main:
        write_json(recipe.run_dir / ENSEMBLE, {"losses": losses, "weights": teacher.weights()})
    if not recipe.distill.shard_teacher:
        return teacher.to(engine.device)
    teacher.run_everything()
    return ShardedModule(teacher, recipe, world)


def members_of(teacher: Teacher | ShardedModule) -> list[KarmmaModel]:
    """Return the frozen models of a teacher."""
    module = teacher.module if isinstance(teacher, ShardedModule) else teacher
    assert isinstance(module, Teacher)
    return [member for member in module.members if isinstance(member, KarmmaModel)]


def _undropped(paths: Sequence[Path], recipe: Recipe) -> list[str]:
    """Return a warning for each multimodal teacher that was trained without dropout although the student uses it."""
    if not recipe.data.modality_dropout.probability:
        return []
    known = {path: data for path in paths if (data := _data_of(path)) is not None}
    return [
        f"{path}: this teacher was trained without modality dropout, but its student is trained with it: the "
        "teacher has not seen most of the subsets that it will be given (data.modality_dropout of its recipe)"
        for path, data in known.items()
        if len(data.modalities) > 1 and not data.modality_dropout.probability
    ]


def _data_of(path: Path) -> DataRecipe | None:
    """Return the data section that weights were trained with; None if their folder holds no recipe."""
    _, run_dir = run_places(path)
    return read_run_recipe(run_dir).data if (run_dir / "recipe.yaml").is_file() else None


def load_member(path: Path, recipe: Recipe, heads: dict[str, int]) -> KarmmaModel:
    """Load a teacher or expert, frozen and in eval mode, and check it against the student's data."""
    assert recipe.distill is not None
    member, card = load_model(path)
    modalities, data_modalities = list(member.modalities), recipe.data.modalities
    if dict(member.heads) != heads:
        raise UserError(f"{path}: the teacher's heads {dict(member.heads)} differ from the heads of the shards {heads}")
    is_subset = set(modalities) <= set(data_modalities)
    if not is_subset if recipe.distill.teachers else modalities != data_modalities:
        raise UserError(
            f"{path}: the teacher's modalities {', '.join(modalities)} are not those of data.modalities, "
            f"{', '.join(data_modalities)} (for a student with fewer modalities, set model.modalities)"
        )
    differing = [name for name in modalities if card.inputs.section(name) != recipe.inputs.section(name)]
    if differing:
        raise UserError(
            f"{path}: the teacher was trained on other inputs: "
            f"inputs.{MODALITIES[differing[0]].section} must be equal in the two recipes"
        )
    return member.requires_grad_(False).eval()


def _check_every_modality(members: Sequence[KarmmaModel], recipe: Recipe) -> None:
    known = {name for member in members for name in member.modalities}
    unknown = [name for name in recipe.data.modalities if name not in known]
    if unknown:
        raise UserError(
            f"distill.teachers: no expert takes {unknown[0]}, a modality of the clips: add an expert for it, or remove "
            "it from data.modalities"
        )


def _held_out_losses(
    paths: Sequence[Path], members: Sequence[KarmmaModel], recipe: Recipe, heads: dict[str, int],
    device: torch.device, measure: Measure,
) -> dict[str, list[float]]:  # fmt: skip
    """Return, per head, the experts' losses on training clips that no expert learned from.

    A resumed run returns the losses that it started with.
    """
    losses = _stored_losses(recipe.run_dir / ENSEMBLE, heads, len(members))
    barrier()  # every rank must read the file before the main rank writes it
    if losses:
        return losses
    fraction = min(_hold_out(path) for path in paths)  # a larger fraction holds out a superset of these clips
    changes = {"validation_split": recipe.data.train_split, "hold_out": fraction}
    model = recipe.model.model_copy(update={"modalities": None})
    measured = []
    for member in members:
        data = recipe.data.model_copy(update={**changes, "modalities": list(member.modalities)})
        measured.append(measure(member.to(device), recipe.model_copy(update={"data": data, "model": model})))
        member.cpu()  # one at a time: the device may not hold all experts
    return {head: [scores[f"{head}_loss"] for scores in measured] for head in heads}


def _stored_losses(path: Path, heads: Collection[str], num_experts: int) -> dict[str, list[float]]:
    """Return the losses in ensemble.json; empty if the file does not exist.

    Raises:
        UserError: the file is damaged.
    """
    try:
        fields = read_json(path).nested("losses")
        losses = {head: [JsonObject({head: loss}).number(head) for loss in fields.items(head)] for head in heads}
        if any(len(of_experts) != num_experts for of_experts in losses.values()):
            raise ValueError(f"losses are not of {num_experts} experts")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read ({reason}): remove it to measure the experts again") from None
    return losses


def _hold_out(path: Path) -> float:
    """Return the fraction of the training recordings that an expert held out.

    Raises:
        UserError: the expert held out no training clips.
    """
    data = _data_of(path)
    if data is None or not data.hold_out:
        raise UserError(
            f"{path}: this expert held out no training clips to determine its weight from: train it with "
            "data.hold_out, or set distill.expert_weights to per_sample or equal"
        )
    return data.hold_out
