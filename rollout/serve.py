"""The engine of a command: the one at a URL, or a vLLM server of our own; and a node run on it."""

import contextlib
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from rollout.delivery import cache_dir
from rollout.engine import Engine, VllmEngine
from rollout.node import Node
from rollout.vllm_server import VllmServer
from rollout.vllm_settings import BASE_NAME
from shared.config import Config
from shared.errors import EngineError
from shared.stores import demand_shared

START_TOLD_EVERY_S = 5.0


@dataclass(frozen=True)
class Serving:
    """An engine, its name of the base model, and the server behind it if that is ours."""

    engine: Engine
    base_name: str
    server: VllmServer | None


def serve(config: Config, *, sample: bool) -> None:
    """Run a rollout node until SIGTERM or SIGINT.

    Raises:
        UsageError: what can be seen before the engine starts: the store's URL, the prompts, the rank, the port.
        LorasyncError: the store, the engine, or a part of the node failed for good.
    """
    demand_shared(config.store.url)
    with engine_for(config) as serving:
        if serving.server is not None:
            serving.server.check()  # before thousands of prompts are read
        node = Node(config, serving.engine, serving.server, serving.base_name, sample=sample)
        if serving.server is not None:
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # nothing to drain yet
            serving.server.start(tell_start)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: node.stop())
        node.run()


@contextlib.contextmanager
def engine_for(config: Config) -> Iterator[Serving]:
    """The engine for as long as the block runs. A server of our own is made, not started, and stopped at the end.

    Raises:
        UsageError: `rollout.engine_url` is not a URL, or its server was not started for a rollout node.
        EngineError: the engine there does not answer.
    """
    url = config.rollout.engine_url
    if url:
        engine = VllmEngine(url, timeout_s=config.rollout.request_timeout_s)
        engine.check(config.rollout.max_model_len)
        yield Serving(engine, _base_name(engine, url), None)
        return
    with VllmServer(config.model, config.lora, config.rollout, cache_dir(config) / "vllm.log") as server:
        yield Serving(server.engine(), BASE_NAME, server)


def _base_name(engine: Engine, url: str) -> str:
    """What somebody else's engine calls its base model: the first name that it lists.

    Raises:
        EngineError: it lists none, or does not answer.
    """
    names = engine.models()
    if not names:
        raise EngineError("the engine lists no model", op="find base model", key=url)
    return names[0]


def tell_start(seconds: float, line: str) -> None:
    """Progress of the engine's start, now and then."""
    if seconds % START_TOLD_EVERY_S < 1.0:
        print(f"engine starting, {seconds:.0f} s: {line[:120]}", file=sys.stderr)
