"""What every Engine keeps, the fake and the real one: tests against the fake are worth as much as this suite."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from engine_fixtures import loaded, write_adapter
from fake_engine import FakeEngine
from tiny_model import ATTENTION

from rollout.engine import Engine
from shared.errors import EngineError

SEQUENCES = [[1, 20, 30, 40], [1, 50, 60]]


@dataclass(frozen=True)
class Bench:
    engine: Engine
    adapter: Path


@pytest.fixture(params=["fake", pytest.param("vllm", marks=pytest.mark.engine)])
def bench(request: pytest.FixtureRequest, tiny_hf: Path, tmp_path: Path) -> Iterator[Bench]:
    engine: Engine = FakeEngine() if request.param == "fake" else request.getfixturevalue("vllm_engine")
    yield Bench(engine, write_adapter(tmp_path / "adapter", tiny_hf, ATTENTION, seed=1))


def test_a_healthy_engine_says_so(bench: Bench) -> None:
    bench.engine.health()


def test_a_loaded_name_is_listed_until_it_is_unloaded(bench: Bench) -> None:
    with loaded(bench.engine, bench.adapter) as name:
        assert bench.engine.models() == ["base", name]
        bench.engine.unload(name)
        assert bench.engine.models() == ["base"]


def test_a_name_is_loaded_once(bench: Bench) -> None:
    with loaded(bench.engine, bench.adapter) as name:
        with pytest.raises(EngineError) as caught:
            bench.engine.load(name, str(bench.adapter))
        assert caught.value.key == name
        assert not caught.value.retryable


def test_an_unknown_name_can_neither_complete_nor_score_nor_be_unloaded(bench: Bench) -> None:
    for use in (
        lambda: bench.engine.complete("nobody", SEQUENCES, n=1, max_tokens=2, temperature=1.0),
        lambda: bench.engine.complete_seeded("nobody", SEQUENCES, [1, 2], max_tokens=2, temperature=1.0),
        lambda: bench.engine.score("nobody", SEQUENCES),
        lambda: bench.engine.unload("nobody"),
    ):
        with pytest.raises(EngineError) as caught:
            use()
        assert caught.value.key == "nobody"


def test_completions_come_by_prompt_and_sample_with_a_logprob_for_every_token(bench: Bench) -> None:
    groups = bench.engine.complete("base", SEQUENCES, n=3, max_tokens=5, temperature=1.0)
    assert [len(group) for group in groups] == [3, 3]
    for completion in (c for group in groups for c in group):
        assert 1 <= len(completion.token_ids) == len(completion.logprobs) <= 5
        assert all(value <= 0.0 for value in completion.logprobs)
        assert completion.finish_reason in ("stop", "length")
        assert isinstance(completion.text, str)


def test_seeded_completions_come_one_for_each_prompt(bench: Bench) -> None:
    completions = bench.engine.complete_seeded("base", SEQUENCES, [7, 8], max_tokens=5, temperature=1.0)
    assert [1 <= len(c.token_ids) == len(c.logprobs) <= 5 for c in completions] == [True, True]


def test_every_token_but_the_first_is_scored(bench: Bench) -> None:
    assert [len(row) for row in bench.engine.score("base", SEQUENCES)] == [3, 2]


def test_an_adapter_changes_its_own_scores_and_not_the_bases(bench: Bench) -> None:
    before = bench.engine.score("base", SEQUENCES)
    with loaded(bench.engine, bench.adapter) as name:
        assert bench.engine.score(name, SEQUENCES) != before
        for row, row_before in zip(bench.engine.score("base", SEQUENCES), before, strict=True):
            assert row == pytest.approx(row_before, abs=1e-5)


def test_nothing_asked_is_nothing_answered(bench: Bench) -> None:
    assert bench.engine.complete("base", [], n=2, max_tokens=5, temperature=1.0) == []
    assert bench.engine.complete_seeded("base", [], [], max_tokens=5, temperature=1.0) == []
    assert bench.engine.score("base", []) == []
