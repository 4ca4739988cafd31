"""A run's folder before training: is it new, another run's, finished, or one to resume?"""

from __future__ import annotations

import shutil
from typing import Any

from karmma_dist.errors import UserError
from karmma_dist.recipe import Recipe, read_run_recipe, save_recipe
from karmma_dist.streaming.remote import masked
from karmma_dist.training.checkpoint import checkpoints
from karmma_dist.training.engine import barrier
from karmma_dist.training.rendezvous import World
from karmma_dist.training.run_log import read_state, write_state


def prepare_run_dir(recipe: Recipe, world: World, resume: str) -> str:
    """Make or check the run folder; returns the checkpoint to resume from, "" to start fresh, or "finished"."""
    run_dir = recipe.run_dir
    saved = read_run_recipe(run_dir) if (run_dir / "recipe.yaml").is_file() else None
    found = checkpoints(run_dir)
    state = read_state(run_dir).get("state")
    barrier()  # every rank has looked before the main rank writes
    if resume == "auto" and saved is not None and (found or state == "finished"):
        refuse_other_recipe(saved, recipe)
        if state == "finished":
            return "finished"
        start = str(found[-1])
    elif resume in ("auto", "never"):
        start = ""
    else:
        start = resume
    if world.is_main:
        if not start:
            for left in (run_dir / "checkpoints", run_dir / "metrics.jsonl", run_dir / "damage.jsonl"):
                shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
        run_dir.mkdir(parents=True, exist_ok=True)
        save_recipe(recipe, run_dir / "recipe.yaml")
        write_state(run_dir, "running")
    barrier()
    return start


def refuse_other_recipe(saved: Recipe, recipe: Recipe) -> None:
    """Raise where the run folder holds another run: fields that change what is computed differ."""
    ignored = {
        "slurm", "evaluation", "data.num_workers", "data.stall_s", "data.cache_dir", "data.cache_bytes",
        "training.threads", "training.keep_checkpoints", "training.max_skipped_steps", "training.guard_every_steps",
        "training.collective_timeout_s",
    }  # fmt: skip
    before, now = _flat(saved.model_dump(mode="json")), _flat(recipe.model_dump(mode="json"))
    for flat in (before, now):
        flat["data.shards"] = masked(flat["data.shards"])  # a new password or signature is no other run
    differing = [
        f"{key}: {before.get(key)} -> {now.get(key)}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not any(key == i or key.startswith(f"{i}.") for i in ignored)
    ]
    if differing:
        raise UserError(
            f"{recipe.run_dir}: holds a run of another recipe ({'; '.join(differing[:5])}): "
            "give this one another name (--set name=...) or start over with --resume never"
        )


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
