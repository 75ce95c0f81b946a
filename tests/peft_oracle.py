"""What stock PEFT makes of an adapter directory, as JSON on stdout. Runs on the packages of tests/test_peft_oracle.py.

    python tests/peft_oracle.py BASE_DIR TOKENS_JSON ADAPTER_DIR...

TOKENS_JSON is [[id, ...], ...], rows of one length. Per adapter directory the answer has `logp`, the log-probability of
every token given those before it ([B, T - 1], fp32), `missing` and `unexpected`, the keys that PEFT could not match to
the model's, `warnings`, what it said meanwhile, and `adapted`, the linear layers with an adapter (fused experts
are none).

Nothing of this project is imported here: the directory must do for a reader who has never heard of it.
"""

import json
import sys
import warnings
from typing import Any

# PyPI builds these three for CUDA, which breaks `import transformers` beside a CPU torch.
for _name in ("torchvision", "torchaudio", "torchcodec"):
    sys.modules.setdefault(_name, None)  # type: ignore[arg-type]

import peft  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from torch import Tensor  # noqa: E402


def read(base_dir: str, tokens_BT: Tensor, adapter_dir: str) -> dict[str, Any]:
    """Load a fresh base model in fp32 and the adapter on it, as a user would, and score the tokens."""
    base = transformers.AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(base, adapter_dir).eval()
        keys = model.load_adapter(adapter_dir, adapter_name="again")  # from_pretrained keeps this answer to itself
    model.set_adapter("default")
    with torch.no_grad():
        logp_BTV = model(tokens_BT).logits[:, :-1].log_softmax(-1)
    return {
        "logp": logp_BTV.gather(2, tokens_BT[:, 1:, None])[..., 0].tolist(),
        "missing": list(keys.missing_keys),
        "unexpected": list(keys.unexpected_keys),
        "warnings": [str(warning.message) for warning in said],
        "adapted": sum(isinstance(module, peft.tuners.lora.Linear) for module in model.modules()),
    }


def main() -> None:
    base_dir, tokens, *adapter_dirs = sys.argv[1:]
    tokens_BT = torch.tensor(json.loads(tokens))
    answers = {adapter_dir: read(base_dir, tokens_BT, adapter_dir) for adapter_dir in adapter_dirs}
    print(json.dumps({"transformers": transformers.__version__, "peft": peft.__version__, "adapters": answers}))


if __name__ == "__main__":
    main()
