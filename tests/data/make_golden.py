"""How tests/data/layout-1 was made, once: three ranks, slices, aliases, a parent, a canary; then a lone rank's file.

Not run again.

A file of an older layout proves that today's readers still read it, so it is never made anew: a new layout gets a new
directory beside it. Run from the repository root with a directory that does not exist yet:

    python tests/data/make_golden.py DIR
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import synthetic

from publisher.commit import Heading, Rank, commit, put_shard
from publisher.convert import convert
from publisher.epochs import Claim
from publisher.shard import encode, wire_scale
from shared import strict_json
from shared.base_model import identify
from shared.layout import Layout
from shared.manifest import Canary, LoraShape, Parent
from shared.peft_names import expected_tensors
from shared.stores import open_store
from shared.versions import Version

WORLD = 3
CHANGES: dict[str, Any] = {"num_hidden_layers": 1, "num_experts": 3}
BASE = {**synthetic.BASE, **CHANGES}


def main(directory: Path) -> None:
    """Write a store with one adapter of three versions, and the base model that they are for."""
    base = synthetic.write_base(directory / "base", **CHANGES)
    store, layout, claim = open_store(str(directory / "store")), Layout(synthetic.ADAPTER), Claim(1, "0123456789ab")
    store.put(layout.layout, strict_json.dumps({"layout": 1, "uuid": "0" * 32}))
    store.put(layout.epoch(1), strict_json.dumps({"epoch": 1, "nonce": claim.nonce, "claimed_at": 1_795_000_000.0}))
    lora = synthetic.LORA
    expected = expected_tensors(BASE, lora.targets, lora.rank)
    order = {name: position for position, name in enumerate(expected)}
    parent: Parent | None = None
    for number, world in enumerate((WORLD, WORLD, 1)):
        heading = Heading(
            adapter=synthetic.ADAPTER,
            version=Version(1, number),
            parent=parent,
            base=identify(base),
            base_name="base",
            lora=LoraShape(lora.rank, lora.alpha, wire_scale(lora.rank, lora.alpha)[1], lora.targets),
            parallel={"tp": world, "pp": 1, "ep": world, "etp": 1, "dp": 1},
            encoding=lora.encoding,
            training={"step": number, "loss": 0.25, "submitted_at": 1_795_000_001.5 + number},
            canary=Canary(sequences=((1, 2, 3),), logprobs=((-0.5, -1.25),), tolerance=0.01) if world > 1 else None,
        )
        whole = synthetic.factors(number, BASE)
        for rank in range(world):
            slices = convert(BASE, synthetic.rank_factors(whole, rank, world))
            options: dict[str, Any] = {"encoding": lora.encoding, "aliases": world > 1}
            shard = encode(slices, order, rank=lora.rank, alpha=lora.alpha, **options)
            put_shard(store, layout, claim, heading, Rank(rank, world), shard)
        manifest = commit(store, layout, claim, heading, world, expected)
        assert manifest is not None
        parent = Parent(manifest.version, manifest.digest)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
