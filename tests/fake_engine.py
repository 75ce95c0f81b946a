"""An Engine for faults that a real vLLM can't be made to show on demand: silent loads, leaks, deaths at a given moment.

It "serves" an adapter by adding the mean magnitude of its lora_B to a made-up base log-probability.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from rollout.engine import Completion
from shared.errors import EngineError

BASE_NAME = "base"


def base_scores(sequence: Sequence[int]) -> list[float]:
    return [-(1 + token % 7) / 10 for token in sequence[1:]]


def effect_of(directory: Path) -> float:
    tensors = load_file(directory / "adapter_model.safetensors")
    magnitudes = [value.float().abs().mean() for name, value in tensors.items() if ".lora_B." in name]
    return float(torch.stack(magnitudes).mean())


class FakeEngine:
    """See the module. Switches: `down`, `ignores_adapters`, `leaks`, `refuses`, `dies_at_load` (vLLM's core: the server
    goes on listing names and answers 500 to all else); `restart()` forgets all adapters.
    """

    url = "http://fake"

    def __init__(self) -> None:
        self.effects: dict[str, float] = {}
        self.directories: dict[str, Path] = {}
        self.log: list[str] = []
        self.down = self.ignores_adapters = self.leaks = self.refuses = self.dies_at_load = self.dead = False

    def restart(self) -> None:
        self.effects.clear()
        self.dead = False

    def health(self) -> None:
        self._demand_alive()

    def models(self) -> list[str]:
        self._demand_up()
        return [BASE_NAME, *self.effects]

    def load(self, name: str, path: str) -> None:
        self.dead |= self.dies_at_load
        self._demand_alive()
        if self.refuses or name in self.effects:
            raise EngineError("refused", op="load adapter", key=name)
        self.effects[name] = 0.0 if self.ignores_adapters else effect_of(Path(path))
        self.directories[name] = Path(path)
        self.log.append(f"load {name}")

    def unload(self, name: str) -> None:
        self._demand_alive()
        if self.effects.pop(name, None) is None:
            raise EngineError("unknown name", op="unload adapter", key=name)
        self.log.append(f"unload {name}")

    def complete(
        self, model: str, prompts: Sequence[Sequence[int]], *, n: int, max_tokens: int, temperature: float
    ) -> list[list[Completion]]:
        self._demand_known(model)
        return [[Completion((5, 2), (-0.5, -0.25), "stop", "5")] * n for _ in prompts]

    def complete_seeded(
        self,
        model: str,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        *,
        max_tokens: int,
        temperature: float,
    ) -> list[Completion]:
        return [self.complete(model, [p], n=1, max_tokens=max_tokens, temperature=temperature)[0][0] for p in prompts]

    def score(self, model: str, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        self._demand_known(model)
        leak = sum(self.effects.values()) if self.leaks else 0.0
        shift = leak if model == BASE_NAME else self.effects[model]
        return [[value + shift for value in base_scores(sequence)] for sequence in sequences]

    def _demand_up(self) -> None:
        if self.down:
            raise EngineError("connection refused", op="connect", retryable=True)

    def _demand_alive(self) -> None:
        self._demand_up()
        if self.dead:
            raise EngineError("the engine answered 500: EngineCore encountered an issue", op="ask")

    def _demand_known(self, model: str) -> None:
        self._demand_alive()
        if model != BASE_NAME and model not in self.effects:
            raise EngineError("unknown model", op="complete", key=model)
