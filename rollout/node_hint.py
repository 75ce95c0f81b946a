"""A node's hint on the store, and with it the node's name: one life at a time holds it.

A name is in keys (receipts, evaluations, trajectories), in seeds, and is a folder of the cache: two nodes under one
name draw the same samples and delete each other's files. A life therefore signs its hint and renews it every few
seconds:

    at start   a hint that another life renews while we look: refused. One that nobody renews is a dead node's: taken.
    later      a hint signed by another life, which took the name while we were silent (engine starting): we stop.
"""

import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from shared import strict_json
from shared.catalog import Catalog
from shared.errors import UsageError

FRESH_S = 30.0  # an older hint is a dead node's, and nobody waits for it
LOOK_FOR_S = 5.0  # longer than a living node takes to renew its hint
LOOK_EVERY_S = 0.5


class NodeHint:
    """One life's hold on a node's name.

    Loop:
        hint = NodeHint(catalog, "gpu-7")
        hint.claim()
        hint.tell({"node": "gpu-7", "state": "serving", ...})    # every few seconds
    """

    def __init__(
        self,
        catalog: Catalog,
        node: str,
        *,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._catalog, self._node, self._clock, self._sleep = catalog, node, clock, sleep
        self._life = uuid.uuid4().hex[:12]

    def claim(self) -> None:
        """Take the name; waits a few seconds where a node of that name was killed just now.

        Raises:
            UsageError: a living node has it.
            StoreError: the store failed.
        """
        found = self._catalog.node(self._node)
        if found is not None and found.get("state") != "stopped" and self._age_s(found) < FRESH_S:
            looks = int(LOOK_FOR_S / LOOK_EVERY_S)
            for _ in range(looks):
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
        self._catalog.store.put(key, strict_json.dumps({**hint, "life": self._life}))

    def _age_s(self, hint: Mapping[str, Any]) -> float:
        """By its own clock and ours; how far they differ costs a wait at most, for `tell` finds what this lets pass."""
        updated_at = hint.get("updated_at")
        return self._clock() - updated_at if isinstance(updated_at, int | float) else 0.0

    def _taken(self) -> UsageError:
        return UsageError(
            f"another node is running under the name {self._node}",
            op="take node name",
            key=self._catalog.layout.node(self._node),
            hint="Give each node its own: --node NAME (rollout.node); left out, it is the host's",
        )
