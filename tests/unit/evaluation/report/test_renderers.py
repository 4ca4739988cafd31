"""A section has the same content as Markdown, as HTML and in a terminal, including metrics of other packages."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from matplotlib.figure import Figure
from rich.console import Console

from karmma_dist.evaluation.conditions import build_conditions
from karmma_dist.evaluation.evaluate import evaluate
from karmma_dist.evaluation.report import html, markdown, model, terminal
from karmma_dist.evaluation.report.content import ReportContent
from karmma_dist.evaluation.report.model import Cell, Picture, Section, Table, interval, p_equals, p_value, percent
from karmma_dist.evaluation.report.plots import MARKERS, Point, bar_figure, line_figure, panel_figure, svg
from karmma_dist.evaluation.report.rows import terminal_rows
from karmma_dist.evaluation.report.write import write_page, write_report, write_results
from karmma_dist.evaluation.statistics.bootstrap import add_intervals
from karmma_dist.evaluation.statistics.compare import compare
from kits.fusion import MODALITIES, Fusion, make_batches
from kits.metrics import ODD_RANKS, TOP3, installed
from kits.pages import Page

words = st.text(st.characters(exclude_categories=("C", "Z"), include_characters=" "), max_size=12).map(
    lambda text: " ".join(text.split())
)
names = words.filter(bool)
cells = st.builds(Cell, names, words, st.booleans())


@st.composite
def tables(draw: st.DrawFn) -> Table:
    num = draw(st.integers(1, 4))
    lines = st.lists(st.lists(cells | names, min_size=num, max_size=num), min_size=1, max_size=3)
    text_columns = frozenset({0}) | draw(st.frozensets(st.integers(0, num - 1)))
    headings = draw(st.lists(names, min_size=num, max_size=num))
    return Table(draw(names), headings, draw(lines), draw(lines | st.just([])), text_columns, draw(words))


sections = st.builds(
    Section, anchor=st.just("x"), heading=names, sentences=st.lists(names, max_size=3),
    tables=st.lists(tables(), max_size=2), is_folded=st.booleans(),
)  # fmt: skip


def values(table: Table) -> list[list[str]]:
    """Return the texts of a table, line by line."""
    lines = table.cells(table.body) + table.cells(table.foot)
    return [list(table.columns), *([f"{cell.text} {cell.aside}".strip() for cell in line] for line in lines)]


def squeezed(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    return [[" ".join(cell.split()) for cell in row] for row in rows]


def of_markdown(text: str) -> Page:
    """Render Markdown and parse the resulting page."""
    rendered = MarkdownIt("commonmark").enable("table").render(text)
    return Page(rendered.replace(' style="text-align:right"', ""))


def of_terminal(section: Section) -> str:
    console = Console(width=2000, record=True, file=io.StringIO())
    terminal.print_section(section, console)
    return " ".join(console.export_text().split())


@settings(max_examples=150)
@given(section=sections)
def test_a_section_has_equal_values_in_all_formats(section: Section) -> None:
    expected = [values(table) for table in section.tables]
    page, read, shown = Page(html.section(section)), of_markdown(markdown.section(section)), of_terminal(section)
    if len({table.title for table in section.tables}) == len(section.tables):
        assert [squeezed(rows) for rows in page.tables.values()] == expected
    assert [squeezed(rows) for rows in read.tables.values()] == expected
    captions = [table.caption for table in section.tables]
    all_cells = [value for rows in expected for row in rows for value in row]
    for text in (page.text, read.text, shown):
        flat = " ".join(text.split())
        assert [part for part in (section.heading, *section.sentences, *captions, *all_cells) if part not in flat] == []
    assert [" ".join(item.split()) for item in page.items] == list(section.sentences)
    assert [" ".join(item.split()) for item in read.items] == list(section.sentences)
    for rendered in (html.section(section), markdown.section(section)):
        assert ("<details>" in rendered) == (section.is_folded and bool(section.tables))


def test_the_best_is_bold_and_its_aside_is_not() -> None:
    section = Section("x", "h", tables=[Table("t", ["a", "b"], [["line", Cell("43.00", "[41.00, 45.00]", True)]])])
    assert Page(html.section(section)).bold == ["43.00"]
    assert "| line | **43.00** [41.00, 45.00] |" in markdown.section(section)
    console = Console(width=80, force_terminal=True, file=io.StringIO(), color_system="standard")
    terminal.print_section(section, console)
    assert re.search(r"\x1b\[1m43\.00\x1b\[0m\x1b\[2m \[41\.00, 45\.00\]", console.file.getvalue())


def test_pictures_have_alternative_text() -> None:
    picture = Picture("a.png", "Title", "From 1 % to 2 %.", lambda: line_figure({"a": {0: Point(1.0)}}, "x", "y"))
    section = Section("x", "h", pictures=[picture])
    assert Page(html.section(section)).pictures == [["Title", "From 1 % to 2 %."]]
    assert "![Title. From 1 % to 2 %.](a.png)" in markdown.section(section)
    assert "Title. From 1 % to 2 %. (a.png)" in of_terminal(section)


@given(st.floats(0, 1))
def test_a_p_value_is_never_shown_as_nothing(p: float) -> None:
    shown = p_value(p)
    assert p_equals(p).startswith("p < " if p < 0.001 else "p = ")
    if p < 0.001:
        assert shown == "< 0.001"
    else:
        assert float(shown) == pytest.approx(p, abs=5.1e-4)
        assert float(shown) > 0
    assert p_value(None) == "–"


@given(st.none() | st.floats(-100, 100), st.none() | st.tuples(st.floats(0, 100), st.floats(0, 100)))
def test_figures_have_two_digits_and_intervals_both_ends(value: float | None, ends: tuple[float, float] | None) -> None:
    assert percent(value) == ("–" if value is None else f"{value:.2f}")
    assert interval(ends) == ("" if ends is None else f"[{ends[0]:.2f}, {ends[1]:.2f}]")
    assert percent(float("nan")) == "–"


def test_a_registered_metric_is_in_every_file_and_the_terminal(tmp_path: Path) -> None:
    conditions = build_conditions(MODALITIES, subsets=True, sweep=True)
    with installed(tmp_path, top3=TOP3, odd=ODD_RANKS):
        models = {
            name: add_intervals(evaluate(Fusion(), make_batches(num=20), conditions, device="cpu"), num_draws=20)
            for name in ("first", "second")
        }
        comparison = compare(models, num_draws=20)
        results = models["first"]
        row = results.rows[0]
        stored = json.loads(write_results(results, tmp_path).read_text())["rows"][0]
        text = write_report(tmp_path / "report", ReportContent("t", models, comparison=comparison)).read_text()
        page = Page((tmp_path / "report" / "report.html").read_text())
        console = Console(width=200, record=True, file=io.StringIO())
        terminal.print_table(terminal_rows(results, "first"), console)
    low, high = row.intervals["verb_top3"]
    shown = f"{row.figures['verb_top3']:.2f} [{low:.2f}, {high:.2f}]"
    assert (stored["verb_top3"], stored["verb_top3_ci"]) == (row.figures["verb_top3"], [low, high])
    for written in (page.tables, of_markdown(text).tables):
        of_rows = [rows for rows in written.values() if rows[0][0] == "modalities"]
        assert len(of_rows) == len(models)
        for rows in of_rows:
            assert rows[1][rows[0].index("verb top-3")] == shown
            assert rows[1][rows[0].index("verb odd ranks")] == f"{row.figures['verb_odd']:.2f}"
    figures = {line[0]: line[1:] for line in page.tables["All figures with all modalities present (%): V+F+A"]}
    assert len(figures["action top-3"]) == len(models)
    printed = console.export_text()
    assert "action top-3" in printed
    assert f"{row.figures['action_top3']:.1f}" in printed


percentages = st.floats(0, 100)
points = st.builds(
    lambda value, below, above: Point(value, max(0.0, value - below), min(100.0, value + above)),
    percentages, st.floats(0, 10), st.floats(0, 10),
)  # fmt: skip
lines = st.dictionaries(st.integers(0, 100), points | st.just(Point(None)), max_size=12).map(
    lambda line: dict(sorted(line.items()))
)
series = st.dictionaries(st.text("ab<&$_ é", min_size=1), lines, min_size=1, max_size=10)


@settings(max_examples=15)
@given(series=series, kind=st.sampled_from(["lines", "bars", "panels"]))
def test_a_drawing_is_escaped_unstyled_and_inside_its_picture(
    series: dict[str, dict[int, Point]], kind: str
) -> None:
    groups = {name: {f"{x}": point for x, point in line.items()} for name, line in series.items()}
    draws = {
        "lines": lambda: line_figure(series, "x", "y", ("chance", 2.5)),
        "bars": lambda: bar_figure(groups, "g", "x"),
        "panels": lambda: panel_figure({"<a>": series, "b": series}, "x", "y", range(6)),
    }
    drawn = svg(Picture("a.png", "<t>", "&d", draws[kind]), "p")
    page = Page(drawn)
    assert page.pictures == [["<t>", "&d"]]
    assert page.loads == []
    assert len(page.anchors) == len(set(page.anchors))
    assert not re.search(r"style=|#[0-9a-f]{6}|nan|inf", drawn)
    width, height = map(float, re.search(r'viewBox="0 0 (\S+) (\S+)"', drawn).groups())
    for x, y in re.findall(r'<(?:use|text)[^>]* x="([-\d.]+)" y="([-\d.]+)"', drawn):
        assert -0.1 <= float(x) <= width + 0.1
        assert -0.1 <= float(y) <= height + 0.1


def test_a_drawing_is_deterministic_and_drawn_once(tmp_path: Path) -> None:
    drawings = []

    def draw() -> Figure:
        drawings.append(line_figure({"a": {0: Point(1.0), 1: Point(2.0, 1.5, 2.5)}, "b": {0: Point(0.5)}}, "x", "y"))
        return drawings[-1]

    for folder in (tmp_path / "first", tmp_path / "second"):
        picture = Picture("a.png", "t", "d", draw)
        write_page(folder, model.Page("t", Section("outcome", "", pictures=[picture]), []))
    assert len(drawings) == 2
    for name in ("report.html", "report.md", "a.png"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    assert (tmp_path / "first" / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_missing_value_interrupts_the_line_and_has_no_mark() -> None:
    heights = [1.0, 2.0, None, 4.0, 5.0]
    line = {float(x): Point(y) for x, y in enumerate(heights)}
    drawn = svg(Picture("a.png", "t", "d", lambda: line_figure({"a": line}, "x", "y")), "p")
    assert drawn.count("<use ") == 4
    (path,) = re.findall(r'class="s0"[^>]* d="([^"]*)"', drawn)
    assert path.count("M") == 2


@pytest.mark.parametrize("name", ["_private", "a$b$c", "x" * 150, " ", "later"])
def test_every_series_is_in_the_legend_whatever_its_name(name: str) -> None:
    bars = {"first": {"V": Point(1.0)}, name: {"F": Point(2.0)}}
    curves = {"first": {0: Point(1.0)}, name: {0: Point(2.0)}}
    for draw in (lambda: bar_figure(bars, "g", "x"), lambda: line_figure(curves, "x", "y")):
        picture = Picture("a.png", "t", "d", draw)
        assert len(picture.figure.legends[0].get_texts()) == 2
        shown = "".join(re.findall(r">([^<>]+)</text>", svg(picture, "p")))
        assert name.strip() in shown.replace("\u200b", "")


def test_a_ninth_series_differs_from_the_first() -> None:
    nine = {str(place): {0: Point(place), 1: Point(place + 1)} for place in range(len(MARKERS) + 1)}
    drawn = svg(Picture("a.png", "t", "d", lambda: line_figure(nine, "x", "y")), "p")
    first = re.findall(r'<path class="s0"[^>]*>', drawn)
    assert len(first) == 2
    assert sum("stroke-dasharray" in path for path in first) == 1
