"""One line of the diagnosis of `doctor`; keeps a check from raising and from lasting longer than its limit."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from karmma_dist.errors import one_line

_PROBE_GRACE_S = 5.0
"""A check that runs a command ends it at the limit and says so itself, in this time."""


State = Literal["ok", "note", "fix"]
"""ok; note: it works, but you may want to know; fix: something will fail until it is changed."""


@dataclass(frozen=True)
class Check:
    """One line of the diagnosis."""

    name: str
    state: State
    found: str
    advice: str = ""
    """What to do, where there is something to do."""


def bounded(name: str, check: Callable[[], Iterable[Check]], limit_s: float) -> Callable[[], list[Check]]:
    """Start a check; the function returned waits for it, and is a `fix` itself where it raises or does not end."""
    found: list[Check] = []

    def run() -> None:
        try:
            found.extend(check())
        except Exception as error:  # whatever a broken machine throws is a finding
            what = f"{type(error).__name__}: {one_line(error, 300)}"
            found.append(Check(name, "fix", f"cannot be checked ({what})", "this should not happen: please report it"))

    thread = threading.Thread(target=run, name=f"doctor {name}", daemon=True)
    thread.start()
    ends = time.monotonic() + limit_s + _PROBE_GRACE_S

    def wait() -> list[Check]:
        thread.join(max(0.0, ends - time.monotonic()))
        if thread.is_alive():
            return [Check(name, "fix", f"did not answer within {limit_s:.0f} s", "a file system or daemon hangs")]
        return found

    return wait
