"""TensorBoard's events are those of PyTorch's SummaryWriter, and each is on the disk as soon as it is written."""

from __future__ import annotations

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from torch.utils.tensorboard import SummaryWriter

from karmma_dist.io.disk_errors import DiskError
from karmma_dist.training.trackers.tensorboard import TensorBoard
from kits.disk_writers import file_limit, recipe_in

VALUES = {"loss": 1.5, "lr": 1e-5, "flow": float("nan")}


def events(folder: Path) -> list[str]:
    """Return the events of each file in a folder, without their times and writers."""
    texts = []
    for path in sorted(folder.glob("events.out.tfevents.*")):
        for event in EventFileLoader(str(path)).Load():
            event.ClearField("wall_time")
            event.ClearField("source_metadata")
            texts.append(str(event))
    return texts


def test_events_are_those_of_the_summary_writer(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    tracker, writer = TensorBoard(recipe_in(tmp_path), 7), SummaryWriter(str(tmp_path / "other"), purge_step=8)
    for step in (8, 9):
        for kind in ("train", "validation"):
            tracker.write(kind, step, 0, VALUES)
            for name, value in VALUES.items():
                writer.add_scalar(f"{kind}/{name}", value, step)
    writer.close()
    own = events(tmp_path / "run")  # before it is closed
    tracker.close()
    assert own == events(tmp_path / "run") == events(tmp_path / "other")
    assert len(own) == 3 + 2 * 2 * len(VALUES)


def test_each_process_writes_a_file_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for _ in range(3):
        TensorBoard(recipe_in(tmp_path), 0).close()
    assert len(list((tmp_path / "run").iterdir())) == 3


@pytest.mark.parametrize("limit", [0, 50, 200, 300, 1000])
def test_a_full_disk_ends_at_once_and_leaves_whole_events(tmp_path: Path, limit: int) -> None:
    (tmp_path / "run").mkdir()

    def write() -> None:
        tracker = TensorBoard(recipe_in(tmp_path), 0)
        for step in range(100):
            tracker.write("train", step, 0, VALUES)

    with file_limit(limit), pytest.raises(DiskError, match=r"run/events\.out\.tfevents\..*: File too large"):
        write()
    written = events(tmp_path / "run")
    assert all("brain.Event" in event or "START" in event for event in written[:3])
    assert len(written[3:]) % len(VALUES) == 0
