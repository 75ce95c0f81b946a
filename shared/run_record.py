"""What a run was made of, beside its versions on the store, so that they can be replayed from the URL alone.

A node puts `{adapter}/run.json` at its first start (put-if-absent: the first node's word stands), with the sections of
the configuration that replay needs:

    {"lora": {...}, "model": {"path": ..., ...}, "rollout": {"heldout_limit": 512, "seed": 0, ...}, "task": {...}}

Promises: no credentials, neither [store] nor engine flags nor what stands before the @ of a URL; paths are absolute.
Does not: vouch that the paths exist elsewhere (whoever replays on another machine names its own).
"""

import dataclasses
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from shared import strict_json
from shared.catalog import MAX_HINT_BYTES, Catalog
from shared.config import Config
from shared.errors import KeyMissing

RECORDED = {
    "model": ("path", "dtype"),
    "task": ("train_prompts", "heldout_prompts", "reward", "max_new_tokens"),
    "lora": ("rank", "alpha", "targets", "encoding"),
    "rollout": ("seed", "heldout_limit", "max_lora_rank", "max_model_len", "max_num_seqs", "threads"),
}
PLACES = {("model", "path"), ("task", "train_prompts"), ("task", "heldout_prompts")}


def record_run(catalog: Catalog, config: Config) -> None:
    """Put the record if there is none.

    Raises:
        StoreError: the store failed.
    """
    sections = dataclasses.asdict(config)
    record = {
        section: {
            name: _place(sections[section][name]) if (section, name) in PLACES else sections[section][name]
            for name in names
        }
        for section, names in RECORDED.items()
    }
    catalog.store.put_if_absent(catalog.layout.run, strict_json.dumps(record))


def recorded_run(catalog: Catalog) -> dict[str, dict[str, Any]]:
    """The recorded sections of the configuration; empty if nothing was recorded. Keys of later releases are left out.

    Raises:
        StoreError: the store failed.
        Corrupt: not such a record.
    """
    key = catalog.layout.run
    try:
        body = strict_json.load_object(catalog.store.get(key), key=key, max_bytes=MAX_HINT_BYTES)
    except KeyMissing:
        return {}
    found = {section: body.get(section) for section in RECORDED}
    return {
        section: {name: value for name, value in values.items() if name in RECORDED[section]}
        for section, values in found.items()
        if isinstance(values, dict)
    }


def _place(place: str) -> str:
    """A path made absolute, or a URL without user and password."""
    if not place:
        return place
    if "://" not in place:
        return str(Path(place).absolute())
    parts = urlsplit(place)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
