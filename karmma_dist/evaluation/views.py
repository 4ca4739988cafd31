"""Several views of each clip, averaged before anything is measured.

The loader gives every clip V consecutive rows that differ only in their inputs. Their keys, presence and masks are
equal, since masks are a function of (seed, key). Each encoder runs once per row, the fusion block once per row and
distinct mask. The class probabilities of the views are then averaged: the mean of their softmaxes, as is usual in
video recognition. V views take V times the model's time. The loader takes fewer clips per batch, so memory stays that
of one view (unless the views of one clip exceed a batch). Each member is read and decoded once: decoding costs more
only by the frames that the temporal samples do not share.

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
    """Read `--views`: `"10x3"` means ten temporal samples with three crops each.

    Raises:
        UserError: the text has another form.
    """
    match = _VIEWS.fullmatch(text)
    if match is None:
        raise UserError(f"--views '{text}': give TEMPORALxSPATIAL, with 1 or 3 crops, e.g. 3x1 or 10x3")
    return ViewsRecipe(temporal=int(match[1]), spatial=3 if match[2] == "3" else 1)


def one_row_per_clip(batch: Batch, num_views: int) -> Batch:
    """Return the batch with only the first row of each clip; the inputs keep V rows per clip."""
    if len(batch.keys) % num_views:
        raise ValueError(f"{len(batch.keys)} rows are not a multiple of {num_views} views")
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
    """Repeat the flags of each clip for each of its views: (R, M) -> (R V, M)."""
    return flags_RM if num_views == 1 else flags_RM.repeat_interleave(num_views, dim=0)


def mean_over_views(log_probs: Tensor, num_views: int) -> Tensor:
    """Return the logarithm of the views' mean probability: (R V, C) -> (R, C).

    For one view, or for equal views, the result equals the view's own bit for bit.
    """
    if num_views == 1:
        return log_probs
    views_RVC = log_probs.unflatten(0, (-1, num_views))
    highest_R1C = views_RVC.amax(dim=1, keepdim=True)
    return (highest_R1C + (views_RVC - highest_R1C).exp().mean(dim=1, keepdim=True).log()).squeeze(1)
