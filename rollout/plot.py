"""Held-out reward by version as a PNG."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Curve:
    """One line: x is the training step that a version holds, y the mean reward, error its standard error."""

    label: str
    steps: Sequence[float]
    rewards: Sequence[float]
    errors: Sequence[float] | None = None


def plot_rewards(path: Path, curves: Sequence[Curve], title: str) -> None:
    """Draw the curves; overwrites `path`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=130, layout="constrained")
    for curve in curves:
        (line,) = axes.plot(curve.steps, curve.rewards, marker="o", markersize=3.5, linewidth=1.6, label=curve.label)
        if curve.errors is not None:
            low = [y - e for y, e in zip(curve.rewards, curve.errors, strict=True)]
            high = [y + e for y, e in zip(curve.rewards, curve.errors, strict=True)]
            axes.fill_between(curve.steps, low, high, color=line.get_color(), alpha=0.18, linewidth=0)
    axes.set(xlabel="training step of the served version", ylabel="held-out reward", ylim=(-0.02, 1.02), title=title)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="center right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)
