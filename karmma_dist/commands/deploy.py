"""The command that makes one file of a run: export."""

from __future__ import annotations

from pathlib import Path

import click

from karmma_dist.commands.options import HomePath
from karmma_dist.terminal import print_line


@click.command()
@click.argument("run", type=HomePath(path_type=Path))
@click.option(
    "--precision", type=click.Choice(["fp32", "fp16"]), default="fp32", show_default=True,
    help="Type of the stored weights; they are computed with as fp32.",
)
@click.option("--shards", type=HomePath(), help="Shards whose packing settings go into it; default: the run's.")
@click.option("--out", type=HomePath(path_type=Path), help="File; default: model.onnx in the folder of the weights.")
def export(run: Path, precision: str, shards: str | None, out: Path | None) -> None:
    """Write a run's model to one file that takes any subset of its sensors, for onnxruntime without PyTorch.

    RUN: a run folder or a weights file.
    """
    from karmma_dist.deploy.export import export_run
    from karmma_dist.progress import Progress

    with Progress() as report:
        exported = export_run(run, out, precision=precision, shards=shards, report=report)
    if exported.warning:
        print_line(f"warning: {exported.warning}", err=True)
    for each in exported.header.modalities:
        rate = "" if each.rate_hz is None else f", {each.rate_hz:g} Hz"
        print_line(f"{each.name}: {each.dtype} {each.shape}{rate}: {each.axes}; present: {each.flag}")
    sizes = f"{exported.num_bytes / 1e6:.1f} MB for {exported.parameter_bytes / 1e6:.1f} MB of parameters"
    print_line(
        f"{exported.path}: {sizes}; "
        f"largest difference of a logit from the run's {exported.largest_difference:.1e}"
    )
