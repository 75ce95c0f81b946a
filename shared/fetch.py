"""From the store to a plain PEFT directory on disk, every byte checked before anyone can load it.

Order of trust: the manifest's own digest, then its names and shapes against the base model, then each part of each
shard as it arrives (`shared.transfer`), then the shards' headers and every value's finiteness. The directory appears
under its final name only when all of that held; until then it is in a hidden place, where a fetch that was cut off goes
on where it was (`shared.partial`).

The result needs nothing of ours: adapter_model.safetensors and adapter_config.json, which vLLM and PEFT load. A version
of one shard that holds exactly that file is not put together anew.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from shared.assemble import assemble, assembled_tensors
from shared.coverage import demand_complete
from shared.disk_errors import disk_error
from shared.errors import Corrupt, KeyMissing, StoreError
from shared.manifest import Manifest
from shared.partial import partial_directory, put_in_place, remove_leftovers
from shared.peft_config import peft_config
from shared.shard_contents import ShardContents, promised_tensors, verify_shard
from shared.store import Store
from shared.transfer import download, file_digests

WEIGHTS, CONFIG, MANIFEST, DIGEST = "adapter_model.safetensors", "adapter_config.json", "manifest.json", "sha256"
FILES = {WEIGHTS, CONFIG, MANIFEST, DIGEST}
SPARE_BYTES = 64 << 20  # of the disk, for all but the weights

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
        StoreError: the store failed, or the local disk did. What has arrived is kept beside `directory`, and the next
            fetch of the same version goes on there.
    """
    demand_complete(manifest, expected)
    config = peft_config(manifest.lora, base_name)
    if _intact(directory, manifest, config):
        remove_leftovers(directory)
        return directory
    try:
        with partial_directory(directory, manifest.digest) as aside:
            try:
                _materialise(store, manifest, expected, aside, config)
            except (Corrupt, KeyMissing):
                shutil.rmtree(aside, ignore_errors=True)
                raise
            put_in_place(aside, directory, is_whole=lambda: _intact(directory, manifest, config))
    except OSError as error:
        hint = "Mend the local disk, or use another directory"
        raise disk_error(error, op="fetch", key=str(directory), hint=hint) from error
    return directory


def _materialise(store: Store, manifest: Manifest, expected: Mapping[str, Shape], aside: Path, config: bytes) -> None:
    """Build the directory's files, and nothing beside them: an engine reads by name what else stands there."""
    promised, assembled = promised_tensors(manifest, expected), assembled_tensors(manifest, expected)
    plain = promised == [assembled]
    shards = [aside / (WEIGHTS if plain else f"shard-{number}") for number in range(len(manifest.shards))]
    assembled_bytes = sum(spec.nbytes for spec in assembled)
    for path in set(aside.iterdir()) - set(shards):  # of an earlier life
        path.unlink()
    there = sum(path.stat().st_blocks * 512 for path in shards if path.exists())
    _demand_room(manifest.size - there + (0 if plain else assembled_bytes), aside)
    for number, (shard, path) in enumerate(zip(manifest.shards, shards, strict=True)):
        contents = ShardContents.promised(shard, promised[number])
        download(store, shard, path, look=contents.look)
        plain = plain and contents.as_promised
        if contents.as_promised:
            contents.demand_finite()
    if not plain:
        if promised == [assembled]:  # its header is not ours: no room was asked for yet
            _demand_room(assembled_bytes, aside)
        with (aside / "assembled").open("wb") as file:
            assemble(manifest, shards, expected, file)
        (aside / "assembled").rename(aside / WEIGHTS)
    for path in shards:
        if path.name != WEIGHTS:
            path.unlink()
    _sync(aside / WEIGHTS)
    digests = manifest.shards[0].parts if plain else file_digests(aside / WEIGHTS)
    (aside / CONFIG).write_bytes(config)
    (aside / MANIFEST).write_bytes(manifest.to_bytes())
    (aside / DIGEST).write_text("\n".join(digests))


def verify(store: Store, manifest: Manifest, expected: Mapping[str, Shape]) -> None:
    """Check a stored version as `fetch` would, where it is stored: nothing is written anywhere.

    Raises:
        Corrupt, KeyMissing, StoreError: see `fetch`.
    """
    demand_complete(manifest, expected)
    for number, promised in enumerate(promised_tensors(manifest, expected)):
        verify_shard(store, manifest, number, promised)


def _demand_room(nbytes: int, directory: Path) -> None:
    needed = nbytes + SPARE_BYTES
    free = shutil.disk_usage(directory).free
    if free < needed:
        problem = f"{free >> 20} MiB free, {needed >> 20} MiB needed"
        hint = "Free room, or set rollout.cache_dir elsewhere"
        raise StoreError(problem, op="fetch", key=str(directory), hint=hint, retryable=True)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _intact(directory: Path, manifest: Manifest, config: bytes) -> bool:
    """Whether a directory of an earlier life still holds this manifest and the bytes that it was given, and no more.

    An engine reads by name what else stands there; a link or a pipe is none of ours.
    """
    try:
        if directory.is_symlink() or {path.name for path in directory.iterdir()} != FILES:
            return False
        if any(path.is_symlink() or not path.is_file() for path in directory.iterdir()):
            return False
        same = (directory / MANIFEST).read_bytes() == manifest.to_bytes()
        same = same and (directory / CONFIG).read_bytes() == config
        return same and (directory / DIGEST).read_text().split("\n") == list(file_digests(directory / WEIGHTS))
    except (OSError, ValueError):
        return False
