"""The rendezvous: ranks that can meet do so, and whatever keeps them apart is one line that says what, and where.

Ranks are threads with a store each; what they meet instead of rank 0 are small servers on free ports.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch.distributed as dist

from karmma_dist.distributed import endpoint, job_store
from karmma_dist.distributed import rendezvous as module
from karmma_dist.distributed.endpoint import is_of_this_machine, listen
from karmma_dist.distributed.job_store import find_obstacle
from karmma_dist.distributed.rendezvous import rendezvous
from karmma_dist.distributed.world import World, free_port
from karmma_dist.errors import LostRank, UserError
from kits.patience import HANGS_S

LATE_S, HOPELESS_S = 20.0, 2.0


@contextlib.contextmanager
def meeting(*worlds: World, **keywords: Any) -> Iterator[list[Future[dist.Store]]]:
    """Let ranks meet, each in a thread."""
    arguments: dict[str, Any] = {"environment": {}, "late_s": LATE_S, "hopeless_s": HOPELESS_S, **keywords}
    with ThreadPoolExecutor(len(worlds)) as pool:
        yield [pool.submit(rendezvous, world, **arguments) for world in worlds]


def ranks(size: int, *numbers: int, address: str = "127.0.0.1") -> list[World]:
    """Return the worlds of ranks (all of them, or those with the given numbers) that meet on a free port."""
    port = free_port()
    return [World(rank, 0, size, address, port) for rank in numbers or range(size)]


def errors(*worlds: World, **keywords: Any) -> list[str]:
    """Return the error of each rank; all must be for the user, in one line."""
    with meeting(*worlds, **keywords) as futures:
        raised = [future.exception(timeout=HANGS_S) for future in futures]
    for error in raised:
        assert isinstance(error, UserError | LostRank), error
        assert "\n" not in str(error)
    return [str(error) for error in raised]


def has_ipv6() -> bool:
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as probe:
        probe.bind(("::1", 0))
        return True
    return False


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "localhost", pytest.param("::1", marks=pytest.mark.skipif(not has_ipv6(), reason="needs IPv6"))],
)
def test_ranks_meet_at_a_name_and_at_addresses_of_both_kinds(address: str) -> None:
    with meeting(*ranks(3, address=address)) as futures:
        stores = [future.result(timeout=HANGS_S) for future in futures]
        stores[1].set("key", "value")
        assert {store.get("key") for store in stores} == {b"value"}


def test_one_rank_needs_neither_address_nor_port() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        store = rendezvous(World(0, 0, 1, "no-such-host.invalid", taken.getsockname()[1]))
    store.set("key", "value")
    assert store.get("key") == b"value"


def test_a_late_rank_is_waited_for_and_named_on_one_rank(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(job_store, "_FIRST_LINE_S", 0.0)
    monkeypatch.setattr(job_store, "_NEXT_LINE_S", 0.1)
    printed = threading.Event()
    print_line = job_store.print_line

    def print_and_tell(text: str, *, err: bool) -> None:
        print_line(text, err=err)
        if "ranks 1, 3" in text:
            printed.set()

    monkeypatch.setattr(job_store, "print_line", print_and_tell)
    first, second, third, fourth = ranks(4)
    with meeting(first, third) as early:
        assert printed.wait(LATE_S)
        with meeting(second, fourth) as late:
            assert len([future.result(timeout=HANGS_S) for future in (*early, *late)]) == 4
    lines = capsys.readouterr().err.splitlines()
    assert f"waiting for ranks 1, 3 at 127.0.0.1:{first.port} (2 of 4 ranks are there)" in lines


def test_a_rank_that_is_there_before_rank_0_waits_for_it() -> None:
    first, second = ranks(2)
    with meeting(second) as early, meeting(first) as late:
        assert [future.result(timeout=HANGS_S) is not None for future in (*early, *late)] == [True, True]


def test_a_rank_that_never_comes_is_named_on_every_rank() -> None:
    worlds = ranks(12, 0, 5)
    messages = errors(*worlds, late_s=1.0)
    assert set(messages) == {messages[0]}
    assert messages[0].startswith(f"ranks 1, 2, 3, 4, 6, 7, 8, 9 and 2 more of 12 did not come at {worlds[0].endpoint}")


def test_without_rank_0_each_rank_names_the_address() -> None:
    (world,) = ranks(2, 1)
    (message,) = errors(world, late_s=1.0)
    assert message.startswith(f"cannot reach rank 0 at {world.endpoint} within ")
    assert "nothing listens there" in message


def test_two_processes_with_one_rank_end_all_and_the_missing_rank_is_named() -> None:
    worlds = ranks(3, 0, 1, 1)
    messages = errors(*worlds)
    assert set(messages) == {messages[0]}
    assert f"two processes are rank 1 of 3 at {worlds[0].endpoint}" in messages[0]
    assert messages[0].count(" pid ") == 2
    assert messages[0].endswith(("; rank 2 did not come", "; ranks 0, 2 did not come"))


def test_a_third_process_does_not_disturb_ranks_that_have_met() -> None:
    first, second = ranks(2)
    with meeting(first, second) as futures:
        stores = [future.result(timeout=HANGS_S) for future in futures]
        (message,) = errors(second)
        assert "two processes are rank 1 of 2" in message
        assert not dist.PrefixStore("rendezvous", stores[0]).check(["problem"])


def test_ranks_of_different_world_sizes_end_all() -> None:
    first, second = ranks(2)
    messages = errors(first, World(1, 0, 4, second.address, second.port))
    assert set(messages) == {messages[0]}
    assert "WORLD_SIZE=" in messages[0]
    assert first.endpoint in messages[0]


def test_a_rank_of_another_job_leaves_this_job_alone() -> None:
    first, second = ranks(2)
    slurm = [{"SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_ID": job, "SLURM_STEP_ID": "0"} for job in ("1", "10001")]
    with meeting(first, environment=slurm[0]) as early:
        (message,) = errors(second, environment=slurm[1], hopeless_s=LATE_S)  # a busy machine answers late
        assert "the ranks of another job meet there" in message
        with meeting(second, environment=slurm[0]) as late:
            assert [future.result(timeout=HANGS_S) is not None for future in (*early, *late)] == [True, True]


def test_a_rank_that_dies_while_it_waits_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, third = ranks(3)
    wait = module._Meeting.wait

    def die_as_rank_1(self: module._Meeting, late_s: float, hopeless_s: float) -> None:
        if self.world.rank != 1:
            wait(self, late_s, hopeless_s)

    monkeypatch.setattr(module._Meeting, "wait", die_as_rank_1)
    with meeting(second), meeting(first, third) as futures:
        for future in futures:
            with pytest.raises(UserError, match="rank 1 of 3 came, and ended"):
                future.result(timeout=HANGS_S)


RANK_0_DIES = """
import os, sys
from karmma_dist.distributed import rendezvous as module
from karmma_dist.distributed.world import World
def wait_and_die(self, *_):
    print("arrived", flush=True)
    self._keys.wait(["rank/1"])
    os._exit(9)
module._Meeting.wait = wait_and_die
module.rendezvous(World(0, 0, 3, "127.0.0.1", int(sys.argv[1])), {})
"""


def test_rank_0_that_dies_before_all_have_met_is_named() -> None:
    _, second = ranks(3, 0, 1)
    command = [sys.executable, "-c", RANK_0_DIES, str(second.port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == b"arrived\n"
        with meeting(second) as (future,):
            error = future.exception(timeout=HANGS_S)
    assert isinstance(error, LostRank)
    assert str(error) == f"error: rank 0 at {second.endpoint} ended before all ranks had met"
    assert error.exit_code == 2


def answer_like_a_web_server(connection: socket.socket) -> None:
    connection.recv(1000)
    connection.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
    connection.close()


STRANGERS: Mapping[str, Callable[[socket.socket], None]] = {
    "a web server": answer_like_a_web_server,
    "a silent program": lambda connection: None,  # noqa: ARG005
    "a program that hangs up": socket.socket.close,
    "a program that speaks first": lambda connection: connection.sendall(b"\xff" * 64),
}


@contextlib.contextmanager
def serving(behave: Callable[[socket.socket], None]) -> Iterator[int]:
    """Serve on a port of all addresses until the block ends; yield the port."""
    connections: list[socket.socket] = []
    with listen(0) as listener:

        def run() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connections.append(listener.accept()[0])
                    behave(connections[-1])

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(HANGS_S)
    for connection in connections:
        connection.close()


@pytest.mark.parametrize("name", STRANGERS)
def test_a_port_of_another_program_is_named_on_every_rank(name: str) -> None:
    with serving(STRANGERS[name]) as port:
        first, second = errors(*(World(rank, 0, 2, "127.0.0.1", port) for rank in range(2)))
    assert f"cannot listen at 127.0.0.1:{port}: another program has this port: set another MASTER_PORT" in first
    assert f"cannot reach rank 0 at 127.0.0.1:{port}" in second
    assert second.endswith(": set another MASTER_PORT")


def test_a_port_that_is_free_again_soon_is_taken() -> None:
    first, second = ranks(2)
    taken = listen(first.port)
    closing = threading.Timer(0.5, taken.close)
    closing.start()
    with meeting(first, second) as futures:
        assert all(future.result(timeout=HANGS_S) is not None for future in futures)
    closing.join()


def test_a_port_that_may_not_be_opened_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(port: int) -> None:  # noqa: ARG001
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(endpoint, "listen", refuse)
    (message,) = errors(*ranks(2, 0))
    assert "Permission denied: set another MASTER_PORT" in message


def test_a_name_that_does_not_resolve_is_named_on_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    resolve = socket.getaddrinfo

    def refuse(host: str, *arguments: Any, **keywords: Any) -> Any:
        if host == "n1":
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return resolve(host, *arguments, **keywords)

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    worlds = ranks(2, address="n1")
    for message in errors(*worlds, hopeless_s=0.5):
        assert worlds[0].endpoint in message
        assert "the name does not resolve (Name or service not known)" in message
        assert "MASTER_ADDR" in message


def test_a_name_that_resolves_after_a_while_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    resolve, fails = socket.getaddrinfo, iter([True, True])

    def resolve_later(host: str, *arguments: Any, **keywords: Any) -> Any:
        if host == "localhost" and next(fails, False):
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return resolve(host, *arguments, **keywords)

    monkeypatch.setattr(socket, "getaddrinfo", resolve_later)
    with meeting(*ranks(2, address="localhost")) as futures:
        assert all(future.result(timeout=HANGS_S) is not None for future in futures)


@contextlib.contextmanager
def unanswered() -> Iterator[tuple[str, int]]:
    """Yield an address at which connections are not answered: the queue of its listener is full."""
    with socket.socket() as listener, contextlib.ExitStack() as stack:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        yield listener.getsockname()


def test_a_machine_that_does_not_answer_is_named() -> None:
    with unanswered() as (address, port):
        (message,) = errors(World(1, 0, 2, address, port), hopeless_s=1.0)
    assert message.startswith(f"cannot reach rank 0 at {address}:{port} within ")
    assert "no answer" in message
    assert "firewall" in message


def test_rank_0_on_another_machine_than_its_address_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_store, "is_of_this_machine", lambda address: False)  # noqa: ARG005
    other = dist.TCPStore("127.0.0.1", 0, 1, is_master=True, wait_for_workers=False)  # the store of another job
    find = job_store.find_obstacle
    monkeypatch.setattr(job_store, "find_obstacle", lambda _, __, answer_s: find("127.0.0.1", other.port, answer_s))
    client = dist.TCPStore("127.0.0.1", other.port, is_master=False, wait_for_workers=False)
    monkeypatch.setattr(job_store, "_client", lambda world: client)  # noqa: ARG005
    (message,) = errors(*ranks(2, 0), hopeless_s=0.5)
    assert "does not lead there" in message
    assert message.endswith("set MASTER_ADDR to an address of rank 0's own node")


def test_an_address_that_leads_to_rank_0_in_a_roundabout_way_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_store, "is_of_this_machine", lambda address: False)  # noqa: ARG005
    with meeting(*ranks(2)) as futures:
        assert all(future.result(timeout=HANGS_S) is not None for future in futures)


def test_addresses_of_this_machine_are_known() -> None:
    assert is_of_this_machine("127.0.0.1")
    assert is_of_this_machine("localhost")
    assert not is_of_this_machine("192.0.2.7")  # TEST-NET-1, of nobody
    assert not is_of_this_machine("no-such-host.invalid")


def test_a_store_whose_protocol_is_unknown_counts_as_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_store, "_PING", 99)
    store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True, wait_for_workers=False)
    assert find_obstacle("127.0.0.1", store.port, 1.0) is None
