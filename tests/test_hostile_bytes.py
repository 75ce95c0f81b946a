"""A store that somebody else can write to: whatever lies there, only our errors come out, soon, and nothing is loaded.

The bytes are those of the golden version of three ranks, read into memory, so that thousands of damages take seconds.
To replay a printed seed, set SEED to it and run: pytest tests/test_hostile_bytes.py -k flips
"""

import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import synthetic
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.pace import taken_when_published
from rollout.watch import Watcher
from shared import strict_json, transfer
from shared.adapter_files import TensorSpec, header_bytes, parse_header, read_tensors
from shared.base_model import read_base_config
from shared.catalog import Catalog
from shared.coverage import demand_complete
from shared.errors import MAX_MESSAGE_LENGTH, Corrupt, LorasyncError, StoreError
from shared.fetch import CONFIG, DIGEST, MANIFEST, WEIGHTS, fetch, verify
from shared.layout import Layout, groups_of
from shared.local_store import LocalStore
from shared.manifest import Manifest
from shared.partial import NAME_LENGTH, partial_directory
from shared.peft_names import expected_tensors
from shared.tensor_table import Slice, Tensor
from shared.versions import Version

SEED = 20261123
FLIPS = 10_000
FETCHED_FLIPS = 40
PEAK_MIB = 1024  # above what the process has at start, at the largest inputs that are let in

GOLDEN = Path(__file__).parent / "data" / "layout-1"
LAYOUT = Layout(synthetic.ADAPTER)
BASE = read_base_config(GOLDEN / "base")
Change = Callable[[dict[str, Any]], Any]


class Objects:
    """A store in memory, as far as reading goes."""

    url = "memory://objects"

    def __init__(self, contents: dict[str, bytes]) -> None:
        self.contents = contents

    def get(self, key: str, max_bytes: int | None = None) -> bytes:
        return self.contents[key]

    def get_range(self, key: str, start: int, end: int) -> bytes:
        return self.contents[key][start:end]


@pytest.fixture(scope="module")
def whole() -> dict[str, bytes]:
    """Every object of the golden store. Read it, don't write it."""
    store = LocalStore(str(GOLDEN / "store"))
    return {entry.key: store.get(entry.key) for entry in store.list("")}


@pytest.fixture
def objects(whole: dict[str, bytes]) -> Any:
    return Objects(dict(whole))


@pytest.fixture(autouse=True)
def in_time() -> Iterator[None]:
    """Nothing here may wait: a reader that hangs ends the test, not the day."""

    def late(_signal: int, _frame: Any) -> None:
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(300)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def manifest_of(objects: Any, number: int = 1) -> Manifest:
    return Catalog(objects, synthetic.ADAPTER).manifest(Version(1, number))


def expected_of(manifest: Manifest) -> dict[str, tuple[int, int]]:
    return expected_tensors(BASE, manifest.lora.targets, manifest.lora.rank)


def check(objects: Any, manifest: Manifest | None = None) -> None:
    """What a node does before it loads anything, without the disk."""
    manifest = manifest or manifest_of(objects)
    verify(objects, manifest, expected_of(manifest))


def vouched(objects: Any, number: int, content: bytes) -> Manifest:
    """Other bytes for a shard, and a manifest whose digests are theirs."""
    manifest = manifest_of(objects)
    shard = manifest.shards[number]
    objects.contents[shard.key] = content
    shards = list(manifest.shards)
    shards[number] = replace(shard, size=len(content), parts=(hashlib.sha256(content).hexdigest(),))
    return replace(manifest, shards=tuple(shards)).sealed()


def resealed(manifest: Manifest, change: Change) -> bytes:
    """A manifest's bytes with a changed body and a digest that fits."""
    body = json.loads(manifest.to_bytes())
    change(body)
    del body["digest"]
    return strict_json.dumps({**body, "digest": hashlib.sha256(strict_json.dumps(body)).hexdigest()})


def test_the_golden_version_is_whole(objects: Any):
    check(objects)


# Damage that digests find


def test_a_shard_cut_at_any_structural_boundary_is_corrupt(objects: Any):
    manifest = manifest_of(objects)
    for shard in manifest.shards:
        content = objects.contents[shard.key]
        placed, data_start = parse_header(content, len(content), key="k")
        ends = {data_start + tensor.end for tensor in placed} | {0, 8, data_start, data_start + len(content) // 2}
        cuts = sorted({cut + by for cut in ends for by in (-1, 0, 1) if 0 <= cut + by < len(content)})
        assert len(cuts) > 30
        for cut in (*cuts, len(content) + 1):
            objects.contents[shard.key] = content[:cut].ljust(cut, b"\0")
            with pytest.raises(Corrupt, match="does not match its digest"):
                check(objects, manifest)
            with pytest.raises(Corrupt):  # also where an attacker makes the digests fit
                check(objects, vouched(objects, manifest.shards.index(shard), content[:cut].ljust(cut, b"\0")))
        objects.contents[shard.key] = content


def test_a_manifest_cut_at_any_structural_boundary_is_corrupt(objects: Any):
    key = LAYOUT.manifest(Version(1, 1))
    content = objects.contents[key]
    cuts = [at + by for at, byte in enumerate(content) if byte in b'{}[],:"' for by in (0, 1)]
    assert len(cuts) > 1000
    for cut in {0, *cuts} - {len(content)}:
        with pytest.raises(Corrupt):
            Manifest.parse(content[:cut], key=key)


def test_ten_thousand_flips_of_one_bit_are_all_found_before_anything_is_loaded(objects: Any):
    print(f"seed {SEED}")
    rng = random.Random(SEED)
    manifests = {number: manifest_of(objects, number) for number in (0, 1)}
    shards = {shard.key: shard for manifest in manifests.values() for shard in manifest.shards}
    keys = [*shards, *(LAYOUT.manifest(manifest.version) for manifest in manifests.values())]
    flipped = dict.fromkeys(keys, 0)
    for flip in range(FLIPS):
        key = rng.choice(keys)
        content = objects.contents[key]
        bit = rng.randrange(8 * len(content))
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        objects.contents[key] = bytes(damaged)
        with pytest.raises(Corrupt):
            if key in shards:
                transfer.verify(objects, shards[key], threads=1)
            else:
                Manifest.parse(objects.contents[key], key=key)
            raise AssertionError(f"flip {flip}: bit {bit} of {key} was not noticed")
        objects.contents[key] = content
        flipped[key] += 1
    assert sum(flipped.values()) == FLIPS and min(flipped.values()) > FLIPS / len(keys) / 2


def test_flips_are_found_by_the_whole_way_onto_a_nodes_disk_too_and_leave_nothing(objects: Any, tmp_path: Path):
    print(f"seed {SEED}")
    rng = random.Random(SEED)
    manifest = manifest_of(objects)
    for number in range(FETCHED_FLIPS):
        key = rng.choice(manifest.shards).key
        content = objects.contents[key]
        damaged = bytearray(content)
        damaged[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        objects.contents[key] = bytes(damaged)
        with pytest.raises(Corrupt):
            fetch(objects, manifest, expected_of(manifest), tmp_path / str(number), base_name="base")
        objects.contents[key] = content
    assert list(tmp_path.iterdir()) == []


def test_shards_swapped_between_two_versions_or_two_ranks_are_corrupt(objects: Any):
    old, new = manifest_of(objects, 0), manifest_of(objects, 1)
    assert [shard.size for shard in old.shards] == [shard.size for shard in new.shards]
    contents = dict(objects.contents)
    for number, shard in enumerate(new.shards):
        objects.contents = {**contents, shard.key: contents[old.shards[number].key]}
        with pytest.raises(Corrupt, match="does not match its digest"):
            check(objects, new)
    first, second = new.shards[1].key, new.shards[2].key
    objects.contents = {**contents, first: contents[second], second: contents[first]}
    with pytest.raises(Corrupt):
        check(objects, new)


def test_a_manifest_that_calls_another_versions_shards_its_own_is_that_version_and_names_it(objects: Any):
    old, new = manifest_of(objects, 0), manifest_of(objects, 1)
    objects.contents[LAYOUT.manifest(new.version)] = objects.contents[LAYOUT.manifest(old.version)]
    with pytest.raises(Corrupt, match="names policy@0001-000000"):
        manifest_of(objects, 1)


# Lies whose digests fit


def rewritten(content: bytes, change: Callable[[list[TensorSpec]], list[TensorSpec]]) -> bytes:
    """A shard with another header over the same data."""
    specs = [spec for spec, _ in read_tensors(content, key="k")]
    _, data_start = parse_header(content, len(content), key="k")
    return header_bytes(change(specs)) + content[data_start:]


@pytest.mark.parametrize(
    "change",
    [
        lambda specs: [specs[0]._replace(dtype="F16"), *specs[1:]],
        lambda specs: [specs[0]._replace(shape=specs[0].shape[::-1]), *specs[1:]],
        lambda specs: [specs[0]._replace(shape=(specs[0].shape[0] * specs[0].shape[1],)), *specs[1:]],
        lambda specs: [specs[0]._replace(name="stranger"), *specs[1:]],
        lambda specs: [TensorSpec("stranger", "BF16", (0, 4)), *specs],
        lambda specs: [specs[1]._replace(name=specs[0].name), specs[0]._replace(name=specs[1].name), *specs[2:]],
    ],
    ids=["dtype", "transposed", "flat", "renamed", "one more", "two swapped"],
)
def test_a_header_that_is_not_what_the_manifest_says_is_corrupt(objects: Any, change: Any):
    content = objects.contents[manifest_of(objects).shards[1].key]
    with pytest.raises(Corrupt):
        check(objects, vouched(objects, 1, rewritten(content, change)))


@pytest.mark.parametrize("word", [0x7FC0, 0xFFC1, 0x7F80, 0xFF80], ids=["NaN", "-NaN", "inf", "-inf"])
def test_nan_and_infinity_anywhere_are_corrupt_though_the_digests_fit(objects: Any, word: int):
    key = manifest_of(objects).shards[0].key
    content = objects.contents[key]
    placed, data_start = parse_header(content, len(content), key="k")
    for tensor in (placed[0], placed[len(placed) // 2], placed[-1]):
        for at in (data_start + tensor.start, data_start + tensor.end - 2):
            poisoned = content[:at] + np.uint16(word).tobytes() + content[at + 2 :]
            with pytest.raises(Corrupt, match="NaN or infinity"):
                check(objects, vouched(objects, 0, poisoned))
        objects.contents[key] = content


@pytest.mark.parametrize(
    "key",
    [
        *("../../etc/passwd", "/etc/passwd", "policy/../../../etc/passwd", "policy/./x", "policy//x", "policy/x/"),
        *("file:///etc/passwd", "s3://bucket/x", "~root/x", "policy\\..\\x", "policy/x\0", "policy/x\n", "", ".", ".."),
        *("policy/.hidden", "policy/%2e%2e/x", "policy/\N{FULLWIDTH FULL STOP}./x", "x" * 513, 5, None, ["policy/x"]),
    ],
)
def test_a_shards_key_that_could_leave_the_store_is_corrupt_before_anything_is_read(objects: Any, key: Any):
    content = resealed(manifest_of(objects), lambda body: body["shards"][0].update(key=key))
    with pytest.raises(Corrupt, match="malformed"):
        Manifest.parse(content, key="k")


@pytest.mark.parametrize("name", ["../../etc/x", "/etc/x", "a/b", "\x1b[2J", "x" * 10_000_000, "a\nb", ""])
def test_a_tensors_name_that_is_a_path_or_a_command_names_no_tensor_of_the_model(objects: Any, name: str):
    def change(body: dict[str, Any]) -> None:
        body["tensors"][name] = body["tensors"].popitem()[1]

    manifest = Manifest.parse(resealed(manifest_of(objects), change), key="k")
    with pytest.raises(Corrupt, match="unexpected") as caught:
        check(objects, manifest)
    line = str(caught.value)
    assert line.isprintable() and len(line) < 2 * MAX_MESSAGE_LENGTH


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body["training"].update(submitted_at="yesterday"),
        lambda body: body["training"].update(taken_groups=None),
        lambda body: body["training"].update(step=[1]),
        lambda body: body.update(training=[["step", 1]]),
        lambda body: body["canary"].update(tolerance=10**308 * 9),
        lambda body: body["canary"].update(tolerance=10**308, logprobs=[[10**400, 0.0]]),
        lambda body: body["lora"].update(rank=True),
        lambda body: body["tensors"].update({f"t{n}": None for n in range(9)}),
        lambda body: body["aliases"].update(x=[]),
        lambda body: body.update(aliases=[]),
        lambda body: body.update(signature={"key": 5, "ed25519": 5}),
    ],
)
def test_a_field_of_another_kind_is_corrupt_though_the_digest_fits(objects: Any, change: Change):
    with pytest.raises(Corrupt):
        Manifest.parse(resealed(manifest_of(objects), change), key="k")


def test_a_key_that_stands_twice_is_corrupt_wherever_json_is_read(objects: Any):
    content = manifest_of(objects).to_bytes()
    body = content.replace(b'"adapter":"policy"', b'"adapter":"evil","adapter":"policy"')
    assert json.loads(body) == json.loads(content)
    with pytest.raises(Corrupt, match="canonical"):
        Manifest.parse(body, key="k")
    for nested in (b'{"a":1,"a":1}', b'{"x":[{"a":1,"a":2}]}'):
        with pytest.raises(Corrupt, match="duplicate key"):
            strict_json.load_object(nested, key="k", max_bytes=1000)


@pytest.mark.parametrize(
    "text", [b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}", b'{"a":' * 200_000 + b"1" + b"}" * 200_000]
)
def test_deep_json_is_corrupt_and_does_not_exhaust_the_stack(text: bytes):
    for read in (
        lambda: Manifest.parse(text, key="k"),
        lambda: strict_json.load_object(text, key="k", max_bytes=1 << 24),
        lambda: parse_header(len(text).to_bytes(8, "little") + text, 8 + len(text), key="k"),
    ):
        with pytest.raises(Corrupt):
            read()


def test_more_values_than_memory_is_meant_for_are_refused_before_one_is_made(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(strict_json, "MAX_VALUES", 100)
    strict_json.load_object(b'{"a":[' + b"1," * 80 + b"1]}", key="k", max_bytes=1000)
    for text in (b'{"a":[' + b"1," * 120 + b"1]}", b'{"a":' + b"[" * 120 + b"]" * 120 + b"}"):
        with pytest.raises(Corrupt, match="values, more than the 100 allowed"):
            strict_json.load_object(text, key="k", max_bytes=1000)


def test_no_integer_is_too_large_for_a_double():
    largest = b'{"a":1' + b"0" * 307 + b"}"
    assert float(strict_json.load_object(largest, key="k", max_bytes=1000)["a"]) == 1e307
    for read in (strict_json.load_object, strict_json.load_canonical):
        with pytest.raises(Corrupt, match="too large for a double"):
            read(b'{"a":-1' + b"0" * 308 + b"}", key="k", max_bytes=1000)


def test_an_error_is_one_bounded_line_whatever_it_quotes():
    error = Corrupt("x\x1b[2J\r\n\ud800\N{SNOWMAN}" + "y" * 10_000_000, op="read", key="k\0")
    assert str(error).startswith("read: x\\x1b[2J\\r\\n\\ud800\N{SNOWMAN}yyy")
    assert "key=k\\x00" in str(error) and len(str(error)) < MAX_MESSAGE_LENGTH + 100
    str(error).encode()


_RECTANGLES = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 3), st.integers(0, 3)), max_size=6
)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.integers(1, 4), st.integers(1, 4), _RECTANGLES, st.integers(0, 3), st.booleans())
def test_slices_are_whole_exactly_where_each_cell_is_in_one_of_them_and_none_is_empty(
    rows: int, columns: int, drawn: list[tuple[int, int, int, int]], cut: int, tiling: bool
):
    rectangles = drawn
    if tiling:  # some that fit: random ones seldom do
        cut = min(cut, rows)
        rectangles = [(0, 0, cut, columns), (cut, 0, rows - cut, columns), *[r for r in drawn[:1] if 0 in r[2:]]]
    cells = np.zeros((16, 16), int)
    for top, left, height, width in rectangles:
        cells[top : top + height, left : left + width] += 1
    wanted = np.zeros((16, 16), int)
    wanted[:rows, :columns] = 1
    slices = tuple(Slice(0, f"t@{n}", r[:2], r[2:]) for n, r in enumerate(rectangles))
    manifest: Any = SimpleNamespace(tensors={"t": Tensor("BF16", (rows, columns), slices)}, aliases={}, version="v")
    if (cells == wanted).all() and not any(0 in slice_.shape for slice_ in slices):
        demand_complete(manifest, {"t": (rows, columns)})
    else:
        with pytest.raises(Corrupt, match="not covered exactly once"):
            demand_complete(manifest, {"t": (rows, columns)})


def test_huge_inputs_are_judged_in_bounded_time_and_memory():
    script = Path(__file__).parent / "hostile_sizes.py"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    print(f"{said['peak_mib']} MiB, {said['seconds']:.1f} s")
    assert said["accepted"] == ["100 MB of spaces", "200,000 tensors", "a manifest of 200,000 tensors"]
    assert len(said["refused"]) == 10
    assert said["peak_mib"] < PEAK_MIB


# Hints


def test_a_replayed_older_latest_moves_no_reader_back(tmp_path: Path):
    store = LocalStore(str(tmp_path / "store"))
    for entry in LocalStore(str(GOLDEN / "store")).list(""):
        store.put(entry.key, LocalStore(str(GOLDEN / "store")).get(entry.key))
    watcher = Watcher(Catalog(store, synthetic.ADAPTER), poll_interval_s=0.01, list_interval_s=1e9)
    try:
        newest = watcher.look()
        assert newest is not None and newest >= Version(1, 1)
        for hint in (b'{"epoch":1,"version":0}', b'{"epoch":0,"version":9}', b"{}", b"[" * 9999, b"\xff", b""):
            store.put(LAYOUT.latest, hint)
            assert watcher.look() == newest
    finally:
        watcher.close()


@pytest.mark.parametrize("taken", ["many", None, [], {}, 1e308, True, -5])
def test_a_trainers_hint_of_any_kind_stops_no_sampler(objects: Any, taken: Any):
    progress = {"frozen": True, "taken_groups": taken}
    assert isinstance(taken_when_published(manifest_of(objects), progress), int)


# Files that are none


def fifo(path: Path) -> None:
    os.mkfifo(path)


def link_to_a_file(path: Path) -> None:
    path.symlink_to("/etc/passwd")


def link_to_an_endless_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def link_to_itself(path: Path) -> None:
    path.symlink_to(path)


def unix_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        before = Path.cwd()
        os.chdir(path.parent)  # a socket's path is short
        try:
            listening.bind(path.name)
        finally:
            os.chdir(before)


def device(path: Path) -> None:
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 5))
    except PermissionError:
        pytest.skip("only root makes device files")


STRANGE = [fifo, link_to_a_file, link_to_an_endless_device, link_to_itself, unix_socket, device]


@pytest.mark.parametrize("make", STRANGE)
def test_what_is_no_regular_file_in_a_stores_directory_is_corrupt_at_once_and_not_read(tmp_path: Path, make: Any):
    store = LocalStore(str(tmp_path))
    make(tmp_path / "x")
    for read in (
        lambda: store.get("x"),
        lambda: store.get("x", 100),
        lambda: store.get_range("x", 0, 100),
        lambda: store.get_if_changed("x", ""),
    ):
        with pytest.raises(Corrupt, match="not a regular file"):
            read()
    assert store.put_if_absent("x", b"ours") is False
    assert store.list("") == []
    store.put("x", b"ours")  # put in its place, not through it
    assert store.get("x") == b"ours"
    store.delete("x")
    assert store.list("") == []


@pytest.mark.parametrize("make", STRANGE)
@pytest.mark.parametrize("which", ["shard", "manifest", "LATEST"])
def test_a_version_one_of_whose_files_is_none_is_corrupt(tmp_path: Path, make: Any, which: str):
    store = LocalStore(str(tmp_path / "store"))
    for entry in LocalStore(str(GOLDEN / "store")).list(""):
        store.put(entry.key, LocalStore(str(GOLDEN / "store")).get(entry.key))
    manifest = manifest_of(store)
    keys = {"shard": manifest.shards[1].key, "manifest": LAYOUT.manifest(manifest.version), "LATEST": LAYOUT.latest}
    path = store.root / keys[which]
    path.unlink()
    make(path)
    if which == "LATEST":
        assert Catalog(store, synthetic.ADAPTER).hint() == (None, "")
        return
    with pytest.raises(Corrupt, match="not a regular file"):
        fetch(store, manifest_of(store), expected_of(manifest), tmp_path / "out", base_name="base")
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


@pytest.mark.parametrize("make", [*STRANGE, lambda path: path.mkdir()])
@pytest.mark.parametrize("name", [WEIGHTS, CONFIG, MANIFEST, DIGEST])
def test_what_is_no_regular_file_in_a_nodes_cache_is_replaced(objects: Any, tmp_path: Path, name: str, make: Any):
    manifest = manifest_of(objects)
    out = fetch(objects, manifest, expected_of(manifest), tmp_path / "out", base_name="base")
    held = {path.name: path.read_bytes() for path in out.iterdir()}
    (out / name).unlink()
    make(out / name)
    fetch(objects, manifest, expected_of(manifest), out, base_name="base")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == held


def test_a_stranger_in_a_cached_version_is_removed_for_an_engine_might_read_it(objects: Any, tmp_path: Path):
    manifest = manifest_of(objects)
    out = fetch(objects, manifest, expected_of(manifest), tmp_path / "out", base_name="base")
    (out / "new_embeddings.safetensors").write_bytes(b"")
    (out / "adapter_model.bin").write_bytes(b"a pickle")
    fetch(objects, manifest, expected_of(manifest), out, base_name="base")
    assert {path.name for path in out.iterdir()} == {WEIGHTS, CONFIG, MANIFEST, DIGEST}


@pytest.mark.parametrize("make", STRANGE)
def test_a_cached_version_that_is_a_link_or_worse_is_replaced(objects: Any, tmp_path: Path, make: Any):
    elsewhere, manifest = tmp_path / "elsewhere", manifest_of(objects)
    real = fetch(objects, manifest, expected_of(manifest), elsewhere, base_name="base")
    out = tmp_path / "out"
    make(out)
    fetch(objects, manifest, expected_of(manifest), out, base_name="base")
    assert out.is_dir() and not out.is_symlink()
    out = tmp_path / "linked"
    out.symlink_to(real)
    fetch(objects, manifest, expected_of(manifest), out, base_name="base")
    assert out.is_dir() and not out.is_symlink() and (real / WEIGHTS).exists()


@pytest.mark.parametrize("name", ["shard-0", "assembled", WEIGHTS, CONFIG, MANIFEST, DIGEST, "lock", "stranger"])
def test_links_that_wait_where_a_fetch_will_write_are_not_written_through(objects: Any, tmp_path: Path, name: str):
    victim, manifest = tmp_path / "victim", manifest_of(objects)
    victim.write_bytes(b"precious")
    cache = tmp_path / "cache"
    with partial_directory(cache / "out", manifest.digest) as aside:
        pass
    aside.mkdir(parents=True, exist_ok=True)
    for place in (aside, aside.parent):
        (place / name).unlink(missing_ok=True)
        (place / name).symlink_to(victim)
    with contextlib.suppress(StoreError):
        fetch(objects, manifest, expected_of(manifest), cache / "out", base_name="base")
    assert victim.read_bytes() == b"precious"


@pytest.mark.parametrize("which", ["what is built", "the place around it", "a leftover"])
def test_a_link_in_place_of_the_directory_where_a_fetch_will_write_is_not_followed(
    objects: Any, tmp_path: Path, which: str
):
    manifest, elsewhere, cache = manifest_of(objects), tmp_path / "elsewhere", tmp_path / "cache"
    elsewhere.mkdir()
    (elsewhere / "shard-0").write_bytes(b"precious")
    with partial_directory(cache / "out", manifest.digest) as aside:
        pass
    path = {"what is built": aside, "the place around it": aside.parent}.get(which, cache / f".out.{'0' * NAME_LENGTH}")
    shutil.rmtree(path, ignore_errors=True)
    path.symlink_to(elsewhere)
    fetch(objects, manifest, expected_of(manifest), cache / "out", base_name="base")
    assert [path.name for path in elsewhere.iterdir()] == ["shard-0"]
    assert (elsewhere / "shard-0").read_bytes() == b"precious"


def test_the_tree_of_errors_is_drawn_as_it_is():
    module = sys.modules[LorasyncError.__module__]
    drawn = re.findall(r"── (\w+)", module.__doc__ or "")
    exist = [name for name, kind in vars(module).items() if isinstance(kind, type) and issubclass(kind, LorasyncError)]
    assert sorted([*drawn, "LorasyncError"]) == sorted(exist)


@pytest.mark.parametrize("digits", ["\N{SUPERSCRIPT TWO}", "", "-1", "1e3", "x"])
def test_a_listed_name_that_promises_no_number_of_groups_promises_none(digits: str):
    assert groups_of(f"policy/trajectories/0-0/node-life-000001-g{digits}.parquet") == 0
