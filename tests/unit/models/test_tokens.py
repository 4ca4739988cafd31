"""Tests of the tau-average: its groups and its gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from karmma_dist.models.karmma import Grouping, tau_average

GROUPINGS: tuple[Grouping, ...] = ("paper", "even")


def group_sizes(num_tokens: int, tau: int, grouping: Grouping) -> list[int]:
    if num_tokens <= tau:
        return [1] * num_tokens
    size, rest = divmod(num_tokens, tau)
    if grouping == "paper":
        return [size] * (tau - 1) + [size + rest]
    return [size + 1] * rest + [size] * (tau - rest)


def naive(tokens_BTD: Tensor, tau: int, grouping: Grouping) -> Tensor:
    means, start = [], 0
    for size in group_sizes(tokens_BTD.shape[1], tau, grouping):
        means.append(tokens_BTD[:, start : start + size].mean(dim=1))
        start += size
    assert start == tokens_BTD.shape[1]
    return torch.stack(means, dim=1)


@given(st.integers(1, 60), st.integers(1, 70), st.sampled_from(GROUPINGS))
def test_every_group_is_averaged_as_a_loop_would(num_tokens: int, tau: int, grouping: Grouping) -> None:
    tokens = torch.randn(2, num_tokens, 3, dtype=torch.float64)
    torch.testing.assert_close(tau_average(tokens, tau, grouping), naive(tokens, tau, grouping))


def test_784_tokens_become_299_pairs_and_one_group_of_186() -> None:
    tokens = torch.arange(784, dtype=torch.float64).reshape(1, 784, 1)
    out = tau_average(tokens, 300)[0, :, 0]
    assert out[:299].tolist() == pytest.approx([2 * group + 0.5 for group in range(299)])
    assert float(out[299]) == pytest.approx((598 + 783) / 2)


@given(st.integers(1, 60), st.integers(1, 60))
def test_even_groups_differ_by_one_token_at_most(num_tokens: int, tau: int) -> None:
    gradient = torch.ones(1, num_tokens, 1, dtype=torch.float64, requires_grad=True)
    out = tau_average(gradient, tau, "even")
    weights = torch.autograd.grad(out.sum(), gradient)[0]
    sizes = {round(1 / weight) for weight in weights.flatten().tolist()}
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_gradients_are_those_of_finite_differences(grouping: Grouping) -> None:
    tokens = torch.randn(2, 11, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: tau_average(x, 4, grouping), tokens)


def test_few_enough_tokens_pass_untouched() -> None:
    tokens = torch.randn(2, 5, 3)
    assert tau_average(tokens, 5) is tokens


def test_an_invalid_tau_or_grouping_is_refused() -> None:
    with pytest.raises(ValueError, match="tau is 0"):
        tau_average(torch.zeros(1, 2, 3), 0)
    with pytest.raises(ValueError, match="grouping is 'odd'"):
        tau_average(torch.zeros(1, 2, 3), 1, "odd")  # type: ignore[arg-type]
