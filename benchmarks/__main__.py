"""python -m benchmarks SUITE: measures, prints, and writes a CSV and a picture.

Examples:
  python -m benchmarks all --quick
  python -m benchmarks ops --filter group_norm_relu/r50x1 backward --threads 2
  python -m benchmarks step --filter x224 --rivals bit/ timm/ --rounds 21
  python -m benchmarks step --markdown        the table of what was measured before
  python -m benchmarks all --device cuda --seconds 100
  python -m benchmarks ops --device cuda --check      right or not, and no times
"""

import argparse
import dataclasses
import functools
import importlib
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from types import ModuleType

from benchmarks import cuda, gpu_state, machine, report, sanitize, tables
from benchmarks.runner import (
    Case,
    CopyLimit,
    Count,
    Gate,
    MatrixLimit,
    Refusal,
    Result,
    clock_of,
    first_line,
    measure,
    refusal_of,
)

RESULTS = Path(__file__).parent / "results"
SUITES = {
    # name -> module with cases(*, threads, dtypes, quick, compiled, device) -> list of runner.Case
    # and runner.Count, the most important first. It may have MEASURED_DTYPES and CUDA_DTYPES, if
    # nobody says which; draw(rows, path), or PICTURE = (metric, value at which a line is drawn);
    # markdown(rows); left_out(device) -> why cases that belong to it can't be measured here.
    "ops": "benchmarks.ops",
    "step": "benchmarks.step",
    "memory": "benchmarks.memory",
    "data": "benchmarks.data",
    "inference": "benchmarks.inference",
    "accuracy": "benchmarks.accuracy",
    "xla": "benchmarks.xla",
}
RESERVE = 3 << 29  # bytes that the largest case takes, with rivals' leftovers and fragments
BUSY = 0.1  # cores in use by others from which a machine isn't quiet


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0, or 1 if a rival has no figure, or 2 for bad arguments, or 130 for Ctrl-C."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.device == "cuda":
        if options.threads:
            parser.error(
                "--threads is for the CPU's suites; it may not be given with --device cuda"
            )
        named = options.list or options.markdown and options.out
        if not named and (reason := cuda.why_not()):
            parser.error(f"--device is cuda; {reason}")
    elif options.sanitize is not None:
        parser.error("--sanitize is for --device cuda, whose tools it runs")
    if options.seconds is not None and options.seconds <= 0:
        parser.error(f"--seconds is {options.seconds:g}; it must be more than 0")
    for count in options.threads:
        if not 1 <= count <= machine.cores():
            parser.error(f"--threads is {count}; it may be 1 to {machine.cores()} on this machine")
    if options.rounds is not None and options.rounds < 3:
        parser.error(f"--rounds is {options.rounds}; it may be 3 or more")
    suites = list(SUITES) if options.suite == "all" else [options.suite]
    if options.out and len(suites) > 1:
        parser.error("--out is one file; it may not be given for all suites at once")
    try:
        if options.markdown:
            for suite in suites:
                _show(suite, _out(suite, options))
            return 0
        cases = {suite: _cases(suite, options) for suite in _importable(suites)}
        if not any(cases.values()):
            parser.error(_nothing_left(options))
        if options.list:
            print("\n".join(dict.fromkeys(one.name for found in cases.values() for one in found)))
            return 0
        if options.sanitize is not None:
            return sanitize.run(options.sanitize or sanitize.TOOLS)
        if options.check:
            return max(_check(suite, found) for suite, found in cases.items() if found)
        files = {suite: report.CsvFile(_out(suite, options)) for suite in suites if cases[suite]}
    except ValueError as error:
        parser.error(str(error))
    rounds = options.rounds or (7 if options.quick else 15)
    statuses = []
    for suite, out in files.items():
        budget = options.seconds or float("inf")
        statuses.append(
            _run(suite, cases[suite], rounds, options.seed, out, options.device, budget)
        )
        if statuses[-1] == 130:
            break
    return max(statuses)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("suite", choices=[*SUITES, "all"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: cpu")
    parser.add_argument("--quick", action="store_true", help="small or few cases: a minute a suite")
    parser.add_argument(
        "--full", action="store_true", help="for xla: also R152x4 and accuracy, half an hour"
    )
    parser.add_argument(
        "--threads",
        type=int,
        nargs="+",
        default=[],
        metavar="N",
        help="numbers of threads (default: all cores, and for ops and data 1, too)",
    )
    parser.add_argument(
        "--filter",
        nargs="+",
        default=[],
        metavar="SUBSTRING",
        help="only cases with all of these in their name",
    )
    parser.add_argument(
        "--rivals",
        nargs="+",
        default=[],
        metavar="PREFIX",
        help="of timed cases only rivals whose name starts with one of these, and the limits, "
        "if none of them is one",
    )
    parser.add_argument(
        "--dtype",
        nargs="+",
        default=[],
        choices=["float32", "bfloat16", "float16"],
        help="for whole networks bfloat16 is autocast (default: float32; for step, where the "
        "processor has instructions for it, and for memory bfloat16, too; with --device cuda what "
        "people train in: bfloat16, and for ops and inference the others, too)",
    )
    parser.add_argument("--rounds", type=int, help="samples a figure (default: 15, quick: 7)")
    parser.add_argument(
        "--seconds",
        type=float,
        metavar="N",
        help="of each suite: start no case after them; the most important cases come first",
    )
    parser.add_argument(
        "--check", action="store_true", help="compare with float64 only, and write nothing"
    )
    parser.add_argument(
        "--sanitize",
        nargs="*",
        choices=sanitize.TOOLS,
        metavar="TOOL",
        help="with --device cuda: check the ops once under these tools of compute-sanitizer "
        f"(default: {', '.join(sanitize.TOOLS)})",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the order of the rivals")
    parser.add_argument(
        "--compile",
        action="store_true",
        help="also time torch.compile's rivals; needs a C++ compiler, and minutes",
    )
    parser.add_argument(
        "--data",
        metavar="PATH",
        help="for accuracy: images to train on, for instance an archive of CIFAR-10 "
        "(default: fashion-mnist, quick: digits)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="CSV",
        help="file to append to (default: SUITE-MACHINE.csv in benchmarks/results)",
    )
    parser.add_argument(
        "--markdown",
        action="store_true",
        help="measure nothing: print the CSV's table and draw its picture again",
    )
    parser.add_argument("--list", action="store_true", help="print the names of the cases and stop")
    return parser


def _cases(suite: str, options: argparse.Namespace) -> list[Case | Count]:
    module = _module(suite)
    on_gpu = options.device == "cuda"
    # Only ops are so short that one thread and all of them tell different things.
    alone = {1} if suite in ("ops", "data") else set()
    threads = [1] if on_gpu else options.threads or sorted({*alone, machine.cores()})
    default = "CUDA_DTYPES" if on_gpu else "MEASURED_DTYPES"
    more = {"accuracy": {"data": options.data}, "xla": {"full": options.full}}.get(suite, {})
    found = [
        case
        for case in module.cases(
            threads=threads,
            dtypes=options.dtype or list(getattr(module, default, ("float32",))),
            quick=options.quick,
            compiled=options.compile,
            device=options.device,
            **more,
        )
        if all(part in case.name for part in options.filter)
    ]
    if not options.rivals:
        return found
    return [case for case in map(_only(options.rivals), found) if case is not None]


def _only(prefixes: list[str]):
    """What makes of a case the same with fewer rivals; None where none is left."""

    def chosen(case: Case | Count) -> Case | Count | None:
        if isinstance(case, Count):
            return case
        named = [name for name in case.providers if name.startswith(tuple(prefixes))]
        limits = () if set(named) & set(case.limits) else case.limits
        kept = [name for name in case.providers if name in named or name in limits]
        return dataclasses.replace(case, providers=tuple(kept)) if named else None

    return chosen


def _importable(suites: list[str]) -> list[str]:
    """Of several suites those that have what they need; the others are named."""
    if len(suites) == 1:
        return suites
    found = []
    for suite in suites:
        try:
            _module(suite)
            found.append(suite)
        except ValueError as error:
            print(f"left out: {error}", file=sys.stderr)
    return found


def _nothing_left(options: argparse.Namespace) -> str:
    asked = [
        f"--{name} is {' '.join(values)}"
        for name in ("filter", "rivals", "dtype")
        if (values := getattr(options, name))
    ]
    return f"{', '.join(asked)}; no case has that (see --list)"


def _module(suite: str) -> ModuleType:
    """Raises ValueError for a suite that needs a package that isn't here."""
    try:
        return importlib.import_module(SUITES[suite])
    except ModuleNotFoundError as error:
        raise ValueError(f"suite is {suite}, which can't run here: {error}") from None


def _out(suite: str, options: argparse.Namespace) -> Path:
    kind = f"{suite}-quick" if options.quick else suite
    return options.out or RESULTS / f"{kind}-{machine.short_name(options.device)}.csv"


def _run(
    suite: str,
    cases: list[Case | Count],
    rounds: int,
    seed: int,
    out: report.CsvFile,
    device: str = "cpu",
    budget: float = float("inf"),
) -> int:
    started = time.perf_counter()
    timed = any(isinstance(case, Case) for case in cases)
    run = report.Run(
        machine.device(device),
        machine.versions(device),
        datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )
    print(f"{run.device}\n{run.versions}\n{suite}: {len(cases)} cases")
    for reason in getattr(_module(suite), "left_out", lambda device: [])(device):
        print(f"left out: {reason}")
    finish = (_begin_on_cpu if device == "cpu" else _begin_on_gpu)(suite, cases, run, out)
    results: list[Result] = []
    red = done = 0
    stopped = lost = None
    if timed:
        copy, matrix_of = _limits(device)
        print(f"{rounds} rounds each\n\n{report.HEADER}")
    try:
        for case in cases:
            if time.perf_counter() - started > budget:
                stopped = f"the {budget:g} s are over"
                break
            if isinstance(case, Count):
                red += _count(case, out, run)
            else:
                network = matrix_of(case.dtype) if case.images else None
                results.append(_measured(case, copy, network, rounds, seed))
                _write(results[-1], out, run)
            done += 1
            if device == "cuda" and (lost := cuda.lost()):
                stopped = f"the GPU answers no more ({lost})"
                break
    except KeyboardInterrupt as stop:
        stopped = "interrupted"
        if hasattr(stop, "result"):
            _write(stop.result.cut(), out, run)
    if stopped:
        print(f"\n{stopped} after {done} of {len(cases)} cases", file=sys.stderr, flush=True)
    limits = report.limit_rows(suite, results, run)
    out.append(limits)
    print()
    for row in limits:
        where = f"{row.threads} thread(s)" if device == "cpu" else row.dtype
        print(f"{row.provider}, {where}: {row.p50} {row.unit} ({row.p20} to {row.p80})")
    finish()
    print("\n".join(report.summary(results)))
    if out.path.is_file():  # there may be nothing to say
        print(f"written: {out.path}", flush=True)
        _draw(suite, out.path)
    if stopped == "interrupted":
        return 130
    return 1 if lost or red or any(result.red for result in results) else 0


def _write(result: Result, out: report.CsvFile, run: report.Run) -> None:
    out.append(report.rows(result, run))
    print("\n".join(report.lines(result)), flush=True)


def _measured(case: Case, copy, matrix, rounds: int, seed: int) -> Result:
    """The case's result; on a GPU, where memory may end, a case that failed is one of them."""
    try:
        return measure(case, copy, matrix=matrix, rounds=rounds, seed=seed)
    except Exception as error:
        if case.device == "cpu":
            raise
        reason = f"{type(error).__name__}: {first_line(error)}"
    return Result(case, red=dict.fromkeys(case.providers, reason))


def _limits(device: str):
    """The copy, and a function of a dtype that gives the matrix product."""
    if device == "cuda":
        copy, matrix_of = cuda.CopyLimit(), functools.cache(cuda.MatrixLimit)
        cuda.warm_up(matrix_of("bfloat16"))
        return copy, matrix_of
    copy, matrix = CopyLimit(), MatrixLimit()
    return copy, lambda dtype: matrix


def _begin_on_cpu(suite: str, cases: list[Case | Count], run: report.Run, out: report.CsvFile):
    """Memory for a young process, and what others do; returns what is to be called at the end."""
    timed = any(isinstance(case, Case) for case in cases)
    large = any(isinstance(case, Case) and (case.necessary_bytes or case.images) for case in cases)
    if timed and not machine.keep_freed_memory(RESERVE if large else RESERVE // 8):
        print("warning: malloc can't be told to keep memory here, so page faults are timed")
    busy = machine.load_at_rest()
    if busy > BUSY:
        print(f"warning: others use {busy:.1f} of {machine.cores()} cores; figures will be off")
    out.append([report.load_row(suite, "at start", busy, run)])
    load = machine.Load()

    def finish() -> None:
        busy = load.others()
        if busy is not None:
            out.append([report.load_row(suite, "during the run", busy, run)])
            if busy > BUSY:
                print(f"warning: others used {busy:.1f} cores during the run; figures may be off")

    return finish


def _begin_on_gpu(suite: str, cases: list[Case | Count], run: report.Run, out: report.CsvFile):
    """What others do, and a watch on the clocks; returns what is to be called at the end."""
    busy = gpu_state.busy()
    if busy is not None:
        out.append([report.busy_row(suite, busy, run)])
        if busy > BUSY:
            print(f"warning: the GPU was busy {busy:.0%} of the last second; figures will be off")
    watch = gpu_state.Watch()

    def finish() -> None:
        rows = report.state_rows(suite, watch.samples(), run)
        out.append(rows)
        for row in rows:
            print(f"{row.metric}: {row.p50} {row.unit} ({row.p20} to {row.p80})")

    return finish


def _count(case: Count, out: report.CsvFile, run: report.Run) -> int:
    """Takes a case's figures; each is on disk as soon as it is there. How many rivals are red."""
    print(report.heading(case), flush=True)
    red = 0
    try:
        for figure in case.take():
            if isinstance(figure, Refusal):
                red += figure.red
                print(report.refusal_line(figure), flush=True)
                continue
            out.append([report.row(case, figure, run)])
            print(report.figure_line(figure), flush=True)
    except Exception as error:
        if case.device == "cpu":
            raise
        red += 1
        print(report.refusal_line(refusal_of("the rest", error)), flush=True)
    return red


def _check(suite: str, cases: list[Case | Count]) -> int:
    """Only the gate: 1 if a rival is wrong."""
    wrong = 0
    for case in cases:
        if isinstance(case, Count):
            continue
        clock = clock_of(case.device)
        with clock.session(case.threads):
            check = Gate(case, case.prepare())
            found = {provider: check.refusal(provider) for provider in case.providers}
        print(f"{case.name}  {case.dtype}")
        for provider, refusal in found.items():
            wrong += refusal is not None and refusal.red
            print(report.refusal_line(refusal) if refusal else f"  {provider:<30}right", flush=True)
    print(f"{suite}: {wrong} wrong")
    return 1 if wrong else 0


def _show(suite: str, path: Path) -> None:
    rows = tables.read(path)
    print(getattr(_module(suite), "markdown", tables.markdown)(rows))
    _draw(suite, path)


def _draw(suite: str, path: Path) -> None:
    """The CSV's picture beside it, where the suite has one."""
    module, picture = _module(suite), path.with_suffix(".png")
    rows = tables.read(path)
    if hasattr(module, "draw"):
        module.draw(rows, picture)
    elif hasattr(module, "PICTURE"):
        metric, line = module.PICTURE
        tables.draw(rows, metric, picture, line)
    else:
        return
    if picture.is_file():
        print(f"written: {picture}")


if __name__ == "__main__":
    sys.exit(main())
