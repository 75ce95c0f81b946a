"""What must hold of any bytes that a store may hand to a parser: it lets out `Corrupt` and nothing else, in few words,
and what it accepts, it writes again to something that reads back equal.
"""

import contextlib
import hashlib
import io
import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from publisher.rollback import last_rollback
from shared import strict_json, trajectories
from shared.adapter_files import header_bytes, parse_header, read_tensors
from shared.assemble import assemble, assembled_tensors
from shared.catalog import Catalog, check_layout
from shared.coverage import demand_complete
from shared.errors import Corrupt, KeyMissing, LorasyncError
from shared.fates import Fates
from shared.layout import Layout
from shared.leases import read_leases
from shared.manifest import Manifest
from shared.peft_config import peft_config
from shared.run_record import recorded_run
from shared.shard_contents import promised_tensors
from shared.status import StatusReader
from shared.store import Entry, Fetched
from shared.versions import Version

ADAPTER = "policy"
LAYOUT, VERSION = Layout(ADAPTER), Version(1, 1)
MAX_LINE_LENGTH = 4000  # characters of one error
MAX_ASSEMBLED_BYTES = 1 << 20  # of a version that is put together here

Target = Callable[[bytes], None]


class OneContent:
    """A store in which every key that may be read holds the same bytes."""

    url = "memory://one"

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._keys = [
            LAYOUT.manifest(VERSION),
            LAYOUT.fate(VERSION, 1),
            LAYOUT.lease("node", 1),
            LAYOUT.rollback(VERSION, Version(2, 1)),
            LAYOUT.node("node"),
            LAYOUT.trainer,
            LAYOUT.run,
            LAYOUT.layout,
            LAYOUT.latest,
        ]

    def get(self, key: str, max_bytes: int | None = None) -> bytes:
        if max_bytes is not None and len(self._content) > max_bytes:
            raise Corrupt("too large", op="get", key=key)
        if key not in self._keys:
            raise KeyMissing("no such object", op="get", key=key)
        return self._content

    def get_if_changed(self, key: str, tag: str, max_bytes: int | None = None) -> Fetched:
        return Fetched(self.get(key, max_bytes), "tag")

    def list(self, prefix: str, after: str = "") -> list[Entry]:
        keys = [key for key in self._keys if key.startswith(f"{prefix}/") and key > after]
        return [Entry(key, len(self._content), 0.0) for key in sorted(keys)]


def refused(call: Callable[[], Any]) -> bool:
    """Whether a call ends in `Corrupt`, said in one bounded line. Whatever else it raises comes out."""
    try:
        call()
    except Corrupt as error:
        line = str(error)
        assert line.isprintable() and len(line) < MAX_LINE_LENGTH, f"not a line: {line[:200]!r}"
        return True
    return False


def manifest(content: bytes) -> None:
    """A manifest as it stands: only its own digest lets it through."""
    with contextlib.suppress(Corrupt):
        _round_trip(Manifest.parse(content, key="k"))


def sealed_manifest(content: bytes) -> None:
    """A manifest by an attacker who makes the digest fit."""
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        return
    if not isinstance(body, dict):
        return
    covered = {name: value for name, value in body.items() if name not in ("digest", "signature")}
    try:
        body["digest"] = hashlib.sha256(strict_json.dumps(covered)).hexdigest()
        forged = strict_json.dumps(body)
    except (ValueError, RecursionError):  # NaN, half a surrogate
        return
    parsed: list[Manifest] = []
    if refused(lambda: parsed.append(Manifest.parse(forged, key="k"))):
        return
    (found,) = parsed
    _round_trip(found)
    shapes = {name: tensor.shape for name, tensor in found.tensors.items()}
    shapes |= {alias: shapes[name] for alias, name in found.aliases.items()}
    if not refused(lambda: demand_complete(found, shapes)):
        _put_together(found, shapes)
    refused(lambda: demand_complete(found, {"a": (1, 1)}))
    refused(lambda: peft_config(found.lora, "base"))
    with contextlib.suppress(LorasyncError):
        Catalog(OneContent(forged), ADAPTER).manifest(VERSION)  # type: ignore[arg-type]


def _put_together(found: Manifest, shapes: dict[str, tuple[int, int]]) -> None:
    """A version that is said to be whole, of shards that hold what is promised."""
    promised, specs = promised_tensors(found, shapes), assembled_tensors(found, shapes)
    nbytes = sum(spec.nbytes for spec in chain(specs, *promised))
    if nbytes > MAX_ASSEMBLED_BYTES:
        return
    with tempfile.TemporaryDirectory() as folder:
        shards = [Path(folder, str(number)) for number in range(len(promised))]
        for path, held in zip(shards, promised, strict=True):
            path.write_bytes(header_bytes(held) + bytes(sum(spec.nbytes for spec in held)))
        whole = io.BytesIO()
        if not refused(lambda: assemble(found, shards, shapes, whole)):
            assert whole.getvalue() == header_bytes(specs) + bytes(sum(spec.nbytes for spec in specs))


def _round_trip(found: Manifest) -> None:
    again = Manifest.parse(found.to_bytes(), key="k")
    assert again == found, f"{again} is not {found}"
    assert again.to_bytes() == found.to_bytes()
    assert replace(found, digest="").sealed().digest == again.digest


def header(content: bytes) -> None:
    """A shard: header and data."""
    found: list[Any] = []
    if refused(lambda: found.extend(read_tensors(content, key="k"))):
        return
    specs = [spec for spec, _ in found]
    assert all(len(data) == spec.nbytes for spec, data in found)
    anew = header_bytes(specs)
    placed, _ = parse_header(anew, len(anew) + sum(spec.nbytes for spec in specs), key="k")
    assert [tensor.spec for tensor in placed if tensor.spec.nbytes] == [spec for spec in specs if spec.nbytes]
    assert {tensor.spec for tensor in placed} == set(specs)


def strict(content: bytes) -> None:
    """Any JSON object."""
    found: list[dict[str, Any]] = []
    if not refused(lambda: found.append(strict_json.load_object(content, key="k", max_bytes=1 << 20))):
        again = strict_json.load_object(strict_json.dumps(found[0]), key="k", max_bytes=1 << 24)
        assert again == found[0] and strict_json.dumps(again) == strict_json.dumps(found[0])


def small_objects(content: bytes) -> None:
    """Hints, fates, leases, markers, records: each read as the same bytes."""
    store: Any = OneContent(content)
    catalog = Catalog(store, ADAPTER)
    hint = catalog.hint()
    assert hint is not None and (hint[0] is None or isinstance(hint[0], Version))
    assert not refused(lambda: StatusReader(catalog).read().to_json())
    refused(lambda: check_layout(store, LAYOUT))
    refused(lambda: recorded_run(catalog))
    refused(lambda: last_rollback(catalog))
    assert not refused(lambda: read_leases(store, LAYOUT, 1.0))
    fates = Fates(store, LAYOUT)
    entries: list[Any] = []
    if not refused(lambda: entries.append(fates.entry(VERSION, 1))):
        again = Fates(OneContent(entries[0].to_bytes()), LAYOUT).entry(VERSION, 1)  # type: ignore[arg-type]
        assert again == entries[0]


def trajectory(content: bytes) -> None:
    """A trajectory file."""
    found: list[trajectories.Sample] = []
    if not refused(lambda: found.extend(trajectories.decode(content, key="k"))):
        again = trajectories.decode(trajectories.encode(found), key="k")
        assert repr(again) == repr(found)  # NaN is not equal to itself


TARGETS: dict[str, Target] = {
    "manifest": manifest,
    "sealed_manifest": sealed_manifest,
    "header": header,
    "strict": strict,
    "small_objects": small_objects,
    "trajectory": trajectory,
}
