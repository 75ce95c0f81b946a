"""adapter_config.json of a version: what makes a directory of our tensors a plain PEFT adapter."""

from shared import strict_json
from shared.manifest import LoraShape
from shared.peft_names import peft_target_modules


def peft_config(lora: LoraShape, base_name: str) -> bytes:
    """The file's bytes, the same wherever they are made. lora_alpha is the wire's: B is already scaled by the rest."""
    return strict_json.dumps(
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_name,
            "r": lora.rank,
            "lora_alpha": lora.wire_alpha,
            "target_modules": peft_target_modules(lora.targets),
            "lora_dropout": 0.0,
            "bias": "none",
            "use_rslora": False,
            "use_dora": False,
            "fan_in_fan_out": False,
            "inference_mode": True,
        }
    )
