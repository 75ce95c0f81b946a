"""Fixtures that several modules share; expensive ones are made once a session."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random tiny Qwen3-MoE in Hugging Face format. Read it, don't write it."""
    from tiny_model import build_tiny_model

    return build_tiny_model(tmp_path_factory.mktemp("tiny_hf"))
