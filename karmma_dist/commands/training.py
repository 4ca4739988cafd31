"""The commands that train, launch, train and study, and the command runs, which lists their runs."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import click

from karmma_dist.commands.options import HomePath, Steps, print_json, set_option
from karmma_dist.errors import UserError
from karmma_dist.terminal import print_line

_STARTED = time.monotonic()
"""Start of the process, from which --max-time is counted."""


@click.command()
@click.argument("recipe")
@click.option("--local", "local", type=click.IntRange(min=1), help="Start N ranks on this machine.")
@click.option("--slurm", is_flag=True, help="Submit the run with sbatch.")
@click.option("--then", multiple=True, metavar="RECIPE", help="A further job, started after the previous succeeds.")
@click.option("--nodes", type=click.IntRange(min=1), help="Nodes to request from Slurm; default: the recipe's number.")
@click.option("--gpus-per-node", type=click.IntRange(min=0), help="GPUs per node; default: the recipe's number.")
@set_option
@click.option("--dry-run", is_flag=True, help="Print the command instead of running it.")
@click.option("--test-only", is_flag=True, help="Ask the scheduler when the job would start, without submitting it.")
def launch(
    recipe: str, local: int | None, slurm: bool, then: tuple[str, ...], nodes: int | None, gpus_per_node: int | None,
    overrides: tuple[str, ...], dry_run: bool, test_only: bool,
) -> None:
    """Start a run on this machine (--local N) or submit it to Slurm (--slurm).

    Further recipes (--then) become separate jobs. Overrides (--set) of locations (runs_dir, data.shards, ...) apply to
    all recipes, others only to the last one.
    """
    from karmma_dist.launching.local import check_local, launch_local, rank_command, shown_commands
    from karmma_dist.launching.slurm import ask_scheduler, plan_jobs, shown_jobs, submit_jobs
    from karmma_dist.recipe import load_chain

    if local is not None and (slurm or then or nodes or gpus_per_node is not None or test_only):
        raise UserError("launch: --then, --nodes, --gpus-per-node and --test-only go with --slurm, not with --local")
    if local is None and not (slurm or then):
        raise UserError("launch: choose --local N for ranks on this machine, or --slurm")
    if local is not None:
        check_local(load_chain(recipe, overrides), local)  # reports an error once, before any rank starts
        arguments = ["train", recipe, *(f"--set={override}" for override in overrides)]
        if not dry_run:
            sys.exit(launch_local(local, rank_command(arguments)))
        lines = shown_commands(local, arguments)
    else:
        jobs = plan_jobs([recipe, *then], overrides, nodes=nodes, gpus_per_node=gpus_per_node)
        lines = shown_jobs(jobs) if dry_run else ask_scheduler(jobs) if test_only else submit_jobs(jobs)
    for line in lines:
        print_line(line)


@click.command()
@click.argument("recipe")
@set_option
@click.option("--resume", default="auto", show_default=True, metavar="auto|never|PATH", help="Where to start from.")
@click.option("--profile", type=Steps(), help="Trace optimizer steps START to STOP - 1 into trace/ in the run folder.")
@click.option("--max-time", metavar="TIME", help="Save and exit 85 within this time: H:MM:SS, D-HH:MM:SS, 90m, 12h.")
def train(
    recipe: str, overrides: tuple[str, ...], resume: str, profile: str | None, max_time: str | None
) -> None:
    """Train a recipe, after any unfinished recipes that it builds on. Every rank runs this command.

    On USR2, TERM, or the end of --max-time, save at the next step and exit with 85; the same command resumes the run.
    """
    from karmma_dist.recipe import load_chain

    traced = () if profile is None else (f"training.profile_steps={profile}",)
    chain = load_chain(recipe, (*overrides, *traced))  # before importing torch: an invalid recipe fails at once
    from karmma_dist.training.fault_tolerance.preemption import parse_duration

    deadline = None if max_time is None else _STARTED + parse_duration(max_time)
    from karmma_dist.evaluation.metrics import known_figure
    from karmma_dist.evaluation.run import validate
    from karmma_dist.training.chain import train_chain

    for run, scores in train_chain(chain, validate, resume, deadline=deadline).items():
        metrics = {name: figure.metric for name in scores if (figure := known_figure(name)) is not None}
        summary = [name for name, metric in metrics.items() if metric.terminal == "all"]
        shown = ", ".join(f"{name} {scores[name]:.2f}" for name in summary if scores[name] is not None)
        print_line(f"{run}: {shown} ({chain[-1].runs_dir}/{run})")


@click.command()
@click.argument("study")
@click.option("--seeds", type=click.IntRange(min=1), help="Number of seeds per row; default: the study's number.")
@click.option("--local", type=click.IntRange(min=1), help="Runs that train concurrently on this machine; default: 1.")
@click.option("--slurm", is_flag=True, help="Submit everything with sbatch: arrays over seeds, then the report.")
@click.option("--only", multiple=True, metavar="ROW", help="Train only the row with this label. May be repeated.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override one field of every run.")
@click.option("--dry-run", is_flag=True, help="Print runs, states and costs; with --slurm, the sbatch commands.")
@click.option("--gpu", default="H100", show_default=True, help="GPU whose hours --dry-run shows, such as A100.")
@click.option("--out", type=HomePath(path_type=Path), help="Folder of the report; default: runs/studies/STUDY.")
def study(
    study: str, seeds: int | None, local: int | None, slurm: bool, only: tuple[str, ...],
    overrides: tuple[str, ...], dry_run: bool, gpu: str, out: Path | None,
) -> None:
    """Train, evaluate and report a table: all unfinished runs of STUDY, over several seeds.

    STUDY: a file, or DATASET/NAME for recipes/DATASET/studies/NAME.yaml. The same command resumes an interrupted study.
    """
    if slurm and local is not None:
        raise UserError("study: choose either --local or --slurm")
    from karmma_dist.studies.study import load_study

    file = load_study(study)  # before importing torch: an invalid study fails at once
    from karmma_dist.studies.command import StudyRequest, carry_out, shown_plan, submitted

    request = StudyRequest(file, seeds, local or 1, only, overrides, out, gpu)
    if slurm:
        for line in submitted(request, is_dry=dry_run):
            print_line(line)
    elif dry_run:
        shown_plan(request)
    elif not carry_out(request):
        sys.exit(1)


@click.command("memory")
@click.argument("folder", metavar="PATH", type=HomePath(path_type=Path))
@click.option("--verify", "is_verified", is_flag=True, help="Check every answer's checksum; exit 1 if one is damaged.")
@click.option("--prune", "is_pruned", is_flag=True,
              help="Remove damaged answers, and the epochs of a teacher's memory that lack some.")
@click.option("--merge", "others", metavar="DIR", multiple=True, type=HomePath(path_type=Path),
              help="Add the answers of another part of this memory, such as another node's; may be repeated.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def memory_command(
    folder: Path, is_verified: bool, is_pruned: bool, others: tuple[Path, ...], as_json: bool
) -> None:
    """Show what the memory of a frozen model holds: of which model and views, answers per epoch, bytes."""
    from karmma_dist.memory.contents import change_contents, print_contents, read_contents

    if is_pruned or others:
        for line in change_contents(folder, others, is_pruned=is_pruned):
            print_line(line, err=as_json)
    contents = read_contents(folder, verify=is_verified)
    if as_json:
        print_json(contents.to_json())
    else:
        print_contents(contents, verified=is_verified)
    if contents.num_damaged:
        sys.exit(1)


@click.command("runs")
@click.argument("folder", metavar="[DIR]", default="runs", type=HomePath(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def runs_command(folder: Path, as_json: bool) -> None:
    """List the runs in and below DIR (default: runs): state, step, loss, best accuracy, job, command to continue."""
    from karmma_dist.runs.listing import find_runs, print_runs, to_json

    runs = find_runs(folder)
    if as_json:
        print_json(to_json(runs))
    elif runs:
        print_runs(runs)
    else:
        print_line(f"{folder}: no runs found")
