"""Write results.json and reports: report.md with PNGs in the same folder, and the self-contained report.html."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path

from karmma_dist.evaluation.report import html, markdown
from karmma_dist.evaluation.report.content import ReportContent, condense
from karmma_dist.evaluation.report.model import Page
from karmma_dist.evaluation.report.plots import save_figure
from karmma_dist.evaluation.report.sections import evaluation_page, shorter_pages
from karmma_dist.evaluation.results import Results
from karmma_dist.io.disk_errors import make_folder
from karmma_dist.io.files import write_json, write_whole

RESULTS = "results.json"
REPORT, HTML_REPORT = "report.md", "report.html"

PAGE_BYTES = 100_000
"""Target size of report.html, small enough to send and open quickly."""


def write_results(results: Results, folder: Path) -> Path:
    """Write `folder`/results.json, whole or not at all, and return its path. A missing folder is created."""
    make_folder(folder)
    write_json(folder / RESULTS, results.to_dict())
    return folder / RESULTS


def write_report(folder: Path, content: ReportContent) -> Path:
    """Write the report of an evaluation into `folder`, which is created if missing, and return the path of report.md.

    If report.html would be larger than `PAGE_BYTES`, some folded tables are only in report.md.
    """
    content = condense(content)
    page = evaluation_page(content)
    return write_page(folder, page, shorter_pages(page, content))


def write_page(folder: Path, page: Page, shorter: Iterable[Page] = ()) -> Path:
    """Write any report into `folder`, which is created if missing, each file whole or not at all.

    Args:
        folder: Folder for report.md, its PNGs and report.html.
        page: The report.
        shorter: Shorter and shorter versions of the report. report.html shows the first version, including `page`, of
            at most `PAGE_BYTES`, or else the last version.

    Returns:
        The path of report.md.
    """
    text = markdown.page(page)
    for candidate in itertools.chain([page], shorter):
        document = html.page(candidate).encode()
        if len(document) <= PAGE_BYTES:
            break
    make_folder(folder)
    for picture in page.pictures:
        save_figure(picture.figure, folder / picture.file)
    write_whole(folder / REPORT, text.encode())
    write_whole(folder / HTML_REPORT, document)
    return folder / REPORT
