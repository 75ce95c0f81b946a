"""A proxy between a client and a server that remembers every request, and loses some of them or their answers.

    with witness(server.endpoint) as between:
        store = open_store(url, {**server.options, "endpoint_url": between.endpoint})
        between.lose("POST .*uploadId=", answered=True)     # carried out, and the client never hears of it
        between.answer("GET ", 503, "SlowDown")             # not carried out

It passes on what it gets byte by byte, so signatures hold.
"""

import contextlib
import http.client
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Fate = Callable[[BaseHTTPRequestHandler, bytes], None]


@dataclass
class _Rule:
    pattern: str
    times: int
    fate: Fate


class Witness:
    """What came by, and what shall befall it."""

    def __init__(self, upstream: str) -> None:
        self.endpoint = ""
        self._upstream = upstream.removeprefix("http://")
        self._rules: list[_Rule] = []
        self._seen: list[tuple[float, str]] = []
        self._lock = threading.Lock()

    def seen(self, pattern: str = "") -> list[str]:
        """Requests in order, "PUT /bucket/key?partNumber=1", that the pattern finds something in."""
        with self._lock:
            return [line for _, line in self._seen if re.search(pattern, line)]

    def seen_at(self, pattern: str) -> list[float]:
        """When they came, in seconds of a steady clock."""
        with self._lock:
            return [at for at, line in self._seen if re.search(pattern, line)]

    def forget(self) -> None:
        with self._lock:
            self._seen.clear()

    def lose(self, pattern: str, times: int = 1, *, answered: bool) -> None:
        """Cut the connection of the next requests: after the server carried them out, or before it knew."""

        def cut(handler: BaseHTTPRequestHandler, body: bytes) -> None:
            if answered:
                self._forward(handler, body)
            handler.close_connection = True
            with contextlib.suppress(OSError):
                handler.connection.shutdown(socket.SHUT_RDWR)

        self._rules.append(_Rule(pattern, times, cut))

    def answer(
        self,
        pattern: str,
        status: int,
        code: str,
        times: int = 1,
        *,
        carried_out: bool = False,
        headers: dict[str, str] | None = None,
    ) -> None:
        """Answer the next requests with an error, whether or not they are carried out."""

        def refuse(handler: BaseHTTPRequestHandler, body: bytes) -> None:
            if carried_out:
                self._forward(handler, body)
            content = f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()
            _reply(handler, status, list((headers or {}).items()), content)

        self._rules.append(_Rule(pattern, times, refuse))

    def handle(self, handler: BaseHTTPRequestHandler) -> None:
        """Let one request meet its fate."""
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        line = f"{handler.command} {handler.path}"
        with self._lock:
            self._seen.append((time.monotonic(), line))
            rule = next((rule for rule in self._rules if rule.times and re.search(rule.pattern, line)), None)
            if rule:
                rule.times -= 1
        if rule:
            rule.fate(handler, body)
        else:
            status, headers, content = self._forward(handler, body)
            _reply(handler, status, headers, content)

    def _forward(self, handler: BaseHTTPRequestHandler, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(self._upstream, timeout=60)
        with contextlib.closing(connection):
            connection.putrequest(handler.command, handler.path, skip_host=True, skip_accept_encoding=True)
            for name, value in handler.headers.items():
                connection.putheader(name, value)
            connection.endheaders(body)
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()


def _reply(handler: BaseHTTPRequestHandler, status: int, headers: list[tuple[str, str]], content: bytes) -> None:
    handler.send_response_only(status)
    hop_by_hop = (
        ("transfer-encoding", "connection")
        if handler.command == "HEAD"
        else ("transfer-encoding", "connection", "content-length")
    )
    for name, value in headers:
        if name.lower() not in hop_by_hop:
            handler.send_header(name, value)
    if handler.command != "HEAD":
        handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    if handler.command != "HEAD":
        handler.wfile.write(content)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def handle_it(self) -> None:
        raise NotImplementedError

    def _handle(self) -> None:
        with contextlib.suppress(ConnectionError):
            self.handle_it()

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _handle

    def log_message(self, format: str, *_: object) -> None:
        pass


@contextlib.contextmanager
def _serving(handler: type[_Handler]) -> Iterator[str]:
    """A server's endpoint while it serves. Connections that clients keep open do not hold up its end."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.block_on_close, server.daemon_threads = False, True
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


@contextlib.contextmanager
def witness(upstream: str) -> Iterator[Witness]:
    """Stand between clients and the server at this endpoint."""
    between = Witness(upstream)

    class Handler(_Handler):
        def handle_it(self) -> None:
            between.handle(self)

    with _serving(Handler) as between.endpoint:
        yield between


@contextlib.contextmanager
def swallowing() -> Iterator[str]:
    """A server that takes every S3 upload and keeps nothing, for as long and as much as you like: its endpoint."""
    begun = b"<InitiateMultipartUploadResult><UploadId>1</UploadId></InitiateMultipartUploadResult>"
    completed = b'<CompleteMultipartUploadResult><ETag>"1"</ETag></CompleteMultipartUploadResult>'

    class Handler(_Handler):
        def handle_it(self) -> None:
            left = int(self.headers.get("Content-Length") or 0)
            while left:
                left -= len(self.rfile.read(min(left, 1 << 16)))
            content = b"" if self.command == "PUT" else begun if "uploads" in self.path else completed
            _reply(self, 200, [("ETag", '"1"')], content)

    with _serving(Handler) as endpoint:
        yield endpoint


@contextlib.contextmanager
def giving(size: int, *, ranges: bool = True) -> Iterator[str]:
    """A server where every object is so many zeros: its endpoint.

    Args:
        ranges: whether it heeds Range; else it gives all.
    """
    headers = [("ETag", '"1"'), ("Last-Modified", "Mon, 23 Nov 2026 17:00:00 GMT")]

    class Handler(_Handler):
        def handle_it(self) -> None:
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if not ranges or asked is None:
                _reply(self, 200, headers, bytes(size))
                return
            start, last = int(asked[1]), min(int(asked[2]), size - 1)
            given = ("Content-Range", f"bytes {start}-{last}/{size}")
            _reply(self, 206, [*headers, given], bytes(last + 1 - start))

    with _serving(Handler) as endpoint:
        yield endpoint


@contextlib.contextmanager
def mute() -> Iterator[str]:
    """A server that accepts connections, reads no more than its kernel's buffers take, and never says a word."""
    with socket.socket() as listener, contextlib.ExitStack() as accepted:
        listener.bind(("127.0.0.1", 0))
        listener.listen()

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    accepted.enter_context(listener.accept()[0])

        thread = threading.Thread(target=accept)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
