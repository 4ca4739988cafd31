"""Two ranks at every ZeRO stage learn what a plain PyTorch loop learns, whatever modalities each of them has."""

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
    Job,
    Reference,
    compare,
    launch_ranks,
    make_shards,
    make_teacher,
    read_outcome,
    run_reference,
)

CASES_OF_STAGES = {0: FEW, 1: [*CASES, BROKEN], 2: FEW, 3: FEW}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shards of all cases."""
    return make_shards(tmp_path_factory.mktemp("exactness"))


@pytest.fixture(scope="module")
def references(shards: Path) -> dict[Case, Reference]:
    """The outcome of plain PyTorch in each case."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    make_teacher(shards, shards.parent)
    outcomes = {case: run_reference(case, shards, shards.parent) for case in (*CASES, BROKEN)}
    torch.set_num_threads(threads)
    return outcomes


@pytest.fixture(scope="module")
def trained(shards: Path) -> Path:
    """A folder with what two ranks trained: zero-STAGE for each stage, and `broken`, where branches were skipped."""
    folder = shards.parent
    jobs = [Job(cases, stage, folder / f"zero-{stage}") for stage, cases in CASES_OF_STAGES.items()]
    jobs.append(Job([BROKEN], 1, folder / "broken", skip_branches=True))
    assert launch_ranks(jobs, shards) == 0
    return folder


@pytest.mark.parametrize("zero_stage", CASES_OF_STAGES)
def test_ranks_with_different_modalities_learn_what_one_process_learns(
    trained: Path, references: dict[Case, Reference], zero_stage: int
) -> None:
    """Disjoint modalities, one that a rank never has, accumulation, both optimizers, every stage of training."""
    for case in CASES_OF_STAGES[zero_stage]:
        difference = compare(read_outcome(case, trained / f"zero-{zero_stage}"), references[case])
        assert difference.same_clips, case
        assert difference.loss <= 1e-6, (case, difference)
        assert difference.weight <= (1e-6 if case.optimizer == "sgd" else 1e-4), (case, difference)
        assert difference.cosine >= 0.9999, (case, difference)
        # AdamW's steps bound what it makes of rounding, in both directions, and few weights are rounding only.
        assert difference.noise_share < 0.01, (case, difference)
        assert difference.noise <= 2 * NUM_STEPS * LR[case.optimizer], (case, difference)


def test_skipping_the_branch_of_an_absent_modality_is_noticed(
    trained: Path, references: dict[Case, Reference]
) -> None:
    """Exactness rests on the rule that an encoder always runs: breaking it fails nothing, but these tests see it."""
    difference = compare(read_outcome(BROKEN, trained / "broken"), references[BROKEN])
    assert difference.same_clips
    assert difference.cosine < 0.9999, difference
