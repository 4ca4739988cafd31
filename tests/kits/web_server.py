"""A web server on loopback that serves a folder and can be told to fail."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

FOLDER = "kitchen"
"""Path of its URLs."""

Fault = Callable[["Handler", bytes], None]
"""Function that answers one request in place of the requested file."""


class Server(ThreadingHTTPServer):
    """Serves a folder on loopback; `faults[name]` is used up by the requests for that file, one each."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.faults: dict[str, list[Fault]] = {}
        self.asked: Counter[str] = Counter()
        self.queries: set[str] = set()
        self.passwords: set[str | None] = set()
        self.guard = threading.Lock()
        self.reached, self.release = threading.Event(), threading.Event()

    @property
    def url(self) -> str:
        return self.url_of("").rstrip("/")

    def url_of(self, name: str, user: str = "", query: str = "") -> str:
        return f"http://{user}127.0.0.1:{self.server_port}/{FOLDER}/{name}{query}"

    def take(self, name: str, query: str, password: str | None) -> Fault | None:
        with self.guard:
            self.asked[name] += 1
            self.queries.add(query)
            self.passwords.add(password)
            return self.faults[name].pop(0) if self.faults.get(name) else None


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        name = parts.path.removeprefix(f"/{FOLDER}/")
        fault = self.server.take(name, parts.query, self.headers["Authorization"])
        path = self.server.folder / name
        with suppress(ConnectionError):
            if fault is None and not path.is_file():
                self.answer(404, b"")
            else:
                body = path.read_bytes() if path.is_file() else b""
                fault(self, body) if fault else self.answer(200, body)

    def answer(self, status: int, body: bytes, declared: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if declared is None else declared))
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Log nothing."""


def status(code: int) -> Fault:
    return lambda handler, _: handler.answer(code, b"no")


def cut(handler: Handler, body: bytes) -> None:
    handler.answer(200, body[: len(body) // 2], declared=len(body))


def short(handler: Handler, body: bytes) -> None:
    handler.answer(200, body[: len(body) // 2])


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    """Serve a folder inside the block."""
    running = Server(folder)
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield running
    finally:
        running.release.set()
        running.shutdown()
        thread.join()
        running.server_close()
