"""Run by test_hostile_bytes.py in a process of its own: huge inputs, and what they cost. Prints a JSON object.

python tests/hostile_sizes.py     {"refused": [...], "accepted": [...], "peak_mib": ..., "seconds": ...}
"""

import json
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from shared.adapter_files import MAX_HEADER_BYTES, MAX_TENSORS, TensorSpec, header_bytes, parse_header
from shared.coverage import demand_complete
from shared.errors import Corrupt
from shared.manifest import MAX_MANIFEST_BYTES, Manifest
from shared.tensor_table import Slice, Tensor

GOLDEN = Path(__file__).parent / "data/layout-1/store/policy/manifests/00000001-000000000001.json"
ADDRESS_SPACE_BYTES = 4 << 30


def head(text: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE_BYTES, ADDRESS_SPACE_BYTES))
    golden = Manifest.parse(GOLDEN.read_bytes(), key="golden")
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    refused: list[str] = []
    accepted: list[str] = []

    def tried(name: str, call: Callable[[], Any]) -> None:
        try:
            call()
            accepted.append(name)
        except Corrupt:
            refused.append(name)

    def header(content: bytes) -> None:
        parse_header(content, len(content), key="k")

    def tensors(count: int) -> bytes:
        names = (f"base_model.model.model.layers.{n}.mlp.experts.{n}.gate_proj.lora_A.weight" for n in range(count))
        return header_bytes([TensorSpec(name, "BF16", (0, 64)) for name in names])

    def manifest(count: int) -> bytes:
        shape = (8, 64)
        names = map("layers.{}".format, range(count))
        whole = {name: Tensor("BF16", shape, (Slice(0, name, (0, 0), shape),)) for name in names}
        return replace(golden, tensors=whole, aliases={}).to_bytes()

    def torn(count: int) -> Manifest:
        """One tensor in so many slices, all of them the same."""
        slices = tuple(Slice(0, f"t@{n}", (0, 0), (1, 1)) for n in range(count))
        return replace(golden, tensors={"t": Tensor("BF16", (count, 1), slices)}, aliases={})

    tried("2**63 declared", lambda: header((2**63).to_bytes(8, "little") + b"{}"))
    tried("100 MB of spaces", lambda: header(head(b"{}" + b" " * (MAX_HEADER_BYTES - 2))))
    tried("100 MB of spaces and one", lambda: header(head(b"{}" + b" " * (MAX_HEADER_BYTES - 1))))
    tried("100 MB of empty lists", lambda: header(head(b'{"a":[' + b"[]," * (33_000_000) + b"[]]}")))
    tried("100 MB of empty objects", lambda: Manifest.parse(b'{"a":[' + b"{}," * 33_000_000 + b"{}]}", key="k"))
    tried("100 MB of digits", lambda: Manifest.parse(b'{"a":' + b"9" * (MAX_MANIFEST_BYTES - 6) + b"}", key="k"))
    tried("50 MB of one string", lambda: Manifest.parse(b'{"layout":"' + b"x" * 50_000_000 + b'"}', key="k"))
    tried("a list 50 MB deep", lambda: Manifest.parse(b'{"a":' + b"[" * 5_900_000 + b"]" * 5_900_000 + b"}", key="k"))
    tried("more than a manifest may have", lambda: Manifest.parse(b" " * (MAX_MANIFEST_BYTES + 1), key="k"))
    tried("200,000 tensors", lambda: header(tensors(MAX_TENSORS)))
    tried("200,001 tensors", lambda: header(tensors(MAX_TENSORS + 1)))
    tried("a manifest of 200,000 tensors", lambda: Manifest.parse(manifest(MAX_TENSORS), key="k"))
    tried("100,000 equal slices", lambda: demand_complete(torn(100_000), {"t": (100_000, 1)}))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    took = time.monotonic() - began
    json.dump({"refused": refused, "accepted": accepted, "peak_mib": peak >> 10, "seconds": took}, sys.stdout)


if __name__ == "__main__":
    main()
