"""Pictures of runs and studies, as PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

INK, GRID = "#333333", "#e6e6e6"
COLORS = {  # of methods and curves, readable for the colour-blind (Okabe and Ito)
    "transfer": "#0072b2",
    "from scratch": "#e69f00",
    "logistic regression": "#009e73",
    "nearest neighbour": "#999999",
}


def curves(rows: list[dict], path: Path, title: str = "") -> None:
    """Draw loss, learning rate and accuracy over the updates of one run's log rows."""
    figure = Figure(figsize=(11, 4), dpi=120, layout="constrained")
    losses, scores = figure.subplots(1, 2)
    draw_loss(losses, rows)
    draw_scores(scores, rows)
    figure.suptitle(title, color=INK)
    figure.savefig(path)


def draw_loss(axes: Axes, rows: list[dict]) -> None:
    """Training loss, raw and smoothed, with the learning rate on a second axis."""
    train = [row for row in rows if row["kind"] == "train" and row["loss"] is not None]
    steps, values = [row["step"] for row in train], [row["loss"] for row in train]
    axes.plot(steps, values, color=COLORS["transfer"], alpha=0.25, linewidth=0.8)
    axes.plot(steps, _smooth(values), color=COLORS["transfer"], linewidth=1.8)
    _style(axes, "training loss", "update")
    axes.set_ylim(bottom=0)
    rates = axes.twinx()
    rates.plot(steps, [row["lr"] for row in train], color=COLORS["nearest neighbour"], linewidth=1)
    rates.set_ylabel("learning rate", color=COLORS["nearest neighbour"])
    rates.tick_params(colors=COLORS["nearest neighbour"])
    rates.set_ylim(bottom=0)
    rates.spines[["top", "left"]].set_visible(False)


def draw_losses(axes: Axes, methods: dict[str, list[list[dict]]]) -> None:
    """Smoothed training loss of several runs of each method, given their log rows."""
    for method, runs in methods.items():
        for index, rows in enumerate(runs):
            train = [row for row in rows if row["kind"] == "train" and row["loss"] is not None]
            axes.plot(
                [row["step"] for row in train],
                _smooth([row["loss"] for row in train]),
                color=COLORS[method],
                alpha=0.6,
                linewidth=1.2,
                label=None if index else method,
            )
    _style(axes, "training loss", "update")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)


def draw_scores(axes: Axes, rows: list[dict]) -> None:
    """Top-1 and mean per-class accuracy of every evaluation."""
    for split, style in (("val", "-"), ("test", ":")):
        done = [row for row in rows if row["kind"] == "eval" and row["split"] == split]
        if not done:
            continue
        steps = [row["step"] for row in done]
        for key, name, color in (
            ("top1", "top-1", COLORS["transfer"]),
            ("mean_per_class", "mean per class", COLORS["from scratch"]),
        ):
            axes.plot(
                steps,
                [row[key] for row in done],
                style,
                marker="o",
                markersize=4,
                color=color,
                label=f"{name}, {split}",
            )
    _style(axes, "accuracy", "update")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, loc="lower right")


def draw_bars(
    axes: Axes, groups: Sequence[str], series: dict[str, Sequence[tuple[float, float]]]
) -> None:
    """Grouped bars of accuracy; `series` gives (mean, spread) of each method for each group."""
    width = 0.8 / len(series)
    for index, (method, values) in enumerate(series.items()):
        places = [group + (index - (len(series) - 1) / 2) * width for group in range(len(groups))]
        means = [mean for mean, _ in values]
        spreads = [spread for _, spread in values]
        axes.bar(
            places,
            means,
            width * 0.92,
            yerr=spreads,
            color=COLORS[method],
            label=method,
            error_kw={"ecolor": INK, "elinewidth": 1.2, "capsize": 3},
        )
        for place, mean, spread in zip(places, means, spreads):
            axes.text(place, mean + spread + 0.01, f"{mean:.0%}", ha="center", size=8, color=INK)
    _style(axes, "accuracy on test images", "")
    axes.set_xticks(range(len(groups)), groups)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_ylim(0, 1.12)
    axes.grid(axis="x", visible=False)
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2)


def _smooth(values: list[float], share: float = 0.05) -> list[float]:
    """Exponential moving average over about `share` of the curve, started at the first value."""
    keep = 1 - 1 / max(1.0, share * len(values))
    smooth: list[float] = []
    for value in values:
        smooth.append(value if not smooth else keep * smooth[-1] + (1 - keep) * value)
    return smooth


def _style(axes: Axes, ylabel: str, xlabel: str) -> None:
    axes.set_ylabel(ylabel, color=INK)
    axes.set_xlabel(xlabel, color=INK)
    axes.grid(color=GRID)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK)
