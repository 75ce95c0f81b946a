"""Publishing: what a version must be to be committed, by one rank or by three, and what happens behind the step."""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import synthetic
import torch

from publisher import publisher as publisher_module
from publisher.commit import Rank
from publisher.convert import AdapterSlice, MegatronLora, convert
from publisher.epochs import Claim, claim_epoch
from publisher.publisher import Published
from publisher.shard import encode, wire_scale
from shared import strict_json
from shared.catalog import Catalog
from shared.errors import Corrupt, Fenced, StoreError, UsageError
from shared.fetch import WEIGHTS, fetch
from shared.layout import Layout
from shared.local_store import LocalStore
from shared.manifest import Canary
from shared.store import Entry, Store
from shared.stores import open_store
from shared.versions import Version

WORLD = 3
LAYOUT = Layout(synthetic.ADAPTER)
TIMEOUT_S = 30.0


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(str(tmp_path / "store"))


def slices(whole: Iterable[MegatronLora]) -> list[AdapterSlice]:
    return list(convert(synthetic.BASE, whole))


def fetched(store: Store, version: Version, directory: Path) -> bytes:
    manifest = Catalog(store, synthetic.ADAPTER).manifest(version)
    return (fetch(store, manifest, synthetic.EXPECTED, directory, base_name="base") / WEIGHTS).read_bytes()


def keys(store: Store) -> list[str]:
    return [entry.key for entry in store.list(synthetic.ADAPTER)]


def test_a_lone_ranks_version_is_a_plain_peft_directory_on_the_store_itself(store: LocalStore, base: Path):
    manifest = synthetic.publish(store, base)[0]
    directory = store.root / manifest.shards[0].key
    assert directory.name == "adapter_model.safetensors"
    assert (directory.parent / "adapter_config.json").is_file()
    assert list(synthetic.read_file(directory)) == list(synthetic.EXPECTED)
    assert not manifest.aliases


def test_b_is_scaled_exactly_and_a_is_left_alone(store: LocalStore, base: Path):
    manifest = synthetic.publish(store, base)[0]
    assert (manifest.lora.alpha, manifest.lora.wire_alpha, manifest.lora.rank) == (8, 4, 4)
    found = synthetic.read_file(store.root / manifest.shards[0].key)
    lora = next(lora for lora in synthetic.factors(0) if lora.target == "linear_proj")
    prefix = "base_model.model.model.layers.0.self_attn.o_proj.lora_"
    for factor, expected in (("A", lora.lora_A), ("B", lora.lora_B * 2)):
        values = torch.frombuffer(bytearray(found[f"{prefix}{factor}.weight"]), dtype=torch.bfloat16)
        assert torch.equal(values.reshape(expected.shape), expected.to(torch.bfloat16))


def test_a_scale_that_is_no_power_of_two_travels_as_alpha():
    assert wire_scale(8, 16) == (2.0, 8)
    assert wire_scale(8, 2) == (0.25, 8)
    assert wire_scale(8, 24) == (1.0, 24)


def test_versions_form_a_chain_by_the_parents_digest(store: LocalStore, base: Path):
    manifests = synthetic.publish(store, base, count=3)
    assert [m.parent.version if m.parent else None for m in manifests] == [None, Version(1, 0), Version(1, 1)]
    assert [m.parent.digest for m in manifests[1:] if m.parent] == [m.digest for m in manifests[:-1]]


def test_the_step_may_change_its_parameters_as_soon_as_submit_returns(store: LocalStore, base: Path, tmp_path: Path):
    whole = synthetic.factors(0)
    publisher = synthetic.open_publisher(store, base)
    publisher.submit(0, convert(synthetic.BASE, whole), training={})
    for lora in whole:
        lora.lora_A.fill_(float("nan"))
        lora.lora_B.fill_(float("nan"))
    publisher.close()
    again = LocalStore(str(tmp_path / "again"))
    synthetic.publish(again, base)
    assert fetched(store, Version(1, 0), tmp_path / "a") == fetched(again, Version(1, 0), tmp_path / "b")


# Three ranks, no process group: three publishers that share a claim and nothing else.


def submit_as(
    store: Store, base: Path, claim: Claim, rank: int, done: list[Published] | None = None, timeout_s: float = 30
) -> None:
    publisher = synthetic.open_publisher(
        store,
        base,
        claim,
        rank=Rank(rank, WORLD),
        record_timeout_s=timeout_s,
        on_published=(done if done is not None else []).append,
    )
    held = synthetic.rank_factors(synthetic.factors(0), rank, WORLD)
    canary = Canary(((1, 2),), ((-1.0 - rank,),), 0.1)  # only rank 0's counts
    publisher.submit(0, convert(synthetic.BASE, held), training={"step": 7, "rank": rank}, canary=canary)
    publisher.close()


def test_three_ranks_make_one_manifest_that_assembles_to_exactly_the_lone_ranks_file(
    store: LocalStore, base: Path, tmp_path: Path
):
    claim = claim_epoch(store, LAYOUT)
    done: list[Published] = []
    with ThreadPoolExecutor(WORLD) as pool:
        list(pool.map(lambda rank: submit_as(store, base, claim, rank, done), range(WORLD)))
    assert [published.version for published in done] == [Version(1, 0)] * WORLD  # every rank saw the commit succeed
    manifest = Catalog(store, synthetic.ADAPTER).manifest(Version(1, 0))
    assert len(manifest.shards) == WORLD and manifest.aliases
    assert any(len(tensor.slices) > 1 for tensor in manifest.tensors.values())
    assert manifest.training["rank"] == 0 and manifest.canary == Canary(((1, 2),), ((-1.0,),), 0.1)
    alone = LocalStore(str(tmp_path / "alone"))
    stored = synthetic.publish(alone, base)[0].shards[0].key
    assert fetched(store, Version(1, 0), tmp_path / "out") == (alone.root / stored).read_bytes()


def test_any_order_of_ranks_commits_when_the_last_record_is_there_and_not_before(store: LocalStore, base: Path):
    claim = claim_epoch(store, LAYOUT)
    for rank, missing in ((2, "0, 1"), (0, "1")):
        with pytest.raises(StoreError, match=f"not all of 3 ranks put a record: missing {missing}"):
            submit_as(store, base, claim, rank, timeout_s=0.2)
        assert Catalog(store, synthetic.ADAPTER).newest() is None
    submit_as(store, base, claim, 1)
    assert Catalog(store, synthetic.ADAPTER).newest() == Version(1, 0)


def test_a_missing_ranks_slices_are_never_committed_by_the_others(store: LocalStore, base: Path):
    claim = claim_epoch(store, LAYOUT)
    with pytest.raises(StoreError, match="not all of 3 ranks"):
        submit_as(store, base, claim, 0, timeout_s=0.2)
    assert not store.list(LAYOUT.manifests)
    with pytest.raises(StoreError):
        store.get(LAYOUT.latest)


# Refusals: nothing that is not whole gets a manifest.


def refused(store: Store, base: Path, held: list[AdapterSlice], error: type[Exception], says: str) -> None:
    publisher = synthetic.open_publisher(store, base)
    publisher.submit(0, held, training={})
    with pytest.raises(error, match=says):
        publisher.close()
    assert not store.list(LAYOUT.manifests)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_an_adapter_with_nan_or_infinity_is_not_published(store: LocalStore, base: Path, poison: float):
    whole = synthetic.factors(0)
    whole[5].lora_B[0, 0] = poison
    refused(store, base, slices(whole), Corrupt, "NaN or infinity in tensor base_model.*lora_B")
    assert not any("/data/" in key for key in keys(store))


def test_an_adapter_that_lacks_a_tensor_is_not_published(store: LocalStore, base: Path):
    refused(store, base, slices(synthetic.factors(0)[:-1]), Corrupt, "2 tensors missing")


def test_an_adapter_with_a_tensor_too_many_is_not_published(store: LocalStore, base: Path):
    held = slices(synthetic.factors(0))
    extra = replace(held[0], name=held[0].name.replace("layers.0", "layers.9"), aliases=())
    refused(store, base, [*held, extra], Corrupt, "1 unexpected tensors")


def test_a_tensor_that_two_replicas_write_is_not_published(store: LocalStore, base: Path):
    held = slices(synthetic.factors(0))
    refused(store, base, [*held, held[-1]], Corrupt, "not covered exactly once")


def test_a_tensor_of_another_rank_than_configured_is_not_published(store: LocalStore, base: Path):
    held = slices(synthetic.factors(0))
    piece = held[-1]
    halved = replace(piece, tensor=piece.tensor[:, :2], shape=(piece.shape[0], 2))
    refused(store, base, [*held[:-1], halved], Corrupt, "1 tensors of a wrong shape")


def test_a_version_number_is_never_submitted_twice_for_its_shards_would_be_written_over(store: LocalStore, base: Path):
    publisher = synthetic.open_publisher(store, base)
    publisher.submit(3, slices(synthetic.factors(0)), training={})
    for number in (3, 2):
        with pytest.raises(UsageError, match="after 3"):
            publisher.submit(number, slices(synthetic.factors(1)), training={})
    publisher.close()
    assert Catalog(store, synthetic.ADAPTER).versions() == [Version(1, 3)]


# Epochs.


def test_racing_trainers_claim_different_epochs(store: LocalStore):
    with ThreadPoolExecutor(8) as pool:
        claims = list(pool.map(lambda _: claim_epoch(store, LAYOUT), range(8)))
    assert sorted(claim.epoch for claim in claims) == list(range(1, 9))


def test_a_trainer_is_fenced_at_its_next_publish_after_another_claimed(store: LocalStore, base: Path):
    old = synthetic.open_publisher(store, base)
    old.submit(0, slices(synthetic.factors(0)), training={})
    old.close()
    old = synthetic.open_publisher(store, base, Claim(1, "0123456789ab"))
    synthetic.publish(store, base)
    old.submit(5, slices(synthetic.factors(1)), training={})
    with pytest.raises(Fenced, match="epoch 2 was claimed after our epoch 1"):
        old.close()
    with pytest.raises(Fenced):
        old.submit(6, slices(synthetic.factors(1)), training={})
    assert Catalog(store, synthetic.ADAPTER).versions() == [Version(1, 0), Version(2, 0)]


def test_a_hint_that_steps_back_misleads_no_listing_and_the_reader_of_pairs_keeps_the_higher(
    store: LocalStore, base: Path
):
    synthetic.publish(store, base, count=2)
    synthetic.publish(store, base)
    catalog = Catalog(store, synthetic.ADAPTER)
    store.put(LAYOUT.latest, strict_json.dumps({"epoch": 1, "version": 1, "digest": "x"}))  # a zombie's last write
    hint = catalog.hint()
    assert hint is not None and hint[0] == Version(1, 1)
    assert catalog.newest() == catalog.resolve("latest") == Version(2, 0) > Version(1, 1)


def test_a_store_of_a_newer_layout_is_not_written_to(store: LocalStore):
    store.put(LAYOUT.layout, strict_json.dumps({"layout": 2}))
    with pytest.raises(Corrupt, match="layout 2"):
        claim_epoch(store, LAYOUT)
    assert keys(store) == [LAYOUT.layout]


# A slow store, and one that fails for a while.


class Gated(LocalStore):
    """Lets no shard through while the gate is shut."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.gate, self.waiting = threading.Event(), threading.Event()

    def put_stream(self, key: str, chunks: Iterable[bytes | memoryview], size: int) -> None:
        self.waiting.set()
        assert self.gate.wait(TIMEOUT_S)
        super().put_stream(key, chunks, size)


class Flaky(LocalStore):
    """Fails the first `failures` writes of every kind."""

    def __init__(self, url: str, failures: int) -> None:
        super().__init__(url)
        self.failures, self.failed = failures, 0

    def _trip(self) -> None:
        if self.failed < self.failures:
            self.failed += 1
            raise StoreError("unreachable", op="put", retryable=True)

    def put_stream(self, key: str, chunks: Iterable[bytes | memoryview], size: int) -> None:
        self._trip()
        super().put_stream(key, chunks, size)

    def put_if_absent(self, key: str, content: bytes) -> bool:
        if "/manifests/" in key and self.failed < 2 * self.failures:
            self.failed += 1
            raise StoreError("unreachable", op="put if absent", retryable=True)
        return super().put_if_absent(key, content)


def test_a_full_queue_skips_versions_when_told_so_and_counts_them(tmp_path: Path, base: Path):
    store = Gated(str(tmp_path / "store"))
    publisher = synthetic.open_publisher(store, base, on_full_queue="skip")
    submit: Callable[[int], bool] = lambda n: publisher.submit(n, slices(synthetic.factors(n)), training={})  # noqa: E731
    assert submit(0)
    assert store.waiting.wait(TIMEOUT_S)  # the thread holds version 0; the queue holds one more
    assert submit(1)
    assert [submit(2), submit(3)] == [False, False]
    assert (publisher.skipped, publisher.last_number) == (2, 1)
    last = threading.Thread(
        target=publisher.submit,
        args=(3, slices(synthetic.factors(3))),
        kwargs={"training": {}, "must": True},
    )
    last.start()
    last.join(0.3)
    assert last.is_alive()  # the last version of a run is waited for
    store.gate.set()
    last.join(TIMEOUT_S)
    publisher.close()
    assert Catalog(store, synthetic.ADAPTER).versions() == [Version(1, 0), Version(1, 1), Version(1, 3)]


def test_a_full_queue_makes_the_step_wait_when_told_so_and_says_how_long(tmp_path: Path, base: Path):
    store, done = Gated(str(tmp_path / "store")), []
    publisher = synthetic.open_publisher(store, base, on_full_queue="wait", on_published=done.append)
    publisher.submit(0, slices(synthetic.factors(0)), training={})
    assert store.waiting.wait(TIMEOUT_S)
    publisher.submit(1, slices(synthetic.factors(1)), training={})
    step = threading.Thread(target=publisher.submit, args=(2, slices(synthetic.factors(2))), kwargs={"training": {}})
    step.start()
    step.join(0.3)
    assert step.is_alive()
    store.gate.set()
    step.join(TIMEOUT_S)
    publisher.close()
    assert publisher.skipped == 0
    assert [published.version.number for published in done] == [0, 1, 2]
    assert done[0].wait_s < 0.2 < done[2].wait_s


def test_a_store_that_fails_for_a_while_is_outlasted(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(publisher_module, "RETRY_WAIT_S", 0.01)
    store = Flaky(str(tmp_path / "store"), failures=3)
    with caplog.at_level("WARNING"):
        synthetic.publish(store, base)
    assert store.failed == 6
    assert [record.message.split(",")[0].split(" seconds")[0] for record in caplog.records] == [
        "publisher: the store fails",
        "publisher: the store answers again",  # one outage, though a call in the middle of it succeeded
    ]
    assert Catalog(store, synthetic.ADAPTER).newest() == Version(1, 0)


def test_a_publisher_that_is_abandoned_gives_up_a_store_that_fails(tmp_path: Path, base: Path):
    store = Flaky(str(tmp_path / "store"), failures=1 << 30)
    publisher = synthetic.open_publisher(store, base)
    publisher.submit(0, slices(synthetic.factors(0)), training={})
    publisher.close(abandon=True)
    assert Catalog(store, synthetic.ADAPTER).newest() is None


def test_a_publisher_that_is_abandoned_waits_for_no_other_rank(tmp_path: Path, base: Path):
    class Watched(LocalStore):
        looked_for_records = threading.Event()

        def list(self, prefix: str, after: str = "") -> list[Entry]:
            if "/data/" in prefix:
                self.looked_for_records.set()
            return super().list(prefix, after)

    store = Watched(str(tmp_path / "store"))
    publisher = synthetic.open_publisher(store, base, rank=Rank(0, WORLD))
    publisher.submit(0, convert(synthetic.BASE, synthetic.rank_factors(synthetic.factors(0), 0, WORLD)), training={})
    assert store.looked_for_records.wait(TIMEOUT_S)
    closing = threading.Thread(target=publisher.close, kwargs={"abandon": True})
    closing.start()
    closing.join(TIMEOUT_S)  # a tenth of the time for which it would wait for the others' records
    assert not closing.is_alive()


def test_a_lasting_error_of_the_store_ends_the_publisher_and_the_next_submit_says_so(tmp_path: Path, base: Path):
    class Full(LocalStore):
        def put_stream(self, key: str, chunks: Iterable[bytes | memoryview], size: int) -> None:
            raise StoreError("no space left on the store", op="put", key=key)

    publisher = synthetic.open_publisher(Full(str(tmp_path)), base)
    publisher.submit(0, slices(synthetic.factors(0)), training={})
    with pytest.raises(StoreError, match="no space left"):
        publisher.close()
    with pytest.raises(StoreError, match="no space left"):
        publisher.submit(1, slices(synthetic.factors(1)), training={})


def test_an_alias_travels_once_and_reads_back_under_every_name():
    order = {name: position for position, name in enumerate(synthetic.EXPECTED)}
    shard = encode(slices(synthetic.factors(0)), order, rank=4, alpha=8, encoding="bf16", aliases=True)
    stored = {piece.tensor for piece in shard.slices}
    assert stored and set(shard.aliases.values()) <= stored
    assert stored | set(shard.aliases) == set(synthetic.EXPECTED)


def test_the_protocol_holds_on_memory_as_it_does_on_a_directory(base: Path, tmp_path: Path):
    store = open_store(f"memory://{tmp_path.name}-publish")
    synthetic.publish(store, base, count=2)
    assert Catalog(store, synthetic.ADAPTER).newest() == Version(1, 1)
    assert fetched(store, Version(1, 1), tmp_path / "out")
