"""Which rows of a batch belong to which adapter slot, and LoRA over those rows, in torch.

Shapes: T tokens, P = T x k routed (token, expert) pairs, H in, O out, E experts, R the slots' rank, S slots.
Pure torch, no vllm: the arithmetic is tested by itself.
"""

from typing import NamedTuple

import torch
from torch.nn.functional import grouped_mm


class SlotRows(NamedTuple):
    """The rows that use one slot. `rows` is None where all rows do, the usual case, which then needs no gather."""

    slot: int
    rows: torch.Tensor | None


def split_by_slot(slot_T: torch.Tensor) -> list[SlotRows]:
    """Group rows by slot. Rows with -1 (the base model) belong to no group.

    Args:
        slot_T: the slot of every row, int64, -1 for none.
    """
    if slot_T.numel() == 0:
        return []
    low, high = (int(v) for v in torch.aminmax(slot_T))
    if low == high:
        return [SlotRows(low, None)] if low >= 0 else []
    groups = ((s, (slot_T == s).nonzero().squeeze(1)) for s in range(max(low, 0), high + 1))
    return [SlotRows(s, rows) for s, rows in groups if rows.numel()]


def shrink(x_TH: torch.Tensor, a_RH: torch.Tensor, group: SlotRows) -> torch.Tensor:
    """x[rows] @ A^T; [rows, R]."""
    x_NH = x_TH if group.rows is None else x_TH[group.rows]
    return x_NH @ a_RH.to(x_NH.dtype).T


def expand_into(y_TO: torch.Tensor, h_NR: torch.Tensor, b_OR: torch.Tensor, group: SlotRows) -> None:
    """y[rows] += h @ B^T, in place, in y's dtype. `y_TO` may be a column slice of a wider output."""
    h_NR, b_OR = h_NR.to(y_TO.dtype), b_OR.to(y_TO.dtype)
    if group.rows is None:
        y_TO.addmm_(h_NR, b_OR.T)
    else:
        y_TO.index_add_(0, group.rows, h_NR @ b_OR.T)


class Routing(NamedTuple):
    """Pairs sorted by expert: row p of every sorted tensor is token `token_P[p]`, served by expert `expert_P[p]`."""

    order_P: torch.Tensor  # position of the sorted pair in the flat [T x k] routing
    token_P: torch.Tensor
    expert_P: torch.Tensor
    ends_E: torch.Tensor  # int32, end of each expert's rows


def route(expert_TK: torch.Tensor, n_experts: int) -> Routing:
    """Sort (token, expert) pairs by expert, once per layer and step. Experts below 0 (another rank's) are left out."""
    flat = expert_TK.reshape(-1)
    expert_P, order_P = flat.sort(stable=True)
    first = int((expert_P < 0).sum())
    expert_P, order_P = expert_P[first:], order_P[first:]
    ends_E = torch.bincount(expert_P, minlength=n_experts).cumsum(0).to(torch.int32)
    return Routing(order_P, order_P.div(expert_TK.shape[1], rounding_mode="floor"), expert_P, ends_E)


def expert_matmul(x_PH: torch.Tensor, w_EOH: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """x[p] @ W[expert of p]^T for rows sorted by expert; [P, O]."""
    if (w_EOH.stride(1) * w_EOH.element_size()) % 16 == 0:
        return grouped_mm(x_PH, w_EOH.transpose(1, 2), offs=ends_E)
    starts = [0, *ends_E.tolist()]  # grouped_mm wants rows of 16 bytes; a slot of rank 1 has 4
    parts = [x_PH[a:b] @ w.T for w, a, b in zip(w_EOH, starts, starts[1:], strict=False)]
    return torch.cat(parts)


def add_expert_lora(
    y_PO: torch.Tensor,
    x_PH: torch.Tensor,
    a_ERH: torch.Tensor,
    b_EOR: torch.Tensor,
    routing: Routing,
    rows: torch.Tensor | None,
) -> None:
    """y[p] += B[expert of p] @ (A[expert of p] @ x[p]) for the sorted pairs in `rows` (None: all), in place."""
    n_experts = routing.ends_E.numel()  # a factor shared by all experts is stored once
    a_ERH = a_ERH.to(y_PO.dtype).expand(n_experts, -1, -1)
    b_EOR = b_EOR.to(y_PO.dtype).expand(n_experts, -1, -1)
    if rows is None:
        y_PO += expert_matmul(expert_matmul(x_PH, a_ERH, routing.ends_E), b_EOR, routing.ends_E)
        return
    counts_E = torch.bincount(routing.expert_P[rows], minlength=n_experts)
    ends_E = counts_E.cumsum(0).to(torch.int32)
    y_PO.index_add_(0, rows, expert_matmul(expert_matmul(x_PH[rows], a_ERH, ends_E), b_EOR, ends_E))
