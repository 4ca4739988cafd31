"""Options and JSON output shared by several commands."""

from __future__ import annotations

import os
from typing import Any

import click

from karmma_dist.io.files import json_text


class HomePath(click.Path):
    """A path in which `~` at the beginning is expanded: shells leave that of `--out=~/x` as it is."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(os.path.expanduser(value), param, ctx)


class Part(click.ParamType):
    """A parameter `I/N` with 1 <= I <= N."""

    name = "I/N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        first, slash, second = str(value).partition("/")
        if not slash or not first.isdigit() or not second.isdigit() or not 1 <= int(first) <= int(second):
            self.fail(f"{value!r} is not I/N with 1 <= I <= N, for example 3/16", param, ctx)
        return int(first), int(second)


class Steps(click.ParamType):
    """A parameter `START:STOP`, converted to the recipe's form `[START, STOP]`."""

    name = "START:STOP"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        start, colon, stop = str(value).partition(":")
        if not colon or not start.isdigit() or not stop.isdigit():
            self.fail(f"{value!r} is not START:STOP, for example 10:15", param, ctx)
        return f"[{start}, {stop}]"


set_option = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override one field, e.g. --set training.epochs=3."
)


def print_json(value: Any) -> None:
    """Print a value as indented JSON, in ASCII."""
    print(json_text(value, indent=1), flush=True)
