"""One trainer at a time: a life of the trainer claims the next epoch, and a higher claim fences it.

A zombie, worked through: trainer A claims epoch 1 and stalls. Trainer B claims 2 and publishes (2, 7). A wakes up and
wants to commit (1, 8): `demand_unfenced` lists epochs/, sees 2, and A exits. Had A passed the check just before B's
claim, (1, 8) would be committed, and still no reader would take it after (2, 7), for versions are ordered as pairs.
"""

import os
import socket
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from shared import strict_json
from shared.catalog import check_layout
from shared.errors import Fenced
from shared.layout import LAYOUT, Layout
from shared.store import Store

CLAIM_TRIES = 100


@dataclass(frozen=True)
class Claim:
    """One life of a trainer. `nonce` names its attempts, the same on every rank, never used by another life."""

    epoch: int
    nonce: str


def claim_epoch(store: Store, layout: Layout, clock: Callable[[], float] = time.time) -> Claim:
    """Claim the next epoch of an adapter, writing layout.json first if this is the very first.

    Raises:
        Fenced: others kept winning the claim.
        Corrupt: the store has a layout that we don't write.
    """
    check_layout(store, layout)
    store.put_if_absent(layout.layout, strict_json.dumps({"layout": LAYOUT, "uuid": uuid.uuid4().hex}))
    nonce = uuid.uuid4().hex[:12]
    claim = {"nonce": nonce, "host": socket.gethostname(), "pid": os.getpid(), "claimed_at": clock()}
    for _ in range(CLAIM_TRIES):
        epoch = max(_claimed(store, layout), default=0) + 1
        if store.put_if_absent(layout.epoch(epoch), strict_json.dumps({"epoch": epoch, **claim})):
            return Claim(epoch, nonce)
    raise Fenced(f"another trainer won each of {CLAIM_TRIES} claims", op="claim epoch", key=layout.epochs)


def demand_unfenced(store: Store, layout: Layout, epoch: int, *, op: str) -> None:
    """Check that no later life than `epoch` has begun, on behalf of `op`.

    Raises:
        Fenced: one has.
    """
    newest = max(_claimed(store, layout), default=0)
    if newest > epoch:
        raise Fenced(
            f"epoch {newest} was claimed after our epoch {epoch}",
            op=op,
            key=layout.epoch(newest),
            hint="Another trainer took over; this one stops",
        )


def _claimed(store: Store, layout: Layout) -> list[int]:
    names = (entry.key.rsplit("/", 1)[-1].removesuffix(".json") for entry in store.list(layout.epochs))
    return [int(name) for name in names if name.isdecimal()]
