"""vLLM's CPU wrapper for LoRA on linear layers, by slot: each active slot's rows are multiplied at once.

Stock gathers one copy of A and B per token and lets -1 ("no adapter") wrap to the last slot. Here rows without an
adapter are never touched, and the usual batch, one adapter for all rows, costs two matrix products a projection.
"""

from typing import Any

import torch
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from rollout.vllm_plugin.slots import SlotRows, expand_into, shrink, split_by_slot

Stacked = tuple[torch.Tensor, ...]


class SlotwiseWrapper(PunicaWrapperCPU):  # type: ignore[misc]
    """Legend: A is [slots, 1, rank, in], B is [slots, 1, out, rank], as vLLM allocates them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._token_groups: list[SlotRows] = []
        self._sampler_groups: list[SlotRows] = []

    def update_metadata(self, *args: Any, **kwargs: Any) -> None:
        """Called once per step, before the layers: group the step's rows."""
        super().update_metadata(*args, **kwargs)
        self._token_groups = split_by_slot(self.token_lora_indices)
        self._sampler_groups = split_by_slot(self.sampler_indices)

    def groups_for(self, n_rows: int) -> list[SlotRows]:
        """The slots of a batch of `n_rows` tokens. Rows beyond the step's tokens are padding and have no adapter."""
        slot_T = self.token_lora_indices
        if n_rows == slot_T.shape[0]:
            return self._token_groups
        padding = slot_T.new_full((max(n_rows - slot_T.shape[0], 0),), -1)
        return split_by_slot(torch.cat([slot_T[:n_rows], padding]))

    def add_shrink(
        self,
        y: Stacked | torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: Stacked,
        scale: float,
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """y[j] = scale * x @ A_j^T by the slot of every token; rows without an adapter become zero."""
        x = x.view(-1, x.shape[-1])
        for out, a in zip(y, lora_a_stacked, strict=True):
            h = out.view(-1, out.shape[-1]).zero_()
            for group in self.groups_for(len(x)):
                rows = slice(None) if group.rows is None else group.rows
                h[rows] = scale * shrink(x, _matrix(a, group.slot), group).to(h.dtype)

    def add_expand(
        self,
        y: torch.Tensor,
        x: Stacked | torch.Tensor,
        lora_b_stacked: Stacked,
        output_slices: tuple[int, ...],
        offset_start: int = 0,
        add_inputs: bool = True,
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """y[:, slice j] += x[j] @ B_j^T by the slot of every token; rows without an adapter stay as they are."""
        y, start = y.view(-1, y.shape[-1]), offset_start
        for h, b, size in zip(x, lora_b_stacked, output_slices, strict=True):
            self._expand(y[:, start : start + size], h.view(-1, h.shape[-1]), b, add_inputs)
            start += size

    def add_lora_embedding(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        add_inputs: bool = True,
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """y += x @ B^T by the slot of every token; `x` is already the embedding's A row."""
        self._expand(y, x, lora_b_stacked, add_inputs)

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: Stacked,
        lora_b_stacked: Stacked,
        scale: float,
        output_slices: tuple[int, ...],
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """y[:, slice j] += scale * x @ A_j^T @ B_j^T by the slot of every token, in place."""
        y, x = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
        for group in self.groups_for(len(x)):
            start = 0
            for a, b, size in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
                _add(y[:, start : start + size], x, a, b, scale, group)
                start += size

    def add_lora_logits(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        scale: float,
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """y += scale * x @ A^T @ B^T by the slot of every sampled row, in place.

        Prompt log-probabilities come through here as well, one request's prompt rows at a time, and vLLM does not say
        whose. They get no lm_head delta: exact for every adapter that leaves lm_head alone. (Stock applies the deltas
        of whatever rows are being sampled, or kills the engine when there are fewer rows than those.)
        """
        y, x = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
        if len(x) != len(self.sampler_indices):
            return
        for group in self._sampler_groups:
            _add(y, x, lora_a_stacked, lora_b_stacked, scale, group)

    def _expand(self, y: torch.Tensor, h: torch.Tensor, b: torch.Tensor, add_inputs: bool) -> None:
        if not add_inputs:
            y.zero_()
        for group in self.groups_for(len(y)):
            rows = slice(None) if group.rows is None else group.rows
            expand_into(y[:, : b.shape[-2]], h[rows], _matrix(b, group.slot), group)


def _add(y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float, group: SlotRows) -> None:
    """y[rows] += scale * x[rows] @ A^T @ B^T. B may be wider than y where vLLM pads one of them."""
    h = shrink(x, _matrix(a, group.slot), group)
    b = _matrix(b, group.slot)
    width = min(y.shape[1], b.shape[0])
    expand_into(y[:, :width], h if scale == 1.0 else h * scale, b[:width], group)


def _matrix(stacked: torch.Tensor, slot: int) -> torch.Tensor:
    """One slot's [out, in] of [slots, 1, out, in] or [slots, out, in]."""
    matrix = stacked[slot]
    return matrix[0] if matrix.dim() == 3 else matrix
