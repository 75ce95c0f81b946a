"""From the store to a plain PEFT directory on disk, every byte checked before anyone can load it.

Order of trust: the manifest's own digest, then its names and shapes against the base model, then each part of each
shard as it streams, then the shards' headers and every value's finiteness (`shared.assemble`). The directory appears
under its final name only when all of that held; until then it is a hidden sibling.

The result needs nothing of ours: adapter_model.safetensors and adapter_config.json, which vLLM and PEFT load.
"""

import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

from shared.assemble import assemble
from shared.coverage import demand_complete
from shared.errors import Corrupt, StoreError
from shared.manifest import PART_BYTES, Manifest, Shard
from shared.peft_config import peft_config
from shared.store import Store

WEIGHTS, CONFIG, MANIFEST, DIGEST = "adapter_model.safetensors", "adapter_config.json", "manifest.json", "sha256"
FREE_SPACE_FACTOR = 2.2  # shards and the assembled file side by side

Shape = tuple[int, int]


def fetch(store: Store, manifest: Manifest, expected: Mapping[str, Shape], directory: Path, *, base_name: str) -> Path:
    """Download, verify and assemble a version.

    Args:
        expected: every tensor's shape by the local base model, in wire order.
        directory: where the PEFT directory shall stand. One that stands there already and still has its digest is
            kept; a damaged one is replaced.
        base_name: for adapter_config.json.

    Returns:
        `directory`.

    Raises:
        Corrupt: a check failed; nothing is left under `directory`.
        KeyMissing: a shard is gone: the version expired, look for a newer one.
        StoreError: the store failed, or the local disk did.
    """
    demand_complete(manifest, expected)
    config = peft_config(manifest.lora, base_name)
    if _intact(directory, manifest, config):
        return directory
    try:
        _materialise(store, manifest, expected, directory, config)
    except OSError as error:
        hint = "Mend the local disk, or use another directory"
        raise StoreError(f"{error}", op="fetch", key=str(directory), hint=hint) from error
    return directory


def _materialise(
    store: Store, manifest: Manifest, expected: Mapping[str, Shape], directory: Path, config: bytes
) -> None:
    """Build the directory beside its place, and put it there when all of it is right."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    _demand_room(manifest, directory.parent)
    aside = directory.parent / f".{directory.name}.{uuid.uuid4().hex}"
    aside.mkdir()
    try:
        shards = [download(store, shard, aside / f"shard-{n}") for n, shard in enumerate(manifest.shards)]
        with (aside / WEIGHTS).open("xb") as file:
            digest = assemble(manifest, shards, expected, file)
            file.flush()
            os.fsync(file.fileno())
        for path in shards:
            path.unlink()
        (aside / CONFIG).write_bytes(config)
        (aside / MANIFEST).write_bytes(manifest.to_bytes())
        (aside / DIGEST).write_text(digest)
        shutil.rmtree(directory, ignore_errors=True)
        aside.rename(directory)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def verify(store: Store, manifest: Manifest, expected: Mapping[str, Shape], scratch: Path) -> None:
    """Check a stored version as `fetch` would, and keep nothing.

    Args:
        scratch: an empty directory, for the shards while they are checked.

    Raises:
        Corrupt, KeyMissing, StoreError: see `fetch`.
    """
    demand_complete(manifest, expected)
    try:
        shards = [download(store, shard, scratch / f"shard-{n}") for n, shard in enumerate(manifest.shards)]
        with Path(os.devnull).open("wb") as nowhere:
            assemble(manifest, shards, expected, nowhere)
        for path in shards:
            path.unlink()
    except OSError as error:
        raise StoreError(f"{error}", op="verify", key=str(scratch)) from error


def download(store: Store, shard: Shard, path: Path) -> Path:
    """Download one shard, verifying part by part.

    Raises:
        Corrupt: the first part whose bytes do not match, or a wrong size.
        KeyMissing, StoreError: as the store says.
    """
    with path.open("xb") as file:
        for part in verified_parts(store, shard):
            file.write(part)
    return path


def verified_parts(store: Store, shard: Shard) -> Iterator[bytes]:
    """A shard's parts, each yielded only after its digest matched.

    Raises:
        Corrupt: a part that does not match, too few or too many bytes.
    """
    size = 0
    for number, start in enumerate(range(0, shard.size, PART_BYTES)):
        part = store.get_range(shard.key, start, start + PART_BYTES)
        if number >= len(shard.parts) or hashlib.sha256(part).hexdigest() != shard.parts[number]:
            raise Corrupt(f"part {number} does not match its digest", op="verify shard", key=shard.key)
        size += len(part)
        yield part
    if size != shard.size:
        raise Corrupt(f"{size} bytes, not {shard.size}", op="verify shard", key=shard.key)


def _demand_room(manifest: Manifest, directory: Path) -> None:
    free, needed = shutil.disk_usage(directory).free, int(manifest.size * FREE_SPACE_FACTOR)
    if free < needed:
        problem = f"{free >> 20} MiB free, {needed >> 20} MiB needed"
        raise StoreError(problem, op="fetch", key=str(directory), hint="Free room, or set rollout.cache_dir elsewhere")


def _intact(directory: Path, manifest: Manifest, config: bytes) -> bool:
    """Whether a directory of an earlier life still holds this manifest and the bytes that it was given."""
    try:
        digest = hashlib.sha256()
        with (directory / WEIGHTS).open("rb") as file:
            while chunk := file.read(PART_BYTES):
                digest.update(chunk)
        same = (directory / MANIFEST).read_bytes() == manifest.to_bytes()
        same = same and (directory / CONFIG).read_bytes() == config
        return same and (directory / DIGEST).read_text() == digest.hexdigest()
    except OSError:
        return False
