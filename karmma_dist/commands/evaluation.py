"""The commands that run a trained model: eval and predict."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from karmma_dist.commands.options import HomePath, print_json
from karmma_dist.terminal import print_line

if TYPE_CHECKING:
    from karmma_dist.evaluation.predict.prediction import Prediction


@click.command("eval")
@click.argument("runs", metavar="[RUN]...", nargs=-1, type=HomePath(path_type=Path))
@click.option("--shards", type=HomePath(), help="Shards folder; default: the run's training shards.")
@click.option("--split", help="Split; default: the run's test split, else its validation split.")
@click.option("--drop-prob", type=click.FloatRange(0, 1), help="Drop each modality with this probability.")
@click.option("--modalities", help="Use only these modalities, e.g. V,F.")
@click.option("--subsets", is_flag=True, help="Evaluate every non-empty subset of the modalities.")
@click.option("--sweep", is_flag=True, help="Evaluate drop probabilities 0.0, 0.1, ... 0.9.")
@click.option("--seeds", default=1, show_default=True, type=click.IntRange(min=1), help="Random draws per condition.")
@click.option(
    "--corrupt", multiple=True, metavar="SENSOR:KIND:SEVERITY",
    help="Also evaluate a broken sensor, e.g. video:blur:3 (severity 1 to 5); 'suite': every kind. May be repeated.",
)
@click.option(
    "--missing", multiple=True, metavar="MODALITY:SHARE",
    help="Also evaluate with a share of the clips that lacks one modality, e.g. audio:0.5. May be repeated.",
)
@click.option("--annotations", type=HomePath(path_type=Path), help="Lists of tail classes and unseen participants.")
@click.option("--views", help="Average TEMPORALxSPATIAL views of each clip, e.g. 3x1; default: the recipe's.")
@click.option(
    "--predictions", type=HomePath(path_type=Path),
    help="Write the predictions on clips with intact sensors: .npz or .parquet.",
)
@click.option(
    "--submission", type=(click.Choice(["epic-kitchens", "something-something"]), HomePath(path_type=Path)),
    metavar="FORMAT FILE", help="Leaderboard file: epic-kitchens FILE.zip (or .pkl), something-something FILE.csv.",
)
@click.option("--sls", help="Supervision levels of an Epic-Kitchens submission: pretraining,labels,data, e.g. 2,3,3.")
@click.option(
    "--out", type=HomePath(path_type=Path),
    help="Folder for the report; default: eval/ in the run folder, or runs/comparison for several runs.",
)
@click.option("--local", type=click.IntRange(min=1), help="Share the clips among N ranks on this machine, one per GPU.")
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
@click.pass_context
def evaluate(
    context: click.Context, runs: tuple[Path, ...], shards: str | None, split: str | None, drop_prob: float | None,
    modalities: str | None, subsets: bool, sweep: bool, seeds: int, corrupt: tuple[str, ...],
    missing: tuple[str, ...], annotations: Path | None, views: str | None, predictions: Path | None,
    submission: tuple[str, Path] | None, sls: str | None, out: Path | None, local: int | None, as_json: bool,
) -> None:
    """Evaluate a run (default: the newest finished run) under missing modalities, or compare runs on the same clips.

    RUN: a run folder or a weights file. Under srun or torchrun, the ranks share the clips.
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
            sweep=sweep, num_seeds=seeds, corrupt=corrupt, missing=missing, annotations=annotations, views=views,
            exports=exports, out=out,
        )
    )
    if evaluation is None:
        return  # only rank 0 prints
    print_evaluation(evaluation, as_text=not as_json)
    if as_json:
        print_json(evaluation.content)
    for line in evaluation.export():
        print_line(line, err=as_json)
    if evaluation.is_damaged:
        sys.exit(1)


def _without_option(arguments: Sequence[str], name: str) -> list[str]:
    """Return the command line without `name VALUE` and `name=VALUE`."""
    kept: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if argument == name:
            next(rest)
        elif not argument.startswith(f"{name}="):
            kept.append(argument)
    return kept


@click.command()
@click.argument("run", type=HomePath(path_type=Path))
@click.argument("clips", metavar="CLIP...", nargs=-1, required=True)
@click.option("--shards", type=HomePath(), help="Shards folder; default: the run's training shards.")
@click.option("--start", type=click.FloatRange(min=0), help="Start of the clip in its file, in seconds.")
@click.option("--stop", type=click.FloatRange(min=0), help="End of the clip, in seconds; default: the end of the file.")
@click.option("--modalities", help="Use only these modalities, e.g. V,A; default: all modalities of the clip.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def predict(
    run: Path, clips: tuple[str, ...], shards: str | None, start: float | None, stop: float | None,
    modalities: str | None, as_json: bool,
) -> None:
    """Predict the action in a clip.

    RUN: a run folder, a weights file, or an .onnx file that karmma-dist export wrote. CLIP: a media file, or a key in
    the shards.
    """
    from karmma_dist.deploy.model_file import is_model_file
    from karmma_dist.evaluation.predict.prediction import print_predictions
    from karmma_dist.progress import Progress, silent

    if is_model_file(run):
        from karmma_dist.deploy.predict import predict_exported

        ask: Callable[..., list[Prediction]] = predict_exported
    else:
        from karmma_dist.evaluation.predict.predict import predict as ask
    with Progress() as report:
        predictions = ask(
            run, clips, shards=shards, start_s=start, stop_s=stop, modalities=modalities,
            report=report if len(clips) > 1 else silent,
        )  # fmt: skip
    if as_json:
        print_json({"clips": [prediction.to_dict() for prediction in predictions]})
    else:
        print_predictions(predictions)
