"""What a person gets wrong, and what the command says: one clear line, the right exit code, no traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import synthetic
from s3_server import S3Server

from shared import strict_json
from shared.layout import Layout
from shared.stores import open_store


def lorasync(*words: str, **environment: str) -> tuple[int, str]:
    """(exit code, stderr)"""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    kept["AWS_EC2_METADATA_DISABLED"] = "true"
    command = [sys.executable, "-m", "shared.console", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env={**kept, **environment})
    assert "Traceback" not in done.stderr, done.stderr
    assert done.stderr.count("\n") <= 1, done.stderr
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["versions", "--store", "pigeon://roof"], "Protocol not known: pigeon"),
        (["versions", "--store", "s3://"], "no bucket in the store URL"),
        (["versions"], "Give --store URL or --config FILE"),
        (["versions", "--store", "/tmp", "--adapter", "../x"], "not an adapter name"),
        (["versions", "--store", "/tmp", "--limit", "-1"], "--limit must not be negative"),
        (["versions", "--store", "/tmp", "--store-option", "key"], "is not KEY=VALUE"),
        (["versions", "--config", "/nowhere/run.toml"], "no such configuration file"),
        (["versions", "--config", "/tmp"], "Is a directory"),
        (["versions", "--store", "/tmp", "--set", "store.adaptor=x"], "Did you mean store.adapter?"),
        (["versions", "--store", "/tmp", "--set", "store.poll_interval_s=soon"], "must be float, not 'soon'"),
        (["verify", "latest", "--store", "/nowhere"], "no version 'latest' of policy"),
        (["verify", "one", "--store", "/nowhere"], "not a version: 'one'"),
        (["verify", "--store", "/nowhere", "--base", "/nowhere"], "no version 'latest'"),
        (["export", "latest", "--store", "/nowhere"], "--out"),
        (["frobnicate"], "invalid choice: 'frobnicate'"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_in_the_arguments_exits_with_2(words: list[str], says: str):
    code, message = lorasync(*words)
    assert code == 2
    assert says in message


def test_a_missing_base_model_exits_with_2(tmp_path: Path):
    synthetic.publish(open_store(str(tmp_path)), synthetic.write_base(tmp_path / "base"))
    code, message = lorasync("verify", "--store", str(tmp_path), "--base", str(tmp_path / "nowhere"))
    assert code == 2 and "no config.json in the base model" in message


def test_a_missing_bucket_exits_with_1_and_names_it(s3: S3Server):
    for command in (["versions"], ["verify"], ["status"], ["export", "latest", "--out", "/nowhere/x"]):
        code, message = lorasync(*command, "--store", "s3://no-such-bucket/x", **s3.environment)
        assert code == 1 and "no bucket 'no-such-bucket'" in message and "Create it" in message


def test_wrong_and_missing_credentials_exit_with_1(s3: S3Server):
    url, wrong = s3.url("x"), {**s3.environment, "AWS_ACCESS_KEY_ID": "somebody"}
    code, message = lorasync("versions", "--store", url, **wrong)
    assert code == 1 and "refuses these credentials" in message
    code, message = lorasync("versions", "--store", url, AWS_ENDPOINT_URL=s3.endpoint)
    assert code == 1 and "Set AWS_ACCESS_KEY_ID" in message


def test_nobody_listening_exits_with_1_within_seconds(s3: S3Server):
    code, message = lorasync(
        "status", "--store", s3.url("x"), **{**s3.environment, "AWS_ENDPOINT_URL": "http://127.0.0.1:1"}
    )
    assert code == 1 and "Is the endpoint right and up?" in message


def test_a_store_of_a_newer_layout_exits_with_4_and_asks_for_an_upgrade(tmp_path: Path):
    open_store(str(tmp_path)).put(Layout("policy").layout, strict_json.dumps({"layout": 2}))
    code, message = lorasync("versions", "--store", str(tmp_path))
    assert code == 4 and "layout 2" in message and "Upgrade lorasync" in message


def test_a_tampered_manifest_exits_with_4(tmp_path: Path):
    store = open_store(str(tmp_path))
    manifest = synthetic.publish(store, synthetic.write_base(tmp_path / "base"))[0]
    file = tmp_path / Layout("policy").manifest(manifest.version)
    file.write_bytes(file.read_bytes().replace(b'"rank":4', b'"rank":8'))
    for command in (["versions"], ["verify"], ["export", "latest", "--out", str(tmp_path / "out")]):
        assert lorasync(*command, "--store", str(tmp_path))[0] == 4
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["train", "rollout", "demo"])
def test_a_store_inside_one_process_is_refused_by_who_shares_it(command: str, tmp_path: Path):
    task = 'train_prompts = "t"\nheldout_prompts = "h"\nreward = "m:f"\nmax_new_tokens = 4'
    (tmp_path / "run.toml").write_text(f'[store]\nurl = "memory://x"\n[model]\npath = "m"\n[task]\n{task}\n')
    told = ["--store", "memory://x"] if command == "demo" else ["--config", str(tmp_path / "run.toml")]
    code, message = lorasync(command, *told)
    assert code == 2 and "memory:// is one process's own" in message
