"""What a person gets wrong with `lorasync train` and `lorasync rollout`: one clear line and the right exit code.

All of it is said before an engine starts or a step is made. (Mistakes about the store: tests/test_bad_input.py; bad
versions on it: tests/test_end_to_end_faults.py.)
"""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_fixtures import free_port, group_members
from run_processes import START_S, Run, engine_group, small_run, wait_for

pytestmark = pytest.mark.megatron


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        yield holder.getsockname()[1]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return small_run(tmp_path, port=free_port())


def demand_one_line(run: Run, code: int, says: str, command: str, *words: str) -> None:
    found, _, told = run.ask(command, *words)
    assert found == code, told
    assert says in told
    assert told.count("\n") == 1 and told.startswith("lorasync: "), told


def test_a_taken_port_is_refused(run: Run, taken_port: int):
    demand_one_line(run, 2, f"port {taken_port} on 127.0.0.1 is taken", "rollout", "--port", str(taken_port))


def test_a_rank_that_the_engine_could_not_hold_is_refused(run: Run):
    demand_one_line(
        run, 2, "adapters of rank 16 do not fit rollout.max_lora_rank 8", "rollout", "--set", "lora.rank=16"
    )


@pytest.mark.parametrize("command", ["train", "rollout"])
def test_an_unknown_key_in_the_file_is_refused_with_the_nearest_valid_one(run: Run, command: str):
    run.file.write_text(run.file.read_text(encoding="utf-8").replace("max_staleness =", "max_stalness ="), "utf-8")
    demand_one_line(run, 2, "Did you mean train.max_staleness?", command)


@pytest.mark.parametrize("command", ["train", "rollout"])
def test_a_base_model_that_is_not_there_is_refused(run: Run, command: str, tmp_path: Path):
    demand_one_line(run, 2, "config.json", command, "--set", f"model.path={tmp_path / 'nowhere'}")


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("task.reward=rollout.tasks.chain_sum:no_such", "no_such"),
        ("task.reward=no.such.module:reward", "no.such.module"),
        ("task.train_prompts=/nowhere.jsonl", "/nowhere.jsonl"),
    ],
)
def test_a_task_that_cannot_be_read_is_refused_before_the_engine_starts(run: Run, setting: str, says: str):
    demand_one_line(run, 2, says, "rollout", "--set", setting)


def test_an_engine_that_nobody_runs_is_named(run: Run):
    url = f"http://127.0.0.1:{free_port()}"
    demand_one_line(
        run, 1, f"no answer from the engine: [Errno 111] Connection refused [key={url}]", "rollout", "--engine", url
    )


@pytest.mark.engine
def test_a_node_that_is_told_to_stop_while_its_engine_starts_ends_and_leaves_none(run: Run):
    with run.rollout() as node:
        wait_for(lambda: list(Path(run.config.rollout.cache_dir).rglob("vllm.log")), START_S, node)
        group = wait_for(lambda: engine_group(node), START_S, node)
        assert node.stop() == 0
        assert "engine starting, 15 s" not in node.told(), "it waited for the engine"
    assert group_members(group) == []
