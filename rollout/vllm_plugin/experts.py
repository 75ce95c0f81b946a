"""vLLM mixture-of-experts kernel in torch, with a LoRA per token and expert: what the CPU backend lacks.

Contract: vLLM's modular experts with its LoRAExpertsMixin. Pairs of (token, expert) are sorted by expert once, so that
every product, base or LoRA, is one grouped matrix product over all experts. Works in the weights' dtype; the sum over a
token's experts runs in fp32. No quantisation, one device.
"""

from typing import Any

import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from vllm.model_executor.layers.fused_moe.experts.lora_experts_mixin import LoRAExpertsMixin
from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceNoOP

from rollout.vllm_plugin.slots import Routing, SlotRows, add_expert_lora, expert_matmul, route, split_by_slot


class TorchLoraExperts(LoRAExpertsMixin, mk.FusedMoEExpertsModular):  # type: ignore[misc]
    """Experts with LoRA on a CPU. vLLM sets `_lora_context` once the adapters' slots exist; None means no LoRA."""

    @staticmethod
    def activation_format() -> Any:
        """Tokens arrive as one [tokens, hidden] batch."""
        return mk.FusedMoEActivationFormat.Standard

    @staticmethod
    def _supports_current_device() -> bool:
        return True

    @staticmethod
    def _supports_no_act_and_mul() -> bool:
        return True

    @staticmethod
    def _supports_quant_scheme(weight_key: Any, activation_key: Any) -> bool:
        return weight_key is None and activation_key is None

    @staticmethod
    def _supports_activation(activation: Any) -> bool:  # noqa: ARG004
        return True

    @staticmethod
    def _supports_parallel_config(moe_parallel_config: Any) -> bool:  # noqa: ARG004
        return True

    def finalize_weight_and_reduce_impl(self) -> Any:
        """`apply` has weighted and summed already."""
        return TopKWeightAndReduceNoOP()

    def workspace_shapes(self, M: int, N: int, K: int, *args: Any, **kwargs: Any) -> tuple[tuple[int, ...], ...]:  # noqa: ARG002
        """No workspaces; the output is [tokens, hidden]."""
        return (0,), (0,), (M, K)

    def apply(
        self,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        activation: Any,
        global_num_experts: int,  # noqa: ARG002
        expert_map: torch.Tensor | None,
        a1q_scale: torch.Tensor | None,  # noqa: ARG002
        a2_scale: torch.Tensor | None,  # noqa: ARG002
        workspace13: torch.Tensor,  # noqa: ARG002
        workspace2: torch.Tensor,  # noqa: ARG002
        expert_tokens_meta: Any,  # noqa: ARG002
        apply_router_weight_on_input: bool,
    ) -> None:
        """Write the experts' weighted sum to `output` [tokens, hidden].

        Args:
            hidden_states: [tokens, hidden].
            w1: [experts, 2 x intermediate, hidden], gate above up (or [experts, intermediate, hidden] without a gate).
            w2: [experts, hidden, intermediate].
            topk_weights: [tokens, k].
            topk_ids: [tokens, k], global experts; `expert_map` makes them local, -1 for another rank's.
        """
        local_ids = topk_ids.long() if expert_map is None else expert_map[topk_ids.long()].long()
        routing = route(local_ids, w1.shape[0])
        groups = self._pair_groups(routing, hidden_states.shape[0])
        x_PH = hidden_states[routing.token_P]

        gate_up_PI = expert_matmul(x_PH, w1, routing.ends_E)
        if self.w1_bias is not None:
            gate_up_PI += self.w1_bias[routing.expert_P]
        self._add_w13_lora(gate_up_PI, x_PH, routing, groups)

        h_PI = gate_up_PI.new_empty(gate_up_PI.shape[0], self.adjust_N_for_activation(gate_up_PI.shape[1], activation))
        self.activation(activation, h_PI, gate_up_PI)

        y_PH = expert_matmul(h_PI, w2, routing.ends_E)
        if self.w2_bias is not None:
            y_PH += self.w2_bias[routing.expert_P]
        self._add_w2_lora(y_PH, h_PI, routing, groups)

        y_PH = y_PH.float()
        if not apply_router_weight_on_input:
            y_PH *= topk_weights.reshape(-1)[routing.order_P].float()[:, None]
        total = output.float() if output.dtype != torch.float32 else output
        total.zero_().index_add_(0, routing.token_P, y_PH)
        if total is not output:
            output.copy_(total)

    def _pair_groups(self, routing: Routing, n_tokens: int) -> list[SlotRows]:
        """The sorted pairs of every slot whose adapter has expert weights."""
        context = self._lora_context
        if context is None:
            return []
        mapping_T = context.local_token_lora_mapping
        groups = context.punica_wrapper.groups_for(n_tokens) if mapping_T is None else split_by_slot(mapping_T.long())
        if any(group.rows is not None for group in groups):
            slot_T = torch.full((n_tokens,), -1)
            for group in groups:
                slot_T[group.rows] = group.slot
            groups = split_by_slot(slot_T[routing.token_P])
        enabled = context.adapter_enabled.tolist()
        return [group for group in groups if enabled[group.slot]]

    def _add_w13_lora(
        self, gate_up_PI: torch.Tensor, x_PH: torch.Tensor, routing: Routing, groups: list[SlotRows]
    ) -> None:
        context = self._lora_context
        for group in groups:
            parts_PI = gate_up_PI.chunk(context.w13_num_slices, dim=1)
            for y_PI, a, b in zip(parts_PI, context.w13_lora_a_stacked, context.w13_lora_b_stacked, strict=True):
                add_expert_lora(y_PI, x_PH, a[group.slot], b[group.slot], routing, group.rows)

    def _add_w2_lora(self, y_PH: torch.Tensor, h_PI: torch.Tensor, routing: Routing, groups: list[SlotRows]) -> None:
        context = self._lora_context
        for group in groups:
            (a,), (b,) = context.w2_lora_a_stacked, context.w2_lora_b_stacked
            add_expert_lora(y_PH, h_PI, a[group.slot], b[group.slot], routing, group.rows)
