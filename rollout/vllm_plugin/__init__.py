"""A vLLM general plugin: mixture-of-experts LoRA on the CPU backend, which stock vLLM starts with and dies of.

Two repairs, both only where vLLM runs on a CPU:
- experts: with LoRA on, vLLM picks Triton experts even on a CPU. The server starts, /health is green, and the first
  request kills the engine. `experts` brings experts in torch, with a LoRA per token and expert.
- linear layers: vLLM's CPU ops let the index "no adapter" (-1) wrap to the last slot, so base-model tokens batched with
  adapter tokens get that slot's delta, up to 4 nats. `punica` brings a wrapper that does not (and is faster).

vLLM calls `register` in every process it starts, more than once. Importing this package costs nothing: vllm and torch
are imported only inside `register`, on a CPU.
"""

import logging

SUPPORTED_VERSIONS = ((0, 26), (0, 32))  # 0.32 runs in our tests; 0.26 is supported by reading its sources

_log = logging.getLogger("lorasync.vllm_plugin")


def register() -> None:
    """Repair vLLM in this process if it runs on a CPU and its version is known; otherwise leave it alone."""
    from vllm import __version__ as version
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    if not is_supported(version):
        known = ", ".join(".".join(map(str, v)) for v in SUPPORTED_VERSIONS)
        _log.warning(
            "lorasync's CPU repair of mixture-of-experts LoRA knows vLLM %s and met %s: nothing was changed. "
            "LoRA requests on a MoE model will kill this engine.",
            known,
            version,
        )
        return
    _repair()


def is_supported(version: str) -> bool:
    """Whether the plugin was written for this vLLM release family ("0.32.1" and "0.32.0+cpu" belong to 0.32)."""
    parts = version.split(".")
    return (
        len(parts) > 1 and all(p.isdigit() for p in parts[:2]) and (int(parts[0]), int(parts[1])) in SUPPORTED_VERSIONS
    )


def _repair() -> None:
    """Swap in our experts and our linear-layer wrapper. Doing it again changes nothing."""
    import vllm.model_executor.layers.fused_moe.oracle.unquantized as oracle
    import vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method as method
    from vllm.platforms import current_platform

    stock = oracle.select_unquantized_moe_backend
    if getattr(stock, "is_lorasync", False):
        return

    def select_unquantized_moe_backend(moe_config):  # type: ignore[no-untyped-def]
        if not moe_config.is_lora_enabled:
            return stock(moe_config)
        from rollout.vllm_plugin.experts import TorchLoraExperts

        # TRITON names the weight layout (plain [experts, out, in]), which both vLLM families leave untouched on a CPU.
        return oracle.UnquantizedMoeBackend.TRITON, TorchLoraExperts

    select_unquantized_moe_backend.is_lorasync = True  # type: ignore[attr-defined]
    oracle.select_unquantized_moe_backend = select_unquantized_moe_backend
    method.select_unquantized_moe_backend = select_unquantized_moe_backend
    # vLLM resolves the wrapper by name, late; the class itself is imported only when LoRA is on.
    type(current_platform).get_punica_wrapper = classmethod(lambda _: "rollout.vllm_plugin.punica.SlotwiseWrapper")
