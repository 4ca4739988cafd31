"""Whatever is given to a command, its exit code says what happened, and one short line why: never a traceback."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from karmma_dist.cli import cli, main
from karmma_dist.packing.pack import pack
from karmma_dist.packing.spec import PackingSpec
from kits.packing import write_movie

LONG = ["x" * 300, "x" * 5000, "a/" * 3000, "y " * 3000]
ACTING = ["a\nb", "\x1b[2J\x1b]0;owned\x07", "\u202e\u2028x", "\udcff\udc80", "\u540d\u524d \u00fcml\u00e4ut"]
WORDS = [
    *LONG, *ACTING, "0", "-1", "nan", "1e999", "-", "--", "/", ".", "..", "~", "*", "[]", "{}", "a=b", "=", "a.b=c",
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
    for number in range(200):
        words, command = commands[number % len(commands)]
        check(random_line(chance, words, command), capsys)
