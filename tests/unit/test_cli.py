"""Tests of the command line: it starts fast, explains itself, and agrees with the documents."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
import yaml

from karmma_dist.cli import cli, main
from kits.patience import HANGS_S

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "shards/README.md", *sorted(ROOT.glob("recipes/*/README.md"))]


def commands() -> list[list[str]]:
    """Return every command and subcommand, as a list of words."""
    found = []
    for name, command in cli.commands.items():
        found.append([name])
        if isinstance(command, click.Group):
            found += [[name, inner] for inner in command.commands]
    return found


def documented() -> list[str]:
    """Return every karmma-dist command line in a fenced block of a document."""
    lines = []
    for document in DOCUMENTS:
        for block in re.findall(r"```\n(.*?)```", document.read_text(), flags=re.DOTALL):
            for line in block.splitlines():
                text = line.split(" #")[0].strip()
                if re.match(r"karmma-dist [a-z]", text):
                    lines.append(text)
    return lines


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys\n"
        "from karmma_dist.cli import main\n"
        "assert main(['--help']) == 0\n"
        "heavy = {'torch', 'deepspeed', 'numpy', 'av', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=HANGS_S)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_explains_itself(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--help"]) == 0
    assert "Usage: karmma-dist " + " ".join(words) in capsys.readouterr().out


def test_the_documents_show_commands() -> None:
    assert len(documented()) >= 12


@pytest.mark.parametrize("line", documented())
def test_every_documented_command_parses(line: str) -> None:
    words = shlex.split(line)[1:]
    command: click.Command = cli
    while isinstance(command, click.Group):
        command = command.commands[words.pop(0)]
    command.make_context("karmma-dist", words)


def test_without_a_command_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    shown = capsys.readouterr()
    assert "Commands:" in shown.out + shown.err


def test_an_unknown_option_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--drop-probability", "0.5"]) == 2
    error = capsys.readouterr().err
    assert "--drop-probability" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(("steps", "said"), [("10", "is not START:STOP"), ("15:10", "start must come before stop")])
def test_invalid_steps_to_trace_are_one_line(
    steps: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "demo/video", "--profile", steps]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_the_schema_of_recipes_shows_what_may_change_on_resume(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    training = schema["$defs"]["TrainingRecipe"]["properties"]
    assert training["log_every_steps"]["not_learned"] is True
    assert training["log_every_steps"]["description"].startswith("Optimizer steps between lines")
    assert "not_learned" not in training["epochs"]
    assert schema["properties"]["slurm"]["not_learned"] is True


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_full_disk_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        words = [sys.executable, "-m", "karmma_dist", "recipe", "show", "demo/video"]
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, timeout=HANGS_S)
    assert done.returncode == 2
    assert done.stderr == "error: output: No space left on device\n"


def test_a_closed_output_pipe_is_not_an_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    words = [sys.executable, "-m", "karmma_dist", "recipe", "show", "demo/video"]
    done = subprocess.run(words, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=HANGS_S)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


def test_home_is_expanded_in_every_option_that_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    paths = [
        (command, option)
        for command in cli.commands.values()
        for option in command.params
        if isinstance(option.type, click.Path | click.Tuple)
    ]
    assert len(paths) > 10
    for command, option in paths:
        types = option.type.types if isinstance(option.type, click.Tuple) else [option.type]
        converted = [kind.convert("~/x~", option, None) for kind in types if isinstance(kind, click.Path)]
        assert [str(path) for path in converted] == [f"{tmp_path}/x~"], command.name


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "ascii"])
def test_a_recipe_is_shown_in_any_locale_and_read_again(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    text = (
        "name: K\u00fcche \u2014 1\nstage: supervised\ndata: {shards: s, modalities: [video]}\n"
        "model: {encoders: {video: {name: small_video}}}\n"
    )
    path.write_bytes(text.encode())
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run(
        [sys.executable, "-m", "karmma_dist", "recipe", "show", str(path)], env=environment, capture_output=True,
        timeout=HANGS_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout.decode(encoding))["name"] == "K\u00fcche \u2014 1"
