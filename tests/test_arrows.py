"""What may import what; that a user's folders cannot shadow ours; that light things stay light."""

import importlib
import importlib.util
import re
import subprocess
import sys
import time
import tomllib
from importlib.metadata import distribution
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("trainer", "publisher", "rollout", "shared")
HEAVY = ("torch", "vllm", "megatron", "transformers")
HELP_LIMIT_S = 5.0  # for one help text on a busy machine; importing torch and vllm takes longer

needs_console = pytest.mark.skipif(
    importlib.util.find_spec("shared.console") is None, reason="shared/console.py does not exist yet"
)


def run(*command: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def modules_of(package: str) -> list[str]:
    """Every module of a package, by its files."""
    files = sorted((ROOT / package).rglob("*.py"))
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files]
    return [name.removesuffix(".__init__") for name in names]


@pytest.fixture
def users_folder(tmp_path: Path) -> Path:
    """A folder with packages of the same names as ours."""
    for package in PACKAGES:
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("raise AssertionError('a package of the user')\n")
    return tmp_path


def test_the_four_names_resolve_to_this_distribution(users_folder: Path) -> None:
    program = f"import {', '.join(PACKAGES)}\nfor p in ({', '.join(PACKAGES)}): print(p.__file__)"
    found = run(sys.executable, "-P", "-c", program, cwd=users_folder)
    assert found.stdout.split() == [str(ROOT / name / "__init__.py") for name in PACKAGES], found.stderr
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert distribution("lorasync").version == project["version"]


@needs_console
def test_the_console_command_is_not_shadowed_by_a_users_folders(users_folder: Path) -> None:
    found = run(Path(sys.executable).with_name("lorasync"), "--help", cwd=users_folder)
    assert found.returncode == 0, found.stderr


def test_the_arrows_hold() -> None:
    found = run(Path(sys.executable).with_name("lint-imports"))
    assert found.returncode == 0, found.stdout


def test_shared_loads_neither_torch_nor_vllm() -> None:
    loads = "\n".join(f"import {name}" for name in modules_of("shared") if not name.endswith("__main__"))
    found = run(sys.executable, "-c", f"{loads}\nimport sys\nprint(sorted(set({HEAVY!r}) & set(sys.modules)))")
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() == "[]"


@needs_console
def test_every_commands_help_answers_fast_and_without_torch() -> None:
    commands = importlib.import_module("shared.console").COMMANDS
    overview = _help()
    assert "demo" in commands
    for command in commands:
        assert re.search(rf"^ +{command}\b", overview, re.MULTILINE), overview
        assert f"usage: lorasync {command}" in _help(command)


def _help(*command: str) -> str:
    program = (
        "import sys\n"
        "from shared.console import main\n"
        f"sys.argv = ['lorasync', *{list(command)!r}, '--help']\n"
        "try:\n    code = main()\n"
        "except SystemExit as exit:\n    code = exit.code\n"
        f"print('loaded', sorted(set({HEAVY!r}) & set(sys.modules)))\n"
        "sys.exit(code)\n"
    )
    started = time.monotonic()
    found = run(sys.executable, "-c", program)
    assert time.monotonic() - started < HELP_LIMIT_S
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines()[-1] == "loaded []"
    return found.stdout
