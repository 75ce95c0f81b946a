"""What is asked of a store as history and fleet grow; docs/scale.md shows what benchmarks/fleet.py prints."""

import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from synthetic import ADAPTER, publish, write_base

sys.path.insert(0, str(Path(__file__).parent.parent))  # benchmarks/ is no part of the distribution

from benchmarks.fleet import BEGIN, END, PAGE, tables
from shared import strict_json
from shared.catalog import Catalog
from shared.console import main
from shared.local_store import LocalStore
from shared.status import StatusReader
from shared.versions import Version

HISTORY, NODES = 300, 40


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    """A long history, and nodes that serve its last versions but one."""
    store = LocalStore(str(tmp_path / "store"))
    [first] = publish(store, write_base(tmp_path / "base"))
    catalog = Catalog(store, ADAPTER)
    for number in range(1, HISTORY):
        later = replace(first, version=Version(1, number))
        (store.root / catalog.layout.manifest(later.version)).write_bytes(later.to_bytes())
    (store.root / catalog.layout.nodes).mkdir()
    for node in range(NODES):
        hint = {"node": f"n{node}", "version": str(Version(1, HISTORY - 2 - node % 2)), "updated_at": 0}
        (store.root / catalog.layout.node(f"n{node}")).write_bytes(strict_json.dumps(hint))
    return catalog


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Objects got since, by their folder."""
    counter: Counter[str] = Counter()
    get = LocalStore.get

    def counted(self: LocalStore, key: str, max_bytes: int | None = None) -> bytes:
        counter[key.split("/")[1]] += 1
        return get(self, key, max_bytes)

    monkeypatch.setattr(LocalStore, "get", counted)
    return counter


def test_versions_reads_the_manifests_that_it_shows_in_their_order(
    catalog: Catalog, asked: Counter[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["versions", "--store", catalog.store.url, "--limit", "20", "--json"]) == 0
    shown = [row["version"] for row in json.loads(capsys.readouterr().out)]
    assert shown == [str(Version(1, number)) for number in range(HISTORY - 20, HISTORY)]
    assert asked["manifests"] == 20


def test_status_reads_each_hint_once_and_a_manifest_for_each_version_first_missed(
    catalog: Catalog, asked: Counter[str]
) -> None:
    reader = StatusReader(catalog)
    status = reader.read()
    assert (status.versions, sorted({node.lag_versions for node in status.nodes})) == (HISTORY, [1, 2])
    assert (asked["nodes"], asked["manifests"]) == (NODES, 2)
    reader.read()
    assert asked["manifests"] == 2, "when a version was submitted never changes"


def test_the_documented_tables_are_what_the_benchmark_prints() -> None:
    documented = PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    assert documented == "\n".join(tables()) + "\n", "write them anew: python -m benchmarks.fleet --write"
