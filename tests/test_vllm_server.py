"""Starting vLLM: what is refused before, what a death says, and that nothing of it outlives its node."""

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from engine_fixtures import free_port, group_members, wait_until

from rollout.supervise import Pulse
from rollout.vllm_server import VllmServer, last_line, telling_line
from rollout.vllm_settings import arguments, check_port, check_settings, kv_cache_bytes, sampling_seed
from shared.config import LoraConfig, ModelConfig, RolloutConfig
from shared.errors import EngineError, UsageError
from shared.lifeline import ProcessGroup


@pytest.fixture
def base_dir(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(
    ("lora", "rollout", "key", "way_out"),
    [
        (LoraConfig(rank=32), RolloutConfig(), "lora.rank", "max_lora_rank = 32"),
        (LoraConfig(rank=17), RolloutConfig(), "lora.rank", "max_lora_rank = 32"),
        (LoraConfig(), RolloutConfig(max_lora_rank=12), "rollout.max_lora_rank", "8, 16, 32"),
        (LoraConfig(), RolloutConfig(max_loras=1), "rollout.max_loras", "at least 2"),
        (
            LoraConfig(),
            RolloutConfig(max_loras=4, max_cpu_loras=3),
            "rollout.max_cpu_loras",
            "below rollout.max_loras 4",
        ),
    ],
    ids=["rank", "odd rank", "slot rank", "one slot", "few names"],
)
def test_settings_that_cannot_work_are_refused_in_one_line(
    lora: LoraConfig, rollout: RolloutConfig, key: str, way_out: str, base_dir: Path
) -> None:
    with pytest.raises(UsageError) as caught:
        check_settings(ModelConfig(str(base_dir)), lora, rollout)
    assert caught.value.key == key
    assert way_out in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_base_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"config\.json"):
        check_settings(ModelConfig(str(tmp_path / "nowhere")), LoraConfig(), RolloutConfig())


def test_good_settings_pass(base_dir: Path) -> None:
    check_settings(ModelConfig(str(base_dir)), LoraConfig(), RolloutConfig())


def test_a_taken_port_is_refused_before_anything_starts(base_dir: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        server = VllmServer(ModelConfig(str(base_dir)), LoraConfig(), RolloutConfig(port=port), base_dir / "vllm.log")
        with pytest.raises(UsageError, match=f"port {port} on 127.0.0.1 is taken") as caught:
            server.start()
    assert "rollout.port" in caught.value.hint
    assert server.pid is None
    assert not server.log_path.exists()


def test_a_port_that_was_just_given_back_is_free() -> None:
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as vLLM does
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)), holder.accept()[0]:
            pass
    check_port("127.0.0.1", port)


def test_engine_args_come_last_so_that_they_win(tiny_hf: Path) -> None:
    words = arguments(ModelConfig(str(tiny_hf)), RolloutConfig(engine_args=("--max-model-len", "64")))
    assert words[-2:] == ["--max-model-len", "64"]
    assert words[words.index("--model") + 1] == str(tiny_hf)


@pytest.mark.parametrize(
    ("max_model_len", "max_num_seqs", "blocks"), [(129, 256, 2 * 256), (32768, 256, 4096), (10**6, 1, 7813)]
)
def test_the_kv_cache_holds_all_sequences_or_a_gigabyte_but_one_at_least(
    max_model_len: int, max_num_seqs: int, blocks: int, tiny_hf: Path
) -> None:
    """4 layers x 2 x 2 KV heads x 32 x 4 bytes = 2048 bytes a token, 128 tokens a block, a block to spare."""
    rollout = RolloutConfig(max_model_len=max_model_len, max_num_seqs=max_num_seqs)
    assert kv_cache_bytes(ModelConfig(str(tiny_hf)), rollout) == (blocks + 1) * 128 * 2048


def test_nodes_draw_different_samples_and_a_node_always_the_same() -> None:
    one, other = RolloutConfig(node="node-0"), RolloutConfig(node="node-1")
    assert sampling_seed(one) != sampling_seed(other)
    assert sampling_seed(one) == sampling_seed(dataclasses.replace(one))
    assert 0 <= sampling_seed(one) < 2**31


LOG = """\
(APIServer pid=12) INFO 11-23 14:05:39 [api_server.py:100] vLLM API server version 0.32.0
(EngineCore pid=34) ERROR 11-23 14:05:44 [core.py:900] Traceback (most recent call last):
(EngineCore pid=34) ERROR 11-23 14:05:44 [core.py:900]   File "x.py", line 3, in load
(EngineCore pid=34) ERROR 11-23 14:05:44 [core.py:900] ValueError: Available memory on node 0 is less than requested
(APIServer pid=12) Traceback (most recent call last):
(APIServer pid=12)   raise RuntimeError(
(APIServer pid=12) RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""


def test_the_telling_line_is_the_cause_and_not_what_points_to_it() -> None:
    assert telling_line(LOG) == "ValueError: Available memory on node 0 is less than requested"


def test_a_validation_error_tells_with_its_second_line() -> None:
    log = (
        "pydantic_core.ValidationError: 1 validation error for ModelConfig\n  Value error, no such model [type=x, y]\n"
    )
    assert telling_line(LOG + log) == "Value error, no such model"


def test_a_wrong_flag_tells_itself() -> None:
    assert telling_line("usage: x\napi_server.py: error: unrecognized arguments: --tea\n").endswith("--tea")


def test_a_log_without_an_exception_tells_its_last_line() -> None:
    assert telling_line("(APIServer pid=1) INFO 11-23 14:05:39 [a.py:1] loading\n\n") == "loading"
    assert last_line("") == telling_line("") == "(the log is empty)"


GRANDCHILD = "import signal; print('up', flush=True); signal.pause()"
CHILD = f"""
import subprocess, sys
from shared.lifeline import follow_parent
follow_parent()
subprocess.run([sys.executable, "-c", {GRANDCHILD!r}])
"""
PARENT = """
import sys
from pathlib import Path
import os
from shared.lifeline import ProcessGroup
group = ProcessGroup([sys.executable, "-c", sys.argv[1]], os.environ, Path(sys.argv[2]))
print(group.pid, flush=True)
sys.stdin.read()
"""


def wait_for_text(path: Path, text: str) -> None:
    wait_until(lambda: path.exists() and text in path.read_text(encoding="utf-8"), 30)


def test_a_group_is_stopped_with_its_grandchildren(tmp_path: Path) -> None:
    group = ProcessGroup([sys.executable, "-c", CHILD], os.environ, tmp_path / "log")
    wait_for_text(tmp_path / "log", "up")
    assert len(group_members(group.pid)) == 2
    group.stop(grace_s=5)
    wait_until(lambda: group_members(group.pid) == [], 10)
    group.stop(grace_s=5)


def test_a_group_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    stubborn = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + CHILD
    group = ProcessGroup([sys.executable, "-c", stubborn], os.environ, tmp_path / "log")
    wait_for_text(tmp_path / "log", "up")
    group.stop(grace_s=0.2)
    wait_until(lambda: group_members(group.pid) == [], 10)
    assert group.exit_code() == -signal.SIGKILL


def test_a_killed_parent_takes_child_and_grandchild_with_it(tmp_path: Path) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, CHILD, str(tmp_path / "log")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert parent.stdout is not None
    group = int(parent.stdout.readline())
    wait_for_text(tmp_path / "log", "up")
    assert len(group_members(group)) == 2
    parent.kill()
    parent.communicate()
    wait_until(lambda: group_members(group) == [], 10)


@pytest.mark.engine
def test_a_death_at_the_start_says_why_and_a_users_folders_are_not_it(
    tiny_hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rollout").mkdir()
    (tmp_path / "rollout" / "__init__.py").write_text("raise AssertionError('a package of the user')\n")
    monkeypatch.chdir(tmp_path)
    rollout = RolloutConfig(port=free_port(), engine_args=("--tea", "now"))
    server = VllmServer(ModelConfig(str(tiny_hf)), LoraConfig(), rollout, tmp_path / "vllm.log")
    with pytest.raises(EngineError, match="unrecognized arguments: --tea") as caught:
        server.start()
    assert str(tmp_path / "vllm.log") in caught.value.hint
    assert not server.running()


NODE = """
import sys
from pathlib import Path
from rollout.vllm_server import VllmServer
from shared.config import LoraConfig, ModelConfig, RolloutConfig
rollout = RolloutConfig(port=int(sys.argv[2]), start_timeout_s=240, max_model_len=128)
server = VllmServer(ModelConfig(sys.argv[1]), LoraConfig(), rollout, Path(sys.argv[3]))
server.start()
print(server.pid, flush=True)
sys.stdin.read()
"""


@pytest.mark.engine
def test_a_killed_node_leaves_no_engine(tiny_hf: Path, tmp_path: Path) -> None:
    node = subprocess.Popen(
        [sys.executable, "-c", NODE, str(tiny_hf), str(free_port()), str(tmp_path / "vllm.log")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert node.stdout is not None
    group = int(node.stdout.readline())
    assert any("EngineCore" in command for command in group_members(group))
    node.kill()
    node.communicate()
    wait_until(lambda: group_members(group) == [], 20)


@pytest.mark.engine
def test_a_start_is_given_up_when_the_node_is_to_stop(tiny_hf: Path, tmp_path: Path) -> None:
    server = VllmServer(ModelConfig(str(tiny_hf)), LoraConfig(), RolloutConfig(port=free_port()), tmp_path / "vllm.log")
    group: list[int | None] = []

    def stopping() -> bool:
        group.append(server.pid)
        return len(group) > 2

    with pytest.raises(EngineError, match="told to stop"):
        server.start(stopping=stopping)
    assert group[0] is not None and group_members(group[0]) == []
    assert not server.running()


class Dead(BaseHTTPRequestHandler):
    """vLLM's server when its core is dead."""

    def do_GET(self) -> None:
        self.send_error(503)

    def log_message(self, *_: object) -> None:
        pass


def test_a_server_that_has_closed_its_port_or_says_that_its_core_is_dead_is_done_for(tmp_path: Path) -> None:
    with HTTPServer(("127.0.0.1", 0), Dead) as dead:
        threading.Thread(target=dead.serve_forever, daemon=True).start()
        rollout = RolloutConfig(port=dead.server_port)
        server = VllmServer(ModelConfig(str(tmp_path)), LoraConfig(), rollout, tmp_path / "vllm.log")
        assert server.pulse() is Pulse.DONE_FOR
        dead.shutdown()
    assert server.pulse() is Pulse.DONE_FOR


@pytest.mark.engine
def test_a_killed_server_leaves_no_engine_and_is_noticed(tiny_hf: Path, tmp_path: Path) -> None:
    rollout = RolloutConfig(port=free_port(), start_timeout_s=240, max_model_len=128)
    with VllmServer(ModelConfig(str(tiny_hf)), LoraConfig(), rollout, tmp_path / "vllm.log") as server:
        server.start()
        assert server.pid is not None
        group = server.pid
        assert server.pulse() is Pulse.WELL
        os.kill(group, signal.SIGSTOP)
        assert server.running() and server.pulse() is Pulse.SILENT  # hung: what only its health tells
        os.kill(group, signal.SIGKILL)
        wait_until(lambda: group_members(group) == [], 20)
        assert not server.running()
        assert "exit code -9" in str(server.death())
        with pytest.raises(EngineError) as caught:
            server.engine().health()
        assert caught.value.retryable
