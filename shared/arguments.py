"""The arguments that several commands share, in one place: which store, which configuration, what overrides it.

    lorasync versions --store s3://bucket/run --store-option endpoint_url=http://127.0.0.1:9000
    lorasync train --config run.toml --set train.lr=3e-4 --set lora.targets=linear_qkv,linear_proj

A flag wins over `--set`, which wins over the file. The text of `--set` is read by the field's own type.
"""

import argparse
import dataclasses
import tomllib
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from shared import config
from shared.config import Config, Section, StoreConfig
from shared.errors import UsageError


def add_store_arguments(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add --store, --adapter and --store-option."""
    group = parser.add_argument_group("store")
    group.add_argument("--store", required=required, metavar="URL", help="file:///path, s3://bucket/prefix, gs://, ...")
    group.add_argument("--adapter", metavar="NAME", help="the policy's name in that store (default: policy)")
    group.add_argument(
        "--store-option",
        dest="store_option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="for the file system behind the URL, such as endpoint_url=http://...; dots nest; may be repeated",
    )


def add_config_arguments(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
    """Add --config and --set, and the store's arguments, which win over the file."""
    add_store_arguments(parser, required=False)
    group = parser.add_argument_group("configuration")
    group.add_argument("--config", required=required, metavar="FILE", help="TOML file; see docs/configuration.md")
    group.add_argument(
        "--set",
        dest="settings",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="instead of what the file says; may be repeated",
    )


def add_sign_argument(parser: argparse.ArgumentParser) -> None:
    """Add --sign-key, for commands that commit versions; it wins over store.sign_key."""
    parser.add_argument("--sign-key", type=_named, metavar="KEY", help="sign versions with this ed25519 key (PEM)")


def add_trust_argument(parser: argparse.ArgumentParser) -> None:
    """Add --trust, for commands that read versions; it wins over store.trust."""
    parser.add_argument(
        "--trust",
        type=_named,
        action="append",
        metavar="PUB",
        help="refuse versions that no trusted key signed: a PEM file, a directory of them or hex; may be repeated",
    )


def read_config(
    options: argparse.Namespace,
    flags: Mapping[str, Any] | None = None,
    beneath: Mapping[str, Mapping[str, Any]] | None = None,
) -> Config:
    """The whole configuration: the file, --set, the store's flags, then `flags` (dotted; None means not given).

    Args:
        beneath: sections that count where none of these says otherwise.

    Raises:
        UsageError: see `shared.config.load_config`.
    """
    given = {name: value for name, value in (flags or {}).items() if value is not None}
    return config.parse(Config, config.override(_above(beneath or {}, _read(options)), given))


def read_store_config(options: argparse.Namespace) -> StoreConfig:
    """The [store] section alone, for commands that need no more; the file's other sections may be missing.

    Raises:
        UsageError: neither --store nor a file that names one, or a bad value.
    """
    if not options.store and not options.config:
        raise UsageError("which store?", op="read arguments", hint="Give --store URL or --config FILE")
    return read_section(options, "store", StoreConfig)


def read_section(options: argparse.Namespace, name: str, section: type[Section]) -> Section:
    """One section alone, by its defaults where the file has none.

    Raises:
        UsageError: a bad value, or a key missing that has no default.
    """
    found = _read(options).get(name, {})
    if not isinstance(found, Mapping):
        raise UsageError(f"{name} must be a table", op="read config")
    return config.parse(section, found, name)


def store_options(options: argparse.Namespace) -> dict[str, Any]:
    """What the --store-option flags say, nested at the dots.

    A value is a TOML value where it is one (true, 5, {...}), else plain text; quote a number that is meant as text.

    Raises:
        UsageError: not of the form KEY=VALUE.
    """
    found: dict[str, Any] = {}
    for text in options.store_option:
        key, value = _split(text, "--store-option")
        found = config.override(found, {key: _toml(value, otherwise=value)})
    return found


def _read(options: argparse.Namespace) -> dict[str, Any]:
    mapping = config.read_toml(Path(options.config)) if options.config else {}
    settings = dict(_split(text, "--set") for text in options.settings)
    mapping = config.override(mapping, {key: typed(key, text) for key, text in settings.items()})
    flags = {
        "store.url": options.store,
        "store.adapter": options.adapter,
        "store.sign_key": getattr(options, "sign_key", None),
        "store.trust": getattr(options, "trust", None),
    }
    mapping = config.override(mapping, {key: value for key, value in flags.items() if value is not None})
    extra = {f"store.options.{key}": value for key, value in store_options(options).items()}
    return config.override(mapping, extra)


def _above(beneath: Mapping[str, Mapping[str, Any]], mapping: Mapping[str, Any]) -> dict[str, Any]:
    """The mapping's sections, filled up from those beneath."""
    both = [name for name in beneath if isinstance(mapping.get(name), Mapping)]
    return {**beneath, **mapping, **{name: {**beneath[name], **mapping[name]} for name in both}}


def typed(dotted: str, text: str) -> Any:
    """Read the text of a value by the type of its field; lists as TOML or with commas.

    Raises:
        UsageError: no such section or key, or not a value of that type.
    """
    hint: Any = Config
    walked: list[str] = []
    for name in dotted.split("."):
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            config.demand_known([name], hint, ".".join(walked))
            hint = typing.get_type_hints(hint)[name]
        else:  # below store.options anything goes
            return _toml(text, otherwise=text)
        walked.append(name)
    if dataclasses.is_dataclass(hint):
        raise UsageError(f"{dotted} is a section", op="read arguments", hint=f"Write --set {dotted}.KEY=VALUE")
    if hint is str or typing.get_origin(hint) is Literal:
        return text
    if typing.get_origin(hint) is tuple and not text.lstrip().startswith("["):
        item = typing.get_args(hint)[0]
        parts = [part.strip() for part in text.split(",") if part.strip()]
        return parts if item is str else [_toml(part, otherwise=part) for part in parts]
    return _toml(text, otherwise=text)


def _named(text: str) -> str:
    """A flag's text. An empty one is a shell variable that was never set: without a key, nothing would be checked."""
    if not text:
        raise argparse.ArgumentTypeError("is empty")
    return text


def _split(text: str, flag: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        raise UsageError(f"{flag} {text!r} is not KEY=VALUE", op="read arguments")
    return key, value


def _toml(text: str, *, otherwise: Any) -> Any:
    try:
        found = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return otherwise
    return found["value"] if set(found) == {"value"} else otherwise
