"""Results of packing, inspecting and verifying, as tables for a terminal."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from karmma_dist.modalities import letters
from karmma_dist.packing.pack import FAILURES, PackSummary
from karmma_dist.packing.records import UNEXPECTED
from karmma_dist.packing.verify.problems import Verification
from karmma_dist.packing.verify.verify import damaged_files
from karmma_dist.terminal import harmless_lines, print_line, print_table

_SHOWN = 10


def print_summary(summary: PackSummary) -> None:
    """Print the result of a packing run: clips per split and subset, bytes, failures, notes."""
    if summary.clips:
        rows = [
            [split, f"{num:,}", f"{summary.shards[split]:,}", _counts(summary.subsets[split])]
            for split, num in summary.clips.items()
        ]
        print_table(
            ["split", "clips", "shards", "modalities"], rows, right=["clips", "shards"],
            title=f"{summary.out}: {summary.status}",
            footer=[f"{summary.num_bytes / 1e6:,.1f} MB in {summary.seconds:,.1f} s"],
        )  # fmt: skip
    else:
        print_line(f"{summary.out}: {summary.status} in {summary.seconds:,.1f} s")
    for note in summary.notes:
        print_line(f"note: {note}")
    if summary.failures:
        stages = Counter(f"{failure.modality}, {failure.stage}" for failure in summary.failures)
        print_line(
            f"{len(summary.failures)} clips failed and were left out ({_counts(stages)}); each is named in "
            f"{summary.out / FAILURES}"
        )
        unexpected = [failure for failure in summary.failures if failure.stage == UNEXPECTED]
        if unexpected:
            first = unexpected[0]
            cause = f"the first, {first.key}: {first.error}"
            print_line(f"{len(unexpected)} of them by no known damage, perhaps a bug; {cause}")


def print_description(description: dict[str, Any]) -> None:
    """Print the result of `inspect.describe` or `inspect.describe_clip`."""
    if "splits" not in description:
        print(harmless_lines(json.dumps(description, indent=2, ensure_ascii=False)))
        return
    headings = ["split", "clips", "shards", "MB", "hours", "modalities of a clip"]
    rows = [
        [
            name, f"{split['clips']:,}", f"{split['shards']:,}", f"{split['bytes'] / 1e6:,.1f}",
            f"{split['seconds'] / 3600:,.2f}", _counts(split["subsets"]),
        ]
        for name, split in description["splits"].items()
    ]  # fmt: skip
    declared = letters(description["modalities"])
    print_table(
        headings, rows, right=headings[1:-1], title=f"{description['folder']}: {description['dataset']}",
        footer=[f"declared: {declared}; clips that failed to pack: {description['failures']}"],
    )  # fmt: skip
    for head, names in description["classes"].items():
        counts = Counter(dict.fromkeys(names, 0))
        for split in description["splits"].values():
            for name, num in zip(names, split["label_counts"].get(head) or [], strict=False):
                counts[name] += num
        common = ", ".join(f"{name} {num:,}" for name, num in counts.most_common(_SHOWN))
        print_line(f"{head}: {len(names)} classes: {common}{', ...' if len(names) > _SHOWN else ''}")


def print_verification(result: Verification) -> None:
    """Print one line per problem, then tables of the splits and of the damaged files."""
    for finding in result.findings:
        print_line(finding)
    if result.splits:
        headings = ["split", "shards", "clips", "MB"]
        rows = [
            [split, f"{num_shards:,}", f"{num_clips:,}", f"{num_bytes / 1e6:,.1f}"]
            for split, (num_shards, num_clips, num_bytes) in result.splits.items()
        ]
        title = f"{result.folder}: {'whole' if result.whole else 'damaged'}"
        print_table(headings, rows, right=headings[1:], title=title)
    if result.findings:
        rows = [[name, _counts(kinds)] for name, kinds in damaged_files(result.findings).items()]
        print_table(["file", "kinds"], rows, title=f"{len(result.findings)} findings")
    for name in result.repaired:
        print_line(f"written again: {name}")
    for note in result.notes:
        print_line(f"note: {note}")
    checked = "every byte" if result.full else "sizes, indexes and headers (--full reads every byte)"
    print_line(f"checked: {checked}")


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {num:,}" for name, num in sorted(counts.items(), key=lambda item: -item[1]))
