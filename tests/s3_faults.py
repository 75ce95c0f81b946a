"""What can befall a request to the test S3 server, switched on and off while it runs. See `s3_server.S3Server`.

Faults that hit once or for as long as they are told to: replies lost after the write was done, requests refused, writes
to certain keys held up and then dropped. And the weather, which falls on all requests alike.
"""

import contextlib
import io
import json
import random
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs

CONTROL = "/__control__"
RETRY_AFTER_S = 1
SLICE_S = 0.25  # a trickle comes in slices of so long

Environ = dict[str, Any]
StartResponse = Callable[..., Any]
Application = Callable[[Environ, StartResponse], Iterable[bytes]]


@dataclass(frozen=True)
class Weather:
    """What befalls every request from now on. Chance comes from one generator: a seed replays it, request by request.

    Attributes:
        error_percent: of requests; half are answered 500 after they were carried out, half 503 undone.
        throttle_percent: of requests; 503 SlowDown with Retry-After, undone.
        reset_percent: of requests; the connection is cut when more than `reset_after_bytes` of a body have passed,
            the request's or the answer's.
        trickle_bytes_per_s: how fast bodies pass, either way; 0 is at full speed.
        latency_s: before a request is looked at.
    """

    seed: int = 0
    error_percent: float = 0
    throttle_percent: float = 0
    reset_percent: float = 0
    reset_after_bytes: int = 0
    trickle_bytes_per_s: int = 0
    latency_s: float = 0


CALM = Weather()


class Faulty:
    """WSGI: the application behind one lock for conditional writes, a check of the signature, and the faults.

    Args:
        refusal: the error code for a request that may not be served, or None.
    """

    def __init__(self, application: Application, refusal: Callable[[Environ], str | None]) -> None:
        self._application, self._refusal, self._lock = application, refusal, threading.Lock()
        self._left = {"lose": 0, "refuse": 0}
        self._hold, self._held, self._changed = "", 0, threading.Condition()
        self._weather, self._chance = CALM, random.Random(0)

    def __call__(self, environ: Environ, start: StartResponse) -> Iterable[bytes]:
        if environ["PATH_INFO"] == CONTROL:
            return self._rule(parse_qs(environ["QUERY_STRING"], keep_blank_values=True), start)
        weather = self._weather
        reset_after = weather.reset_after_bytes if self._befalls(weather.reset_percent) else None
        self._pause(weather.latency_s)
        length = int(environ.get("CONTENT_LENGTH") or 0)
        if environ.get("HTTP_TRANSFER_ENCODING", "") != "chunked":
            environ["wsgi.input"] = io.BytesIO(self._receive(environ, length, reset_after))  # outside the lock
        if self._spend("refuse") or self._held_up(environ):
            return _error(environ, start, "503 Service Unavailable", "ServiceUnavailable")
        if self._befalls(weather.throttle_percent):
            wait = [("Retry-After", str(RETRY_AFTER_S))]
            return _error(environ, start, "503 Slow Down", "SlowDown", wait)
        failing = self._befalls(weather.error_percent)
        if failing and self._befalls(50):
            return _error(environ, start, "503 Service Unavailable", "ServiceUnavailable")
        if refusal := self._refusal(environ):
            return _error(environ, start, "403 Forbidden", refusal)
        if weather == CALM and not _is_conditional_write(environ):
            return self._application(environ, start)
        answer, body = self._answer(environ)
        if failing or (_is_conditional_write(environ) and self._spend("lose")):
            return _error(environ, start, "500 Internal Server Error", "InternalError")
        start(*answer)
        return self._send(environ, body, reset_after)

    def _answer(self, environ: Environ) -> tuple[tuple[Any, ...], bytes]:
        answers: list[tuple[Any, ...]] = []
        with self._lock if _is_conditional_write(environ) else contextlib.nullcontext():
            body = b"".join(self._application(environ, lambda *answer: answers.append(answer)))
        return answers[0], body

    def _rule(self, rule: dict[str, list[str]], start: StartResponse) -> Iterable[bytes]:
        """Change the faults; answers how many writes are held up."""
        with self._changed:
            for name, values in rule.items():
                if name == "hold":
                    self._hold = values[0]
                elif name == "weather":
                    self._weather = Weather(**json.loads(values[0]))
                    self._chance = random.Random(self._weather.seed)
                else:
                    self._left[name] = int(values[0])
            self._changed.notify_all()
            body = str(self._held).encode()
        start("200 OK", [("Content-Length", str(len(body)))])
        return [body]

    def _held_up(self, environ: Environ) -> bool:
        """Wait while a write is held; whether it was, and is to be dropped."""
        with self._changed:
            if environ["REQUEST_METHOD"] != "PUT" or not self._hold or self._hold not in environ["PATH_INFO"]:
                return False
            self._held += 1
            self._changed.wait_for(lambda: not self._hold)
            self._held -= 1
            return True

    def _spend(self, fault: str) -> bool:
        with self._lock:
            if self._left[fault] <= 0:
                return False
            self._left[fault] -= 1
            return True

    def _befalls(self, percent: float) -> bool:
        with self._changed:
            return percent > 0 and self._chance.uniform(0, 100) < percent

    def _pause(self, seconds: float) -> None:
        """Wait, but no longer than this weather lasts."""
        with self._changed:
            weather = self._weather
            self._changed.wait_for(lambda: self._weather is not weather, seconds)

    def _receive(self, environ: Environ, length: int, reset_after: int | None) -> bytes:
        body = bytearray()
        while missing := length - len(body):
            rate = self._weather.trickle_bytes_per_s
            size = min(missing, int(rate * SLICE_S) or missing)
            if reset_after is not None and len(body) + size > reset_after:
                _cut(environ)
            piece = environ["wsgi.input"].read(size)
            if not piece:
                raise ConnectionResetError("the client is gone")
            body += piece
            self._pause(SLICE_S if rate else 0)
        return bytes(body)

    def _send(self, environ: Environ, body: bytes, reset_after: int | None) -> Iterator[bytes]:
        sent = 0
        while sent < len(body):
            rate = self._weather.trickle_bytes_per_s
            piece = body[sent : sent + (int(rate * SLICE_S) or len(body))]
            if reset_after is not None and sent + len(piece) > reset_after:
                yield body[sent:reset_after]
                _cut(environ)
            yield piece
            sent += len(piece)
            self._pause(SLICE_S if rate else 0)


def _is_conditional_write(environ: Environ) -> bool:
    return environ["REQUEST_METHOD"] in ("PUT", "POST") and "HTTP_IF_NONE_MATCH" in environ


def _cut(environ: Environ) -> None:
    """End the connection in the middle of what it carries."""
    with contextlib.suppress(OSError):
        environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
    raise ConnectionResetError("cut")


def _error(
    environ: Environ, start: StartResponse, status: str, code: str, headers: Iterable[tuple[str, str]] = ()
) -> Iterable[bytes]:
    body = f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()
    start(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body))), *headers])
    return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]
