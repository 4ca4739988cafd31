"""The job's key-value store, which rank 0 (or torchrun's agent) keeps at MASTER_ADDR:MASTER_PORT, and the way to it.

Torch's own client retries until its time limit whatever is in the way, waits without a limit for a program that accepts
a connection and says nothing, and logs a stack of C++ frames for each attempt. So a plain socket looks first, and tells
what passes (nothing listens yet) from what does not: a name that does not resolve, a machine that does not answer, a
port that another program holds.
"""

from __future__ import annotations

import contextlib
import datetime
import random
import socket
import struct
import time

import torch.distributed as dist

from karmma_dist.distributed.endpoint import Obstacle, is_of_this_machine, listen_for, unresolved
from karmma_dist.distributed.world import World
from karmma_dist.errors import UserError
from karmma_dist.terminal import print_line

LATE_S = 900.0
"""Seconds that ranks wait for one that is merely late: nodes boot, and file systems are slow."""
HOPELESS_S = 20.0
"""Seconds after which an obstacle that time does not remove is an error, a minute with the start of the program."""
_ANSWER_S = 10.0
"""Seconds that a connection, and the answer to a ping, may take."""
_PORT_S = 5.0
"""Seconds for which rank 0 tries a port that is in use: the last process that had it may be about to end."""
_FIRST_LINE_S, _NEXT_LINE_S = 30.0, 60.0
_POLL_S, _SLOWEST_POLL_S = 0.05, 0.5
_TIMEOUT = datetime.timedelta(minutes=15)

_VALIDATE, _PING, _MAGIC = 0, 13, 0x3C85F7CE
"""Requests of TCPStore's protocol, and the number that validates a client (torch/csrc/distributed/c10d/TCPStore*)."""


_NOT_THERE = Obstacle("nothing listens there", "see rank 0's own output, and check MASTER_ADDR and MASTER_PORT", False)
_ANOTHER_PROGRAM = Obstacle("another program listens there", "set another MASTER_PORT")
ANOTHER_JOB = Obstacle("the ranks of another job meet there", "set another MASTER_PORT")


class WaitingLines:
    """The line that says what is waited for, printed on stderr after half a minute and then every minute."""

    def __init__(self) -> None:
        self._next = time.monotonic() + _FIRST_LINE_S

    @property
    def is_due(self) -> bool:
        """True if the line should be printed now."""
        return time.monotonic() >= self._next

    def show(self, line: str) -> None:
        """Print the line, and set the time of the next one."""
        self._next = time.monotonic() + _NEXT_LINE_S
        print_line(line, err=True)


def open_store(world: World, *, hosts: bool, late_s: float, hopeless_s: float) -> dist.Store:
    """Connect to the store at the world's address, and start it there if this process hosts it.

    Args:
        world: World of this rank.
        hosts: True if this process hosts the store.
        late_s: Seconds to wait while nothing listens at the address.
        hopeless_s: Seconds to wait while another obstacle lasts.

    Raises:
        UserError: the store cannot be reached, or its port cannot be opened.
    """
    if hosts:
        return _host(world, min(hopeless_s, late_s))
    began = free_since = time.monotonic()
    lines, pause_s = WaitingLines(), _POLL_S
    while True:
        obstacle = find_obstacle(world.address, world.port, min(_ANSWER_S, hopeless_s, late_s))
        if obstacle is None:
            with contextlib.suppress(dist.DistError):  # it has ended since: the next look tells what is there now
                return _client(world)
            obstacle = _NOT_THERE
        now = time.monotonic()
        if not obstacle.is_hopeless:
            free_since = now
        if now - began >= late_s or now - free_since >= hopeless_s:
            raise UserError(
                f"cannot reach rank 0 at {world.endpoint} within {now - began:.0f} s: {obstacle.reason}: "
                f"{obstacle.advice}"
            )
        if lines.is_due and world.local_rank == 0:
            lines.show(f"rank {world.rank}: waiting for rank 0 at {world.endpoint}: {obstacle.reason}")
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _SLOWEST_POLL_S)


def find_obstacle(address: str, port: int, answer_s: float = _ANSWER_S) -> Obstacle | None:
    """Look for a store of torch at an address; return what is in the way, or None if it answers."""
    try:
        is_store = _answers_ping(address, port, answer_s) or not _knows_protocol()
    except (socket.gaierror, UnicodeError) as error:
        return unresolved(error)
    except ConnectionRefusedError:
        return _NOT_THERE
    except OSError as error:
        reason = "no answer" if isinstance(error, TimeoutError) else error.strerror or str(error)
        return Obstacle(reason, "check MASTER_ADDR, that rank 0's node is up, and that no firewall blocks the port")
    return None if is_store else _ANOTHER_PROGRAM


def _answers_ping(address: str, port: int, answer_s: float) -> bool:
    """Return True if what listens at an address answers a ping as a store does.

    Raises:
        OSError: there is no connection.
        UnicodeError: the address cannot be a host's.
    """
    nonce = random.SystemRandom().getrandbits(31)
    answer = b""
    with socket.create_connection((address, port), answer_s) as connection, contextlib.suppress(OSError):
        connection.settimeout(answer_s)  # an OSError from here on: closed, or silent
        connection.sendall(struct.pack("=BIBI", _VALIDATE, _MAGIC, _PING, nonce))
        answer = connection.recv(4, socket.MSG_WAITALL)
    return answer == struct.pack("=I", nonce)


def _knows_protocol() -> bool:
    """Return True if a store of this torch answers the ping: only then does silence tell that something is none."""
    own = dist.TCPStore("127.0.0.1", 0, 1, is_master=True, wait_for_workers=False)
    return _answers_ping("127.0.0.1", own.port, _ANSWER_S)


def _client(world: World) -> dist.TCPStore:
    return dist.TCPStore(world.address, world.port, is_master=False, timeout=_TIMEOUT, wait_for_workers=False)


def _host(world: World, limit_s: float) -> dist.Store:
    """Start the store on the world's port, and check that the world's address leads to it."""
    listener = listen_for(world, min(_PORT_S, limit_s))
    is_own = is_of_this_machine(world.address)
    store = dist.TCPStore(
        world.address if is_own else "127.0.0.1", world.port, is_master=True, timeout=_TIMEOUT, wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )  # fmt: skip
    if not is_own:  # another machine's address, or one that leads here all the same, as that of a container's host may
        _find_own(world, store, limit_s)
    return store


def _find_own(world: World, store: dist.Store, limit_s: float) -> None:
    """Check that the store is found at the world's address.

    Raises:
        UserError: the address leads somewhere else.
    """
    token = f"{random.SystemRandom().getrandbits(64):x}"
    store.set("token", token)
    until = time.monotonic() + limit_s
    while True:
        obstacle = find_obstacle(world.address, world.port, min(_ANSWER_S, limit_s))
        if obstacle is None:
            with contextlib.suppress(dist.DistError):
                seen = _client(world)
                if seen.check(["token"]) and seen.get("token").decode() == token:
                    return
            obstacle = ANOTHER_JOB
        if time.monotonic() >= until or not obstacle.is_hopeless:
            raise UserError(
                f"rank 0 runs on {socket.gethostname()}, but {world.endpoint} does not lead there ({obstacle.reason}): "
                "set MASTER_ADDR to an address of rank 0's own node"
            )
        time.sleep(_SLOWEST_POLL_S)
