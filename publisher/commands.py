"""`lorasync gc`, `pin` and `rollback`: what a person decides about versions. Light at import."""

import argparse
import contextlib
import json
import re
import sys
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from shared.arguments import (
    add_config_arguments,
    add_sign_argument,
    add_trust_argument,
    read_section,
    read_store_config,
)
from shared.errors import UsageError

if TYPE_CHECKING:
    from publisher.collect import Outcome, Plan
    from publisher.resume import Outlook
    from publisher.retention import Rule
    from shared.catalog import Catalog
    from shared.manifest import Manifest
    from shared.versions import Version

Subparsers = Any  # argparse's own type for it is private

_DURATION = re.compile(r"(\d+(?:\.\d+)?)([smhd])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def add_gc(subparsers: Subparsers) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "gc",
        help="delete versions that the retention rule lets go",
        description="Collects versions by [retention] or by these flags, finishes what a killed collector began, and "
        "deletes attempts that were never committed. The latest, pinned and leased versions stay, and those that were "
        "rolled back to.",
    )
    add_config_arguments(parser)
    parser.add_argument("--dry-run", action="store_true", help="only say what would go")
    parser.add_argument("--keep", type=int, metavar="K", help="the newest K stay, at least train.max_staleness + 2")
    parser.add_argument("--older-than", metavar="AGE", help="only versions older than this: 90s, 30m, 12h, 7d")
    parser.add_argument("--json", action="store_true", help="as a JSON object")
    parser.set_defaults(run=_gc)


def add_pin(subparsers: Subparsers) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser("pin", help="keep a version whatever the retention rule says")
    add_config_arguments(parser)
    parser.add_argument("version", help="EPOCH-NUMBER, NUMBER or latest")
    parser.add_argument("--reason", default="", metavar="TEXT", help="for who reads it later")
    parser.add_argument("--remove", action="store_true", help="unpin it")
    parser.add_argument("--json", action="store_true", help="as a JSON object")
    parser.set_defaults(run=_pin)


def add_rollback(subparsers: Subparsers) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "rollback",
        help="make an earlier version the latest again",
        description="Publishes a version of a new epoch with the bytes of an earlier one; every node takes it. A "
        "trainer that runs is fenced and stops (exit code 3); one that starts afterwards goes on from its newest "
        "checkpoint at or before that version's step.",
    )
    add_config_arguments(parser)
    add_sign_argument(parser)
    add_trust_argument(parser)
    parser.add_argument("version", help="EPOCH-NUMBER or NUMBER")
    parser.add_argument("--yes", action="store_true", help="don't ask")
    parser.add_argument("--json", action="store_true", help="as a JSON object; needs --yes")
    parser.set_defaults(run=_rollback)


def seconds(text: str) -> float:
    """Read an age: 90s, 30m, 12h, 7d.

    Raises:
        UsageError: not of that form.
    """
    match = _DURATION.fullmatch(text)
    if not match:
        raise UsageError(f"not an age: {text!r}", op="read arguments", hint="Write 90s, 30m, 12h or 7d")
    return float(match[1]) * _SECONDS[match[2]]


def _catalog(options: argparse.Namespace, *, signs: bool = False) -> "Catalog":
    """The adapter's catalog. One that `signs` what it reads trusts the signing key, lest it sign another's version."""
    from shared.catalog import Catalog, check_layout
    from shared.signing import load_trust
    from shared.stores import open_store

    config = read_store_config(options)
    trust = load_trust(config.trust, config.sign_key if signs else "")
    catalog = Catalog(open_store(config.url, config.options, config.client), config.adapter, trust)
    check_layout(catalog.store, catalog.layout)
    return catalog


def _gc(options: argparse.Namespace) -> int:
    from publisher.collect import Outcome, choose, collect
    from shared.config import RetentionConfig
    from shared.fates import Fates

    retention, rule = read_section(options, "retention", RetentionConfig), _rule(options)
    catalog = _catalog(options)
    _demand_there(catalog)
    fates = Fates(catalog.store, catalog.layout)
    if options.dry_run:
        outcome = Outcome(choose(catalog, fates, rule))
    else:
        outcome = collect(catalog, fates, rule, grace_s=retention.grace_s)
    facts = _facts(catalog, rule, outcome, dry_run=options.dry_run)
    if options.json:
        print(json.dumps(facts))
    else:
        _tell(facts)
    return 0


def _demand_there(catalog: "Catalog") -> None:
    """Check that the adapter is there before anything is written: a typing error must not look like a clean store.

    Raises:
        UsageError: neither a layout nor a manifest.
    """
    from shared.errors import KeyMissing

    try:
        catalog.store.get(catalog.layout.layout)
    except KeyMissing:
        if not catalog.store.list(catalog.layout.manifests):
            problem = f"no adapter {catalog.layout.adapter!r} at {catalog.store.url}"
            raise UsageError(problem, op="collect", hint="Check --store and --adapter") from None


def _rule(options: argparse.Namespace) -> "Rule":
    """The configuration's rule, changed by the flags. With --older-than alone, no more are kept than must be."""
    from publisher.retention import rule_of
    from shared.config import RetentionConfig, TrainConfig

    rule = rule_of(
        read_section(options, "retention", RetentionConfig), read_section(options, "train", TrainConfig).max_staleness
    )
    if options.keep is not None and options.keep < 1:
        raise UsageError("--keep must be at least 1: the latest version always stays")
    if options.keep is not None:
        rule = replace(rule, keep_versions=options.keep)
    elif options.older_than is not None:
        rule = replace(rule, keep_versions=rule.keep_versions or 1)
    if options.older_than is not None:
        rule = replace(rule, keep_younger_s=seconds(options.older_than))
    return rule


def _facts(catalog: "Catalog", rule: "Rule", outcome: "Outcome", *, dry_run: bool) -> dict[str, Any]:
    """What goes or went and what stays, as JSON."""
    plan, swept = outcome.plan, outcome.swept
    collected = plan.decision.collect if dry_run else outcome.collected
    orphans = plan.decision.orphans if dry_run else outcome.orphans
    going = {*collected, *orphans, *plan.leftover}
    return {
        "adapter": catalog.layout.adapter,
        "store": catalog.store.url,
        "dry_run": dry_run,
        "keep_newest": rule.newest,
        "keep_asked": rule.keep_versions,
        "keep_younger_s": rule.keep_younger_s,
        "collected": _sizes(plan, collected),
        "orphans": _sizes(plan, orphans),
        "begun_before": _sizes(plan, plan.leftover),
        "bytes": plan.bytes(going) if dry_run else swept.bytes,
        "data_in_use": [str(version) for version in swept.in_use],
        "unfinished_writes": outcome.leftovers,
        "kept": [{"version": str(version), "why": why} for version, why in plan.decision.kept.items()],
        "versions": len(plan.seen.committed) - (0 if dry_run else len(collected)),
    }


def _sizes(plan: "Plan", versions: Collection["Version"]) -> list[dict[str, Any]]:
    return [{"version": str(version), "bytes": plan.bytes([version])} for version in versions]


def _tell(facts: Mapping[str, Any]) -> None:
    """The same for a person."""
    would = "would delete" if facts["dry_run"] else "deleted"
    if facts["keep_newest"] > facts["keep_asked"] > 0:
        print(f"the newest {facts['keep_newest']} stay, not {facts['keep_asked']}: train.max_staleness needs them")
    kinds = {
        "collected": "versions",
        "orphans": "attempts that were never committed",
        "begun_before": "versions that an earlier collector had begun",
    }
    for name, what in kinds.items():
        if found := [row["version"] for row in facts[name]]:
            print(f"{would} {len(found)} {what}: {_span(found)}")
    if facts["unfinished_writes"]:
        print(f"{would} {facts['unfinished_writes']} unfinished writes")
    young = [row for row in facts["kept"] if row["why"] == "young"]
    for row in facts["kept"]:
        if row["why"] != "young":
            print(f"kept {row['version']}: {row['why']}")
    if young:
        print(f"kept {len(young)} versions that are younger than {facts['keep_younger_s']:.0f} s")
    for version in facts["data_in_use"]:
        print(f"kept the data of {version}, which is in use; the next collection looks again")
    if not any(facts[name] for name in kinds):
        why = "" if facts["keep_newest"] else " (retention.keep_versions is 0: all are kept; --keep K keeps K)"
        print(f"nothing to collect{why}")
    print(f"{facts['bytes']:,} bytes, {facts['versions']} versions {'now' if facts['dry_run'] else 'left'}")


def _span(versions: list[str]) -> str:
    return ", ".join(versions) if len(versions) <= 3 else f"{versions[0]} .. {versions[-1]}"


def _pin(options: argparse.Namespace) -> int:
    from shared.fates import Fates, resolve

    catalog = _catalog(options)
    fates = Fates(catalog.store, catalog.layout)
    version = resolve(catalog, fates, options.version)
    changed = fates.unpin(version, options.reason) if options.remove else fates.pin(version, options.reason)
    if options.json:
        print(json.dumps({"version": str(version), "pinned": not options.remove, "changed": changed}))
    elif options.remove:
        print(f"{version} unpinned" if changed else f"{version} was not pinned")
    else:
        print(f"{version} pinned" if changed else f"{version} was pinned already")
    return 0


def _rollback(options: argparse.Namespace) -> int:
    from publisher.rollback import demand_target, roll_back
    from shared.fates import Fates, resolve
    from shared.signing import load_seal

    if options.json and not options.yes:
        raise UsageError("--json asks nothing, so it needs --yes", op="rollback")
    catalog, key = _catalog(options, signs=True), read_store_config(options).sign_key
    target = demand_target(catalog, resolve(catalog, Fates(catalog.store, catalog.layout), options.version))
    signed = next((manifest.version for manifest in (target, _newest_readable(catalog)) if manifest.signature), None)
    if signed and not key:
        problem = f"{signed} is signed, and readers that trust its key would refuse the rollback"
        raise UsageError(problem, op="rollback", hint="Give --sign-key")
    outlook = _outlook(catalog, target)
    if options.yes and outlook.kept and outlook.goes_on is None:
        print(f"warning: {_next_trainer(target, outlook)}", file=sys.stderr)
    if not options.yes and not _agreed(catalog, target, outlook):
        print("nothing done", file=sys.stderr)
        return 1
    manifest = roll_back(catalog, target.version, seal=load_seal(key))
    if options.json:
        print(json.dumps({"version": str(manifest.version), "rolled_back_to": manifest.training["rolled_back_to"]}))
    else:
        print(f"{manifest.version} is the latest, with the bytes of {manifest.training['rolled_back_to']}")
    return 0


def _newest_readable(catalog: "Catalog") -> "Manifest":
    """What readers take now. The one that is gone back to is readable, so there is one.

    Raises:
        StoreError: the store failed, or everything was collected meanwhile.
    """
    from shared.errors import Corrupt, KeyMissing, StoreError

    for version in reversed(catalog.versions()):
        with contextlib.suppress(Corrupt, KeyMissing):
            return catalog.manifest(version)
    raise StoreError("no readable version", op="rollback", key=catalog.layout.manifests)


def _outlook(catalog: "Catalog", target: "Manifest") -> "Outlook":
    from publisher.resume import outlook
    from publisher.rollback import RolledBack, origin_of

    return outlook(catalog, RolledBack(target.version, origin_of(target), dict(target.training)))


def _agreed(catalog: "Catalog", target: "Manifest", outlook: "Outlook") -> bool:
    """Say what will be done, and ask.

    Raises:
        UsageError: there is nobody to ask.
    """
    newest, step = catalog.newest(), target.training.get("step")
    print(
        f"Goes back from {newest} to {target.version} (step {step}): every node will serve its bytes, as a version of\n"
        f"a new epoch. A trainer that runs is fenced: it stops. Nothing is deleted.\n{_next_trainer(target, outlook)}"
    )
    if not sys.stdin.isatty():
        raise UsageError("nobody to ask", op="rollback", hint="Give --yes")
    return input("Go back? [y/N] ").strip().lower() in ("y", "yes")


def _next_trainer(target: "Manifest", outlook: "Outlook") -> str:
    """What the next trainer will do, for a person."""
    if outlook.goes_on:
        epoch, step = outlook.goes_on
        return f"The next trainer goes on from its checkpoint at step {step} of epoch {epoch}."
    if not outlook.kept:
        return "No checkpoint is kept: the next trainer begins anew, from the base model."
    steps = ", ".join(f"step {step} of epoch {epoch}" for epoch, step in outlook.kept)
    return (
        f"No checkpoint on the way to step {target.training.get('step')} is kept, only {steps}: the next trainer will\n"
        "refuse to start, until you go back to a version from there on, or delete the adapter's checkpoints/."
    )
