"""A version's way from the store into an engine, outside the agent: fetch, check, load, prove.

The agent adds to it watching, counting, receipts and routing; replay uses it as it is.
"""

import contextlib
import shutil
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rollout.engine import Engine
from rollout.proof import Proof, Rows, canary_sequences, prove
from shared.base_model import BaseIdentity, identify, read_base_config
from shared.catalog import Catalog
from shared.config import Config
from shared.errors import Corrupt, EngineError, StoreError
from shared.fetch import fetch
from shared.leases import Lease
from shared.manifest import Manifest
from shared.peft_names import expected_tensors
from shared.versions import Version, served_name


@dataclass(frozen=True)
class Target:
    """What an engine serves as its base, and what it was started for."""

    base_name: str
    base_config: Mapping[str, Any]
    base: BaseIdentity
    max_lora_rank: int
    cache: Path  # this node's alone: what it does not use is deleted


def cache_dir(config: Config) -> Path:
    """The node's own folder: adapters that it serves, its engine's log."""
    return Path(config.rollout.cache_dir or Path.home() / ".cache" / "lorasync") / config.rollout.node


def engine_target(config: Config, base_name: str) -> Target:
    """What the engine serves, by the node's own copy of the base model.

    Raises:
        UsageError: no base model there.
    """
    return Target(
        base_name=base_name,
        base_config=read_base_config(config.model.path),
        base=identify(config.model.path),
        max_lora_rank=config.rollout.max_lora_rank,
        cache=cache_dir(config),
    )


@dataclass(frozen=True)
class Delivered:
    """A version that the engine serves, proven. Times are seconds since the delivery began."""

    manifest: Manifest
    name: str
    directory: Path
    proof: Proof
    fetched_s: float
    loaded_s: float
    proven_s: float


class Delivery:
    """Delivers versions of one adapter to one engine. Used by one thread.

    A version is leased before its manifest is read, so that nobody collects it on the way.

    Args:
        name_prefix: set before served names by who shares an engine with an agent: names of another adapter's form,
            which the agent neither adopts nor unloads.
        reader: under which name it holds leases.
    """

    def __init__(
        self,
        catalog: Catalog,
        engine: Engine,
        target: Target,
        clock: Callable[[], float] = time.monotonic,
        *,
        name_prefix: str = "",
        reader: str = "delivery",
    ) -> None:
        self._catalog, self._engine, self._target, self._clock = catalog, engine, target, clock
        self._served_adapter = name_prefix + catalog.layout.adapter
        self._folder = target.cache / catalog.layout.adapter
        self._lease = Lease(catalog.store, catalog.layout, reader, clock=clock)
        self._base_scores: dict[tuple[tuple[int, ...], ...], Rows] = {}

    def name(self, version: Version) -> str:
        """Under which the engine serves a version."""
        return served_name(self._served_adapter, version)

    def deliver(self, version: Version, beside: Collection[Version] = ()) -> Delivered:
        """Bring a version into the engine; one that fails its proof is unloaded again.

        Args:
            beside: versions that stay leased as well.

        Raises:
            KeyMissing: the version expired.
            StoreError: the store failed.
            Corrupt: not whole, not finite, for another base model, of too high a rank.
            EngineError: the engine failed, refused it, or serves something else (NotProven).
        """
        began = self._clock()
        self._lease.take({version, *beside})
        with self._lease.kept():
            manifest = self._catalog.manifest(version)
            self._check(manifest)
            expected = expected_tensors(self._target.base_config, manifest.lora.targets, manifest.lora.rank)
            directory = self._folder / str(version)
            fetch(self._catalog.store, manifest, expected, directory, base_name=manifest.base.model_type)
        fetched = self._clock()
        name, before = self.name(version), self._base_before(manifest)
        if name not in self._engine.models():
            self._engine.load(name, str(directory))
        loaded = self._clock()
        try:
            proof = prove(self._engine, name, self._target.base_name, manifest, directory, before)
        except EngineError:
            self._engine.unload(name)
            raise
        proven = self._clock()
        return Delivered(manifest, name, directory, proof, fetched - began, loaded - began, proven - began)

    def hold(self, versions: Collection[Version]) -> None:
        """Keep these versions leased, and only these from the next renewal on; writes nothing before that is due.

        Raises:
            StoreError: the store failed; call again.
        """
        if versions:
            self._lease.take(versions)
        else:
            self._lease.renew()

    def holding(self, versions: Collection[Version]) -> contextlib.AbstractContextManager[None]:
        """Keep these versions leased while the block runs, for who delivers them one after another.

        Raises:
            StoreError: the store failed; nothing is held.
        """
        return self._lease.holding(versions)

    def release(self) -> None:
        """Lease nothing any more."""
        with contextlib.suppress(StoreError):  # it lapses
            self._lease.release()

    def sweep(self, keep: Collection[Version], fetching: Version | None = None) -> None:
        """Delete cached versions but these, and what a killed fetch left behind.

        Args:
            fetching: the version at hand, whose fetch goes on with what it has when it is tried again.
        """
        kept = {str(version) for version in keep}
        for path in self._folder.iterdir() if self._folder.is_dir() else ():
            at_hand = fetching is not None and path.name.startswith(f".{fetching}.")
            if path.name not in kept and not at_hand:
                shutil.rmtree(path, ignore_errors=True)

    def forget(self) -> None:
        """The engine was restarted: what it said of its base before counts no more."""
        self._base_scores.clear()

    def _check(self, manifest: Manifest) -> None:
        """What can be refused before a byte is fetched."""
        self._target.base.demand(manifest.base, version=str(manifest.version))
        if manifest.lora.rank > self._target.max_lora_rank:
            raise Corrupt(
                f"rank {manifest.lora.rank} is above the engine's max_lora_rank {self._target.max_lora_rank}",
                op="check adapter",
                version=str(manifest.version),
                hint=f"Start the engine with --max-lora-rank {manifest.lora.rank} (rollout.max_lora_rank)",
            )

    def _base_before(self, manifest: Manifest) -> Rows:
        """The base's scores of the canary, taken once per engine life and canary."""
        sequences = canary_sequences(manifest.canary)
        key = tuple(tuple(sequence) for sequence in sequences)
        if key not in self._base_scores:
            self._base_scores[key] = self._engine.score(self._target.base_name, sequences)
        return self._base_scores[key]
