"""The `lorasync` command as a person meets it: a process, its output, its exit code."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import synthetic
from s3_server import S3Server

from shared import strict_json
from shared.catalog import Catalog
from shared.layout import Layout
from shared.status import StatusReader
from shared.store import Store
from shared.stores import open_store
from shared.versions import Version

LIGHT_COMMANDS = ("versions", "verify", "export", "status", "gc", "pin", "rollback")


def lorasync(*words: str, env: dict[str, str] | None = None) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, **(env or {})}
    command = [sys.executable, "-m", "shared.console", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory, base: Path) -> str:
    """A store with three versions, served by two nodes. Read it, don't write it."""
    store, layout = open_store(str(tmp_path_factory.mktemp("store"))), Layout(synthetic.ADAPTER)
    synthetic.publish(store, base, count=3)
    store.put(layout.receipt(Version(1, 1), "node-a"), b"{}")
    store.put(layout.node("node-a"), strict_json.dumps(node_hint("node-a", "0001-000001")))
    store.put(layout.node("node-b"), strict_json.dumps(node_hint("node-b", None)))
    store.put(layout.trainer, strict_json.dumps({"epoch": 1, "step": 2, "steps": 40, "mean_reward": 0.5}))
    return store.url


def node_hint(node: str, version: str | None) -> dict[str, Any]:
    return {
        "node": node,
        "version": version,
        "served_since": 1_700_000_000.0,
        "updated_at": time.time(),
        "engine": "http://127.0.0.1:8000",
        "state": "serving" if version else "starting",
        "failures": 1,
        "quarantined": ["0001-000000"],
    }


@pytest.mark.parametrize("command", LIGHT_COMMANDS)
def test_help_comes_at_once_and_without_torch_or_vllm(command: str):
    code = (
        "import sys, time; started = time.monotonic(); from shared.console import main\n"
        f"try: main([{command!r}, '--help'])\n"
        "except SystemExit as exit: assert exit.code == 0\n"
        "heavy = {'torch', 'vllm', 'megatron', 'numpy', 'pyarrow', 'fsspec', 'rich'} & sys.modules.keys()\n"
        "assert not heavy, heavy; assert time.monotonic() - started < 1.0\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "--store" in done.stdout


def test_help_of_everything_needs_neither_torch_nor_vllm():
    code = (
        "import sys; from shared.console import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as exit: assert exit.code == 0\n"
        "assert not {'torch', 'vllm', 'megatron'} & sys.modules.keys()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert all(command in done.stdout for command in LIGHT_COMMANDS)


def test_versions_lists_step_size_parent_and_receipts(url: str):
    done = lorasync("versions", "--store", url, "--json")
    rows = json.loads(done.stdout)
    assert done.returncode == 0
    assert [(row["version"], row["step"], row["parent"]) for row in rows] == [
        ("0001-000000", 0, None),
        ("0001-000001", 1, "0001-000000"),
        ("0001-000002", 2, "0001-000001"),
    ]
    assert [row["receipts"] for row in rows] == [[], ["node-a"], []]
    assert all(row["bytes"] > 0 and row["submitted_at"] > 1_700_000_000 for row in rows)
    table = lorasync("versions", "--store", url, "--limit", "1")
    assert table.returncode == 0 and "0001-000002" in table.stdout and "0001-000001" in table.stdout  # its parent
    assert "0001-000000" not in table.stdout


def test_versions_says_so_when_there_are_none(tmp_path: Path):
    done = lorasync("versions", "--store", str(tmp_path), "--adapter", "nobody")
    assert (done.returncode, done.stdout) == (0, "")
    assert "no version of nobody at file://" in done.stderr
    assert lorasync("versions", "--store", str(tmp_path), "--json").stdout == "[]\n"


def test_verify_passes_whole_versions_with_and_without_the_base_model(url: str, base: Path):
    done = lorasync("verify", "--store", url, "--all", "--base", str(base))
    assert (done.returncode, done.stderr) == (0, "")
    assert "3 of 3 versions whole" in done.stdout
    assert lorasync("verify", "--store", url).returncode == 0


def test_verify_exits_with_4_for_a_corrupt_version_and_checks_the_others(tmp_path: Path, base: Path):
    store = open_store(str(tmp_path))
    manifests = synthetic.publish(store, base, count=2)
    shard = tmp_path / manifests[0].shards[0].key
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    done = lorasync("verify", "--store", str(tmp_path), "--all", "--json")
    results = json.loads(done.stdout)
    assert done.returncode == 4
    assert [result["ok"] for result in results] == [False, True]
    assert "does not match its digest" in results[0]["error"]
    assert lorasync("verify", "0001-000001", "--store", str(tmp_path)).returncode == 0


def test_verify_and_export_refuse_a_version_made_for_another_base_model(url: str, tmp_path: Path):
    other = synthetic.write_base(tmp_path / "other", seed=1)
    done = lorasync("verify", "--store", url, "--base", str(other))
    assert done.returncode == 4 and "WrongBase" in done.stdout
    done = lorasync("export", "latest", "--store", url, "--base", str(other), "--out", str(tmp_path / "out"))
    assert done.returncode == 4 and "weights_sha256" in done.stderr
    assert not (tmp_path / "out").exists()


def test_export_writes_the_same_peft_directory_with_and_without_the_base_model(url: str, base: Path, tmp_path: Path):
    outs = [tmp_path / "with", tmp_path / "without"]
    assert lorasync("export", "1", "--store", url, "--out", str(outs[0]), "--base", str(base)).returncode == 0
    assert lorasync("export", "0001-000001", "--store", url, "--out", str(outs[1])).returncode == 0
    files = [(out / "adapter_model.safetensors").read_bytes() for out in outs]
    assert files[0] == files[1]
    assert list(synthetic.read_file(outs[0] / "adapter_model.safetensors")) == list(synthetic.EXPECTED)
    config = json.loads((outs[0] / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 4, str(base))


def test_export_never_writes_into_a_directory_that_holds_something_else(url: str, tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("precious")
    done = lorasync("export", "latest", "--store", url, "--out", str(tmp_path))
    assert done.returncode == 2 and "not an empty directory" in done.stderr
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_status_shows_lag_in_versions_and_seconds(url: str):
    done = lorasync("status", "--store", url, "--json")
    status = json.loads(done.stdout)
    assert done.returncode == 0
    assert (status["latest"], status["versions"], status["trainer"]["step"]) == ("0001-000002", 3, 2)
    a, b = status["nodes"]
    assert (a["node"], a["version"], a["lag_versions"], a["quarantined"]) == (
        "node-a",
        "0001-000001",
        1,
        ["0001-000000"],
    )
    assert (b["state"], b["version"], b["lag_versions"], b["lag_s"]) == ("starting", None, None, None)
    shown = lorasync("status", "--store", url).stdout
    assert "step 2 of 40" in shown and "node-a" in shown and "0001-000002 (3 in all)" in shown


def test_lag_in_seconds_is_the_age_of_the_first_version_that_a_node_has_not_got(url: str):
    catalog = Catalog(open_store(url), synthetic.ADAPTER)
    submitted = catalog.manifest(Version(1, 2)).training["submitted_at"]
    status = StatusReader(catalog, clock=lambda: submitted + 5.0).read()
    assert status.nodes[0].lag_s == pytest.approx(5.0)


def test_a_malformed_hint_is_shown_as_unknown_and_harms_nobody(tmp_path: Path):
    store, layout = open_store(str(tmp_path)), Layout("policy")
    odd: dict[str, Any] = {"node": 7, "version": [1], "served_since": "noon", "failures": None, "quarantined": 3}
    store.put(layout.node("odd"), strict_json.dumps(odd))
    store.put(layout.node("torn"), b'{"node": "to')
    store.put(layout.trainer, b"\xff")
    done = lorasync("status", "--store", str(tmp_path))
    assert done.returncode == 0 and "unknown" in done.stdout and "none seen" in done.stdout


def test_watching_shows_a_new_version_and_ends_at_an_interrupt(tmp_path: Path, base: Path):
    store = open_store(str(tmp_path))
    command = [sys.executable, "-m", "shared.console", "status", "--store", str(tmp_path), "--watch", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["latest"] is None
        synthetic.publish(store, base)
        deadline = time.monotonic() + 30
        while json.loads(process.stdout.readline())["latest"] != "0001-000000":
            assert time.monotonic() < deadline
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130


def test_the_same_commands_work_on_s3_with_credentials_from_the_environment_or_flags(s3: S3Server, base: Path):
    store: Store = open_store(s3.url("console"), s3.options)
    synthetic.publish(store, base)
    done = lorasync("verify", "--store", s3.url("console"), env=s3.environment)
    assert done.returncode == 0, done.stderr
    flags = [f"--store-option={name}={value}" for name, value in s3.options.items()]
    done = lorasync("versions", "--store", s3.url("console"), "--json", *flags)
    assert done.returncode == 0 and len(json.loads(done.stdout)) == 1


def test_the_store_may_come_from_a_file_whose_other_sections_this_command_does_not_need(url: str, tmp_path: Path):
    file = tmp_path / "run.toml"
    file.write_text(f'[store]\nurl = "{url}"\nadapter = "somebody"\n')
    done = lorasync("versions", "--config", str(file), "--set", "store.adapter=policy", "--json")
    assert done.returncode == 0 and len(json.loads(done.stdout)) == 3
    done = lorasync("versions", "--config", str(file), "--adapter", "nobody", "--json")
    assert done.stdout == "[]\n"
