"""Publishing behind the step: the training thread hands over a copy, one background thread does the rest.

    publisher = Publisher(store, layout, claim, ...)
    ...
    publisher.submit(number, convert(base_config, named_lora(model)), training={"step": step}, canary=canary)
    ...
    publisher.close()             # waits for what was submitted; raises what went wrong

What the step pays for: what it hands over (one forward pass for the canary, if it makes one), one copy of the adapter
to host memory, and, when the queue of `queue_versions` is full because the store is slow, either the wait for a place
("wait") or nothing, and the version is not published ("skip"). Which of the two is the configuration's choice; both are
logged and counted. A store that fails for a while, or whose disk is full, is tried again until it answers; meanwhile
`queue_versions` + 2 copies are held at most (in flight, queued, waiting for a place). Being fenced, wrong credentials,
and an adapter that is not whole or not finite end the publisher, and the next call says so.
"""

import logging
import queue
import random
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from publisher.commit import Heading, Rank, commit, missing_ranks, put_shard
from publisher.convert import AdapterSlice
from publisher.epochs import Claim
from publisher.shard import encode, wire_scale
from shared.base_model import BaseIdentity, read_base_config
from shared.config import LoraConfig
from shared.errors import LorasyncError, StoreError, UsageError
from shared.layout import Layout
from shared.manifest import Canary, LoraShape, Manifest, Parent
from shared.outage import Outage
from shared.peft_names import expected_tensors
from shared.signing import Seal
from shared.store import Store
from shared.versions import Version

log = logging.getLogger(__name__)

Result = TypeVar("Result")

ALIAS_FROM_BYTES = 64 << 20  # below this a lone rank writes each name out, so that the stored version is plain PEFT
RETRY_WAIT_S = 1.0  # on average, after a call that the store's own retries could not save
RECORD_POLL_S = 0.1


@dataclass(frozen=True)
class Published:
    """What one publication took, in seconds: the step's share (copy, wait for a place) and the rest behind it."""

    version: Version
    bytes: int
    copy_s: float
    wait_s: float
    write_s: float


@dataclass(frozen=True)
class _Job:
    heading: Heading
    slices: list[AdapterSlice]
    copy_s: float
    wait_s: float


class Publisher:
    """Publishes one adapter in one epoch. `submit` and `close` belong to the training thread."""

    def __init__(
        self,
        store: Store,
        layout: Layout,
        claim: Claim,
        *,
        base_path: str,
        base: BaseIdentity,
        lora: LoraConfig,
        parallel: Mapping[str, int],
        parent: Manifest | None = None,
        rank: Rank = Rank(),  # noqa: B008 - frozen
        queue_versions: int = 1,
        on_full_queue: Literal["wait", "skip"] = "wait",
        record_timeout_s: float = 300.0,
        seal: Seal = Manifest.sealed,
        on_published: Callable[[Published], None] = lambda _: None,
        clock: Callable[[], float] = time.time,
        rng: random.Random | None = None,
    ) -> None:
        self._store, self._layout, self._claim, self._rank = store, layout, claim, rank
        self._lora, self._parallel, self._on_published = lora, dict(parallel), on_published
        self._expected = expected_tensors(read_base_config(base_path), lora.targets, lora.rank)
        self._order = {name: position for position, name in enumerate(self._expected)}
        self._base, self._clock, self._rng = base, clock, rng or random.Random()
        self._base_name = str(base_path).rstrip("/").rsplit("/", 1)[-1]
        self._parent, self._seal = Parent(parent.version, parent.digest) if parent else None, seal
        self._on_full, self._record_timeout_s = on_full_queue, record_timeout_s
        self.skipped, self.last_number = 0, -1  # versions not queued; the last one that was
        self._skipping = False
        self._outage = Outage("publisher")
        self._failure: LorasyncError | None = None
        self._stopping = threading.Event()
        self._jobs: queue.Queue[_Job | None] = queue.Queue(maxsize=queue_versions)
        self._thread = threading.Thread(target=self._run, name="publisher", daemon=True)
        self._thread.start()

    def submit(
        self,
        number: int,
        slices: Iterable[AdapterSlice],
        *,
        training: Mapping[str, Any],
        canary: Canary | None = None,
        must: bool = False,
    ) -> bool:
        """Copy the adapter and queue it as version (epoch, number).

        Args:
            number: higher than any submitted before in this epoch.
            slices: this rank's, from `publisher.convert.convert`; views of live parameters, copied before returning.
            training: JSON for the manifest (step, metrics, ...). `submitted_at` (Unix seconds) is added.
            canary: the trainer's own log-probabilities under exactly this adapter.
            must: wait for a place even where the policy is to skip: the last version of a run.

        Returns:
            False if the queue was full and the policy is to skip. The same number may then be submitted later.

        Raises:
            LorasyncError: what ended an earlier publication (Fenced, Corrupt, StoreError).
            UsageError: a number not higher than the last one: its shards would be written over.
        """
        self.check()
        if number <= self.last_number:
            raise UsageError(f"version number {number} after {self.last_number}", op="publish")
        if self._on_full == "skip" and not must and self._jobs.full():
            self.skipped += 1
            if not self._skipping:
                self._skipping = True
                log.warning("publisher: queue full, skipping from number=%d skipped=%d", number, self.skipped)
            return False
        started = time.monotonic()
        copies = _copy(slices)
        copied = time.monotonic()
        _, wire_alpha = wire_scale(self._lora.rank, self._lora.alpha)
        heading = Heading(
            adapter=self._layout.adapter,
            version=Version(self._claim.epoch, number),
            parent=None,
            base=self._base,
            base_name=self._base_name,
            lora=LoraShape(self._lora.rank, self._lora.alpha, wire_alpha, self._lora.targets),
            parallel=self._parallel,
            encoding=self._lora.encoding,
            training={**training, "submitted_at": self._clock()},
            canary=canary,
        )
        job, waiting = _Job(heading, copies, copied - started, 0.0), False
        while True:
            try:
                self._jobs.put(replace(job, wait_s=time.monotonic() - copied), timeout=RECORD_POLL_S)
                self.last_number = number
                if self._skipping:
                    self._skipping = False
                    log.warning("publisher: queue has room again number=%d skipped=%d", number, self.skipped)
                return True
            except queue.Full:
                self.check()
                if not waiting:
                    waiting = True
                    log.warning("publisher: queue full, the step waits number=%d", number)

    @property
    def store_failures(self) -> int:
        """Calls of the store that failed and were tried again."""
        return self._outage.failures

    def close(self, *, abandon: bool = False) -> None:
        """Publish what is queued, stop, and raise what went wrong.

        Args:
            abandon: drop what is queued instead, and don't wait for a store that fails.
        """
        if abandon:
            self._stopping.set()
        while self._thread.is_alive():
            try:
                self._jobs.put(None, timeout=RECORD_POLL_S)
                break
            except queue.Full:
                continue
        self._thread.join()
        if not abandon:
            self.check()
            self._outage.over()

    def check(self) -> None:
        """Raise what ended an earlier publication, if anything did."""
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None and not self._stopping.is_set():
            try:
                self._publish(job)
            except LorasyncError as error:
                self._failure = error
                return
            except Exception as error:
                self._failure = LorasyncError(f"{error!r}", op="publish", version=str(job.heading.version))
                self._failure.__cause__ = error
                return

    def _publish(self, job: _Job) -> None:
        """Encode and commit one version, outlasting a store that fails for a while."""
        started = time.monotonic()
        heading = replace(job.heading, parent=self._parent)
        lora, world = self._lora, self._rank.world
        item_bytes = 2 if lora.encoding == "bf16" else 4
        size = sum(rows * columns for rows, columns in self._expected.values()) * item_bytes
        aliases = world > 1 or size >= ALIAS_FROM_BYTES
        shard = encode(
            job.slices, self._order, rank=lora.rank, alpha=lora.alpha, encoding=lora.encoding, aliases=aliases
        )
        self._until_store_answers(lambda: put_shard(self._store, self._layout, self._claim, heading, self._rank, shard))
        manifest = self._commit(heading)
        self._parent = Parent(manifest.version, manifest.digest)
        seconds = time.monotonic() - started
        log.info(
            "published version=%s bytes=%d copy_s=%.3f wait_s=%.3f seconds=%.3f",
            manifest.version,
            manifest.size,
            job.copy_s,
            job.wait_s,
            seconds,
        )
        self._on_published(Published(manifest.version, manifest.size, job.copy_s, job.wait_s, seconds))

    def _commit(self, heading: Heading) -> Manifest:
        """Commit when every rank's record is there. An outage is no rank's fault: the time for records begins anew."""
        rank, failures, deadline = self._rank, -1, 0.0
        while True:
            manifest = self._until_store_answers(
                lambda: commit(
                    self._store,
                    self._layout,
                    self._claim,
                    heading,
                    rank.world,
                    self._expected,
                    rank=rank.index,
                    wait=self._stopping.wait,
                    seal=self._seal,
                )
            )
            if manifest is not None:
                return manifest
            if failures != self._outage.failures:
                failures, deadline = self._outage.failures, time.monotonic() + self._record_timeout_s
            if time.monotonic() > deadline or self._stopping.is_set():
                self._demand_records(heading.version)
            self._stopping.wait(RECORD_POLL_S)

    def _until_store_answers(self, call: Callable[[], Result]) -> Result:
        while True:
            try:
                result = call()
            except StoreError as error:
                self._outage.failed(error)
                if self._stopping.is_set():
                    raise
                self._stopping.wait(RETRY_WAIT_S * self._rng.uniform(0.5, 1.5))
            else:
                self._outage.answered()
                return result

    def _demand_records(self, version: Version) -> None:
        """Check that the last record came just now, after all.

        Raises:
            StoreError: some are missing; says whose.
        """
        world = self._rank.world
        missing = missing_ranks(self._store, self._layout, self._claim, version, world)
        if missing:
            raise StoreError(
                f"not all of {world} ranks put a record: missing {', '.join(map(str, missing))}",
                op="commit",
                version=str(version),
                hint="Look at the logs of these ranks",
            )


def _copy(slices: Iterable[AdapterSlice]) -> list[AdapterSlice]:
    """Detach slices from the live parameters: every slice's values in host memory, by the time this returns."""
    return [replace(piece, tensor=piece.tensor.detach().to("cpu", copy=True)) for piece in slices]
