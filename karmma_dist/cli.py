"""The commands: parse, call one function, print. Nothing heavy is imported before a command runs.

Exit codes: 0 done, 1 found something wrong, 2 usage or bad input, 85 stopped after saving: start it again, 130 Ctrl-C.
"""

from __future__ import annotations

import os
import select
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from karmma_dist.errors import LostRank, Stopped, UserError, one_line, say

_STARTED = time.monotonic()
_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


class _Part(click.ParamType):
    """`I/N` with 1 <= I <= N."""

    name = "I/N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        first, slash, second = str(value).partition("/")
        if not slash or not first.isdigit() or not second.isdigit() or not 1 <= int(first) <= int(second):
            self.fail(f"{value!r} is not I/N with 1 <= I <= N, for example 3/16", param, ctx)
        return int(first), int(second)


class _Steps(click.ParamType):
    """`START:STOP`, given on as the recipe's `[START, STOP]`."""

    name = "START:STOP"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        start, colon, stop = str(value).partition(":")
        if not colon or not start.isdigit() or not stop.isdigit():
            self.fail(f"{value!r} is not START:STOP, for example 10:15", param, ctx)
        return f"[{start}, {stop}]"


set_option = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override one field, e.g. --set training.epochs=3."
)


@click.group(context_settings=_CONTEXT)
@click.version_option(package_name="karmma-dist")
def cli() -> None:
    """Egocentric action recognition that survives missing modalities: pack, train, distil, evaluate."""


@cli.command()
@click.option("--out", default="demo", show_default=True, type=click.Path(path_type=Path), help="Its folder.")
def demo(out: Path) -> None:
    """Make a small synthetic kitchen, then pack, train, distil and evaluate it: minutes on a CPU."""
    from karmma_dist.demo import run_demo
    from karmma_dist.progress import Progress

    with Progress() as report:
        path = run_demo(out, report)
    click.echo(path)


@cli.command()
@click.argument("spec", default="epic_kitchens")
@click.option("--raw", type=click.Path(), help="Raw dataset folder; default: the specification's.")
@click.option("--out", type=click.Path(), help="Folder for the shards; default: the specification's.")
@click.option("--workers", default=1, show_default=True, type=click.IntRange(min=1), help="Packing processes.")
@click.option("--limit", type=click.IntRange(min=1), help="Pack only the first N clips of each split.")
@click.option("--part", type=_Part(), help="Take only the I-th of N parts of the recordings.")
@click.option("--retry-failed", is_flag=True, help="Try clips again that failed before.")
@set_option
def shard(
    spec: str, raw: str | None, out: str | None, workers: int, limit: int | None, part: tuple[int, int] | None,
    retry_failed: bool, overrides: tuple[str, ...],
) -> None:
    """Pack a raw dataset into shards. SPEC is a file of shards/ or its bare name."""
    from karmma_dist.packing.inspect.tables import print_summary
    from karmma_dist.packing.pack import pack
    from karmma_dist.packing.spec import load_spec
    from karmma_dist.progress import Progress

    resolved = load_spec(spec, raw=raw, out=out, overrides=overrides)
    with Progress() as report:
        summary = pack(
            resolved, workers=workers, limit=limit, part=part, retry_failed=retry_failed, progress=report
        )
    print_summary(summary)
    if summary.failures:
        sys.exit(1)


@cli.command()
@click.argument("shards", type=click.Path(path_type=Path))
@click.argument("key", required=False)
@click.option("--sheet", type=click.Path(path_type=Path), help="Draw a contact sheet into this PNG.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(shards: Path, key: str | None, sheet: Path | None, as_json: bool) -> None:
    """Show what is in a shards folder: splits, modality subsets, classes; or one clip; or a contact sheet."""
    from karmma_dist.packing.inspect.inspect import contact_sheet, describe, describe_clip
    from karmma_dist.packing.inspect.tables import print_description
    from karmma_dist.shards.folder import ShardFolder

    folder = ShardFolder(shards)
    description = describe(folder) if key is None else describe_clip(folder, key)
    if sheet is not None:
        contact_sheet(folder, sheet, keys=None if key is None else [key])
    if as_json:
        _print_json(description)
    else:
        print_description(description)
    if sheet is not None:
        click.echo(f"contact sheet: {sheet}", err=as_json)


@cli.command()
@click.argument("shards", type=click.Path(path_type=Path))
@click.option("--full", is_flag=True, help="Read every byte, and decode the ends of every video.")
@click.option("--repair", "mend", is_flag=True, help="First write lost indexes and manifests again from whole tars.")
@click.option("--workers", default=1, show_default=True, type=click.IntRange(min=1), help="Checking processes.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def verify(shards: Path, full: bool, mend: bool, workers: int, as_json: bool) -> None:
    """Check that a shards folder is what was packed: 0 whole, 1 damaged, each shard, clip and member named."""
    from karmma_dist.packing.inspect.tables import print_verification
    from karmma_dist.packing.verify.repair import repair
    from karmma_dist.packing.verify.verify import verify as check
    from karmma_dist.progress import Progress

    with Progress() as report:
        done = repair(shards, progress=report) if mend else None
        result = check(shards, full=full, workers=workers, progress=report)
    if done is not None:
        result.repaired = done.written
        result.findings = list(dict.fromkeys([*done.findings, *result.findings]))
    if as_json:
        _print_json(result.to_dict())
    else:
        print_verification(result)
    if not result.whole:
        sys.exit(1)


@cli.command()
@click.argument("recipe")
@click.option("--local", "local", type=click.IntRange(min=1), help="Start N ranks on this machine.")
@click.option("--slurm", is_flag=True, help="Hand it to sbatch.")
@click.option("--then", multiple=True, metavar="RECIPE", help="A further job that starts once the one before finished.")
@click.option("--nodes", type=click.IntRange(min=1), help="Nodes to ask Slurm for; default: the recipe's.")
@click.option("--gpus-per-node", type=click.IntRange(min=0), help="GPUs per node; default: the recipe's.")
@set_option
@click.option("--dry-run", is_flag=True, help="Print the command instead of running it.")
@click.option("--test-only", is_flag=True, help="Ask the scheduler when it would start; nothing is submitted.")
def launch(
    recipe: str, local: int | None, slurm: bool, then: tuple[str, ...], nodes: int | None, gpus_per_node: int | None,
    overrides: tuple[str, ...], dry_run: bool, test_only: bool,
) -> None:
    """Start a run on this machine (--local N) or hand it to Slurm (--slurm).

    Several recipes (--then) are jobs of their own. Of --set, where things are (runs_dir, data.shards, ...) holds for
    all of them, the rest for the last.
    """
    from karmma_dist.launching.local import check_local, launch_local, rank_command, shown_commands
    from karmma_dist.launching.slurm import ask_scheduler, plan_jobs, shown_jobs, submit_jobs
    from karmma_dist.recipe import load_chain

    if local is not None and (slurm or then or nodes or gpus_per_node is not None or test_only):
        raise UserError("launch: --then, --nodes, --gpus-per-node and --test-only go with --slurm, not with --local")
    if local is None and not (slurm or then):
        raise UserError("launch: say where: --local N for ranks on this machine, or --slurm")
    if local is not None:
        check_local(load_chain(recipe, overrides), local)  # what is wrong is said once, before any rank is started
        arguments = ["train", recipe, *(f"--set={override}" for override in overrides)]
        if not dry_run:
            sys.exit(launch_local(local, rank_command(arguments)))
        lines = shown_commands(local, arguments)
    else:
        jobs = plan_jobs([recipe, *then], overrides, nodes=nodes, gpus_per_node=gpus_per_node)
        lines = shown_jobs(jobs) if dry_run else ask_scheduler(jobs) if test_only else submit_jobs(jobs)
    click.echo("\n".join(lines))


@cli.command()
@click.argument("recipe")
@set_option
@click.option("--resume", default="auto", show_default=True, metavar="auto|never|PATH", help="Where to start from.")
@click.option("--profile", type=_Steps(), help="Trace optimizer steps START to STOP - 1 into trace/ in the run folder.")
@click.option("--max-time", metavar="TIME", help="Save and exit 85 before this is over: H:MM:SS, D-HH:MM:SS, 90m, 12h.")
def train(
    recipe: str, overrides: tuple[str, ...], resume: str, profile: str | None, max_time: str | None
) -> None:
    """Train a recipe, and first those it builds on that are not finished. What every rank runs.

    USR2 and TERM, or the end of --max-time, save at the next step and exit with 85; the same command goes on there.
    """
    from karmma_dist.recipe import load_chain

    traced = () if profile is None else (f"training.profile_steps={profile}",)
    chain = load_chain(recipe, (*overrides, *traced))  # before torch is imported: a wrong recipe is said at once
    from karmma_dist.training.fault_tolerance.preemption import parse_duration

    deadline = None if max_time is None else _STARTED + parse_duration(max_time)
    from karmma_dist.evaluation.metrics import known_figure
    from karmma_dist.evaluation.run import validate
    from karmma_dist.training.trainer import train_chain

    for name, scores in train_chain(chain, validate, resume, deadline=deadline).items():
        figures = {metric: figure.metric for metric in scores if (figure := known_figure(metric)) is not None}
        brief = [metric for metric, kind in figures.items() if kind.terminal == "all"]
        shown = ", ".join(f"{metric} {scores[metric]:.2f}" for metric in brief)
        click.echo(f"{name}: {shown} ({chain[-1].runs_dir}/{name})")


@cli.command("eval")
@click.argument("runs", metavar="[RUN]...", nargs=-1, type=click.Path(path_type=Path))
@click.option("--shards", type=click.Path(), help="Shards folder; default: the one the run was trained on.")
@click.option("--split", help="Split; default: the run's test split, else validation.")
@click.option("--drop-prob", type=click.FloatRange(0, 1), help="Each modality is lost with this probability.")
@click.option("--modalities", help="Only these, e.g. V,F.")
@click.option("--subsets", is_flag=True, help="Every non-empty subset of the modalities.")
@click.option("--sweep", is_flag=True, help="Drop probabilities 0.0, 0.1, ... 0.9.")
@click.option("--seeds", default=1, show_default=True, type=click.IntRange(min=1), help="Random draws per condition.")
@click.option(
    "--corrupt", multiple=True, metavar="SENSOR:KIND:SEVERITY",
    help="Also with a broken sensor, e.g. video:blur:3 (severity 1 to 5); 'suite': every kind. May be repeated.",
)
@click.option("--annotations", type=click.Path(path_type=Path), help="Lists of tail classes and unseen participants.")
@click.option("--views", help="Average TEMPORALxSPATIAL views of each clip, e.g. 3x1; default: the recipe's.")
@click.option(
    "--predictions", type=click.Path(path_type=Path),
    help="Write every prediction with whole sensors: .npz or .parquet.",
)
@click.option(
    "--submission", type=(click.Choice(["epic-kitchens", "something-something"]), click.Path(path_type=Path)),
    metavar="FORMAT FILE", help="Leaderboard's file: epic-kitchens FILE.zip (or .pkl), something-something FILE.csv.",
)
@click.option("--sls", help="Supervision levels of an Epic-Kitchens submission: pretraining,labels,data, e.g. 2,3,3.")
@click.option(
    "--out", type=click.Path(path_type=Path),
    help="Folder for the report; default: eval/ in the run folder, of several runs runs/comparison.",
)
@click.option("--local", type=click.IntRange(min=1), help="Share the clips among N ranks on this machine, one a GPU.")
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
@click.pass_context
def evaluate(
    context: click.Context, runs: tuple[Path, ...], shards: str | None, split: str | None, drop_prob: float | None,
    modalities: str | None, subsets: bool, sweep: bool, seeds: int, corrupt: tuple[str, ...],
    annotations: Path | None, views: str | None, predictions: Path | None, submission: tuple[str, Path] | None,
    sls: str | None, out: Path | None, local: int | None, as_json: bool,
) -> None:
    """Evaluate a run (default: the newest finished) with sensors failing, or compare several on the same clips.

    RUN: a run folder or a weights file. Under srun or torchrun the ranks share the clips.
    """
    if local is not None:
        from karmma_dist.launching.local import launch_local, rank_command

        sys.exit(launch_local(local, rank_command(_without_option(context.obj, "--local"))))
    from karmma_dist.evaluation.command import Request, evaluate_request, print_evaluation
    from karmma_dist.evaluation.exports.epic_kitchens import parse_levels
    from karmma_dist.evaluation.exports.exports import Exports

    exports = Exports(predictions, submission, None if sls is None else parse_levels(sls))
    evaluation = evaluate_request(
        Request(
            runs=runs, shards=shards, split=split, drop_prob=drop_prob, modalities=modalities, subsets=subsets,
            sweep=sweep, num_seeds=seeds, corrupt=corrupt, annotations=annotations, views=views, exports=exports,
            out=out,
        )
    )
    if evaluation is None:
        return  # only rank 0 prints
    print_evaluation(evaluation, as_text=not as_json)
    if as_json:
        _print_json(evaluation.content)
    for line in evaluation.export():
        click.echo(line, err=as_json)
    if evaluation.is_damaged:
        sys.exit(1)


@cli.command()
@click.argument("study")
@click.option("--seeds", type=click.IntRange(min=1), help="Trainings of each row; default: the study's.")
@click.option("--local", type=click.IntRange(min=1), help="Runs that train side by side on this machine; default: 1.")
@click.option("--slurm", is_flag=True, help="Hand all of it to sbatch: arrays over seeds, the report last.")
@click.option("--only", multiple=True, metavar="ROW", help="Train this row alone, by its label. May be repeated.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override one field of every run.")
@click.option("--dry-run", is_flag=True, help="Print runs, states and costs; with --slurm the sbatch lines.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the report; default: runs/studies/STUDY.")
def study(
    study: str, seeds: int | None, local: int | None, slurm: bool, only: tuple[str, ...],
    overrides: tuple[str, ...], dry_run: bool, out: Path | None,
) -> None:
    """Train, evaluate and report a table: all runs of STUDY that are not finished, over several seeds.

    STUDY: a file, or DATASET/NAME for recipes/DATASET/studies/NAME.yaml. Started again it goes on where it was.
    """
    if slurm and local is not None:
        raise UserError("study: --local goes without --slurm")
    from karmma_dist.studies.study import load_study

    file = load_study(study)  # before torch is imported: a wrong study is said at once
    from karmma_dist.studies.command import StudyRequest, carry_out, shown_plan, submitted

    request = StudyRequest(file, seeds, local or 1, only, overrides, out)
    if slurm:
        click.echo("\n".join(submitted(request, is_dry=dry_run)))
    elif dry_run:
        shown_plan(request)
    elif not carry_out(request):
        sys.exit(1)


@cli.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("clips", metavar="CLIP...", nargs=-1, required=True)
@click.option("--shards", type=click.Path(), help="Shards folder; default: the one the run was trained on.")
@click.option("--start", type=click.FloatRange(min=0), help="Where the clip starts in its file, seconds.")
@click.option("--stop", type=click.FloatRange(min=0), help="Where it stops; default: the end of the file.")
@click.option("--modalities", help="Only these, e.g. V,A; default: all that the clip has.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def predict(
    run: Path, clips: tuple[str, ...], shards: str | None, start: float | None, stop: float | None,
    modalities: str | None, as_json: bool,
) -> None:
    """Say what is done in a clip. RUN: a run folder or a weights file. CLIP: a media file, or a key in the shards."""
    from karmma_dist.evaluation.predict.predict import predict as ask
    from karmma_dist.evaluation.predict.predict import print_predictions
    from karmma_dist.progress import Progress, silent

    with Progress() as report:
        predictions = ask(
            run, clips, shards=shards, start_s=start, stop_s=stop, modalities=modalities,
            report=report if len(clips) > 1 else silent,
        )  # fmt: skip
    if as_json:
        _print_json({"clips": [prediction.to_dict() for prediction in predictions]})
    else:
        print_predictions(predictions)


@cli.command()
@click.argument("recipe")
@set_option
@click.option("--modalities", help="Only this subset, e.g. V,F; default: every subset of the recipe's.")
@click.option("--part", default="model", show_default=True, type=click.Choice(["model", "fusion"]),
              help="Count the whole model, or its fusion block alone, with fused and with unfused attention.")
@click.option("--precision", type=click.Choice(["fp32", "bf16", "fp16"]),
              help="Of the memory counted (default: bf16) and of --measure (default: bf16 on a GPU, fp32 on a CPU).")
@click.option("--batch", default=1, show_default=True, type=click.IntRange(min=1), help="Clips at once.")
@click.option("--measure", "measured", is_flag=True,
              help="Also run it here: latency, memory and, on a GPU, the peaks of CUDA's allocator.")
@click.option("--repeats", default=5, show_default=True, type=click.IntRange(min=1), help="Timed passes per row.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw bars of GFLOPs and memory into this PNG.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def profile(
    recipe: str, overrides: tuple[str, ...], modalities: str | None, part: str, precision: str | None, batch: int,
    measured: bool, repeats: int, plot: Path | None, as_json: bool,
) -> None:
    """Count what a recipe's models cost: GFLOPs of a clip, parameters, tokens, memory; needs no weights and no data."""
    from karmma_dist.profiling.costs import Workload, profile_recipe
    from karmma_dist.profiling.measure import measure, require_precision
    from karmma_dist.profiling.report import cost_bars, print_profile
    from karmma_dist.progress import Progress

    if measured:
        require_precision(precision)  # before minutes of counting
    counted, subjects = profile_recipe(recipe, overrides, modalities, Workload(part, precision or "bf16", batch))
    if measured:
        with Progress() as report:
            counted = measure(counted, subjects, repeats, report, precision)
    if plot is not None:
        cost_bars(plot, counted)
    if as_json:
        _print_json(counted.to_dict())
    else:
        print_profile(counted)
    if plot is not None:
        click.echo(f"plot: {plot}", err=as_json)


@cli.command()
@click.argument("recipe", required=False)
@set_option
@click.option("--distributed", is_flag=True, help="Under srun or torchrun, on every rank: do the ranks fit together?")
@click.option("--timeout", default=60, show_default=True, type=click.IntRange(min=5), help="Seconds it may take.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(recipe: str | None, overrides: tuple[str, ...], distributed: bool, timeout: int, as_json: bool) -> None:
    """Check this machine, or with --distributed the ranks of a job, and say what to fix.

    With RECIPE also what it needs: shards, run folder, shared memory, a batch that the GPUs divide. 0: fit to train,
    1: something must be fixed, 2: only the recipe's batch.
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
        _print_json(to_json(checks))
    else:
        print_checks(checks)
    if code := exit_code(checks):
        sys.exit(code)


@cli.command("runs")
@click.argument("folder", metavar="[DIR]", default="runs", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def runs_command(folder: Path, as_json: bool) -> None:
    """Show the runs in and below DIR (default: runs): state, step, loss, best accuracy, job, how to go on."""
    from karmma_dist.runs.listing import find_runs, print_runs, to_json

    found = find_runs(folder)
    if as_json:
        _print_json(to_json(found))
    elif found:
        print_runs(found)
    else:
        click.echo(f"{folder}: no runs in it")


@cli.group("bench")
def bench_group() -> None:
    """Measurements on this machine."""


@bench_group.command("loader")
@click.argument("shards")
@click.option("--recipe", help="Whose inputs to make; default: the dataset's distill recipe where it fits.")
@click.option("--workers", type=click.IntRange(min=0), help="Decoding processes; default: the recipe's.")
@click.option("--batches", default=50, show_default=True, type=click.IntRange(min=1), help="Batches to measure.")
@click.option("--drop-prob", type=click.FloatRange(0, 1), help="Training-time modality dropout; default: the recipe's.")
@click.option("--headspace", is_flag=True, help="Also the pace without loading: batches in memory, prepared again.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def bench_loader_command(
    shards: str, recipe: str | None, workers: int | None, batches: int, drop_prob: float | None, headspace: bool,
    as_json: bool,
) -> None:
    """Run the training loader over SHARDS: clips per second, and where the time goes."""
    from karmma_dist.progress import Progress
    from karmma_dist.streaming.bench import bench_loader, print_loader_bench

    with Progress() as report:
        result = bench_loader(
            shards, recipe=recipe, num_workers=workers, num_batches=batches, drop_prob=drop_prob, headspace=headspace,
            report=report,
        )
    if as_json:
        _print_json(result.to_dict())
    else:
        print_loader_bench(result)


@cli.group("recipe")
def recipe_group() -> None:
    """Recipes."""


@recipe_group.command("show")
@click.argument("recipe")
@set_option
def recipe_show(recipe: str, overrides: tuple[str, ...]) -> None:
    """Print the resolved recipe, every default spelled out."""
    from karmma_dist.recipe import load_recipe
    from karmma_dist.settings import dump

    click.echo(dump(load_recipe(recipe, overrides)), nl=False)


@recipe_group.command("schema")
def recipe_schema() -> None:
    """Print the JSON schema of recipes; fields with `not_learned` may change when a run is resumed."""
    from karmma_dist.recipe import Recipe

    _print_json(Recipe.model_json_schema())


def _without_option(arguments: Sequence[str], name: str) -> list[str]:
    """The command line without `name VALUE` and `name=VALUE`."""
    kept: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if argument == name:
            next(rest)
        elif not argument.startswith(f"{name}="):
            kept.append(argument)
    return kept


def _print_json(value: Any) -> None:
    import json

    click.echo(json.dumps(value, indent=1))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line (default: this process's) and return its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        cli(args=given, prog_name="karmma-dist", standalone_mode=False, obj=given)
    except UserError as error:
        return _fail(str(error))
    except Stopped as stop:
        say(str(stop), of_another=isinstance(stop, LostRank))
        return stop.exit_code
    except click.UsageError as error:
        if isinstance(error, click.exceptions.NoArgsIsHelpError):
            click.echo(error.format_message())
            return 2
        where = error.ctx.command_path if error.ctx else "karmma-dist"
        return _fail(f"{where}: {error.format_message()} (see {where} --help)")
    except click.ClickException as error:
        return _fail(error.format_message())
    except (click.Abort, KeyboardInterrupt):
        say("interrupted: run the same command again to go on")
        return 130
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            return 1
        if hasattr(error, "__notes__"):  # they say in which clip, and are more than a line
            raise
        return _fail(f"{error.filename or 'output'}: {error.strerror or error}", exit_code=1)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    return 0


def _fail(message: str, exit_code: int = 2) -> int:
    say(f"error: {one_line(message)}")
    return exit_code


def _reader_is_gone() -> bool:
    """Whether what read the output (`| head`) has seen enough; then nothing is left for the interpreter to flush."""
    poll = select.poll()
    poll.register(sys.stdout, 0)
    is_gone = any(event & select.POLLERR for _, event in poll.poll(0))
    if is_gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return is_gone
