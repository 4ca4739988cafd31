"""The diagnostic commands: profile, doctor, bench and recipe."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from karmma_dist.commands.options import HomePath, print_json, set_option
from karmma_dist.errors import UserError
from karmma_dist.terminal import can_show, print_line


@click.command()
@click.argument("recipe")
@set_option
@click.option("--modalities", help="Only this subset, e.g. V,F; default: all subsets of the recipe's modalities.")
@click.option("--part", default="model", show_default=True, type=click.Choice(["model", "fusion"]),
              help="Count the full model, or only its fusion block, with fused and unfused attention.")
@click.option("--precision", type=click.Choice(["fp32", "bf16", "fp16"]),
              help="For counting memory (default: bf16) and for --measure (default: bf16 on a GPU, else fp32).")
@click.option("--batch", default=1, show_default=True, type=click.IntRange(min=1), help="Clips per batch.")
@click.option("--measure", "measured", is_flag=True,
              help="Also run it on this machine: latency, memory and, on a GPU, peaks of CUDA's allocator.")
@click.option("--repeats", default=5, show_default=True, type=click.IntRange(min=1), help="Timed passes per row.")
@click.option("--plot", type=HomePath(path_type=Path), help="Draw bars of GFLOPs and memory into this PNG.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def profile(
    recipe: str, overrides: tuple[str, ...], modalities: str | None, part: str, precision: str | None, batch: int,
    measured: bool, repeats: int, plot: Path | None, as_json: bool,
) -> None:
    """Count the costs of a recipe's models: GFLOPs per clip, parameters, tokens, memory. Needs no weights or data."""
    from karmma_dist.profiling.costs import Workload, profile_recipe
    from karmma_dist.profiling.measure import measure, require_precision
    from karmma_dist.profiling.report import cost_bars, print_profile
    from karmma_dist.progress import Progress

    if measured:
        require_precision(precision)  # fails before counting, which takes minutes
    counted, models = profile_recipe(recipe, overrides, modalities, Workload(part, precision or "bf16", batch))
    if measured:
        with Progress() as report:
            counted = measure(counted, models, repeats, report, precision)
    if plot is not None:
        cost_bars(plot, counted)
    if as_json:
        print_json(counted.to_dict())
    else:
        print_profile(counted)
    if plot is not None:
        print_line(f"plot: {plot}", err=as_json)


@click.command()
@click.argument("recipe", required=False)
@set_option
@click.option("--distributed", is_flag=True, help="Check the ranks of a job; run on every rank under srun or torchrun.")
@click.option("--timeout", default=60, show_default=True, type=click.IntRange(min=5), help="Time limit in seconds.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(recipe: str | None, overrides: tuple[str, ...], distributed: bool, timeout: int, as_json: bool) -> None:
    """Check this machine, or with --distributed the ranks of a job, and say what to fix.

    With RECIPE, also check its shards, run folder, shared memory, and that the GPUs divide its batch. Exit codes: 0
    ready to train, 1 something must be fixed, 2 only the recipe's batch must be fixed.
    """
    from karmma_dist.recipe import load_chain

    if overrides and recipe is None:
        raise UserError("doctor: --set changes a recipe: name one")
    chain = [] if recipe is None else load_chain(recipe, overrides)
    if distributed:
        from karmma_dist.distributed.preflight.preflight import preflight_here

        sys.exit(preflight_here(chain, timeout, as_json))
    from karmma_dist.launching.doctor.doctor import diagnose, exit_code, print_checks, to_json

    checks = diagnose(chain, timeout)
    if as_json:
        print_json(to_json(checks))
    else:
        print_checks(checks)
    if code := exit_code(checks):
        sys.exit(code)


@click.group("bench")
def bench_group() -> None:
    """Measure speed on this machine."""


@bench_group.command("loader")
@click.argument("shards")
@click.option("--recipe", help="Recipe of the inputs; default: the dataset's distill recipe, if it fits.")
@click.option("--workers", type=click.IntRange(min=0), help="Decoding processes; default: the recipe's number.")
@click.option("--batches", default=50, show_default=True, type=click.IntRange(min=1), help="Batches to measure.")
@click.option("--drop-prob", type=click.FloatRange(0, 1), help="Training-time drop probability; default: the recipe's.")
@click.option("--headspace", is_flag=True, help="Also measure the rate without loading, on batches held in memory.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def bench_loader_command(
    shards: str, recipe: str | None, workers: int | None, batches: int, drop_prob: float | None, headspace: bool,
    as_json: bool,
) -> None:
    """Run the training loader over SHARDS, and print clips per second and the time of each part."""
    from karmma_dist.progress import Progress
    from karmma_dist.streaming.bench import bench_loader, print_loader_bench

    with Progress() as report:
        result = bench_loader(
            shards, recipe=recipe, num_workers=workers, num_batches=batches, drop_prob=drop_prob, headspace=headspace,
            report=report,
        )
    if as_json:
        print_json(result.to_dict())
    else:
        print_loader_bench(result)


@click.group("recipe")
def recipe_group() -> None:
    """Show a recipe, or the schema of recipes."""


@recipe_group.command("show")
@click.argument("recipe")
@set_option
def recipe_show(recipe: str, overrides: tuple[str, ...]) -> None:
    """Print the resolved recipe, including all defaults."""
    from karmma_dist.recipe import load_recipe
    from karmma_dist.settings import dump

    resolved = load_recipe(recipe, overrides)
    text = dump(resolved)
    click.echo(text if can_show(text) else dump(resolved, in_ascii=True), nl=False)


@recipe_group.command("schema")
def recipe_schema() -> None:
    """Print the JSON schema of recipes; fields with `not_learned` may change when a run is resumed."""
    from karmma_dist.recipe import Recipe

    print_json(Recipe.model_json_schema())
