"""The commands for shards: shard, inspect and verify."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from karmma_dist.commands.options import HomePath, Part, print_json, set_option
from karmma_dist.terminal import print_line


@click.command()
@click.argument("spec", default="epic_kitchens")
@click.option("--raw", type=HomePath(), help="Raw dataset folder; default: that of the specification.")
@click.option("--out", type=HomePath(), help="Folder for the shards; default: that of the specification.")
@click.option("--workers", default=1, show_default=True, type=click.IntRange(min=1), help="Packing processes.")
@click.option("--limit", type=click.IntRange(min=1), help="Pack only the first N clips of each split.")
@click.option("--part", type=Part(), help="Pack only the I-th of N parts of the recordings.")
@click.option("--retry-failed", is_flag=True, help="Retry clips that failed before.")
@set_option
def shard(
    spec: str, raw: str | None, out: str | None, workers: int, limit: int | None, part: tuple[int, int] | None,
    retry_failed: bool, overrides: tuple[str, ...],
) -> None:
    """Pack a raw dataset into shards. SPEC: a file in shards/, or its name without suffix."""
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


@click.command()
@click.argument("shards", type=HomePath(path_type=Path))
@click.argument("key", required=False)
@click.option("--sheet", type=HomePath(path_type=Path), help="Draw a contact sheet into this PNG.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(shards: Path, key: str | None, sheet: Path | None, as_json: bool) -> None:
    """Show the content of a shards folder: splits, modality subsets and classes, or one clip, or a contact sheet."""
    from karmma_dist.packing.inspect.inspect import contact_sheet, describe, describe_clip
    from karmma_dist.packing.inspect.tables import print_description
    from karmma_dist.shards.folder import ShardFolder

    folder = ShardFolder(shards)
    description = describe(folder) if key is None else describe_clip(folder, key)
    if sheet is not None:
        contact_sheet(folder, sheet, keys=None if key is None else [key])
    if as_json:
        print_json(description)
    else:
        print_description(description)
    if sheet is not None:
        print_line(f"contact sheet: {sheet}", err=as_json)


@click.command()
@click.argument("shards", type=HomePath(path_type=Path))
@click.option("--full", is_flag=True, help="Read every byte, and decode the first and last frames of every video.")
@click.option("--repair", "mend", is_flag=True, help="First rewrite lost indexes and manifests from intact tars.")
@click.option("--workers", default=1, show_default=True, type=click.IntRange(min=1), help="Checking processes.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def verify(shards: Path, full: bool, mend: bool, workers: int, as_json: bool) -> None:
    """Check that a shards folder is as it was packed, and name every damaged shard, clip and member (exit code 1)."""
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
        print_json(result.to_dict())
    else:
        print_verification(result)
    if not result.whole:
        sys.exit(1)
