"""No file of the package is written through a symbolic link: the link is replaced, removed or refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from karmma_dist.demo import _make_raw
from karmma_dist.distributed.preflight.probes import SharedFolderProbe
from karmma_dist.errors import ERROR_FILE, UserError, say
from karmma_dist.evaluation.exports.epic_kitchens import portable_pickle
from karmma_dist.evaluation.report.plots import save_figure
from karmma_dist.io.files import append, write_json, write_whole
from karmma_dist.packing.inspect.inspect import contact_sheet
from karmma_dist.progress import silent
from karmma_dist.recipe import Recipe, save_recipe
from karmma_dist.runs.folder import write_state
from karmma_dist.shards.folder import ShardFolder
from karmma_dist.studies.results import write_outcomes
from karmma_dist.training.checkpoint.async_saver import _prepare
from karmma_dist.training.checkpoint.checkpoint import discard, set_latest
from karmma_dist.training.checkpoint.resume import _check_and_prepare
from karmma_dist.training.profiler import Trace
from karmma_dist.training.trackers.run_log import RunLog
from kits.recipes import tiny_recipe
from kits.reports import random_results

KEPT = b'{"kind": "train", "step": 1}\n'


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A folder of somebody else's with two files."""
    folder = tmp_path / "elsewhere"
    (folder / "folder").mkdir(parents=True)
    (folder / "file").write_bytes(KEPT)
    (folder / "folder" / "file").write_bytes(KEPT)
    return folder


def expect_kept(elsewhere: Path) -> None:
    files = sorted(path.relative_to(elsewhere) for path in elsewhere.rglob("*"))
    assert files == [Path("file"), Path("folder"), Path("folder/file")]
    assert (elsewhere / "file").read_bytes() == (elsewhere / "folder" / "file").read_bytes() == KEPT


def recipe_in(runs: Path) -> Recipe:
    return Recipe.model_validate(tiny_recipe(["video"], name="run", runs_dir=str(runs), data={"shards": "none"}))


REPLACED: dict[str, tuple[str, Callable[[Path, Path], object]]] = {
    "state": ("state.json", lambda path, _: write_state(path.parent, "running")),
    "recipe": ("recipe.yaml", lambda path, _: save_recipe(recipe_in(path.parent), path)),
    "metrics": ("run/metrics.jsonl", lambda path, _: RunLog(recipe_in(path.parent.parent), 1).close()),
    "latest": ("latest", lambda path, _: set_latest(path.parent / "step-00000001")),
    "sheet": ("sheet.png", lambda path, shards: contact_sheet(ShardFolder(shards), path, clips=1)),
    "plot": ("plot.png", lambda path, _: save_figure(Figure(), path)),
    "outcomes": ("outcomes.npz", lambda path, _: write_outcomes(path, random_results(0, num_clips=5).per_clip)),
    "json": ("results.json", lambda path, _: write_json(path, {})),
    "pickle": ("submission.pkl", lambda path, _: write_whole(path, portable_pickle({"a": np.zeros(1)}))),
}


@pytest.mark.parametrize("kind", REPLACED)
def test_a_link_in_place_of_a_file_is_replaced(tmp_path: Path, elsewhere: Path, shards: Path, kind: str) -> None:
    name, write = REPLACED[kind]
    path = tmp_path / "here" / name
    path.parent.mkdir(parents=True)
    path.symlink_to(elsewhere / "file")
    path.with_name(f".{path.name}.partial").symlink_to(elsewhere / "file")
    write(path, shards)
    assert path.is_file()
    assert not path.is_symlink()
    expect_kept(elsewhere)


def test_a_link_in_place_of_a_trace_is_replaced(tmp_path: Path, elsewhere: Path) -> None:
    path = tmp_path / "trace" / "rank0.json.gz"
    path.parent.mkdir()
    path.symlink_to(elsewhere / "file")
    trace = Trace((0, 1), path)
    trace.before_step(0)
    trace.end()
    assert path.is_file()
    assert not path.is_symlink()
    expect_kept(elsewhere)


def test_a_link_in_place_of_a_log_is_refused(tmp_path: Path, elsewhere: Path) -> None:
    (tmp_path / "damage.jsonl").symlink_to(elsewhere / "file")
    with pytest.raises(UserError, match=r"damage\.jsonl: is a symbolic link"):
        append(tmp_path / "damage.jsonl")
    expect_kept(elsewhere)


def test_last_words_are_not_put_behind_a_link(
    tmp_path: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = tmp_path / "words"
    monkeypatch.setenv(ERROR_FILE, str(words))
    say("first")
    say("second")
    assert words.read_text() == "first\nsecond\n"
    words.unlink()
    words.symlink_to(elsewhere / "file")
    say("third")
    assert capsys.readouterr().err.startswith(f"third (not left in {words}: ")
    expect_kept(elsewhere)


def test_links_to_folders_are_removed_and_what_they_lead_to_stays(tmp_path: Path, elsewhere: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in ("checkpoints", "best", "metrics.jsonl", "damage.jsonl", "ensemble.json"):
        (run / name).symlink_to(elsewhere / ("file" if "." in name else "folder"))
    assert _check_and_prepare(recipe_in(tmp_path), "never", silent) == ""
    assert sorted(path.name for path in run.iterdir()) == ["recipe.yaml", "state.json"]
    expect_kept(elsewhere)


def test_a_checkpoint_is_saved_and_removed_beside_links(tmp_path: Path, elsewhere: Path) -> None:
    partial, old = tmp_path / ".step-00000001.partial", tmp_path / ".step-00000001.old.partial"
    for path in (partial, old):
        path.symlink_to(elsewhere / "folder")
    assert _prepare(partial) is None
    assert [path.name for path in tmp_path.glob(".step*")] == [partial.name]
    assert not partial.is_symlink()
    old.symlink_to(elsewhere / "folder")
    partial.rename(tmp_path / "step-00000001")
    discard(tmp_path / "step-00000001")
    assert list(tmp_path.glob("*step*")) == []
    expect_kept(elsewhere)


@pytest.mark.parametrize("name", ["", ".", "..", "a/../../b", "/tmp/run"])
def test_a_run_has_a_folder_of_its_own_below_runs_dir(name: str) -> None:
    with pytest.raises(ValueError, match=r"name '.*' must stay inside runs_dir"):
        Recipe.model_validate(tiny_recipe(["video"], name=name, data={"shards": "none"}))


def test_ranks_meet_in_a_new_folder_and_write_new_files(tmp_path: Path, elsewhere: Path) -> None:
    (tmp_path / ".preflight-planted").symlink_to(elsewhere / "folder")
    with pytest.raises(UserError, match="cannot be written"):
        SharedFolderProbe(tmp_path, "planted").create()
    probe = SharedFolderProbe(tmp_path, "new")
    probe.create()
    (tmp_path / ".preflight-new" / "1").symlink_to(elsewhere / "file")
    with pytest.raises(UserError, match="cannot be written"):
        probe.write(1)
    probe.remove()
    assert not (tmp_path / ".preflight-new").exists()
    expect_kept(elsewhere)


def test_the_demo_makes_its_recordings_in_a_new_folder(
    tmp_path: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("karmma_dist.demo.write_kitchen", lambda folder, **_: (folder / "file").write_bytes(b"new"))
    (tmp_path / ".raw.partial").symlink_to(elsewhere / "folder")
    _make_raw(tmp_path / "raw", silent)
    assert (tmp_path / "raw" / "file").read_bytes() == b"new"
    expect_kept(elsewhere)
