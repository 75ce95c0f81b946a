"""The trainer's checkpoints: committed by their JSON, checked before use, two kept, written behind the step."""

import hashlib
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from publisher.epochs import claim_epoch
from publisher.resume import places
from shared import strict_json
from shared.errors import Corrupt, Fenced, StoreError
from shared.layout import Layout
from shared.local_store import LocalStore
from trainer.checkpoint import Checkpoint, CheckpointWriter, newest, write

LAYOUT = Layout("policy")


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(f"file://{tmp_path}")


def checkpoint(epoch: int, step: int) -> Checkpoint:
    tensors = {"lora.a": torch.full((3, 2), step + 0.1), "rng.cpu": torch.arange(16, dtype=torch.uint8)}
    return Checkpoint(epoch, step, {"position": {"taken": step}}, tensors)


def put_body(store: LocalStore, key: str, **changes: Any) -> None:
    """Change a checkpoint's body and seal it again."""
    body = json.loads(store.get(key))["body"] | changes
    sealed = {"sha256": hashlib.sha256(strict_json.dumps(body)).hexdigest(), "body": body}
    store.put(key, strict_json.dumps(sealed))


def steps_on(store: LocalStore) -> list[str]:
    return [e.key.split("/")[-2] for e in store.list(LAYOUT.checkpoints) if e.key.endswith("state.json")]


def test_a_checkpoint_reads_back_as_it_was_written(store):
    write(store, LAYOUT, checkpoint(1, 5))
    found = newest(store, LAYOUT)
    assert found is not None
    assert (found.epoch, found.step, found.state) == (1, 5, {"position": {"taken": 5}})
    assert {name: t.tolist() for name, t in found.tensors.items()} == {
        name: t.tolist() for name, t in checkpoint(1, 5).tensors.items()
    }
    assert found.tensors["rng.cpu"].dtype == torch.uint8


def test_without_checkpoints_there_is_none(store):
    assert newest(store, LAYOUT) is None


def test_the_newest_two_are_kept_whole_and_nothing_of_the_others(store):
    for step in (5, 10, 15, 20):
        write(store, LAYOUT, checkpoint(1, step))
    assert steps_on(store) == ["00000001-000000000015", "00000001-000000000020"]
    assert len(store.list(LAYOUT.checkpoints)) == 4


def test_a_zombie_of_a_lower_epoch_does_not_displace_its_successors_state(store):
    write(store, LAYOUT, checkpoint(1, 20))
    write(store, LAYOUT, checkpoint(2, 5))
    write(store, LAYOUT, checkpoint(2, 10))
    write(store, LAYOUT, checkpoint(1, 25))
    found = newest(store, LAYOUT)
    assert found is not None and (found.epoch, found.step) == (2, 10)
    assert steps_on(store) == ["00000002-000000000005", "00000002-000000000010"]


def test_a_zombie_commits_nothing_that_a_third_life_would_go_on_from(store):
    """Epoch 2 resumed from (1, 20) and has no checkpoint of its own yet when epoch 1 wakes up and writes (1, 25)."""
    claim_epoch(store, LAYOUT)
    write(store, LAYOUT, checkpoint(1, 20))
    claim_epoch(store, LAYOUT)
    with pytest.raises(Fenced, match="epoch 2 was claimed after our epoch 1"):
        write(store, LAYOUT, checkpoint(1, 25))
    found = newest(store, LAYOUT)
    assert found is not None and found.step == 20


def test_what_lost_writes_left_behind_goes_with_the_next_checkpoints(store):
    orphans = [
        f"{LAYOUT.checkpoint(1, 5)}/state-abc.safetensors",
        f"{LAYOUT.checkpoint(1, 10)}/state-def.safetensors",
    ]
    for key in orphans:
        store.put(key, b"half a file")
    for step in (15, 20):
        write(store, LAYOUT, checkpoint(1, step))
    left = [entry.key for entry in store.list(LAYOUT.checkpoints)]
    assert len(left) == 4 and not set(left) & set(orphans)


def test_a_checkpoint_that_is_known_is_not_read_again_while_it_is_the_newest(store):
    write(store, LAYOUT, checkpoint(1, 5))
    known = newest(store, LAYOUT)
    assert newest(store, LAYOUT, known) is known
    write(store, LAYOUT, checkpoint(1, 10))
    found = newest(store, LAYOUT, known)
    assert found is not None and found.step == 10


def test_a_checkpoint_without_its_json_does_not_exist(store):
    write(store, LAYOUT, checkpoint(1, 5))
    store.put(f"{LAYOUT.checkpoint(1, 10)}/state-abc.safetensors", b"half a file")
    found = newest(store, LAYOUT)
    assert found is not None and found.step == 5


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "json", "format", "state", "name", "no tensors"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(store, damage):
    write(store, LAYOUT, checkpoint(1, 5))
    write(store, LAYOUT, checkpoint(1, 10))
    folder = LAYOUT.checkpoint(1, 10)
    tensors = next(e.key for e in store.list(folder) if e.key.endswith(".safetensors"))
    content, state = store.get(tensors), f"{folder}/state.json"
    match damage:
        case "flip":
            store.put(tensors, content[:-1] + bytes([content[-1] ^ 1]))
        case "truncate":
            store.put(tensors, content[:-1])
        case "delete":
            store.delete(tensors)
        case "json":
            store.put(state, b"{")
        case "format":
            put_body(store, state, format=99)
        case "state":  # one flipped bit: still JSON
            store.put(state, store.get(state).replace(b'"taken":10', b'"taken":11'))
        case "name":
            put_body(store, state, tensors={"name": "../state-000000000000.safetensors", "size": 1, "sha256": ""})
        case "no tensors":
            store.put(tensors, b"{}")
            digest = hashlib.sha256(b"{}").hexdigest()
            put_body(store, state, tensors={"name": tensors.rpartition("/")[2], "size": 2, "sha256": digest})
    found = newest(store, LAYOUT)
    assert found is not None and found.step == 5


class Racing(LocalStore):
    """A healthy trainer writes two checkpoints and so deletes those before, each time that a state is asked for."""

    asked_for, times = "", 0

    def get(self, key: str, max_bytes: int | None = None) -> bytes:
        if key.endswith(self.asked_for) and self.times:
            self.times -= 1
            epoch, step = places(self, LAYOUT)[-1]
            for later in (5, 10):
                write(LocalStore(self.url), LAYOUT, checkpoint(epoch, step + later))
        return super().get(key, max_bytes)


@pytest.mark.parametrize("asked_for", ["state.json", ".safetensors"])
def test_checkpoints_that_a_healthy_trainer_replaces_while_they_are_read_are_not_damaged(store, asked_for):
    for step in (5, 10):
        write(store, LAYOUT, checkpoint(1, step))
    racing = Racing(store.url)
    racing.asked_for, racing.times = asked_for, 3
    found = newest(racing, LAYOUT)
    assert found is not None and found.step == 40
    racing.times = 1000
    with pytest.raises(StoreError, match="replaced during each of 10 looks") as caught:
        newest(racing, LAYOUT)
    assert caught.value.retryable


def test_after_a_rollback_what_led_astray_goes_first_and_what_can_be_gone_on_from_is_kept(store):
    for step in (20, 30):
        write(store, LAYOUT, checkpoint(1, step))

    def fits(epoch: int, step: int) -> bool:  # epoch 2 went back to step 20
        return epoch > 2 or step <= 20

    write(store, LAYOUT, checkpoint(3, 25), fits=fits)
    assert steps_on(store) == ["00000001-000000000020", "00000003-000000000025"]
    tensors = next(e.key for e in store.list(LAYOUT.checkpoint(3, 25)) if e.key.endswith(".safetensors"))
    store.put(tensors, b"damaged")
    found = newest(store, LAYOUT, fits=fits)
    assert found is not None and (found.epoch, found.step) == (1, 20)
    write(store, LAYOUT, checkpoint(3, 30), fits=fits)
    write(store, LAYOUT, checkpoint(3, 35), fits=fits)
    assert steps_on(store) == ["00000003-000000000030", "00000003-000000000035"]


def test_when_every_checkpoint_is_damaged_it_says_so_instead_of_beginning_anew(store):
    write(store, LAYOUT, checkpoint(1, 5))
    store.put(f"{LAYOUT.checkpoint(1, 5)}/state.json", b"{}")
    with pytest.raises(Corrupt, match="no readable checkpoint") as caught:
        newest(store, LAYOUT)
    assert "begin anew" in caught.value.hint


def test_another_trainers_checkpoint_of_the_same_name_is_never_overwritten(store):
    write(store, LAYOUT, checkpoint(1, 5))
    with pytest.raises(Fenced):
        write(store, LAYOUT, checkpoint(1, 5))


class Slow(LocalStore):
    """Writes when it is let; fails as it is told."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.let, self.failure = threading.Event(), None

    def put_stream(self, key, chunks, size):
        assert self.let.wait(10)
        if self.failure:
            raise self.failure
        super().put_stream(key, chunks, size)


def test_writing_runs_behind_the_step_and_close_waits_for_it(store):
    slow = Slow(store.url)
    writer = CheckpointWriter(slow, LAYOUT)
    writer.submit(checkpoint(1, 5))
    assert newest(store, LAYOUT) is None
    slow.let.set()
    writer.close()
    writer.shutdown()
    assert steps_on(store) == ["00000001-000000000005"]


def test_a_store_that_fails_for_a_while_costs_a_checkpoint_that_is_counted(store):
    slow = Slow(store.url)
    slow.let.set()
    slow.failure = StoreError("connection reset", retryable=True)
    writer = CheckpointWriter(slow, LAYOUT)
    writer.submit(checkpoint(1, 5))
    writer.close()
    slow.failure = None
    writer.submit(checkpoint(1, 10))
    writer.close()
    writer.shutdown()
    assert writer.missed == 1
    assert steps_on(store) == ["00000001-000000000010"]


def test_a_step_does_not_wait_for_a_slow_store_and_the_checkpoint_that_is_missed_is_counted(store):
    slow = Slow(store.url)
    writer = CheckpointWriter(slow, LAYOUT, max_wait_s=0.01)
    writer.submit(checkpoint(1, 5))
    writer.submit(checkpoint(1, 10))
    assert writer.missed == 1
    slow.let.set()
    writer.close()
    writer.submit(checkpoint(1, 15))
    writer.close()
    writer.shutdown()
    assert steps_on(store) == ["00000001-000000000005", "00000001-000000000015"]


def test_the_last_checkpoint_of_a_run_waits_for_the_one_before_however_slow_it_is(store):
    slow = Slow(store.url)
    writer = CheckpointWriter(slow, LAYOUT, max_wait_s=0.01)
    writer.submit(checkpoint(1, 35))
    releasing = threading.Timer(0.2, slow.let.set)
    releasing.start()
    writer.submit(checkpoint(1, 40), must=True)
    writer.close()
    writer.shutdown()
    releasing.join()
    assert writer.missed == 0
    assert steps_on(store) == ["00000001-000000000035", "00000001-000000000040"]


def test_a_store_that_refuses_for_good_ends_the_training_at_the_next_checkpoint(store):
    slow = Slow(store.url)
    slow.let.set()
    slow.failure = StoreError("no space left")
    writer = CheckpointWriter(slow, LAYOUT)
    writer.submit(checkpoint(1, 5))
    with pytest.raises(StoreError, match="no space left"):
        writer.submit(checkpoint(1, 10))
    writer.shutdown()
