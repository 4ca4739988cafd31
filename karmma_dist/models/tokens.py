"""Token reduction: average an encoder's tokens down to at most tau (paper, Sec. III-C). It has no parameters.

Legend: B clips, T tokens, D width.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Grouping = Literal["paper", "even"]


def tau_average(tokens_BTD: Tensor, tau: int, grouping: Grouping = "paper") -> Tensor:
    """Average consecutive tokens in `tau` groups; `tau` tokens or fewer pass unchanged.

    Args:
        tokens_BTD: Tokens, floating point.
        tau: Most tokens that come out, at least 1.
        grouping: "paper": groups of floor(T / tau) and a last one that takes the rest (784 -> 300: 299 pairs and one
            of 186); "even": sizes differ by one at most, larger ones first.

    Returns:
        (B, min(T, tau), D) in the dtype of `tokens_BTD`.

    Raises:
        ValueError: `tau` below 1, or an unknown grouping.
    """
    if tau < 1:
        raise ValueError(f"tau is {tau}: it must be at least 1")
    if grouping not in ("paper", "even"):
        raise ValueError(f"grouping is '{grouping}': it must be 'paper' or 'even'")
    num_tokens = tokens_BTD.shape[1]
    if num_tokens <= tau:
        return tokens_BTD
    size, rest = divmod(num_tokens, tau)
    if grouping == "paper":
        first, last = tokens_BTD.split([size * (tau - 1), size + rest], dim=1)
        parts = [_group_means(first, tau - 1), _group_means(last, 1)]
    else:
        first, last = tokens_BTD.split([(size + 1) * rest, size * (tau - rest)], dim=1)
        parts = [_group_means(first, rest), _group_means(last, tau - rest)]
    return torch.cat([part for part in parts if part.shape[1]], dim=1)


def _group_means(tokens_BTD: Tensor, num_groups: int) -> Tensor:
    """Means of `num_groups` equal runs of tokens; no tokens where there are no groups."""
    if num_groups == 0:
        return tokens_BTD
    return tokens_BTD.unflatten(1, (num_groups, -1)).mean(dim=2)  # (B, num_groups, D)
