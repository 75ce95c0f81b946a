"""`lorasync versions`, `verify`, `export`, `status`: what a person asks of a store. Light at import."""

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.arguments import add_config_arguments, add_trust_argument, read_store_config
from shared.errors import Corrupt, KeyMissing, Untrusted, UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from shared.catalog import Catalog
    from shared.fates import Entry
    from shared.leases import Lease
    from shared.manifest import Manifest
    from shared.versions import Version

WATCH_INTERVAL_S = 1.0

Subparsers = Any  # argparse's own type for it is private


def add_versions(subparsers: Subparsers) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser("versions", help="list the versions of an adapter")
    add_config_arguments(parser)
    add_trust_argument(parser)
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="only the N newest")
    parser.add_argument("--json", action="store_true", help="as a JSON array")
    parser.set_defaults(run=_versions)


def add_verify(subparsers: Subparsers) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "verify",
        help="check every byte of a version",
        description="Checks digests, headers, shapes and values, and against the parent's digest where the parent "
        "is still there. Only with --base it also knows which tensors the model calls for. Exit code 4: corrupt, or "
        "data of a version that was not collected is gone.",
    )
    add_config_arguments(parser)
    add_trust_argument(parser)
    parser.add_argument("version", nargs="?", default="latest", help="EPOCH-NUMBER, NUMBER or latest (the default)")
    parser.add_argument("--all", action="store_true", help="every version")
    parser.add_argument("--base", type=Path, metavar="DIR", help="the base model, in Hugging Face format")
    parser.add_argument("--json", action="store_true", help="as a JSON array")
    parser.set_defaults(run=_verify)


def add_export(subparsers: Subparsers) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "export",
        help="write a version as a plain PEFT directory",
        description="Writes adapter_model.safetensors and adapter_config.json, which vLLM and PEFT load. Tensors stand "
        "in wire order: by the base model's config with --base, else by their names.",
    )
    add_config_arguments(parser)
    add_trust_argument(parser)
    parser.add_argument("version", help="EPOCH-NUMBER, NUMBER or latest")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new or empty directory")
    parser.add_argument("--base", type=Path, metavar="DIR", help="the base model, in Hugging Face format")
    parser.set_defaults(run=_export)


def add_status(subparsers: Subparsers) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser("status", help="show the trainer, the latest version and what every node serves")
    add_config_arguments(parser)
    add_trust_argument(parser)
    parser.add_argument("--watch", action="store_true", help="keep showing it, until interrupted")
    parser.add_argument("--json", action="store_true", help="as a JSON object (with --watch: one a line)")
    parser.set_defaults(run=_status)


def _catalog(options: argparse.Namespace) -> "Catalog":
    from shared.catalog import Catalog, check_layout
    from shared.signing import load_trust
    from shared.stores import open_store

    config = read_store_config(options)
    catalog = Catalog(open_store(config.url, config.options, config.client), config.adapter, load_trust(config.trust))
    check_layout(catalog.store, catalog.layout)
    return catalog


def _console() -> "Console":
    """Prints text as it stands: what comes from a store is no markup."""
    from rich.console import Console

    return Console(markup=False, highlight=False)


def _versions(options: argparse.Namespace) -> int:
    from shared.catalog import at_once
    from shared.store_tables import versions_table

    catalog = _catalog(options)
    if options.limit < 0:
        raise UsageError("--limit must not be negative")
    shown = catalog.versions()[-options.limit :]
    receipts, pins = _receipts(catalog, shown), _pins(catalog, shown)

    def row(version: "Version") -> dict[str, Any] | None:
        try:
            return {**_row(catalog.manifest(version), pins.get(version)), "receipts": receipts.get(version, [])}
        except KeyMissing:  # expired since the listing
            return None
        except Corrupt as error:
            print(f"lorasync: {type(error).__name__}: {error}", file=sys.stderr)
            wrong = {"corrupt": str(error), "kind": type(error).__name__}
            return {"version": str(version), **wrong, "receipts": receipts.get(version, [])}

    rows = [found for found in at_once(row, shown) if found]
    if options.json:
        print(json.dumps(rows))
    elif rows:
        _console().print(versions_table(rows))
    else:
        print(f"no version of {catalog.layout.adapter} at {catalog.store.url}", file=sys.stderr)
    return Corrupt.exit_code if any("corrupt" in row for row in rows) else 0


def _row(manifest: "Manifest", pin: "Entry | None") -> dict[str, Any]:
    from shared.status import submitted_at

    return {
        "version": str(manifest.version),
        "step": manifest.training.get("step"),
        "bytes": manifest.size,
        "parent": str(manifest.parent.version) if manifest.parent else None,
        "submitted_at": submitted_at(manifest.training),
        "digest": manifest.digest,
        "signed_by": manifest.signature.key if manifest.signature else None,
        "rolled_back_to": manifest.training.get("rolled_back_to"),
        "pinned": {"by": pin.by, "reason": pin.reason, "at": pin.at} if pin else None,
    }


def _pins(catalog: "Catalog", shown: "Sequence[Version]") -> "dict[Version, Entry]":
    """Those that are pinned: one listing, and a read for each that was ever pinned or collected half-way."""
    from shared.fates import Fate, Fates

    fates, asked, found = Fates(catalog.store, catalog.layout), set(shown), {}
    for version, n in fates.logged().items():
        if version in asked:
            try:
                entry = fates.entry(version, n)
            except Corrupt as error:
                print(f"lorasync: {type(error).__name__}: {error}", file=sys.stderr)
                continue
            if entry.fate is Fate.PINNED:
                found[version] = entry
    return found


def _receipts(catalog: "Catalog", shown: "Sequence[Version]") -> "dict[Version, list[str]]":
    """The nodes that have proven each of these versions, ascending, by one listing from the first one on."""
    from shared.layout import stem, version_of

    found: dict[Version, list[str]] = {}
    before = f"{catalog.layout.receipts}/{stem(shown[0])}" if shown else ""
    for entry in catalog.store.list(catalog.layout.receipts, before):
        version = version_of(entry.key)
        if version:
            found.setdefault(version, []).append(entry.key.rsplit("/", 1)[-1].removesuffix(".json"))
    return found


def _verify(options: argparse.Namespace) -> int:
    from shared.fates import Fates, resolve

    catalog = _catalog(options)
    fates = Fates(catalog.store, catalog.layout)
    versions = catalog.versions() if options.all else [resolve(catalog, fates, options.version)]
    base, lease = _Base(options.base), _lease(catalog, "verify")
    results: list[dict[str, Any]] = []
    if options.all:
        results += ({"version": str(version), "ok": True, "expired": True} for version in catalog.collected())
    for number, version in enumerate(versions, start=1):
        if sys.stderr.isatty() and len(versions) > 1:
            print(f"\rverifying {number} of {len(versions)}: {version} ", end="", file=sys.stderr, flush=True)
        result: dict[str, Any] = {"version": str(version), "ok": True}
        try:
            result.update(_verify_one(catalog, base, version, lease))
        except Corrupt as error:
            result.update(ok=False, error=f"{type(error).__name__}: {error}")
        except KeyMissing as error:
            if version in catalog.versions():
                result.update(ok=False, error=f"{error}")
            elif not options.all:
                raise
            else:
                result.update(expired=True)  # its retention ended while we looked
        results.append(result)
    if sys.stderr.isatty() and len(versions) > 1:
        print("\r\033[K", end="", file=sys.stderr)
    bad = sum(not result["ok"] for result in results)
    if options.json:
        print(json.dumps(results))
    else:
        there = [result for result in results if "expired" not in result]
        for result in there:
            print(_verdict(result))
        expired = f", {len(results) - len(there)} expired" if len(results) > len(there) else ""
        print(f"{len(there) - bad} of {len(there)} versions whole{expired}")
    return Corrupt.exit_code if bad else 0


def _verify_one(catalog: "Catalog", base: "_Base", version: "Version", lease: "Lease") -> dict[str, Any]:
    from shared.fetch import verify

    with lease.holding({version}):
        manifest = catalog.manifest(version)
        expected = base.expected(manifest)
        verify(catalog.store, manifest, expected)
    parent = manifest.parent
    if parent:
        try:
            digest = catalog.manifest(parent.version).digest
        except (KeyMissing, Untrusted):  # which for the parent is said on its own line
            digest = parent.digest
        if digest != parent.digest:
            problem = f"its parent {parent.version} has another digest than the one it was made from"
            raise Corrupt(problem, op="verify", version=str(version))
    return {"bytes": manifest.size, "tensors": len(expected)}


def _lease(catalog: "Catalog", reader: str) -> "Lease":
    """What keeps versions from being collected while they are read."""
    from shared.leases import Lease

    return Lease(catalog.store, catalog.layout, reader)


def _verdict(result: Mapping[str, Any]) -> str:
    if not result["ok"]:
        return f"{result['version']}  CORRUPT  {result['error']}"
    return f"{result['version']}  ok  {result['tensors']} tensors, {result['bytes']:,} bytes"


class _Base:
    """What a version must hold: by the base model where one is given, else by its own manifest."""

    def __init__(self, directory: Path | None) -> None:
        from shared.base_model import identify, read_base_config

        self.directory = directory
        self._config = read_base_config(directory) if directory else None
        self._identity = identify(directory) if directory else None

    def expected(self, manifest: "Manifest") -> dict[str, tuple[int, int]]:
        """Names in wire order and their shapes.

        Raises:
            WrongBase: the version was made for another base model.
        """
        from shared.peft_names import expected_tensors, wire_order

        if self._config and self._identity:
            self._identity.demand(manifest.base, version=str(manifest.version))
            return expected_tensors(self._config, manifest.lora.targets, manifest.lora.rank)
        names = wire_order((*manifest.tensors, *manifest.aliases))
        return {name: manifest.tensors[manifest.aliases.get(name, name)].shape for name in names}


def _export(options: argparse.Namespace) -> int:
    from shared.fates import Fates, resolve
    from shared.fetch import CONFIG, DIGEST, MANIFEST, WEIGHTS, fetch

    catalog = _catalog(options)
    out: Path = options.out
    if out.exists():
        held = {path.name for path in out.iterdir()} if out.is_dir() else {out.name}
        if held and (MANIFEST not in held or not held <= {CONFIG, DIGEST, MANIFEST, WEIGHTS}):
            raise UsageError("not an empty directory", op="export", key=str(out), hint="Name a new one with --out")
    version = resolve(catalog, Fates(catalog.store, catalog.layout), options.version)
    base = _Base(options.base)
    with _lease(catalog, "export").holding({version}):
        manifest = catalog.manifest(version)
        base_name = str(options.base) if options.base else manifest.base.model_type
        fetch(catalog.store, manifest, base.expected(manifest), out.absolute(), base_name=base_name)
    print(f"{catalog.layout.adapter}@{manifest.version} in {out}")
    return 0


def _status(options: argparse.Namespace) -> int:
    from rich.live import Live

    from shared.status import StatusReader
    from shared.store_tables import shown

    reader = StatusReader(_catalog(options))
    if options.json:
        while True:
            print(json.dumps(reader.read().to_json()), flush=True)
            if not options.watch:
                return 0
            time.sleep(WATCH_INTERVAL_S)
    console = _console()
    if not options.watch:
        console.print(shown(reader.read()))
        return 0
    with Live(shown(reader.read()), console=console, auto_refresh=False) as live:
        while True:
            time.sleep(WATCH_INTERVAL_S)
            live.update(shown(reader.read()), refresh=True)
