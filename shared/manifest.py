"""The manifest of a version: what it holds, where the bytes lie, and what to demand of them. Putting it is the commit.

Promises: `Manifest.parse(m.to_bytes()) == m`; equal manifests are equal bytes, so racing committers of one version
write the same object (nothing is the committer's own: no host, and the one time in it, `training.submitted_at`, is from
rank 0's record); its own digest and its parent's digest make a chain. Only canonical bytes are read: a duplicate key,
NaN, a space or a second spelling of a number would not come out again as it went in, and is refused.
Does not: trust itself. Readers check its digest, then every part's, then names, shapes and values.

docs/format.md shows one, field by field.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from shared import strict_json, tensor_table
from shared.base_model import BaseIdentity
from shared.cycles import collection_paused
from shared.errors import Corrupt, LorasyncError
from shared.layout import LAYOUT
from shared.store import check_key
from shared.tensor_table import Tensor, count, text
from shared.versions import Version

MAX_MANIFEST_BYTES = 100_000_000  # a single request on every store: multipart creates race
VOID = b'{"layout":1,"void":true}'  # stands where a manifest was collected, or shall never be: no version
PART_BYTES = 16 << 20  # each part of a shard has a digest of its own, so a download is verified as it streams

COUNTED = {"step", "submitted_at", "taken_groups"}  # training metadata that must be numbers where it is there

_HEX = {length: re.compile(rf"[0-9a-f]{{{length}}}") for length in (16, 64, 128)}


@dataclass(frozen=True)
class Shard:
    """One stored file: its size and the sha256 of each PART_BYTES part, the last one as long as it is."""

    key: str
    size: int  # bytes
    parts: tuple[str, ...]


@dataclass(frozen=True)
class LoraShape:
    """Rank and scale. On the wire B is scaled so that `wire_alpha == rank` where alpha/rank is a power of two."""

    rank: int
    alpha: int
    wire_alpha: int
    targets: tuple[str, ...]
    expert_layout: str = "per_expert"


@dataclass(frozen=True)
class Canary:
    """Fixed token sequences and the trainer's own log-probabilities (nats) for every token after the first.

    `tolerance` bounds the largest absolute difference per token that a faithful engine may show.
    """

    sequences: tuple[tuple[int, ...], ...]
    logprobs: tuple[tuple[float, ...], ...]
    tolerance: float


@dataclass(frozen=True)
class Parent:
    """The version that training went on from."""

    version: Version
    digest: str


@dataclass(frozen=True)
class Signature:
    """Who vouches for the digest: the key's name (16 hex digits) and its ed25519 signature (hex); `shared.signing`."""

    key: str
    ed25519: str


@dataclass(frozen=True)
class Manifest:
    """See the module. `digest` is the sha256 of the canonical JSON without digest and signature; empty until sealed."""

    adapter: str
    version: Version
    parent: Parent | None
    base: BaseIdentity
    lora: LoraShape
    parallel: Mapping[str, int]
    encoding: str
    shards: tuple[Shard, ...]
    tensors: Mapping[str, Tensor]
    aliases: Mapping[str, str]
    training: Mapping[str, Any]
    canary: Canary | None
    signature: Signature | None = None
    layout: int = LAYOUT
    digest: str = field(default="", compare=False)

    def sealed(self) -> "Manifest":
        """The same manifest with its digest."""
        return replace(self, digest=_digest(self._fields()))

    def to_bytes(self) -> bytes:
        """Canonical bytes, digest included."""
        fields = self._fields()
        return strict_json.join({**fields, "digest": strict_json.dumps(_digest(fields))})

    @property
    def size(self) -> int:
        """Bytes on the store."""
        return sum(shard.size for shard in self.shards)

    @collection_paused()
    def _fields(self) -> dict[str, bytes]:
        """Every field's canonical JSON, but for the digest."""
        epoch, number = self.version
        body = {
            "adapter": self.adapter,
            "aliases": self.aliases,
            "base": asdict(self.base),
            "canary": asdict(self.canary) if self.canary else None,
            "encoding": self.encoding,
            "epoch": epoch,
            "layout": self.layout,
            "lora": asdict(self.lora),
            "parallel": self.parallel,
            "parent": _parent_json(self.parent) if self.parent else None,
            "shards": [asdict(shard) for shard in self.shards],
            "training": self.training,
            "version": number,
        }
        if self.signature:
            body["signature"] = asdict(self.signature)
        fields = {name: strict_json.dumps(value) for name, value in body.items()}
        return {**fields, "tensors": tensor_table.to_bytes(self.tensors)}

    @classmethod
    @collection_paused()
    def parse(cls, content: bytes, *, key: str) -> "Manifest":
        """Read and check a manifest.

        Raises:
            Corrupt: not JSON, not canonical, a newer layout, a missing or malformed field, a digest that does not
                match.
        """
        body = strict_json.load_canonical(content, key=key, max_bytes=MAX_MANIFEST_BYTES)
        layout = body.get("layout")
        if type(layout) is not int or layout != LAYOUT:
            hint = f"This lorasync reads layout {LAYOUT}; upgrade the reader"
            raise Corrupt(f"manifest of layout {str(layout)[:80]}", op="read manifest", key=key, hint=hint)
        try:
            manifest = _from_body(body)
            fields = {name: strict_json.dumps(value) for name, value in body.items() if name != "tensors"}
            fields["tensors"] = tensor_table.to_bytes(manifest.tensors)
        except (LookupError, TypeError, ValueError, AttributeError, RecursionError, LorasyncError) as error:
            raise Corrupt(f"malformed manifest: {error!r}", op="read manifest", key=key) from error
        if strict_json.join(fields) != content:
            raise Corrupt("manifest is not in canonical form", op="read manifest", key=key)
        if body.get("digest") != _digest(fields):
            raise Corrupt("manifest does not match its own digest", op="read manifest", key=key)
        return replace(manifest, digest=body["digest"])


def _digest(fields: Mapping[str, bytes]) -> str:
    covered = {name: value for name, value in fields.items() if name not in ("digest", "signature")}
    return hashlib.sha256(strict_json.join(covered)).hexdigest()


def _from_body(body: Mapping[str, Any]) -> Manifest:
    shards = tuple(shard_from_json(shard) for shard in body["shards"])
    tensors = tensor_table.from_json(body["tensors"], len(shards))
    aliases: dict[str, str] = body["aliases"]
    if any(target not in tensors for target in aliases.values()):
        raise ValueError("an alias points at no tensor")
    parent, base, lora, signature = body["parent"], body["base"], body["lora"], body.get("signature")
    return Manifest(
        adapter=text(body["adapter"]),
        version=Version(count(body["epoch"]), count(body["version"])),
        parent=_parent(parent) if parent is not None else None,
        base=BaseIdentity(text(base["model_type"]), text(base["config_sha256"]), text(base["weights_sha256"])),
        lora=LoraShape(
            rank=count(lora["rank"]),
            alpha=count(lora["alpha"]),
            wire_alpha=count(lora["wire_alpha"]),
            targets=tuple(text(target) for target in lora["targets"]),
            expert_layout=text(lora["expert_layout"]),
        ),
        parallel={name: count(degree) for name, degree in body["parallel"].items()},
        encoding=text(body["encoding"]),
        shards=shards,
        tensors=tensors,
        aliases=dict(aliases),
        training=_training(body["training"]),
        canary=canary_from_json(body["canary"]),
        signature=_signature(signature) if signature is not None else None,
    )


def shard_from_json(body: Mapping[str, Any]) -> Shard:
    """The inverse of `dataclasses.asdict`.

    Raises:
        LookupError, TypeError, ValueError, UsageError: not of that form, or not as many digests as the size has parts.
    """
    shard = Shard(check_key(body["key"]), count(body["size"]), tuple(_hex(part, 64) for part in body["parts"]))
    if len(shard.parts) != -(-shard.size // PART_BYTES):
        raise ValueError(f"{len(shard.parts)} digests for {shard.size} bytes")
    return shard


def canary_from_json(body: Mapping[str, Any] | None) -> Canary | None:
    """The inverse of `dataclasses.asdict`.

    Raises:
        LookupError, TypeError, ValueError: not of that form.
    """
    if body is None:
        return None
    sequences = tuple(tuple(count(token) for token in sequence) for sequence in body["sequences"])
    logprobs = tuple(tuple(_number(value) for value in row) for row in body["logprobs"])
    if [len(s) - 1 for s in sequences] != [len(row) for row in logprobs]:
        raise ValueError("canary log-probabilities do not fit its sequences")
    return Canary(sequences, logprobs, _number(body["tolerance"]))


def _signature(body: Mapping[str, Any]) -> Signature:
    return Signature(_hex(body["key"], 16), _hex(body["ed25519"], 128))


def _parent(body: Mapping[str, Any]) -> Parent:
    return Parent(Version(count(body["epoch"]), count(body["version"])), _hex(body["digest"], 64))


def _parent_json(parent: Parent) -> dict[str, Any]:
    epoch, number = parent.version
    return {"epoch": epoch, "version": number, "digest": parent.digest}


def _training(body: Mapping[str, Any]) -> Mapping[str, Any]:
    """Metadata is free, but for what readers count with."""
    if not isinstance(body, dict):
        raise TypeError("training metadata that is no object")
    for name in COUNTED & body.keys():
        _number(body[name])
    return body


def _number(value: Any) -> float:
    if type(value) not in (int, float):
        raise ValueError("a number that is none")
    return float(value)


def _hex(value: Any, length: int) -> str:
    if not _HEX[length].fullmatch(value):
        raise ValueError(f"not {length} hex digits")
    return text(value)
