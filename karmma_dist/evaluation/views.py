"""Several views of a clip, averaged before anything is measured.

The loader gives every clip V rows, one after another, that differ in their inputs alone; keys, presence and so masks
are the same, since masks follow from (seed, key). Each encoder runs once per row, the fusion block once per row and
different mask, and the views' class probabilities are averaged: the mean of their softmaxes, as is usual in video
recognition. V views cost V times the model's time. A batch is V times as large, so the loader takes fewer clips at a
time and memory stays what one view needs (until one clip's views are more than a batch). Decoding costs more only by
the frames that samplings do not share: each member is read and decoded once.

Legend: B clips, R clips that can be run, V views, C classes.
"""

from __future__ import annotations

import re
from dataclasses import replace

from torch import Tensor

from karmma_dist.errors import UserError
from karmma_dist.recipe import ViewsRecipe
from karmma_dist.streaming.batch import Batch

_VIEWS = re.compile(r"([1-9][0-9]{0,2})x([13])")


def parse_views(text: str) -> ViewsRecipe:
    """Read `--views`: `"10x3"` is ten samplings of three crops each.

    Raises:
        UserError: anything else.
    """
    found = _VIEWS.fullmatch(text)
    if found is None:
        raise UserError(f"--views '{text}': give TEMPORALxSPATIAL, with 1 or 3 crops, e.g. 3x1 or 10x3")
    return ViewsRecipe(temporal=int(found[1]), spatial=3 if found[2] == "3" else 1)


def one_row_per_clip(batch: Batch, num_views: int) -> Batch:
    """The batch with each clip's first row alone; the inputs are left as they are, V rows a clip."""
    if len(batch.keys) % num_views:
        raise ValueError(f"{len(batch.keys)} rows are no multiple of {num_views} views")
    if num_views == 1:
        return batch
    return replace(
        batch,
        keys=batch.keys[::num_views],
        present_BM=batch.present_BM[::num_views],
        labels={head: labels[::num_views] for head, labels in batch.labels.items()},
        valid_B=batch.valid_B[::num_views],
    )


def rows_of_views(flags_RM: Tensor, num_views: int) -> Tensor:
    """What holds for a clip, once for each of its views: (R, M) -> (R V, M)."""
    return flags_RM if num_views == 1 else flags_RM.repeat_interleave(num_views, dim=0)


def mean_over_views(log_probs: Tensor, num_views: int) -> Tensor:
    """Logarithm of the views' mean probability: (R V, C) -> (R, C). Equal views, or one, give theirs to the bit."""
    if num_views == 1:
        return log_probs
    views_RVC = log_probs.unflatten(0, (-1, num_views))
    highest_R1C = views_RVC.amax(dim=1, keepdim=True)
    return (highest_R1C + (views_RVC - highest_R1C).exp().mean(dim=1, keepdim=True).log()).squeeze(1)
