"""The store benchmark runs as its page says, measures every client, and leaves nothing behind."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
TIMEOUT_S = 300.0
STEPS = ("raw write", "raw read", "published", "visible", "verified")


def test_the_quick_benchmark_writes_its_figures_and_a_table_and_removes_the_rest(tmp_path: Path):
    out, place = tmp_path / "out" / "store.json", tmp_path / "disk"
    command = [sys.executable, "-m", "benchmarks.store", "--quick", "--dir", str(place), "--out", str(out)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert {"device", "publish_over_raw_copy", "writer_speedup", "reader_speedup", "clients"} <= set(result)
    assert result["device"]["cores"] == os.cpu_count()
    ratios = result["publish_over_raw_copy"]
    assert set(ratios) == {"file", "s3_moto"} and all(ratios[kind]["16MB"] > 0 for kind in ratios)
    for kind in ratios:
        run = result["runs"][kind]["16MB"]
        assert run["bytes"] > 16_000_000 and run["tensors"] == 776
        assert all(run["seconds"][step]["min"] <= run["seconds"][step]["median"] for step in STEPS)
        assert run["seconds"]["verified without digests"]["min"] <= run["seconds"]["verified"]["max"]
    seconds = result["clients"]["16MB"]["seconds"]
    assert {f"{client} {way}" for client in ("boto3", "s3fs", "obstore") for way in ("put", "get")} == set(seconds)
    assert result["adapter_file"]["tensors"] == 4_608 and min(result["writer_speedup"], result["reader_speedup"]) > 0
    assert "4608 tensors: save_file" in done.stdout and "s3_moto" in done.stdout
    assert list(place.iterdir()) == []
