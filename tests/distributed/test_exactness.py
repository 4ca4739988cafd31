"""Two ranks under every ZeRO stage learn what one plain PyTorch loop learns, whatever modalities each of them has."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from exactness import (
    BROKEN,
    CASES,
    FEW,
    LR,
    NUM_STEPS,
    Case,
    Reference,
    compare,
    launch_ranks,
    make_shards,
    make_teacher,
    read_outcome,
    run_reference,
)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the shards of all cases."""
    folder = tmp_path_factory.mktemp("exactness")
    make_shards(folder)
    return folder


@pytest.fixture(scope="module")
def references(work: Path) -> dict[Case, Reference]:
    """What plain PyTorch does in each case."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    make_teacher(work / "shards", work)
    found = {case: run_reference(case, work / "shards", work) for case in (*CASES, BROKEN)}
    torch.set_num_threads(threads)
    return found


def train(cases: list[Case], zero_stage: int, work: Path, skip_branches: bool = False) -> tuple[int, Path]:
    """Exit code of two ranks that train the cases, and the folder of their runs."""
    folder = work / f"zero-{zero_stage}{'-broken' if skip_branches else ''}"
    make_teacher(work / "shards", folder)
    return launch_ranks(cases, zero_stage, work / "shards", folder, skip_branches), folder


@pytest.mark.parametrize(("zero_stage", "cases"), [(0, FEW), (1, [*CASES, BROKEN]), (2, FEW), (3, FEW)])
def test_ranks_with_other_modalities_than_each_other_learn_what_one_process_learns(
    work: Path, references: dict[Case, Reference], zero_stage: int, cases: list[Case]
) -> None:
    """Disjoint modalities, one that a rank never has, accumulation, both optimizers, every stage of training."""
    code, folder = train(cases, zero_stage, work)
    assert code == 0
    for case in cases:
        found = compare(read_outcome(case, folder), references[case])
        assert found.same_clips, case
        assert found.loss <= 1e-6, (case, found)
        assert found.weight <= (1e-6 if case.optimizer == "sgd" else 1e-4), (case, found)
        assert found.cosine >= 0.9999, (case, found)
        # What AdamW makes of rounding is bounded by its steps, in both directions, and there is little of it.
        assert found.noise_share < 0.01, (case, found)
        assert found.noise <= 2 * NUM_STEPS * LR[case.optimizer], (case, found)


def test_skipping_the_branch_of_an_absent_modality_is_noticed(
    work: Path, references: dict[Case, Reference]
) -> None:
    """The rule that an encoder always runs is what exactness rests on, and these tests see when it is broken."""
    code, folder = train([BROKEN], 1, work, skip_branches=True)
    assert code == 0, "nothing fails: that is what makes it dangerous"
    found = compare(read_outcome(BROKEN, folder), references[BROKEN])
    assert found.same_clips
    assert found.cosine < 0.9999, found
