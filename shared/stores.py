"""From a URL to a store, and the test whether that store keeps the protocol."""

import contextlib
import uuid
from collections.abc import Mapping
from typing import Any, Literal

from shared.errors import StoreError, StoreUnfit, UsageError
from shared.local_store import LocalStore
from shared.store import Store

Client = Literal["fsspec", "obstore"]

S3_SCHEMES = ("s3", "s3a")


def open_store(url: str, options: Mapping[str, Any] | None = None, client: Client = "fsspec") -> Store:
    """Open the store at a URL; nothing is read or written yet.

    Args:
        url: file:///path, /path, s3://bucket/prefix, gs://, az://, memory://, or any scheme that fsspec knows.
        options: handed to the fsspec filesystem (endpoint_url, key, secret, ...). Without them the scheme's usual
            environment applies (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, ...).
        client: what speaks to an object store: fsspec's package for the scheme, or obstore. Directories and memory
            have one way only.

    Raises:
        UsageError: unknown scheme, no bucket, or the package is not installed.
    """
    scheme, _, path = url.partition("://") if "://" in url else ("file", "", url)
    if scheme in ("file", "local"):
        return LocalStore(url)
    if scheme != "memory" and not path.strip("/"):
        raise UsageError("no bucket in the store URL", op="open store", key=url, hint=f"Write {scheme}://bucket/prefix")
    if client == "obstore" and scheme != "memory":
        from shared.obstore_store import ObstoreStore

        return ObstoreStore(url, options or {})
    if scheme in S3_SCHEMES:
        from shared.s3_store import S3Store

        return S3Store(url, options or {})
    from shared.object_store import ObjectStore

    return ObjectStore(url, options or {})


def demand_shared(url: str) -> None:
    """Check that other processes see what is written at a URL.

    Raises:
        UsageError: a memory:// URL, which is one process's own.
    """
    if url.startswith("memory://"):
        problem = "memory:// is one process's own: trainer and nodes would not see each other"
        raise UsageError(problem, op="open store", key=url, hint="Use file:///path, s3://, gs:// or az://")


def probe(store: Store, prefix: str) -> None:
    """Test that the store keeps the protocol: put-if-absent twice, read back, list after put, delete.

    Raises:
        StoreUnfit: it does not.
        StoreError: it can't be reached or refuses (missing bucket, wrong credentials).
    """
    key = f"{prefix}/probe-{uuid.uuid4().hex}"
    hint = "Use a store with conditional writes (AWS S3, Ceph RGW, MinIO, GCS, Azure, a directory)"

    def demand(holds: bool, promise: str) -> None:
        if not holds:
            raise StoreUnfit(f"{store.url} does not keep: {promise}", op="probe store", hint=hint)

    demand(store.put_if_absent(key, b"first"), "the first put-if-absent wins")
    try:
        demand(not store.put_if_absent(key, b"second"), "put-if-absent never overwrites")
        demand(store.get(key) == b"first", "an object reads back as it was written")
        demand(any(e.key == key for e in store.list(prefix)), "a list sees every earlier write")
        demand(store.get_if_changed(key, "") is not None, "a conditional read of another tag gives the object")
    finally:
        with contextlib.suppress(StoreError):  # what went wrong above matters more than a leftover
            store.delete(key)
