"""Committed versions of a few bytes, attempts that never were committed, and a store whose clock the test moves."""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from shared.base_model import BaseIdentity
from shared.catalog import Catalog
from shared.layout import Layout
from shared.manifest import LoraShape, Manifest, Parent, Shard
from shared.store import Entry, Store
from shared.versions import Version

ADAPTER = "policy"
LAYOUT = Layout(ADAPTER)
NONCE = "abc"


def put_attempt(store: Store, version: Version, size: int = 100) -> Shard:
    """What a publisher leaves that dies before its manifest: a shard."""
    content = f"{version} ".encode().ljust(size, b".")
    shard = Shard(
        f"{LAYOUT.attempt(version, NONCE)}/rank-00000.safetensors", size, (hashlib.sha256(content).hexdigest(),)
    )
    store.put(shard.key, content)
    return shard


def manifest_of(version: Version, shard: Shard, parent: Manifest | None = None, **training: Any) -> Manifest:
    """A manifest of no tensors: nobody here reads them."""
    return Manifest(
        adapter=ADAPTER,
        version=version,
        parent=Parent(parent.version, parent.digest) if parent else None,
        base=BaseIdentity("qwen3_moe", "c" * 64, "d" * 64),
        lora=LoraShape(4, 8, 4, ("linear_qkv",)),
        parallel={"tp": 1},
        encoding="bf16",
        shards=(shard,),
        tensors={},
        aliases={},
        training={"step": version.number, "submitted_at": 1_700_000_000.5, **training},
        canary=None,
    ).sealed()


def put_version(store: Store, version: Version, **training: Any) -> Manifest:
    """Commit a version, claiming its epoch."""
    store.put_if_absent(LAYOUT.epoch(version.epoch), b"{}")
    manifest = manifest_of(version, put_attempt(store, version), **training)
    assert store.put_if_absent(LAYOUT.manifest(version), manifest.to_bytes())
    return manifest


def put_versions(store: Store, numbers: Iterable[int], epoch: int = 1) -> list[Version]:
    """Commit several."""
    return [put_version(store, Version(epoch, number)).version for number in numbers]


def data_of(store: Store, version: Version) -> list[str]:
    """What lies under data/ for a version."""
    return [entry.key for entry in store.list(LAYOUT.attempt(version, NONCE))]


def alive(store: Store) -> list[int]:
    """The numbers of committed versions."""
    return [version.number for version in Catalog(store, ADAPTER).versions()]


@dataclass
class ClockedStore:
    """A store whose own clock stands until the test moves it.

    Args:
        before: called with the operation and the key before each change of the store; what it raises comes out.
    """

    inner: Store
    now: float = 1_700_000_000.0
    before: Callable[[str, str], None] = lambda _op, _key: None
    _written: dict[str, float] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def put(self, key: str, content: bytes) -> None:
        self.before("put", key)
        self.inner.put(key, content)
        self._written[key] = self.now

    def put_if_absent(self, key: str, content: bytes) -> bool:
        self.before("put if absent", key)
        stood = self.inner.list(key.rsplit("/", 1)[0])
        won = self.inner.put_if_absent(key, content)
        if key not in {entry.key for entry in stood}:
            self._written[key] = self.now
        return won

    def delete(self, key: str) -> None:
        self.before("delete", key)
        self.inner.delete(key)

    def list(self, prefix: str, after: str = "") -> list[Entry]:
        return [replace(e, modified=self._written.get(e.key, self.now)) for e in self.inner.list(prefix, after)]
