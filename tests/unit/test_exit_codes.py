"""Whatever is given to a command, its exit code says what happened, and one short line why: never a traceback."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import click
import pytest

from karmma_dist.cli import cli, main
from karmma_dist.errors import shortened
from karmma_dist.packing.pack import pack
from karmma_dist.packing.spec import PackingSpec
from kits.fuzzing import cases
from kits.packing import write_movie
from kits.patience import HANGS_S

LONG = ["x" * 300, "x" * 5000, "a/" * 3000, "y " * 3000]
ACTING = ["a\nb", "\x1b[2J\x1b]0;owned\x07", "\u202e\u2028x", "\udcff\udc80", "\u540d\u524d \u00fcml\u00e4ut"]
WORDS = [
    *LONG, *ACTING, "0", "-1", "nan", "1e999", "-", "--", ".", "~", "*", "[]", "{}", "a=b", "=", "a.b=c",
    "training.epochs=x", "name=''", "name=../..", "demo/video", "demo/none", "http://", "https://[", "hf://x",
    "s3://a:b@c/d?e", "video:blur:9", "V,F", "1:2", "3/2", "\u00b2", "true", "null", "&a [*a]", "9" * 400,
]  # fmt: skip
"""Values of arguments and options."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a file of every kind that can be named."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "empty").mkdir()
    (folder / "file").write_text("x")
    (folder / "binary").write_bytes(bytes(range(256)) * 10)
    (folder / "dangling").symlink_to("nowhere")
    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "fifo")
    write_movie(folder / "a.mp4", frames=30)
    (folder / "train.csv").write_text("key,media,start,stop,action\nk1,a.mp4,0,0.5,cut\n")
    spec = {"reader": "plain", "dataset": "tiny", "raw": str(folder), "out": str(folder / "shards")}
    pack(PackingSpec.model_validate({**spec, "flow": {"source": "none"}, "audio": {"source": "none"}}))
    return folder


PLACES = ["empty", "file", "file/x", "binary", "dangling", "loop", "loop/x", "fifo", "none"]


def leaves(group: click.Group, *words: str) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from leaves(command, *words, name)
        else:
            yield (*words, name), command


def check(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> int:
    """Run a command line in this process, and check its exit code and its messages."""
    code = main(arguments)
    shown = capsys.readouterr()
    assert code in (0, 1, 2), (arguments, code)
    if code == 2:
        lines = shown.err.splitlines()
        assert [line for line in lines if line.startswith("error: ")] == lines[-1:], (arguments, shown.err)
        assert len(lines[-1]) < 2100, (arguments, shown.err)
    assert "Traceback" not in shown.err + shown.out, arguments
    return code


NOT_TO_CARRY_OUT = {"train", "doctor", "profile", "study", "shard", "bench"}
"""Commands whose first argument is bad, since they could be carried out otherwise, which takes long."""
BAD_FIRST = [*LONG, *PLACES[1:], "demo/none", "\x1b[2J", "\udcff"]
GOOD_FIRST = {
    "inspect": ["shards"], "verify": ["shards"], "launch": ["demo/video", "--dry-run"], "recipe": ["demo/video"],
}  # fmt: skip
"""First arguments of commands that are then carried out."""


def random_line(chance: random.Random, words: tuple[str, ...], command: click.Command) -> list[str]:
    """Return a command line with hostile values for some options and for its arguments."""
    values = [*WORDS, *PLACES]
    if words == ("demo",):
        return ["demo", "--out", chance.choice([*LONG[:3], "file/x", "loop/x"])]
    line: list[str] = []
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            if chance.random() < 0.3:
                width = 0 if parameter.is_flag else parameter.nargs
                line += [parameter.opts[-1], *(chance.choice(values) for _ in range(width))]
        elif words[0] in GOOD_FIRST and not line and chance.random() < 0.7:
            line += GOOD_FIRST[words[0]]
        elif words[0] in NOT_TO_CARRY_OUT and parameter.name != "clips":
            line.append(chance.choice(BAD_FIRST))
        else:
            line.append(chance.choice(values))
    return [*words, *line]


def test_hostile_arguments_are_one_line(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setenv("SLURM_CONF", str(place / "none"))
    chance = random.Random(0)
    commands = list(leaves(cli))
    for number in cases(200):
        words, command = commands[number % len(commands)]
        check(random_line(chance, words, command), capsys)


def test_names_that_cannot_be_opened_exit_with_2(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    for name in ("x" * 300, "x" * 5000, "a/" * 3000, "file/x", "loop", "loop/x", "dangling", "file", "fifo", "\x1b[2J"):
        for words in (["inspect", name], ["verify", name], ["runs", name], ["eval", name], ["recipe", "show", name]):
            if words == ["recipe", "show", "file"]:
                continue  # a file that can be opened
            assert check(words, capsys) == 2, words
    for words in (["inspect", "shards", "--sheet", "empty"], ["inspect", "shards", "--sheet", "file/x.png"],
                  ["inspect", "shards", "--sheet", "x" * 300], ["inspect", "shards", "none"]):  # fmt: skip
        assert check(words, capsys) == 2, words


def test_an_empty_argument_is_no_working_folder(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["inspect", ""], ["runs", ""], ["eval", "run", "--out", ""], ["eval", "--shards="], ["train", ""]):
        assert main(words) == 2
        assert "of the command line is empty: is a variable unset?" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["runs"], ["inspect", "shards"], ["eval"], ["train", "x.yaml"]], ids=" ".join)
def test_a_working_folder_that_is_gone_is_named(words: list[str], tmp_path: Path) -> None:
    script = 'cd "$1"; rmdir "$1"; shift; exec "$0" -m karmma_dist "$@"'
    gone = tmp_path / "gone"
    gone.mkdir()
    done = subprocess.run(
        ["sh", "-c", script, sys.executable, str(gone), *words], capture_output=True, text=True, timeout=HANGS_S,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: the working folder no longer exists: change to another one\n"


def test_messages_are_cut_to_size_and_paths_are_not() -> None:
    path = "/scratch/" + "/".join(f"folder{number}" for number in range(20))
    assert shortened(f"{path}: no such folder") == f"{path}: no such folder"
    assert len(shortened(f"{'x' * 5000}: no such folder")) < 110
    assert shortened("x" * 5000 + "yz").endswith("yz")
    assert len(shortened("word " * 5000)) <= 2000


def test_errors_of_the_system_tell_bad_input_from_trouble(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from karmma_dist.runs import listing

    for number, code in ((errno.EACCES, 2), (errno.ENOSPC, 2), (errno.EROFS, 2), (errno.EIO, 1), (errno.ESTALE, 1)):
        error = OSError(number, os.strerror(number), f"{'n' * 300}\n\x1b")
        monkeypatch.setattr(listing, "find_runs", mock.Mock(side_effect=error))
        assert main(["runs", "x"]) == code
        shown = capsys.readouterr().err
        assert shown.endswith(f": {os.strerror(number)}\n")
        assert len(shown) < 200
        assert "\x1b" not in shown
    monkeypatch.setattr(listing, "find_runs", mock.Mock(side_effect=BrokenPipeError(errno.EPIPE, "Broken pipe")))
    assert main(["runs", "x"]) == 1
    assert capsys.readouterr().err == (
        "error: a process or server that this one talked to has ended: [Errno 32] Broken pipe\n"
    )
