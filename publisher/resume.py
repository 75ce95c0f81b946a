"""Where may a trainer go on? Its checkpoints by their names, and which of them lie in a rollback's past.

What is in a checkpoint, and when it is whole, is `trainer.checkpoint`'s to say. Here they are listed, by who has no
torch: a rollback that leaves the next trainer nothing to go on from shall say so before it fences the one that runs.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from publisher.lineage import Lineage, Past
from publisher.rollback import RolledBack
from shared import strict_json
from shared.catalog import Catalog
from shared.errors import Corrupt, KeyMissing
from shared.layout import Layout
from shared.store import MAX_EXCLUSIVE_BYTES, Store

MAX_STATE_BYTES = MAX_EXCLUSIVE_BYTES  # of state.json: no store need take more

Place = tuple[int, int]  # a checkpoint's (epoch, step)

_FOLDER = re.compile(r"[0-9]{8}-[0-9]{12}")


@dataclass(frozen=True)
class Outlook:
    """What a rollback would leave the next trainer.

    Attributes:
        kept: the checkpoints that are there, oldest first.
        goes_on: the one that it would go on from; None if none of them is of that past.
    """

    kept: tuple[Place, ...]
    goes_on: Place | None


def outlook(catalog: Catalog, rolled_back: RolledBack) -> Outlook:
    """What the next trainer would find after a rollback, which need not have been made yet.

    Raises:
        StoreError: the store failed.
    """
    kept = places(catalog.store, catalog.layout)
    try:
        past = past_of(rolled_back)
    except Corrupt:
        return Outlook(tuple(kept), None)
    for place in reversed(kept):
        key = f"{catalog.layout.checkpoint(*place)}/state.json"
        try:
            sealed = strict_json.load_object(catalog.store.get(key), key=key, max_bytes=MAX_STATE_BYTES)
            publish_every = int(sealed["body"]["state"]["publish_every"])
        except (Corrupt, KeyMissing, LookupError, TypeError, ValueError):  # the trainer will pass it over as well
            continue
        if past.led_there(*place, publish_every):
            return Outlook(tuple(kept), place)
    return Outlook(tuple(kept), None)


def past_of(rollback: RolledBack) -> Past:
    """What a rollback went back to.

    Raises:
        Corrupt: it does not say so.
    """
    training = rollback.training
    try:
        # Who publishes without saying where it comes from vouches for no life but the version's own.
        lineage = Lineage.from_json(training["lineage"]) if "lineage" in training else Lineage(rollback.origin.epoch)
        return Past(rollback.version, int(training["step"]), lineage)
    except (LookupError, TypeError, ValueError) as error:
        problem = f"its marker does not say what it went back to: {error!r}"
        raise Corrupt(problem, op="resume", version=str(rollback.version)) from error


def folders(store: Store, layout: Layout) -> dict[str, list[str]]:
    """The keys in every checkpoint's folder, whole or not, by folder, oldest first."""
    found: dict[str, list[str]] = {}
    for entry in store.list(layout.checkpoints):
        folder, _, _ = entry.key.rpartition("/")
        if _FOLDER.fullmatch(folder.rpartition("/")[2]):
            found.setdefault(folder, []).append(entry.key)
    return dict(sorted(found.items()))


def committed(found: Mapping[str, list[str]]) -> list[str]:
    """The folders that hold a whole checkpoint."""
    return [folder for folder, keys in found.items() if f"{folder}/state.json" in keys]


def place_of(folder: str) -> Place:
    """The (epoch, step) that a folder is called after."""
    epoch, _, step = folder.rpartition("/")[2].partition("-")
    return int(epoch), int(step)


def places(store: Store, layout: Layout) -> list[Place]:
    """The (epoch, step) of every whole checkpoint, oldest first."""
    return [place_of(folder) for folder in committed(folders(store, layout))]
