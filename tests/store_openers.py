"""Which stores the conformance suite runs on: the one list, and how each is opened.

A test that takes `opener` runs once for each of STORES. To add one, name it here, say how it is opened in `opened`, and
mark it if `make test` cannot start it. Real S3 servers come from the session fixtures named in SERVERS: anything with
`url(prefix)` and `options` will do.
"""

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shared.store import Store
from shared.stores import Client, open_store

Opener = Callable[[], Store]

# name: (the fixture of the server, the client)
SERVERS: dict[str, tuple[str, Client]] = {
    "s3": ("s3", "fsspec"),
    "s3-obstore": ("s3", "obstore"),
    "ceph": ("ceph", "fsspec"),
    "ceph-obstore": ("ceph", "obstore"),
}
ON_S3 = [
    "s3",
    "s3-obstore",
    pytest.param("ceph", marks=pytest.mark.ceph),
    pytest.param("ceph-obstore", marks=pytest.mark.ceph),
]
STORES = ["file", "memory", *ON_S3]


def opened(kind: str, request: pytest.FixtureRequest, folder: Path) -> Opener:
    """Opens the same empty store again and again, as several processes would."""
    name = uuid.uuid4().hex
    if kind == "file":
        return lambda: open_store(f"file://{folder}/{name}")
    if kind == "memory":
        return lambda: open_store(f"memory://{name}")
    fixture, client = SERVERS[kind]
    server: Any = request.getfixturevalue(fixture)
    return lambda: open_store(server.url(name), server.options, client)
