"""Many small HTTP requests to one server at once, cheaply.

An engine batches what arrives together, so requests that belong together must be in flight together: all are written
before the first reply is read. Measured with 512 single-prompt requests to vLLM on one core: 0.9 s and 0.1 s of this
process's CPU, against 5-12 s and 3-6 s through httpx, whose connection pool searches all its connections for each.

Promises: replies in the order of the requests; a failed connection is an EngineError, and closes all others, which
makes the server drop their work. A connection carries one request: one whose reply came early waits idle for its turn
to be read, and servers close idle ones (uvicorn after 5 s), so the next request on it would be lost.
Does not: retry, follow redirects, keep connections between calls.
"""

import http.client
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, urlsplit

from shared.errors import EngineError, UsageError

MAX_CONNECTIONS = 256


@dataclass(frozen=True)
class Request:
    """One request; a body is sent as JSON."""

    method: str
    path: str
    body: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Reply:
    """What came back, undecoded."""

    status: int
    content: bytes


def parse_server_url(url: str) -> SplitResult:
    """Check a server's URL.

    Raises:
        UsageError: not http or https, or no host.
    """
    parts = urlsplit(url.rstrip("/"))
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(f"not an engine's URL: {url!r}", op="connect", hint="Write it as http://HOST:PORT")
    return parts


def exchange(server: SplitResult, requests: Sequence[Request], *, op: str, timeout_s: float) -> list[Reply]:
    """Send all requests, at most MAX_CONNECTIONS in flight, and wait for all replies.

    Args:
        server: from `parse_server_url`.
        op: what errors call this.
        timeout_s: longest silence on one connection.

    Raises:
        EngineError: refused, cut off or silent; retryable.
    """
    width = min(MAX_CONNECTIONS, len(requests))
    connections = [_connection(server, timeout_s) for _ in range(width)]
    replies = []
    try:
        for connection, request in zip(connections, requests, strict=False):
            _send(connection, server, request)
        for number in range(len(requests)):
            connection = connections[number % width]
            response = connection.getresponse()
            replies.append(Reply(response.status, response.read()))
            connection.close()
            if number + width < len(requests):
                _send(connection, server, requests[number + width])
    except (OSError, http.client.HTTPException) as error:
        reason = str(error) or type(error).__name__
        raise EngineError(f"no answer from the engine: {reason}", op=op, key=server.geturl(), retryable=True) from error
    finally:
        for connection in connections:
            connection.close()
    return replies


def _connection(server: SplitResult, timeout_s: float) -> http.client.HTTPConnection:
    kind = http.client.HTTPSConnection if server.scheme == "https" else http.client.HTTPConnection
    return kind(server.hostname or "", server.port, timeout=timeout_s)


def _send(connection: http.client.HTTPConnection, server: SplitResult, request: Request) -> None:
    """Connect and write; the reply is not waited for."""
    body = None if request.body is None else json.dumps(request.body).encode()
    headers = {} if body is None else {"Content-Type": "application/json"}
    connection.request(request.method, server.path + request.path, body, headers)
