"""Runs of a study that ask a frozen model the same share its memory, and the dry run says what that saves."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from karmma_dist.cli import main
from karmma_dist.memory.header import HEADER
from karmma_dist.recipe import Recipe, load_chain, load_recipe, save_recipe
from karmma_dist.recipe.data import ModalityDropout
from karmma_dist.runs.folder import write_state
from karmma_dist.runs.listing import find_runs
from karmma_dist.streaming.dropout import keep_patterns, keep_present
from karmma_dist.studies.costs import StudyCosts, plan_costs
from karmma_dist.studies.jobs import write_recipe
from karmma_dist.studies.memories import Held
from karmma_dist.studies.plan import StudyPlan, plan_study
from karmma_dist.studies.study import load_study
from kits.studies import STUDY, write_study

CLIPS = 30
TEACHER_ROW = {"label": "teacher", "recipe": "tiny/teacher"}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def student(label: str, *changes: str) -> dict[str, Any]:
    return {"label": label, "recipe": "tiny/student", "set": list(changes)}


def plan(home: Path, *rows: dict[str, Any], seeds: int = 1, **changes: Any) -> StudyPlan:
    write_study(home, {"rows": list(rows), **changes})
    return plan_study(load_study("tiny/tab0"), seeds)


def recipes_of(planned: StudyPlan) -> dict[tuple[str, int], Recipe]:
    return {cell: planned.runs[name].recipe for cell, name in planned.cells.items()}


def answers(planned: StudyPlan) -> dict[tuple[str, int], str | None]:
    """Return the teacher's memory of each row and seed."""
    return {cell: recipe.distill.memory for cell, recipe in recipes_of(planned).items() if recipe.distill is not None}


def freeze(home: Path, views: int | None = None) -> None:
    """Freeze the teacher's encoders, with a memory for each if `views` is given."""
    path = home / "recipes" / "tiny" / "teacher.yaml"
    content = yaml.safe_load(path.read_text())
    for name, encoder in content["model"]["encoders"].items():
        encoder["frozen"] = True
        if views is not None:
            encoder["memory"] = {"path": f"tokens/{name}", "views": views}
    path.write_text(yaml.safe_dump(content))


def costs_by_row(planned: StudyPlan, costs: StudyCosts) -> dict[str, tuple[float, float]]:
    """Return the FLOPs of each row's own run, without memories and planned."""
    by_name = {cost.run.name: cost for cost in costs.runs}
    own = {label: by_name[name] for (label, seed), name in planned.cells.items() if seed == 0}
    return {label: (cost.flops or 0, cost.planned or 0) for label, cost in own.items()}


@pytest.mark.parametrize(
    "change",
    ["distill.alpha=0.9", "distill.temperature=2", "distill.average=logits", "training.epochs=3", "optimizer.lr=0.1",
     "training.batch_size=5", "model.width=32", "model.missing=leave_out", "training.zero_stage=2"],
)  # fmt: skip
def test_students_that_ask_their_teacher_the_same_share_a_memory(home: Path, change: str) -> None:
    held = answers(plan(home, student("a", "distill.alpha=0.2"), student("b", change), seeds=2))
    assert held["a", 0] == held["b", 0]
    assert held["a", 1] == held["b", 1]
    assert re.fullmatch(r"runs/memories/tiny-teacher@seed0-[0-9a-f]{8}", held["a", 0] or "")
    assert held["a", 0] != held["a", 1]


@pytest.mark.parametrize(
    "changes",
    [["data.modality_dropout.probability=0.5"], ["data.modality_dropout={probability: 0.25, draw: independent}"],
     ["data.hold_out=0.1"], ["data.train_split=other"], ["data.shards=others", "optimizer.lr=0.5"],
     ["inputs.video.jitter=0.2"], ["model.modalities=[video]"], ["training.precision=fp32"],
     ["data.order={lanes: 2, window: 4}"],
     ["distill.teacher=other", "after=[]"], ["distill.teacher=null", "distill.teachers=[tiny/teacher, other]"]],
)  # fmt: skip
def test_students_of_other_answers_share_nothing_with_the_rest(home: Path, changes: list[str]) -> None:
    held = answers(plan(home, student("a"), student("b", "distill.alpha=0.9"), student("c", *changes)))
    assert held["a", 0] == held["b", 0] is not None
    assert held["c", 0] is None
    twice = answers(plan(home, student("a"), student("c", *changes), student("d", *changes, "distill.alpha=0.9")))
    assert twice["c", 0] == twice["d", 0] is not None
    assert twice["c", 0] != held["a", 0]
    assert twice["a", 0] is None


def test_answers_for_all_subsets_serve_any_modality_dropout(home: Path) -> None:
    every = "distill.memory_subsets=all"
    low, high = (f"data.modality_dropout={{probability: {p}, draw: independent}}" for p in (0.25, 0.75))
    planned = plan(home, student("a", every, low), student("b", every, high), student("c", low, "distill.alpha=0.1"))
    held = answers(planned)
    assert held["a", 0] == held["b", 0] is not None
    assert held["c", 0] is None
    costs = plan_costs(planned)
    (asking, storing), (_, remembering), (alone, _) = (costs_by_row(planned, costs)[label] for label in "abc")
    assert remembering < alone == asking < storing
    num_epochs = recipes_of(planned)["a", 0].training.epochs
    subsets = 2 ** len(recipes_of(planned)["a", 0].data.modalities) - 1
    (memory,) = costs.planned
    assert memory.disk_bytes == num_epochs * CLIPS * (subsets * 10 * 2 + 8)  # verb 4 and noun 6 in bf16


def test_runs_with_lanes_share_a_memory_only_with_the_same_batches(home: Path) -> None:
    lanes = "data.order={lanes: 2, window: 4}"
    held = answers(plan(home, student("a", lanes), student("b", lanes, "training.batch_size=20")))
    assert set(held.values()) == {None}


def test_a_student_alone_keeps_no_memory(home: Path) -> None:
    held = answers(plan(home, student("a"), TEACHER_ROW, seeds=3))
    assert set(held.values()) == {None}


def test_runs_are_the_same_with_and_without_memory(home: Path) -> None:
    rows = (student("a"), student("b", "distill.alpha=0.9"), TEACHER_ROW)
    plain = plan(home, *rows, seeds=2, memory=False)
    assert set(answers(plain).values()) == {None}
    for run in plain.runs.values():
        run.recipe.run_dir.mkdir(parents=True)
        save_recipe(run.recipe, run.recipe.run_dir / "recipe.yaml")
        if run.name.endswith("@seed0"):
            write_state(run.recipe.run_dir, "finished")
        else:
            (run.recipe.run_dir / "checkpoints" / "step-00000003").mkdir(parents=True)
    remembering = plan(home, *rows, seeds=2)
    assert None not in answers(remembering).values()
    assert list(remembering.runs) == list(plain.runs)
    assert remembering.cells == plain.cells
    assert {run.state() for name, run in remembering.runs.items() if name.endswith("@seed0")} == {"finished"}
    assert {run.state() for name, run in remembering.runs.items() if name.endswith("@seed1")} == {"to resume"}


def test_what_trains_a_run_is_told_its_memory(home: Path) -> None:
    planned = plan(home, student("a"), student("b", "distill.alpha=0.9"))
    run = planned.runs[planned.cells["b", 0]]
    for need in run.needs:
        planned.runs[need].recipe.run_dir.mkdir(parents=True)
        save_recipe(planned.runs[need].recipe, planned.runs[need].recipe.run_dir / "recipe.yaml")
    written = load_chain(str(write_recipe(home, run)))[-1]
    assert written.distill is not None
    assert written.distill.memory == answers(planned)["b", 0] is not None


def test_a_memory_that_a_recipe_names_is_kept(home: Path) -> None:
    own = [student("a", "distill.memory=mine"), student("b", "distill.memory=mine", "distill.alpha=0.9")]
    others = [student("c", "distill.temperature=2"), student("d", "distill.memory=null", "optimizer.lr=0.1")]
    held = answers(plan(home, *own, *others))
    assert held == {("a", 0): "mine", ("b", 0): "mine", ("c", 0): None, ("d", 0): None}


def test_seeds_that_name_one_folder_get_a_subfolder_each(home: Path) -> None:
    own = [student("a", "distill.memory=mine"), student("b", "distill.memory=mine", "distill.alpha=0.9")]
    write_study(home)
    freeze(home, views=2)
    planned = plan_with_teacher(home, *own, seeds=2)
    held = answers(planned)
    assert held["a", 0] == held["b", 0] != held["a", 1] == held["b", 1]
    assert re.fullmatch(r"mine/seed1-[0-9a-f]{8}", held["a", 1] or "")
    teachers = [planned.runs[f"tiny/teacher@seed{seed}"].recipe.model.encoders for seed in (0, 1)]
    paths = {encoders[name].memory.path for encoders in teachers for name in encoders if encoders[name].memory}
    assert len(paths) == 4
    assert all(re.fullmatch(r"tokens/(video|audio)/seed[01]-[0-9a-f]{8}", path) for path in paths)


def plan_with_teacher(home: Path, *rows: dict[str, Any], seeds: int = 1) -> StudyPlan:
    """Plan a study without writing the teacher's recipe again."""
    (home / "recipes" / "tiny" / "studies" / "tab0.yaml").write_text(yaml.safe_dump({**STUDY, "rows": list(rows)}))
    return plan_study(load_study("tiny/tab0"), seeds)


def tokens(planned: StudyPlan) -> dict[str, str]:
    """Return the folder of the video encoder's tokens of each row's run of seed 0."""
    cells = recipes_of(planned).items()
    memories = {label: recipe.model.encoders["video"].memory for (label, seed), recipe in cells if seed == 0}
    return {label: memory.path for label, memory in memories.items() if memory is not None}


def test_tokens_are_shared_by_rows_that_see_the_same_views(home: Path) -> None:
    write_study(home)
    freeze(home, views=2)
    memory = "model.encoders.video.memory={path: tokens/video, "
    rows = [
        {"label": label, "recipe": "tiny/teacher", "set": [change]}
        for label, change in {
            "dropout": "data.modality_dropout.probability=0.5", "optimizer": "optimizer.lr=0.1",
            "batch": "training.batch_size=5", "width": "model.width=32", "missing": "model.missing=token",
            "tau": "model.tau=3", "jitter": "inputs.video.jitter=0.3",
            "options": "model.encoders.video.options.width=8",
        }.items()
    ]  # fmt: skip
    only = [f"{memory}views: 7}}", "model.encoders.audio.memory=null"]
    views = {"label": "views", "recipe": "tiny/teacher", "set": only}
    int8 = {"label": "int8", "recipe": "tiny/teacher", "set": [f"{memory}views: 2, dtype: int8}}"]}
    late = {"label": "late", "recipe": "tiny/teacher", "set": ["model.fusion=late", "model.missing=leave_out"]}
    paths = tokens(plan_with_teacher(home, TEACHER_ROW, *rows, views, int8, late))
    same = {label for label, path in paths.items() if path == paths["teacher"]}
    assert same == {"teacher", "dropout", "optimizer", "batch", "width", "missing", "late", "views"}
    assert len(set(paths.values())) == 1 + len({"tau", "jitter", "options", "int8"})
    assert all(re.fullmatch(r"tokens/video/seed0-[0-9a-f]{8}", path) for path in paths.values())
    alone = tokens(plan_with_teacher(home, TEACHER_ROW, seeds=3))
    assert alone["teacher"] == paths["teacher"]


def test_a_folder_of_memories_is_no_run(home: Path) -> None:
    planned = plan(home, student("a"), student("b", "distill.alpha=0.9"))
    memory = home / (answers(planned)["a", 0] or "")
    (memory / "epoch-00000").mkdir(parents=True)
    (memory / HEADER).write_text("{}")
    run = planned.runs[planned.cells["a", 0]]
    run.recipe.run_dir.mkdir(parents=True)
    save_recipe(run.recipe, run.recipe.run_dir / "recipe.yaml")
    assert [found.name for found in find_runs(home / "runs")] == [run.name]


def test_the_first_run_asks_the_teacher_and_the_others_do_not(home: Path) -> None:
    rows = [student("a"), student("b", "distill.alpha=0.9"), {"label": "alone", "recipe": "tiny/teacher"}]
    planned = plan(home, *rows)
    costs = costs_by_row(planned, plan_costs(planned))
    asking, planned_asking = costs["a"]
    full, remembering = costs["b"]
    assert asking == planned_asking == full
    assert remembering == costs["alone"][0]  # the same model without a teacher
    off = plan(home, *rows, memory=False)
    assert {flops == with_memory for flops, with_memory in costs_by_row(off, plan_costs(off)).values()} == {True}


def test_a_longer_run_reads_what_a_shorter_one_stored(home: Path) -> None:
    planned = plan(home, student("a", "training.epochs=2"), student("b", "training.epochs=5"), TEACHER_ROW)
    costs = plan_costs(planned)
    rows = costs_by_row(planned, costs)
    teaching = rows["a"][0] / 2 - rows["teacher"][0]
    assert rows["b"][0] - rows["b"][1] == pytest.approx(2 * teaching)
    (memory,) = costs.planned
    assert memory.disk_bytes == 5 * CLIPS * (10 * 2 + 8)  # verb 4 and noun 6 in bf16


def test_a_finished_run_without_memory_has_stored_nothing(home: Path) -> None:
    rows = [student("a"), student("b", "distill.alpha=0.9"), student("c", "distill.alpha=0.1")]
    before = plan(home, *rows, memory=False)
    run = before.runs[before.cells["a", 0]]
    run.recipe.run_dir.mkdir(parents=True)
    save_recipe(run.recipe, run.recipe.run_dir / "recipe.yaml")
    write_state(run.recipe.run_dir, "finished")
    planned = plan(home, *rows)
    costs = costs_by_row(planned, plan_costs(planned))
    assert costs["b"][1] == costs["b"][0]
    assert costs["c"][1] < costs["c"][0]


@pytest.mark.parametrize("views", [0, 1, 3])
@pytest.mark.parametrize("draw", ["independent", "stratified"])
def test_distinct_views_are_those_of_a_simulation(views: int, draw: Any) -> None:
    num_clips, epochs = 4000, 5
    dropout = ModalityDropout(probability=0.6, draw=draw)
    random = np.random.default_rng(0)
    seen = np.zeros((num_clips, views or epochs), dtype=bool)
    for epoch in range(epochs):
        order = random.permutation(num_clips)
        keep_NM = kept_modalities(num_clips, dropout, epoch)
        seen[order, epoch % views if views else epoch] |= keep_NM[:, 0]
    probability = 0.4 + 0.6**3 / 3
    assert seen.sum() / num_clips == pytest.approx(Held("tokens", 1, 1).extend(probability, epochs, views), rel=0.03)


def test_another_run_of_the_seed_adds_only_what_the_first_dropped() -> None:
    num_clips, epochs = 4000, 3
    seen: set[tuple[int, int]] = set()
    held = Held("tokens", num_clips, record_bytes=1)
    for p, views in ((0.7, 2), (0.3, 2), (0.5, 2), (0.5, 3)):
        dropout = ModalityDropout(probability=p, draw="independent")
        before = len(seen)
        for epoch in range(epochs):  # no clip is shuffled: all runs of a seed have the same order
            kept = kept_modalities(num_clips, dropout, epoch)[:, 0]
            seen |= {(clip, epoch % views) for clip in np.flatnonzero(kept).tolist()}
        expected = held.extend(1 - p + p**3 / 3, epochs, views)
        assert (len(seen) - before) / num_clips == pytest.approx(expected, abs=0.08)
    assert len(seen) == pytest.approx(held.disk_bytes, rel=0.05)


def kept_modalities(num_clips: int, dropout: ModalityDropout, epoch: int) -> np.ndarray:
    """Return the modalities that clips with all of three keep, bool (N, M)."""
    keep_NM = keep_patterns(num_clips, 3, dropout, 0, epoch)
    words = np.random.default_rng(epoch).integers(0, 2**32, num_clips)
    present_M = np.ones(3, dtype=bool)
    return np.stack([keep_present(keep_M, present_M, int(word)) for keep_M, word in zip(keep_NM, words, strict=True)])


def test_encoders_with_a_memory_encode_each_view_once(home: Path) -> None:
    write_study(home)
    epochs, views, keep = 6, 2, 1 - 0.5 + 0.5**2 / 2
    rows = [
        {"label": label, "recipe": "tiny/teacher",
         "set": [f"training.epochs={epochs}", "data.modality_dropout.probability=0.5", f"optimizer.lr={lr}"]}
        for label, lr in (("a", 0.1), ("b", 0.2))
    ]  # fmt: skip
    freeze(home, views)
    planned = plan_with_teacher(home, *rows)
    costs = plan_costs(planned)
    first, second = costs.runs
    assert first.flops == second.flops
    encoded = views * (1 - (1 - keep) ** (epochs // views))
    saved_first, saved_second = ((cost.flops or 0) - (cost.planned or 0) for cost in (first, second))
    assert saved_first / saved_second == pytest.approx(1 - encoded / (epochs * keep))  # the second encodes nothing
    assert costs.advised == []
    assert sorted(memory.kind for memory in costs.planned) == ["tokens", "tokens"]


@pytest.mark.parametrize(("dropout", "read"), [(0.0, (2, 4)), (0.5, (0, 2))])
def test_answers_about_views_in_turn_are_read_if_their_modalities_come_again(
    home: Path, dropout: float, read: tuple[int, int]
) -> None:
    changes = [
        "training.epochs=4", f"data.modality_dropout.probability={dropout}", "model.encoders.video.frozen=true",
        "model.encoders.video.memory={path: tokens, views: 2}",
    ]  # fmt: skip
    alone = {**TEACHER_ROW, "set": changes}
    planned = plan(home, alone, student("a", *changes), student("b", *changes, "distill.alpha=0.9"))
    costs = plan_costs(planned)
    rows = costs_by_row(planned, costs)
    learning, teaching = rows["teacher"][0] / 4, (rows["a"][0] - rows["teacher"][0]) / 4
    for label, num_read in zip("ab", read, strict=True):
        saved = rows[label][0] - rows[label][1]
        assert num_read * teaching <= saved <= num_read * (teaching + learning)  # some of it is for its own encoder
    (logits,) = (memory for memory in costs.planned if memory.kind == "logits")
    assert logits.disk_bytes == 2 * CLIPS * logits.record_bytes


def test_a_memory_with_new_views_in_each_epoch_saves_nothing_in_one_run(home: Path) -> None:
    write_study(home)
    freeze(home, views=0)
    (cost,) = plan_costs(plan_with_teacher(home, TEACHER_ROW)).runs
    assert cost.planned == cost.flops


def test_advice_costs_what_it_does_once_followed(home: Path) -> None:
    write_study(home)
    freeze(home)
    long = {**TEACHER_ROW, "set": ["training.epochs=40"]}
    advice = plan_costs(plan_with_teacher(home, long, seeds=2))
    freeze(home, views=4)
    followed = plan_costs(plan_with_teacher(home, long, seeds=2))
    assert [cost.advised for cost in advice.runs] == pytest.approx([cost.planned for cost in followed.runs])
    assert sum(memory.disk_bytes for memory in advice.advised) == pytest.approx(
        sum(memory.disk_bytes for memory in followed.planned)
    )
    assert all((cost.advised or 0) < (cost.planned or 0) for cost in advice.runs)


def test_the_dry_run_shows_hours_bytes_and_the_lines_to_write(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_study(home)
    freeze(home)
    plan_with_teacher(home, TEACHER_ROW, student("a"), student("b", "distill.alpha=0.9"))
    assert main(["study", "tiny/tab0", "--dry-run", "--seeds", "2"]) == 0
    shown = capsys.readouterr().out
    assert "of teachers' answers" in shown
    assert "tiny/teacher: model.encoders.video.memory: {path: memories/tiny/teacher/video}" in shown
    path = home / "recipes" / "tiny" / "teacher.yaml"
    for line in re.findall(r"tiny/teacher: (model\.encoders\.\w+\.memory): (.+)", shown):
        assert load_recipe(str(path), [f"{line[0]}={line[1]}"]).model.num_views == 4


def test_hours_are_those_of_the_named_gpu(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_study(home, {"clips": 10**9, "rows": [TEACHER_ROW]})
    hours = {}
    for gpu, peak in (("H100", 989e12), ("A100", 312e12)):
        assert main(["study", "tiny/tab0", "--dry-run", "--seeds", "1", "--gpu", gpu]) == 0
        (row,) = re.findall(r"^study +(.*)$", capsys.readouterr().out, re.MULTILINE)
        flops, hours[gpu] = (float(row.split()[place].replace(",", "")) for place in (2, 4))
        assert hours[gpu] == pytest.approx(flops / (0.25 * peak) / 3600, rel=0.05)
    assert hours["A100"] > 3 * hours["H100"]


def test_an_unknown_gpu_is_refused_in_one_line(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_study(home)
    assert main(["study", "tiny/tab0", "--dry-run", "--gpu", "H10"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--gpu 'H10': unknown (did you mean 'H100'?)" in error


def test_without_the_number_of_clips_the_cost_is_unknown(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_study(home, {"rows": [student("a"), student("b", "distill.alpha=0.9")], "clips": None})
    assert main(["study", "tiny/tab0", "--dry-run", "--seeds", "1"]) == 0
    shown = capsys.readouterr().out
    assert "1 x ?" in shown
    assert "? GB of teachers' answers" in shown


def test_several_experts_have_one_memory_with_a_readable_name(home: Path) -> None:
    experts = ["distill.teacher=null", "distill.teachers=[tiny/teacher, /experts/sound]"]
    planned = plan(home, student("a", *experts), student("b", *experts, "distill.alpha=0.9"))
    held = answers(planned)
    assert re.fullmatch(r"runs/memories/tiny-teacher@seed0-and-1-more-[0-9a-f]{8}", held["a", 0] or "")
    (memory,) = plan_costs(planned).planned
    assert memory.record_bytes == 2 * 10 * 2 + 8
