"""Fetching: every way in which bytes can be wrong, the error that says so, and nothing left on disk."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import synthetic

from shared import fetch as fetch_module
from shared import transfer
from shared.adapter_files import TensorSpec, header_bytes, parse_header
from shared.catalog import Catalog
from shared.errors import Corrupt, KeyMissing, StoreError, WrongBase
from shared.fetch import CONFIG, DIGEST, MANIFEST, WEIGHTS, fetch, verify
from shared.layout import Layout
from shared.local_store import LocalStore
from shared.manifest import Manifest, Shard
from shared.partial import partial_directory
from shared.peft_names import expected_tensors
from shared.tensor_table import Slice
from shared.versions import Version

LAYOUT = Layout(synthetic.ADAPTER)
FILES = {WEIGHTS, CONFIG, MANIFEST, DIGEST}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def store(tmp_path: Path, base: Path) -> LocalStore:
    """Versions 0 and 1, free to be damaged."""
    store = LocalStore(str(tmp_path / "store"))
    synthetic.publish(store, base, count=2)
    return store


def manifest_of(store: LocalStore, number: int = 0) -> Manifest:
    return Catalog(store, synthetic.ADAPTER).manifest(Version(1, number))


def get(store: LocalStore, manifest: Manifest, out: Path) -> Path:
    return fetch(store, manifest, synthetic.EXPECTED, out, base_name="base")


def shard_file(store: LocalStore, manifest: Manifest) -> Path:
    return store.root / manifest.shards[0].key


def vouched(store: LocalStore, manifest: Manifest, content: bytes) -> Manifest:
    """Put other bytes as the shard, and a manifest whose digests vouch for them."""
    shard_file(store, manifest).write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    return replace(manifest, shards=(Shard(manifest.shards[0].key, len(content), (digest,)),)).sealed()


def refused(store: LocalStore, manifest: Manifest, out: Path, says: str, error: type[Exception] = Corrupt) -> None:
    """Fetching and verifying both refuse, and leave nothing."""
    with pytest.raises(error, match=says):
        get(store, manifest, out)
    assert not out.exists()
    assert list(out.parent.glob(f".{out.name}*")) == []
    with pytest.raises(error, match=says):
        verify(store, manifest, synthetic.EXPECTED)


def test_the_result_is_a_plain_peft_directory_in_wire_order(store: LocalStore, tmp_path: Path):
    out = get(store, manifest_of(store), tmp_path / "out")
    assert {path.name for path in out.iterdir()} == FILES
    arrays = synthetic.read_file(out / WEIGHTS)
    assert list(arrays) == list(synthetic.EXPECTED)
    config = json.loads((out / CONFIG).read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 4)
    assert set(config["target_modules"]) == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    }
    verify(store, manifest_of(store), synthetic.EXPECTED)


@pytest.mark.parametrize("kept", [0, 1, 100, -1])
def test_a_truncated_shard_is_corrupt(store: LocalStore, tmp_path: Path, kept: int):
    file = shard_file(store, manifest_of(store))
    file.write_bytes(file.read_bytes()[:kept])
    refused(store, manifest_of(store), tmp_path / "out", "do(es)? not match")


def test_a_shard_cut_at_a_parts_boundary_or_grown_by_one_is_corrupt(
    store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(transfer, "PART_BYTES", 1024)
    manifest = manifest_of(store)
    content = shard_file(store, manifest).read_bytes()
    parts = tuple(hashlib.sha256(content[at : at + 1024]).hexdigest() for at in range(0, len(content), 1024))
    manifest = replace(manifest, shards=(replace(manifest.shards[0], parts=parts),)).sealed()
    get(store, manifest, tmp_path / "whole")
    for number, changed in enumerate((content[: 1024 * (len(parts) - 1)], content + b"x", content + bytes(2048))):
        shard_file(store, manifest).write_bytes(changed)
        with pytest.raises(Corrupt):
            get(store, manifest, tmp_path / str(number))
        assert not (tmp_path / str(number)).exists()
        with pytest.raises(Corrupt):
            verify(store, manifest, synthetic.EXPECTED)


@pytest.mark.parametrize("position", [0, 7, 8, 200, -200, -1])
def test_one_flipped_bit_in_a_shard_is_corrupt(store: LocalStore, tmp_path: Path, position: int):
    file = shard_file(store, manifest_of(store))
    content = bytearray(file.read_bytes())
    content[position] ^= 0x10
    file.write_bytes(content)
    refused(store, manifest_of(store), tmp_path / "out", "part 0 does not match its digest")


@pytest.mark.parametrize("where", [0.0, 0.3, 0.7, 0.999])
def test_one_flipped_bit_in_a_manifest_is_corrupt(store: LocalStore, where: float):
    file = store.root / LAYOUT.manifest(Version(1, 0))
    content = bytearray(file.read_bytes())
    content[int(where * len(content))] ^= 0x02
    file.write_bytes(content)
    with pytest.raises(Corrupt):
        manifest_of(store)
    assert manifest_of(store, 1).version == Version(1, 1)


def test_one_flipped_bit_in_latest_is_at_worst_another_hint_never_another_version(store: LocalStore):
    file, catalog = store.root / LAYOUT.latest, Catalog(store, synthetic.ADAPTER)
    content = file.read_bytes()
    for position in range(len(content)):
        changed = bytearray(content)
        changed[position] ^= 0x04
        file.write_bytes(changed)
        found = catalog.hint()
        assert found is not None
        assert catalog.newest() == Version(1, 1)
        if found[0] not in (None, Version(1, 0), Version(1, 1)):
            with pytest.raises(KeyMissing):
                catalog.manifest(found[0])


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_nan_under_digests_that_match_is_corrupt(store: LocalStore, tmp_path: Path, poison: float):
    manifest = manifest_of(store)
    content = bytearray(shard_file(store, manifest).read_bytes())
    content[-2:] = (np.float32(poison).view(np.uint32) >> 16).astype(np.uint16).tobytes()
    refused(store, vouched(store, manifest, bytes(content)), tmp_path / "out", "NaN or infinity in tensor")


def test_swapped_shards_of_two_versions_are_corrupt(store: LocalStore, tmp_path: Path):
    one, two = (shard_file(store, manifest_of(store, number)) for number in range(2))
    first, second = one.read_bytes(), two.read_bytes()
    assert len(first) == len(second)  # sizes alone would not tell
    one.write_bytes(second)
    two.write_bytes(first)
    for number in range(2):
        with pytest.raises(Corrupt, match="does not match its digest"):
            get(store, manifest_of(store, number), tmp_path / str(number))
        assert not (tmp_path / str(number)).exists()


def changed_header(
    store: LocalStore, manifest: Manifest, change: Callable[[list[TensorSpec]], list[TensorSpec]]
) -> bytes:
    content = shard_file(store, manifest).read_bytes()
    placed, start = parse_header(content, len(content), key="")
    return header_bytes(change([tensor.spec for tensor in placed])) + content[start:]


def test_a_shard_whose_header_tells_other_names_or_shapes_than_the_manifest_is_corrupt(
    store: LocalStore, tmp_path: Path
):
    manifest = manifest_of(store)
    other_name = changed_header(store, manifest, lambda specs: [specs[0]._replace(name="x"), *specs[1:]])
    refused(store, vouched(store, manifest, other_name), tmp_path / "out", "manifest says")
    turned = changed_header(
        store, manifest_of(store), lambda specs: [specs[0]._replace(shape=specs[0].shape[::-1]), *specs[1:]]
    )
    refused(store, vouched(store, manifest, turned), tmp_path / "out", "manifest says")


def test_a_shard_in_another_order_than_ours_is_read_by_its_own_header_and_comes_out_in_wire_order(
    store: LocalStore, tmp_path: Path
):
    manifest = manifest_of(store)
    file = shard_file(store, manifest)
    content, tensors = file.read_bytes(), synthetic.read_file(file)
    placed, _ = parse_header(content, len(content), key="")
    by_name = sorted((tensor.spec for tensor in placed), key=lambda spec: spec.name)
    sorted_file = header_bytes(by_name) + b"".join(tensors[spec.name] for spec in by_name)
    assert sorted_file != content
    other = vouched(store, manifest, sorted_file)
    verify(store, other, synthetic.EXPECTED)
    out = get(store, other, tmp_path / "out")
    assert (out / WEIGHTS).read_bytes() == content
    assert {path.name for path in out.iterdir()} == FILES
    refused(store, vouched(store, manifest, sorted_file[:-2] + b"\x80\x7f"), tmp_path / "nan", "NaN or infinity")


def test_missing_extra_and_misshapen_names_are_corrupt(store: LocalStore, tmp_path: Path):
    manifest = manifest_of(store)
    name, tensor = next(iter(manifest.tensors.items()))
    lacking = {key: value for key, value in manifest.tensors.items() if key != name}
    refused(store, replace(manifest, tensors=lacking).sealed(), tmp_path / "out", "1 tensors missing")
    for tensors, says in (
        ({**manifest.tensors, "model.router.lora_A.weight": tensor}, "1 unexpected"),
        ({**manifest.tensors, name: tensor._replace(shape=tensor.shape[::-1])}, "of a wrong shape"),
        ({**manifest.tensors, name: tensor._replace(slices=tensor.slices * 2)}, "not covered exactly once"),
        ({**manifest.tensors, name: tensor._replace(slices=())}, "not covered exactly once"),
    ):
        with pytest.raises(Corrupt, match=says):
            get(store, replace(manifest, tensors=tensors).sealed(), tmp_path / "out")
    with pytest.raises(Corrupt, match="both a tensor and an alias"):
        get(store, replace(manifest, aliases={name: name}).sealed(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("column", [0, 5000])
def test_an_empty_slice_is_corrupt_wherever_it_lies(store: LocalStore, tmp_path: Path, column: int):
    manifest = manifest_of(store)
    name, tensor = next(iter(manifest.tensors.items()))
    content = changed_header(
        store, manifest, lambda specs: [TensorSpec("empty", tensor.dtype, (0, tensor.shape[1])), *specs]
    )
    empty = Slice(0, "empty", (0, column), (0, tensor.shape[1]))
    tensors = {**manifest.tensors, name: tensor._replace(slices=(*tensor.slices, empty))}
    forged = replace(vouched(store, manifest, content), tensors=tensors).sealed()
    refused(store, forged, tmp_path / "out", "not covered exactly once")


def test_an_adapter_for_a_base_model_of_another_shape_or_other_weights_is_refused(
    store: LocalStore, base: Path, tmp_path: Path
):
    manifest = manifest_of(store)
    larger = expected_tensors({**synthetic.BASE, "num_experts": 8}, manifest.lora.targets, manifest.lora.rank)
    with pytest.raises(Corrupt, match="tensors missing"):
        fetch(store, manifest, larger, tmp_path / "out", base_name="base")
    from shared.base_model import identify

    identify(base).demand(manifest.base, version="0001-000000")
    with pytest.raises(WrongBase, match="weights_sha256"):
        identify(synthetic.write_base(tmp_path / "other", seed=1)).demand(manifest.base, version="0001-000000")


def test_a_shard_that_is_gone_means_expired_not_corrupt(store: LocalStore, tmp_path: Path):
    manifest = manifest_of(store)
    store.delete(manifest.shards[0].key)
    refused(store, manifest, tmp_path / "out", "no such object", KeyMissing)


def test_a_disk_that_is_full_or_not_writable_is_a_store_error_and_leaves_nothing(
    store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="Mend the local disk"):
        get(store, manifest_of(store), tmp_path / "file" / "out")
    monkeypatch.setattr(fetch_module, "SPARE_BYTES", 1 << 60)
    with pytest.raises(StoreError, match="MiB needed"):
        get(store, manifest_of(store), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_room_for_a_version_that_is_put_together_after_all_is_asked_for_before_that(
    store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Its header is another writer's, which is not known before it has arrived."""
    manifest, usage = manifest_of(store), shutil.disk_usage(tmp_path)
    content = shard_file(store, manifest).read_bytes()
    placed, start = parse_header(content, len(content), key="")
    header = header_bytes([tensor.spec for tensor in placed])[8:] + b" " * 8
    other = vouched(store, manifest, len(header).to_bytes(8, "little") + header + content[start:])
    free = [other.size + fetch_module.SPARE_BYTES, fetch_module.SPARE_BYTES]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free.pop(0)))
    with pytest.raises(StoreError, match="MiB needed"):
        get(store, other, tmp_path / "out")
    assert free == [] and not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert (get(store, other, tmp_path / "out") / WEIGHTS).read_bytes() == content


@pytest.mark.parametrize("name", ["assembled", "shard-0", "shard-7", "lock", "stranger"])
def test_what_an_earlier_life_left_where_a_version_is_built_does_not_get_into_it(
    store: LocalStore, tmp_path: Path, name: str
):
    manifest = manifest_of(store)
    with partial_directory(tmp_path / "out", manifest.digest) as aside:
        (aside / name).write_bytes(b"left")
    assert {path.name for path in get(store, manifest, tmp_path / "out").iterdir()} == FILES


def test_a_whole_cached_directory_is_kept_without_asking_the_store(store: LocalStore, tmp_path: Path):
    manifest = manifest_of(store)
    out = get(store, manifest, tmp_path / "out")
    written = (out / WEIGHTS).stat().st_mtime_ns
    store.delete(manifest.shards[0].key)
    assert get(store, manifest, out) == out
    assert (out / WEIGHTS).stat().st_mtime_ns == written


@pytest.mark.parametrize("file", sorted(FILES))
@pytest.mark.parametrize("damage", ["gone", "truncated", "flipped"])
def test_a_damaged_cached_directory_is_replaced(store: LocalStore, tmp_path: Path, file: str, damage: str):
    manifest = manifest_of(store)
    out = get(store, manifest, tmp_path / "out")
    whole = {path.name: path.read_bytes() for path in out.iterdir()}
    content = bytearray(whole[file])
    content[-1] ^= 1
    if damage == "gone":
        (out / file).unlink()
    else:
        (out / file).write_bytes(content if damage == "flipped" else content[:-1])
    get(store, manifest, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == whole


def test_a_cached_directory_of_another_version_is_replaced(store: LocalStore, tmp_path: Path):
    out = get(store, manifest_of(store, 0), tmp_path / "out")
    before = (out / WEIGHTS).read_bytes()
    get(store, manifest_of(store, 1), out)
    assert (out / WEIGHTS).read_bytes() != before


def test_a_cached_directory_is_not_kept_for_a_base_model_that_it_does_not_fit(store: LocalStore, tmp_path: Path):
    manifest = manifest_of(store)
    out = get(store, manifest, tmp_path / "out")
    larger = expected_tensors({**synthetic.BASE, "num_experts": 8}, manifest.lora.targets, manifest.lora.rank)
    with pytest.raises(Corrupt, match="tensors missing"):
        fetch(store, manifest, larger, out, base_name="base")
