"""The command line: the group of all commands, which prints every error as one line and sets the exit code.

Exit codes: 0 done, 1 a problem was found, 2 usage or bad input, 85 preempted after saving (start it again), 130 Ctrl-C.
"""

from __future__ import annotations

import errno
import os
import re
import select
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from karmma_dist.commands import deploy, diagnostics, evaluation, packing, training
from karmma_dist.commands.options import HomePath
from karmma_dist.errors import LostRank, Stopped, UserError, one_line, say
from karmma_dist.terminal import keep_warnings_harmless, prepare_streams, print_line, silence

_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
_EMPTY_OPTION = re.compile("--[a-z-]+=")
_OF_THE_USER = {
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ENAMETOOLONG, errno.ELOOP,
    errno.EINVAL, errno.EACCES, errno.EPERM, errno.EROFS, errno.EXDEV, errno.ENOSPC, errno.EDQUOT, errno.EFBIG,
    errno.EBADF, errno.ENXIO, errno.ENODEV, errno.ETXTBSY, errno.EBUSY,
}  # fmt: skip
"""Errors about a path that was named, its permissions or its disk: bad input. Others are problems that were found."""


_NOT_OF_THE_RUNTIME = {
    "torch", "torchvision", "timm", "deepspeed", "webdataset", "safetensors", "tensorboard", "matplotlib", "jinja2",
}  # fmt: skip
"""Packages that are missing where only the extra `runtime` is installed."""


class _Commands(click.Group):
    """The group of all commands."""

    def invoke(self, ctx: click.Context) -> object:
        """Run a command. Click would end without a word if any pipe breaks, be it not stdout."""
        if not _has_working_folder():  # torch would end the process while it is imported
            raise UserError("the working folder no longer exists: change to another one")
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:
            if _reader_is_gone():
                raise SystemExit(1) from None
            raise Stopped(f"error: a process or server that this one talked to has ended: {error}", 1) from error


@click.group(cls=_Commands, context_settings=_CONTEXT)
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
    training.study, evaluation.predict, deploy.export, diagnostics.profile, diagnostics.doctor, training.runs_command,
    training.memory_command, diagnostics.bench_group, diagnostics.recipe_group,
):  # fmt: skip
    cli.add_command(command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line (default: that of this process) and return its exit code."""
    prepare_streams()
    keep_warnings_harmless()
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = _run(given)
        sys.stdout.flush()
        return code
    except UserError as error:
        return _fail(str(error))
    except Stopped as stop:
        say(str(stop), of_another=isinstance(stop, LostRank))
        return stop.exit_code
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "karmma-dist"
        return _fail(f"{command}: {error.format_message()} (see {command} --help)")
    except click.ClickException as error:
        return _fail(error.format_message())
    except (click.Abort, KeyboardInterrupt):
        say("interrupted: run the same command again to go on")
        return 130
    except ModuleNotFoundError as error:
        if error.name not in _NOT_OF_THE_RUNTIME:
            raise
        return _fail(
            f"{error.name} is not installed: the extra 'runtime' alone serves predict with an exported model; for all "
            "else install karmma-dist with its dependencies"
        )
    except OSError as error:
        return _fail_by_system(error)
    except UnicodeEncodeError as error:
        if error.encoding.replace("-", "") != sys.getfilesystemencoding().replace("-", "") or "utf" in error.encoding:
            raise
        return _fail(
            f"{error.object}: this locale has no name for such a file ({error.encoding}): set LC_ALL=C.UTF-8, then run "
            "the same command again"
        )


def _run(given: list[str]) -> int:
    for place, word in enumerate(given, 1):
        if not word or _EMPTY_OPTION.fullmatch(word):
            shown = f"argument {place} ({word})" if word else f"argument {place}"
            raise UserError(f"{shown} of the command line is empty: is a variable unset?")
    try:
        cli(args=given, prog_name="karmma-dist", standalone_mode=False, obj=given)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        return 2
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0


def _fail(message: str, exit_code: int = 2) -> int:
    say(f"error: {one_line(message)}")
    return exit_code


def _fail_by_system(error: OSError) -> int:
    """Report an error of the operating system: its name and cause. Raise it if a bug is more likely."""
    if isinstance(error, BrokenPipeError) and _reader_is_gone():
        return 1
    if hasattr(error, "__notes__"):  # the notes name the clip and need more than one line
        raise error
    code = 2 if error.errno in _OF_THE_USER else 1
    cause = error.strerror or str(error)
    name = os.fsdecode(error.filename) if isinstance(error.filename, bytes) else error.filename
    if not name:
        _drop_output()
    return _fail(f"{name or 'output'}: {cause}", code)


def _has_working_folder() -> bool:
    try:
        os.getcwd()
    except OSError:
        return False
    return True


def _drop_output() -> None:
    """Drop what stdout does not take; Python would try again to write it at its end, and fail."""
    try:
        sys.stdout.flush()
    except OSError:
        silence(sys.stdout.fileno())


def _reader_is_gone() -> bool:
    """Return True if the reader of stdout or stderr (`| head`) has closed it; nothing more is written to it then."""
    poll = select.poll()
    for descriptor in (1, 2):
        poll.register(descriptor, 0)
    gone = [descriptor for descriptor, event in poll.poll(0) if event & select.POLLERR]
    for descriptor in gone:
        silence(descriptor)
    return bool(gone)
