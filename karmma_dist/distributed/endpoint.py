"""The place where the ranks meet, MASTER_ADDR:MASTER_PORT, as sockets see it; without torch, for `doctor`."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass

from karmma_dist.distributed.world import World
from karmma_dist.errors import UserError

_BACKLOG = 2048
_RETRY_S = 0.5


@dataclass(frozen=True)
class Obstacle:
    """A reason why the store cannot be reached at this moment."""

    reason: str
    advice: str
    is_hopeless: bool = True
    """True if waiting does not help."""


def hosts_store(world: World, environment: Mapping[str, str] = os.environ) -> bool:
    """Return True if this process hosts the store: rank 0, unless torchrun's agent hosts it."""
    return world.rank == 0 and environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def check_endpoint(world: World, *, hosts: bool) -> None:
    """Check, without a meeting, what this rank can tell of the world's address and port.

    Raises:
        UserError: the name does not resolve, or, on the rank that hosts the store, the port cannot be opened.
    """
    try:
        socket.getaddrinfo(world.address, world.port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        raise UserError(f"{world.endpoint}: {unresolved(error).reason}: {unresolved(error).advice}") from None
    if hosts:
        listen_for(world, 0.0).close()


def unresolved(error: OSError | UnicodeError) -> Obstacle:
    """Return the obstacle of an address that the system cannot resolve."""
    reason = f"the name does not resolve ({getattr(error, 'strerror', None) or 'not a host name'})"
    return Obstacle(reason, "set MASTER_ADDR to a name or address of rank 0's node that this node knows")


def is_of_this_machine(address: str) -> bool:
    """Return True if a name or address belongs to this machine; False if it does not, or does not resolve."""
    try:
        places = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError):
        return False
    for family, kind, protocol, _, place in places:
        with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as probe:
            probe.bind(place)
            return True
    return False


def listen_for(world: World, limit_s: float) -> socket.socket:
    """Return a socket that listens on the world's port, retrying for `limit_s` seconds if it is in use.

    Raises:
        UserError: the port cannot be opened.
    """
    until = time.monotonic() + limit_s
    while True:
        try:
            return listen(world.port)
        except OSError as error:
            is_used = error.errno == errno.EADDRINUSE
            if is_used and time.monotonic() < until:
                time.sleep(_RETRY_S)
                continue
            reason = "another program has this port" if is_used else error.strerror or str(error)
            raise UserError(
                f"rank 0 ({socket.gethostname()}) cannot listen at {world.endpoint}: {reason}: set another MASTER_PORT"
            ) from None


def listen(port: int) -> socket.socket:
    """Return a socket that listens on a port of all addresses of this machine, IPv6 and IPv4.

    Raises:
        OSError: the port cannot be opened.
    """
    listener = None
    try:
        listener = socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        return _bound(listener, "::", port)
    except OSError as error:
        if listener is not None:
            listener.close()
        if error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL, errno.ENOPROTOOPT):
            raise
    return _bound(socket.socket(socket.AF_INET, socket.SOCK_STREAM), "", port)  # a machine without IPv6


def _bound(listener: socket.socket, address: str, port: int) -> socket.socket:
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        listener.listen(_BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener
