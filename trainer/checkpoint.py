"""The trainer's own state on the store: enough for a killed trainer to go on along the same curve.

    {checkpoint}/state-{nonce}.safetensors    LoRA, AdamW's moments and step, random states
    {checkpoint}/state.json                   put-if-absent, last: step, lineage, data position, digest of the other

Promises: a checkpoint without its JSON does not exist; bytes are checked against their digest before they are parsed;
no pickle. Writing runs behind the step, one at a time; the newest two are kept, so damage to one costs steps, not the
run. The newest is the highest (epoch, step): a zombie of a lower epoch can't displace its successor's.
"""

import hashlib
import logging
import re
import uuid
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from shared import strict_json
from shared.errors import Corrupt, Fenced, KeyMissing, StoreError
from shared.layout import Layout
from shared.store import Store

log = logging.getLogger(__name__)

FORMAT = 1
KEEP = 2
MAX_STATE_BYTES = 256_000_000  # of state.json: the data position names every trajectory file still on the store
_STATE = re.compile(r"(\d{8})-(\d{12})/state\.json$")


@dataclass(frozen=True)
class Checkpoint:
    """State after `step` optimizer steps.

    Args:
        state: JSON: lineage, data position, totals, what the LoRA and the base model are.
        tensors: host tensors, not changed by anyone from now on.
    """

    epoch: int
    step: int
    state: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


def write(store: Store, layout: Layout, checkpoint: Checkpoint) -> None:
    """Put a checkpoint, then remove all but the newest KEEP.

    Raises:
        Fenced: this (epoch, step) is taken by another's state.
        StoreError: the store failed.
    """
    folder = layout.checkpoint(checkpoint.epoch, checkpoint.step)
    content = save(dict(checkpoint.tensors))
    key = f"{folder}/state-{uuid.uuid4().hex[:12]}.safetensors"
    store.put_stream(key, [content])
    body = {
        "format": FORMAT,
        "epoch": checkpoint.epoch,
        "step": checkpoint.step,
        "tensors": {"key": key, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()},
        "state": checkpoint.state,
    }
    if not store.put_if_absent(f"{folder}/state.json", strict_json.dumps(body)):
        raise Fenced("another trainer wrote this checkpoint", op="write checkpoint", key=folder)
    log.info("checkpoint epoch=%d step=%d bytes=%d", checkpoint.epoch, checkpoint.step, len(content))
    for old in _committed(store, layout)[:-KEEP]:
        # The JSON first: what is left after a crash in between is no checkpoint.
        store.delete(f"{old}/state.json")
        for entry in store.list(old):
            store.delete(entry.key)


def newest(store: Store, layout: Layout) -> Checkpoint | None:
    """Read the newest checkpoint, or the one before it if that is damaged; None if there is none.

    Raises:
        Corrupt: there are checkpoints, and none can be read.
    """
    damage: Corrupt | None = None
    for folder in reversed(_committed(store, layout)):
        try:
            return _read(store, f"{folder}/state.json")
        except (Corrupt, KeyMissing) as error:
            log.warning("checkpoint passed over: %s", error)
            damage = Corrupt(
                f"no readable checkpoint: {error}",
                op="read checkpoint",
                key=folder,
                hint="Delete the adapter's checkpoints/ to begin anew from the base model",
            )
    if damage:
        raise damage
    return None


def _read(store: Store, key: str) -> Checkpoint:
    body = strict_json.load_object(store.get(key), key=key, max_bytes=MAX_STATE_BYTES)
    try:
        shard, epoch, step, state = body["tensors"], int(body["epoch"]), int(body["step"]), dict(body["state"])
        if body["format"] != FORMAT:
            raise ValueError(f"format {body['format']!r}")
        content = store.get(str(shard["key"]))
        if len(content) != shard["size"] or hashlib.sha256(content).hexdigest() != shard["sha256"]:
            raise Corrupt("bytes do not match their digest", op="read checkpoint", key=str(shard["key"]))
        return Checkpoint(epoch, step, state, load(content))
    except (LookupError, TypeError, ValueError) as error:
        raise Corrupt(f"malformed checkpoint: {error!r}", op="read checkpoint", key=key) from error


def _committed(store: Store, layout: Layout) -> list[str]:
    """Folders of whole checkpoints, by (epoch, step), oldest first."""
    keys = (entry.key for entry in store.list(layout.checkpoints))
    return sorted(key.removesuffix("/state.json") for key in keys if _STATE.search(key))


class CheckpointWriter:
    """Writes behind the step, one at a time; a second waits for the first.

    A store that fails for a while costs a checkpoint, which is logged and counted in `missed`; the next one makes it
    good. Other errors come out of the next call.
    """

    def __init__(self, store: Store, layout: Layout) -> None:
        self._store, self._layout, self.missed = store, layout, 0
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def submit(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint when the one before is done.

        Raises:
            LorasyncError: what went wrong with the one before.
        """
        self._settle()
        self._pending = self._executor.submit(write, self._store, self._layout, checkpoint)

    def close(self) -> None:
        """Wait for what was submitted, and raise what went wrong with it."""
        self._settle()

    def shutdown(self) -> None:
        """End the thread, whatever became of its last write. `submit` is over after this."""
        self._executor.shutdown()

    def _settle(self) -> None:
        pending, self._pending = self._pending, None
        try:
            if pending is not None:
                pending.result()
        except StoreError as error:
            if not error.retryable:
                raise
            self.missed += 1
            log.warning("checkpoint missed=%d: %s", self.missed, error)
