"""Which prompts are there? Reads and writes prompt files.

A prompt file is JSONL (one object per line) or Parquet (`*.parquet`), on any fsspec URL or path. Its columns:

    id         required, a string, unique in the file
    text       the prompt as text     } at least one of the two; where `token_ids` is absent, the text is tokenised
    token_ids  the prompt as token ids } with the base model's own tokenizer, its begin-of-sequence token included
    answer     optional, a string: what the reward function compares with
    ...        every other column goes to the reward function unread, as `Prompt.metadata`

Promises: every prompt that comes out has token ids; a bad line is named by its number. Does not: cache, shuffle.
"""

import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import fsspec
from fsspec.utils import get_protocol

from shared.config import Config
from shared.errors import LorasyncError, StoreError, UsageError

OP = "read prompts"


@dataclass(frozen=True)
class Prompt:
    """One prompt. Round trip: reading what `write_prompts` wrote gives equal prompts."""

    id: str
    text: str = ""
    token_ids: tuple[int, ...] = ()
    answer: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)


def load_prompts(
    url: str, storage_options: Mapping[str, Any] | None = None, base_model: str | Path = ""
) -> list[Prompt]:
    """Read a prompt file, in the file's order.

    Args:
        url: path or fsspec URL; `.parquet` at its end means Parquet, anything else JSONL.
        storage_options: for the fsspec filesystem, as they are.
        base_model: directory of the base model, whose tokenizer is used for prompts without token ids.

    Raises:
        UsageError: no such file, unknown scheme, a bad line, a missing column, a duplicate id, an empty file, or text
            prompts without a loadable tokenizer.
        StoreError: the store could not be read.
    """
    content = _read(url, storage_options or {})
    rows = _parquet_rows(content, url) if url.endswith(".parquet") else _jsonl_rows(content, url)
    prompts: list[Prompt] = []
    seen: dict[str, str] = {}
    for where, row in rows:
        prompt = _prompt(row, where, url)
        if prompt.id in seen:
            raise UsageError(f"{where}: id {prompt.id!r} was already used in {seen[prompt.id]}", op=OP, key=url)
        seen[prompt.id] = where
        prompts.append(prompt)
    if not prompts:
        raise UsageError("no prompt in the file", op=OP, key=url)
    return _with_token_ids(prompts, str(base_model), url)


def configured_prompts(config: Config, url: str) -> list[Prompt]:
    """Read one of a run's prompt files, each prompt of a length that the engine takes with a whole completion.

    The store's options go to the file only where it lies under the store's own scheme: another one does not know them.

    Raises:
        UsageError: as `load_prompts`, or a prompt that is too long.
        StoreError: the file could not be read.
    """
    options = config.store.options if get_protocol(url) == get_protocol(config.store.url) else {}
    prompts = load_prompts(url, options, config.model.path)
    room = config.rollout.max_model_len - config.task.max_new_tokens
    too_long = [prompt for prompt in prompts if len(prompt.token_ids) > room]
    if too_long:
        longest = max(too_long, key=lambda prompt: len(prompt.token_ids))
        raise UsageError(
            f"prompt {longest.id!r} has {len(longest.token_ids)} tokens; with task.max_new_tokens "
            f"{config.task.max_new_tokens} that is more than rollout.max_model_len {config.rollout.max_model_len} "
            f"({len(too_long)} of {len(prompts)} prompts are too long)",
            op=OP,
            key=url,
            hint=f"Set rollout.max_model_len = {len(longest.token_ids) + config.task.max_new_tokens}",
        )
    return prompts


def write_prompts(path: Path, prompts: Iterable[Prompt]) -> None:
    """Write a JSONL prompt file; the same prompts give the same bytes."""
    path.write_text("".join(_line(prompt) for prompt in prompts), encoding="utf-8")


def _line(prompt: Prompt) -> str:
    row: dict[str, Any] = {"id": prompt.id}
    if prompt.text:
        row["text"] = prompt.text
    if prompt.token_ids:
        row["token_ids"] = list(prompt.token_ids)
    if prompt.answer:
        row["answer"] = prompt.answer
    return json.dumps({**row, **prompt.metadata}, ensure_ascii=False) + "\n"


def _read(url: str, storage_options: Mapping[str, Any]) -> bytes:
    try:
        with fsspec.open(url, "rb", **storage_options) as stream:
            return bytes(stream.read())
    except FileNotFoundError:
        raise UsageError("no such prompt file", op=OP, key=url) from None
    except IsADirectoryError:
        raise UsageError("this is a directory, not a prompt file", op=OP, key=url) from None
    except (ValueError, ImportError) as error:  # fsspec: unknown protocol, or its package is not installed
        raise UsageError(str(error), op=OP, key=url) from error
    except LorasyncError:
        raise
    except Exception as error:  # each scheme has its own errors: botocore's, aiohttp's, OSError's
        raise StoreError(f"cannot be read: {error}", op=OP, key=url, retryable=True) from error


def _jsonl_rows(content: bytes, url: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:  # also UnicodeDecodeError
            raise UsageError(f"{where} is not JSON: {error}", op=OP, key=url) from error
        if not isinstance(row, dict):
            raise UsageError(f"{where} is not an object: {row!r:.80}", op=OP, key=url)
        yield where, row


def _parquet_rows(content: bytes, url: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(io.BytesIO(content)).to_pylist()
    except pyarrow.ArrowException as error:
        raise UsageError(f"not a Parquet file: {error}", op=OP, key=url) from error
    for number, row in enumerate(rows, start=1):
        yield f"row {number}", {name: value for name, value in row.items() if value is not None}


def _prompt(row: Mapping[str, Any], where: str, url: str) -> Prompt:
    rest = dict(row)
    columns: dict[str, Any] = {name: rest.pop(name, "") for name in ("id", "text", "answer")}
    for name, value in columns.items():
        if not isinstance(value, str):
            raise UsageError(f"{where}: {name} must be a string, not {value!r:.80}", op=OP, key=url)
    token_ids = rest.pop("token_ids", [])
    if not isinstance(token_ids, list) or any(type(i) is not int or i < 0 for i in token_ids):
        raise UsageError(f"{where}: token_ids must be a list of integers >= 0", op=OP, key=url)
    if not columns["id"]:
        raise UsageError(f"{where} has no id", op=OP, key=url, hint='Add a unique string, {"id": "42", "text": ...}')
    if not columns["text"] and not token_ids:
        raise UsageError(f"{where} has neither text nor token_ids", op=OP, key=url)
    return Prompt(**columns, token_ids=tuple(token_ids), metadata=rest)


def _with_token_ids(prompts: list[Prompt], base_model: str, url: str) -> list[Prompt]:
    """Fill in token ids where there is only text; transformers is imported only then."""
    texts = [prompt.text for prompt in prompts if not prompt.token_ids]
    if not texts:
        return prompts
    if not base_model:
        raise UsageError("text prompts need a base model's tokenizer", op=OP, key=url)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(base_model, local_files_only=True)
        encoded = iter(tokenizer(texts)["input_ids"])
    except Exception as error:  # transformers lets out OSError, ValueError, KeyError and the tokenizers' own
        raise UsageError(f"the base model's tokenizer does not load: {error}", op=OP, key=base_model) from error
    return [p if p.token_ids else replace(p, token_ids=tuple(next(encoded))) for p in prompts]
