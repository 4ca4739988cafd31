"""Evaluate one model under many conditions in one pass over the clips.

    conditions = build_conditions(model.modalities, subsets=True, sweep=True, num_seeds=3)
    results = evaluate(model, batches, conditions, device="cuda")

Encoders do not see each other, so each encoder runs once per clip and only the fusion block is repeated. A clip has at
most 2^M - 1 distinct masks, so the fusion block runs at most that often, whatever the number of conditions. A broken
sensor costs one more pass of its own encoder.

Legend: B clips of a batch, R of them runnable, N clips of the split, M modalities, K conditions, P distinct masks,
C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from karmma_dist.errors import UserError
from karmma_dist.evaluation.conditions import Condition, keep
from karmma_dist.evaluation.corruptions.batches import (
    EncodeOnce,
    SensorModel,
    Sensors,
    sensor_states,
    side_by_side,
    states_of,
)
from karmma_dist.evaluation.exports.predictions import PredictionCollector
from karmma_dist.evaluation.groups import Groups
from karmma_dist.evaluation.metrics import ranked
from karmma_dist.evaluation.results import Results
from karmma_dist.evaluation.scores import (
    BatchScores,
    count_unlabelled,
    is_unlabelled,
    joint_ranks,
    merge,
    score_rows,
)
from karmma_dist.evaluation.views import mean_over_views, one_row_per_clip, rows_of_views
from karmma_dist.streaming.batch import Batch


@torch.no_grad()
def evaluate(
    model: SensorModel,
    batches: Iterable[Batch],
    conditions: Sequence[Condition],
    *,
    device: torch.device | str,
    drop_nouns: Collection[int] = (),
    progress: Callable[[int], None] | None = None,
    gather: Callable[[list[BatchScores]], list[BatchScores]] | None = None,
    groups: Groups | None = None,
    num_views: int = 1,
    predictions: PredictionCollector | None = None,
    sensors: Sensors | None = None,
) -> Results:
    """Run `model` over `batches` and score it under every condition.

    The model is in eval mode during the evaluation; the mode of every module is restored afterwards. Each rank must
    hold the full model: a rank whose last batch is all padding does not call the model, so parameters sharded over
    ranks would wait for it. Only `gather` communicates; with several ranks, every rank must call `evaluate`.

    Args:
        model: The model to evaluate.
        batches: This rank's clips, each clip on one rank only. Inputs are as the model takes them or, with `sensors`,
            as they leave the loader.
        conditions: Conditions to evaluate (see `build_conditions`).
        device: Device of the model.
        drop_nouns: Classes of the head "noun" whose clips are left out (the paper: nouns never trained on).
        progress: Called with the number of clips of each finished batch, including damaged clips.
        gather: Returns the concatenated lists of all ranks in any order (see torch's all_gather_object), so that
            every rank returns the same results; None: this process has all clips.
        groups: Rare classes and unseen participants, which get their own figures.
        num_views: Number of consecutive rows of each clip in `batches`: views whose probabilities are averaged.
        predictions: Collects this process's predictions with intact sensors, one per clip and distinct mask; its
            conditions must be those of `conditions` without a broken sensor. Clips then need no labels: if no clip
            has labels, the results have no rows.
        sensors: Turns the batches into the model's inputs, and breaks the sensors that the conditions name.

    Raises:
        UserError: no clip or no labelled clip exists, a clip occurs twice, a label is out of range, a prediction is
            NaN, a condition names a modality that the model lacks, or a sensor is to be broken without `sensors`.
    """
    if not conditions:
        raise UserError("no condition to evaluate: name at least one")
    if drop_nouns and "noun" not in model.heads:
        raise UserError(f"drop_nouns is set, but the model has no head 'noun' (it has {', '.join(model.heads)})")
    scores = []
    states = sensor_states(conditions)
    with _eval_mode(model):
        for batch in batches:
            intact, state_batches = states_of(batch, states, sensors)
            encode_once = EncodeOnce(model, intact.inputs)
            parts = []
            for state, made in state_batches:
                kept = predictions if state.corruption is None else None
                scored = _score_batch(encode_once, made, state.conditions, torch.device(device), num_views, kept)
                parts.append((state, scored))
            scores.append(side_by_side(parts))
            if progress is not None:
                progress(len(scores[-1].keys) + len(scores[-1].damage))
    merged = merge(gather(scores) if gather is not None else scores)
    if predictions is not None and is_unlabelled(merged):
        return Results([], count_unlabelled(merged, list(model.modalities)))
    return score_rows(merged, conditions, list(model.modalities), dict(model.heads), drop_nouns, groups)


@contextmanager
def _eval_mode(model: SensorModel) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _score_batch(
    model: SensorModel,
    batch: Batch,
    conditions: Sequence[Condition],
    device: torch.device,
    num_views: int,
    predictions: PredictionCollector | None,
) -> BatchScores:
    """Encode once, fuse once per distinct mask, and keep the scores of all clips except padding."""
    _check_labels(model, batch)
    batch = one_row_per_clip(batch, num_views)
    used = {name for condition in conditions for name in condition.modalities}
    used_M = torch.tensor([name in used for name in model.modalities])
    present_BM = batch.present_BM.cpu()
    masks = [keep(condition, batch.keys, present_BM, model.modalities) for condition in conditions]
    bits_M = 2 ** torch.arange(len(model.modalities))
    masks_BK = torch.stack([(mask_BM * bits_M).sum(dim=1) for mask_BM in masks], dim=1).numpy()
    ranks = {name: np.full(masks_BK.shape, -1, dtype=np.int32) for name in ranked(list(model.heads))}
    losses = {head: np.full(masks_BK.shape, np.nan) for head in model.heads}
    confidence = {name: np.full(masks_BK.shape, np.nan, dtype=np.float32) for name in ranks}
    runnable_B = (present_BM & used_M).any(dim=1)
    valid_B = batch.valid_B.cpu().numpy()
    passes = _Passes(np.zeros((0, 0), dtype=np.int64), [])
    rows = runnable_B.numpy()
    if bool((runnable_B & batch.valid_B.cpu()).any()):
        runnable_ranks, runnable_losses, runnable_confidence, passes = _scores_of_masks(
            model, batch, used_M, runnable_B, masks_BK[rows], device, num_views, predictions is not None
        )
        for name, ranks_RK in runnable_ranks.items():
            ranks[name][rows] = np.where(masks_BK[rows] > 0, ranks_RK, -1)
        for head, losses_RK in runnable_losses.items():
            losses[head][rows] = losses_RK
        for name, confidence_RK in runnable_confidence.items():
            confidence[name][rows] = confidence_RK
    scores = BatchScores(
        keys=[key for key, valid in zip(batch.keys, valid_B, strict=True) if valid],
        labels={head: batch.labels[head].cpu().numpy()[valid_B] for head in model.heads},
        present_BM=present_BM.numpy()[valid_B],
        masks_BK=masks_BK[valid_B].astype(np.uint8),
        ranks={name: ranks_BK[valid_B] for name, ranks_BK in ranks.items()},
        losses={head: losses_BK[valid_B] for head, losses_BK in losses.items()},
        confidence={name: confidence_BK[valid_B] for name, confidence_BK in confidence.items()},
        damage=[str(damage) for damage in batch.damage],
    )
    if predictions is not None:
        masks_BP, log_probs = passes.of_clips(rows, dict(model.heads))
        predictions.add(
            scores.keys,
            scores.present_BM,
            scores.labels,
            scores.masks_BK,
            masks_BP[valid_B],
            {head: values[valid_B] for head, values in log_probs.items()},
        )
    return scores


@dataclass(frozen=True)
class _Passes:
    """The predictions from the passes of the fusion block over one batch."""

    masks_RP: np.ndarray
    """Mask of each runnable clip in each pass."""
    log_probs: list[dict[str, Tensor]]
    """Log-probabilities (R, C) per pass and head."""

    def of_clips(self, runnable_B: np.ndarray, heads: dict[str, int]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Return masks (B, P), 0 for clips without a pass, and log-probabilities (B, P, C), float32, per head."""
        num_B, num_P = len(runnable_B), len(self.log_probs)
        masks_BP = np.zeros((num_B, num_P), dtype=np.uint8)
        log_probs = {head: np.zeros((num_B, num_P, num), dtype=np.float32) for head, num in heads.items()}
        for number, pass_log_probs in enumerate(self.log_probs):
            masks_BP[runnable_B, number] = self.masks_RP[:, number]
            for head, values_RC in pass_log_probs.items():
                log_probs[head][runnable_B, number] = values_RC.float().cpu().numpy()
        return masks_BP, log_probs


def _scores_of_masks(
    model: SensorModel,
    batch: Batch,
    used_M: Tensor,
    runnable_B: Tensor,
    masks_RK: np.ndarray,
    device: torch.device,
    num_views: int,
    keep_log_probs: bool,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, np.ndarray], _Passes]:
    """Return ranks, losses and confidence (R, K) of the runnable clips, and the passes.

    Entries whose mask is 0 are undefined. Clips without a usable modality have no row in any input, so it is enough to
    leave them out of present_BM. Inputs of modalities that no condition uses are left out, so that their encoders do
    not run.
    """
    present_RM = (batch.present_BM.cpu() & used_M)[runnable_B].to(device)
    used = [name for name, use in zip(model.modalities, used_M.tolist(), strict=True) if use]
    inputs = {name: batch.inputs[name].to(device) for name in used if name in batch.inputs}
    labels = {head: batch.labels[head].cpu()[runnable_B].to(device) for head in model.heads}
    present_of_views = rows_of_views(present_RM, num_views)
    tokens = model.encode(inputs, present_of_views)
    masks_RP, place_RK = _distinct(masks_RK)
    bits_M = 2 ** np.arange(len(model.modalities))
    passes, kept = [], []
    for mask_R in masks_RP.T:
        keep_RM = torch.from_numpy((mask_R[:, None] & bits_M) > 0).to(device)
        logits = model.fuse(tokens, present_of_views, rows_of_views(keep_RM, num_views))
        log_probs = _log_probs(logits, batch, runnable_B, num_views)
        passes.append((_ranks(log_probs, labels), _losses(log_probs, labels), _confidence(log_probs)))
        if keep_log_probs:
            kept.append(log_probs)
    ranks, losses, confidence = (_per_condition(list(scores), place_RK) for scores in zip(*passes, strict=True))
    return ranks, losses, confidence, _Passes(masks_RP, kept)


def _per_condition(passes: list[dict[str, Tensor]], place_RK: np.ndarray) -> dict[str, np.ndarray]:
    """Rearrange one (R,) per pass into (R, K); `place_RK` holds the pass in which each condition was computed."""
    values_RP = {name: torch.stack([scores[name] for scores in passes], dim=1).cpu().numpy() for name in passes[0]}
    return {name: np.take_along_axis(values, place_RK, axis=1) for name, values in values_RP.items()}


def _distinct(masks_RK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return each clip's distinct non-zero masks (R, P), padded by repetition, and each condition's column (R, K)."""
    distinct = [np.unique(masks_K[masks_K > 0]) for masks_K in masks_RK]
    masks_RP = np.stack([np.resize(masks, max(map(len, distinct))) for masks in distinct])
    place_RK = np.stack([np.searchsorted(*pair) for pair in zip(distinct, masks_RK, strict=True)])
    return masks_RP, place_RK


def _log_probs(
    logits: Mapping[str, Tensor], batch: Batch, runnable_B: Tensor, num_views: int
) -> dict[str, Tensor]:
    """Return log-probabilities (R, C), float64, per head, averaged over the views.

    Raises:
        UserError: a prediction is NaN.
    """
    log_probs = {
        head: mean_over_views(torch.log_softmax(scores.double(), dim=1), num_views) for head, scores in logits.items()
    }
    for head, scores in log_probs.items():
        if bool(scores.isnan().any()):
            rows = torch.arange(len(runnable_B))[runnable_B]
            key = batch.keys[int(rows[scores.isnan().any(dim=1).cpu()][0])]
            raise UserError(f"clip {key}: head '{head}' predicts nan: the weights diverged; use an earlier checkpoint")
    return log_probs


def _ranks(log_probs: Mapping[str, Tensor], labels: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return ranks (R,), int64, for "action" and each head."""
    return {
        name: joint_ranks([log_probs[head] for head in heads], [labels[head] for head in heads])
        for name, heads in ranked(list(log_probs)).items()
    }


def _losses(log_probs: Mapping[str, Tensor], labels: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the cross-entropy (R,), float64, of each head; meaningless for clips without a label."""
    return {
        head: -log_probs_RC.gather(1, labels[head].clamp(min=0)[:, None])[:, 0]
        for head, log_probs_RC in log_probs.items()
    }


def _confidence(log_probs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the probability (R,), float64, of the predicted class, for "action" and each head.

    The most probable combination of classes consists of the most probable class of each head.
    """
    highest = {head: log_probs_RC.amax(dim=1) for head, log_probs_RC in log_probs.items()}
    return {
        name: torch.stack([highest[head] for head in heads]).sum(dim=0).exp()
        for name, heads in ranked(list(log_probs)).items()
    }


def _check_labels(model: SensorModel, batch: Batch) -> None:
    for head, num_classes in model.heads.items():
        if head not in batch.labels:
            raise UserError(f"the clips carry no '{head}' label: evaluate on shards of the model's own dataset")
        labels_B = batch.labels[head]
        if len(labels_B) and int(labels_B.max()) >= num_classes:
            row = int(labels_B.argmax())
            raise UserError(
                f"clip {batch.keys[row]}: {head} {int(labels_B[row])} is out of range: the model knows {num_classes} "
                "classes; evaluate on shards of the model's own dataset"
            )
