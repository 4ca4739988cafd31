"""Kill a run at random moments, during saves too, resume it to the end, compare it with the run that nobody disturbed.

    python tests/benchmarks/kills.py [--kills 20] [--ranks 2] [--zero-stage 2] [--seed 0]

Every run is killed once or more with SIGKILL, all ranks at once, from outside: after a random time, or, for every
fourth kill, as soon as a folder of an unfinished save is seen. Then it is resumed until it ends. Losses in
metrics.jsonl and final weights must be those of the undisturbed run, bit for bit. Prints a table; exits 1 where a run
differs.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch

from karmma_dist.packing.pack import pack
from karmma_dist.packing.spec import load_spec
from karmma_dist.packing.synthetic.kitchen import write_kitchen

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tests are no package that is installed

from kits.ranks import ADAMW, Rank, outcome, start

_SETTINGS = (*ADAMW, "training.checkpoint_every_steps=1", "training.log_every_steps=2", "training.epochs=12")
_STEPS = 60


def main() -> int:
    """Run the matrix; the exit status."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--zero-stage", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    settings = (*_SETTINGS, f"training.zero_stage={options.zero_stage}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_kitchen(folder / "raw", seed=0, train_recordings=6, validation_recordings=2, clips_per_recording=5)
        shards = folder / "shards"
        pack(load_spec("demo", raw=folder / "raw", out=shards, overrides=["clips_per_shard=8"]))
        _finish(start(folder / "undisturbed", shards, options.ranks, *settings))
        weights, losses = outcome(folder / "undisturbed")
        print(f"{'kill':>4} {'when':<12} {'step':>4} {'in a save':<9} {'resumed at':>10}  losses, weights")
        kills = in_saves = different = 0
        run = folder / "killed"
        while kills < options.kills:
            killed = _kill_one(run, shards, options.ranks, settings, draw, in_save=kills % 4 == 3)
            if killed is not None:
                when, step, was_saving, resumed = killed
                kills, in_saves = kills + 1, in_saves + was_saving
                row = f"{kills:>4} {when:<12} {step:>4} {'yes' if was_saving else '':<9} {resumed:>10}"
                if draw.random() < 0.4 and kills < options.kills:
                    print(f"{row}  (killed again before the end)", flush=True)
                    continue
                _finish(start(run, shards, options.ranks, *settings))
            found_weights, found_losses = outcome(run)
            same = found_losses == losses and all(torch.equal(found_weights[n], weights[n]) for n in weights)
            different += not same
            if killed is not None:
                print(f"{row}  {'equal' if same else 'DIFFERENT'}", flush=True)
            shutil.rmtree(run)
        print(f"{kills} kills, {in_saves} of them during a save, {different} runs differ from the undisturbed one")
    return 1 if different else 0


def _kill_one(
    run: Path, shards: Path, num_ranks: int, settings: tuple[str, ...], draw: random.Random, *, in_save: bool
) -> tuple[str, int, bool, str] | None:
    """Start or resume, kill; when, at which step, in a save?, what it will resume. None: it had ended before."""
    checkpoints = run / "runs/student/checkpoints"
    metrics = run / "runs/student/metrics.jsonl"
    first = _steps(checkpoints)
    ranks = start(run, shards, num_ranks, *settings)
    after, wait_s = first + draw.randrange(1, 20), draw.random() * 0.05
    while ranks[0].is_running and _steps(checkpoints) < min(after, _STEPS - 3):
        time.sleep(0.001)
    time.sleep(wait_s)
    while in_save and ranks[0].is_running and not list(checkpoints.glob(".step-*[0-9].partial")):
        pass
    ended = not ranks[0].is_running
    for rank in ranks:
        rank.kill()
    if ended:
        _finish(start(run, shards, num_ranks, *settings))  # it had just ended, or all of it but its last words
        return None
    saving = bool(list(checkpoints.glob(".step-*.partial")))
    logged = [line for line in metrics.read_text().splitlines() if line.endswith("}")] if metrics.exists() else []
    step = int(json.loads(logged[-1])["step"]) if logged else 0
    latest = checkpoints / "latest"
    resumed = latest.read_text().strip() if latest.exists() else "-"
    return "in a save" if in_save else "random", step, saving, resumed.removeprefix("step-000000")


def _steps(checkpoints: Path) -> int:
    names = [path.name for path in checkpoints.glob("step-*")]
    return int(max(names).removeprefix("step-")) if names else 0


def _finish(ranks: list[Rank]) -> None:
    codes = [rank.wait() for rank in ranks]
    if any(codes):
        sys.exit("\n".join(rank.stdout + rank.stderr for rank in ranks))


if __name__ == "__main__":
    sys.exit(main())
