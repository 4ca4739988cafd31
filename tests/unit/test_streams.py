"""Commands on pipes, closed streams, full disks and in any locale: each message is on its stream, none a traceback."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from kits.patience import HANGS_S

ROOT = Path(__file__).resolve().parents[2]
NAME = "K\u00fcche-\u53f0\u6240-\U0001f373"
ESCAPED = NAME.encode("ascii", "backslashreplace")
LATIN = NAME.encode("latin-1", "backslashreplace")
ESCAPED_BYTES = NAME.encode().decode("ascii", "surrogateescape").encode("ascii", "backslashreplace")
"""The name as shown by a process whose locale has no more than ASCII, in which it came as bytes."""
LOCALES = {
    "bare_c": {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
    "posix": {"LC_ALL": "POSIX"},
    "latin": {"PYTHONIOENCODING": "latin-1"},
    "strict": {"PYTHONIOENCODING": "ascii:strict"},
}



def run(words: list[str], redirection: str = "", **variables: str) -> subprocess.CompletedProcess[bytes]:
    """Run a command line in a shell."""
    command = f'exec "$0" -m karmma_dist "$@" {redirection}'
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "PYTHONIO"))}
    return subprocess.run(
        ["sh", "-c", command, sys.executable, *words], capture_output=True, timeout=HANGS_S,
        env={**environment, "PYTHONPATH": str(ROOT), **variables},
    )  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a run that has a long and foreign name."""
    folder = tmp_path_factory.mktemp("runs")
    run_dir = folder / f"{NAME}-{'long' * 40}"
    run_dir.mkdir()
    (run_dir / "recipe.yaml").write_text(json.dumps({"name": run_dir.name}, ensure_ascii=False), "utf-8")
    (run_dir / "state.json").write_text(json.dumps({"state": "failed", "why": f"{NAME} [bold] {'w' * 300}"}))
    return folder


@pytest.mark.parametrize("variables", LOCALES.values(), ids=LOCALES)
def test_any_name_is_shown_in_any_locale(runs: Path, variables: dict[str, str]) -> None:
    listed, failed = run(["runs", str(runs)], **variables), run(["inspect", f"/none/{NAME}"], **variables)
    assert (listed.returncode, listed.stderr) == (0, b"")
    assert (failed.returncode, failed.stdout) == (2, b"")
    assert len(failed.stderr.splitlines()) == 1
    for out in (listed.stdout, failed.stderr):
        assert b"Traceback" not in out
        assert any(shown in out for shown in (NAME.encode(), ESCAPED, ESCAPED_BYTES, LATIN)), out


@pytest.mark.parametrize("variables", LOCALES.values(), ids=LOCALES)
def test_a_recipe_that_is_shown_can_be_read_again_in_any_locale(tmp_path: Path, variables: dict[str, str]) -> None:
    name = NAME.encode("unicode_escape").decode()
    done = run(["recipe", "show", "demo/teacher", "--set", f'name="{name}"'], **variables)
    assert done.returncode == 0, done.stderr
    (tmp_path / "recipe.yaml").write_bytes(done.stdout)
    assert yaml.safe_load((tmp_path / "recipe.yaml").read_text("utf-8"))["name"] == NAME


@pytest.mark.parametrize("variables", [{"COLUMNS": "1"}, {"COLUMNS": "\u00b2"}, {"TERM": "dumb"}, {"NO_COLOR": "1"}])
def test_a_pipe_gets_a_whole_line_per_run(runs: Path, variables: dict[str, str]) -> None:
    out = run(["runs", str(runs)], **variables, LC_ALL="C.UTF-8").stdout.decode()
    assert len([line for line in out.splitlines() if line.startswith(f"{NAME}-{'long' * 40} ")]) == 1
    assert f"{'w' * 300}\n" in out
    assert "\x1b" not in out


def test_a_closed_or_full_stream_moves_nothing_to_the_other(runs: Path) -> None:
    good, bad = ["runs", str(runs)], ["inspect", "/none"]
    for words, redirection, code, out_is_empty, error in (
        (good, ">&-", 0, True, b""),
        (good, "2>&-", 0, False, b""),
        (bad, "2>&-", 2, True, b""),
        (bad, ">&-", 2, True, b"error: /none: no such shards folder (pack one with: karmma-dist shard)\n"),
        (bad, "2>/dev/full", 2, True, b""),
        (good, ">/dev/full", 2, True, b"error: output: No space left on device\n"),
        ([], ">/dev/full", 2, True, b"error: output: No space left on device\n"),
        (["--help"], ">/dev/full", 2, True, b"error: output: No space left on device\n"),
        (["recipe", "schema"], ">/dev/full", 2, True, b"error: output: No space left on device\n"),
        (good, ">/dev/full 2>&1", 2, True, b""),
        (good, "<&- >&- 2>&-", 0, True, b""),
        (good, "| head -c 1", 0, False, b""),
        (["recipe", "schema"], "2>&1 | head -n 1", 0, False, b""),
    ):
        done = run(words, redirection)
        shown = (words, redirection, done)
        assert done.returncode == code, shown
        assert (done.stdout == b"") is out_is_empty, shown
        assert done.stderr == error, shown


def test_a_message_that_nobody_reads_does_not_change_the_exit_code() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    words = [sys.executable, "-m", "karmma_dist", "inspect", "/none"]
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=writing, timeout=HANGS_S)
    os.close(writing)
    assert (done.returncode, done.stdout) == (2, b"")


def test_files_are_written_and_read_as_utf8_whatever_the_locale() -> None:
    problems = []
    for path in sorted((ROOT / "karmma_dist").rglob("*.py")):
        name = path.relative_to(ROOT / "karmma_dist").as_posix()
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and uses_locale(node):
                problems.append(f"{name}:{node.lineno}")
    assert problems == []


def uses_locale(call: ast.Call) -> bool:
    """Return True if a call opens a file or a child's pipes as text without naming the encoding."""
    named = {keyword.arg: keyword.value for keyword in call.keywords}
    name = call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")
    if "encoding" in named or None in named:
        return False
    if "text" in named or "universal_newlines" in named:
        return True
    if name == "read_text":
        return not call.args
    if name == "write_text":
        return len(call.args) < 2
    if (name == "open" and isinstance(call.func, ast.Name)) or name == "fdopen":
        mode = named.get("mode", call.args[1] if len(call.args) > 1 else ast.Constant("r"))
        return not (isinstance(mode, ast.Constant) and "b" in str(mode.value))
    return False
