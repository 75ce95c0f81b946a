"""What the rollout side asks of a serving engine, and the client to one vLLM server.

Token ids go in and come out; texts are only what the engine says of its own tokens. Every answer's shape is checked. A
200 from a load proves nothing (`rollout.proof` does); here it is only demanded that the name is then listed.
`load_inplace` is never used: it sticks, mixes weights in running requests and reuses stale prefixes.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from rollout.exchange import Reply, Request, exchange, parse_server_url
from shared.errors import EngineError, UsageError

HINTS = {
    ("load adapter", 400): "A name is loaded once: load other weights under another name, or unload it first",
    ("load adapter", 404): "The directory must exist on the engine's machine",
    ("load adapter", 500): "The adapter misses tensors that the engine needs; its log may say which",
    ("unload adapter", 404): "The engine does not know the name; it forgets all of them when it restarts",
    ("complete", 404): "Load the adapter first; the engine forgets all of them when it restarts",
    ("score", 404): "Load the adapter first; the engine forgets all of them when it restarts",
}

NO_LORA_ROUTES = "Start that server with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in its environment and with --enable-lora"
NOBODY = "lorasync/no/such/adapter"  # a name that nobody can have: no adapter's name has a slash

# What is left out of a request, vLLM takes from the model's generation_config.json: tokens would be drawn from a
# truncated distribution, and their log-probabilities recorded under the whole one.
UNTRUNCATED = {
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled continuation.

    `logprobs[i]` is the natural log-probability of `token_ids[i]` given all before it, at temperature 1 whatever the
    sampling temperature. `finish_reason` is "stop" (the last token is the end of sequence) or "length". `text` leaves
    special tokens out.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str
    text: str


class Engine(Protocol):
    """One serving engine. Safe to use from several threads. Every method raises EngineError, and nothing else."""

    def health(self) -> None:
        """Return if the engine can serve; raise if not."""

    def models(self) -> list[str]:
        """Names that requests may use: the base model's and the loaded adapters'."""

    def load(self, name: str, path: str) -> None:
        """Load a PEFT directory under a name that is not in use."""

    def unload(self, name: str) -> None:
        """Drop a name. Requests in flight finish on it; its files must stay until they have."""

    def complete(
        self, model: str, prompts: Sequence[Sequence[int]], *, n: int, max_tokens: int, temperature: float
    ) -> list[list[Completion]]:
        """Sample `n` continuations of every prompt, without a seed; temperature 0 is greedy. [prompts][n]."""

    def complete_seeded(
        self,
        model: str,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        *,
        max_tokens: int,
        temperature: float,
    ) -> list[Completion]:
        """Sample one continuation of every prompt, each with a random stream of its own. [prompts]."""

    def score(self, model: str, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probability of every given token but the first, given those before it. [sequences][length - 1]."""


class VllmEngine:
    """An Engine: one vLLM OpenAI server.

        engine = VllmEngine("http://127.0.0.1:8000", timeout_s=120)
        engine.load("policy@0001-000012", "/cache/policy/0001-000012")
        [[completion]] = engine.complete("policy@0001-000012", [[1, 23, 42]], n=1, max_tokens=6, temperature=1.0)

    Args:
        url: the server's, without /v1.
        timeout_s: longest silence that is waited for.

    Raises:
        UsageError: not a URL of a server.
    """

    def __init__(self, url: str, *, timeout_s: float) -> None:
        self._server, self._timeout_s = parse_server_url(url), timeout_s

    def health(self) -> None:
        """Return if the server and its engine core live."""
        self._ask("check health", Request("GET", "/health"))

    def models(self) -> list[str]:
        """Names that requests may use."""
        answer = self._json("list models", Request("GET", "/v1/models"))
        return [str(_field("list models", model, "id")) for model in _field("list models", answer, "data")]

    def load(self, name: str, path: str) -> None:
        """Load a PEFT directory under a name that is not in use."""
        body = {"lora_name": name, "lora_path": path}
        self._ask("load adapter", Request("POST", "/v1/load_lora_adapter", body), key=name)
        if name not in self.models():
            raise EngineError("the engine said yes and does not list the adapter", op="load adapter", key=name)

    def unload(self, name: str) -> None:
        """Drop a name."""
        self._ask("unload adapter", Request("POST", "/v1/unload_lora_adapter", {"lora_name": name}), key=name)

    def check(self, max_model_len: int) -> None:
        """Demand that adapters can be loaded at run time, and sequences of this length served.

        Without the setting vLLM has no route to load by: every version would be refused with a 404, and quarantined.

        Raises:
            UsageError: the server was not started for a rollout node.
            EngineError: it does not answer.
        """
        op, key = "check engine", self._server.geturl()
        request = Request("POST", "/v1/unload_lora_adapter", {"lora_name": NOBODY})
        [reply] = exchange(self._server, [request], op=op, timeout_s=self._timeout_s)
        if reply.status in (404, 405) and NOBODY.encode() not in reply.content:  # vLLM's own 404 repeats the name
            raise UsageError("the engine does not load adapters at run time", op=op, key=key, hint=NO_LORA_ROUTES)
        for model in _field(op, self._json(op, Request("GET", "/v1/models")), "data"):
            length = model.get("max_model_len")
            if length is not None and int(length) < max_model_len:
                raise UsageError(
                    f"the engine takes sequences of {length} tokens, rollout.max_model_len is {max_model_len}",
                    op=op,
                    key=key,
                    hint=f"Set rollout.max_model_len = {length}, or start that server with a longer --max-model-len",
                )

    def complete(
        self, model: str, prompts: Sequence[Sequence[int]], *, n: int, max_tokens: int, temperature: float
    ) -> list[list[Completion]]:
        """Sample `n` continuations of every prompt, in one request: the engine batches it best."""
        if not prompts:
            return []
        body = _completion_body(model, max_tokens, temperature) | {"prompt": [list(p) for p in prompts], "n": n}
        answer = self._json("complete", Request("POST", "/v1/completions", body), key=model)
        choices = _choices("complete", answer, n * len(prompts))
        return [[_completion(choice) for choice in choices[i * n : (i + 1) * n]] for i in range(len(prompts))]

    def complete_seeded(
        self,
        model: str,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        *,
        max_tokens: int,
        temperature: float,
    ) -> list[Completion]:
        """Sample one continuation of every prompt, prompt i with seeds[i].

        One request each, all at once: vLLM gives every prompt of a list the same random stream if the list has a seed.
        """
        body = _completion_body(model, max_tokens, temperature)
        requests = [
            Request("POST", "/v1/completions", body | {"prompt": list(prompt), "seed": seed})
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        replies = exchange(self._server, requests, op="complete", timeout_s=self._timeout_s)
        return [
            _completion(_choices("complete", _decode("complete", _checked("complete", reply, model)), 1)[0])
            for reply in replies
        ]

    def score(self, model: str, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probabilities of given tokens, teacher-forced."""
        if not sequences:
            return []
        prompt = [list(sequence) for sequence in sequences]
        body = {"model": model, "prompt": prompt, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}
        answer = self._json("score", Request("POST", "/v1/completions", body), key=model)
        choices = _choices("score", answer, len(prompt))
        return [_prompt_logprobs(choice, tokens) for choice, tokens in zip(choices, prompt, strict=True)]

    def _ask(self, op: str, request: Request, key: str = "") -> Reply:
        [reply] = exchange(self._server, [request], op=op, timeout_s=self._timeout_s)
        return _checked(op, reply, key)

    def _json(self, op: str, request: Request, key: str = "") -> Any:
        return _decode(op, self._ask(op, request, key))


def _completion_body(model: str, max_tokens: int, temperature: float) -> dict[str, Any]:
    """Token ids come with every choice; logprobs=0 asks for the sampled token's alone."""
    return {
        "model": model,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "logprobs": 0,
        "return_token_ids": True,
        **UNTRUNCATED,
    }


def _checked(op: str, reply: Reply, key: str) -> Reply:
    """Pass a 200 on; anything else becomes an error with the server's own words."""
    if reply.status == 200:
        return reply
    try:
        answer = json.loads(reply.content)
        error = answer.get("error", answer)
        message = str(error.get("message") or error.get("detail") or "")  # detail: FastAPI's own, for a missing route
    except (ValueError, AttributeError):
        message = reply.content[:200].decode(errors="replace")
    raise EngineError(
        f"the engine answered {reply.status}{': ' if message else ''}{message}",
        op=op,
        key=key,
        hint=NO_LORA_ROUTES if message == "Not Found" else HINTS.get((op, reply.status), ""),
        retryable=reply.status in (429, 502, 503, 504),
    )


def _decode(op: str, reply: Reply) -> Any:
    try:
        return json.loads(reply.content)
    except ValueError as error:
        raise EngineError("the answer is not JSON", op=op) from error


def _field(op: str, answer: Any, name: str) -> Any:
    if not isinstance(answer, Mapping) or answer.get(name) is None:
        raise EngineError(f"the answer has no {name}", op=op, hint="lorasync knows vLLM 0.26 and 0.32")
    return answer[name]


def _choices(op: str, answer: Any, count: int) -> list[Any]:
    """The choices in the order of the prompts."""
    choices = sorted(_field(op, answer, "choices"), key=lambda choice: int(_field(op, choice, "index")))
    if len(choices) != count:
        raise EngineError(f"{len(choices)} choices in the answer, {count} were asked for", op=op)
    return choices


def _completion(choice: Any) -> Completion:
    op = "complete"
    token_ids = tuple(_field(op, choice, "token_ids"))
    logprobs = tuple(_field(op, _field(op, choice, "logprobs"), "token_logprobs"))
    if len(token_ids) != len(logprobs):
        raise EngineError(f"{len(token_ids)} tokens with {len(logprobs)} log-probabilities", op=op)
    _demand_finite(op, logprobs)
    return Completion(token_ids, logprobs, _field(op, choice, "finish_reason"), _field(op, choice, "text"))


def _prompt_logprobs(choice: Any, tokens: Sequence[int]) -> list[float]:
    """vLLM gives one mapping a position, {token id: {"logprob": ...}}, and null for the first."""
    positions = _field("score", choice, "prompt_logprobs")
    try:
        scores = [float(at[str(token)]["logprob"]) for at, token in zip(positions[1:], tokens[1:], strict=True)]
    except (KeyError, TypeError, ValueError) as error:
        raise EngineError("the answer does not score the given tokens", op="score") from error
    _demand_finite("score", scores)
    return scores


def _demand_finite(op: str, logprobs: Sequence[float]) -> None:
    if not all(math.isfinite(value) for value in logprobs):
        raise EngineError(
            "log-probabilities that are not finite", op=op, hint="An adapter with NaNs poisons the engine"
        )
