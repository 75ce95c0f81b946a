"""`lorasync gc`, `pin` and `rollback` as a person meets them, and what `versions` and `verify` say afterwards."""

import contextlib
import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import synthetic
import torch

from publisher.commands import seconds
from shared.catalog import Catalog
from shared.console import main
from shared.errors import UsageError
from shared.layout import Layout
from shared.leases import Lease
from shared.local_store import LocalStore
from shared.stores import open_store
from shared.versions import Version
from trainer.checkpoint import Checkpoint, write

GRACE = ["--set", "retention.grace_s=0"]


@dataclass(frozen=True)
class Done:
    """What a command left."""

    returncode: int
    stdout: str
    stderr: str


def lorasync(*words: str) -> Done:
    """Run a command in this process, with nobody at the keyboard; tests/test_console.py starts real ones."""
    out, err, stdin = io.StringIO(), io.StringIO(), sys.stdin
    sys.stdin = io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(words)
    except SystemExit as exit_:  # argparse's
        code = int(exit_.code or 0)
    finally:
        sys.stdin = stdin
    return Done(code, out.getvalue(), err.getvalue())


def said(*words: str) -> Any:
    """What a command prints with --json."""
    done = lorasync(*words, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def url(tmp_path: Path) -> str:
    """A store with six versions."""
    store = open_store(str(tmp_path / "store"))
    synthetic.publish(store, synthetic.write_base(tmp_path / "base"), count=6)
    return str(tmp_path / "store")


def names(rows: list[dict[str, Any]]) -> list[str]:
    return [row["version"][-1] for row in rows]


def test_what_a_dry_run_says_would_go_is_what_goes(url: str):
    assert lorasync("pin", "1", "--reason", "the paper's", "--store", url).stdout == "0001-000001 pinned\n"
    Lease(LocalStore(url), Layout("policy"), "node-a", life="x").take({Version(1, 2)})
    would = said("gc", "--store", url, "--keep", "2", "--dry-run")
    assert (names(would["collected"]), would["keep_newest"]) == (["0"], 3), "staleness needs three"
    assert {row["version"]: row["why"] for row in would["kept"]} == {
        "0001-000001": "pinned",
        "0001-000002": "leased by node-a-x",
    }
    assert len(said("versions", "--store", url)) == 6
    did = said("gc", "--store", url, "--keep", "2", *GRACE)
    assert (did["collected"], did["bytes"], did["versions"]) == (would["collected"], would["bytes"], 5)
    assert would["bytes"] > 1000
    rows = said("versions", "--store", url)
    assert names(rows) == ["1", "2", "3", "4", "5"]
    assert rows[0]["pinned"]["reason"] == "the paper's" and rows[1]["pinned"] is None
    again = lorasync("gc", "--store", url, "--keep", "2")
    assert "nothing to collect" in again.stdout and "kept 0001-000001: pinned" in again.stdout


def test_gc_for_a_person(url: str):
    done = lorasync("gc", "--store", url)
    assert done.returncode == 0 and "nothing to collect (retention.keep_versions is 0" in done.stdout
    dry = lorasync("gc", "--store", url, "--keep", "1", "--dry-run")
    assert "would delete 3 versions: 0001-000000, 0001-000001, 0001-000002" in dry.stdout
    young = lorasync("gc", "--store", url, "--older-than", "7d", *GRACE)
    assert "nothing to collect" in young.stdout and "kept 3 versions that are younger than 604800 s" in young.stdout
    old = lorasync("gc", "--store", url, "--older-than", "0s", *GRACE)
    assert "deleted 3 versions" in old.stdout and "3 versions left" in old.stdout


def test_verify_says_what_expired_and_that_data_without_a_void_is_missing(url: str):
    lorasync("gc", "--store", url, "--keep", "1", *GRACE)
    done = lorasync("verify", "--all", "--store", url)
    assert done.returncode == 0 and "3 of 3 versions whole, 3 expired" in done.stdout
    assert LocalStore(url).list("policy/leases") == [], "let go of when it was done"
    assert [row.get("expired", False) for row in said("verify", "--all", "--store", url)] == [True] * 3 + [False] * 3
    store = LocalStore(url)
    store.delete(Catalog(store, "policy").manifest(Version(1, 4)).shards[0].key)
    done = lorasync("verify", "--all", "--store", url)
    assert done.returncode == 4 and "2 of 3 versions whole" in done.stdout


@pytest.mark.parametrize("command", [["verify", "1-0"], ["export", "1-0", "--out", "out"]])
def test_what_was_collected_is_said_with_when_and_by_whom(url: str, tmp_path: Path, command: list[str]):
    lorasync("gc", "--store", url, "--keep", "1", *GRACE)
    done = lorasync(*[str(tmp_path / word) if word == "out" else word for word in command], "--store", url)
    assert done.returncode == 2 and "0001-000000 was collected on 2" in done.stderr


def test_verifying_every_version_takes_one_lease_after_another_under_one_holder(
    url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    put, held = LocalStore.put, list[str]()
    noting = lambda store, key, content: (held.append(key), put(store, key, content))[1]  # noqa: E731
    monkeypatch.setattr(LocalStore, "put", noting)
    assert main(["verify", "--all", "--store", url]) == 0
    holders = {key.rpartition("-")[0] for key in held if "/leases/" in key}
    assert len(held) == 6 and len(holders) == 1


@pytest.mark.parametrize("place", ["store", "adapter"])
def test_gc_of_what_is_not_there_is_a_mistake_and_writes_nothing(url: str, tmp_path: Path, place: str):
    flags = ["--store", f"{url}-typo"] if place == "store" else ["--store", url, "--adapter", "typo"]
    done = lorasync("gc", *flags)
    assert done.returncode == 2 and "no adapter" in done.stderr
    assert not (tmp_path / "store-typo").exists() and not (tmp_path / "store" / "typo").exists()


def test_gc_says_that_more_are_kept_than_were_asked_for(url: str):
    assert (
        "the newest 3 stay, not 2: train.max_staleness" in lorasync("gc", "--store", url, "--keep", "2", *GRACE).stdout
    )
    assert "stay, not" not in lorasync("gc", "--store", url, "--keep", "3").stdout


def test_a_pin_for_a_machine(url: str):
    assert said("pin", "4", "--store", url) == {"version": "0001-000004", "pinned": True, "changed": True}
    assert said("pin", "4", "--store", url)["changed"] is False
    assert said("pin", "4", "--remove", "--store", url) == {"version": "0001-000004", "pinned": False, "changed": True}


@pytest.mark.parametrize("flag", [["--keep", "0"], ["--older-than", "7"], ["--keep", "many"]])
def test_gc_refuses_what_would_not_be_a_rule(url: str, flag: list[str]):
    done = lorasync("gc", "--store", url, *flag)
    assert done.returncode == 2 and len(LocalStore(url).list("policy/manifests")) == 6


def test_pinning_what_is_not_there_says_why(url: str):
    lorasync("gc", "--store", url, "--keep", "1", *GRACE)
    unknown = lorasync("pin", "0001-000099", "--store", url)
    assert unknown.returncode == 2 and "no version '0001-000099'" in unknown.stderr
    gone = lorasync("pin", "0001-000000", "--store", url)
    assert gone.returncode == 2 and "0001-000000 was collected on 2" in gone.stderr
    assert lorasync("pin", "4", "--remove", "--store", url).stdout == "0001-000004 was not pinned\n"
    assert lorasync("pin", "4", "--store", url).stdout == "0001-000004 pinned\n"
    assert lorasync("pin", "4", "--store", url).stdout == "0001-000004 was pinned already\n"
    assert lorasync("pin", "4", "--remove", "--store", url).stdout == "0001-000004 unpinned\n"


def test_a_rollback_says_what_it_will_do_and_does_nothing_unasked(url: str):
    done = lorasync("rollback", "2", "--store", url)
    assert done.returncode == 2 and "Give --yes" in done.stderr
    assert "from 0001-000005 to 0001-000002 (step 2)" in done.stdout and "is fenced" in done.stdout
    assert len(LocalStore(url).list("policy/epochs")) == 1


def put_checkpoint(url: str, epoch: int, step: int, publish_every: int = 1) -> None:
    state = {"publish_every": publish_every}
    write(LocalStore(url), Layout("policy"), Checkpoint(epoch, step, state, {"lora.a": torch.zeros(2)}))


def test_a_rollback_says_from_where_the_next_trainer_goes_on(url: str):
    asked = lorasync("rollback", "2", "--store", url)
    assert "No checkpoint is kept: the next trainer begins anew" in asked.stdout
    put_checkpoint(url, 1, 2)
    put_checkpoint(url, 1, 4)
    asked = lorasync("rollback", "2", "--store", url)
    assert "goes on from its checkpoint at step 2 of epoch 1." in asked.stdout
    done = lorasync("rollback", "2", "--store", url, "--yes")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_rollback_that_leaves_no_checkpoint_to_go_on_from_says_so_before_anybody_is_fenced(url: str):
    put_checkpoint(url, 1, 3)
    put_checkpoint(url, 1, 4)
    asked = lorasync("rollback", "2", "--store", url)
    warned = "No checkpoint on the way to step 2 is kept, only step 3 of epoch 1, step 4 of epoch 1"
    assert asked.returncode == 2 and warned in asked.stdout and "refuse to start" in asked.stdout
    assert len(LocalStore(url).list("policy/epochs")) == 1
    done = lorasync("rollback", "2", "--store", url, "--yes")
    assert done.returncode == 0 and f"warning: {warned}" in done.stderr


def test_what_cannot_be_read_is_no_checkpoint_to_go_on_from(url: str):
    put_checkpoint(url, 1, 1)
    put_checkpoint(url, 1, 2)
    LocalStore(url).put(f"{Layout('policy').checkpoint(1, 2)}/state.json", b"{}")
    assert "from its checkpoint at step 1 of epoch 1." in lorasync("rollback", "2", "--store", url).stdout


def test_after_a_rollback_the_old_bytes_are_latest_whole_and_exported(url: str, tmp_path: Path):
    assert said("rollback", "2", "--yes", "--store", url) == {"version": "0002-000002", "rolled_back_to": "0001-000002"}
    row = said("versions", "--store", url)[-1]
    assert (row["version"], row["parent"], row["rolled_back_to"]) == ("0002-000002", "0001-000002", "0001-000002")
    table = lorasync("versions", "--store", url, "--limit", "1").stdout
    assert "0002-000002" in table and "back to" in table
    assert lorasync("verify", "--store", url).stdout.startswith("0002-000002  ok")
    for version, out in (("latest", "new"), ("0001-000002", "old")):
        assert lorasync("export", version, "--store", url, "--out", str(tmp_path / out)).returncode == 0
    new, old = ((tmp_path / out / "adapter_model.safetensors").read_bytes() for out in ("new", "old"))
    assert new == old


def test_a_rollback_to_the_latest_or_to_nothing_is_refused_and_fences_nobody(url: str):
    latest = lorasync("rollback", "latest", "--yes", "--store", url)
    assert latest.returncode == 2 and "is the latest already" in latest.stderr
    unknown = lorasync("rollback", "77", "--yes", "--store", url)
    assert unknown.returncode == 2 and "no version '77'" in unknown.stderr
    assert len(LocalStore(url).list("policy/epochs")) == 1


@pytest.mark.parametrize(
    ("text", "expected"), [("90s", 90), ("30m", 1800), ("12h", 43200), ("7d", 604800), ("1.5h", 5400)]
)
def test_ages_are_read(text: str, expected: float):
    assert seconds(text) == expected


@pytest.mark.parametrize("text", ["7", "d", "-1d", "1w", "1d12h", ""])
def test_what_is_no_age_is_refused(text: str):
    with pytest.raises(UsageError, match="not an age"):
        seconds(text)
