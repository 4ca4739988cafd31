"""report.html in a browser: no error, no sideways scrolling, sorting, dark mode, print, and no foreign script."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path

import pytest

from browser import Browser
from karmma_dist.evaluation.report.content import ReportContent
from karmma_dist.evaluation.report.write import HTML_REPORT, write_report
from kits.reports import random_results

HOSTILE = "</script><script>window.smuggled = 1</script><img src=x onerror='window.smuggled = 1'>"
LONG = "runs/epic_kitchens/a_name_without_any_place_to_break_it_in_two"

ALL_ROWS = "document.querySelector('#rows table')"
SUBSETS = "document.querySelector('#subsets table')"
PICTURES = "[...document.querySelectorAll('svg.plot')]"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    names = ["Baseline", "KARMMA student", LONG, HOSTILE]
    models = {
        name: random_results(seed, num_clips=1200, skill=0.3 + 0.1 * seed, extras=True)
        for seed, name in enumerate(names)
    }
    folder = tmp_path_factory.mktemp("report")
    write_report(folder, ReportContent("Sensors that fail", models, [HOSTILE], {"evaluate": 12.3}))
    return folder / HTML_REPORT


@pytest.mark.parametrize("width", [360, 768, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_fits_its_window_without_errors(browser, report, width, dark, tmp_path):
    browser.open(report, width, dark=dark)
    browser.run("document.querySelectorAll('details').forEach(part => { part.open = true; })")
    assert browser.run("document.documentElement.scrollWidth") == browser.run("window.innerWidth") == width
    assert browser.complaints == []
    widths = browser.run(f"{PICTURES}.map(e => e.getBoundingClientRect().width)")
    assert len(widths) == 3
    assert all(300 <= width <= 620 for width in widths)
    lead = browser.run("document.querySelector('p.lead').getBoundingClientRect().top")
    assert lead < browser.run(f"{PICTURES}[0].getBoundingClientRect().top") < 800
    assert browser.run("document.body.innerText").count("action top-1 (%)") >= 3
    browser.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("width", [360, 1280])
def test_no_text_of_a_plot_is_cut_or_tiny(browser, report, width):
    browser.open(report, width)
    texts = browser.run(
        f"{PICTURES}.flatMap(svg => {{"
        " const b = svg.getBoundingClientRect();"
        " return [...svg.querySelectorAll('text')].map(t => { const c = t.getBoundingClientRect();"
        " return [t.textContent, c.left - b.left, b.right - c.right, c.top - b.top, b.bottom - c.bottom, c.height];"
        " }); })"
    )
    assert len(texts) > 50
    assert [text for text in texts if min(text[1:5]) < -0.5 or text[5] < 9] == []


@pytest.mark.parametrize("width", [360, 1280])
def test_no_name_in_a_table_runs_into_the_next(browser, report, width):
    browser.open(report, width)
    browser.run("document.querySelectorAll('details').forEach(part => { part.open = true; })")
    names = browser.run(
        "[...document.querySelectorAll('th')].map(th => { const r = document.createRange(); r.selectNodeContents(th);"
        " const c = r.getBoundingClientRect(), b = th.getBoundingClientRect();"
        " return [th.textContent, c.left - b.left, b.right - c.right]; })"
    )
    assert sum(LONG in name for name, *_ in names) > 3
    assert [name for name in names if min(name[1:]) < -0.5] == []


def test_a_name_that_holds_markup_is_shown_and_never_run(browser, report):
    browser.open(report, 1280)
    assert HOSTILE in browser.run("document.body.innerText")
    assert browser.run("typeof window.smuggled") == "undefined"
    assert browser.run("document.images.length") == 0
    # Where escaping fails, the page's policy still holds.
    browser.run("document.body.append(Object.assign(document.createElement('script'), {text: 'window.smuggled = 2'}))")
    assert browser.run("typeof window.smuggled") == "undefined"
    assert "Content Security Policy" in browser.complaints.pop()
    assert browser.complaints == []


def cells_of(browser: Browser, table: str, column: int) -> list[str]:
    """Return the texts of a column of a table."""
    return browser.run(f"[...{table}.tBodies[0].rows].map(row => row.cells[{column}].textContent)")


def test_clicks_sort_by_number_reverse_and_restore(browser, report):
    browser.open(report, 1280)
    column = browser.run(f"[...{SUBSETS}.tHead.rows[0].cells].findIndex(c => c.textContent === 'KARMMA student')")
    button = f"{SUBSETS}.tHead.rows[0].cells[{column}].querySelector('button')"
    state = f"{SUBSETS}.tHead.rows[0].cells[{column}].getAttribute('aria-sort')"
    original = cells_of(browser, SUBSETS, 0)
    foot = browser.run(f"{SUBSETS}.tFoot.textContent")
    expected = sorted(cells_of(browser, SUBSETS, column), key=lambda text: -float(text.split()[0]))
    browser.click(button)
    assert browser.run(state) == "descending"
    assert cells_of(browser, SUBSETS, column) == expected
    assert cells_of(browser, SUBSETS, 0) != original
    browser.click(button)
    assert browser.run(state) == "ascending"
    assert cells_of(browser, SUBSETS, column) == expected[::-1]
    browser.click(button)
    assert browser.run(state) is None
    assert cells_of(browser, SUBSETS, 0) == original
    assert browser.run(f"{SUBSETS}.tFoot.textContent") == foot


def test_numbers_with_separators_sort_by_value_and_dashes_come_last(browser, report):
    browser.open(report, 1280)
    for part in ("rows", "counts"):
        browser.run(f"document.querySelector('#{part} details').open = true")
    counts = "document.querySelector('#counts table')"
    column = browser.run(f"[...{counts}.tHead.rows[0].cells].findIndex(c => c.textContent === 'audio used')")
    for turn in (-1, 1):
        browser.click(f"{counts}.tHead.rows[0].cells[{column}].querySelector('button')")
        shown = cells_of(browser, counts, column)
        known = [int(text.replace(",", "")) for text in shown if text != "–"]
        assert known == sorted(known, key=lambda value: turn * value)
        assert min(known) < 1000 < max(known)
        assert shown[len(known) :] == ["–"] * (len(shown) - len(known)) != []
    browser.click(f"{ALL_ROWS}.tHead.rows[0].cells[0].querySelector('button')")
    assert cells_of(browser, ALL_ROWS, 0)[0] == "A"


def test_without_scripts_the_page_shows_the_same(browser, report):
    browser.open(report, 360, script=False)
    assert browser.run("document.querySelectorAll('th button').length") == 0
    assert browser.run("document.getElementById('save').hidden") is True
    assert browser.run("document.querySelectorAll('tbody tr').length") > 100
    assert browser.run("document.documentElement.scrollWidth") == 360
    assert browser.complaints == []


def test_dark_and_light_differ_and_paper_is_light_and_unfolded(browser, report):
    ground = "getComputedStyle(document.body).backgroundColor"
    line = "getComputedStyle(document.querySelector('svg.plot .s0')).stroke"
    text = "getComputedStyle(document.querySelector('svg.plot text')).fill"
    browser.open(report, 1280)
    light, light_line = browser.run(ground), browser.run(line)
    browser.open(report, 1280, dark=True)
    assert browser.run(ground) != light
    assert browser.run(line) != light_line
    assert browser.run(text) == browser.run("getComputedStyle(document.body).color")
    assert not browser.run(f"{ALL_ROWS}.checkVisibility()")
    browser.emulate("print", dark=True)
    assert browser.run(ground) == light
    assert browser.run("getComputedStyle(document.querySelector('nav')).display") == "none"
    assert browser.run(f"{ALL_ROWS}.checkVisibility()")
    assert len(browser.call("Page.printToPDF")["data"]) > 10_000


def test_pictures_have_a_name_and_a_description(browser, report):
    browser.open(report, 1280)
    nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
    images = [node for node in nodes if node.get("role", {}).get("value") == "image"]
    names = [node["name"]["value"] for node in images]
    assert [name.split(" ")[:2] for name in names] == [["Action", "top-1"]] * 3
    assert all("KARMMA student: from " in name for name in names)


def test_the_tables_are_saved_as_csv(browser, report):
    browser.open(report, 1280)
    browser.run("URL.createObjectURL = blob => { blob.text().then(text => { window.saved = text; }); return '#'; }")
    browser.click("document.getElementById('save')")
    saved = browser.run(
        "new Promise(done => { (function wait() { window.saved ? done(window.saved) : "
        "requestAnimationFrame(wait); })(); })"
    )
    lines = list(csv.reader(io.StringIO(saved)))
    assert [HOSTILE] in lines
    cells = "[...row.cells].map(cell => cell.textContent.trim())"
    shown = browser.run(f"[...document.querySelectorAll('tr')].map(row => {cells})")
    assert [line for line in lines if len(line) > 1] == [row for row in shown if len(row) > 1]
