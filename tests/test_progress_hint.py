"""The trainer's hint: the last word wins, and it is the living trainer's."""

from pathlib import Path

from shared.catalog import Catalog
from shared.layout import Layout
from shared.stores import open_store
from trainer.progress import ProgressHint

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
