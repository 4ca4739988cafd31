"""Trackers of other services write to the run folder unless the recipe names a server, and never hold up a run.

The packages are stand-ins that write down how they are called.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from karmma_dist.errors import UserError
from karmma_dist.recipe import Recipe
from karmma_dist.runs.folder import TRACKED
from karmma_dist.training.trackers.background import BackgroundTracker
from karmma_dist.training.trackers.run_log import RunLog
from karmma_dist.training.trackers.tracker import Tracker
from kits.patience import HANGS_S
from kits.recipes import tiny_recipe

SERVICES = ["wandb", "mlflow", "trackio"]
SERVER = "http://head:5000"


def recipe_with(folder: Path, trackers: list[Any], **sections: Any) -> Recipe:
    tree = tiny_recipe(
        ["video"], name="tracked/run", runs_dir=str(folder), data={"shards": "https://me:hunter2@host/shards?key=1"},
        after=["https://me:hunter2@host/a.yaml"],
        training={"trackers": trackers}, **sections,
    )  # fmt: skip
    recipe = Recipe.model_validate(tree)
    recipe.run_dir.mkdir(parents=True, exist_ok=True)
    return recipe


class Calls(list[tuple[str, tuple[Any, ...], dict[str, Any]]]):
    """The calls of a stand-in, in order."""

    def returning(self, name: str, result: Any = None) -> Callable[..., Any]:
        """Return a function that notes its call and returns `result`."""

        def function(*arguments: Any, **named: Any) -> Any:
            self.append((name, arguments, named))
            return result

        return function

    def of(self, name: str) -> list[dict[str, Any]]:
        """Return the named arguments of each call of a function."""
        return [named for called, _, named in self if called == name]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Stand-ins of all services, and the calls of them."""
    noted = Calls()
    run = types.SimpleNamespace(
        log=noted.returning("log"), finish=noted.returning("finish"), define_metric=noted.returning("define_metric"),
        info=types.SimpleNamespace(run_id="made-by-server"), experiment_id="7",
    )  # fmt: skip
    client = types.SimpleNamespace(
        get_experiment_by_name=noted.returning("get_experiment_by_name"), create_run=noted.returning("create_run", run),
        create_experiment=noted.returning("create_experiment", "7"), log_batch=noted.returning("log_batch"),
        update_run=noted.returning("update_run"), set_terminated=noted.returning("set_terminated"),
    )  # fmt: skip
    modules: dict[str, dict[str, Any]] = {
        "wandb": {"init": noted.returning("init", run), "Settings": lambda **named: named},
        "trackio": {"init": noted.returning("init", run)},
        "mlflow": {"MlflowClient": noted.returning("client", client)},
        "mlflow.entities": {"Metric": lambda *values: values, "Param": lambda *values: values},
    }
    for name, content in modules.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return noted


def place(calls: Calls, service: str) -> Any:
    """Return where a service was told to write: a server, or None for files of its own."""
    if service == "mlflow":
        uri = calls.of("client")[-1]["tracking_uri"]
        return None if uri.startswith("sqlite:///") else uri
    if service == "trackio":
        return calls.of("init")[-1]["server_url"]
    call = calls.of("init")[-1]
    return call["settings"]["base_url"] if call["mode"] == "online" else None


@pytest.mark.parametrize("service", SERVICES)
def test_nothing_is_sent_unless_the_recipe_names_a_server(
    tmp_path: Path, calls: Calls, service: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("WANDB_MODE", "WANDB_BASE_URL", "MLFLOW_TRACKING_URI", "TRACKIO_SERVER_URL"):
        monkeypatch.setenv(variable, "online" if variable == "WANDB_MODE" else SERVER)
    RunLog(recipe_with(tmp_path / "a", [service]), 0).close()
    assert place(calls, service) is None
    RunLog(recipe_with(tmp_path / "b", [{"name": service, "options": {"server": SERVER}}]), 0).close()
    assert place(calls, service) == SERVER


@pytest.mark.parametrize("service", SERVICES)
def test_a_resumed_run_continues_the_same_run_of_the_service(tmp_path: Path, calls: Calls, service: str) -> None:
    recipe = recipe_with(tmp_path, [service])
    for resumed in (0, 4):
        log = RunLog(recipe, resumed)
        for step in range(resumed + 2, resumed + 7, 2):
            log.write("train", step, 1, {"loss": 1 / step})
        log.close()
    if service == "mlflow":
        assert len(calls.of("create_run")) == 1
        assert [arguments for name, arguments, _ in calls if name == "update_run"] == [("made-by-server",)]
        steps = [named["metrics"][0][3] for named in calls.of("log_batch") if "metrics" in named]
    else:
        first, second = (call["id" if service == "wandb" else "name"] for call in calls.of("init"))
        assert first == second
        logged = [(arguments, named) for name, arguments, named in calls if name == "log"]
        steps = [named.get("step", arguments[0].get("optimizer_step")) for arguments, named in logged]
    assert steps == [2, 4, 6, 6, 8, 10]
    assert set(json.loads((recipe.run_dir / TRACKED).read_text())) == {service}


@pytest.mark.parametrize("service", SERVICES)
def test_secrets_of_a_recipe_are_not_sent(tmp_path: Path, calls: Calls, service: str) -> None:
    RunLog(recipe_with(tmp_path, [service]), 0).close()
    assert "data.shards" in repr(calls)
    assert "hunter2" not in repr(calls)


@pytest.mark.parametrize("service", SERVICES)
def test_a_run_goes_on_without_a_missing_package(
    tmp_path: Path, service: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, service, None)
    with caplog.at_level(logging.WARNING):
        log = RunLog(recipe_with(tmp_path, ["tensorboard", service]), 0)
        log.write("train", 2, 0, {"loss": 1.0})
        log.close()
    (message,) = [record.getMessage() for record in caplog.records]
    assert message == (
        f"tracker {service}: the run goes on without it: the package {service} is missing: pip install "
        f"'karmma-dist[{service}]'"
    )
    assert len(list((tmp_path / "tracked/run").glob("events.out.tfevents.*"))) == 1


def test_a_tracker_that_fails_or_hangs_is_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    released = threading.Event()

    class Failing(Tracker):
        def write(self, *_: Any) -> None:
            raise OSError("connection refused by\nhttps://me:hunter2@host/x")

        def close(self) -> None:
            raise AssertionError("closed after a failure")

    class Hanging(Tracker):
        def write(self, *_: Any) -> None:
            assert released.wait(HANGS_S)

        def close(self) -> None:
            return

    with caplog.at_level(logging.WARNING):
        failing, hanging = BackgroundTracker("failing", Failing), BackgroundTracker("hanging", Hanging, 0.01)
        for tracker in (failing, hanging):
            for step in range(3):
                tracker.write("train", step, 0, {"loss": 1.0})
            tracker.close()
        released.set()
    first, second = [record.getMessage() for record in caplog.records]
    assert first == (
        "tracker failing: the run goes on without it: OSError: connection refused by https://***@host/x"
    )
    assert second.startswith("tracker hanging: not finished after 0.01 s")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"name": "wandb", "options": {"projekt": "x"}}, r"training\.trackers \(wandb\).*projekt"),
        ({"name": "tensorboard", "options": {"server": SERVER}}, "tensorboard has no options"),
        ({"name": "trackio", "options": {"server": SERVER, "space": "a/b"}}, "either 'server' or 'space'"),
        ("wandbb", r"unknown tracker 'wandbb'.*wandb"),
    ],
)
def test_unknown_options_are_refused_before_anything_is_written(tmp_path: Path, entry: Any, message: str) -> None:
    recipe = recipe_with(tmp_path, [entry])
    with pytest.raises(UserError, match=message):
        RunLog(recipe, 0)
    assert list(recipe.run_dir.iterdir()) == []


@pytest.mark.parametrize("service", SERVICES)
def test_the_real_package_writes_into_the_run_folder(
    tmp_path: Path, service: str, caplog: pytest.LogCaptureFixture
) -> None:
    if importlib.util.find_spec(service) is None:
        pytest.skip(f"{service} is not installed: it is optional")
    recipe = recipe_with(tmp_path, [service])
    with caplog.at_level(logging.WARNING, "karmma_dist"):
        log = RunLog(recipe, 0)
        log.write("train", 2, 0, {"loss": 1.0})
        log.close()
    assert [record.getMessage() for record in caplog.records if record.name.startswith("karmma_dist")] == []
    assert (recipe.run_dir / TRACKED).exists()
    assert len(list(recipe.run_dir.iterdir())) > 1
