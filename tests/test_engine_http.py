"""The client to vLLM: what vLLM's HTTP API is known to do, and what a server does that misbehaves."""

import io
import json
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any, ClassVar

import pytest
from engine_fixtures import free_port, loaded, write_adapter
from tiny_model import ATTENTION

from rollout.engine import VllmEngine
from rollout.exchange import MAX_CONNECTIONS, Request, exchange, parse_server_url
from shared.errors import EngineError, UsageError

PROMPTS = [[1, 20, 30, 40], [1, 50, 60]]


class Scripted(BaseHTTPRequestHandler):
    """Answers every request with `answer`: (status, body), or None to hang up."""

    protocol_version = "HTTP/1.1"
    answer: ClassVar[tuple[int, Any] | None] = (200, {})
    echo: ClassVar[bool] = False

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.answer is None:
            self.close_connection = True
            return
        status, value = self.answer
        content = body if self.echo else value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self) -> None:
        self.headers["Content-Length"] = "0"
        self.do_POST()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Iterator[VllmEngine]:
    """A client to a server that answers what `Scripted` says."""
    monkeypatch.setattr(ThreadingHTTPServer, "request_queue_size", MAX_CONNECTIONS)
    with ThreadingHTTPServer(("127.0.0.1", 0), Scripted) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield VllmEngine(f"http://127.0.0.1:{server.server_port}", timeout_s=10)
        server.shutdown()


def choice(**changes: Any) -> dict[str, Any]:
    good = {
        "index": 0,
        "text": "a",
        "finish_reason": "stop",
        "token_ids": [5, 2],
        "logprobs": {"token_logprobs": [-0.5, -0.1]},
        "prompt_logprobs": [None, {"30": {"logprob": -1.0}}],
    }
    return good | changes


@pytest.mark.parametrize(
    "body",
    [
        b"<html>",
        {},
        {"choices": []},
        {"choices": [choice(), choice(index=1)]},
        {"choices": [choice(token_ids=[5])]},
        {"choices": [choice(token_ids=None)]},
        {"choices": [choice(logprobs={"token_logprobs": [-0.5, float("nan")]})]},
        {"choices": [choice(logprobs=None)]},
    ],
    ids=["not json", "no choices", "too few", "too many", "lengths differ", "no token ids", "nan", "no logprobs"],
)
def test_nonsense_instead_of_completions_is_an_engine_error(
    body: Any, scripted: VllmEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Scripted, "answer", (200, body))
    with pytest.raises(EngineError):
        scripted.complete("base", [[1]], n=1, max_tokens=2, temperature=1.0)
    with pytest.raises(EngineError):
        scripted.complete_seeded("base", [[1]], [3], max_tokens=2, temperature=1.0)


@pytest.mark.parametrize(
    "scores",
    [None, [None], [None, {"31": {"logprob": -1.0}}], [None, {"30": {"logprob": float("nan")}}], [None, None]],
    ids=["none", "too short", "another token", "nan", "empty"],
)
def test_nonsense_instead_of_scores_is_an_engine_error(
    scores: Any, scripted: VllmEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Scripted, "answer", (200, {"choices": [choice(prompt_logprobs=scores)]}))
    with pytest.raises(EngineError):
        scripted.score("base", [[20, 30]])


def test_a_load_that_is_answered_200_and_not_listed_is_an_error(
    scripted: VllmEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Scripted, "answer", (200, {"data": [{"id": "base"}]}))
    with pytest.raises(EngineError, match="does not list"):
        scripted.load("policy@1", "/somewhere")


@pytest.mark.parametrize("body", [{"error": {"message": "Not Found"}}, {"detail": "Not Found"}, b""])
def test_an_engine_without_runtime_loading_is_told_apart_from_a_missing_adapter(
    body: Any, scripted: VllmEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Scripted, "answer", (404, body))
    with pytest.raises(UsageError, match="at run time") as caught:
        scripted.check(max_model_len=16)
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1" in caught.value.hint


@pytest.mark.parametrize("body", [{"error": {"message": "Not Found"}}, {"detail": "Not Found"}])
def test_a_load_without_a_route_does_not_blame_the_directory(
    body: Any, scripted: VllmEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Scripted, "answer", (404, body))
    with pytest.raises(EngineError) as caught:
        scripted.load("policy@1", "/somewhere")
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1" in caught.value.hint


@pytest.mark.engine
def test_an_engine_that_was_started_for_a_node_passes_and_its_length_is_a_bound(vllm_engine: VllmEngine) -> None:
    vllm_engine.check(max_model_len=128)
    with pytest.raises(UsageError, match="sequences of 128 tokens"):
        vllm_engine.check(max_model_len=129)


def test_an_overloaded_server_may_be_asked_again_and_a_refusing_one_not(
    scripted: VllmEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    for status, retryable in ((503, True), (429, True), (400, False), (500, False)):
        monkeypatch.setattr(Scripted, "answer", (status, {"error": {"message": "because"}}))
        with pytest.raises(EngineError, match=f"{status}: because") as caught:
            scripted.models()
        assert caught.value.retryable is retryable


def test_a_refused_or_broken_connection_is_retryable(scripted: VllmEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scripted, "answer", None)
    nobody = VllmEngine(f"http://127.0.0.1:{free_port()}", timeout_s=2)
    for engine in (scripted, nobody):
        with pytest.raises(EngineError) as caught:
            engine.health()
        assert caught.value.retryable
        assert caught.value.key.startswith("http://127.0.0.1:")


def test_replies_keep_the_order_of_more_requests_than_connections(
    scripted: VllmEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Scripted, "echo", True)
    requests = [Request("POST", "/", {"number": number}) for number in range(2 * MAX_CONNECTIONS + 3)]
    replies = exchange(scripted._server, requests, op="test", timeout_s=10)
    assert [json.loads(reply.content)["number"] for reply in replies] == list(range(len(requests)))


class ClosesIdle(Scripted):
    """Closes idle connections, as uvicorn does, and keeps the first request waiting until it has closed one."""

    timeout = 0.2
    closed: ClassVar[Event]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if json.loads(body)["number"] == 0:
            assert self.closed.wait(10)
        self.rfile = io.BytesIO(body)
        super().do_POST()
        self.rfile = self.connection.makefile("rb")

    def finish(self) -> None:
        super().finish()
        self.connection.close()
        self.closed.set()


def test_a_connection_that_the_server_closed_as_idle_loses_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scripted, "echo", True)
    monkeypatch.setattr(ClosesIdle, "closed", Event(), raising=False)
    monkeypatch.setattr("rollout.exchange.MAX_CONNECTIONS", 2)
    requests = [Request("POST", "/", {"number": number}) for number in range(6)]
    with ThreadingHTTPServer(("127.0.0.1", 0), ClosesIdle) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        replies = exchange(
            parse_server_url(f"http://127.0.0.1:{server.server_port}"), requests, op="test", timeout_s=10
        )
        server.shutdown()
    assert [json.loads(reply.content)["number"] for reply in replies] == list(range(len(requests)))


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://host", "http://"])
def test_a_url_of_no_server_is_a_usage_error(url: str) -> None:
    with pytest.raises(UsageError):
        parse_server_url(url)


@pytest.mark.engine
def test_loading_twice_says_400(vllm_engine: VllmEngine, tiny_hf: Path, tmp_path: Path) -> None:
    directory = write_adapter(tmp_path / "adapter", tiny_hf, ATTENTION, seed=1)
    with loaded(vllm_engine, directory) as name, pytest.raises(EngineError, match=r"answered 400.*already") as caught:
        vllm_engine.load(name, str(directory))
    assert "under another name" in caught.value.hint


@pytest.mark.engine
def test_loading_a_missing_directory_says_404(vllm_engine: VllmEngine, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="answered 404") as caught:
        vllm_engine.load("missing", str(tmp_path / "nowhere"))
    assert "must exist" in caught.value.hint
    assert "missing" not in vllm_engine.models()


@pytest.mark.engine
def test_the_base_models_name_cannot_be_loaded(vllm_engine: VllmEngine, tiny_hf: Path, tmp_path: Path) -> None:
    directory = write_adapter(tmp_path / "adapter", tiny_hf, ATTENTION, seed=1)
    with pytest.raises(EngineError, match="answered 400"):
        vllm_engine.load("base", str(directory))


@pytest.mark.engine
def test_unloading_twice_says_404(vllm_engine: VllmEngine, tiny_hf: Path, tmp_path: Path) -> None:
    with loaded(vllm_engine, write_adapter(tmp_path / "adapter", tiny_hf, ATTENTION, seed=1)) as name:
        vllm_engine.unload(name)
        with pytest.raises(EngineError, match="answered 404"):
            vllm_engine.unload(name)


@pytest.mark.engine
def test_an_unknown_model_says_404(vllm_engine: VllmEngine) -> None:
    with pytest.raises(EngineError, match="answered 404") as caught:
        vllm_engine.complete("nobody", PROMPTS, n=1, max_tokens=2, temperature=1.0)
    assert "forgets" in caught.value.hint


@pytest.mark.engine
def test_the_same_seeds_sample_the_same_tokens(vllm_engine: VllmEngine) -> None:
    prompts = [[1, 20 + number, 40] for number in range(16)]
    seeds = list(range(100, 116))
    first = vllm_engine.complete_seeded("base", prompts, seeds, max_tokens=8, temperature=1.0)
    again = vllm_engine.complete_seeded("base", prompts[::-1], seeds[::-1], max_tokens=8, temperature=1.0)
    assert [c.token_ids for c in first] == [c.token_ids for c in again[::-1]]


@pytest.mark.engine
def test_seeds_give_prompts_random_streams_of_their_own(vllm_engine: VllmEngine) -> None:
    """One seed for a list of prompts would give equal prompts equal samples."""
    completions = vllm_engine.complete_seeded(
        "base", [[1, 20, 40]] * 32, list(range(32)), max_tokens=4, temperature=1.0
    )
    assert Counter(c.token_ids[0] for c in completions).most_common(1)[0][1] < 8


@pytest.mark.engine
def test_what_the_model_recommends_for_sampling_is_not_heeded(vllm_engine: VllmEngine) -> None:
    """The session's server says top_k = 1: heeded, every draw would be the likeliest token."""
    prompts, options = [[1, 20, 40]] * 16, {"max_tokens": 1, "temperature": 1.0}
    seeded = vllm_engine.complete_seeded("base", prompts, list(range(16)), **options)
    unseeded = [group[0] for group in vllm_engine.complete("base", prompts, n=1, **options)]
    for completions in (seeded, unseeded):
        assert len({completion.token_ids for completion in completions}) > 4


@pytest.mark.engine
def test_a_request_that_says_nothing_gets_what_the_model_recommends(vllm_engine: VllmEngine) -> None:
    """The failure that the test above is about: were this not so, it would prove nothing."""
    body = {"model": "base", "prompt": [PROMPTS[0]] * 16, "max_tokens": 1, "temperature": 1.0, "return_token_ids": True}
    [reply] = exchange(vllm_engine._server, [Request("POST", "/v1/completions", body)], op="test", timeout_s=60)
    assert len({tuple(choice["token_ids"]) for choice in json.loads(reply.content)["choices"]}) == 1
