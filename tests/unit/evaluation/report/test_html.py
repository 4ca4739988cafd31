"""report.html is one small file with every figure, runs only its own script, and is legible in light and dark mode."""

from __future__ import annotations

import base64
import colorsys
import hashlib
import re
from dataclasses import replace
from importlib.resources import files

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from karmma_dist.evaluation.metrics import find_figure
from karmma_dist.evaluation.report import html
from karmma_dist.evaluation.report.content import ReportContent
from karmma_dist.evaluation.report.plots import COLOURS
from karmma_dist.evaluation.report.sections import evaluation_page, shorter_pages
from karmma_dist.evaluation.report.write import PAGE_BYTES, write_report
from karmma_dist.evaluation.results import Results
from karmma_dist.modalities import letters
from kits.pages import Page
from kits.reports import EXTRA, random_results

TEMPLATE = files("karmma_dist.evaluation.report").joinpath(html.TEMPLATE).read_text(encoding="utf-8")
FAILURES = [f"{kind}:{level}" for kind in ("camera:black", "video:blur", "flow:noise", "audio:mute")
            for level in (1, 3, 5)]  # fmt: skip


def html_of(*content, **more) -> str:
    return html.page(evaluation_page(ReportContent(*content, **more)))


@pytest.fixture(scope="module")
def models() -> dict[str, Results]:
    return {name: random_results(seed, extras=True) for seed, name in enumerate(["baseline", "student"])}


@pytest.fixture(scope="module")
def text(models) -> str:
    return html_of("Sensors that fail", models, ["One hour."], {"evaluate": 12.34})


@pytest.fixture(scope="module")
def page(text) -> Page:
    return Page(text)


def test_the_page_contains_every_figure_of_every_row(models, page):
    for name, results in models.items():
        header, *lines = page.tables[name]
        assert header[:5] == ["modalities", "drop %", "seed", "clips", "without"]
        for row, line in zip(results.rows, lines, strict=True):
            broken = f" {row.corrupt}" if row.corrupt else ""
            assert line[:3] == [letters(row.modalities) + broken, f"{100 * row.drop_prob:g}", str(row.seed)]
            for figure in results.figures:
                value, ends = row.figures[figure.name], row.intervals.get(figure.name)
                interval = f" [{ends[0]:.2f}, {ends[1]:.2f}]" if ends else ""
                assert line[header.index(figure.heading)] == f"{value:.2f}{interval}"


def test_figures_that_the_rows_lack_have_no_column(page):
    plain = Page(html_of("t", {"run": random_results(0)}))
    headings = {find_figure(name).heading for name in EXTRA}
    assert not headings & set(plain.tables["run"][0])
    assert headings < set(page.tables["student"][0])
    assert "Action top-1 per corrupted sensor" not in plain.tables
    assert "95 % intervals" not in plain.text


def test_dropped_modalities_are_distinguished_from_absent_ones(models, page):
    header, *lines = page.tables["Counts"]
    audio = header.index("audio used")
    assert header[audio : audio + 3] == ["audio used", "audio dropped", "audio lacking"]
    swept = next(row for row in models["student"].rows if row.drop_prob == 0.5 and row.seed == 2)
    line = next(line for line in lines if line[:3] == ["V+F+A", "50", "2"])
    used, dropped, lacking = map(int, line[audio : audio + 3])
    assert (used, lacking) == (swept.num_kept["audio"], 40)
    assert used + dropped + lacking == 400
    assert dropped > 0
    assert line[-1] == "all models"  # the masks do not depend on the model
    assert next(line for line in lines if line[:2] == ["V", "0"])[audio : audio + 3] == ["–", "–", "–"]


def test_broken_sensors_are_in_no_subset_and_no_curve(models, page):
    clean = {name: random_results(seed) for seed, name in enumerate(models)}
    others = Page(html_of("t", clean)).tables
    for label in ("Action top-1 per subset", "Action top-1 per drop probability"):
        without = [[cell.split(" [")[0] for cell in line] for line in page.tables[label]]
        assert without == [[cell.split(" [")[0] for cell in line] for line in others[label]]
    broken = page.tables["Action top-1 per corrupted sensor"]
    assert [line[0] for line in broken[1:3]] == ["none", "video:blur:1"]


def test_a_missing_share_has_its_own_table_and_picture():
    shares = [f"audio:{share}" for share in (0.2, 0.5, 1)]
    choices = {"subsets": True, "sweep": True, "num_seeds": 3}
    models = {name: random_results(seed, missing=shares, **choices) for seed, name in enumerate(["weak", "strong"])}
    page = Page(html_of("t", models))
    table = page.tables["Action top-1 when a share of the clips lacks one modality"]
    whole = [line for line in table[1:] if line[0] == "V+F+A"]
    assert [line[1:3] for line in whole] == [["–", "0"], ["audio", "20"], ["audio", "50"], ["audio", "100"]]
    for column, results in enumerate(models.values()):
        rows = [row for row in results.rows if row.missing == "audio:0.5" and len(row.modalities) == 3]
        mean = sum(row.figures["action_top1"] for row in rows) / len(rows)
        assert len(rows) == 3
        assert whole[2][3 + column].startswith(f"{mean:.2f} (")
    assert sum("over the share of the clips" in title for title, _ in page.pictures) == 1
    without = Page(html_of("t", {name: random_results(seed, **choices) for seed, name in enumerate(models)}))
    for label in ("Action top-1 per subset", "Action top-1 per drop probability"):
        assert [line[0] for line in page.tables[label]] == [line[0] for line in without.tables[label]]


def test_the_best_is_bold_unless_the_model_is_alone(models, page):
    best = max(results.summary.subsets.average["action_top1"] for results in models.values())
    assert f"{best:.2f}" in page.bold
    assert Page(html_of("t", {"run": models["student"]})).bold == []


def test_sections_without_rows_are_left_out():
    page = Page(html_of("t", {"run": random_results(0, modalities=["video"], drop_prob=0.0)}))
    assert page.pictures == []
    sections = {"glance", "measured", "figures", "rows", "counts"}
    assert set(page.anchors) == {"outcome", "save"} | sections
    assert {link.removeprefix("#") for link in page.links} == sections


def test_models_with_different_modalities_share_tables():
    mixed = {"both": random_results(0), "one": random_results(1, modalities=["video"], drop_prob=0.0)}
    tables = Page(html_of("t", mixed)).tables
    assert tables["Clips per model"][2][-2:] == ["not used", "not used"]
    line = next(line for line in tables["Action top-1 per subset"] if line[0] == "F")
    assert line[-1] == "–"
    assert tables["Action top-1 per drop probability"][0][1:] == ["both (V+F+A)"]


def test_pictures_describe_their_content_in_words(models, page):
    (curve_title, curve), (bars_title, bars), (broken_title, broken) = page.pictures
    assert "missing" in curve_title
    assert "subset" in bars_title
    assert "severity" in broken_title
    for name, results in models.items():
        mean = results.summary.drop_curve.mean["action_top1"]
        assert f"{name}: from {max(mean):.1f} %" in curve
        assert f"down to {min(mean):.1f} %" in curve
        full = results.rows[6].figures["action_top1"]
        assert f"{name}: from {full:.1f} % (V+F+A)" in bars
        assert f"{name}: from {full:.1f} % (intact sensors)" in broken


@settings(max_examples=15)
@given(name=st.text(min_size=1), title=st.text(), note=st.text())
def test_names_are_text_whatever_they_hold(name, title, note):
    hostile = name + "</script><script>alert(1)</script><img src=x onerror=alert(1)>\"'&amp;{{ 7 * 7 }}$\\frac"
    results = random_results(0, modalities=["video", "audio"], num_clips=20, subsets=True)
    results = replace(results, summary=replace(results.summary, damage=[hostile]))
    page = Page(html_of(title + hostile, {hostile: results}, [note + hostile], {hostile: 1.0}))
    assert len(page.scripts) == 1
    assert page.loads == []
    assert "{{ 7 * 7 }}" in page.text
    assert list(page.tables)[-3:] == [hostile, "Counts", "Seconds per step"]


def test_the_page_allows_only_its_own_style_and_script(page, text):
    assert page.loads == []
    assert page.links
    assert all(link.startswith("#") and link[1:] in page.anchors for link in page.links)
    assert len(page.anchors) == len(set(page.anchors))
    assert not re.search(r"https?:|url\(|@import|\bfetch\b|XMLHttpRequest|\ssrc=", text)
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)[1]
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1]
    for kind, content in (("style", style), ("script", page.scripts[0])):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'")


def test_intervals_belong_to_their_figures_and_none_is_invented(models, page):
    summary = models["student"].summary
    average, area = summary.subsets.average["action_top1"], summary.drop_curve.area["action_top1"]
    foot = {line[0]: line[-1] for line in page.tables["Action top-1 per subset"]}
    assert foot["average over subsets"] == f"{average:.2f} [{0.9 * average:.2f}, {1.1 * average:.2f}]"
    curve = {line[0]: line[2] for line in page.tables["Action top-1 per drop probability"]}
    assert curve["mean height (area)"] == f"{area:.2f} [{0.9 * area:.2f}, {1.1 * area:.2f}]"
    half = summary.drop_curve.mean["action_top1"][5]
    assert curve["50"].startswith(f"{half:.2f} ± ")
    assert curve["50"].endswith(f" [{0.9 * half:.2f}, {1.1 * half:.2f}]")
    # The rows alone do not contain the interval of a mean over several seeds.
    rest = replace(models["student"], summary=replace(summary, drop_curve=replace(summary.drop_curve, mean_ci=None)))
    lines = {line[0]: line[1] for line in Page(html_of("t", {"x": rest})).tables["Action top-1 per drop probability"]}
    assert "[" in lines["0"]
    assert "[" not in lines["50"]


def test_the_lowest_loss_and_calibration_error_are_the_best(models, page):
    rows = [results.rows[6] for results in models.values()]
    for name in ("noun_ece", "noun_loss", "noun_top1"):
        best = (min if find_figure(name).metric.lower_is_better else max)(row.figures[name] for row in rows)
        assert f"{best:.2f}" in page.bold


def test_a_large_report_of_six_models_stays_below_100_kb(tmp_path):
    names = [f"runs/epic_kitchens/model_{seed}" for seed in range(6)]
    six = {name: random_results(seed, num_clips=9644, extras=True, corrupt=FAILURES) for seed, name in enumerate(names)}
    write_report(tmp_path, ReportContent("Six", six, ["One hour."], {"evaluate": 1.0}))
    assert (tmp_path / "report.html").stat().st_size <= PAGE_BYTES == 100_000
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert len(page.pictures) == 3
    for name, results in six.items():
        header, *lines = page.tables[name]
        assert len(lines) == len(results.rows) == 34 + 12
        for row, line in zip(results.rows, lines, strict=True):
            assert line[header.index("action top-1")].startswith(f"{row.figures['action_top1']:.2f} [")
            assert f"| {row.figures['noun_top5']:.2f} |" in markdown  # report.md has the figures that the page omits
    assert any("report.md" in item for item in page.items)


def test_a_shorter_page_leaves_out_tables_that_are_folded_only(models):
    content = ReportContent("t", models)
    full = evaluation_page(content)
    unfolded = [part for part in full.parts if not part.is_folded]
    before = full
    for page in shorter_pages(full, content):
        assert len(html.page(page)) < len(html.page(before))
        assert [part for part in page.parts if not part.is_folded] == unfolded
        assert [part.anchor for part in page.parts] == [part.anchor for part in full.parts]
        before = page


def test_the_page_is_written_whole_or_not_at_all(tmp_path, models):
    write_report(tmp_path, ReportContent("First", models))
    first = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<h1>First</h1>" in first
    broken = replace(models["student"], rows=[replace(models["student"].rows[0], figures={})])
    with pytest.raises(KeyError):
        write_report(tmp_path, ReportContent("Second", {"run": broken}))
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == first
    assert not list(tmp_path.glob(".*"))


def palette(dark: bool) -> dict[str, str]:
    block = re.findall(r":root \{(.*?)\}", TEMPLATE, re.DOTALL)[1 if dark else 0]
    return dict(re.findall(r"--(\w+): (#[0-9a-f]{6});", block))


def luminance(colour: str) -> float:
    """Return the relative luminance (WCAG 2.2)."""
    channels = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first: str, second: str) -> float:
    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("dark", [False, True])
def test_text_and_lines_have_the_contrast_that_wcag_asks_for(dark):
    colours = palette(dark)
    for ground in ("page", "panel"):
        for ink in ("ink", "faint", "link"):
            assert contrast(colours[ink], colours[ground]) >= 4.5
    for place in range(len(COLOURS)):
        assert contrast(colours[f"c{place}"], colours["page"]) >= 3.0


@pytest.mark.parametrize("dark", [False, True])
def test_series_have_the_hues_of_the_png_plots(dark):
    for place, colour in enumerate(COLOURS):
        png, page = (
            colorsys.rgb_to_hsv(*(int(c[k : k + 2], 16) / 255 for k in (1, 3, 5)))
            for c in (colour, palette(dark)[f"c{place}"])
        )
        apart = abs(png[0] - page[0])
        assert min(apart, 1 - apart) < 0.05 or png[1] == page[1] == 0  # grey has no hue
