"""Names in data, of classes, clips, runs and files, are text to the terminal: no markup, nothing that acts on it."""

from __future__ import annotations

import csv
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import warnings
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from karmma_dist.cli import main
from karmma_dist.packing.pack import pack
from karmma_dist.packing.readers import tables
from karmma_dist.packing.spec import PackingSpec
from karmma_dist.progress import Progress
from karmma_dist.terminal import harmless, print_line, print_table
from kits.packing import write_movie
from kits.patience import HANGS_S
from kits.reports import random_results
from kits.studies import STUDY, write_study

ACTING = "\x1b]0;owned\x07\x1b[31m\x9b2J\b\x7f\u202e\u2066"
"""Sets a window's title, rings, colours, clears the screen, steps back, turns the order of letters."""
MARKUP = "Put [something] [/red] [bold]x :smile: \\[y]"
HOSTILE = f"{MARKUP}{ACTING}"
SHOWN = MARKUP + r"\x1b]0;owned\x07\x1b[31m\x9b2J\x08\x7f\u202e\u2066"
FILE_NAME = HOSTILE.replace("/", "|")
FILE_SHOWN = SHOWN.replace("/", "|")

acting = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
texts = st.text(
    st.one_of(st.characters(), st.characters(max_codepoint=0xA0), st.sampled_from("[]/\\:=#@\x1b\u202e\u2066\ud800"))
) | st.sampled_from([HOSTILE, "[/]", "[red]x", "\r\n", "[link=file:///x]y[/link]"])


def squeezed(text: str) -> str:
    """The text without the spaces and line breaks that a table puts between and inside of its cells."""
    return "".join(text.split())


def expect_text(out: str, *expected: str) -> None:
    """Expect that nothing in the output acts, and that it shows each of the texts as it is."""
    assert acting.search(out) is None
    for text in expected or (SHOWN,):
        assert squeezed(text) in squeezed(out)


@given(texts)
def test_harmless_text_acts_on_nothing_and_says_what_it_was(text: str) -> None:
    shown = harmless(text)
    assert acting.search(shown) is None
    assert "\n" not in shown
    shown.encode()
    assert harmless(shown) == shown
    if "\\" not in text:
        unescaped = re.sub(r"\\x([0-9a-f]{2})|\\u([0-9a-f]{4})", lambda m: chr(int(m[1] or m[2], 16)), shown)
        assert unescaped == text


@given(text=texts)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_way_to_print_shows_text_as_it_is(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    print_line(text)
    assert capsys.readouterr().out == f"{harmless(text)}\n"
    print_table([text, "n"], [[text, text]], title=text, footer=[text])
    out = capsys.readouterr().out
    assert acting.search(out) is None
    assert squeezed(out).count(squeezed(harmless(text))) >= 4
    with Progress() as report:
        report(text, 1, 1, text)
    out = capsys.readouterr().err
    assert acting.search(out) is None
    assert out.startswith(f"{harmless(text)}: 1/1 after ")


def test_a_terminal_gets_no_more_than_others(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from karmma_dist.progress import Progress\n"
        "from karmma_dist.terminal import print_table\n"
        f"hostile = {HOSTILE!a}\n"
        "with Progress() as report:\n"
        "    report(hostile, 1, 2, hostile)\n"
        "    report(hostile, 2, 2, hostile)\n"
        "print_table([hostile], [[hostile]], title=hostile, footer=[hostile])\n"
    )
    leader, follower = os.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "400", "LINES": "50"}
    with subprocess.Popen(
        [sys.executable, str(script)], stdin=follower, stdout=follower, stderr=follower, env=environment
    ) as process:
        os.close(follower)
        received = b""
        try:
            while block := os.read(leader, 65536):
                received += block
        except OSError:
            pass  # so ends a terminal whose last user has gone
        assert process.wait(HANGS_S) == 0
    os.close(leader)
    out = received.decode()
    assert "\x1b[" in out  # rich saw a terminal
    assert not re.search("\x1b\\]|\x07|\x9b|\b|\x7f|\u202e|\u2066|\x1b\\[31m\\x9b", out)
    assert SHOWN in re.sub("\x1b\\[[0-9;?]*[A-Za-z]", "", out)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A raw folder of two clips whose class and narration are hostile, and a third that is no video."""
    raw = tmp_path_factory.mktemp("raw")
    write_movie(raw / "a.mp4", frames=30)
    (raw / "b.mp4").write_bytes(b"no movie")
    with open(raw / "train.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["key", "media", "start", "stop", "action", "narration"])
        writer.writerows([["k1", "a.mp4", 0, 0.5, HOSTILE, HOSTILE], ["k2", "a.mp4", 0.5, 1, "other", ""]])
        writer.writerow(["k3", "b.mp4", 0, 1, "other", ""])
    return raw


def spec_of(raw: Path, out: Path) -> dict[str, object]:
    return {
        "reader": "plain", "dataset": HOSTILE, "raw": str(raw), "out": str(out), "flow": {"source": "none"},
        "audio": {"source": "none"},
    }  # fmt: skip


@pytest.fixture(scope="module")
def packed(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset packed into a folder whose name is hostile."""
    out = tmp_path_factory.mktemp("packed") / FILE_NAME
    with any_character_in_tables():
        pack(PackingSpec.model_validate(spec_of(dataset, out)))
    return out


def any_character_in_tables() -> AbstractContextManager[object]:
    """Let tables hold control characters, as another reader's annotations or shards of others may."""
    return mock.patch.object(tables, "_CONTROL", re.compile("(?!)"))


def test_shard(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "spec.json").write_text(json.dumps(spec_of(dataset, tmp_path / FILE_NAME)))
    with any_character_in_tables():
        assert main(["shard", str(tmp_path / "spec.json")]) == 1
    shown = capsys.readouterr()
    expect_text(shown.out, f"{tmp_path}/{FILE_SHOWN}: packed", "1 clips failed")
    expect_text(shown.err, "cut: ")


def test_inspect(packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(packed)]) == 0
    expect_text(capsys.readouterr().out, f"{packed.parent}/{FILE_SHOWN}: {SHOWN}", f"action: 2 classes: {SHOWN} 1")
    assert main(["inspect", str(packed), "k1", "--sheet", str(tmp_path / "sheet.png")]) == 0
    expect_text(capsys.readouterr().out, MARKUP.replace("\\", "\\\\"), "contact sheet: ")
    for words in ([], ["k1"]):
        assert main(["inspect", str(packed), *words, "--json"]) == 0
        out = capsys.readouterr().out
        expect_text(out, "Put [something]")
        assert HOSTILE in str(json.loads(out).values()).encode().decode("unicode_escape") or words
    assert main(["inspect", str(packed), HOSTILE]) == 2
    expect_text(capsys.readouterr().err, f"no clip '{SHOWN}'")


def test_verify(packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / FILE_NAME
    shutil.copytree(packed, copy)
    (copy / f"{FILE_NAME}.tar").touch()
    (copy / f".{FILE_NAME}.partial").touch()
    assert main(["verify", str(copy)]) == 1
    expect_text(capsys.readouterr().out, f"{FILE_SHOWN}.tar: unlisted", f"{FILE_SHOWN}: damaged", ".partial")
    assert main(["verify", str(copy), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["findings"][0]["shard"] == f"{FILE_NAME}.tar"


def test_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / FILE_NAME
    folder.mkdir()
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"name": HOSTILE}))
    state = {"state": "failed", "time": 0, "host": HOSTILE, "job_id": HOSTILE, "why": HOSTILE}
    (folder / "state.json").write_text(json.dumps(state))
    assert main(["runs", str(tmp_path)]) == 0
    expect_text(capsys.readouterr().out, FILE_SHOWN, f"{FILE_SHOWN}: failed: {SHOWN}")
    assert main(["runs", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["why"] == " ".join(HOSTILE.split())
    (tmp_path / "none").mkdir()
    assert main(["runs", str(tmp_path / "none" / FILE_NAME)]) == 2
    expect_text(capsys.readouterr().err, FILE_SHOWN)


def test_eval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from karmma_dist.evaluation import command
    from karmma_dist.evaluation.command import Evaluation

    results = random_results(0, num_clips=20)
    summary = replace(results.summary, num_damaged=1, damage=[HOSTILE])
    one = SimpleNamespace(
        name=HOSTILE, results=replace(results, summary=summary), to_export=lambda: [HOSTILE],
        data=SimpleNamespace(validation_split=HOSTILE),
    )  # fmt: skip
    empty = SimpleNamespace(rows=[], summary=replace(summary, num_damaged=0))
    none = SimpleNamespace(name="none", results=empty, to_export=list, data=one.data)
    for done, report in (({HOSTILE: one}, tmp_path / FILE_NAME), ({"none": none}, None)):
        monkeypatch.setattr(
            command, "evaluate_request", lambda _, done=done, report=report: Evaluation(done, {"name": HOSTILE}, report)
        )
        assert main(["eval", "run"]) == (1 if report else 0)
        shown = capsys.readouterr()
        if report:
            expect_text(shown.out, SHOWN, f"report: {tmp_path}/{FILE_SHOWN}")
        expect_text(shown.err, f"{SHOWN}: 1 clips are damaged" if report else f"split '{SHOWN}' has no labels")
    assert main(["eval", "run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"name": HOSTILE}


def test_predict(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from karmma_dist.evaluation.predict import predict
    from karmma_dist.evaluation.predict.prediction import Action, Guess, Prediction

    actions = [Action({"verb": HOSTILE}, {"verb": 0}, 0.5)]
    found = Prediction(HOSTILE, 1.0, ["video"], [], [], {"verb": HOSTILE}, [Guess(["video"], actions)])
    monkeypatch.setattr(predict, "predict", lambda *_, **__: [found])
    assert main(["predict", "run", "clip"]) == 0
    expect_text(capsys.readouterr().out, f"{SHOWN} (1 s): found video", f"labelled: {SHOWN}", f"50.0 {SHOWN}")


def test_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{**STUDY["rows"][0], "label": HOSTILE}]
    write_study(tmp_path, {"title": HOSTILE, "rows": rows})
    assert main(["study", "tiny/tab0", "--dry-run"]) == 0
    expect_text(capsys.readouterr().out, f"{SHOWN} (", f"{SHOWN} 2")
    assert main(["study", "tiny/tab0", "--only", f"no {HOSTILE}"]) == 2
    expect_text(capsys.readouterr().err, f"no {SHOWN}")


def test_doctor_and_preflight(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from karmma_dist.distributed.preflight.preflight import Outcome, report
    from karmma_dist.distributed.world import ALONE
    from karmma_dist.launching.doctor import doctor
    from karmma_dist.launching.doctor.check import Check

    monkeypatch.setattr(doctor, "diagnose", lambda *_: [Check(HOSTILE, "fix", HOSTILE, HOSTILE)])
    assert main(["doctor"]) == 1
    expect_text(capsys.readouterr().out, f"fix: {SHOWN}: {SHOWN}")
    report(Outcome(failures=[HOSTILE], notes=[HOSTILE], reported=True), ALONE)
    shown = capsys.readouterr()
    expect_text(shown.out, f"note: {SHOWN}")
    expect_text(shown.err, f"error: {SHOWN}")


def test_launch_and_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from karmma_dist.training import chain

    names = f"--set=data.train_split={json.dumps(HOSTILE)}"
    assert main(["launch", "demo/teacher", "--local", "1", names, "--dry-run"]) == 0
    expect_text(capsys.readouterr().out, "Put [something]")
    monkeypatch.setattr(chain, "train_chain", lambda *_, **__: {HOSTILE: {"action_top1": 1.0}})
    assert main(["train", "demo/teacher", f"--set=runs_dir={json.dumps(str(tmp_path))}"]) == 0
    expect_text(capsys.readouterr().out, f"{SHOWN}: action_top1 1.00 (")


def test_a_recipe_that_is_shown_can_be_read_again(capsys: pytest.CaptureFixture[str]) -> None:
    for name in (HOSTILE, "K\u00fcche"):
        assert main(["recipe", "show", "demo/teacher", f"--set=data.train_split={json.dumps(name)}"]) == 0
        out = capsys.readouterr().out
        assert acting.search(out) is None
        assert yaml.safe_load(out)["data"]["train_split"] == name


def test_errors_and_log_messages(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", f"/nowhere/{HOSTILE}"]) == 2
    expect_text(capsys.readouterr().err, f"error: /nowhere/{SHOWN}")
    assert main([HOSTILE]) == 2
    expect_text(capsys.readouterr().err, "No such command 'Put [something]")
    assert logging.lastResort is not None
    record = logging.LogRecord("karmma_dist", logging.WARNING, "", 0, "%s\nmore", (HOSTILE,), None)
    assert logging.lastResort.format(record) == f"{SHOWN}\nmore"
    shown = warnings.formatwarning(f"{HOSTILE}\nmore", UserWarning, "file.py", 1, "")
    assert f"UserWarning: {SHOWN}\nmore\n" in shown
