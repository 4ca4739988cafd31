"""What packing and inspecting have to say, as tables for a terminal."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from rich.console import Console
from rich.table import Table

from karmma_dist.modalities import letters
from karmma_dist.packing.pack import FAILURES, PackSummary
from karmma_dist.packing.verify.problems import Verification
from karmma_dist.packing.verify.verify import damaged_files

_SHOWN = 10


def print_summary(summary: PackSummary) -> None:
    """Say what a packing run did: clips per split and subset, bytes, failures, notes."""
    console = Console(highlight=False)
    if summary.clips:
        table = Table(title=f"{summary.out}: {summary.status}")
        for heading in ("split", "clips", "shards", "modalities"):
            table.add_column(heading, justify="right" if heading in ("clips", "shards") else "left")
        for split, num in summary.clips.items():
            table.add_row(split, f"{num:,}", f"{summary.shards[split]:,}", _counts(summary.subsets[split]))
        console.print(table)
        console.print(f"{summary.num_bytes / 1e6:,.1f} MB in {summary.seconds:,.1f} s")
    else:
        console.print(f"{summary.out}: {summary.status} in {summary.seconds:,.1f} s")
    for note in summary.notes:
        console.print(f"note: {note}")
    if summary.failures:
        stages = Counter(f"{failure.modality}, {failure.stage}" for failure in summary.failures)
        console.print(
            f"{len(summary.failures)} clips failed and were left out ({_counts(stages)}); each is named in "
            f"{summary.out / FAILURES}"
        )


def print_description(description: dict[str, Any]) -> None:
    """Print what `inspect.describe` or `inspect.describe_clip` returned."""
    console = Console(highlight=False)
    if "splits" not in description:
        console.print_json(json.dumps(description))
        return
    table = Table(title=f"{description['folder']}: {description['dataset']}")
    headings = ("split", "clips", "shards", "MB", "hours", "modalities of a clip")
    for heading in headings:
        table.add_column(heading, justify="left" if heading in (headings[0], headings[-1]) else "right")
    for name, split in description["splits"].items():
        sizes = (f"{split['bytes'] / 1e6:,.1f}", f"{split['seconds'] / 3600:,.2f}")
        table.add_row(name, f"{split['clips']:,}", f"{split['shards']:,}", *sizes, _counts(split["subsets"]))
    console.print(table)
    declared = letters(description["modalities"])
    console.print(f"declared: {declared}; clips that failed to pack: {description['failures']}")
    for head, names in description["classes"].items():
        counts = Counter(dict.fromkeys(names, 0))
        for split in description["splits"].values():
            for name, num in zip(names, split["label_counts"].get(head) or [], strict=False):
                counts[name] += num
        common = ", ".join(f"{name} {num:,}" for name, num in counts.most_common(_SHOWN))
        console.print(f"{head}: {len(names)} classes: {common}{', ...' if len(names) > _SHOWN else ''}")


def print_verification(result: Verification) -> None:
    """Print one line per finding, then what was looked at and which files are damaged."""
    console = Console(highlight=False)
    for finding in result.findings:
        # Not through rich: a line must stay one line, whatever the width of the terminal.
        print(finding)
    if result.splits:
        table = Table(title=f"{result.folder}: {'whole' if result.whole else 'damaged'}")
        for heading in ("split", "shards", "clips", "MB"):
            table.add_column(heading, justify="left" if heading == "split" else "right")
        for split, (num_shards, num_clips, num_bytes) in result.splits.items():
            table.add_row(split, f"{num_shards:,}", f"{num_clips:,}", f"{num_bytes / 1e6:,.1f}")
        console.print(table)
    if result.findings:
        table = Table(title=f"{len(result.findings)} findings")
        for heading in ("file", "kinds"):
            table.add_column(heading)
        for name, kinds in damaged_files(result.findings).items():
            table.add_row(name, _counts(kinds))
        console.print(table)
    for name in result.repaired:
        console.print(f"written again: {name}")
    for note in result.notes:
        console.print(f"note: {note}", soft_wrap=True)
    checked = "every byte" if result.full else "sizes, indexes and headers (--full reads every byte)"
    console.print(f"checked: {checked}", soft_wrap=True)


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {num:,}" for name, num in sorted(counts.items(), key=lambda item: -item[1]))
