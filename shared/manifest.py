"""The manifest of a version: what it holds, where the bytes lie, and what to demand of them. Putting it is the commit.

Promises: `Manifest.parse(m.to_bytes()) == m`; equal manifests are equal bytes, so racing committers of one version
write the same object (nothing is the committer's own: no host, and the one time in it, `training.submitted_at`, is from
rank 0's record); its own digest and its parent's digest make a chain.
Does not: trust itself. Readers check its digest, then every part's, then names, shapes and values.

docs/format.md shows one, field by field.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from shared import strict_json
from shared.adapter_files import ITEM_BYTES
from shared.base_model import BaseIdentity
from shared.errors import Corrupt, LorasyncError
from shared.layout import LAYOUT
from shared.store import check_key
from shared.versions import Version

MAX_MANIFEST_BYTES = 100_000_000  # a single request on every store: multipart creates race
MAX_COUNT = 1 << 50
VOID = b'{"layout":1,"void":true}'  # stands where a manifest was collected, or shall never be: no version
PART_BYTES = 16 << 20  # each part of a shard has a digest of its own, so a download is verified as it streams


@dataclass(frozen=True)
class Shard:
    """One stored file: its size and the sha256 of the whole and of each PART_BYTES part."""

    key: str
    size: int  # bytes
    sha256: str
    parts: tuple[str, ...]


@dataclass(frozen=True)
class Slice:
    """A rectangle of a tensor: where it lies (shard number, name inside) and where it belongs (offset)."""

    shard: int
    name: str
    offset: tuple[int, int]
    shape: tuple[int, int]


@dataclass(frozen=True)
class Tensor:
    """A global tensor and the slices that cover it exactly."""

    dtype: str
    shape: tuple[int, int]
    slices: tuple[Slice, ...]


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
class Manifest:
    """See the module. `digest` is the sha256 of the canonical JSON without this field; empty until sealed."""

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
    layout: int = LAYOUT
    digest: str = field(default="", compare=False)

    def sealed(self) -> "Manifest":
        """The same manifest with its digest."""
        return replace(self, digest=_digest(self._body()))

    def to_bytes(self) -> bytes:
        """Canonical bytes, digest included."""
        body = self._body()
        return strict_json.dumps({**body, "digest": _digest(body)})

    @property
    def size(self) -> int:
        """Bytes on the store."""
        return sum(shard.size for shard in self.shards)

    def _body(self) -> dict[str, Any]:
        body = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in ("digest", "version")}
        body["epoch"], body["version"] = self.version
        body["base"], body["lora"] = asdict(self.base), asdict(self.lora)
        body["shards"] = [asdict(shard) for shard in self.shards]
        body["tensors"] = {name: _tensor_json(tensor) for name, tensor in self.tensors.items()}
        body["canary"] = asdict(self.canary) if self.canary else None
        if self.parent:
            epoch, number = self.parent.version
            body["parent"] = {"epoch": epoch, "version": number, "digest": self.parent.digest}
        return body

    @classmethod
    def parse(cls, content: bytes, *, key: str) -> "Manifest":
        """Read and check a manifest.

        Raises:
            Corrupt: not JSON, a newer layout, a missing or malformed field, a digest that does not match.
        """
        body = strict_json.load_object(content, key=key, max_bytes=MAX_MANIFEST_BYTES)
        claimed = body.pop("digest", None)
        if body.get("layout") != LAYOUT:
            hint = f"This lorasync reads layout {LAYOUT}; upgrade the reader"
            raise Corrupt(f"manifest of layout {body.get('layout')!r}", op="read manifest", key=key, hint=hint)
        try:
            digest = _digest(body)
            if claimed != digest:
                raise Corrupt("manifest does not match its own digest", op="read manifest", key=key)
            manifest = _from_body(body)
        except Corrupt:
            raise
        except (LookupError, TypeError, ValueError, AttributeError, RecursionError, LorasyncError) as error:
            raise Corrupt(f"malformed manifest: {error!r}", op="read manifest", key=key) from error
        return replace(manifest, digest=digest)


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(strict_json.dumps(body)).hexdigest()


def _tensor_json(tensor: Tensor) -> dict[str, Any]:
    """`dataclasses.asdict`, forty times as fast: a model of 30B parameters has 37,248 tensors."""
    slices = [{"shard": s.shard, "name": s.name, "offset": s.offset, "shape": s.shape} for s in tensor.slices]
    return {"dtype": tensor.dtype, "shape": tensor.shape, "slices": slices}


def _from_body(body: Mapping[str, Any]) -> Manifest:
    shards = tuple(
        Shard(check_key(s["key"]), _size(s["size"]), _text(s["sha256"]), tuple(_text(part) for part in s["parts"]))
        for s in body["shards"]
    )
    tensors = {}
    for name, entry in body["tensors"].items():
        if entry["dtype"] not in ITEM_BYTES:
            raise ValueError(f"dtype {entry['dtype']!r} of {name}")
        slices = tuple(
            Slice(_size(s["shard"]), _text(s["name"]), _pair(s["offset"]), _pair(s["shape"])) for s in entry["slices"]
        )
        if any(s.shard >= len(shards) for s in slices):
            raise ValueError(f"{name} lies in a shard that is not listed")
        tensors[name] = Tensor(entry["dtype"], _pair(entry["shape"]), slices)
    if any(target not in tensors for target in body["aliases"].values()):
        raise ValueError("an alias points at no tensor")
    parent, canary, base, lora = body["parent"], body["canary"], body["base"], body["lora"]
    return Manifest(
        adapter=_text(body["adapter"]),
        version=Version(_size(body["epoch"]), _size(body["version"])),
        parent=_parent(parent) if parent else None,
        base=BaseIdentity(_text(base["model_type"]), _text(base["config_sha256"]), _text(base["weights_sha256"])),
        lora=LoraShape(
            rank=_size(lora["rank"]),
            alpha=_size(lora["alpha"]),
            wire_alpha=_size(lora["wire_alpha"]),
            targets=tuple(_text(target) for target in lora["targets"]),
            expert_layout=_text(lora["expert_layout"]),
        ),
        parallel={name: _size(degree) for name, degree in body["parallel"].items()},
        encoding=_text(body["encoding"]),
        shards=shards,
        tensors=tensors,
        aliases=dict(body["aliases"]),
        training=dict(body["training"]),
        canary=canary_from_json(canary),
    )


def _parent(body: Mapping[str, Any]) -> Parent:
    return Parent(Version(_size(body["epoch"]), _size(body["version"])), _text(body["digest"]))


def canary_from_json(body: Mapping[str, Any] | None) -> Canary | None:
    """The inverse of `dataclasses.asdict`.

    Raises:
        LookupError, TypeError, ValueError: not of that form.
    """
    if body is None:
        return None
    sequences = tuple(tuple(_size(token) for token in sequence) for sequence in body["sequences"])
    logprobs = tuple(tuple(float(value) for value in row) for row in body["logprobs"])
    if [len(s) - 1 for s in sequences] != [len(row) for row in logprobs]:
        raise ValueError("canary log-probabilities do not fit its sequences")
    return Canary(sequences, logprobs, float(body["tolerance"]))


def _size(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= MAX_COUNT:
        raise ValueError("a count that is none")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("a text that is none")
    return value


def _pair(value: Any) -> tuple[int, int]:
    rows, columns = value
    return _size(rows), _size(columns)
