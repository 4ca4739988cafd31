"""The command line: the group of all commands, which prints every error as one line and sets the exit code.

Exit codes: 0 done, 1 a problem was found, 2 usage or bad input, 85 preempted after saving (start it again), 130 Ctrl-C.
"""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from karmma_dist.commands import diagnostics, evaluation, packing, training
from karmma_dist.commands.options import HomePath
from karmma_dist.errors import LostRank, Stopped, UserError, one_line, say
from karmma_dist.terminal import keep_warnings_harmless, print_line

_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


@click.group(context_settings=_CONTEXT)
@click.version_option(package_name="karmma-dist")
def cli() -> None:
    """Egocentric action recognition that survives missing modalities: pack, train, distil, evaluate."""


@cli.command()
@click.option("--out", default="demo", show_default=True, type=HomePath(path_type=Path), help="Folder of the demo.")
def demo(out: Path) -> None:
    """Make a small synthetic dataset, then pack, train, distil and evaluate. Takes minutes on a CPU."""
    from karmma_dist.demo import run_demo
    from karmma_dist.progress import Progress

    with Progress() as report:
        path = run_demo(out, report)
    print_line(path)


for command in (
    packing.shard, packing.inspect, packing.verify, training.launch, training.train, evaluation.evaluate,
    training.study, evaluation.predict, diagnostics.profile, diagnostics.doctor, training.runs_command,
    diagnostics.bench_group, diagnostics.recipe_group,
):  # fmt: skip
    cli.add_command(command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line (default: that of this process) and return its exit code."""
    keep_warnings_harmless()
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        cli(args=given, prog_name="karmma-dist", standalone_mode=False, obj=given)
    except UserError as error:
        return _fail(str(error))
    except Stopped as stop:
        say(str(stop), of_another=isinstance(stop, LostRank))
        return stop.exit_code
    except click.UsageError as error:
        if isinstance(error, click.exceptions.NoArgsIsHelpError):
            click.echo(error.format_message())
            return 2
        command = error.ctx.command_path if error.ctx else "karmma-dist"
        return _fail(f"{command}: {error.format_message()} (see {command} --help)")
    except click.ClickException as error:
        return _fail(error.format_message())
    except (click.Abort, KeyboardInterrupt):
        say("interrupted: run the same command again to go on")
        return 130
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            return 1
        if hasattr(error, "__notes__"):  # the notes name the clip and need more than one line
            raise
        return _fail(f"{error.filename or 'output'}: {error.strerror or error}", exit_code=1)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    return 0


def _fail(message: str, exit_code: int = 2) -> int:
    say(f"error: {one_line(message)}")
    return exit_code


def _reader_is_gone() -> bool:
    """Return True if the reader of stdout (`| head`) has closed it; redirect stdout then, so that flushing works."""
    poll = select.poll()
    poll.register(sys.stdout, 0)
    is_gone = any(event & select.POLLERR for _, event in poll.poll(0))
    if is_gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return is_gone
