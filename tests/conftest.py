"""Fixtures shared by all tests: a tiny synthetic kitchen, packed once per session."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import settings

# How long an example takes says nothing about the code; and what one machine draws, every machine draws.
settings.register_profile("any machine", deadline=None, derandomize=True, database=None)
settings.register_profile("random", deadline=None, derandomize=False)
PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "any machine")
settings.load_profile(PROFILE)
if PROFILE == "any machine":
    # Hypothesis also draws constants that it finds in imported modules that it takes for local. Which ones these are
    # depends on the tests that ran before in the same process, and on where this folder lies; no setting ends it.
    with suppress(ImportError):
        from hypothesis.internal.conjecture import providers

        providers.is_local_module_file = lambda _path: False

os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure() -> None:
    """A shell starts what runs in its background deaf to Ctrl-C, and that would pass on to what tests interrupt."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)


_FIRST = ("slurm", "distributed", "end_to_end")
"""Folders whose tests wait most of their time: begun first, they leave no worker waiting alone at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of these folders before all others."""
    first = [Path(__file__).parent / name for name in _FIRST]
    items.sort(key=lambda item: next((n for n, path in enumerate(first) if path in item.path.parents), len(first)))


@pytest.fixture(scope="session", autouse=True)
def _private_extension_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Compiled extensions, if any, must not meet another run's half-built ones."""
    os.environ["TORCH_EXTENSIONS_DIR"] = str(tmp_path_factory.mktemp("extensions"))


@pytest.fixture(scope="session")
def kitchen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Raw recordings in Epic-Kitchens' layout: 6 for training (one silent, one without picture), 2 for validation."""
    from karmma_dist.packing.synthetic.kitchen import write_kitchen

    root = tmp_path_factory.mktemp("kitchen")
    write_kitchen(root, seed=0, train_recordings=6, validation_recordings=2, clips_per_recording=5)
    return root


@pytest.fixture(scope="session")
def shards(kitchen: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kitchen packed: 30 training clips and 10 for validation."""
    from karmma_dist.packing.pack import pack
    from karmma_dist.packing.spec import load_spec

    out = tmp_path_factory.mktemp("shards") / "kitchen"
    pack(load_spec("demo", raw=kitchen, out=out, overrides=["clips_per_shard=8"]))
    return out


@pytest.fixture(scope="session")
def actions(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second dataset for mixtures: 20 of the training clips and 6 for validation, with another head and no flow."""
    from kits.mixtures import write_actions

    return write_actions(shards, tmp_path_factory.mktemp("actions") / "shards")


@pytest.fixture
def downloads_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tries follow each other without a pause, and no proxy stands before loopback."""
    from karmma_dist.io import download

    monkeypatch.setattr(download, "FIRST_WAIT_S", 0.0)
    monkeypatch.setenv("NO_PROXY", "*")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tensors so small that handing them to threads takes longer than the work."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
