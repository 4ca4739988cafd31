"""The training loader against decoding alone and against its peers, on the same clips with the same decoding.

    python tests/benchmarks/loader.py [--shards FOLDER] [--clips N] [--epochs N] [--repeats N] [--json FILE]

Packs clips of grid_epic (from $GRID_EPIC_RAW, else ../shared/data/grid_epic; a synthetic kitchen where there is none),
converts them to each peer's format, and runs every arm once per repeat, in turn, each in a process of its own. Costs
are CPU seconds of that process and its workers from opening the loader to the end of the last epoch. Peers are
shuffled, batched and collated like ours, and checked to deliver the same pixels and samples. Needs an environment with
the packages of `loaders/requirements.txt`; a peer that is not installed is said to be so and left out.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import json
import os
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
# a peer's shared memory outlives its arm, and the interpreter that then cleans up says so at length
os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker:UserWarning")

from loaders import OURS, Loader, find_loaders
from loaders.isolated import in_processes, isolated, pss_mib, timed, worker_pids
from loaders.ours import EpochLoader
from loaders.report import ALONE, MEMORY_EPOCHS, RESUME_AT, Arm, Figures, print_report
from loaders.work import Dropout, LookedAt, Work, collate_clips, decode_alone, fingerprints, look_at, stored_clips

from karmma_dist.packing.pack import pack
from karmma_dist.packing.spec import load_spec
from karmma_dist.packing.synthetic.kitchen import write_kitchen
from karmma_dist.recipe import load_recipe
from karmma_dist.shards.folder import ShardFolder
from karmma_dist.shards.format import MANIFEST


@dataclass
class Bench:
    """What the measurements share."""

    work: Work
    clips: list[LookedAt]
    loaders: dict[str, Loader]
    folders: dict[str, Path]
    """Per loader its converted clips."""

    def arms(self, worker_counts: Sequence[int]) -> list[Arm]:
        """Everything to be run in each repeat."""
        peers = [name for name in self.loaders if name != OURS]
        kinds: list[tuple[str, Dropout]] = [(ALONE, "none"), *((name, "none") for name in self.loaders)]
        kinds += [(OURS, "before"), *((name, "after") for name in peers)]
        arms = [Arm(name, dropout, workers) for workers in worker_counts for name, dropout in kinds]
        return arms + [Arm(name, "before", max(worker_counts)) for name in peers]


def run_arm(bench: Bench, arm: Arm) -> int:
    """Go through all epochs and return the number of clips."""
    work = replace(bench.work, dropout=arm.dropout, num_workers=arm.num_workers)
    if arm.name == ALONE:
        in_processes(partial(_decode_share, bench, max(1, arm.num_workers)), arm.num_workers)
        return len(bench.clips) * work.epochs
    loader = bench.loaders[arm.name].open_loader(bench.folders[arm.name], work)
    return sum(len(batch.keys) for _ in range(work.epochs) for batch in loader)


def _decode_share(bench: Bench, stride: int, first: int) -> None:
    for _ in range(bench.work.epochs):
        for clip in bench.clips[first::stride]:
            decode_alone(bench.work, clip)


def measure_speed(bench: Bench, arms: Sequence[Arm], repeats: int) -> dict[Arm, Figures]:
    """Every arm once per repeat, each repeat starting with another one."""
    figures = {arm: Figures() for arm in arms}
    for repeat in range(repeats):
        first = repeat * len(arms) // repeats
        for arm in [*arms[first:], *arms[:first]]:
            cost, num_clips = isolated(partial(timed, partial(run_arm, bench, arm)))
            figures[arm].cpu_ms.append(1000 * cost.cpu_s / num_clips)
            figures[arm].wall_ms.append(1000 * cost.wall_s / num_clips)
    return figures


def check_same_clips(bench: Bench) -> None:
    """Every loader's clips are those of decoding alone, to the last bit.

    Raises:
        SystemExit: they are not, so the figures would compare different work.
    """
    expected = isolated(partial(_expected, bench))
    for name in bench.loaders:
        found = isolated(partial(_delivered, bench, name))
        wrong = [key for key, checksum in found if expected.get(key) != checksum]
        if wrong or not found:
            raise SystemExit(f"{name}: {len(wrong)} of {len(found)} clips differ from decoding alone: no figures")


def _expected(bench: Bench) -> dict[str, int]:
    batches = (collate_clips(bench.work, [decode_alone(bench.work, clip)]) for clip in bench.clips)
    return {key: checksum for batch in batches for key, checksum in fingerprints(bench.work, batch).items()}


def _delivered(bench: Bench, name: str) -> list[tuple[str, int]]:
    batches = bench.loaders[name].open_loader(bench.folders[name], bench.work)
    return [item for batch in batches for item in fingerprints(bench.work, batch).items()]


def measure_resume(bench: Bench, num_workers: int, repeats: int) -> dict[tuple[str, int], dict[str, Any]]:
    """Seconds from opening a loader to its first batch, at the start and at 90 % of an epoch, in turn."""
    steps = int(RESUME_AT * (bench.work.num_clips // bench.work.batch_size))
    cases = [(name, num_workers) for name, loader in bench.loaders.items() if loader.CAN_RESUME]
    cases += [(OURS, 0)] if num_workers else []
    places = {case: isolated(partial(_position_after, bench, case, steps)) for case in cases}
    seconds: dict[tuple[str, int], dict[str, Any]] = {case: {"fresh_s": [], "resumed_s": []} for case in cases}
    for _ in range(repeats):
        for case in cases:
            for kind, place in (("fresh_s", None), ("resumed_s", places[case])):
                seconds[case][kind].append(isolated(partial(_first_batch_s, bench, case, place)))
    return seconds


def _position_after(bench: Bench, case: tuple[str, int], steps: int) -> Any:
    loader = bench.loaders[case[0]]
    opened = loader.open_loader(bench.folders[case[0]], replace(bench.work, num_workers=case[1]))
    batches = iter(opened)
    for _ in range(steps):
        next(batches)
    return loader.position(opened)


def _first_batch_s(bench: Bench, case: tuple[str, int], place: Any) -> float:
    started = time.perf_counter()
    opened = bench.loaders[case[0]].open_loader(
        bench.folders[case[0]], replace(bench.work, num_workers=case[1]), place
    )
    next(iter(opened))
    return time.perf_counter() - started


def measure_memory(bench: Bench, num_workers: int, split: str) -> list[list[float]]:
    """MiB of each worker (columns) at the end of each of 20 epochs (rows) of a small split, dropout on."""
    # one epoch more than is looked at: a worker whose share is done has ended
    work = replace(bench.work, dropout="before", num_workers=num_workers, epochs=MEMORY_EPOCHS + 1)
    loader = EpochLoader(bench.folders[OURS], work, split=split)
    readings = []
    for _ in range(MEMORY_EPOCHS):
        collections.deque(loader, maxlen=0)
        readings.append([pss_mib(pid) for pid in worker_pids()])
    return readings


def make_shards(out: Path, num_clips: int) -> str:
    """Pack the clips to measure on; returns what they are."""
    raw = Path(os.environ.get("GRID_EPIC_RAW", Path(__file__).resolve().parents[3] / "shared" / "data" / "grid_epic"))
    name = "grid_epic"
    if not raw.is_dir():
        name, raw = "demo", out.with_name("raw")
        write_kitchen(raw, train_recordings=-(-num_clips // 8), validation_recordings=4, clips_per_recording=8)
    spec = load_spec(name, raw=raw, out=out, overrides=["clips_per_shard=24"])
    pack(spec, workers=os.cpu_count() or 1, limit=num_clips)
    return "grid_epic" if name == "grid_epic" else "a synthetic kitchen (no grid_epic there)"


def open_bench(shards: Path, batch_size: int, epochs: int, scratch: Path) -> tuple[Bench, dict[str, str]]:
    """Read the clips and convert them for every loader that is installed."""
    folder = ShardFolder(shards)
    dataset = "grid_epic" if folder.manifest.header.dataset == "grid_epic" else "demo"
    recipe = load_recipe(f"{dataset}/distill", [f"data.shards={shards}"])
    clips = stored_clips(folder, "train", recipe.data.modalities)
    work = Work(recipe.inputs, tuple(recipe.data.modalities), tuple(folder.classes), len(clips), batch_size, epochs)
    loaders, said = find_loaders()
    clips_per_file = max(shard.num_clips for shard in folder.manifest.splits["train"].shards)
    folders = {name: scratch / loader.__name__ for name, loader in loaders.items()}  # type: ignore[attr-defined]
    for name, loader in loaders.items():
        with contextlib.redirect_stdout(io.StringIO()):
            loader.convert(clips, shards, folders[name], clips_per_file)
    looked_at = [look_at(work, clip.key, clip.metadata, clip.members) for clip in clips]
    return Bench(work, looked_at, loaders, folders), said


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=Path, help="packed shards to measure on; packed there if the folder is new")
    parser.add_argument("--clips", type=int, default=192, help="clips to pack (where shards are there, all are used)")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=2, help="passes over the clips per run")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2, help="worker processes, besides the runs without any")
    parser.add_argument("--json", type=Path, help="write every figure there")
    return parser.parse_args()


def main() -> None:
    """Run all and print it."""
    options = arguments()
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    load = [os.getloadavg()[0]]
    with tempfile.TemporaryDirectory() as scratch:
        shards = options.shards or Path(scratch) / "shards"
        given = (shards / MANIFEST).is_file()
        kind = str(shards) if given else make_shards(shards, options.clips)
        bench, said = open_bench(shards, options.batch_size, options.epochs, Path(scratch))
        print(f"{len(bench.clips)} clips of {kind}, batches of {options.batch_size}")
        print(f"{options.epochs} epochs per run, {options.repeats} repeats in turn")
        print("\n".join(f"  {name}: {what}" for name, what in said.items()))
        check_same_clips(bench)
        counts = sorted({0, options.workers})
        figures = measure_speed(bench, bench.arms(counts), options.repeats)
        resume = measure_resume(bench, options.workers, max(5, options.repeats))
        split = "validation" if "validation" in ShardFolder(shards).splits else "train"
        memory = isolated(partial(measure_memory, bench, max(1, options.workers), split))
    load.append(os.getloadavg()[0])
    print_report(figures, resume, memory, counts)
    print(f"\nload average {load[0]:.1f} before, {load[1]:.1f} after, on {os.cpu_count()} cores")
    if options.json:
        speed = [asdict(arm) | asdict(found) for arm, found in figures.items()]
        resumed = [{"name": name, "num_workers": workers, **found} for (name, workers), found in resume.items()]
        report = {"clips": len(bench.clips), "loaders": said, "speed": speed, "resume": resumed, "pss_mib": memory}
        options.json.write_text(json.dumps(report | {"load_average": load}, indent=1) + "\n")


if __name__ == "__main__":
    main()
