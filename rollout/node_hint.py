"""A node's hint on the store, and with it the node's name: one life at a time holds it.

A name is in keys (receipts, evaluations, trajectories), in seeds, and is a folder of the cache: two nodes under one
name draw the same samples and delete each other's files. A life therefore signs its hint and renews it every
`renew_s`, which the hint says:

    at start   a hint that another life renews while we look, for as long as it takes to be due: refused. One that
               nobody renews is a dead node's: taken.
    later      a hint signed by another life, which took the name while we were silent (engine starting): we stop.
"""

import math
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from shared import strict_json
from shared.catalog import Catalog
from shared.errors import UsageError
from shared.status import number

FRESH_S = 30.0  # an older hint, and one not renewed three times, is a dead node's, and nobody waits for it
LATE_S = 5.0  # a living node renews its hint no later than this after it is due
LOOK_EVERY_S = 0.5


class NodeHint:
    """One life's hold on a node's name.

    Loop:
        hint = NodeHint(catalog, "gpu-7", renew_s=10.0)
        hint.claim()
        hint.tell({"node": "gpu-7", "state": "serving", ...})    # on a change, and every `renew_s`
    """

    def __init__(
        self,
        catalog: Catalog,
        node: str,
        *,
        renew_s: float,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._catalog, self._node, self._renew_s = catalog, node, renew_s
        self._clock, self._sleep = clock, sleep
        self._life = uuid.uuid4().hex[:12]

    def claim(self) -> None:
        """Take the name; where a node of that name was killed just now, waits until it would have renewed its hint.

        Raises:
            UsageError: a living node has it.
            StoreError: the store failed.
        """
        found = self._catalog.node(self._node)
        if found is not None and found.get("state") != "stopped":
            for _ in range(math.ceil(self._doubt_s(found) / LOOK_EVERY_S)):
                self._sleep(LOOK_EVERY_S)
                now = self._catalog.node(self._node)
                if now is not None and now != found and now.get("state") != "stopped":
                    raise self._taken()
        self._put({"node": self._node, "version": None, "updated_at": self._clock(), "state": "starting"})

    def tell(self, hint: Mapping[str, Any]) -> None:
        """Renew the hint.

        Raises:
            UsageError: another life has taken the name.
            StoreError: the store failed.
        """
        standing = self._catalog.node(self._node)
        if standing is not None and standing.get("life", self._life) != self._life:
            raise self._taken()
        self._put(hint)

    def _put(self, hint: Mapping[str, Any]) -> None:
        key = self._catalog.layout.node(self._node)
        self._catalog.store.put(key, strict_json.dumps({**hint, "life": self._life, "renew_s": self._renew_s}))

    def _doubt_s(self, hint: Mapping[str, Any]) -> float:
        """How long a living node may take to renew this hint from now on; 0 for a dead node's.

        Its age is by its own clock and ours; how far they differ costs a wait at most, for `tell` finds what this lets
        pass.
        """
        renew_s, updated_at = number(hint.get("renew_s")) or 0.0, number(hint.get("updated_at"))
        age_s = max(0.0, self._clock() - updated_at) if updated_at is not None else 0.0
        return max(0.0, renew_s - age_s) + LATE_S if age_s < max(FRESH_S, 3 * renew_s) else 0.0

    def _taken(self) -> UsageError:
        return UsageError(
            f"another node is running under the name {self._node}",
            op="take node name",
            key=self._catalog.layout.node(self._node),
            hint="Give each node its own: --node NAME (rollout.node); left out, it is the host's",
        )
