"""Fixtures that several modules share; expensive ones are made once a session."""

import sys
from collections.abc import Iterator
from pathlib import Path

import ceph_rgw
import pytest
from s3_server import S3Server, running

from shared.store import Store
from shared.stores import open_store

# PyPI builds these three for CUDA, which breaks `import transformers` beside a CPU torch (rollout/vllm_launch.py).
for _name in ("torchvision", "torchaudio", "torchcodec"):
    sys.modules.setdefault(_name, None)  # type: ignore[arg-type]

pytest_plugins = ["engine_fixtures", "run_processes"]


@pytest.fixture(scope="session")
def tiny_hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random tiny Qwen3-MoE in Hugging Face format. Read it, don't write it."""
    from tiny_model import build_tiny_model

    return build_tiny_model(tmp_path_factory.mktemp("tiny_hf"))


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    """A real S3 server on loopback, in a process of its own."""
    with running() as server:
        yield server


@pytest.fixture(scope="session")
def ceph() -> Iterator[ceph_rgw.CephRgw]:
    """A Ceph RGW on loopback; for tests marked `ceph`."""
    with ceph_rgw.running() as server:
        yield server


@pytest.fixture(params=["file", "memory", "s3"])
def any_store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty store of each kind that a machine has by itself."""
    if request.param == "s3":
        server: S3Server = request.getfixturevalue("s3")
        return open_store(server.url(tmp_path.name), server.options)
    return open_store(str(tmp_path) if request.param == "file" else f"memory://{tmp_path.name}")
