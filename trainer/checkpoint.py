"""The trainer's own state on the store: enough for a killed trainer to go on along the same curve.

    {checkpoint}/state-{nonce}.safetensors    LoRA, AdamW's moments and step, random states
    {checkpoint}/state.json                   put-if-absent, last: {"sha256": of the canonical body, "body": {step,
                                              lineage, data position, name and digest of the other, ...}}

Promises: a checkpoint without its JSON does not exist; bytes are checked against their digest before they are used;
no pickle. Writing runs behind the step, one at a time; the newest two or more are kept, so damage to one costs steps,
not the run, and a rollback finds one of its past. After a rollback only those of its past count among them: what led
astray goes with the first new one. The newest is the highest (epoch, step): a zombie of a lower epoch
can't displace its successor's, and before its successor has one, it may not commit its own: the successor resumed
without it, and a third life would go on from it.

A zombie that stalls between its look at the fence and its put commits all the same. That checkpoint is whole and true,
and counts only if the successor dies before its first one, whose work is lost then in any case: the third life goes on
along the zombie's curve instead of repeating it. No version is taken back: the third life's are of a higher epoch.
"""

import hashlib
import logging
import re
import uuid
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from publisher.epochs import demand_unfenced
from publisher.resume import MAX_STATE_BYTES, committed, folders, place_of
from shared import strict_json
from shared.errors import Corrupt, Fenced, KeyMissing, StoreError
from shared.layout import Layout
from shared.store import Store

log = logging.getLogger(__name__)

FORMAT = 1
KEEP = 2
MAX_WAIT_S = 10.0  # of a step for the checkpoint before
MAX_LOOKS = 10  # at checkpoints that a trainer replaces while they are read
_TENSORS = re.compile(r"state-[0-9a-f]{12}\.safetensors")

Fits = Callable[[int, int], bool]


def anywhere(_epoch: int, _step: int) -> bool:
    """Where no rollback was, every checkpoint may be gone on from."""
    return True


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


def write(store: Store, layout: Layout, checkpoint: Checkpoint, keep: int = KEEP, fits: Fits = anywhere) -> None:
    """Put a checkpoint, then remove all but the newest `keep`, with what lost or fenced writes left behind.

    Args:
        fits: whether a checkpoint of this epoch and step may be gone on from; those that may not are removed.

    Raises:
        Fenced: a later life has begun, or this (epoch, step) is taken by another's state.
        StoreError: the store failed.
    """
    folder = layout.checkpoint(checkpoint.epoch, checkpoint.step)
    content = save(dict(checkpoint.tensors))
    name = f"state-{uuid.uuid4().hex[:12]}.safetensors"
    store.put_stream(f"{folder}/{name}", [content], len(content))
    body = {
        "format": FORMAT,
        "epoch": checkpoint.epoch,
        "step": checkpoint.step,
        "tensors": {"name": name, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()},
        "state": checkpoint.state,
    }
    demand_unfenced(store, layout, checkpoint.epoch, op="write checkpoint")
    if not store.put_if_absent(f"{folder}/state.json", strict_json.dumps({"sha256": _digest(body), "body": body})):
        raise Fenced("another trainer wrote this checkpoint", op="write checkpoint", key=folder)
    log.info("checkpoint epoch=%d step=%d bytes=%d", checkpoint.epoch, checkpoint.step, len(content))
    _delete_old(store, layout, keep, fits)


def newest(store: Store, layout: Layout, known: Checkpoint | None = None, fits: Fits = anywhere) -> Checkpoint | None:
    """Read the newest checkpoint, or the one before it if that is damaged; None if there is none.

    Args:
        known: what an earlier call found; returned as it is while no newer one is there.
        fits: whether a checkpoint of this epoch and step may be gone on from.

    Raises:
        Corrupt: there are checkpoints, and none can be read.
        StoreError: the store failed, or a trainer that runs replaced them faster than they could be read.
    """
    for _ in range(MAX_LOOKS):
        found = [folder for folder in committed(folders(store, layout)) if fits(*place_of(folder))]
        try:
            return _newest_of(store, layout, reversed(found), known)
        except KeyMissing as error:
            log.info("checkpoint replaced while it was read: %s", error)
    problem = f"checkpoints were replaced during each of {MAX_LOOKS} looks"
    raise StoreError(problem, op="read checkpoint", key=layout.checkpoints, retryable=True)


def _newest_of(store: Store, layout: Layout, found: Iterable[str], known: Checkpoint | None) -> Checkpoint | None:
    """The first of these that is not damaged.

    Raises:
        Corrupt: all are.
        KeyMissing: one was deleted since the listing: there are newer ones.
    """
    damage: Corrupt | None = None
    for folder in found:
        if known and folder == layout.checkpoint(known.epoch, known.step):
            return known
        try:
            return _read(store, folder)
        except (Corrupt, KeyMissing) as error:
            if isinstance(error, KeyMissing):
                store.get(f"{folder}/state.json")  # deleted before its tensors: while it stands, they are lost
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


def _read(store: Store, folder: str) -> Checkpoint:
    key = f"{folder}/state.json"
    sealed = strict_json.load_object(store.get(key), key=key, max_bytes=MAX_STATE_BYTES)
    try:
        body = sealed["body"]
        if _digest(body) != sealed["sha256"]:
            raise Corrupt("the body does not match its digest", op="read checkpoint", key=key)
        shard, epoch, step, state = body["tensors"], int(body["epoch"]), int(body["step"]), dict(body["state"])
        if body["format"] != FORMAT:
            raise ValueError(f"format {body['format']!r}")
        if not _TENSORS.fullmatch(shard["name"]):
            raise ValueError(f"tensors in {shard['name']!r}")
        content = store.get(f"{folder}/{shard['name']}")
        if len(content) != shard["size"] or hashlib.sha256(content).hexdigest() != shard["sha256"]:
            raise Corrupt("bytes do not match their digest", op="read checkpoint", key=f"{folder}/{shard['name']}")
        return Checkpoint(epoch, step, state, load(content))
    except (LookupError, TypeError, ValueError, SafetensorError) as error:
        raise Corrupt(f"malformed checkpoint: {error!r}", op="read checkpoint", key=key) from error


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(strict_json.dumps(body)).hexdigest()


def _delete_old(store: Store, layout: Layout, keep: int, fits: Fits) -> None:
    found = folders(store, layout)
    whole = committed(found)
    kept = [folder for folder in whole if fits(*place_of(folder))][-keep:]
    for folder, keys in found.items():
        if folder < kept[0] or (folder in whole and folder not in kept):
            # The JSON first: what is left after a crash in between is no checkpoint.
            for key in sorted(keys, key=lambda key: not key.endswith("/state.json")):
                store.delete(key)


class CheckpointWriter:
    """Writes behind the step, one at a time; a second waits for the first, but not for long.

    A store that fails or is slow for a while costs a checkpoint, which is logged and counted in `missed`; the next one
    makes it good, and the step never waits longer than MAX_WAIT_S. The last one has no next, so it waits its turn.
    Other errors come out of the next call.

    Args:
        fits: see `write`.
    """

    def __init__(
        self,
        store: Store,
        layout: Layout,
        keep: int = KEEP,
        fits: Fits = anywhere,
        *,
        max_wait_s: float = MAX_WAIT_S,
    ) -> None:
        self._store, self._layout, self._keep, self._fits, self.missed = store, layout, keep, fits, 0
        self._max_wait_s = max_wait_s
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def submit(self, checkpoint: Checkpoint, *, must: bool = False) -> None:
        """Write a checkpoint when the one before is done; one that would have to wait for too long is missed.

        Args:
            must: wait for as long as it takes: the last checkpoint of a run.

        Raises:
            LorasyncError: what went wrong with the one before.
        """
        if self._pending is not None and not must:
            wait([self._pending], self._max_wait_s)
            if not self._pending.done():
                self.missed += 1
                log.warning("checkpoint missed=%d: the one before is still being written", self.missed)
                return
        self._settle()
        self._pending = self._executor.submit(write, self._store, self._layout, checkpoint, self._keep, self._fits)

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
