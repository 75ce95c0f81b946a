"""The trainer's hint: the last word wins, and it is the living trainer's."""

from pathlib import Path

import pytest

from shared.catalog import Catalog
from shared.errors import StoreError
from shared.layout import Layout
from shared.local_store import LocalStore
from shared.stores import open_store
from trainer.progress import LAST_WORD_S, ProgressHint

LAYOUT = Layout("policy")


def test_what_was_told_last_stands_there_after_close(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    hint = ProgressHint(store, LAYOUT, epoch=1)
    for step in range(20):
        hint.tell({"epoch": 1, "step": step})
    hint.close()
    assert Catalog(store, "policy").progress() == {"epoch": 1, "step": 19}
    assert hint.missed == 0


def test_a_zombie_does_not_take_its_successors_last_word_back(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    zombie, successor = ProgressHint(store, LAYOUT, epoch=1), ProgressHint(store, LAYOUT, epoch=2)
    successor.tell({"epoch": 2, "done": True})
    successor.close()
    zombie.tell({"epoch": 1, "done": False})
    zombie.close()
    assert Catalog(store, "policy").progress() == {"epoch": 2, "done": True}


def test_a_successor_overwrites_what_the_life_before_told(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    for epoch in (1, 2):
        hint = ProgressHint(store, LAYOUT, epoch=epoch)
        hint.tell({"epoch": epoch})
        hint.close()
    assert Catalog(store, "policy").progress() == {"epoch": 2}


class Down(LocalStore):
    """Takes no write while it is down."""

    down = True
    retryable = True

    def put(self, key: str, content: bytes) -> None:
        if self.down:
            raise StoreError("connection reset", op="put", key=key, retryable=self.retryable)
        super().put(key, content)


def test_the_last_word_outlasts_a_store_that_fails_for_a_while(tmp_path: Path) -> None:
    store, waits = Down(str(tmp_path)), []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        store.down = len(waits) < 20

    hint = ProgressHint(store, LAYOUT, epoch=1, wait=wait)
    hint.tell({"epoch": 1, "done": False})
    hint.conclude({"epoch": 1, "done": True})
    assert Catalog(store, "policy").progress() == {"epoch": 1, "done": True}
    assert (hint.missed, len(waits)) == (1, 20)


@pytest.mark.parametrize("retryable", [True, False])
def test_a_last_word_that_is_lost_fails_the_run(tmp_path: Path, retryable: bool) -> None:
    store, waits = Down(str(tmp_path)), []
    store.retryable = retryable
    hint = ProgressHint(store, LAYOUT, epoch=1, clock=lambda: sum(waits), wait=waits.append)
    with pytest.raises(StoreError, match="connection reset"):
        hint.conclude({"epoch": 1, "done": True})
    assert sum(waits) == pytest.approx(LAST_WORD_S, abs=1.5) if retryable else not waits
