"""The README promises only what stands: its tests exist, its files exist, its commands parse."""

import re
import shlex
from pathlib import Path

import pytest

from shared.console import parser

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
LINKS = re.findall(r"\[([^\]]+)\]\(([^)#]+)\)", README)


@pytest.mark.parametrize(("text", "path"), [link for link in LINKS if "://" not in link[1]])
def test_every_link_leads_to_a_file_and_every_named_test_is_in_it(text: str, path: str) -> None:
    assert (ROOT / path).exists()
    if text.startswith("test_"):
        assert f"def {text}(" in (ROOT / path).read_text(encoding="utf-8")


def commands() -> list[str]:
    """Every `lorasync` command in a shell block, continuation lines joined, comments off."""
    blocks = re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if re.search(r"(^|[ /])lorasync ", line)]


@pytest.mark.parametrize("line", commands())
def test_every_command_is_one_that_lorasync_takes(line: str) -> None:
    words = shlex.split(line, comments=True)
    at = next(i for i, word in enumerate(words) if word.endswith("lorasync"))
    arguments = [word for word in words[at + 1 :] if word != "&"]
    assert parser().parse_args(arguments).command == arguments[0]


def test_every_make_target_named_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"make ([a-z-]+)", README)):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
