"""How figures are written down as they come: rows for the CSV, lines for the screen."""

import csv
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from benchmarks import gpu_state
from benchmarks.runner import (
    COPY,
    MATRIX,
    Case,
    Count,
    Figure,
    Refusal,
    Result,
    quantile,
)


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
    copy bandwidth of the same case) in 1; "times_limit" (time over the limit's) and "speedup" in
    "x PROVIDER", the fastest limit and the fastest baseline; "images_per_s"; "copy_gbps" in GB/s
    and "matrix_gflops" in GFLOP/s, the limits of the machine; "busy_cores", what other processes
    used, in cores. Of GPUs also "graph_replay", 1 if what was timed are replays of a CUDA graph and
    0 if calls could not be captured; "busy_share" before the run, in 1; and what the driver said during
    it. Threads are 1 there. Suites that count rather than time say in their docstring what they
    count.
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
    """The rows of one timed case: nothing for a rival that the gate refused."""
    return [row(result.case, figure, run) for figure in figures(result)]


def figures(result: Result) -> list[Figure]:
    """What the samples of one case come to, rival by rival."""
    case, found = result.case, []
    for provider, seconds in result.seconds.items():
        found.append(Figure.of(provider, "time_ms", [value * 1e3 for value in seconds], "ms"))
        if case.images is not None:
            rates = [case.images / value for value in seconds]
            found.append(Figure.of(provider, "images_per_s", rates, "images/s"))
        if provider in result.eager:
            replayed = float(result.eager[provider] is None)
            found.append(Figure(provider, "graph_replay", replayed, replayed, replayed, "1"))
        if case.necessary_bytes is not None and result.copy_gbps:
            shares = [result.share_of_copy(value) for value in seconds]
            found.append(Figure.of(provider, "share_of_copy", shares, "1"))
        for metric, ratio, other in (
            ("times_limit", result.times_limit(provider), result.limit()),
            ("speedup", result.speedup(provider), result.baseline()),
        ):
            if ratio is not None and other != provider:
                found.append(Figure(provider, metric, *ratio, f"x {other}"))
    return found


def limit_rows(suite: str, results: Iterable[Result], run: Run) -> list[Row]:
    """Copy bandwidth and matrix rate over the whole run, one row a number of threads.

    On a GPU there is a matrix rate for each dtype, that of float32 by TF32.
    """
    samples: dict[tuple[int, str, str, str, str], list[float]] = {}
    for result in results:
        case = result.case
        dtype = "float32" if case.device == "cpu" else case.dtype
        matrix = f"{MATRIX}_tf32" if case.device != "cpu" and dtype == "float32" else MATRIX
        for *kind, values in (
            ("float32", COPY, "copy_gbps", "GB/s", result.copy_gbps),
            (dtype, matrix, "matrix_gflops", "GFLOP/s", result.matrix_gflops),
        ):
            samples.setdefault((case.threads, *kind), []).extend(values)
    return [
        row(Count(suite, "limit", dtype, threads, list), Figure.of(*kind, values, unit), run)
        for (threads, dtype, *kind, unit), values in samples.items()
        if values
    ]


def load_row(suite: str, when: str, busy: float, run: Run) -> Row:
    """Cores that others kept busy, `when` the run started or during it."""
    figure = Figure("other_processes", "busy_cores", busy, busy, busy, "cores")
    return row(Count(suite, when, "", 0, list), figure, run)


def busy_row(suite: str, busy: float, run: Run) -> Row:
    """Share of the time in which a GPU had work before the run started."""
    figure = Figure("other_processes", "busy_share", busy, busy, busy, "1")
    return row(Count(suite, "at start", "", 1, list), figure, run)


def state_rows(suite: str, samples: dict[str, list[float]], run: Run) -> list[Row]:
    """A GPU's clocks, temperature and power over the run, as gpu_state.Watch gives them."""
    units = dict(gpu_state.ASKED.values())
    case = Count(suite, "during the run", "", 1, list)
    return [
        row(case, Figure.of("nvidia-smi", metric, values, units[metric]), run)
        for metric, values in samples.items()
    ]


def row(case: Case | Count, figure: Figure, run: Run) -> Row:
    low, middle, high = (float(f"{value:.5g}") for value in (figure.p20, figure.p50, figure.p80))
    return Row(
        case.suite,
        case.name,
        figure.provider,
        figure.metric,
        low,
        middle,
        high,
        figure.unit,
        run.device,
        case.threads,
        case.dtype,
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
    f"{'provider':<32}{'ms p50':>10}{'p20':>10}{'p80':>10}{'of copy':>9}{'x limit':>9}"
    f"{'speedup':>9}  spread"
)


def lines(result: Result) -> list[str]:
    """The case and its floor, then one line a rival under HEADER's columns.

    `x limit` is over the fastest limit and `speedup` over the fastest baseline; `spread` is the
    20th to 80th percentile of the rounds, of the first of the two that there is.
    """
    case = result.case
    floor = f", floor {case.passes} passes" if case.passes else ""
    copy = f", copy {quantile(result.copy_gbps, 0.5):.1f} GB/s" if result.copy_gbps else ""
    shown = [f"{case.name}  {_circumstances(case)}{floor}{copy}"]
    for provider in case.providers:
        if provider in result.red:
            shown.append(refusal_line(Refusal(provider, result.red[provider])))
        elif provider in result.absent:
            shown.append(refusal_line(Refusal(provider, result.absent[provider], red=False)))
        elif provider in result.seconds:
            shown.append(_line(result, provider))
    return shown


def refusal_line(refusal: Refusal) -> str:
    said = "NO FIGURE" if refusal.red else "left out"
    return f"  {refusal.provider:<30}{said}: {refusal.reason}"


def _circumstances(case: Case | Count) -> str:
    if case.device != "cpu":
        return case.dtype
    return f"{case.dtype}, {case.threads} thread{'s' if case.threads > 1 else ''}"


def _line(result: Result, provider: str) -> str:
    by_metric = {f.metric: f for f in figures(result) if f.provider == provider}
    time = by_metric["time_ms"]
    decimals = 4 if time.p80 < 1000 else 1
    line = f"  {provider:<30}"
    line += "".join(f"{value:>10.{decimals}f}" for value in (time.p50, time.p20, time.p80))
    ratios = [by_metric.get(metric) for metric in ("share_of_copy", "times_limit", "speedup")]
    line += "".join("-".rjust(9) if f is None else f"{f.p50:>9.2f}" for f in ratios)
    spread = ratios[1] or ratios[2]
    if spread is not None:
        line += f"  {spread.p20:.2f}-{spread.p80:.2f}"
    if result.eager.get(provider):
        line += f"  (no graph: {result.eager[provider]})"
    return line


def heading(case: Count) -> str:
    return f"{case.name}  {_circumstances(case)}"


def figure_line(figure: Figure) -> str:
    spread = "" if figure.p20 == figure.p80 else f"  {figure.p20:.4g}-{figure.p80:.4g}"
    value = f"{figure.p50:>10.4g} {figure.unit}{spread}"
    return f"  {figure.provider:<36}{figure.metric:<24}{value}"


def summary(results: list[Result], *, share_goal: float = 0.8) -> list[str]:
    """Where the subjects stand: below `share_goal` of the floor, and behind a baseline."""
    shares, speedups = [], []
    for result in results:
        subject = result.case.subject
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
