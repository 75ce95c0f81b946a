"""The policy in training: base model, LoRA, optimizer; one optimizer step at a time. Knows nothing of any store.

Promises: the base model's bytes at the end are those at the start, and `base_unchanged` proves it; the canary's
log-probabilities are those of exactly the values on the wire, not of the fp32 master; `restore(capture())` goes on to
the same bits.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from publisher.convert import AdapterSlice, convert
from shared.base_model import read_base_config
from shared.config import Config, TrainConfig
from shared.errors import Corrupt
from shared.manifest import Canary
from trainer.batch import Batch
from trainer.grpo import Loss, Objective, decoupled_loss
from trainer.hf_weights import base_digest, load_base
from trainer.lora import LoraLinear, attach, named_lora, without_lora
from trainer.model import build_model, start_process_group, token_logp
from trainer.parallel_layout import ParallelLayout

# Nats. In fp32 Megatron, transformers and vLLM agree to 1e-5; in bf16 two experts whose router logits tie may swap.
CANARY_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.5}
CANARY_SEQUENCES, CANARY_TOKENS, CANARY_SEED = 4, 12, 20240607
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def learning_rate(train: TrainConfig, step: int) -> float:
    """The rate of a step, counted from 1: linear over the first `warmup_steps`, then constant or a cosine to zero.

    The cosine reaches zero one step after the last, so that the last still learns.
    """
    if step <= train.warmup_steps:
        return train.lr * step / train.warmup_steps
    if train.lr_schedule == "constant":
        return train.lr
    done = (step - train.warmup_steps) / (train.steps + 1 - train.warmup_steps)
    return train.lr * (1 + math.cos(math.pi * min(1.0, done))) / 2


@dataclass(frozen=True)
class Step:
    """What one optimizer step did."""

    loss: Loss
    grad_norm: float  # before clipping


class Policy:
    """One rank's share of the policy.

    policy = Policy(config)
    step = policy.update(batch, step=1)
    publisher.submit(1, policy.slices(), training={...}, canary=policy.canary())
    """

    def __init__(self, config: Config) -> None:
        self.layout = ParallelLayout()
        self._config, self._train = config, config.train
        self.hf_config = read_base_config(config.model.path)
        torch.set_num_threads(config.train.threads)
        start_process_group(self.layout)
        self.model: nn.Module = build_model(self.hf_config, self.layout, config.model.dtype)
        load_base(self.model, self.hf_config, config.model.path)
        self._base_digest = base_digest(self.model)
        lora = config.lora
        attach(self.model, lora.targets, lora.rank, lora.alpha, config.train.seed)
        self._named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(
            [p for _, p in self._named], lr=config.train.lr, betas=config.train.betas, weight_decay=0.0
        )
        self._objective = Objective(
            clip_low=config.train.clip_low,
            clip_high=config.train.clip_high,
            behaviour_cap=config.train.behaviour_cap,
            kl_coefficient=config.train.kl_coefficient,
        )
        self.device = self._named[0][1].device

    def update(self, batch: Batch, step: int) -> Step:
        """Take one optimizer step.

        There is one step per batch, so the proximal policy is the current one before the step and its scores are those
        of the same forward pass.

        Args:
            step: counted from 1; see `learning_rate`.

        Raises:
            Corrupt: the loss or the gradient is not finite; the parameters are as before.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(self._train, step)
        current_BS = self._score(batch.tokens_BT)
        reference_BS = None
        if self._objective.kl_coefficient:
            with torch.no_grad(), without_lora(self.model):
                reference_BS = self._score(batch.tokens_BT)
        loss = decoupled_loss(
            self._objective,
            current_BS,
            current_BS.detach(),
            batch.behaviour_BS,
            batch.adv_B,
            batch.mask_BS,
            reference_BS,
        )
        self._optimizer.zero_grad()
        loss.total.backward()  # type: ignore[no-untyped-call]
        norm = float(nn.utils.clip_grad_norm_([p for _, p in self._named], self._train.max_grad_norm))
        if not math.isfinite(norm):
            raise Corrupt(f"gradient norm is {norm}", op="train", key=f"step {step}", hint="Lower train.lr")
        self._optimizer.step()
        return Step(loss, norm)

    def slices(self) -> Iterator[AdapterSlice]:
        """This rank's share of the adapter under its PEFT names: views of the live parameters."""
        return convert(self.hf_config, named_lora(self.model))

    @torch.no_grad()
    def canary(self) -> Canary:
        """Score fixed sequences under the values that go on the wire, at temperature 1."""
        # The lower half: the upper end of many vocabularies is padding that engines refuse.
        generator = torch.Generator().manual_seed(CANARY_SEED)
        high = max(2, int(self.hf_config["vocab_size"]) // 2)
        tokens_BT = torch.randint(high, (CANARY_SEQUENCES, CANARY_TOKENS), generator=generator)
        with self._wire_values():
            logp_BS = token_logp(self.model, tokens_BT.to(self.device)).cpu()
        return Canary(
            sequences=tuple(tuple(row) for row in tokens_BT.tolist()),
            logprobs=tuple(tuple(row) for row in logp_BS.tolist()),
            tolerance=CANARY_TOLERANCE[self._config.model.dtype],
        )

    def base_unchanged(self) -> bool:
        """Whether every base parameter has the bits it was loaded with."""
        return base_digest(self.model) == self._base_digest

    def capture(self) -> dict[str, Tensor]:
        """Copy what a checkpoint needs to host memory."""
        tensors = {"rng.cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            tensors["rng.cuda"] = torch.cuda.get_rng_state()
        for name, parameter in self._named:
            tensors[f"lora.{name}"] = parameter.detach()
            moments = self._optimizer.state.get(parameter, {})
            tensors |= {f"adamw.{moment}.{name}": moments[moment] for moment in _MOMENTS if moment in moments}
        return {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up a captured state.

        Raises:
            Corrupt: a tensor is missing, extra, or of another shape; the state is then undefined.
        """
        left = dict(tensors)
        state: dict[int, dict[str, Tensor]] = {}
        try:
            torch.set_rng_state(left.pop("rng.cpu"))
            if (cuda_state := left.pop("rng.cuda", None)) is not None and torch.cuda.is_available():
                torch.cuda.set_rng_state(cuda_state)
            for index, (name, parameter) in enumerate(self._named):
                value = left.pop(f"lora.{name}")
                if value.shape != parameter.shape:
                    raise ValueError(f"lora.{name} has shape {tuple(value.shape)}, not {tuple(parameter.shape)}")
                parameter.copy_(value)
                if f"adamw.step.{name}" in left:
                    state[index] = {moment: left.pop(f"adamw.{moment}.{name}") for moment in _MOMENTS}
            if left:
                raise ValueError(f"{len(left)} unknown tensors ({next(iter(left))}, ...)")
        except (KeyError, ValueError, RuntimeError) as error:
            raise Corrupt(f"checkpoint does not fit the model: {error}", op="restore checkpoint") from error
        groups: list[dict[str, Any]] = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": state, "param_groups": groups})

    def _score(self, tokens_BT: Tensor) -> Tensor:
        return token_logp(self.model, tokens_BT)

    @contextmanager
    def _wire_values(self) -> Iterator[None]:
        """Round the factors as the encoding does; lora_B's scale on the wire is a power of two and rounds nothing."""
        if self._config.lora.encoding == "fp32":
            yield
            return
        factors = [f for m in self.model.modules() if isinstance(m, LoraLinear) for f in (m.lora_A, m.lora_B)]
        masters = [factor.detach().clone() for factor in factors]
        try:
            for factor in factors:
                factor.copy_(factor.to(torch.bfloat16))
            yield
        finally:
            for factor, master in zip(factors, masters, strict=True):
                factor.copy_(master)
