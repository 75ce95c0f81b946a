"""The configuration file and what overrides it: names, types, and messages that say what to write instead."""

import argparse
import tomllib
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from shared import arguments
from shared.config import ALL_LINEAR, Config, RolloutConfig, StoreConfig, load_config, parse, to_toml
from shared.errors import UsageError

MINIMAL = """
[store]
url = "file:///x"
[model]
path = "base"
[task]
train_prompts = "train.jsonl"
heldout_prompts = "heldout.jsonl"
reward = "module:function"
max_new_tokens = 8
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(MINIMAL)
    return path


def with_lines(file: Path, lines: str) -> Path:
    file.write_text(MINIMAL + lines)
    return file


def options(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    arguments.add_config_arguments(parser)
    return parser.parse_args(words)


def test_what_the_file_leaves_out_has_its_default(file: Path):
    config = load_config(file)
    assert config.store == StoreConfig("file:///x")
    assert (config.lora.targets, config.train.lr, config.train.betas) == (ALL_LINEAR, 1e-3, (0.9, 0.95))


def test_an_unknown_key_or_section_fails_with_the_nearest_valid_one(file: Path):
    for lines, hint in (
        ("[train]\nlearning_rate = 1\n", r"unknown key train\.learning_rate"),
        ("[train]\nmax_stalenes = 1\n", r"Did you mean train\.max_staleness\?"),
        ("[rolout]\nport = 1\n", r"Did you mean rollout\?"),
        ("[zzz]\n", r"Valid keys: store, model, task, lora, train, rollout"),
    ):
        with pytest.raises(UsageError, match=hint):
            load_config(with_lines(file, lines))


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ("[train]\nsteps = '40'", "train.steps must be int, not '40'"),
        ("[train]\nsteps = 1.5", "train.steps must be int"),
        ("[train]\nsteps = true", "train.steps must be int"),
        ("[train]\nlr = true", "train.lr must be float"),
        ("[train]\nbetas = [0.9]", "train.betas must have 2 values, not 1"),
        ("[train]\nbetas = 0.9", "train.betas must be a list"),
        ("[train]\non_full_queue = 'drop'", "must be one of"),
        ("[lora]\ntargets = [1]", r"lora.targets\[0\] must be str"),
        ("[rollout]\nnode = 7", "rollout.node must be str"),
        ("[store.options]\n[store.options.key]\n[store]\nx = 1", "not a TOML file"),
        ("lora = 5", "not a TOML file|unknown key task.lora"),
        ("[train\n", "not a TOML file"),
    ],
)
def test_a_wrong_type_names_the_key_and_what_it_must_be(file: Path, lines: str, says: str):
    with pytest.raises(UsageError, match=says):
        load_config(with_lines(file, lines))


def test_an_integer_is_taken_where_a_float_is_asked(file: Path):
    assert load_config(with_lines(file, "[train]\nlr = 1\n")).train.lr == 1.0


def test_a_missing_required_key_or_section_is_named(tmp_path: Path):
    path = tmp_path / "run.toml"
    path.write_text('[store]\nadapter = "x"\n[model]\npath = "b"\n')
    with pytest.raises(UsageError, match=r"missing key store\.url.*Add url under \[store\]"):
        load_config(path)
    path.write_text('[store]\nurl = "x"\n')
    with pytest.raises(UsageError, match=r"missing key model.*Add model under \[file\]"):
        load_config(path)


def test_a_file_that_is_not_there_or_not_text_is_a_usage_error(tmp_path: Path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for name in ("nothing.toml", ".", "binary", "binary/x"):
        with pytest.raises(UsageError):
            load_config(tmp_path / name)


def test_a_section_that_is_no_table_is_refused():
    with pytest.raises(UsageError, match="store must be a table"):
        parse(Config, {"store": "file:///x", "model": {}, "task": {}})


def test_overrides_win_over_the_file(file: Path):
    config = load_config(file, {"store.url": "s3://b/x", "store.options.endpoint_url": "http://h", "train.steps": 3})
    assert (config.store.url, config.store.options, config.train.steps) == (
        "s3://b/x",
        {"endpoint_url": "http://h"},
        3,
    )
    with pytest.raises(UsageError, match=r"store\.url\.x cannot be set|url is not a table"):
        load_config(file, {"store.url.x": 1})


def test_what_is_written_as_toml_reads_back_equal(file: Path, tmp_path: Path):
    config = load_config(file)
    odd: dict[str, Any] = {
        "key": 'a"b\\c\n\x7f\x00',
        "emoji \N{GRINNING FACE}": "\N{GRINNING FACE}",
        "n": {"x": [1, 2.5, True]},
    }
    config = replace(config, store=replace(config.store, options=odd), train=replace(config.train, lr=1e-5))
    (tmp_path / "again.toml").write_text(to_toml(config), encoding="utf-8")
    assert load_config(tmp_path / "again.toml") == config


def test_set_reads_text_by_the_type_of_its_field(file: Path):
    words = ["--config", str(file)]
    for setting in (
        "train.steps=3",
        "train.lr=3e-4",
        "train.betas=0.8,0.9",
        "lora.targets=linear_qkv, linear_proj",
        "rollout.node=7",
        "rollout.engine_args=['--a', 'b=c']",
        "train.on_full_queue=skip",
        "store.options.use_ssl=false",
        "store.options.config_kwargs.connect_timeout=9",
    ):
        words += ["--set", setting]
    config = arguments.read_config(options(words))
    assert (config.train.steps, config.train.lr, config.train.betas) == (3, 3e-4, (0.8, 0.9))
    assert (config.lora.targets, config.rollout.node) == (("linear_qkv", "linear_proj"), "7")
    assert (config.rollout.engine_args, config.train.on_full_queue) == (("--a", "b=c"), "skip")
    assert config.store.options == {"use_ssl": False, "config_kwargs": {"connect_timeout": 9}}


def test_flags_win_over_set_which_wins_over_the_file(file: Path):
    words = ["--config", str(file), "--set", "store.url=file:///set", "--set", "store.adapter=set"]
    config = arguments.read_config(options([*words, "--store", "file:///flag"]), {"train.steps": 9, "train.seed": None})
    assert (config.store.url, config.store.adapter) == ("file:///flag", "set")
    assert (config.train.steps, config.train.seed) == (9, 0)


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("train.lr", "is not KEY=VALUE"),
        (".=1", "is not KEY=VALUE"),
        ("train=1", "Write --set train.KEY=VALUE"),
        ("train.lrr=1", r"Did you mean train\.lr\?"),
        ("tran.lr=1", r"Did you mean train\?"),
        ("train.steps=many", "train.steps must be int, not 'many'"),
        ("train.betas=0.9,x", r"train\.betas\[1\] must be float"),
        ("train.steps=1\nlr = 2", "must be int"),
    ],
)
def test_a_bad_setting_says_what_is_wrong(file: Path, setting: str, says: str):
    with pytest.raises(UsageError, match=says):
        arguments.read_config(options(["--config", str(file), "--set", setting]))


def test_store_options_are_toml_values_or_plain_text_and_nest_at_dots():
    words = ["--store", "s3://b/x"]
    for option in (
        "endpoint_url=http://127.0.0.1:9000",
        "use_ssl=false",
        'key="123"',
        "client_kwargs.verify=no",
        "a=b=c",
    ):
        words += ["--store-option", option]
    assert arguments.read_store_config(options(words)).options == {
        "endpoint_url": "http://127.0.0.1:9000",
        "use_ssl": False,
        "key": "123",
        "client_kwargs": {"verify": "no"},
        "a": "b=c",
    }


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("lora.rank=0", "at least 1"),
        ("train.queue_versions=0", "at least 1"),
        ("train.group_size=-1", "at least 1"),
        ("rollout.port=0", "at least 1"),
        ("task.max_new_tokens=0", "at least 1"),
        ("train.lr=nan", "at least 0"),
        ("train.max_grad_norm=0", "above 0"),
        ("train.behaviour_cap=0", "above 0"),
        ("train.take_timeout_s=0", "above 0"),
        ("store.poll_interval_s=0", "above 0"),
        ("rollout.request_timeout_s=nan", "above 0"),
    ],
)
def test_a_number_out_of_range_is_refused_by_name(file: Path, setting: str, says: str) -> None:
    dotted, _, value = setting.partition("=")
    with pytest.raises(UsageError, match=f"{dotted} must be {says}, not"):
        load_config(file, {dotted: float(value) if value == "nan" else int(value)})


@pytest.mark.parametrize(
    ("betas", "says"), [([1.0, 2.0], r"betas\[0\] must be below 1"), ([0, -0.1], r"betas\[1\] must be at least 0")]
)
def test_every_number_of_a_list_must_be_within_its_bounds(file: Path, betas: list[float], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        load_config(file, {"train.betas": betas})
    assert load_config(file, {"train.betas": [0, 0.999]}).train.betas == (0.0, 0.999)


def test_the_documented_file_names_every_key_and_is_valid() -> None:
    page = (Path(__file__).parent.parent / "docs" / "configuration.md").read_text()
    example = tomllib.loads(page.split("```toml\n")[1].split("```")[0])
    parse(Config, example)
    for section in fields(Config):
        named = set(example[section.name])
        assert named == {f.name for f in fields(get_type_hints(Config)[section.name])}, section.name


def test_a_node_without_a_name_has_its_hosts_in_letters_that_keys_may_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "-gpu 7.rack_2.example-")
    assert RolloutConfig().node == "gpu-7-rack_2-example"
    monkeypatch.setattr("socket.gethostname", lambda: "...")
    assert RolloutConfig(node="").node == "node"


@pytest.mark.parametrize("name", ["a/b", "../x", "node.final", "-x", "x" * 64, "n\n"])
def test_a_node_name_that_no_key_can_hold_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="not a node's name"):
        RolloutConfig(node=name)
