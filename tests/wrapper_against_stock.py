"""Program: our LoRA wrapper against vLLM's own on batches without base rows, where stock is right; and on base rows.

Run by test_vllm_plugin.py in a process of its own, because importing vLLM changes the process it is imported in.
"""

from rollout.vllm_launch import block_cuda_builds

block_cuda_builds()

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from vllm.lora.layers import LoRAMapping  # noqa: E402
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU  # noqa: E402

from rollout.vllm_plugin.punica import SlotwiseWrapper  # noqa: E402

SLOTS, RANK, HIDDEN, SLICES = 3, 8, 32, (48, 16)
IDS = [11, 12, 13]  # adapter id by slot
BATCHES = {"one adapter": [12] * 6, "three adapters": [13, 11, 11, 12, 13, 11], "one row": [11]}
MIXED = [0, 12, 0, 11, 12, 0]


def wrapper(kind: type[PunicaWrapperCPU], adapters: list[int]) -> PunicaWrapperCPU:
    ready = kind(64, 64, "cpu")
    ready.update_metadata(LoRAMapping(tuple(adapters), tuple(adapters), is_prefill=True), IDS, SLOTS, 128)
    return ready


def outputs(kind: type[PunicaWrapperCPU], adapters: list[int], dtype: torch.dtype) -> dict[str, Tensor]:
    """Every method's result on the same made-up numbers."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    rows, lora = len(adapters), wrapper(kind, adapters)
    x, y = draw(rows, HIDDEN), draw(rows, sum(SLICES))
    a = tuple(draw(SLOTS, 1, RANK, HIDDEN) for _ in SLICES)
    b = tuple(draw(SLOTS, 1, size, RANK) for size in SLICES)
    shrunk = torch.zeros(len(SLICES), rows, RANK)
    lora.add_shrink(shrunk, x, a, 0.5)
    expanded, linear, embedded, logits = y.clone(), y.clone(), y[:, : SLICES[0]].clone(), y[:, : SLICES[0]].clone()
    lora.add_expand(expanded, shrunk, b, SLICES)
    lora.add_lora_linear(linear, x, a, b, 2.0, SLICES)
    lora.add_lora_embedding(embedded, shrunk[0], b[0])
    lora.add_lora_logits(logits, x, a[0], b[0], 1.0)
    return {"shrink": shrunk, "expand": expanded, "linear": linear, "embedding": embedded, "logits": logits}


def main() -> None:
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 0.02)):
        for name, adapters in BATCHES.items():
            stock = outputs(PunicaWrapperCPU, adapters, dtype)
            for method, value in outputs(SlotwiseWrapper, adapters, dtype).items():
                difference = (value.float() - stock[method].float()).abs().max()
                assert difference < tolerance * stock[method].abs().max(), (method, name, dtype, difference)
    base = torch.tensor([adapter == 0 for adapter in MIXED])
    alone = outputs(SlotwiseWrapper, [0] * len(MIXED), torch.float32)
    for method, value in outputs(SlotwiseWrapper, MIXED, torch.float32).items():
        rows = 1 if method == "shrink" else 0
        assert torch.equal(value.movedim(rows, 0)[base], alone[method].movedim(rows, 0)[base]), method
        assert not torch.equal(value.movedim(rows, 0)[~base], alone[method].movedim(rows, 0)[~base]), method


if __name__ == "__main__":
    main()
