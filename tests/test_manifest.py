"""The manifest: round trip, canonical bytes, tampering, and files that an older lorasync wrote."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import synthetic
from hypothesis import given, settings
from hypothesis import strategies as st

from shared import strict_json
from shared.base_model import BaseIdentity, identify, read_base_config
from shared.catalog import Catalog, check_layout
from shared.errors import Corrupt, UsageError, WrongBase
from shared.fetch import WEIGHTS, fetch
from shared.layout import Layout, rollback_of, version_of
from shared.manifest import Canary, LoraShape, Manifest, Parent, Shard, Signature
from shared.peft_names import expected_tensors, wire_order
from shared.stores import open_store
from shared.tensor_table import Slice, Tensor
from shared.versions import Version, parse_served_name, served_name

GOLDEN = Path(__file__).parent / "data" / "layout-1"
GOLDEN_WEIGHTS_SHA256 = "e1311eb8a5d3fcd7b7a7a8441531cbda6911e39a84f734f2ac7010988293e489"

MANIFEST = Manifest(
    adapter="policy",
    version=Version(1, 2),
    parent=Parent(Version(1, 1), "ab" * 32),
    base=BaseIdentity("qwen3_moe", "cd" * 32, "ef" * 32),
    lora=LoraShape(8, 16, 8, ("linear_qkv",)),
    parallel={"tp": 2},
    encoding="bf16",
    shards=(Shard("policy/data/x/rank-0.safetensors", 20 << 20, ("bb" * 32, "cc" * 32)),),
    tensors={"q": Tensor("BF16", (4, 3), (Slice(0, "q@0,0", (0, 0), (2, 3)), Slice(0, "q@2,0", (2, 0), (2, 3))))},
    aliases={"k": "q"},
    training={"step": 3, "loss": 0.1, "note": "ü \N{SNOWMAN}"},
    canary=Canary(((1, 2, 3),), ((-0.1, -0.2),), 1e-3),
)


def golden(number: int) -> bytes:
    return (GOLDEN / f"store/policy/manifests/00000001-{number:012d}.json").read_bytes()


def resealed(change: Any) -> bytes:
    """A manifest with a changed body and a digest that matches it."""
    body = strict_json.load_object(MANIFEST.to_bytes(), key="", max_bytes=1 << 20)
    del body["digest"]
    change(body)
    digest = hashlib.sha256(strict_json.dumps(body)).hexdigest()
    return strict_json.dumps({**body, "digest": digest})


@pytest.mark.parametrize(
    "manifest",
    [MANIFEST, replace(MANIFEST, parent=None), replace(MANIFEST, canary=None), replace(MANIFEST, aliases={})],
    ids=["full", "no parent", "no canary", "no aliases"],
)
def test_a_manifest_reads_back_as_it_was_written(manifest: Manifest):
    again = Manifest.parse(manifest.to_bytes(), key="k")
    assert again == manifest
    assert again.digest == manifest.sealed().digest
    assert again.to_bytes() == manifest.to_bytes()


def test_equal_manifests_are_equal_bytes_whatever_the_order_they_were_built_in():
    shuffled = replace(MANIFEST, training=dict(reversed(MANIFEST.training.items())))
    assert shuffled.to_bytes() == MANIFEST.to_bytes()


def test_any_changed_byte_is_noticed():
    content = MANIFEST.to_bytes()
    for position in range(len(content)):
        changed = bytearray(content)
        changed[position] ^= 1
        with pytest.raises(Corrupt):
            Manifest.parse(bytes(changed), key="k")


def test_a_signature_changes_neither_the_digest_nor_what_reads_back():
    signed = replace(MANIFEST, signature=Signature("0123456789abcdef", "ab" * 64)).sealed()
    assert signed.digest == MANIFEST.sealed().digest
    assert signed.to_bytes() != MANIFEST.to_bytes()
    again = Manifest.parse(signed.to_bytes(), key="k")
    assert (again, again.digest, again.to_bytes()) == (signed, signed.digest, signed.to_bytes())
    assert again != MANIFEST


def spelt(changed: bytes) -> bytes:
    """Another spelling of the manifest's values, under the digest of its own bytes."""
    start = changed.index(b'"digest":"', changed.index(b'"canary"')) + 10
    body = changed[: start - 10] + changed[start + 66 :]
    return changed[:start] + hashlib.sha256(body).hexdigest().encode() + changed[start + 64 :]


@pytest.mark.parametrize(
    ("canonical", "other"),
    [
        (b'"aliases":', b'"aliases": '),
        (b'"epoch":1', b'"epoch":1,"epoch":1'),
        (b'"tolerance":0.001', b'"tolerance":1e-3'),
        (b'"encoding":"bf16"', b'"encoding":"bf1\\u0036"'),
        (b'{"key":"policy', b'{"key":"","key":"policy'),
        (b'"dtype":"BF16","shape":[4,3]', b'"shape":[4,3],"dtype":"BF16"'),
        (b'"slices":', b'"about":0,"slices":'),
    ],
)
def test_another_spelling_of_the_same_values_is_corrupt(canonical: bytes, other: bytes):
    content = MANIFEST.to_bytes()
    assert spelt(content) == content and canonical in content
    with pytest.raises(Corrupt, match="not in canonical form"):
        Manifest.parse(spelt(content.replace(canonical, other, 1)), key="k")


def test_a_whole_tensor_has_a_short_form_and_no_long_one():
    whole = replace(MANIFEST, tensors={"q": Tensor("BF16", (4, 3), (Slice(0, "q", (0, 0), (4, 3)),))})
    fields = {"dtype": "BF16", "shape": [4, 3], "shard": 0}
    assert strict_json.load_object(whole.to_bytes(), key="", max_bytes=1 << 20)["tensors"] == {"q": fields}
    assert Manifest.parse(whole.to_bytes(), key="k") == whole
    slices = [{"name": "q", "offset": [0, 0], "shape": [4, 3], "shard": 0}]
    long = resealed(lambda body: body.update(tensors={"q": {"dtype": "BF16", "shape": [4, 3], "slices": slices}}))
    with pytest.raises(Corrupt, match="not in canonical form"):
        Manifest.parse(long, key="k")


def test_fields_that_a_later_lorasync_adds_are_ignored_and_counted_in_the_digest():
    manifest = Manifest.parse(resealed(lambda body: body.update(colour="blue")), key="k")
    assert manifest == MANIFEST and manifest.digest != MANIFEST.sealed().digest


def test_any_truncation_is_noticed():
    content = MANIFEST.to_bytes()
    for length in range(len(content)):
        with pytest.raises(Corrupt):
            Manifest.parse(content[:length], key="k")


def test_a_newer_layout_asks_for_an_upgrade_of_the_reader():
    with pytest.raises(Corrupt, match=r"manifest of layout 2.*upgrade the reader"):
        Manifest.parse(resealed(lambda body: body.update(layout=2)), key="k")


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body.pop("tensors"),
        lambda body: body.update(epoch=-1),
        lambda body: body.update(version=True),
        lambda body: body["lora"].update(rank="8"),
        lambda body: body["base"].update(weights_sha256=5),
        lambda body: body["shards"][0].update(key="../../etc/passwd"),
        lambda body: body["shards"][0].update(size=1.5),
        lambda body: body["shards"][0].update(size=33 << 20),
        lambda body: body["shards"][0].update(parts=["bb" * 32]),
        lambda body: body["shards"][0].update(parts=["bb" * 32, "CC" * 32]),
        lambda body: body["parent"].update(digest="ab"),
        lambda body: body.update(signature={}),
        lambda body: body.update(signature={"key": "k", "ed25519": "00" * 64}),
        lambda body: body["tensors"]["q"].update(dtype="I64"),
        lambda body: body["tensors"]["q"].update(shape=[4]),
        lambda body: body["tensors"]["q"]["slices"][0].update(shard=1),
        lambda body: body["tensors"]["q"]["slices"][0].update(offset=[0, -1]),
        lambda body: body["tensors"]["q"].update(shape=[10**300, 3]),
        lambda body: body["aliases"].update(v="nothing"),
        lambda body: body["canary"].update(logprobs=[[-0.1]]),
        lambda body: body["canary"].update(tolerance="0.1"),
        lambda body: body.update(parent="none"),
    ],
)
def test_a_malformed_manifest_is_corrupt_even_with_a_digest_that_matches(change: Any):
    with pytest.raises(Corrupt, match="malformed"):
        Manifest.parse(resealed(change), key="k")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"\xff\xfe",
        b'{"a":1,"a":2}',
        b'{"a":NaN}',
        b'{"a":1e999}',
        b'{"a":"\\ud800"}',
        b'{"a":' + b"9" * 5000 + b"}",
        b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"a":"' + b"x" * 2000 + b'"}',
    ],
)
def test_json_with_surprises_is_corrupt(content: bytes):
    with pytest.raises(Corrupt):
        strict_json.load_object(content, key="k", max_bytes=1000 if b"xxx" in content else 1 << 20)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=80, deadline=None)
@given(st.dictionaries(st.sampled_from([*MANIFEST.__dataclass_fields__, "epoch"]), _JSON, min_size=1, max_size=4))
def test_any_body_with_a_matching_digest_is_read_or_corrupt_and_nothing_else(changes: dict[str, Any]):
    changes.setdefault("layout", 1)
    try:
        manifest = Manifest.parse(resealed(lambda body: body.update(changes)), key="k")
    except Corrupt:
        return
    assert Manifest.parse(manifest.to_bytes(), key="k") == manifest


def test_a_manifest_under_another_versions_name_is_corrupt(tmp_path: Path):
    store, layout = open_store(str(tmp_path)), Layout("policy")
    store.put(layout.manifest(Version(1, 3)), MANIFEST.to_bytes())
    with pytest.raises(Corrupt, match="names policy@0001-000002"):
        Catalog(store, "policy").manifest(Version(1, 3))


@pytest.mark.parametrize(("number", "ranks"), [(0, 3), (1, 3), (2, 1)])
def test_a_manifest_written_by_layout_1_is_still_read_to_the_same_bytes(number: int, ranks: int):
    content = golden(number)
    manifest = Manifest.parse(content, key="golden")
    assert manifest.to_bytes() == content
    assert (manifest.version, manifest.parallel["tp"], len(manifest.shards)) == (Version(1, number), ranks, ranks)
    assert manifest.canary == (Canary(((1, 2, 3),), ((-0.5, -1.25),), 0.01) if ranks > 1 else None)


def test_a_version_written_by_three_ranks_under_layout_1_still_assembles_to_the_same_bytes(tmp_path: Path):
    catalog = Catalog(open_store(str(GOLDEN / "store")), "policy")
    check_layout(catalog.store, catalog.layout)
    assert catalog.hint() is not None and catalog.newest() == Version(1, 2)
    manifest = catalog.manifest(Version(1, 1))
    assert manifest.parent == Parent(Version(1, 0), catalog.manifest(Version(1, 0)).digest)
    identify(GOLDEN / "base").demand(manifest.base, version="1")
    expected = expected_tensors(read_base_config(GOLDEN / "base"), manifest.lora.targets, manifest.lora.rank)
    out = fetch(catalog.store, manifest, expected, tmp_path / "out", base_name="base")
    assert hashlib.sha256((out / WEIGHTS).read_bytes()).hexdigest() == GOLDEN_WEIGHTS_SHA256
    assert json.loads((out / "adapter_config.json").read_text())["lora_alpha"] == 4


def test_a_lone_ranks_version_written_under_layout_1_is_fetched_as_it_is_stored(tmp_path: Path):
    catalog = Catalog(open_store(str(GOLDEN / "store")), "policy")
    manifest = catalog.manifest(Version(1, 2))
    expected = expected_tensors(read_base_config(GOLDEN / "base"), manifest.lora.targets, manifest.lora.rank)
    out = fetch(catalog.store, manifest, expected, tmp_path / "out", base_name="base")
    assert (out / WEIGHTS).read_bytes() == catalog.store.get(manifest.shards[0].key)


@pytest.mark.parametrize("part", ["model_type", "config_sha256", "weights_sha256"])
def test_another_base_model_is_refused_naming_the_part_that_differs(part: str):
    ours = MANIFEST.base
    with pytest.raises(WrongBase, match=part):
        replace(ours, **{part: "another"}).demand(ours, version="0001-000002")


def test_the_base_models_identity_is_its_numbers_not_its_place(tmp_path: Path):
    one, two = (synthetic.write_base(tmp_path / name, _name_or_path=name) for name in "ab")
    assert identify(one) == identify(two)
    assert identify(synthetic.write_base(tmp_path / "c", seed=1)) != identify(one)
    assert identify(synthetic.write_base(tmp_path / "d", num_experts=2)) != identify(one)


def test_weights_of_the_base_model_that_cannot_be_read_are_a_usage_error(tmp_path: Path):
    base = synthetic.write_base(tmp_path / "a")
    (base / "model-2.safetensors").mkdir()
    with pytest.raises(UsageError, match=r"cannot read model-2\.safetensors: Is a directory"):
        identify(base)
    (base / "model-2.safetensors").rmdir()
    (base / "model-2.safetensors").symlink_to("gone")
    with pytest.raises(UsageError, match="No such file"):
        identify(base)


def test_wire_order_by_name_alone_is_that_of_the_base_model():
    assert wire_order(sorted(synthetic.EXPECTED)) == list(synthetic.EXPECTED)
    assert wire_order(["zzz", *sorted(synthetic.EXPECTED), "aaa"])[-2:] == ["aaa", "zzz"]


def test_a_version_has_one_text_form_and_is_ordered_as_a_pair():
    assert str(Version.parse("1-12")) == str(Version(1, 12)) == "0001-000012"
    assert Version(1, 99) < Version(2, 0)
    assert parse_served_name(served_name("my.policy", Version(1, 12))) == ("my.policy", Version(1, 12))
    assert parse_served_name("base-model") is None
    for text in ("12", "1-", "a-b", "1-2-3", ""):
        with pytest.raises(UsageError):
            Version.parse(text)


def test_an_adapter_that_is_named_like_a_version_does_not_confuse_its_keys():
    layout = Layout("00000009-000000000009")
    assert version_of(layout.manifest(Version(1, 2))) == Version(1, 2)
    assert version_of(layout.receipt(Version(1, 2), "node")) == Version(1, 2)
    assert version_of(layout.latest) is None


@pytest.mark.parametrize(
    "key",
    [
        "policy/manifests/backup/00000001-000000000002.json",
        "policy/manifests/00000001-000000000002.json/00000001-000000000002.json",
        "policy/manifests/00000001-000000000002",
        "policy/manifests/00000001-000000000002.json.json",
        "policy/manifests/\u0660\u0660\u0660\u0660\u0660\u0660\u0660\u0661-000000000002.json",
        "policy/data/backup/00000001-000000000002/abc/rank-00000.safetensors",
        "policy/data/00000001-000000000002",
        "policy/fates/backup/00000001-000000000002/000001.json",
        "policy/leases/00000001-000000000002/000001.json",
    ],
)
def test_a_key_that_only_contains_a_versions_name_is_not_about_it(key: str):
    assert version_of(key) is None


def test_a_rollbacks_marker_is_known_by_its_whole_key():
    marker = Layout("policy").rollback(Version(1, 2), Version(2, 2))
    assert rollback_of(marker) == (Version(1, 2), Version(2, 2))
    for other in (
        marker.replace("rollbacks/", "rollbacks/backup/"),
        marker.removesuffix(".json"),
        marker.replace("2.j", "\u0662.j"),
    ):
        assert rollback_of(other) is None


@pytest.mark.parametrize("hint", [b"", b"{}", b'{"epoch":-1,"version":1}', b'{"epoch":1,"version":[]}', b"\xff" * 9])
def test_a_hint_that_cannot_be_read_counts_as_absent(tmp_path: Path, hint: bytes):
    store = open_store(str(tmp_path))
    store.put(Layout("policy").latest, hint)
    found = Catalog(store, "policy").hint()
    assert found is not None and found[0] is None


def test_a_version_is_resolved_as_people_write_it(tmp_path: Path):
    store, layout = open_store(str(tmp_path)), Layout("policy")
    for version in (Version(1, 1), Version(1, 2), Version(2, 2)):
        store.put(layout.manifest(version), b"{}")
    catalog = Catalog(store, "policy")
    assert catalog.resolve("latest") == catalog.resolve("2") == catalog.resolve("2-2") == Version(2, 2)
    assert catalog.resolve("1") == Version(1, 1)
    for text in ("3", "0001-000003", "\N{SUPERSCRIPT TWO}", "newest"):
        with pytest.raises(UsageError):
            catalog.resolve(text)


def test_the_page_on_the_format_names_every_field_and_shows_the_golden_tensors_as_they_stand():
    page = (Path(__file__).parent.parent / "docs" / "format.md").read_text()
    body = json.loads((GOLDEN / "store/policy/manifests/00000001-000000000001.json").read_text())
    fields = [*body, *(f"base.{name}" for name in body["base"]), *(f"lora.{name}" for name in body["lora"])]
    for field in set(fields) - {"base", "lora", "shards", "tensors", "aliases"}:
        assert f"`{field}`" in page, field
    for example in page.split("```json")[1:]:
        assert json.loads("{" + example.split("```")[0] + "}").items() <= body["tensors"].items()
