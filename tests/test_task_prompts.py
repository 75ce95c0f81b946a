"""Prompt files: what is read is what was written, and every mistake in a file is named by its place."""

import json
from pathlib import Path

import fsspec
import pyarrow
import pyarrow.parquet
import pytest

from rollout.tasks.prompts import Prompt, configured_prompts, load_prompts, write_prompts
from shared.config import Config, ModelConfig, RolloutConfig, StoreConfig, TaskConfig
from shared.errors import StoreError, UsageError

ASSETS = Path(__file__).parent.parent / "rollout" / "demo" / "assets"
PROMPTS = [
    Prompt(id="a", token_ids=(1, 20), answer="7", metadata={"level": 3, "tags": ["x"]}),
    Prompt(id="b", text="déjà vu", token_ids=(1, 21, 22)),
]


def written(tmp_path: Path, *lines: str) -> str:
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(lines), encoding="utf-8")
    return str(file)


def test_reading_gives_back_what_was_written(tmp_path: Path) -> None:
    write_prompts(tmp_path / "p.jsonl", PROMPTS)
    assert load_prompts(str(tmp_path / "p.jsonl")) == PROMPTS
    assert load_prompts(f"file://{tmp_path}/p.jsonl") == PROMPTS


def test_parquet_and_jsonl_give_equal_prompts(tmp_path: Path) -> None:
    rows = [
        {"id": "a", "text": None, "token_ids": [1, 20], "answer": "7", "level": 3, "tags": ["x"]},
        {"id": "b", "text": "déjà vu", "token_ids": [1, 21, 22]},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "p.parquet")
    assert load_prompts(str(tmp_path / "p.parquet")) == PROMPTS


def test_prompts_are_read_from_any_fsspec_url() -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/test_task_prompts/p.jsonl", b'{"id": "a", "token_ids": [5]}\n')
    assert load_prompts("memory://test_task_prompts/p.jsonl") == [Prompt(id="a", token_ids=(5,))]


def test_text_is_tokenised_with_the_base_models_tokenizer_and_given_ids_are_kept(tmp_path: Path) -> None:
    url = written(tmp_path, '{"id": "a", "text": "42-25="}', '{"id": "b", "text": "1", "token_ids": [9]}')
    text, given = load_prompts(url, base_model=ASSETS / "base_model")
    assert text.token_ids == (1, *(3 + ord(c) - ord(" ") for c in "42-25="))
    assert given.token_ids == (9,)


def test_blank_lines_are_skipped_and_do_not_shift_line_numbers(tmp_path: Path) -> None:
    url = written(tmp_path, '{"id": "a", "token_ids": [5]}', "", '{"id": "b"}')
    with pytest.raises(UsageError, match="line 3 has neither text nor token_ids"):
        load_prompts(url)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ("\udcff", "line 2 is not JSON"),
        ("[1]", "line 2 is not an object"),
        ('{"text": "x"}', "line 2 has no id"),
        ('{"id": 7, "text": "x"}', "line 2: id must be a string, not 7"),
        ('{"id": "b", "text": "x", "answer": 7}', "line 2: answer must be a string, not 7"),
        ('{"id": "b", "token_ids": [1, -1]}', "line 2: token_ids must be a list of integers"),
        ('{"id": "b", "token_ids": [true]}', "line 2: token_ids must be a list of integers"),
        ('{"id": "b", "token_ids": "1 2"}', "line 2: token_ids must be a list of integers"),
        ('{"id": "a", "text": "x"}', "line 2: id 'a' was already used in line 1"),
    ],
)
def test_a_bad_line_is_named_by_its_number(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "prompts.jsonl"
    first = json.dumps({"id": "a", "token_ids": [5]})
    file.write_bytes(f"{first}\n{line}\n".encode("utf-8", "surrogateescape"))
    with pytest.raises(UsageError, match=message):
        load_prompts(str(file))


def test_what_is_no_readable_prompt_file_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "p.parquet").write_bytes(b"PAR0")
    with pytest.raises(UsageError, match="no such prompt file"):
        load_prompts(str(tmp_path / "absent.jsonl"))
    with pytest.raises(UsageError, match="directory"):
        load_prompts(str(tmp_path))
    with pytest.raises(UsageError, match="not a Parquet file"):
        load_prompts(str(tmp_path / "p.parquet"))
    with pytest.raises(UsageError, match="Protocol not known"):
        load_prompts("nosuch://bucket/p.jsonl")
    with pytest.raises(UsageError, match="no prompt in the file"):
        load_prompts(written(tmp_path, ""))


def test_text_without_a_loadable_tokenizer_is_a_usage_error(tmp_path: Path) -> None:
    url = written(tmp_path, '{"id": "a", "text": "x"}')
    with pytest.raises(UsageError, match="need a base model's tokenizer"):
        load_prompts(url)
    with pytest.raises(UsageError, match="tokenizer does not load"):
        load_prompts(url, base_model=tmp_path)


def run_of(url: str, store: StoreConfig, max_model_len: int = 128) -> Config:
    task = TaskConfig(url, url, "m:f", max_new_tokens=8)
    return Config(store, ModelConfig("nowhere"), task, rollout=RolloutConfig(max_model_len=max_model_len))


def test_the_stores_options_go_only_to_files_under_its_own_scheme(tmp_path: Path) -> None:
    url = written(tmp_path, '{"id": "a", "token_ids": [5]}')
    options = {"auto_mkdir": True, "unheard_of": object()}
    for store in ("s3://bucket", "memory://run"):
        assert configured_prompts(run_of(url, StoreConfig(store, options=options)), url)
    memory = "memory://test_task_prompts/options.jsonl"
    fsspec.filesystem("memory").pipe_file(memory, b'{"id": "a", "token_ids": [5]}\n')
    seen = {"compression": "gzip"}  # an option of fsspec.open, to see that it arrives: the file is none
    with pytest.raises(StoreError, match=r"(?i)gzip"):
        configured_prompts(run_of(memory, StoreConfig("memory://run", options=seen)), memory)


def test_a_prompt_that_leaves_no_room_for_a_whole_completion_is_named(tmp_path: Path) -> None:
    url = written(tmp_path, '{"id": "fits", "token_ids": [1, 2]}', '{"id": "long", "token_ids": [1, 2, 3]}')
    store = StoreConfig(str(tmp_path))
    assert len(configured_prompts(run_of(url, store, max_model_len=11), url)) == 2
    with pytest.raises(UsageError, match=r"'long' has 3 tokens.*1 of 2 prompts") as caught:
        configured_prompts(run_of(url, store, max_model_len=10), url)
    assert "rollout.max_model_len = 11" in caught.value.hint
