"""The sampler when its store is away: it pauses, says so once, and goes on by itself."""

import logging
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from fake_engine import FakeEngine
from synthetic import ADAPTER, publish, write_base

from rollout.router import Router
from rollout.sampler import Sampler
from rollout.tasks.prompts import Prompt
from shared.catalog import Catalog
from shared.config import Config, ModelConfig, RolloutConfig, StoreConfig, TaskConfig
from shared.errors import StoreError
from shared.stores import open_store
from shared.versions import served_name

DEADLINE_S = 20.0


class Away(Catalog):
    """A catalog whose store answers only after some looks."""

    looks = 0
    answers_after = 5

    def progress(self) -> dict[str, Any] | None:
        self.looks += 1
        if self.looks <= self.answers_after:
            raise StoreError("unreachable", op="get", retryable=True)
        return super().progress()


def test_a_store_that_is_away_is_told_once_and_sampling_goes_on_by_itself(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    store = open_store(str(tmp_path / "store"))
    base = write_base(tmp_path / "base")
    [manifest] = publish(store, base)
    catalog, engine, router = Away(store, ADAPTER), FakeEngine(), Router()
    config = Config(
        store=StoreConfig(store.url, ADAPTER, poll_interval_s=0.01),
        model=ModelConfig(str(base)),
        task=TaskConfig(train_prompts="", heldout_prompts="", reward="", max_new_tokens=4),
        rollout=RolloutConfig(node="n0"),
    )
    engine.effects[served_name(ADAPTER, manifest.version)] = 0.0
    router.route(manifest)
    sampler = Sampler(catalog, engine, router, config, [Prompt(id="a", token_ids=(1, 2))], lambda *_: 1.0)
    stopping = threading.Event()
    thread = threading.Thread(target=sampler.run, args=(stopping,))
    thread.start()
    deadline = time.monotonic() + DEADLINE_S
    while sampler.groups == 0 and time.monotonic() < deadline:
        stopping.wait(0.01)
    stopping.set()
    thread.join(DEADLINE_S)
    assert sampler.groups > 0 and catalog.looks > catalog.answers_after
    assert [record.message for record in caplog.records] == ["sampler pauses: get: unreachable"]
