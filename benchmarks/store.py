"""What a version costs on a store: published, visible and verified, beside a raw copy of the same bytes.

    python -m benchmarks.store --dir DIR             # on the disk to measure; S3: moto, started here
    python -m benchmarks.store --dir DIR --rgw       # ... S3: a Ceph RGW of this machine (tests/ceph_rgw.py)
    python -m benchmarks.store --dir DIR --s3-endpoint URL --s3-bucket B --s3-key K --s3-secret S
    python -m benchmarks.store --dir DIR --quick     # 16 MB only, under a minute: for CI

Writes benchmarks/out/store.json (--out) and prints a table. Ratios are medians over medians of the same run; rounds of
all kinds are interleaved, so that what disturbs the machine disturbs them alike, and the spread is that of the rounds.
On a machine that others use too, look at the processor's seconds (`cpu`): a raw copy waits for the disk, ours computes.

Raw copy, on a directory: the bytes written to a new file in slices of 16 MiB, fsynced, and read back once by one
thread. On S3: boto3's upload_fileobj and download_fileobj. Adapters have Qwen3-30B-A3B's shapes in bf16, one rank, no
aliases: 16MB is one layer at rank 8, 200MB three at rank 32, 1700MB and 3400MB all 48 at rank 16 and 32 (37,248
tensors). Values are noise and are encoded beforehand: what encoding costs stands beside the writer.
"""

import argparse
import contextlib
import json
import os
import platform
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.adapter_file import compare
from benchmarks.adapters import MANY_TENSORS, SIZES, Size, encoded
from benchmarks.publications import Publications, raw_copy
from benchmarks.report import table
from benchmarks.s3_clients import Boto, store_large, store_small
from benchmarks.timing import Stopwatch, summary, total
from shared.local_store import LocalStore
from shared.stores import open_store

OUT = Path(__file__).parent / "out" / "store.json"
QUICK_REPEATS = 2


@dataclass(frozen=True)
class Server:
    """An S3 server to measure on."""

    name: str
    bucket: str
    options: dict[str, Any]


def main() -> None:
    options = _arguments()
    sizes = [SIZES[name] for name in options.sizes.split(",")]
    s3_sizes = [SIZES[name] for name in options.s3_sizes.split(",")]
    many = MANY_TENSORS
    if options.quick:
        sizes = s3_sizes = [replace(SIZES["16MB"], repeats=QUICK_REPEATS)]
        many = replace(many, layers=6, repeats=1)
    options.dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.dir, prefix="bench-store-") as name:
        folder = Path(name)
        result: dict[str, Any] = {"device": device(folder), "publish_over_raw_copy": {"file": {}}, "runs": {}}
        result.update(_writer_and_reader(folder, many))
        for size in sizes:
            _on_file(folder, size, result)
        if not options.no_s3:
            with _server(options, folder) as server:
                result["clients"] = _on_s3(server, s3_sizes, result)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")
    print(table(result))
    print(f"\n{options.out}")


def device(folder: Path) -> dict[str, Any]:
    """The machine, in words and numbers, and how busy others keep it."""
    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "file_system_free_gib": shutil.disk_usage(folder).free >> 30,
        "load_average": os.getloadavg(),
    }


def _writer_and_reader(folder: Path, size: Size) -> dict[str, Any]:
    watch = compare(folder, size, size.repeats)
    for path in folder.iterdir():
        path.unlink()
    seconds = watch.summary()
    return {
        "writer_speedup": round(seconds["save_file"]["median"] / seconds["write"]["median"], 2),
        "writer_with_encoding_speedup": round(
            seconds["save_file"]["median"] / summary(total(watch, "encode", "write"))["median"], 2
        ),
        "reader_speedup": round(seconds["load_file"]["median"] / seconds["map"]["median"], 2),
        "writer_cpu_speedup": round(seconds["save_file"]["cpu"] / seconds["write"]["cpu"], 2),
        "reader_cpu_speedup": round(seconds["load_file"]["cpu"] / seconds["map"]["cpu"], 2),
        "adapter_file": {"tensors": len(size.expected()), "rank": size.rank, "seconds": seconds},
    }


def _on_file(folder: Path, size: Size, result: dict[str, Any]) -> None:
    expected = size.expected()
    shard, watch = encoded(expected), Stopwatch()
    publications = Publications(LocalStore(str(folder / f"store-{size.name}")), size.rank, expected)
    for _ in range(size.repeats):
        raw_copy(folder, shard, watch)
        publications.run(shard, watch)
        publications.run(shard, watch, digests=False)
    shutil.rmtree(folder / f"store-{size.name}")
    _record(result, "file", size, shard_bytes(shard), len(expected), watch)


def _on_s3(server: Server, sizes: list[Size], result: dict[str, Any]) -> dict[str, Any]:
    kind = f"s3_{server.name}"
    result["publish_over_raw_copy"][kind] = {}
    boto = Boto(server.bucket, server.options)
    clients: dict[str, Any] = {"server": server.name}
    prefix = f"s3://{server.bucket}/bench-{uuid.uuid4().hex}"
    stores = {
        "s3fs": open_store(f"{prefix}/s3fs", server.options, client="fsspec"),
        "obstore": open_store(f"{prefix}/obstore", server.options, client="obstore"),
    }
    for size in sizes:
        expected = size.expected()
        shard, watch, client_watch = encoded(expected), Stopwatch(), Stopwatch()
        publications = {name: Publications(store, size.rank, expected) for name, store in stores.items()}
        for _ in range(size.repeats):
            boto.large(shard, watch, "raw")
            publications["s3fs"].run(shard, watch)
            publications["s3fs"].run(shard, watch, digests=False)
            boto.large(shard, client_watch)
            for name, store in stores.items():
                store_large(name, store, shard, client_watch)
        for seconds in (watch.seconds, watch.cpu_seconds):
            seconds["raw write"], seconds["raw read"] = seconds.pop("raw put"), seconds.pop("raw get")
        _record(result, kind, size, shard_bytes(shard), len(expected), watch)
        clients[size.name] = {"bytes": shard_bytes(shard), "seconds": client_watch.summary()}
    small = Stopwatch()
    for _ in range(QUICK_REPEATS):
        boto.small(small)
        for name, store in stores.items():
            store_small(name, store, small)
    clients["small"] = {"seconds": small.summary()}
    return clients


def _record(result: dict[str, Any], kind: str, size: Size, nbytes: int, tensors: int, watch: Stopwatch) -> None:
    raw = total(watch, "raw write", "raw read")
    ours = total(watch, "published", "visible", "verified")
    without = total(watch, *(f"{step} without digests" for step in ("published", "visible", "verified")))
    median = summary(raw)["median"]
    result["publish_over_raw_copy"][kind][size.name] = round(summary(ours)["median"] / median, 3)
    result["runs"].setdefault(kind, {})[size.name] = {
        "bytes": nbytes,
        "tensors": tensors,
        "repeats": size.repeats,
        "ratio_of_rounds": summary([mine / copy for mine, copy in zip(ours, raw, strict=True)]),
        "publish_over_write": round(
            summary(watch.seconds["published"])["median"] / summary(watch.seconds["raw write"])["median"], 3
        ),
        "ratio_without_digests": round(summary(without)["median"] / median, 3),
        "seconds": watch.summary(),
    }


def shard_bytes(shard: Any) -> int:
    return sum(map(len, shard.chunks()))


@contextlib.contextmanager
def _server(options: argparse.Namespace, folder: Path) -> Iterator[Server]:
    """The server that was named, a Ceph RGW, or moto."""
    if options.s3_endpoint:
        keys = {"endpoint_url": options.s3_endpoint, "key": options.s3_key, "secret": options.s3_secret}
        yield Server(options.s3_name, options.s3_bucket, keys)
        return
    if options.rgw:
        from tests import ceph_rgw

        with ceph_rgw.running(folder / "ceph", osd_bytes=16 << 30) as rgw:
            yield Server("rgw", rgw.bucket, rgw.options)
        return
    from tests import s3_server

    with s3_server.running() as moto:
        yield Server("moto", moto.bucket, moto.options)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dir", type=Path, required=True, help="where to measure; everything in it is removed again")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--quick", action="store_true", help="16 MB only, a few rounds")
    parser.add_argument("--sizes", default=",".join(SIZES), help="on the directory")
    parser.add_argument("--s3-sizes", default="16MB,200MB", help="on S3; moto keeps everything in memory")
    parser.add_argument("--no-s3", action="store_true")
    parser.add_argument("--rgw", action="store_true", help="start a Ceph RGW (needs Debian's packages)")
    parser.add_argument("--s3-endpoint", default="")
    parser.add_argument("--s3-name", default="endpoint", help="what to call that server in the report")
    for name in ("--s3-bucket", "--s3-key", "--s3-secret"):
        parser.add_argument(name, default="")
    return parser.parse_args()


if __name__ == "__main__":
    main()
