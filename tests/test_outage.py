"""A store that fails for seconds, or in the soak for a minute: training goes on, nothing acknowledged is lost, readers
are at the latest in one poll when it is over, and each party says it once.

Publisher, watcher, catalog and fetch are the real ones; so is the S3 server, with weather (tests/s3_faults.py).
A failure prints its seed; the same seed falls on the requests in the same order.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import synthetic
import torch
from s3_server import S3Server
from test_agent import Bench

from publisher import publisher as publisher_module
from publisher.commit import Rank
from publisher.convert import convert
from publisher.epochs import claim_epoch
from publisher.publisher import Published, Publisher
from rollout.watch import Watcher
from shared import outage as outage_module
from shared.catalog import Catalog
from shared.errors import StoreError
from shared.fetch import WEIGHTS, fetch, verify
from shared.layout import Layout
from shared.local_store import LocalStore
from shared.outage import QUIET_S, Outage
from shared.peft_names import expected_tensors
from shared.store import Entry, Store
from shared.stores import Client, open_store
from shared.versions import Version

BASE: dict[str, Any] = {**synthetic.BASE, "hidden_size": 256, "num_experts": 16, "moe_intermediate_size": 128}
EXPECTED = expected_tensors(BASE, synthetic.LORA.targets, synthetic.LORA.rank)

STEP_S = 0.05
MAX_SUBMIT_S = 1.5  # of a step whose policy is to skip; a copy of the adapter takes a millisecond
AFTERWARDS = 4  # versions published when it is over, before the reader looks again
RECOVERY_S = 90.0
MAX_GROWTH_BYTES = 100 << 20  # a copy has 600 kB: in the soak's 1,000 steps they would add up to six times that
SEED = 20261123
RETRIED_S = 45.0  # what is shorter may pass within one call's own retries, and nobody need hear of it

WEATHERS: dict[str, dict[str, float]] = {
    "a tenth fails": {"error_percent": 10},
    "half fails": {"error_percent": 50},
    "all fails": {"error_percent": 100},
    "resets in mid-body": {"reset_percent": 70, "reset_after_bytes": 3000},
    "trickle": {"trickle_bytes_per_s": 1000},
    "throttled": {"throttle_percent": 60},
}
OUTAGES = [  # client, weather, how long it lasts
    *(("fsspec", name, 3.0) for name in WEATHERS),
    *(("obstore", name, 3.0) for name in ("half fails", "resets in mid-body", "trickle")),
    *(
        pytest.param(client, name, 60.0, marks=pytest.mark.soak)
        for client in ("fsspec", "obstore")
        for name in WEATHERS
    ),
]


class Training:
    """A trainer's loop around the real publisher: a version a step, told apart by its values."""

    def __init__(self, store: Store, base: Path, on_full_queue: str) -> None:
        self.acknowledged: list[int] = []
        self.accepted: list[int] = []
        self.steps, self.submit_s, self.behind = 0, 0.0, 0  # steps made; the longest submit; most versions held at once
        self.number = 0
        self._lora = synthetic.factors(0, BASE)
        self._pace = threading.Event()
        self.publisher: Publisher = synthetic.open_publisher(
            store, base, on_full_queue=on_full_queue, on_published=self._note
        )

    def _note(self, published: Published) -> None:
        self.acknowledged.append(published.version.number)

    def step(self, *, must: bool = False) -> None:
        self._pace.wait(STEP_S)  # the step's own work
        for lora in self._lora:
            lora.lora_A.fill_(value_of(self.number))
        began = time.monotonic()
        taken = self.publisher.submit(self.number, convert(BASE, self._lora), training={"step": self.steps}, must=must)
        self.submit_s = max(self.submit_s, time.monotonic() - began)
        self.steps += 1
        if taken:
            self.accepted.append(self.number)
            self.behind = max(self.behind, len(self.accepted) - len(self.acknowledged))
        self.number += 1

    def until(self, over: Callable[[], bool], within_s: float = RECOVERY_S) -> None:
        """Make steps until something holds."""
        deadline = time.monotonic() + within_s
        while not over():
            assert time.monotonic() < deadline, f"{len(self.acknowledged)} of {len(self.accepted)} acknowledged"
            self.step()


class Reader:
    """A node's loop without an engine: look, fetch, verify, in a thread until told to stop."""

    def __init__(self, store: Store, folder: Path) -> None:
        self.catalog, self._folder = Catalog(store, synthetic.ADAPTER), folder
        self._watcher = Watcher(self.catalog, poll_interval_s=0.1, list_interval_s=1.0)
        self.fetched: list[Version] = []
        self.errors: list[StoreError] = []
        self._stopping = threading.Event()
        self._problem: Exception | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self.poll()
            except StoreError as error:
                self.errors.append(error)
            except Exception as error:
                self._problem = error
                return
            self._watcher.wait()

    def has(self, count: int) -> bool:
        """Whether it fetched so many versions.

        Raises:
            Exception: what ended it.
        """
        if self._problem is not None:
            raise self._problem
        return len(self.fetched) >= count

    def poll(self) -> Version | None:
        """One look; what it finds is fetched and verified."""
        version = self._watcher.look()
        if version is not None and version not in self.fetched:
            directory = self._folder / str(version)
            fetch(self.catalog.store, self.catalog.manifest(version), EXPECTED, directory, base_name="base")
            assert values_in(directory) == {value_of(version.number)}, f"{version} is torn or mixed"
            self.fetched.append(version)
        return version

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join(RECOVERY_S)
        assert not self._thread.is_alive() and self.has(0)


def value_of(number: int) -> float:
    return float(number % 250 + 1)  # exact in bf16


def values_in(directory: Path) -> set[float]:
    """All values of all A factors."""
    content = synthetic.read_file(directory / WEIGHTS)
    factors = [
        torch.frombuffer(bytearray(c), dtype=torch.bfloat16) for name, c in content.items() if ".lora_A." in name
    ]
    return {float(value) for factor in factors for value in factor.unique()}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.write_base(tmp_path_factory.mktemp("base"), **BASE)


@pytest.fixture
def server(s3: S3Server) -> Iterator[S3Server]:
    yield s3
    s3.weather()


def opened(server: S3Server, folder: Path, client: Client = "fsspec") -> Store:
    return open_store(server.url(folder.name), server.options, client)


def said(caplog: pytest.LogCaptureFixture, words: str) -> int:
    return sum(words in record.message for record in caplog.records)


@pytest.mark.parametrize(("client", "name", "lasts_s"), OUTAGES)
def test_training_goes_on_nothing_is_lost_and_a_reader_is_at_the_latest_in_one_poll(
    request: pytest.FixtureRequest,
    server: S3Server,
    base: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    client: Client,
    name: str,
    lasts_s: float,
):
    soak = " -m soak" if lasts_s > RETRIED_S else ""
    print(f"seed={SEED}; replay: python -m pytest '{request.node.nodeid}'{soak}")
    caplog.set_level(logging.WARNING)
    training = Training(opened(server, tmp_path, client), base, "skip")
    reader = Reader(opened(server, tmp_path, client), tmp_path / "cache")
    training.until(lambda: reader.has(2))
    training.steps, training.submit_s, before = 0, 0.0, psutil.Process().memory_info().rss

    server.weather(seed=SEED, **WEATHERS[name])
    over_at = time.monotonic() + lasts_s
    training.until(lambda: time.monotonic() > over_at, within_s=2 * lasts_s + RECOVERY_S)
    steps, submit_s = training.steps, training.submit_s
    server.weather()
    growth = psutil.Process().memory_info().rss - before
    reader.stop()
    enough = len(training.acknowledged) + AFTERWARDS
    training.until(lambda: len(training.acknowledged) >= enough)
    training.step(must=True)
    training.publisher.close()

    assert steps >= lasts_s / STEP_S / 4 and submit_s < MAX_SUBMIT_S, "the step did not wait for the store"
    assert training.behind <= 2, "one in flight, one queued"
    assert growth < MAX_GROWTH_BYTES, f"{growth >> 20} MiB more after {steps} steps"
    assert all(error.retryable and error.op for error in reader.errors)

    committed = reader.catalog.versions()
    assert [version.number for version in committed] == training.accepted == training.acknowledged
    assert reader.poll() == committed[-1] == reader.fetched[-1]
    assert sorted(set(reader.fetched)) == reader.fetched
    assert committed.index(reader.fetched[-1]) - committed.index(reader.fetched[-2]) >= AFTERWARDS - 1, "skipped"
    for version in committed[-20:]:
        verify(reader.catalog.store, reader.catalog.manifest(version), EXPECTED)

    outages = said(caplog, "publisher: the store fails")
    assert said(caplog, "publisher: the store answers again") == outages <= 1 + lasts_s / QUIET_S
    assert outages == 1 or not (name == "all fails" and lasts_s > RETRIED_S)
    assert said(caplog, "skipping from") == said(caplog, "queue has room again")
    print(
        f"{client}, {name} for {lasts_s:.0f} s: {steps} steps, longest submit {submit_s:.3f} s, "
        f"{len(committed)} versions and {training.publisher.skipped} skipped, "
        f"failures {training.publisher.store_failures}, reader errors {len(reader.errors)}, "
        f"memory {growth / 2**20:+.0f} MiB"
    )


def test_a_step_that_shall_wait_waits_for_the_outage_and_no_version_is_skipped(
    server: S3Server, base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    training = Training(opened(server, tmp_path), base, "wait")
    training.until(lambda: len(training.acknowledged) >= 2)
    training.submit_s = 0.0
    server.weather(seed=SEED, error_percent=100)
    calm = threading.Timer(3.0, server.weather)
    calm.start()
    training.until(lambda: training.submit_s > 1.0)
    assert training.behind <= 3, "one in flight, one queued, one that waited"
    training.publisher.close()
    calm.join()
    assert training.publisher.skipped == 0
    assert training.acknowledged == training.accepted == list(range(training.number))
    assert said(caplog, "the step waits") >= 1
    assert said(caplog, "publisher: the store fails") == said(caplog, "publisher: the store answers again") <= 1


class Late(LocalStore):
    """Fails every call for a while, then answers."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.fails = threading.Event()
        self.listings = 0

    def list(self, prefix: str, after: str = "") -> list[Entry]:
        if self.fails.is_set():
            raise StoreError("unreachable", op="list", retryable=True)
        entries = super().list(prefix, after)
        self.listings += 1
        return entries


def test_an_outage_is_not_counted_against_a_rank_whose_record_is_awaited(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Rank 0 waits 10 s for rank 1's record; the store fails for a minute, and rank 1 has its say after that."""
    now = [0.0]
    monkeypatch.setattr(publisher_module, "time", SimpleNamespace(monotonic=lambda: now[0], time=time.time))
    store, patience = Late(str(tmp_path / "store")), {"record_timeout_s": 10.0}
    claim = claim_epoch(store, Layout(synthetic.ADAPTER))
    ranks = [synthetic.open_publisher(store, base, claim, rank=Rank(index, 2), **patience) for index in range(2)]
    held = [list(convert(BASE, synthetic.rank_factors(synthetic.factors(0, BASE), index, 2))) for index in range(2)]
    store.fails.set()
    ranks[0].submit(0, held[0], training={})
    wait_until(lambda: ranks[0].store_failures >= 2)
    now[0] += 60.0
    listings = store.listings
    store.fails.clear()
    wait_until(lambda: store.listings >= listings + 2)  # it looked, found nothing, and waits
    ranks[1].submit(0, held[1], training={})
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(Publisher.close, ranks))
    assert Catalog(store, synthetic.ADAPTER).versions() == [Version(claim.epoch, 0)]


def wait_until(holds: Callable[[], bool]) -> None:
    deadline, pause = time.monotonic() + RECOVERY_S, threading.Event()
    while not holds():
        assert time.monotonic() < deadline
        pause.wait(0.05)


def test_a_store_that_answers_every_other_call_is_one_outage(caplog: pytest.LogCaptureFixture):
    now = [0.0]
    outage = Outage("somebody", lambda: now[0])
    outage.answered()
    for second in range(60):
        now[0] = float(second)
        if second % 2:
            outage.answered()
        else:
            outage.failed(StoreError("503", op="get", retryable=True))
    assert len(caplog.records) == 1
    now[0] += QUIET_S
    outage.answered()
    outage.answered()
    assert caplog.records[-1].message == "somebody: the store answers again seconds=59.0 failures=30"
    assert (len(caplog.records), outage.failures) == (2, 30)


def test_an_agent_says_an_outage_twice_however_often_and_differently_it_fails(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(outage_module, "QUIET_S", 0.0)
    bench = Bench(tmp_path)
    first = bench.publish(1)
    while bench.serving != first:
        bench.agent.tick()
    bench.agent.tick()
    store: Any = bench.catalog.store
    for attempt in range(20):
        error = StoreError(f"503 ({attempt} attempts)", op="get", key=str(attempt), retryable=True)
        with monkeypatch.context() as failing:
            failing.setattr(store, "get_if_changed", _raising(error))
            bench.agent.tick()
    newest = bench.publish(2)
    while bench.serving != newest:
        bench.agent.tick()
    bench.agent.tick()
    assert bench.agent.health.failures == 20
    begun, over = (record.message for record in caplog.records if "agent:" in record.message)
    assert begun.startswith("agent: the store fails") and over.startswith("agent: the store answers again")
    assert over.endswith("failures=20")
    bench.publisher.close()


def _raising(error: StoreError) -> Callable[..., Any]:
    def call(*_: Any, **__: Any) -> Any:
        raise error

    return call
