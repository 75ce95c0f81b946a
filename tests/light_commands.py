"""`lorasync train`, `read` and `collect` without Megatron and vLLM, under the real console: for tests of processes.

train     a life of a trainer: claims an epoch, publishes versions, may suspend itself at a named moment
read      a node's eyes: follows the store, leases and fetches what is newest, writes down what it took
collect   the collector, with a retention rule
"""

import argparse
import os
import signal
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import synthetic

from publisher.collect import collect
from publisher.convert import convert
from publisher.epochs import claim_epoch
from publisher.retention import Rule
from rollout.watch import Watcher
from shared import console
from shared.catalog import Catalog
from shared.errors import KeyMissing
from shared.fates import Fates
from shared.fetch import fetch
from shared.layout import Layout
from shared.leases import Lease
from shared.local_store import LocalStore

LAYOUT = Layout(synthetic.ADAPTER)
MOMENTS = ("idle", "mid-shard", "before the manifest", "before the hint")  # of the second version
POLL_S, LIST_S = 0.02, 0.1


def main(words: Sequence[str]) -> int:
    """Run a command; its exit code, as `lorasync` maps it."""
    console.COMMANDS = dict.fromkeys(("train", "read", "collect"), "light_commands")
    return console.main(words)


class Suspended(LocalStore):
    """Suspends its own process, all threads of it, at a moment of version number 1."""

    def __init__(self, url: str, moment: str) -> None:
        super().__init__(url)
        self._moment, self._in_second = moment, False

    def reach(self, moment: str) -> None:
        """Stop here if this is the moment, until somebody says SIGCONT."""
        if moment == self._moment:
            self._moment = ""
            os.kill(os.getpid(), signal.SIGSTOP)

    def put_stream(self, key: str, chunks: Iterable[bytes | memoryview], size: int) -> None:
        self._in_second = "-000000000001/" in key

        def watched() -> Iterable[bytes | memoryview]:
            for number, chunk in enumerate(chunks):
                if number and self._in_second:
                    self.reach("mid-shard")
                yield chunk

        super().put_stream(key, watched(), size)

    def put_if_absent(self, key: str, content: bytes) -> bool:
        if key.startswith(LAYOUT.manifests) and self._in_second:
            self.reach("before the manifest")
        return super().put_if_absent(key, content)

    def put(self, key: str, content: bytes) -> None:
        if key == LAYOUT.latest and self._in_second:
            self.reach("before the hint")
        super().put(key, content)


def _add(subparsers: Any, name: str, run: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(name)
    parser.add_argument("url")
    parser.set_defaults(run=run)
    return parser


def add_train(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = _add(subparsers, "train", _train)
    parser.add_argument("base", type=Path)
    parser.add_argument("versions", type=int)
    parser.add_argument("--suspend", default="", choices=MOMENTS)
    parser.add_argument("--pid", type=Path, help="a file that tells the process's number")


def _train(options: argparse.Namespace) -> int:
    if options.pid:
        options.pid.write_text(str(os.getpid()))
    store = Suspended(options.url, options.suspend)
    newest = Catalog(store, synthetic.ADAPTER).newest()
    parent = Catalog(store, synthetic.ADAPTER).manifest(newest) if newest else None
    published = threading.Event()
    publisher = synthetic.open_publisher(
        store, options.base, claim_epoch(store, LAYOUT), parent=parent, on_published=lambda _: published.set()
    )
    for number in range(options.versions):
        if number == 1:
            store.reach("idle")
        publisher.submit(number, convert(synthetic.BASE, synthetic.factors(number)), training={"step": number})
        while not published.wait(POLL_S):
            publisher.check()
        published.clear()
    publisher.close()
    return 0


def add_read(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = _add(subparsers, "read", _read)
    parser.add_argument("folder", type=Path, help="where versions are fetched to, and `took` lists them")
    parser.add_argument("until", type=Path, help="the reader ends when this file is there")


def _read(options: argparse.Namespace) -> int:
    catalog = Catalog(LocalStore(options.url), synthetic.ADAPTER)
    lease = Lease(catalog.store, LAYOUT, "reader")
    watcher = Watcher(catalog, poll_interval_s=POLL_S, list_interval_s=LIST_S)
    options.folder.mkdir()
    took = None
    with (options.folder / "took").open("w") as told:
        while True:
            over = options.until.exists()  # and then one look more
            version = watcher.look()
            if version is not None and version != took:
                lease.take({version})
                try:
                    manifest = catalog.manifest(version)
                    fetch(catalog.store, manifest, synthetic.EXPECTED, options.folder / str(version), base_name="base")
                except KeyMissing:
                    watcher.forget(version)
                else:
                    took = version
                    print(version, file=told, flush=True)
            if over:
                return 0
            watcher.wait()


def add_collect(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = _add(subparsers, "collect", _collect)
    for name in ("--keep-younger-s", "--orphan-after-s"):
        parser.add_argument(name, type=float, required=True)


def _collect(options: argparse.Namespace) -> int:
    store = LocalStore(options.url)
    rule = Rule(keep_versions=2, keep_younger_s=options.keep_younger_s, orphan_after_s=options.orphan_after_s)
    collect(Catalog(store, synthetic.ADAPTER), Fates(store, LAYOUT), rule, sleep=lambda _: None)
    return 0
