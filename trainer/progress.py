"""The trainer's hint of how far it is: `trainer.json`, overwritten after every step, behind it.

Samplers pace themselves by it and `lorasync status` shows it. It is a hint: the latest one wins, some are never
written, and a store that refuses it costs nothing but the hint, which is logged and counted in `missed`. The last word
is no hint: nodes end by it, so it is written, or the run fails. A stalled
trainer that wakes up before it learns that it was succeeded does not overwrite its successor's, which may be the last
word of a finished run.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from shared import strict_json
from shared.catalog import Catalog
from shared.errors import StoreError
from shared.layout import Layout
from shared.outage import Outage
from shared.store import Store

log = logging.getLogger(__name__)

LAST_WORD_S = 300.0
RETRY_WAIT_S = 1.0


class ProgressHint:
    """Overwrites the hint with whatever was told last."""

    def __init__(
        self,
        store: Store,
        layout: Layout,
        epoch: int,
        clock: Callable[[], float] = time.monotonic,
        wait: Callable[[float], None] = time.sleep,
    ) -> None:
        self._clock, self._wait = clock, wait
        self._catalog, self._epoch, self.missed = Catalog(store, layout.adapter), epoch, 0
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="progress")
        self._lock = threading.Lock()
        self._next: bytes | None = None
        self._running: Future[None] | None = None

    def tell(self, body: Mapping[str, Any]) -> None:
        """Have the hint written soon, unless a newer one comes first. Returns at once."""
        with self._lock:
            self._next = strict_json.dumps(dict(body))
            if self._running is None or self._running.done():
                self._running = self._executor.submit(self._write)

    def conclude(self, body: Mapping[str, Any]) -> None:
        """Write the last word, outlasting a store that fails for up to LAST_WORD_S. `tell` is over after this.

        Raises:
            StoreError: the store took it not.
        """
        self.close()
        content, deadline, outage = strict_json.dumps(dict(body)), self._clock() + LAST_WORD_S, Outage("last word")
        while True:
            try:
                self._put(content)
            except StoreError as error:
                outage.failed(error)
                if self._clock() > deadline:
                    raise
                self._wait(RETRY_WAIT_S)
            else:
                outage.over()
                return

    def close(self) -> None:
        """Wait until the last one is written, or has failed."""
        self._executor.shutdown()

    def _write(self) -> None:
        while True:
            with self._lock:
                content, self._next = self._next, None
                if content is None:
                    self._running = None
                    return
            try:
                self._put(content)
            except StoreError as error:
                self.missed += 1
                log.warning("progress hint missed=%d: %s", self.missed, error)

    def _put(self, content: bytes) -> None:
        if not self._succeeded():
            self._catalog.store.put(self._catalog.layout.trainer, content)

    def _succeeded(self) -> bool:
        """Whether the hint there is a later life's."""
        there = (self._catalog.progress() or {}).get("epoch")
        return isinstance(there, int) and there > self._epoch
