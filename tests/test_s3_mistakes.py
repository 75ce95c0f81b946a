"""A store that cannot be had: train, rollout and demo say so in one line, in seconds, and leave nobody behind.

The commands that only read a store: tests/test_bad_input.py.
"""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import http_witness
import psutil
import pytest
from s3_server import S3Server

from rollout.demo.settings import DemoOptions, main_config, write_config
from shared import retry
from shared.errors import StoreError
from shared.object_store import ObjectStore
from shared.obstore_store import ObstoreStore
from shared.retry import Retry
from shared.s3_store import S3Store
from shared.store import Store

WITHIN_S = 60.0  # 1 s on an idle machine, 5 s where nobody listens; torch and Megatron are imported in it
NOBODY = "http://127.0.0.1:1"

FAULTS: dict[str, tuple[str, dict[str, str], str]] = {  # name: bucket, environment, what is said
    "wrong secret": ("lorasync", {"AWS_SECRET_ACCESS_KEY": "guessed"}, "refuses these credentials: SignatureDoesNot"),
    "no bucket": ("no-such-bucket", {}, "no bucket 'no-such-bucket'"),
    "nobody listening": ("lorasync", {"AWS_ENDPOINT_URL": NOBODY}, "Is the endpoint right and up?"),
}


def lorasync(folder: Path, command: str, *words: str, **environment: str) -> tuple[int, str]:
    """Run a command in seconds: (exit code, stderr). It leaves no process that names the folder."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    done = subprocess.run(
        [sys.executable, "-P", "-m", "shared.console", command, *words],
        env={**kept, "AWS_EC2_METADATA_DISABLED": "true", "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=WITHIN_S,
    )
    assert [line for line in map(command_line, psutil.process_iter()) if str(folder) in line] == []
    return done.returncode, done.stderr


def command_line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def works_in(folder: Path, command: str) -> list[str]:
    """The words that make a command work in this folder."""
    if command == "demo":
        return ["--out", str(folder)]
    return ["--config", str(write_config(main_config(DemoOptions(folder, "policy")), folder / "run.toml"))]


@pytest.mark.parametrize(
    ("command", "fault"),
    [
        *(("demo", fault) for fault in FAULTS),
        ("rollout", "nobody listening"),
        pytest.param("train", "wrong secret", marks=pytest.mark.megatron),
    ],
)
def test_a_store_that_cannot_be_had_is_named_in_one_line(s3: S3Server, tmp_path: Path, command: str, fault: str):
    bucket, environment, says = FAULTS[fault]
    url = f"s3://{bucket}/{tmp_path.name}"
    words = [*works_in(tmp_path, command), "--store", url]
    code, told = lorasync(tmp_path, command, *words, **(s3.environment | environment))
    assert code == 1, told
    assert says in told and url in told
    assert told.count("\n") == 1 and told.startswith("lorasync: StoreError: "), told


@pytest.mark.parametrize("place", ["file", "flags"])
def test_endpoint_and_credentials_come_from_a_file_or_from_flags_as_well(s3: S3Server, tmp_path: Path, place: str):
    words = ["--store", s3.url(tmp_path.name)]
    if place == "flags":
        words += [word for key, value in s3.options.items() for word in ("--store-option", f"{key}={value}")]
    else:
        lines = ["[store.options]", *(f'{key} = "{value}"' for key, value in s3.options.items())]
        (tmp_path / "run.toml").write_text("\n".join(lines), encoding="utf-8")
        words += ["--config", str(tmp_path / "run.toml")]
    code, told = lorasync(tmp_path, "versions", *words)
    assert (code, told.strip()) == (0, f"no version of policy at {s3.url(tmp_path.name)}")


@pytest.fixture
def mute() -> Iterator[str]:
    with http_witness.mute() as endpoint:
        yield endpoint


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> Retry:
    """Two attempts, of which each may take half a second without a byte and half a second for 16 MiB."""
    monkeypatch.setattr(retry, "CONNECT_TIMEOUT_S", 0.1)
    monkeypatch.setattr(retry, "READ_TIMEOUT_S", 0.4)
    monkeypatch.setattr(retry, "SLOWEST_BYTES_PER_S", 32 << 20)
    return Retry(attempts=2, first_wait_s=0.01)


S3_CLIENTS = ["s3", "s3-obstore"]


def opened(client: str, endpoint: str, again: Retry) -> Store:
    if client == "az":
        account = f"DefaultEndpointsProtocol=http;AccountName=a;AccountKey=aGk=;BlobEndpoint={endpoint}/a;"
        return ObjectStore("az://bucket/x", {"connection_string": account}, again)
    options = {"endpoint_url": endpoint, "key": "k", "secret": "s"}
    return (ObstoreStore if client == "s3-obstore" else S3Store)("s3://bucket/x", options, again)


OPERATIONS: dict[str, tuple[Callable[[Store], Any], str]] = {  # name: a call, and what its error calls it
    "get": (lambda store: store.get("a/b"), "get"),
    "get_range": (lambda store: store.get_range("a/b", 0, 9), "get"),
    "get_if_changed": (lambda store: store.get_if_changed("a/b", "tag"), "get"),
    "list": (lambda store: store.list("a/b"), "list"),
    "put": (lambda store: store.put("a/b", b"x"), "put"),
    "put_if_absent": (lambda store: store.put_if_absent("a/b", b"x"), "put if absent"),
    "put_stream": (lambda store: store.put_stream("a/b", [b"x"], 1), "put"),
    "put_stream in parts": (lambda store: store.put_stream("a/b", [bytes(17 << 20)], 17 << 20), "put"),
    "delete": (lambda store: store.delete("a/b"), "delete"),
    "sweep": (lambda store: store.sweep("a/b", 0), "sweep"),
}


@pytest.mark.parametrize(
    ("client", "operation"),
    [
        *((client, operation) for client in S3_CLIENTS for operation in OPERATIONS),
        *(("az", operation) for operation in ("get_range", "put", "put_if_absent", "put_stream", "delete")),
    ],
)
def test_no_operation_waits_without_end_for_a_server_that_never_answers(
    mute: str, impatient: Retry, client: str, operation: str
):
    call, name = OPERATIONS[operation]
    store, began = opened(client, mute, impatient), time.monotonic()
    with pytest.raises(StoreError) as caught:
        call(store)
    assert (caught.value.op, caught.value.key, caught.value.retryable) == (name, "a/b", True)
    assert re.search(r"\([12] attempts?, \d\.\d s\)", caught.value.message), caught.value
    assert time.monotonic() - began < WITHIN_S


@pytest.mark.parametrize("client", S3_CLIENTS)
def test_a_server_that_stops_reading_in_the_middle_of_an_upload_is_given_up(mute: str, impatient: Retry, client: str):
    """aiohttp's read timeout begins when the body is sent, which never comes."""
    store, began = opened(client, mute, impatient), time.monotonic()
    with pytest.raises(StoreError, match=r"2 attempts") as caught:
        store.put("a/b", bytes(16 << 20))
    assert (caught.value.op, caught.value.key, caught.value.retryable) == ("put", "a/b", True)
    assert str(caught.value).startswith("put: ")
    assert time.monotonic() - began < WITHIN_S
