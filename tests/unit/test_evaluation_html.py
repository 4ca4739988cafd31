"""report.html is one file that holds every figure, runs nothing it did not bring, and can be read in light and dark."""

from __future__ import annotations

import base64
import colorsys
import hashlib
import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from importlib.resources import files

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report_kit import EXTRA, random_results

from karmma_dist.errors import UserError
from karmma_dist.evaluation.report.content import ReportContent
from karmma_dist.evaluation.report.html.page import embeddable_json, html_report, write_html_report
from karmma_dist.evaluation.report.html.svg import Point, _ticks, bar_plot, line_plot
from karmma_dist.evaluation.report.plots import COLOURS
from karmma_dist.evaluation.report.write import write_report
from karmma_dist.modalities import letters

VOID = {"meta", "br", "img", "link", "input", "hr", "wbr"}
CSS = files("karmma_dist.evaluation.report").joinpath("report.css").read_text(encoding="utf-8")


class Page(HTMLParser):
    """Tables, scripts and links of a page; an element that is not closed in order fails the test."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tables: dict[str, list[list[str]]] = {}
        self.scripts: list[str] = []
        self.loads: list[str] = []
        self.links: list[str] = []
        self.anchors: list[str] = []
        self.titles: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self._rows: list[list[str]] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attrs):
        of = dict(attrs)
        if tag not in VOID:
            self._open.append(tag)
        if "id" in of:
            self.anchors.append(of["id"])
        self.loads += [of[name] for name in ("src", "data", "srcset", "action") if name in of]
        (self.links if tag == "a" else self.loads).extend([of["href"]] if "href" in of else [])
        assert not [name for name in of if name.startswith("on") or name == "style"]
        if tag == "table":
            self._rows = self.tables[of["aria-label"]] = []
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("th", "td"):
            self._rows[-1].append("")
        elif tag == "script":
            self.scripts.append("")

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if "script" in self._open:
            self.scripts[-1] += data
        elif {"th", "td"} & set(self._open):
            self._rows[-1][-1] += data
        elif self._open[-1:] == ["title"] and "svg" in self._open:
            self.titles.append(data)
        self.text += data


def html_of(*content, **more) -> str:
    return html_report(ReportContent(*content, **more))


@pytest.fixture(scope="module")
def models():
    return {name: random_results(seed, extras=True) for seed, name in enumerate(["baseline", "student"])}


@pytest.fixture(scope="module")
def page(models):
    return Page(html_of("Sensors that fail", models, ["One hour."], {"evaluate": 12.34}))


def test_every_figure_of_every_row_stands_in_the_page(models, page):
    header, *lines = page.tables["All rows"]
    assert header[:5] == ["model", "modalities", "drop %", "seed", "corrupted"]
    rows = [(name, row) for name, results in models.items() for row in results["rows"]]
    assert len(rows) == len(lines)
    for (name, row), line in zip(rows, lines, strict=True):
        shown = [name, letters(row["modalities"]), f"{100 * row['drop_prob']:g}", str(row["seed"])]
        assert line[:5] == [*shown, row.get("corrupt") or "–"]
        assert line[header.index("action top-5")] == f"{row['action_top5']:.2f}"
        low, high = row["action_top1_ci"]
        assert line[header.index("action top-1")] == f"{row['action_top1']:.2f} [{low:.1f}, {high:.1f}]"
        assert line[header.index("noun calibration error")] == f"{row['noun_ece']:.2f}"
        assert line[header.index("action top-1, unseen participants")] == f"{row['action_top1_unseen']:.2f}"


def test_figures_that_the_rows_lack_have_no_column():
    plain = Page(html_of("t", {"run": random_results(0)}))
    assert [name for name in plain.tables["All rows"][0] if "tail" in name or "unseen" in name] == []
    assert "Action top-1 per corrupted sensor" not in plain.tables
    assert "95 % intervals" not in plain.text
    assert len(EXTRA) == sum("tail" in name or "unseen" in name for name in _columns_with_extras())


def _columns_with_extras():
    return Page(html_of("t", {"run": random_results(0, extras=True)})).tables["All rows"][0]


def test_clips_dropped_on_purpose_are_told_from_those_the_data_lacks(models, page):
    header, *lines = page.tables["Counts"]
    audio = header.index("audio used")
    assert header[audio : audio + 3] == ["audio used", "audio dropped", "audio lacking"]
    rows = models["student"]["rows"]
    swept = next(row for row in rows if row["drop_prob"] == 0.5 and row["seed"] == 2)
    line = next(line for line in lines if line[1:4] == ["V+F+A", "50", "2"])
    used, dropped, lacking = map(int, line[audio : audio + 3])
    assert (used, lacking) == (swept["num_kept"]["audio"], 40)
    assert used + dropped + lacking == 400
    assert dropped > 0
    assert line[0] == "all models"  # the masks do not depend on the model
    assert next(line for line in lines if line[1:3] == ["V", "0"])[audio : audio + 3] == ["–", "–", "–"]


def test_a_corrupted_row_is_no_subset_and_no_point_of_the_curve(models, page):
    clean = {name: random_results(seed) for seed, name in enumerate(models)}
    others = Page(html_of("t", clean)).tables
    for label in ("Action top-1 per subset", "Action top-1 per drop probability"):
        without = [[cell.split(" [")[0] for cell in line] for line in page.tables[label]]
        assert without == [[cell.split(" [")[0] for cell in line] for line in others[label]]
    corrupted = page.tables["Action top-1 per corrupted sensor"]
    assert [line[0] for line in corrupted[1:3]] == ["nothing corrupted", "video:blur:1"]


def test_the_best_of_each_line_is_bold_and_a_single_model_has_no_best(models):
    assert "<b>" in html_of("t", models)
    assert "<b>" not in html_of("t", {"run": models["student"]})


def test_sections_that_the_rows_do_not_allow_are_left_out():
    page = Page(html_of("t", {"run": random_results(0, modalities=["video"], drop_prob=0.0)}))
    assert page.titles == []  # nothing is plotted
    assert set(page.anchors) == {"glance", "measured", "figures", "rows", "counts", "save", "results"}
    assert page.links == [f"#{name}" for name in page.anchors if name not in ("save", "results")]


def test_models_with_other_modalities_stand_side_by_side():
    mixed = {"both": random_results(0), "one": random_results(1, modalities=["video"], drop_prob=0.0)}
    page = Page(html_of("t", mixed))
    assert page.tables["Clips per model"][2][-2:] == ["not used", "not used"]
    line = next(line for line in page.tables["Action top-1 per subset"] if line[0] == "F")
    assert line[2] == "–"
    assert {line[2] for line in page.tables["Action top-1 per drop probability"][1:]} == {"–", line[2]}


def test_every_plotted_value_says_what_it_is(models, page):
    for name, results in models.items():
        whole = results["rows"][6]
        low, high = whole["action_top1_ci"]
        title = f"{name}, V+F+A: {whole['action_top1']:.2f} % (95 % interval {low:.2f} to {high:.2f})"
        assert page.titles.count(title) == 2  # one drawing for a desk, one for a phone
        assert any(one.startswith(f"{name} at drop probability 90 %: ") for one in page.titles)


@settings(max_examples=30)
@given(name=st.text(min_size=1), title=st.text(), note=st.text())
def test_names_are_text_whatever_they_hold(name, title, note):
    hostile = name + "</script><script>alert(1)</script><img src=x onerror=alert(1)>\"'&amp;"
    results = random_results(0, modalities=["video", "audio"], num_clips=20, subsets=True)
    results["summary"]["damage"] = [hostile]
    page = Page(html_of(title + hostile, {hostile: results}, [note + hostile], {hostile: 1.0}))
    assert len(page.scripts) == 2
    assert json.loads(page.scripts[0])["title"] == title + hostile
    assert list(json.loads(page.scripts[0])["models"]) == [hostile]
    assert page.loads == []


def test_the_page_loads_nothing_and_allows_its_own_script_only(page, models):
    text = html_of("t", models)
    assert page.loads == []
    assert all(link.startswith("#") and link[1:] in page.anchors for link in page.links)
    assert "http://" not in text
    assert "https://" not in text
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)[1]
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1]
    for kind, of in (("style", style), ("script", page.scripts[1])):
        digest = base64.b64encode(hashlib.sha256(of.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'")


def test_the_embedded_figures_are_those_of_the_results(models, page):
    embedded = json.loads(page.scripts[0])
    assert embedded["timings"] == {"evaluate": 12.34}
    for name, results in models.items():
        assert embedded["models"][name]["summary"]["num_present"] == results["summary"]["num_present"]
        for row, given_row in zip(embedded["models"][name]["rows"], results["rows"], strict=True):
            assert list(row) == list(given_row)
            for key, value in given_row.items():
                rounded = isinstance(value, float) or key.endswith("_ci")
                assert row[key] == (pytest.approx(value, abs=5.1e-5) if rounded else value)


def test_intervals_are_those_of_the_figure_and_none_is_made_up(models, page):
    summary = models["student"]["summary"]
    average, area = (
        summary[part][key]["action_top1"] for part, key in (("subsets", "average"), ("drop_curve", "area"))
    )
    foot = {line[0]: line[2] for line in page.tables["Action top-1 per subset"]}
    assert foot["average over subsets"] == f"{average:.2f} [{0.9 * average:.1f}, {1.1 * average:.1f}]"
    curve = {line[0]: line[2] for line in page.tables["Action top-1 per drop probability"]}
    assert curve["mean height (area)"] == f"{area:.2f} [{0.9 * area:.1f}, {1.1 * area:.1f}]"
    half = summary["drop_curve"]["mean"]["action_top1"][5]
    assert curve["50"].startswith(f"{half:.2f} ± ")
    assert curve["50"].endswith(f" [{0.9 * half:.1f}, {1.1 * half:.1f}]")
    # Of several seeds' mean the rows alone do not know the interval.
    without = {key: value for key, value in summary["drop_curve"].items() if key != "mean_ci"}
    rest = {"student": models["student"] | {"summary": summary | {"drop_curve": without}}}
    lines = {line[0]: line[1] for line in Page(html_of("t", rest)).tables["Action top-1 per drop probability"]}
    assert "[" in lines["0"]
    assert "[" not in lines["50"]


def test_the_lowest_loss_and_calibration_error_are_the_best(models):
    text = html_of("t", models)
    rows = [results["rows"][6] for results in models.values()]
    for key in ("noun_ece", "noun_loss", "noun_top1"):
        best = (max if key == "noun_top1" else min)(row[key] for row in rows)
        assert f"<b>{best:.2f}</b>" in text


def test_what_is_not_a_number_is_embedded_as_null():
    assert embeddable_json({"a": float("nan"), "b": [1.23456789, float("inf")]}) == '{"a":null,"b":[1.2346,null]}'


def test_four_models_with_34_conditions_stay_below_300_kb():
    four = {f"runs/epic_kitchens/model_{seed}": random_results(seed, num_clips=9644, extras=True) for seed in range(4)}
    for results in four.values():
        results["rows"] = [row for row in results["rows"] if row["corrupt"] is None]
        assert len(results["rows"]) == 34
    assert len(html_of("t", four).encode()) < 300_000


def test_the_page_is_written_beside_report_md_whole_or_not_at_all(tmp_path, models):
    write_report(tmp_path, ReportContent("First", models))
    first = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<h1>First</h1>" in first
    broken = {"run": models["student"] | {"rows": [{"modalities": ["video"]}]}}
    with pytest.raises(KeyError):
        write_html_report(tmp_path, ReportContent("Second", broken))
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == first
    assert not list(tmp_path.glob(".*"))
    with pytest.raises(UserError, match="no results"):
        write_html_report(tmp_path, ReportContent("t", {}))


def palette(dark: bool) -> dict[str, str]:
    block = re.findall(r":root \{(.*?)\}", CSS, re.DOTALL)[1 if dark else 0]
    return dict(re.findall(r"--(\w+): (#[0-9a-f]{6});", block))


def luminance(colour: str) -> float:
    """Relative luminance (WCAG 2.2)."""
    channels = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("dark", [False, True])
def test_text_and_lines_have_the_contrast_that_wcag_asks_for(dark):
    colours = palette(dark)
    for ground in ("page", "panel"):
        for text in ("ink", "faint", "link"):
            assert contrast(colours[text], colours[ground]) >= 4.5
    for place in range(len(COLOURS)):
        assert contrast(colours[f"c{place}"], colours["page"]) >= 3.0


@pytest.mark.parametrize("dark", [False, True])
def test_series_have_the_hues_of_the_png_plots(dark):
    for place, colour in enumerate(COLOURS):
        png, page = (
            colorsys.rgb_to_hls(*(int(c[k : k + 2], 16) / 255 for k in (1, 3, 5)))
            for c in (colour, palette(dark)[f"c{place}"])
        )
        apart = abs(png[0] - page[0])
        assert min(apart, 1 - apart) < 0.05 or png[2] == 0


percent = st.floats(0, 100)
point = st.builds(
    lambda value, below, above: Point(value, max(0.0, value - below), min(100.0, value + above), "t"),
    percent,
    st.floats(0, 10),
    st.floats(0, 10),
)
line = st.dictionaries(percent, st.one_of(st.just(Point(None)), point), max_size=12)


@settings(max_examples=60)
@given(
    lines=st.dictionaries(st.text("ab<&", min_size=1), line, min_size=1, max_size=10), width=st.sampled_from([326, 720])
)
def test_lines_and_bars_stay_inside_their_picture(lines, width):
    plot = line_plot(lines, x_label="x", y_label="y", width=width, reference=("chance", 2.5))
    svg = ElementTree.fromstring(plot)
    height = float(svg.get("height"))
    for group in svg.iter("g"):
        if group.get("transform"):
            x, y = map(float, re.findall(r"[\d.]+", group.get("transform")))
            assert 0 <= x <= width
            assert 0 <= y <= height
    for path in svg.iter("path"):
        if path.get("class") in ("line", "band"):
            numbers = [float(one) for one in re.findall(r"-?[\d.]+", path.get("d"))]
            assert all(0 <= x <= width for x in numbers[::2])
            assert all(0 <= y <= height for y in numbers[1::2])
    values = [p for of in lines.values() for p in of.values() if p.value is not None]
    assert len(list(svg.iter("title"))) == len(values)
    groups = {name: {f"{x:.3f}": p for x, p in of.items()} for name, of in lines.items()}
    bars = ElementTree.fromstring(bar_plot(groups, groups_label="g", x_label="x", width=width))
    for bar in bars.iter("rect"):
        assert 0 <= float(bar.get("x")) <= float(bar.get("x")) + float(bar.get("width")) <= width


def test_a_missing_value_interrupts_the_line():
    values = [1.0, 2.0, None, 4.0, 5.0]
    line_points = {float(x): Point(y) for x, y in enumerate(values)}
    plot = line_plot({"a": line_points}, x_label="x", y_label="y", width=326)
    assert plot.count('class="line"') == 2
    assert plot.count('class="mark"') == 4


@given(low=st.floats(0, 50), span=st.floats(1e-3, 1e4), wanted=st.floats(1, 20))
def test_ticks_are_round_and_cover_the_axis(low, span, wanted):
    ticks = _ticks(low, low + span, wanted)
    assert ticks[0] <= low + 1e-6 * span
    assert ticks[-1] >= (low + span) * (1 - 1e-6)
    assert len(ticks) <= wanted + 3
    assert ticks == sorted(set(ticks))
