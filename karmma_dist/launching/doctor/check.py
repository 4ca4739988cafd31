"""The result of one check of `doctor`, and a wrapper that bounds a check's time and catches its exceptions."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from karmma_dist.errors import one_line

_PROBE_GRACE_S = 5.0
"""Extra time beyond its limit for a check that runs a command, to stop the command and report that."""


State = Literal["ok", "note", "fix"]
"""ok: no problem; note: it works, with a remark; fix: something will fail until it is changed."""


@dataclass(frozen=True)
class Check:
    """One line of the diagnosis."""

    name: str
    state: State
    found: str
    advice: str = ""
    """Advice on what to do; empty if nothing needs to be done."""


def bounded(name: str, check: Callable[[], Iterable[Check]], limit_s: float) -> Callable[[], list[Check]]:
    """Start a check, and return a function that waits for its results.

    A check that raises, or exceeds its time limit, has the state `fix`.
    """
    results: list[Check] = []

    def run() -> None:
        try:
            results.extend(check())
        except Exception as error:  # any exception on a broken machine is a result
            message = f"{type(error).__name__}: {one_line(error, 300)}"
            advice = "this should not happen: please report it"
            results.append(Check(name, "fix", f"cannot be checked ({message})", advice))

    thread = threading.Thread(target=run, name=f"doctor {name}", daemon=True)
    thread.start()
    deadline = time.monotonic() + limit_s + _PROBE_GRACE_S

    def wait() -> list[Check]:
        thread.join(max(0.0, deadline - time.monotonic()))
        if thread.is_alive():
            return [Check(name, "fix", f"did not answer within {limit_s:.0f} s", "a file system or daemon hangs")]
        return results

    return wait
