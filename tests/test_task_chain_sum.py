"""The demo's prompts: made again they are the committed ones, and no held-out expression is trained on."""

from pathlib import Path

import pytest

from rollout.tasks.chain_sum import MAX_PROMPT_TOKENS, N_EXPRESSIONS, make_prompts
from rollout.tasks.prompts import load_prompts, write_prompts

ASSETS = Path(__file__).parent.parent / "rollout" / "demo" / "assets"
DEMONSTRATED = 12_000  # prompts that the base model was pre-trained on; the train file has the first 4,000


def test_the_committed_prompt_files_are_what_the_seed_gives(tmp_path: Path) -> None:
    train, heldout = make_prompts(4_000, 512)
    write_prompts(tmp_path / "train.jsonl", train)
    write_prompts(tmp_path / "heldout.jsonl", heldout)
    for name in ("train.jsonl", "heldout.jsonl"):
        assert (tmp_path / name).read_bytes() == (ASSETS / name).read_bytes()


def test_no_heldout_expression_was_demonstrated_or_is_trained_on() -> None:
    demonstrated, _ = make_prompts(DEMONSTRATED, 512)
    train = load_prompts(str(ASSETS / "train.jsonl"), base_model=ASSETS / "base_model")
    heldout = load_prompts(str(ASSETS / "heldout.jsonl"), base_model=ASSETS / "base_model")
    assert {p.text for p in train} <= {p.text for p in demonstrated}
    assert not {p.text for p in heldout} & {p.text for p in demonstrated}
    assert len({p.text for p in heldout}) == 512
    assert max(len(p.token_ids) for p in train + heldout) == MAX_PROMPT_TOKENS


def test_answers_are_the_expressions_values() -> None:
    train, heldout = make_prompts(2_000, 512, seed=5)
    for prompt in train + heldout:
        assert prompt.answer == str(eval(prompt.text.rstrip("="), {}))


def test_a_longer_train_set_begins_with_the_shorter_one() -> None:
    assert make_prompts(50, 10)[0] == make_prompts(80, 10)[0][:50]


def test_more_prompts_than_expressions_are_refused() -> None:
    with pytest.raises(ValueError, match="16200 exist"):
        make_prompts(N_EXPRESSIONS, 1)
