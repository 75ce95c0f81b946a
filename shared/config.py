"""One TOML file configures every program; each reads the sections it needs.

Promises: unknown sections and keys fail with the nearest valid name; every value's type is checked; nothing here reads
the environment. Does not: expand variables, merge files. A flag on the command line wins over the file
(`override`).
"""

import dataclasses
import difflib
import json
import math
import operator
import re
import socket
import tomllib
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from shared.errors import UsageError

Section = TypeVar("Section")

_NODE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_\-]{0,62}")
_NO_NODE_NAME = re.compile(r"[^A-Za-z0-9_\-]+")

ALL_LINEAR = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")


_BOUNDS: Mapping[str, Callable[[float, float], bool]] = {
    "at least": operator.ge,
    "above": operator.gt,
    "below": operator.lt,
}


def _at_least(low: float, default: Any) -> Any:
    """A field with a default and a lower bound, which `parse` checks."""
    return field(default=default, metadata={"at least": low})


def _above(low: float, default: Any) -> Any:
    """As `_at_least`, for what would do nothing, or nothing else, at the bound itself."""
    return field(default=default, metadata={"above": low})


@dataclass(frozen=True)
class StoreConfig:
    """Where versions live. `options` go to the fsspec filesystem as they are (endpoint_url, key, secret, ...).

    Attributes:
        client: what speaks to an object store: the scheme's fsspec package, or obstore, which may be faster.
        sign_key: the private key's file, with which the trainer signs versions; empty: it does not.
        trust: public keys (files, directories, hex digits): a reader refuses what none of them signed; empty: nothing.
    """

    url: str
    adapter: str = "policy"
    client: Literal["fsspec", "obstore"] = "fsspec"
    options: Mapping[str, Any] = field(default_factory=dict)
    poll_interval_s: float = _above(0, 1.0)
    list_interval_s: float = _at_least(0, 30.0)
    sign_key: str = ""
    trust: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelConfig:
    """The base model: a directory in Hugging Face format, the same bytes for trainer and engine."""

    path: str
    dtype: Literal["float32", "bfloat16"] = "float32"


@dataclass(frozen=True)
class LoraConfig:
    """Adapter shape. `targets` are Megatron-Core linear names; `encoding` is the dtype on the wire."""

    rank: int = _at_least(1, 8)
    alpha: int = _at_least(1, 16)
    targets: tuple[str, ...] = ALL_LINEAR
    encoding: Literal["bf16", "fp32"] = "bf16"


@dataclass(frozen=True)
class TaskConfig:
    """What is learned: prompt files (JSONL or Parquet, by URL) and a reward function (`module:function`).

    Sampling is at temperature 1: there the engine's log-probabilities are those of the policy that sampled.
    """

    train_prompts: str
    heldout_prompts: str
    reward: str
    max_new_tokens: int = field(metadata={"at least": 1})


@dataclass(frozen=True)
class TrainConfig:
    """The trainer. One optimizer step takes `prompts_per_step` groups of `group_size` completions."""

    steps: int = _at_least(1, 40)
    prompts_per_step: int = _at_least(1, 32)
    group_size: int = _at_least(1, 8)
    publish_every: int = _at_least(1, 1)
    max_staleness: int = _at_least(0, 1)
    lr: float = _at_least(0, 1e-3)
    lr_schedule: Literal["constant", "cosine"] = "constant"
    betas: tuple[float, float] = field(default=(0.9, 0.95), metadata={"at least": 0, "below": 1})
    warmup_steps: int = _at_least(0, 3)
    max_grad_norm: float = _above(0, 1.0)
    clip_low: float = _at_least(0, 0.2)  # both without effect while a batch is one step: the ratio they bound is 1
    clip_high: float = _at_least(0, 0.28)
    behaviour_cap: float = _above(0, 2.0)
    kl_coefficient: float = _at_least(0, 0.0)
    checkpoint_every: int = _at_least(1, 5)
    seed: int = 0
    threads: int = _at_least(1, 1)
    queue_versions: int = _at_least(1, 1)
    on_full_queue: Literal["wait", "skip"] = "wait"
    take_timeout_s: float = _above(0, 600.0)


@dataclass(frozen=True)
class RolloutConfig:
    """A rollout node: its engine, cache, and sampler. `engine_url` empty means: start vLLM here.

    Attributes:
        node: the node's own name; empty becomes the host's, in letters that keys may have. Without dots, which set the
            parts of a key apart.

    Raises:
        UsageError: `node` can't be part of a key.
    """

    node: str = ""
    cache_dir: str = ""
    engine_url: str = ""
    host: str = "127.0.0.1"
    port: int = _at_least(1, 8000)
    engine_args: tuple[str, ...] = ()
    max_lora_rank: int = _at_least(1, 16)
    max_loras: int = _at_least(1, 3)
    max_cpu_loras: int = _at_least(1, 8)
    max_model_len: int = _at_least(1, 4096)
    max_num_seqs: int = _at_least(1, 256)
    threads: int = _at_least(1, 1)
    start_timeout_s: float = _above(0, 300.0)
    request_timeout_s: float = _above(0, 120.0)
    groups_per_request: int = _at_least(1, 8)
    max_concurrent_groups: int = _at_least(1, 32)
    heldout_limit: int = _at_least(0, 512)
    hint_interval_s: float = _above(0, 10.0)
    quarantine_after: int = _at_least(1, 3)
    seed: int = 0

    def __post_init__(self) -> None:
        name = self.node or _NO_NODE_NAME.sub("-", socket.gethostname()).strip("-_")[:63] or "node"
        if not _NODE_NAME.fullmatch(name):
            hint = "Use letters, digits, dash and underscore; at most 63"
            raise UsageError(f"not a node's name: {self.node!r}", op="read config", key="rollout.node", hint=hint)
        object.__setattr__(self, "node", name)


@dataclass(frozen=True)
class RetentionConfig:
    """What the trainer's process deletes, and `lorasync gc` by default. Ages are by the store's own clock.

    Attributes:
        keep_versions: the newest that are kept, but never fewer than train.max_staleness needs; 0: all of them.
        grace_s: between the end of a version and that of its data, for readers without a lease.
        keep_checkpoints: the trainer's own, for damage and for rollbacks.
    """

    keep_versions: int = _at_least(0, 0)
    keep_younger_s: float = _at_least(0, 0.0)
    orphan_after_s: float = _above(0, 86400.0)
    interval_s: float = _above(0, 60.0)
    grace_s: float = _at_least(0, 10.0)
    keep_checkpoints: int = _at_least(1, 2)


@dataclass(frozen=True)
class Config:
    """The whole file."""

    store: StoreConfig
    model: ModelConfig
    task: TaskConfig
    lora: LoraConfig = field(default_factory=LoraConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    retention: RetentionConfig = field(default_factory=RetentionConfig)


def load_config(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Config:
    """Read a TOML file.

    Args:
        path: the file. Relative paths inside it are taken from the working directory.
        overrides: dotted keys that win over the file, {"store.url": "file:///x"}.

    Raises:
        UsageError: no such file, not TOML, an unknown key, a wrong type, a missing required key.
    """
    return parse(Config, override(read_toml(path), overrides or {}))


def read_toml(path: str | Path) -> dict[str, Any]:
    """The file as it stands, unchecked.

    Raises:
        UsageError: no such file, or not TOML.
    """
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError("no such configuration file", op="read config", key=str(path)) from None
    except OSError as error:
        raise UsageError(f"cannot read it: {error.strerror}", op="read config", key=str(path)) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"not a TOML file: {error}", op="read config", key=str(path)) from error


def override(mapping: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The mapping with the values at their dotted keys.

    Raises:
        UsageError: a key goes through something that is not a table.
    """
    changed = dict(mapping)
    for dotted, value in values.items():
        name, _, rest = dotted.partition(".")
        if rest:
            table = changed.get(name, {})
            if not isinstance(table, Mapping):
                raise UsageError(f"{name} is not a table, so {dotted} cannot be set", op="read config")
            value = override(table, {rest: value})
        changed[name] = value
    return changed


def parse(section: type[Section], mapping: Mapping[str, Any], where: str = "") -> Section:
    """Build a frozen dataclass from a mapping, checking names and types.

    Raises:
        UsageError: names the key, and for an unknown key the nearest valid one; a value out of its bounds.
    """
    hints = typing.get_type_hints(section)
    fields = {f.name: f for f in dataclasses.fields(section)}  # type: ignore[arg-type]
    prefix = f"{where}." if where else ""
    demand_known(mapping, section, where)
    values: dict[str, Any] = {}
    for name, spec in fields.items():
        if name in mapping:
            values[name] = _value(hints[name], mapping[name], prefix + name)
            _demand_bounds(values[name], spec.metadata, prefix + name)
        elif spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING:
            raise UsageError(
                f"missing key {prefix}{name}", op="read config", hint=f"Add {name} under [{where or 'file'}]"
            )
    return section(**values)


def _demand_bounds(value: Any, bounds: Mapping[str, float], where: str) -> None:
    """Check a number, or each of a list, against a field's bounds. NaN is within none."""
    if isinstance(value, tuple):
        for index, item in enumerate(value):
            _demand_bounds(item, bounds, f"{where}[{index}]")
        return
    for word, bound in bounds.items():
        if not _BOUNDS[word](value, bound):
            raise UsageError(f"{where} must be {word} {bound}, not {value!r}", op="read config")


def demand_known(names: Iterable[str], section: type, where: str) -> None:
    """Check that a section has these keys.

    Raises:
        UsageError: names the nearest valid one.
    """
    fields, prefix = [f.name for f in dataclasses.fields(section)], f"{where}." if where else ""
    for name in names:
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1, cutoff=0.4)
            hint = f"Did you mean {prefix}{near[0]}?" if near else f"Valid keys: {', '.join(fields)}"
            raise UsageError(f"unknown key {prefix}{name}", op="read config", hint=hint)


def _value(hint: Any, value: Any, where: str) -> Any:
    """Check one value against its annotation; lists become tuples, ints become floats where a float is asked."""
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, Mapping):
            raise UsageError(f"{where} must be a table", op="read config")
        return parse(hint, value, where)
    origin = typing.get_origin(hint)
    if origin is Literal:
        if value not in typing.get_args(hint):
            raise UsageError(f"{where} must be one of {typing.get_args(hint)}, not {value!r}", op="read config")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise UsageError(f"{where} must be a list, not {value!r}", op="read config")
        items = typing.get_args(hint)
        if items[-1] is Ellipsis:
            items = (items[0],) * len(value)
        if len(items) != len(value):
            raise UsageError(f"{where} must have {len(items)} values, not {len(value)}", op="read config")
        return tuple(_value(item, v, f"{where}[{i}]") for i, (item, v) in enumerate(zip(items, value, strict=True)))
    if origin in (types.UnionType, typing.Union):
        raise AssertionError(f"{where}: unions are not used in configuration")
    if isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise UsageError(f"{where} must be a table, not {value!r}", op="read config")
        return dict(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise UsageError(f"{where} must be {hint.__name__}, not {value!r}", op="read config")
    return value


def to_toml(config: Config) -> str:
    """The file that `load_config` reads back as an equal configuration."""
    lines: list[str] = []
    for section in dataclasses.fields(config):
        values = dataclasses.asdict(getattr(config, section.name))
        tables = {name: value for name, value in values.items() if isinstance(value, dict)}
        lines.append(f"[{section.name}]")
        lines.extend(f"{name} = {_toml(value)}" for name, value in values.items() if name not in tables)
        for name, table in tables.items():
            lines.append(f"[{section.name}.{name}]")
            lines.extend(f"{_quoted(key)} = {_toml(value)}" for key, value in table.items())
        lines.append("")
    return "\n".join(lines)


def _toml(value: Any) -> str:
    """JSON's scalars and lists are TOML's; tables nested in options are written inline."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_quoted(key)} = {_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return _quoted(value)


def _quoted(scalar: Any) -> str:
    """JSON's spelling, but for what TOML forbids: surrogate pairs in escapes, a bare DEL."""
    return json.dumps(scalar, ensure_ascii=False).replace("\x7f", "\\u007f")
