"""What a version costs on a store: published, visible and verified, beside a raw copy of the same bytes.

    make bench-store                                 # under ten minutes; about 30 GB of free disk
    python -m benchmarks.store --quick               # 16 MB and moto only, under a minute: for CI
    python -m benchmarks.store --dir DIR             # on the disk to measure
    python -m benchmarks.store --s3 moto             # another S3 server: rgw, moto or none
    python -m benchmarks.store --s3-endpoint URL --s3-bucket B --s3-key K --s3-secret S

Writes benchmarks/out/store.json (--out) and prints a table. The S3 server is a Ceph RGW of this machine where Ceph is
installed (`make test-s3` does that), else moto, which keeps everything in memory: both outputs say which.

Ratios are medians over medians of the same run; rounds of all kinds are interleaved, so that what disturbs the machine
disturbs them alike, and the spread is that of the rounds. A size that takes long gets fewer rounds. On a machine that
others use too, look at the processor's seconds (`cpu`): a raw copy waits for the disk, ours computes.

Raw copy, on a directory: the bytes written to a new file in slices of 16 MiB, fsynced, and read back once by one
thread. On S3: boto3's upload_fileobj and download_fileobj. Adapters have Qwen3-30B-A3B's shapes in bf16, one rank, no
aliases: 16MB is one layer at rank 8, 200MB three at rank 32, 1700MB and 3400MB all 48 at rank 16 and 32 (37,248
tensors). Values are noise and are encoded beforehand: what encoding costs stands beside the writer.

Without digests: without our sha256 of every part, on both ways. On S3 over http that leaves in the sha256 of each body
that its request's signature covers, in boto3 as in ours.
"""

import argparse
import contextlib
import json
import os
import platform
import shutil
import sys
import tempfile
import time
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
from shared.store import Store
from shared.stores import open_store
from tests import ceph_rgw, s3_server

OUT = Path(__file__).parent / "out" / "store.json"
SCRATCH = Path(__file__).parent / "out" / "scratch"
QUICK_REPEATS = 2
MOST_S = 80.0  # of one size on one store: no round begins after that
MOTO_SIZES = "16MB,200MB"
RGW_BYTES = 4 << 30  # of Ceph's own; what is deleted it frees hours later
PUTS_A_ROUND = 5  # on S3
MOST_CLIENT_BYTES = 2_000_000_000  # above, S3's clients are not timed beside one another


@dataclass(frozen=True)
class Server:
    """An S3 server to measure on."""

    name: str
    bucket: str
    options: dict[str, Any]


def main() -> None:
    options = _arguments()
    sizes = [SIZES[name] for name in options.sizes.split(",")]
    many = MANY_TENSORS
    if options.quick:
        sizes = [_quick(SIZES["16MB"])]
        many = replace(many, layers=6, repeats=1)
    options.dir.mkdir(parents=True, exist_ok=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.dir, prefix="bench-store-") as name:
        folder = Path(name)
        result: dict[str, Any] = {"device": device(folder), "publish_over_raw_copy": {"file": {}}, "runs": {}}
        kind, result["s3_server"] = _kind(options)
        _say("writer and reader of many tensors")
        result.update(_writer_and_reader(folder, many))
        for size in sizes:
            _say(f"{size.name} on file")
            _on_file(folder, size, result)
        _keep(options.out, result)  # also after each size below, whatever becomes of the S3 server
        if kind != "none":
            _say(f"S3: {result['s3_server']}")
            _on_s3(folder, kind, options, result)
            _keep(options.out, result)
    print(table(result))
    print(f"\n{options.out}")


def _say(progress: str) -> None:
    print(progress, file=sys.stderr, flush=True)


def _keep(path: Path, result: dict[str, Any]) -> None:
    path.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")


def _quick(size: Size) -> Size:
    return replace(size, repeats=QUICK_REPEATS, s3_repeats=QUICK_REPEATS)


def _rounds(repeats: int) -> Iterator[int]:
    """The rounds of one size, fewer if they take long: at least one."""
    began = time.monotonic()
    for number in range(repeats):
        if number and time.monotonic() - began > MOST_S:
            return
        yield number


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
    from_tensors = summary(total(watch, "encode", "write"))["median"]
    return {
        "writer_speedup": round(seconds["save_file"]["median"] / seconds["write"]["median"], 2),
        "writer_from_tensors_speedup": round(seconds["save_file"]["median"] / from_tensors, 2),
        "reader_speedup": round(seconds["load_file"]["median"] / seconds["map"]["median"], 2),
        "writer_cpu_speedup": round(seconds["save_file"]["cpu"] / seconds["write"]["cpu"], 2),
        "writer_from_tensors_cpu_speedup": round(
            seconds["save_file"]["cpu"] / (seconds["encode"]["cpu"] + seconds["write"]["cpu"]), 2
        ),
        "reader_cpu_speedup": round(seconds["load_file"]["cpu"] / seconds["map"]["cpu"], 2),
        "adapter_file": {"tensors": len(size.expected()), "rank": size.rank, "seconds": seconds},
    }


def _on_file(folder: Path, size: Size, result: dict[str, Any]) -> None:
    expected = size.expected()
    shard, watch = encoded(expected), Stopwatch()
    publications = Publications(LocalStore(str(folder / f"store-{size.name}")), size.rank, expected)
    for _ in _rounds(size.repeats):
        raw_copy(folder, shard, watch)
        publications.run(shard, watch)
        publications.run(shard, watch, digests=False)
    shutil.rmtree(folder / f"store-{size.name}")
    _record(result, "file", size, shard_bytes(shard), len(expected), watch)


def _on_s3(folder: Path, kind: str, options: argparse.Namespace, result: dict[str, Any]) -> None:
    """Every size on a server of its own, for Ceph frees what was deleted hours later."""
    clients: dict[str, Any] = {"server": options.s3_name if kind == "endpoint" else kind}
    result["clients"], result["publish_over_raw_copy"][f"s3_{clients['server']}"] = clients, {}
    names = (options.s3_sizes or (MOTO_SIZES if kind == "moto" else ",".join(SIZES))).split(",")
    sizes = [_quick(SIZES["16MB"])] if options.quick else [SIZES[name] for name in names]
    for size in sizes:
        nbytes = shard_bytes(encoded(size.expected()))
        room = RGW_BYTES + PUTS_A_ROUND * size.s3_repeats * nbytes
        free = shutil.disk_usage(folder).free
        if kind == "rgw" and free < room:
            clients[f"{size.name} left out"] = f"{room >> 30} GiB needed in {folder.parent}, {free >> 30} free"
            continue
        _say(f"{size.name} on {clients['server']}")
        with _server(kind, options, folder / f"ceph-{size.name}", room) as server:
            _size_on_s3(server, size, result)
            if size is sizes[0]:
                clients["small"] = _small_on_s3(server)
        _keep(options.out, result)


def _size_on_s3(server: Server, size: Size, result: dict[str, Any]) -> None:
    boto, stores = _clients(server)
    expected = size.expected()
    shard, watch = encoded(expected), Stopwatch()
    nbytes = shard_bytes(shard)
    publications = Publications(stores["s3fs"], size.rank, expected)
    for _ in _rounds(size.s3_repeats):
        boto.large(shard, watch)
        publications.run(shard, watch)
        publications.run(shard, watch, digests=False)
        if nbytes <= MOST_CLIENT_BYTES:
            for name, store in stores.items():
                store_large(name, store, shard, watch)
    seconds = {name: of for name, of in watch.summary().items() if name.endswith((" put", " get"))}
    result["clients"][size.name] = {"bytes": nbytes, "seconds": seconds}
    for runs in (watch.seconds, watch.cpu_seconds):
        runs["raw write"], runs["raw read"] = runs["boto3 put"], runs["boto3 get"]
    _record(result, f"s3_{server.name}", size, nbytes, len(expected), watch)


def _small_on_s3(server: Server) -> dict[str, Any]:
    (boto, stores), watch = _clients(server), Stopwatch()
    for _ in range(QUICK_REPEATS):
        boto.small(watch)
        for name, store in stores.items():
            store_small(name, store, watch)
    return {"seconds": watch.summary()}


def _clients(server: Server) -> tuple[Boto, dict[str, Store]]:
    prefix = f"s3://{server.bucket}/bench-{uuid.uuid4().hex}"
    return Boto(server.bucket, server.options), {
        "s3fs": open_store(f"{prefix}/s3fs", server.options, client="fsspec"),
        "obstore": open_store(f"{prefix}/obstore", server.options, client="obstore"),
    }


def _record(result: dict[str, Any], kind: str, size: Size, nbytes: int, tensors: int, watch: Stopwatch) -> None:
    raw = total(watch, "raw write", "raw read")
    ours = total(watch, "published", "visible", "verified")
    without = total(watch, *(f"{step} without digests" for step in ("published", "visible", "verified")))
    median = summary(raw)["median"]
    result["publish_over_raw_copy"][kind][size.name] = round(summary(ours)["median"] / median, 3)
    result["runs"].setdefault(kind, {})[size.name] = {
        "bytes": nbytes,
        "tensors": tensors,
        "repeats": len(raw),
        "ratio_of_rounds": summary([mine / copy for mine, copy in zip(ours, raw, strict=True)]),
        "publish_over_write": round(
            summary(watch.seconds["published"])["median"] / summary(watch.seconds["raw write"])["median"], 3
        ),
        "ratio_without_digests": round(summary(without)["median"] / median, 3),
        "seconds": watch.summary(),
    }


def shard_bytes(shard: Any) -> int:
    return sum(map(len, shard.chunks()))


def _kind(options: argparse.Namespace) -> tuple[str, str]:
    """Which S3 server to measure on, and why: "endpoint", "rgw", "moto" or "none"."""
    if options.s3_endpoint:
        return "endpoint", f"{options.s3_name}, {options.s3_endpoint}"
    if options.s3 != "auto":
        return options.s3, f"{options.s3}, as asked for"
    if options.quick:
        return "moto", "moto, for --quick"
    missing = ceph_rgw.missing_packages()
    if missing:
        return "moto", f"moto, in memory: {', '.join(missing)} not installed here (make test-s3 does that)"
    return "rgw", "a Ceph RGW on this machine: one OSD in a file of the measured disk"


@contextlib.contextmanager
def _server(kind: str, options: argparse.Namespace, folder: Path, nbytes: int) -> Iterator[Server]:
    if kind == "endpoint":
        keys = {"endpoint_url": options.s3_endpoint, "key": options.s3_key, "secret": options.s3_secret}
        yield Server(options.s3_name, options.s3_bucket, keys)
    elif kind == "rgw":
        with ceph_rgw.running(folder, osd_bytes=nbytes) as rgw:
            yield Server("rgw", rgw.bucket, rgw.options)
        shutil.rmtree(folder, ignore_errors=True)
    else:
        with s3_server.running() as moto:
            yield Server("moto", moto.bucket, moto.options)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dir", type=Path, default=SCRATCH, help="where to measure; what is written is removed again")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--quick", action="store_true", help="16 MB only, a few rounds")
    parser.add_argument("--sizes", default=",".join(SIZES), help="on the directory (default: %(default)s)")
    parser.add_argument("--s3", choices=("auto", "rgw", "moto", "none"), default="auto", help="rgw where installed")
    parser.add_argument("--s3-sizes", default="", help=f"on S3 (default: all; on moto {MOTO_SIZES})")
    parser.add_argument("--s3-endpoint", default="")
    parser.add_argument("--s3-name", default="endpoint", help="what to call that server in the report")
    for name in ("--s3-bucket", "--s3-key", "--s3-secret"):
        parser.add_argument(name, default="")
    return parser.parse_args()


if __name__ == "__main__":
    main()
