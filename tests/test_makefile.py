"""The Makefile on machines that are not the author's."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(shutil.which("make") is None, reason="no make here")
@pytest.mark.parametrize("names", [["python3"], ["python3.11"], ["python"], ["python3.11", "python3"], []])
def test_a_python_is_found_under_each_of_its_names(names: list[str], tmp_path: Path) -> None:
    """dash looks at the first name only that `command -v` is given, and make drops what ended with 127."""
    for name in names:
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    words = [str(shutil.which("make")), "-s", "--eval", "show: ; @echo $(PYTHON) && :", "show"]
    shown = subprocess.run(words, cwd=ROOT, env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=True)
    expected = str(tmp_path / ("python3" if "python3" in names else names[0])) if names else ""
    assert shown.stdout.strip() == expected, shown.stderr
