"""What only a real Ceph RGW can show: whole publications over it, its gateway killed in the middle, and why the store
writes conditionally in single requests only.

The conformance suite (test_store.py), S3's own facts (test_store_s3.py) and the races (test_races.py) run on it too.
"""

import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args

import boto3
import pytest
import synthetic
import test_outage
from botocore.exceptions import ClientError
from ceph_rgw import CephRgw
from test_outage import Reader, Training

from publisher.commit import Rank
from publisher.convert import convert
from publisher.epochs import claim_epoch
from shared.catalog import Catalog
from shared.fetch import WEIGHTS, fetch, verify
from shared.layout import Layout
from shared.store import Store
from shared.stores import Client, open_store, probe
from shared.versions import Version

pytestmark = pytest.mark.ceph

DOWN_S = 3.0
WRITERS = 8
CLIENTS: tuple[Client, ...] = get_args(Client)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.write_base(tmp_path_factory.mktemp("base"))


def fetched(store: Store, version: Version, directory: Path) -> bytes:
    manifest = Catalog(store, synthetic.ADAPTER).manifest(version)
    verify(store, manifest, synthetic.EXPECTED)
    return (fetch(store, manifest, synthetic.EXPECTED, directory, base_name="base") / WEIGHTS).read_bytes()


def publish_as(store: Store, base: Path, world: int) -> None:
    """Version 0 by `world` ranks that race for the commit."""
    claim = claim_epoch(store, Layout(synthetic.ADAPTER))

    def publish(rank: int) -> None:
        publisher = synthetic.open_publisher(store, base, claim, rank=Rank(rank, world))
        held = synthetic.rank_factors(synthetic.factors(0), rank, world)
        publisher.submit(0, convert(synthetic.BASE, held), training={"step": 0})
        publisher.close()

    with ThreadPoolExecutor(world) as pool:
        list(pool.map(publish, range(world)))


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("reader", CLIENTS)
@pytest.mark.parametrize("writer", CLIENTS)
def test_a_version_comes_back_as_it_went_whichever_client_wrote_and_reads(
    ceph: CephRgw, base: Path, tmp_path: Path, writer: Client, reader: Client, world: int
):
    url = ceph.url(uuid.uuid4().hex)
    store = open_store(url, ceph.options, writer)
    probe(store, "policy/probes")
    publish_as(store, base, world)
    alone = open_store(str(tmp_path / "alone"))
    publish_as(alone, base, 1)
    there = fetched(open_store(url, ceph.options, reader), Version(1, 0), tmp_path / "there")
    assert there == fetched(alone, Version(1, 0), tmp_path / "here")


def test_a_gateway_that_is_killed_and_started_again_loses_nothing_that_was_acknowledged(ceph: CephRgw, tmp_path: Path):
    base = synthetic.write_base(tmp_path / "base", **test_outage.BASE)
    url = ceph.url(uuid.uuid4().hex)
    training = Training(open_store(url, ceph.options), base, "skip")
    reader = Reader(open_store(url, ceph.options), tmp_path / "cache")
    training.until(lambda: reader.has(2))
    training.submit_s = 0.0

    with ceph.gateway_killed():  # in the middle of whatever publisher and reader ask just now
        over_at = time.monotonic() + DOWN_S
        training.until(lambda: time.monotonic() > over_at)
    submit_s = training.submit_s
    reader.stop()
    enough = len(training.acknowledged) + 3
    training.until(lambda: len(training.acknowledged) >= enough)
    training.step(must=True)
    training.publisher.close()

    assert submit_s < test_outage.MAX_SUBMIT_S, "the step did not wait for the store"
    committed = reader.catalog.versions()
    assert [version.number for version in committed] == training.accepted == training.acknowledged
    assert reader.poll() == committed[-1] == reader.fetched[-1]
    for version in committed:
        verify(reader.catalog.store, reader.catalog.manifest(version), test_outage.EXPECTED)


# Why `put_if_absent` is one request, and larger objects have names that are never used twice.


@pytest.fixture
def client(ceph: CephRgw) -> Any:
    return boto3.client(
        "s3",
        endpoint_url=ceph.endpoint,
        aws_access_key_id=ceph.options["key"],
        aws_secret_access_key=ceph.options["secret"],
        region_name="us-east-1",
    )


def complete_if_absent(client: Any, bucket: str, key: str, body: bytes) -> None:
    where = {"Bucket": bucket, "Key": key}
    upload = client.create_multipart_upload(**where)["UploadId"]
    part = client.upload_part(**where, UploadId=upload, PartNumber=1, Body=body)
    parts = {"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]}
    client.complete_multipart_upload(**where, UploadId=upload, MultipartUpload=parts, IfNoneMatch="*")


def test_a_conditional_multipart_write_overwrites_and_a_conditional_put_does_not(ceph: CephRgw, client: Any):
    where = {"Bucket": ceph.bucket, "Key": uuid.uuid4().hex}
    client.put_object(**where, Body=b"first", IfNoneMatch="*")
    with pytest.raises(ClientError, match="PreconditionFailed"):
        client.put_object(**where, Body=b"second", IfNoneMatch="*")
    assert client.get_object(**where)["Body"].read() == b"first"
    complete_if_absent(client, body=b"second", bucket=where["Bucket"], key=where["Key"])
    assert client.get_object(**where)["Body"].read() == b"second"


def test_every_writer_of_a_race_of_conditional_multipart_writes_is_told_that_it_won(ceph: CephRgw, client: Any):
    key = uuid.uuid4().hex
    with ThreadPoolExecutor(WRITERS) as pool:
        won = [pool.submit(complete_if_absent, client, ceph.bucket, key, b"%d" % writer) for writer in range(WRITERS)]
    assert [future.exception() for future in won] == [None] * WRITERS
