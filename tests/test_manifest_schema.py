"""docs/manifest.schema.json against every manifest that we write, and against what differs from one in a field."""

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import synthetic

from publisher.commit import Rank
from publisher.convert import convert
from publisher.epochs import claim_epoch
from shared.catalog import Catalog
from shared.layout import Layout
from shared.manifest import Canary, Manifest, Signature
from shared.stores import open_store
from shared.versions import Version

ROOT = Path(__file__).parent.parent
GOLDEN = sorted((ROOT / "tests/data/layout-1/store/policy/manifests").iterdir())
SCHEMA = json.loads((ROOT / "docs/manifest.schema.json").read_text())
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


def body_of(manifest: Manifest) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(manifest.to_bytes())
    return body


def published(folder: Path, world: int = 1, **options: Any) -> Manifest:
    """A version by `world` ranks."""
    store, base = open_store(str(folder / "store")), synthetic.write_base(folder / "base")
    claim = claim_epoch(store, Layout(synthetic.ADAPTER))
    publishers = [synthetic.open_publisher(store, base, claim, rank=Rank(rank, world)) for rank in range(world)]
    for rank, publisher in enumerate(publishers):
        held = synthetic.rank_factors(synthetic.factors(0), rank, world)
        publisher.submit(0, convert(synthetic.BASE, held), training={"step": 0, "reward": 0.5}, **options)
    for publisher in publishers:
        publisher.close()
    return Catalog(store, synthetic.ADAPTER).manifest(Version(claim.epoch, 0))


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A body with every optional field."""
    manifest = Manifest.parse(GOLDEN[1].read_bytes(), key="golden")
    assert manifest.parent and manifest.canary and manifest.aliases
    return body_of(replace(manifest, signature=Signature("0123456789abcdef", "ab" * 64)).sealed())


def test_the_schema_is_one_of_draft_2020_12():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_every_golden_manifest_validates(path: Path):
    VALIDATOR.validate(json.loads(path.read_bytes()))


@pytest.mark.parametrize("world", [1, 3])
def test_what_one_rank_and_three_ranks_publish_validates(tmp_path: Path, world: int):
    manifest = published(tmp_path, world)
    assert len(manifest.shards) == world and bool(manifest.aliases) == (world > 1)
    VALIDATOR.validate(body_of(manifest))


def test_a_canary_and_a_parent_validate(tmp_path: Path):
    manifest = published(tmp_path, canary=Canary(((1, 2, 3), (4,)), ((-0.5, 0.0), ()), 1e-3))
    VALIDATOR.validate(body_of(manifest))


def test_every_field_together_validates(full: dict[str, Any]):
    VALIDATOR.validate(full)
    assert set(full) == set(SCHEMA["properties"])


def fields(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to every field that the schema knows; of entries that are alike, the first of each form."""
    if isinstance(node, dict) and path[-1:] in (
        (),
        *[(name,) for name in ("parent", "base", "lora", "canary", "signature")],
    ):
        for name in node:
            yield (*path, name)
            yield from fields(node[name], (*path, name))
    elif path == ("shards",):
        yield from ((*path, 0, name) for name in node[0])
    elif path == ("tensors",):
        whole = next(name for name, entry in node.items() if "shard" in entry)
        cut = next(name for name, entry in node.items() if "slices" in entry)
        yield from ((*path, whole, name) for name in node[whole])
        yield from ((*path, cut, name) for name in node[cut])
        yield from ((*path, cut, "slices", 0, name) for name in node[cut]["slices"][0])


def remove(holder: dict[str, Any], name: str) -> None:
    del holder[name]


def misspell(holder: dict[str, Any], name: str) -> None:
    holder[name + "s"] = holder.pop(name)


def retype(holder: dict[str, Any], name: str) -> None:
    holder[name] = [[True]] if not isinstance(holder[name], list) else "x"


@pytest.mark.parametrize("change", [remove, misspell, retype])
def test_a_field_that_is_missing_misspelt_or_of_another_type_does_not_validate(
    full: dict[str, Any], change: Callable[[dict[str, Any], str], None]
):
    paths = list(fields(full))
    assert len(paths) >= 45
    for path in paths:
        if change is remove and path == ("signature",):
            continue  # the one that may be absent
        body = copy.deepcopy(full)
        holder = body
        for step in path[:-1]:
            holder = holder[step]
        change(holder, path[-1])
        assert not VALIDATOR.is_valid(body), f"{change.__name__} {path}"
