"""Prompts into scored groups of completions, put on the store as trajectories.

Each request samples whole groups under one leased version; every token carries that version and its log-probability
under it. How fast is the pace's decision (`rollout.pace`): sampling stops when what exists would grow too stale.
Does not: retry a failed request (the prompts are drawn again sooner or later), know the trainer.
"""

import logging
import random
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from rollout.engine import Completion, Engine
from rollout.pace import Groups, ProducedGroups, capacity, taken_when_published, trajectory_key
from rollout.router import Router
from rollout.tasks.prompts import Prompt
from rollout.tasks.reward import Reward
from shared import trajectories
from shared.catalog import Catalog
from shared.config import Config
from shared.errors import EngineError, StoreError
from shared.manifest import Manifest
from shared.status import number
from shared.trajectories import Sample
from shared.versions import Version, served_name

log = logging.getLogger(__name__)

FAILURE_WAIT_S = 1.0  # after a lost request: the engine is being restarted, or the store is away


def prompt_stream(prompts: Sequence[Prompt], rng: random.Random) -> Iterator[Prompt]:
    """Every prompt once per round, each round in a new order, for ever."""
    while True:
        yield from rng.sample(prompts, len(prompts))


def to_samples(
    prompt: Prompt, completions: Sequence[Completion], version: Version, reward: Reward, node: str, group: str
) -> list[Sample]:
    """Score one prompt's completions and make them a group."""
    return [
        Sample(
            group=group,
            prompt_id=prompt.id,
            prompt_tokens=prompt.token_ids,
            tokens=tuple(completion.token_ids),
            logprobs=tuple(completion.logprobs),
            token_versions=(version,) * len(completion.token_ids),
            reward=reward(prompt, completion.text, completion.finish_reason == "stop"),
            finished=completion.finish_reason == "stop",
            node=node,
        )
        for completion in completions
    ]


class Sampler:
    """Samples until told to stop. `run` belongs to one thread; its requests run on threads of its own.

    Attributes:
        groups: put so far.
        lost: requests that failed, each of several groups.

    Raises:
        StoreError: the trajectories can't be listed.
    """

    def __init__(
        self,
        catalog: Catalog,
        engine: Engine,
        router: Router,
        config: Config,
        prompts: Sequence[Prompt],
        reward: Reward,
        paused: Callable[[], bool] = lambda: False,
    ) -> None:
        self._catalog, self._engine, self._router, self._config = catalog, engine, router, config
        self._reward, self._paused = reward, paused
        self._produced = ProducedGroups(catalog.store, catalog.layout)
        # What exists is part of the seed: a restarted node would else draw the prompts of its last life again.
        seed = f"{config.rollout.seed}/{config.rollout.node}/{self._produced.count()}"
        self._prompts = prompt_stream(prompts, random.Random(seed))
        self._life = uuid.uuid4().hex[:8]
        self._sequence = 0
        self._sequence_lock = threading.Lock()
        self._store_away = False
        self.groups = 0
        self.lost = 0

    def run(self, stopping: threading.Event) -> None:
        """Begin requests as the pace allows, until `stopping` is set; waits for those in flight."""
        rollout = self._config.rollout
        workers = max(1, rollout.max_concurrent_groups // rollout.groups_per_request)
        running: set[Future[int]] = set()
        with ThreadPoolExecutor(workers, thread_name_prefix="sample") as pool:
            while not stopping.is_set():
                begun = self._begin(pool, running, workers)
                if running and (begun == 0 or len(running) == workers):
                    done, running = wait(
                        running, timeout=self._config.store.poll_interval_s, return_when=FIRST_COMPLETED
                    )
                    if not self._collect(done):
                        stopping.wait(FAILURE_WAIT_S)
                elif begun == 0:
                    stopping.wait(self._config.store.poll_interval_s)

    def _begin(self, pool: ThreadPoolExecutor, running: set[Future[int]], workers: int) -> int:
        """Begin one request if the pace allows it; returns how many groups it holds."""
        rollout = self._config.rollout
        manifest = self._router.routed
        if manifest is None or len(running) >= workers or self._paused():
            return 0
        try:
            progress = self._catalog.progress()
            produced = self._produced.count()
        except StoreError as error:
            if not self._store_away:
                log.warning("sampler pauses: %s", error)
            self._store_away = True
            return 0
        self._store_away = False
        groups = Groups(
            produced=produced,
            running=len(running) * rollout.groups_per_request,
            taken=taken_when_published(manifest, progress),
            dropped=int(number((progress or {}).get("dropped_groups")) or 0),
        )
        count = min(capacity(groups, self._config.train, rollout.max_concurrent_groups), rollout.groups_per_request)
        if count:
            running.add(pool.submit(self._sample, [next(self._prompts) for _ in range(count)]))
        return count

    def _collect(self, done: set[Future[int]]) -> bool:
        """Count finished requests; whether none was lost."""
        lost = [error for future in done if (error := future.exception()) is not None]
        self.groups += sum(future.result() for future in done if future.exception() is None)
        self.lost += len(lost)
        for error in lost:
            if not isinstance(error, EngineError | StoreError):
                raise error
            log.warning("sampler: request lost: %s", error)
        return not lost

    def _sample(self, prompts: Sequence[Prompt]) -> int:
        """Sample, score and put one file; returns its number of groups."""
        with self._router.lease() as manifest:
            if manifest is None:
                return 0
            completions = self._engine.complete(
                served_name(self._catalog.layout.adapter, manifest.version),
                [list(prompt.token_ids) for prompt in prompts],
                n=self._config.train.group_size,
                max_tokens=self._config.task.max_new_tokens,
                temperature=1.0,
            )
        return self._put(manifest, prompts, completions)

    def _put(self, manifest: Manifest, prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]]) -> int:
        with self._sequence_lock:
            sequence, self._sequence = self._sequence, self._sequence + 1
        node = self._config.rollout.node
        samples = [
            sample
            for number, (prompt, group) in enumerate(zip(prompts, completions, strict=True))
            for sample in to_samples(
                prompt, group, manifest.version, self._reward, node, f"{node}-{self._life}-{sequence:06d}-{number}"
            )
        ]
        key = trajectory_key(self._catalog.layout, manifest, node, self._life, sequence, len(prompts))
        self._catalog.store.put_if_absent(key, trajectories.encode(samples))
        self._produced.add(key)
        return len(prompts)
