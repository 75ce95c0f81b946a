"""What the demo shows while it runs: a live panel on a terminal, one line per change elsewhere."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rollout.demo.progress import HeldoutReward, RunState

BARS = " ▁▂▃▄▅▆▇█"
SHOWN_REWARDS = 12


class View:
    """Shows one phase at a time.

    Args:
        phases: names, in order, and the seconds that each is expected to take: the time left is made of them.
    """

    def __init__(self, console: Console, phases: Sequence[tuple[str, float]]) -> None:
        self._console, self._phases = console, list(phases)
        self._phase, self._began = 0, time.monotonic()
        self._first_step: tuple[int, float] | None = None  # of this phase, and when it was seen
        self._live: Live | None = None
        self._last_line = ""
        self._run_began = time.monotonic()

    @contextmanager
    def showing(self) -> Iterator["View"]:
        """Keep the live panel up while the block runs."""
        if not self._console.is_terminal:
            yield self
            return
        with Live(console=self._console, refresh_per_second=4, transient=True) as live:
            self._live = live
            yield self
        self._live = None

    def phase(self, name: str) -> None:
        """Begin a phase."""
        self._phase = [phase for phase, _ in self._phases].index(name)
        self._began, self._first_step = time.monotonic(), None
        number = f"[{self._phase + 1}/{len(self._phases)}]"
        left = f"[dim](about {self._left(None):.0f} s left in all)[/dim]"
        self._console.print(escape(number), name, left, highlight=False, soft_wrap=True)

    def update(self, state: RunState | None = None, note: str = "") -> None:
        """Show the state of the run, or of a phase that has none."""
        if self._live is not None:
            self._live.update(self._panel(state, note))
            return
        line = self._line(state) if state else note
        if line and line != self._last_line:
            passed = time.monotonic() - self._run_began
            self._console.print(f"  {passed:5.0f} s  {line}", highlight=False, soft_wrap=True)
            self._last_line = line

    def _left(self, state: RunState | None) -> float:
        """Seconds left: this phase by its own rate where it has one, the later ones by expectation."""
        later = sum(seconds for _, seconds in self._phases[self._phase + 1 :])
        expected = self._phases[self._phase][1]
        elapsed = time.monotonic() - self._began
        step, steps = (int(state.trainer.get(k, 0)) for k in ("step", "steps")) if state else (0, 0)
        if step and self._first_step is None:
            self._first_step = step, time.monotonic()
        if self._first_step is not None and step > self._first_step[0]:
            first, since = self._first_step
            return later + (time.monotonic() - since) / (step - first) * (steps - step)
        return later + max(0.0, expected - elapsed)

    def _panel(self, state: RunState | None, note: str) -> RenderableType:
        name = self._phases[self._phase][0]
        footer = f"{time.monotonic() - self._run_began:.0f} s elapsed, about {self._left(state):.0f} s left"
        if state is None or not state.trainer:
            waiting = note or "starting: the engine loads the base model, the trainer builds Megatron"
            return Panel(Text(waiting), title=name, subtitle=footer, title_align="left", subtitle_align="right")
        step, steps = int(state.trainer.get("step", 0)), max(1, int(state.trainer.get("steps", 1)))
        grid = Table.grid(padding=(0, 2))
        grid.add_row("trainer", ProgressBar(total=steps, completed=step, width=30), f"step {step} of {steps}")
        latest = state.published[-1] if state.published else None
        grid.add_row("published", f"{len(state.published)} versions", f"latest {latest}" if latest else "")
        for node in state.nodes:
            behind = _lag(node, state)
            grid.add_row(str(node["node"]), f"serves {node.get('version') or '-'}", f"{behind} versions behind")
        rewards = [reward for reward in state.rewards if not reward.final]
        bars = "".join(BARS[round(reward.sampled * (len(BARS) - 1))] for reward in rewards)
        grid.add_row("reward", bars, f"{rewards[-1].sampled:.3f} held out, at temperature 1" if rewards else "")
        return Panel(
            Group(grid, Text(), rewards_table(rewards[-SHOWN_REWARDS:])),
            title=name,
            subtitle=footer,
            title_align="left",
            subtitle_align="right",
        )

    def _line(self, state: RunState) -> str:
        """One line per evaluated version: what a log needs, and no more."""
        if not state.trainer:
            return ""
        last = state.rewards[-1] if state.rewards else None
        if last is None:
            serving = [f"{node['node']} serves {node.get('version') or 'nothing yet'}" for node in state.nodes]
            return f"{len(state.published)} versions published; {', '.join(serving) or 'the engine is starting'}"
        final = " after training" if last.final else ""
        newest = state.published[-1]
        return f"reward of {last.version}{final}: {last.sampled:.3f} (greedy {last.greedy:.3f}), latest is {newest}"


def rewards_table(rewards: Sequence[HeldoutReward]) -> Table:
    """Held-out reward by version."""
    table = Table("version", "greedy", "temperature 1", "", box=None, header_style="bold", padding=(0, 2))
    for reward in rewards:
        label = f"{reward.version} (final)" if reward.final else str(reward.version)
        sampled = f"{reward.sampled:.3f} ± {reward.error:.3f}"
        table.add_row(label, f"{reward.greedy:.3f}", sampled, "█" * round(reward.sampled * 20))
    return table


def _lag(node: dict[str, object], state: RunState) -> int:
    """Versions that were published after the one that a node serves."""
    return sum(str(version) > str(node.get("version") or "") for version in state.published)
