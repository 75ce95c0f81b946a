"""The README promises only what stands: its tests exist, its files exist, its commands parse."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from engine_fixtures import free_port

from shared.console import parser

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = ("README.md", *(f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md"))))


def links() -> list[tuple[str, str, str]]:
    """(page, text, path) of every link to a file here."""
    found = []
    for page in PAGES:
        texts = re.findall(r"\[([^\]]+)\]\(([^)#]+)\)", (ROOT / page).read_text(encoding="utf-8"))
        found += [(page, text, path) for text, path in texts if "://" not in path]
    return found


@pytest.mark.parametrize(("page", "text", "path"), links())
def test_every_link_leads_to_a_file_and_every_named_test_is_in_it(page: str, text: str, path: str) -> None:
    file = (ROOT / page).parent / path
    assert file.exists()
    if text.startswith("test_") and not text.endswith("..."):
        assert f"def {text}(" in file.read_text(encoding="utf-8")


def commands() -> list[str]:
    """Every `lorasync` command in a shell block, continuation lines joined, comments off."""
    blocks = re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if re.search(r"(^|[ /])lorasync ", line)]


@pytest.mark.parametrize("line", commands())
def test_every_command_is_one_that_lorasync_takes(line: str) -> None:
    words = shlex.split(line, comments=True)
    at = next(i for i, word in enumerate(words) if word.split("/")[-1] == "lorasync")
    arguments = [word for word in words[at + 1 :] if word != "&"]
    assert parser().parse_args(arguments).command == arguments[0]


def test_every_make_target_named_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"make ([a-z-]+)", README)):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_the_s3_server_on_loopback_takes_the_credentials_beside_it_and_who_comes_early_waits() -> None:
    """The block as it stands, but for the port, and `versions` in the place of the demo."""
    [block] = [text for text in re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL) if "tests.s3_server" in text]
    python = shlex.quote(sys.executable)
    for old, new in {
        ".venv/bin/python": python,
        ".venv/bin/lorasync demo": f"{python} -m shared.console versions",
        "9000": str(free_port()),
    }.items():
        assert old in block
        block = block.replace(old, new)
    script = f"trap 'kill $!' EXIT\n{block}"
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "no version of policy at s3://demo/run\n")
