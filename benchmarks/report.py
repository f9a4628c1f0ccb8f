"""How figures are written down: rows for the CSV, lines for the screen, a Markdown table."""

import csv
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from benchmarks.runner import COPY, Case, Result, quantile


@dataclass(frozen=True)
class Run:
    """What all rows of a run have in common; `date` is UTC in ISO form."""

    device: str
    versions: str
    date: str


@dataclass(frozen=True)
class Row:
    """One figure; the fields are the CSV's columns, in order.

    metric and unit: "time_ms" in ms a call; "share_of_copy" (necessary bytes a second over the
    copy bandwidth of the same case) in 1; "speedup" in "x PROVIDER", the fastest baseline;
    "copy_gbps" in GB/s; "busy_cores", what other processes used, in cores.
    """

    suite: str
    case: str
    provider: str
    metric: str
    p20: float
    p50: float
    p80: float
    unit: str
    device: str
    threads: int
    dtype: str
    versions: str
    date: str


COLUMNS = tuple(column.name for column in fields(Row))


def rows(result: Result, run: Run) -> list[Row]:
    """The rows of one case: nothing for a rival that the gate refused."""
    case = result.case
    written = []
    for provider, seconds in result.seconds.items():
        p20, p50, p80 = (quantile(seconds, q) for q in (0.2, 0.5, 0.8))
        figures = [("time_ms", p20 * 1e3, p50 * 1e3, p80 * 1e3, "ms")]
        if result.share_of_copy(p50) is not None:
            shares = (result.share_of_copy(value) for value in (p80, p50, p20))
            figures.append(("share_of_copy", *shares, "1"))
        if result.baseline() not in (None, provider):
            figures.append(("speedup", *result.speedup(provider), f"x {result.baseline()}"))
        written += [
            _row(case.suite, case.name, provider, *figure, case.threads, case.dtype, run)
            for figure in figures
        ]
    return written


def limit_rows(suite: str, results: Iterable[Result], run: Run) -> list[Row]:
    """The copy bandwidth over the whole run, one row a number of threads."""
    samples: dict[int, list[float]] = {}
    for result in results:
        samples.setdefault(result.case.threads, []).extend(result.copy_gbps)
    return [
        _row(
            suite,
            "limit",
            COPY,
            "copy_gbps",
            *(quantile(values, q) for q in (0.2, 0.5, 0.8)),
            "GB/s",
            threads,
            "float32",
            run,
        )
        for threads, values in samples.items()
        if values
    ]


def load_row(suite: str, when: str, busy: float, run: Run) -> Row:
    """Cores that others kept busy, `when` the run started or during it."""
    return _row(suite, when, "other_processes", "busy_cores", busy, busy, busy, "cores", 0, "", run)


def _row(suite, case, provider, metric, p20, p50, p80, unit, threads, dtype, run: Run) -> Row:
    low, middle, high = (float(f"{value:.5g}") for value in (p20, p50, p80))
    return Row(
        suite,
        case,
        provider,
        metric,
        low,
        middle,
        high,
        unit,
        run.device,
        threads,
        dtype,
        run.versions,
        run.date,
    )


class CsvFile:
    """Appends rows to a CSV as they come, so an interrupted run keeps what it measured.

    A file that exists must have the same columns. Raises ValueError if not.
    """

    def __init__(self, path: Path):
        self.path = path
        self._started = path.exists() and path.stat().st_size > 0
        if self._started:
            with path.open(newline="") as file:
                found = tuple(next(csv.reader(file), ()))
            if found != COLUMNS:
                raise ValueError(
                    f"out is {path}, whose columns are {', '.join(found)}; "
                    f"it may be a new file or one with the columns {', '.join(COLUMNS)}"
                )

    def append(self, written: Iterable[Row]) -> None:
        written = list(written)
        if not written:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            if not self._started:
                writer.writeheader()
                self._started = True
            writer.writerows(map(asdict, written))


HEADER = (
    f"{'provider':<20}{'ms p50':>10}{'p20':>10}{'p80':>10}{'GB/s':>8}{'of copy':>9}"
    f"{'speedup':>9}  spread"
)


def lines(result: Result) -> list[str]:
    """The case and its floor, then one line a rival under HEADER's columns.

    `speedup` is over the fastest baseline, `spread` the 20th to 80th percentile of the rounds.
    """
    case = result.case
    floor = f", floor {case.passes} passes" if case.passes else ""
    copy = f", copy {quantile(result.copy_gbps, 0.5):.1f} GB/s" if result.copy_gbps else ""
    threads = f"{case.threads} thread{'s' if case.threads > 1 else ''}"
    shown = [f"{case.name}  {case.dtype}, {threads}{floor}{copy}"]
    for provider in case.providers:
        if provider in result.red:
            shown.append(f"  {provider:<18}NO FIGURE: {result.red[provider]}")
        elif provider in result.seconds:
            shown.append(_line(result, provider))
    return shown


def _line(result: Result, provider: str) -> str:
    seconds = result.seconds[provider]
    low, middle, high = (quantile(seconds, q) for q in (0.2, 0.5, 0.8))
    nbytes = result.case.necessary_bytes
    rate = f"{nbytes / middle / 1e9:.1f}" if nbytes else "-"
    share = result.share_of_copy(middle)
    speedup = result.speedup(provider)
    line = f"  {provider:<18}{middle * 1e3:>10.4f}{low * 1e3:>10.4f}{high * 1e3:>10.4f}{rate:>8}"
    line += f"{share:>9.2f}" if share is not None else f"{'-':>9}"
    if speedup is None:
        return line
    line += f"{speedup[1]:>9.2f}"
    if provider != result.baseline():
        line += f"  {speedup[0]:.2f}-{speedup[2]:.2f}"
    return line


def summary(results: list[Result], *, share_goal: float = 0.8) -> list[str]:
    """Where the first provider stands: below `share_goal` of the floor, and behind a baseline."""
    shares, speedups = [], []
    for result in results:
        subject = result.case.providers[0]
        if subject not in result.seconds:
            continue
        share = result.share_of_copy(result.median(subject))
        if share is not None:
            shares.append((share, label(result.case)))
        if result.speedup(subject) is not None:
            speedups.append((result.speedup(subject)[1], label(result.case)))
    told = [
        *_ranked("share of copy", shares, share_goal),
        *_ranked("times the fastest baseline", speedups, 1.0),
    ]
    red = [(label(r.case), name, why) for r in results for name, why in r.red.items()]
    if red:
        told.append(f"{len(red)} without a figure:")
        told += [f"  {where}  {name}: {why}" for where, name, why in red]
    return told


def label(case: Case) -> str:
    return f"{case.name} {case.dtype} {case.threads}t"


def _ranked(what: str, values: list[tuple[float, str]], goal: float) -> list[str]:
    if not values:
        return []
    values = sorted(values)
    below = [(value, where) for value, where in values if value < goal]
    middle = quantile([value for value, _ in values], 0.5)
    told = [
        f"{what}: lowest {values[0][0]:.2f}, median {middle:.2f}, highest {values[-1][0]:.2f}; "
        f"{len(below)} of {len(values)} below {goal:g}"
    ]
    return told + [f"  {value:.2f}  {where}" for value, where in below]


def markdown(suite: str, results: list[Result], run: Run) -> str:
    """One table of all cases, a row for each rival that has a figure."""
    text = [
        f"# `python -m benchmarks {suite}`",
        "",
        f"{run.date}. {run.device}. {run.versions}.",
        "",
        "Median of the rounds; `of copy` is the floor's bytes a second over the copy bandwidth of "
        "the same case; `x` is over the fastest baseline, with the 20th to 80th percentile of the "
        "rounds.",
        "",
        "| case | dtype | threads | passes | copy GB/s | provider | ms | of copy | x |",
        "| --- | --- | ---: | ---: | ---: | --- | ---: | ---: | --- |",
    ]
    for result in results:
        case = result.case
        for provider in result.seconds:
            middle = result.median(provider)
            share = result.share_of_copy(middle)
            speedup = result.speedup(provider)
            cells = [
                case.name,
                case.dtype,
                case.threads,
                case.passes or "",
                f"{quantile(result.copy_gbps, 0.5):.1f}",
                provider,
                f"{middle * 1e3:.4g}",
                "" if share is None else f"{share:.2f}",
                "" if speedup is None else "{1:.2f} ({0:.2f}-{2:.2f})".format(*speedup),
            ]
            text.append(f"| {' | '.join(map(str, cells))} |")
    red = [f"- {label(r.case)}, {name}: {why}" for r in results for name, why in r.red.items()]
    if red:
        text += ["", "Without a figure:", "", *red]
    return "\n".join(text) + "\n"
