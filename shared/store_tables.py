"""Store commands on a terminal: the same facts as `--json`, for people."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from shared.status import Status, number


def versions_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """One row a version."""
    submitted = Column("submitted at", no_wrap=True)
    table = Table("version", right("step"), right("bytes"), "parent", submitted, "receipts", box=None)
    for row in rows:
        if "corrupt" in row:
            table.add_row(row["version"], "", "", "", row["kind"].upper(), " ".join(row["receipts"]))
            continue
        size, step, at = f"{row['bytes']:,}", "" if row["step"] is None else str(row["step"]), row["submitted_at"]
        notes = ["pinned"] if row["pinned"] else []
        back = row["rolled_back_to"]
        notes += [f"back to {back}"] if isinstance(back, str) and back.isprintable() else []
        receipts = " ".join(row["receipts"]) + (f" ({', '.join(notes)})" if notes else "")
        table.add_row(row["version"], step, size, row["parent"] or "", local_time(at), receipts.strip())
    return table


def shown(status: Status) -> RenderableType:
    """A status as rich shows it."""
    table = Table("node", "serves", "versions behind", "state", "since", box=None)
    for node in status.nodes:
        notes = [node.state, f"silent {node.silent_s:.0f} s" if node.silent else ""]
        notes += [f"{node.failures} failures" if node.failures else "", *(f"{v} quarantined" for v in node.quarantined)]
        late = f" ({node.lag_s:.1f} s)" if node.lag_s else ""
        table.add_row(
            node.node,
            str(node.version or "-"),
            "" if node.lag_versions is None else f"{node.lag_versions}{late}",
            ", ".join(filter(None, notes)),
            local_time(node.served_since),
        )
    head = f"{status.adapter} at {status.store}\nlatest version: {status.latest or 'none'} ({status.versions} in all)"
    return Group(Text(head), Text(f"trainer: {_trainer(status.trainer)}"), *([table] if status.nodes else ["no node"]))


def _trainer(hint: Mapping[str, Any] | None) -> str:
    if not hint:
        return "none seen"
    parts = [f"step {hint.get('step')} of {hint.get('steps')}", f"epoch {hint.get('epoch')}"]
    for name in ("mean_reward", "loss", "staleness_mean"):
        value = number(hint.get(name))
        if value is not None:
            parts.append(f"{name.replace('_', ' ')} {value:.3f}")
    parts.append("done" if hint.get("done") is True else f"last heard {local_time(number(hint.get('updated_at')))}")
    return ", ".join(parts)


def right(name: str) -> Column:
    """A column of numbers."""
    return Column(name, justify="right")


def local_time(unix_s: float | None) -> str:
    """Local time; empty for what is none."""
    if unix_s is None:
        return ""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(unix_s))
    except (OverflowError, ValueError, OSError):
        return "?"
