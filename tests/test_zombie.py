"""A trainer is suspended, another takes over and publishes, the first wakes up: it ends as fenced, no reader is misled.

Real processes all of them, the reader following the store from the first version to the last. Then the same fleet with
clocks that are ten minutes off, which must change nothing.
"""

import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Self

import psutil
import pytest
import synthetic
import torch
from crash_points import End, Life, Nursery
from light_commands import LAYOUT, MOMENTS
from run_processes import wait_for

from publisher.epochs import claim_epoch
from shared.catalog import Catalog
from shared.errors import Fenced
from shared.fetch import verify
from shared.layout import version_of
from shared.local_store import LocalStore
from shared.versions import Version
from trainer.checkpoint import Checkpoint, newest, write

DEADLINE_S = 120.0
SKEW_S = 600.0


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as nursery:
        yield nursery


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    return Catalog(LocalStore(str(tmp_path / "store")), synthetic.ADAPTER)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


def lorasync(nursery: Nursery, *words: object) -> End:
    """Run a command of tests/light_commands.py to its end, in a process of its own."""
    [end] = nursery.run([Life("lorasync", {"words": [str(word) for word in words]})])
    return end


class Reader:
    """A process that follows the store."""

    def __init__(self, nursery: Nursery, pool: ThreadPoolExecutor, url: str, folder: Path) -> None:
        self._folder, self._over = folder, folder.with_suffix(".over")
        self._end: Future[End] = pool.submit(lorasync, nursery, "read", url, folder, self._over)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._over.touch()

    def took(self) -> list[Version]:
        """What it activated, in order."""
        told = self._folder / "took"
        return [Version.parse(line) for line in told.read_text().split()] if told.exists() else []

    def stop(self) -> list[Version]:
        """Let it look once more and end; what it took."""
        self._over.touch()
        end = self._end.result(DEADLINE_S)
        assert (end.code, end.error) == (0, ""), end
        return self.took()


@contextmanager
def suspended(
    nursery: Nursery, pool: ThreadPoolExecutor, url: str, base: Path, moment: str, pid: Path
) -> Iterator[tuple[psutil.Process, "Future[End]"]]:
    """A trainer that has suspended itself; killed if it is still there at the end."""
    end = pool.submit(lorasync, nursery, "train", url, base, 3, "--suspend", moment, "--pid", pid)
    wait_for(lambda: pid.exists() and pid.read_text(), DEADLINE_S)
    process = psutil.Process(int(pid.read_text()))
    try:
        wait_for(lambda: process.status() == psutil.STATUS_STOPPED, DEADLINE_S)
        yield process, end
    finally:
        if not end.done():
            process.kill()


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_trainer_that_wakes_up_after_its_successor_published_ends_as_fenced_and_misleads_nobody(
    nursery: Nursery, pool: ThreadPoolExecutor, catalog: Catalog, base: Path, tmp_path: Path, moment: str
):
    url = catalog.store.url
    with (
        Reader(nursery, pool, url, tmp_path / "reader") as reader,
        suspended(nursery, pool, url, base, moment, tmp_path / "pid") as (zombie, end),
    ):
        before = catalog.versions()
        assert before == [Version(1, 0), Version(1, 1)][: 2 if moment == "before the hint" else 1]
        wait_for(lambda: reader.took()[-1:] == before[-1:], DEADLINE_S)
        assert lorasync(nursery, "train", url, base, 2).code == 0
        assert catalog.newest() == Version(2, 1)
        wait_for(lambda: reader.took()[-1:] == [Version(2, 1)], DEADLINE_S)
        zombie.resume()
        ended = end.result(DEADLINE_S)
        assert (ended.signal, ended.code) == (0, Fenced.exit_code)
        took = reader.stop()
    assert took == sorted(set(took)) and took[-1] == Version(2, 1)

    hint = catalog.hint()  # it may lag
    assert hint is not None and hint[0] == (Version(1, 1) if moment == "before the hint" else Version(2, 1))
    assert catalog.newest() == Version(2, 1)
    for version in catalog.versions():
        verify(catalog.store, catalog.manifest(version), synthetic.EXPECTED)
    assert Reader(nursery, pool, url, tmp_path / "late").stop() == [Version(2, 1)]


def test_a_checkpoint_that_was_late_by_a_takeover_counts_until_the_successor_has_one(tmp_path: Path):
    """The documented window of trainer/checkpoint.py: the fence is looked at, a successor claims, the state is put."""
    store = TakenOver(str(tmp_path / "store"))
    claim_epoch(store, LAYOUT)
    write(store, LAYOUT, state(1, 20))
    store.successor_comes = True
    write(store, LAYOUT, state(1, 25))
    with pytest.raises(Fenced):
        write(store, LAYOUT, state(1, 30))
    third = newest(store, LAYOUT)
    assert third is not None and (third.epoch, third.step) == (1, 25)
    write(store, LAYOUT, state(2, 21))  # the successor resumed from 20
    third = newest(store, LAYOUT)
    assert third is not None and (third.epoch, third.step) == (2, 21)


class TakenOver(LocalStore):
    """Another trainer claims just before a checkpoint's last put."""

    successor_comes = False

    def put_if_absent(self, key: str, content: bytes) -> bool:
        if self.successor_comes and key.endswith("/state.json"):
            self.successor_comes = False
            claim_epoch(self, LAYOUT)
        return super().put_if_absent(key, content)


def state(epoch: int, step: int) -> Checkpoint:
    return Checkpoint(epoch, step, {"step": step}, {"lora": torch.full((2,), float(step))})


def outcome_with_clocks(
    trainer: Nursery, reader: Nursery, collector: Nursery, base: Path, folder: Path
) -> dict[str, object]:
    """Two lives of a trainer, a reader and three collections: all that they decided."""
    catalog = Catalog(LocalStore(str(folder / "store")), synthetic.ADAPTER)
    url, store = catalog.store.url, catalog.store
    ends = [lorasync(trainer, "train", url, base, 3)]
    (folder / "over").touch()
    ends.append(lorasync(reader, "read", url, folder / "reader", folder / "over"))  # and its lease stays
    ends.append(lorasync(trainer, "train", url, base, 3))
    store.put(f"{LAYOUT.attempt(Version(1, 9), 'dead')}/rank-00000.json", b"{}")
    kept = []
    for younger_s, orphan_s in ((300, 300), (0, 300), (0, -1)):
        rule = ("--keep-younger-s", younger_s, "--orphan-after-s", orphan_s)
        ends.append(lorasync(collector, "collect", url, *rule))
        stored = {str(version_of(entry.key)) for entry in store.list(LAYOUT.data)}
        kept.append((list(map(str, catalog.versions())), sorted(stored)))
    took = (folder / "reader" / "took").read_text().split()
    hint = catalog.hint()
    return {"ends": [(end.code, end.error) for end in ends], "kept": kept, "took": took, "hint": hint and hint[0]}


def test_clocks_that_are_ten_minutes_off_change_no_outcome(nursery: Nursery, base: Path, tmp_path: Path):
    with ExitStack() as stack:
        late, early = (stack.enter_context(Nursery(skew_s=skew_s)) for skew_s in (-SKEW_S, SKEW_S))
        fleets = [(nursery, nursery, nursery), (early, late, early), (late, early, late), (early, late, late)]
        outcomes = []
        for number, fleet in enumerate(fleets):
            folder = tmp_path / str(number)
            folder.mkdir()
            outcomes.append(outcome_with_clocks(*fleet, base, folder))
        claims = [json.loads(LocalStore(str(tmp_path / str(n) / "store")).get(LAYOUT.epoch(1))) for n in (1, 2)]
    assert claims[0]["claimed_at"] - claims[1]["claimed_at"] > SKEW_S  # the clocks were wrong indeed
    assert all(outcome == outcomes[0] for outcome in outcomes), outcomes
    assert outcomes[0]["ends"] == [(0, "")] * 6
    assert outcomes[0]["took"] == ["0001-000002"]
    assert outcomes[0]["kept"] == [
        (["0001-000000", "0001-000001", "0001-000002", "0002-000000", "0002-000001", "0002-000002"], KEPT_ALL),
        (["0001-000002", "0002-000001", "0002-000002"], ["0001-000002", "0001-000009", "0002-000001", "0002-000002"]),
        (["0001-000002", "0002-000001", "0002-000002"], ["0001-000002", "0002-000001", "0002-000002"]),
    ]


KEPT_ALL = ["0001-000000", "0001-000001", "0001-000002", "0001-000009", "0002-000000", "0002-000001", "0002-000002"]
