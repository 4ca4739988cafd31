"""No server keeps a download going: size and rate have limits, and room is made before."""

from __future__ import annotations

import gzip
import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.spec import AbstractFileSystem
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from karmma_dist.errors import UserError
from karmma_dist.io import cache as cache_module
from karmma_dist.io import disk_errors, download, transfer
from karmma_dist.io.cache import Cache, Content, FetchError
from karmma_dist.io.download import fetch, fetch_json
from karmma_dist.models import weights
from karmma_dist.shards import remote
from karmma_dist.shards.format import MANIFEST
from karmma_dist.shards.remote import RemoteShards
from kits.web_server import Fault, Handler, Server, serving

pytestmark = pytest.mark.usefixtures("downloads_at_once")

DATA = bytes(range(256)) * 400
NAME = "file.bin"
BLOCK = bytes(50_000)
MOST_SENT = 200 * len(BLOCK)
"""Bytes after which a server without an end gives up, so that a test that fails ends."""


def content_of(data: bytes) -> Content:
    return Content(hashlib.sha256(data).hexdigest(), len(data))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / NAME).write_bytes(DATA)
    with serving(folder) as running:
        yield running


def head(handler: Handler, **headers: str) -> None:
    handler.send_response(200)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.close_connection = True


def send_without_end(handler: Handler, wrap: Callable[[bytes], bytes] = bytes) -> None:
    for _ in range(MOST_SENT // len(BLOCK)):
        handler.wfile.write(wrap(BLOCK))


def endless(handler: Handler, _: bytes) -> None:
    head(handler)
    send_without_end(handler)


def endless_chunks(handler: Handler, _: bytes) -> None:
    handler.protocol_version = "HTTP/1.1"
    head(handler, Transfer_Encoding="chunked")
    send_without_end(handler, lambda block: b"%x\r\n%s\r\n" % (len(block), block))


def endless_declared(handler: Handler, _: bytes) -> None:
    head(handler, Content_Length=str(10**15))
    send_without_end(handler)


def bomb(handler: Handler, _: bytes) -> None:
    packed = gzip.compress(bytes(MOST_SENT))
    head(handler, Content_Encoding="gzip", Content_Length=str(len(packed)))
    handler.wfile.write(packed)


def longer_than_declared(handler: Handler, body: bytes) -> None:
    """Send more than the Content-Length, which is right."""
    head(handler, Content_Length=str(len(body)))
    handler.wfile.write(body)
    send_without_end(handler)


def redirects(handler: Handler, _: bytes) -> None:
    handler.send_response(302)
    handler.send_header("Location", handler.path)
    handler.send_header("Content-Length", "0")
    handler.end_headers()


def endless_headers(handler: Handler, _: bytes) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    for number in range(MOST_SENT // 20):
        handler.wfile.write(b"X-%08d: 12345678\r\n" % number)


def slow_headers(handler: Handler, _: bytes) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    while not handler.server.release.wait(0.02):
        handler.wfile.write(b"X: 1\r\n")


def slow_body(handler: Handler, body: bytes) -> None:
    head(handler, Content_Length=str(len(body)))
    for number in range(len(body)):
        if handler.server.release.wait(0.02):
            return
        handler.wfile.write(body[number : number + 1])
        handler.wfile.flush()


ENDLESS = [endless, endless_chunks, endless_declared, bomb]


def written(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets the size of the file at each write."""
    sizes = [0]
    sink = transfer.Sink.count

    def count(self: transfer.Sink, num_bytes: int) -> None:
        sink(self, num_bytes)
        sizes.append(self.done)

    monkeypatch.setattr(transfer.Sink, "count", count)
    return sizes


@pytest.mark.parametrize("answer", ENDLESS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("content", [content_of(DATA), Content(None, None, "x", 70_000)], ids=["declared", "limit"])
def test_no_file_gets_a_byte_more_than_it_may_have(
    server: Server, tmp_path: Path, answer: Fault, content: Content, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = written(monkeypatch)
    server.faults[NAME] = [answer] * 100
    with pytest.raises(FetchError) as caught:
        fetch(server.url_of(NAME), content, tmp_path / "out")
    assert caught.value.damaged
    assert str(content.most_bytes) in caught.value.what
    assert max(sizes) <= content.most_bytes
    assert server.asked[NAME] == (download.TRIES if content.size else 1)


def test_what_follows_the_declared_length_is_not_read(server: Server, tmp_path: Path) -> None:
    server.faults[NAME] = [longer_than_declared]
    fetch(server.url_of(NAME), content_of(DATA), tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == DATA


@pytest.mark.parametrize("answer", ENDLESS, ids=lambda f: f.__name__)
def test_json_without_an_end_is_refused_after_one_try(server: Server, answer: Fault) -> None:
    server.faults[NAME] = [answer] * 100
    with pytest.raises(FetchError, match="more than 1000 bytes, which no such file has"):
        fetch_json(server.url_of(NAME), 1000)
    assert server.asked[NAME] == 1


@given(size=st.integers(0, 3000), most=st.integers(0, 3000))
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_file_is_taken_just_when_it_is_not_larger_than_allowed(
    server: Server, tmp_path: Path, size: int, most: int
) -> None:
    (server.folder / "n").write_bytes(bytes(size))
    for url in (server.url_of("n"), f"file://{server.folder}/n"):
        if size <= most:
            fetch(url, Content(None, None, url, most), tmp_path / "out")
            assert (tmp_path / "out").stat().st_size == size
        else:
            with pytest.raises(FetchError, match=f"more than {most} bytes"):
                fetch(url, Content(None, None, url, most), tmp_path / "out")


def test_redirects_in_a_circle_are_one_line(server: Server, tmp_path: Path) -> None:
    server.faults[NAME] = [redirects] * 100
    with pytest.raises(FetchError, match="redirects without an end"):
        fetch(server.url_of(NAME), content_of(DATA), tmp_path / "out")
    assert server.asked[NAME] < 30


def test_headers_without_an_end_are_one_line(server: Server, tmp_path: Path) -> None:
    server.faults[NAME] = [endless_headers] * 100
    with pytest.raises(FetchError, match=r"refused|cannot be reached"):
        fetch(server.url_of(NAME), content_of(DATA), tmp_path / "out")
    assert server.asked[NAME] <= download.TRIES


@pytest.mark.parametrize(("answer", "said"), [(slow_headers, "too slow: 0 bytes"), (slow_body, "broke off after")])
def test_a_server_that_hardly_sends_anything_is_left(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: Fault, said: str
) -> None:
    monkeypatch.setattr(transfer, "WINDOW_S", 0.3)
    monkeypatch.setattr(transfer, "LEAST_BYTES", 10_000)
    server.faults[NAME] = [answer] * 100
    with pytest.raises(FetchError) as caught:
        fetch(server.url_of(NAME), content_of(DATA), tmp_path / "out")
    assert said in caught.value.what
    assert "too slow" in caught.value.what
    assert "in 0.3 s" in caught.value.what
    assert server.asked[NAME] == download.TRIES


def test_a_file_shorter_than_a_window_needs_no_rate(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "LEAST_BYTES", 10**9)
    fetch(server.url_of(NAME), content_of(DATA), tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == DATA


class Stalling(AbstractFileSystem):
    """A file system whose files never give their bytes."""

    protocol = "stalling"
    release = threading.Event()

    def _open(self, path: str, mode: str = "rb", **_: Any) -> Any:  # noqa: ARG002
        return self

    def __enter__(self) -> Stalling:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def read(self, _: int = -1) -> bytes:
        self.release.wait()
        return b""


def test_other_protocols_cannot_stall_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.register_implementation("stalling", Stalling, clobber=True)
    monkeypatch.setattr(transfer, "BLOCK_WINDOW_S", 0.1)
    try:
        with pytest.raises(FetchError, match=r"too slow: 0 bytes in 0\.1 s, after 5 tries"):
            fetch("stalling://a/b", content_of(DATA), tmp_path / "out")
    finally:
        Stalling.release.set()


def test_a_device_at_a_url_ends(tmp_path: Path) -> None:
    with pytest.raises(FetchError, match="more than 70000 bytes"):
        fetch("file:///dev/zero", Content(None, None, "x", 70_000), tmp_path / "out")
    assert (tmp_path / "out").stat().st_size <= 70_000


def test_a_manifest_without_an_end_is_one_line(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_MANIFEST_BYTES", 1000)
    server.faults[MANIFEST] = [endless]
    with pytest.raises(UserError, match=r"manifest\.json: more than 1000 bytes, which no such file has: is this the"):
        RemoteShards(server.url, Cache(tmp_path / "cache"))


def test_an_index_without_an_end_is_one_line(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_INDEX_BYTES", 100)
    monkeypatch.setattr(remote, "_INDEX_BYTES_OF_A_CLIP", 1)
    with serving(shards) as server:
        folder = RemoteShards(server.url, Cache(tmp_path / "cache"))
        with pytest.raises(UserError, match=r"index cannot be read \(more than 10[0-9] bytes"):
            folder.clips("train")


def test_weights_without_an_end_are_one_line(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "MOST_BYTES", 1000)
    server.faults[NAME] = [endless]
    with pytest.raises(UserError, match="more than 1000 bytes"):
        weights._download(server.url_of(NAME), None, str(tmp_path / "cache"), lambda *_: None)
    assert [path.name for path in (tmp_path / "cache" / "weights").iterdir()] == [".lock"] or not list(
        (tmp_path / "cache" / "weights").iterdir()
    )


def put(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def test_old_entries_go_before_the_download_and_not_after(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 1000)
    for letter in b"abc":
        data = bytes([letter]) * 400

        def look(path: Path, data: bytes = data) -> None:
            kept = sum(entry.stat().st_size for entry in tmp_path.iterdir() if not entry.name.startswith("."))
            assert kept + len(data) <= 1000
            put(path, data)

        os.close(cache.open(content_of(data), look))


def never(_: Path) -> None:
    raise AssertionError("must not be downloaded")


@pytest.mark.parametrize("size", [1001, 10**6, 2**62])
def test_what_cannot_fit_is_not_downloaded_and_nothing_is_removed_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    os.close(Cache(tmp_path).open(content_of(b"kept"), lambda path: put(path, b"kept")))
    with pytest.raises(UserError, match=rf"{size} bytes does not fit into data.cache_bytes \(1000\): raise it"):
        Cache(tmp_path, 1000).open(Content("0" * 64, size), never)
    monkeypatch.setattr(cache_module, "free_bytes", lambda _: 990)
    with pytest.raises(UserError, match=f"no room for a file of {size} bytes: 990 bytes of its disk are free, 4 are"):
        Cache(tmp_path).open(Content("0" * 64, size), never)
    assert (tmp_path / content_of(b"kept").name).read_bytes() == b"kept"


def test_entries_make_room_on_a_full_disk_in_order_of_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(tmp_path)
    parts = [bytes([letter]) * 100 for letter in b"abcd"]
    for age, data in enumerate(parts[:3]):
        os.close(cache.open(content_of(data), lambda path, data=data: put(path, data)))
        os.utime(tmp_path / content_of(data).name, (age, age))
    monkeypatch.setattr(cache_module, "free_bytes", lambda _: 0)
    os.close(cache.open(content_of(parts[3]), lambda path: put(path, parts[3])))
    assert {path.name for path in tmp_path.iterdir()} == {".lock", *(content_of(data).name for data in parts[1:])}


def test_a_declared_length_that_the_disk_cannot_hold_is_refused_before_the_first_byte(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = written(monkeypatch)
    monkeypatch.setattr(transfer, "free_bytes", lambda _: len(DATA) - 1)
    with pytest.raises(disk_errors.DiskError, match=r"out: No space left on device: free some space in"):
        fetch(server.url_of(NAME), Content(None, None, "x"), tmp_path / "out")
    assert sizes == [0]
