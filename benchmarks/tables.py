"""What a CSV says, as a Markdown table and as a picture."""

import csv
from collections.abc import Sequence
from pathlib import Path

import matplotlib.figure

from benchmarks.report import CsvFile, Row

INK, BAR = "#333333", "#0072b2"


def read(path: Path) -> list[Row]:
    """The rows of a CSV; of a case that was measured again, only those of the newest run.

    Raises ValueError if there is no such file or it has other columns.
    """
    if not path.is_file():
        raise ValueError(f"out is {path}, which is no file yet; measure first, without --markdown")
    CsvFile(path)
    with path.open(newline="") as file:
        found = [
            Row(**cells | {key: float(cells[key]) for key in ("p20", "p50", "p80")})
            for cells in csv.DictReader(file)
        ]
    newest: dict[tuple, str] = {}
    for one in found:
        newest[_where(one)] = max(one.date, newest.get(_where(one), ""))
    return [one for one in found if one.date == newest[_where(one)]]


def _where(one: Row) -> tuple:
    return one.case, one.dtype, str(one.threads)


def markdown(found: Sequence[Row]) -> str:
    """A table of a CSV's rows, a line for each rival of each case and a column for each metric."""
    machine = [one for one in found if one.case in ("limit", "at start", "during the run")]
    metrics = list(dict.fromkeys(one.metric for one in found if one not in machine))
    table: dict[tuple, dict[str, str]] = {}
    for one in found:
        if one.metric in metrics:
            cells = table.setdefault((*_where(one), one.provider), {})
            spread = "" if one.p20 == one.p80 else f" ({one.p20:.3g}-{one.p80:.3g})"
            cells[one.metric] = f"{_short(one.p50)}{spread}"
    units = {one.metric: one.unit for one in found}
    heads = [
        metric if units[metric] in metric or " " in units[metric] else f"{metric}, {units[metric]}"
        for metric in metrics
    ]
    text = ["; ".join(dict.fromkeys(f"{one.date}, {one.device}, {one.versions}" for one in found))]
    for one in machine:
        threads = f", {one.threads} threads" if int(one.threads) else ""
        text.append(f"{one.case}: {one.metric} {_short(one.p50)}{threads}")
    text = [". ".join(text) + ".", ""]
    text.append("| " + " | ".join(["case", "dtype", "threads", "provider", *heads]) + " |")
    text.append("| --- | --- | ---: | --- |" + " ---: |" * len(heads))
    for key, cells in table.items():
        values = [cells.get(metric, "") for metric in metrics]
        text.append("| " + " | ".join([*map(str, key), *values]) + " |")
    return "\n".join(text) + "\n"


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def draw(found: Sequence[Row], metric: str, path: Path, line: float | None = None) -> None:
    """Bars of `metric`, one panel a case, with the 20th to 80th percentile; `line`: drawn across."""
    panels: dict[tuple, list[Row]] = {}
    for one in found:
        if one.metric == metric:
            panels.setdefault(_where(one), []).append(one)
    if not panels:
        return
    figure = matplotlib.figure.Figure(
        figsize=(8, 1 + sum(0.8 + 0.25 * len(bars) for bars in panels.values())),
        dpi=120,
        layout="constrained",
    )
    heights = [2 + len(bars) for bars in panels.values()]
    every = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, ((case, dtype, threads), bars) in zip(every, panels.items()):
        places = range(len(bars), 0, -1)
        middles = [one.p50 for one in bars]
        # A ratio of medians may lie outside of the pairs' ratios.
        spread = [
            [max(0.0, one.p50 - one.p20) for one in bars],
            [max(0.0, one.p80 - one.p50) for one in bars],
        ]
        axes.barh(places, middles, xerr=spread, color=BAR, error_kw={"ecolor": INK})
        axes.set_yticks(places, [one.provider for one in bars])
        axes.set_title(f"{case}, {dtype}, {threads} threads", color=INK, size=10, loc="left")
        axes.set_xlabel(f"{metric} ({bars[0].unit})", color=INK)
        if line is not None:
            axes.axvline(line, color=INK, linewidth=1)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
