"""The store benchmark runs as the Makefile says, measures every client, and leaves nothing behind."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import store

ROOT = Path(__file__).parent.parent
TIMEOUT_S = 300.0
STEPS = ("raw write", "raw read", "published", "visible", "verified")


@pytest.mark.skipif(shutil.which("make") is None, reason="no make here")
def test_make_bench_store_writes_its_figures_and_a_table_and_removes_the_rest(tmp_path: Path):
    out, before = tmp_path / "out" / "store.json", _left_behind()
    recipe = ["make", "--assume-old=setup", "bench-store", f"VENV={sys.prefix}", f"ARGS=--quick --out '{out}'"]
    done = subprocess.run(
        recipe, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, env={**os.environ, "OMP_NUM_THREADS": "1"}
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
    assert "4608 tensors: save_file" in done.stdout and "S3: moto" in done.stdout
    assert result["clients"]["server"] == "moto" and result["writer_from_tensors_speedup"] > 0
    assert _left_behind() <= before


def test_a_size_that_takes_long_gets_fewer_rounds_but_one(monkeypatch):
    monkeypatch.setattr(store, "MOST_S", -1.0)
    assert list(store._rounds(5)) == [0]
    monkeypatch.setattr(store, "MOST_S", TIMEOUT_S)
    assert list(store._rounds(5)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("missing, kind", [([], "rgw"), (["radosgw"], "moto")])
def test_the_s3_server_is_ceph_where_it_is_installed_and_the_result_says_which(monkeypatch, missing, kind):
    monkeypatch.setattr(store.ceph_rgw, "missing_packages", lambda: missing)
    monkeypatch.setattr(sys, "argv", ["store"])
    options = store._arguments()
    assert options.dir == store.SCRATCH
    found, told = store._kind(options)
    assert found == kind and kind in told.lower() and all(name in told for name in missing)


def _left_behind() -> set[Path]:
    return set(store.SCRATCH.glob("bench-store-*"))
