"""Reward functions by name: found in the current directory too, and held to returning a finite number."""

import math
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rollout.tasks import chain_sum
from rollout.tasks.prompts import Prompt
from rollout.tasks.reward import load_reward
from shared.errors import UsageError

PROMPT = Prompt(id="p", text="1+1=", answer="2")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A current directory of the user's; modules imported from it are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def test_an_installed_function_is_found_by_name() -> None:
    reward = load_reward("rollout.tasks.chain_sum:reward")
    assert reward(PROMPT, "2", True) == 1.0
    assert reward(PROMPT, "3", True) == 0.0


def test_a_module_in_the_current_directory_is_found(here: Path) -> None:
    (here / "my_task_a.py").write_text("import my_task_b\nlength = lambda p, text, done: my_task_b.n(text)\n")
    (here / "my_task_b.py").write_text("n = len\n")
    assert load_reward("my_task_a:length")(PROMPT, "abc", True) == 3.0


def test_a_file_in_the_current_directory_cannot_shadow_an_installed_module(here: Path) -> None:
    (here / "rollout").mkdir()
    (here / "json.py").write_text("raise AssertionError\n")
    assert load_reward("rollout.tasks.chain_sum:reward")(PROMPT, "2", True) == 1.0
    with pytest.raises(UsageError, match="has no reward"):
        load_reward("json:reward")


@pytest.mark.parametrize("name", ["", "reward", "module:", ":reward", "module:two words", "a:b:c"])
def test_a_name_of_another_form_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="does not name a reward function"):
        load_reward(name)


def test_each_way_of_not_being_found_says_which(here: Path) -> None:
    (here / "my_task_c.py").write_text("reward = 1.0\n")
    (here / "my_task_d.py").write_text("import nosuchlibrary\n")
    (here / "my_task_e.py").write_text("1 / 0\n")
    with pytest.raises(UsageError, match="no module my_task_z"):
        load_reward("my_task_z:reward")
    with pytest.raises(UsageError, match=r"no module rollout\.nosuch"):
        load_reward("rollout.nosuch:reward")
    with pytest.raises(UsageError, match="module my_task_c has no other"):
        load_reward("my_task_c:other")
    with pytest.raises(UsageError, match="my_task_c:reward is not callable but a float"):
        load_reward("my_task_c:reward")
    with pytest.raises(UsageError, match="module my_task_d needs nosuchlibrary, which is not installed"):
        load_reward("my_task_d:reward")
    with pytest.raises(UsageError, match="module my_task_e fails on import: ZeroDivisionError"):
        load_reward("my_task_e:reward")


@pytest.mark.parametrize("value", ["float('nan')", "float('inf')", "None", "'1'", "[1.0]"])
def test_a_result_that_is_no_finite_number_is_refused_by_prompt(here: Path, value: str) -> None:
    (here / "my_task_f.py").write_text(f"def reward(prompt, text, finished):\n    return {value}\n")
    with pytest.raises(UsageError, match="for prompt 'p', not a finite number"):
        load_reward("my_task_f:reward")(PROMPT, "", True)


def test_a_failing_reward_function_names_the_prompt(here: Path) -> None:
    (here / "my_task_g.py").write_text("def reward(prompt, text, finished):\n    return 1 / len(text)\n")
    with pytest.raises(UsageError, match="failed on prompt 'p': ZeroDivisionError") as caught:
        load_reward("my_task_g:reward")(PROMPT, "", True)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_whole_numbers_and_truth_values_count_as_floats(here: Path) -> None:
    (here / "my_task_h.py").write_text("def reward(prompt, text, finished):\n    return finished\n")
    value = load_reward("my_task_h:reward")(PROMPT, "", True)
    assert value == 1.0 and type(value) is float and math.isfinite(value)


@pytest.mark.parametrize(
    ("completion", "finished", "expected"),
    [
        ("17", True, 1.0),
        ("017", True, 1.0),
        ("17", False, 0.0),
        ("17?", True, 0.0),
        ("17.0", True, 0.0),
        (" 17", True, 0.0),
        ("17\n", True, 0.0),
        ("+17", True, 0.0),
        ("١٧", True, 0.0),
        ("-17", True, 0.0),
        ("18", True, 0.0),
        ("", True, 0.0),
    ],
)
def test_chain_sum_rewards_only_a_finished_plain_right_integer(
    completion: str, finished: bool, expected: float
) -> None:
    assert chain_sum.reward(Prompt(id="p", text="42-25=", answer="17"), completion, finished) == expected
