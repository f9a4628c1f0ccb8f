"""python -m benchmarks SUITE: measures, prints, and writes a CSV and a picture.

Examples:
  python -m benchmarks all --quick
  python -m benchmarks ops --filter group_norm_relu/r50x1 backward --threads 2
  python -m benchmarks step --filter x224 --rivals bit/ timm/ --rounds 21
  python -m benchmarks step --markdown        the table of what was measured before
"""

import argparse
import dataclasses
import importlib
import sys
from datetime import datetime, timezone
from pathlib import Path
from types import ModuleType

from benchmarks import machine, report, tables
from benchmarks.runner import Case, CopyLimit, Count, MatrixLimit, Result, measure

RESULTS = Path(__file__).parent / "results"
SUITES = {
    # name -> module with cases(*, threads, dtypes, quick, compiled) -> list of runner.Case and
    # runner.Count. It may have MEASURED_DTYPES, if nobody says which; draw(rows, path), or PICTURE =
    # (metric, value at which a line is drawn); markdown(rows).
    "ops": "benchmarks.ops",
    "step": "benchmarks.step",
    "memory": "benchmarks.memory",
    "data": "benchmarks.data",
    "inference": "benchmarks.inference",
    "accuracy": "benchmarks.accuracy",
}
RESERVE = 3 << 29  # bytes that the largest case takes, with rivals' leftovers and fragments
BUSY = 0.1  # cores in use by others from which a machine isn't quiet


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0, or 1 if a rival has no figure, or 2 for bad arguments, or 130 for Ctrl-C."""
    parser = _parser()
    options = parser.parse_args(arguments)
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
        cases = {suite: _cases(suite, options) for suite in suites}
        if not any(cases.values()):
            parser.error(_nothing_left(options))
        if options.list:
            print("\n".join(dict.fromkeys(one.name for found in cases.values() for one in found)))
            return 0
        files = {suite: report.CsvFile(_out(suite, options)) for suite in suites if cases[suite]}
    except ValueError as error:
        parser.error(str(error))
    rounds = options.rounds or (7 if options.quick else 15)
    statuses = []
    for suite, out in files.items():
        statuses.append(_run(suite, cases[suite], rounds, options.seed, out))
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
    parser.add_argument("--quick", action="store_true", help="small or few cases: a minute a suite")
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
        "processor has instructions for it, and for memory bfloat16, too)",
    )
    parser.add_argument("--rounds", type=int, help="samples a figure (default: 15, quick: 7)")
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
    # Only ops are so short that one thread and all of them tell different things.
    alone = {1} if suite in ("ops", "data") else set()
    more = {"data": options.data} if suite == "accuracy" else {}
    found = [
        case
        for case in module.cases(
            threads=options.threads or sorted({*alone, machine.cores()}),
            dtypes=options.dtype or list(getattr(module, "MEASURED_DTYPES", ("float32",))),
            quick=options.quick,
            compiled=options.compile,
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


def _nothing_left(options: argparse.Namespace) -> str:
    asked = [
        f"--{name} is {' '.join(values)}"
        for name in ("filter", "rivals", "dtype")
        if (values := getattr(options, name))
    ]
    return f"{', '.join(asked)}; no case has that (see --list)"


def _module(suite: str) -> ModuleType:
    return importlib.import_module(SUITES[suite])


def _out(suite: str, options: argparse.Namespace) -> Path:
    kind = f"{suite}-quick" if options.quick else suite
    return options.out or RESULTS / f"{kind}-{machine.short_name()}.csv"


def _run(suite: str, cases: list[Case | Count], rounds: int, seed: int, out: report.CsvFile) -> int:
    timed = any(isinstance(case, Case) for case in cases)
    large = any(isinstance(case, Case) and (case.necessary_bytes or case.images) for case in cases)
    keeps = not timed or machine.keep_freed_memory(RESERVE if large else RESERVE // 8)
    run = report.Run(
        machine.device(),
        machine.versions(),
        datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )
    print(f"{run.device}\n{run.versions}\n{suite}: {len(cases)} cases")
    if not keeps:
        print("warning: malloc can't be told to keep memory here, so page faults are timed")
    busy = machine.load_at_rest()
    if busy > BUSY:
        print(f"warning: others use {busy:.1f} of {machine.cores()} cores; figures will be off")
    out.append([report.load_row(suite, "at start", busy, run)])
    load = machine.Load()
    results: list[Result] = []
    done = 0
    if timed:
        copy, matrix = CopyLimit(), MatrixLimit()
        print(f"{rounds} rounds each\n\n{report.HEADER}")
    try:
        for case in cases:
            if isinstance(case, Count):
                _count(case, out, run)
            else:
                network = matrix if case.images else None
                results.append(measure(case, copy, matrix=network, rounds=rounds, seed=seed))
                out.append(report.rows(results[-1], run))
                print("\n".join(report.lines(results[-1])), flush=True)
            done += 1
    except KeyboardInterrupt:
        print(f"\ninterrupted after {done} of {len(cases)} cases", file=sys.stderr)
    limits = report.limit_rows(suite, results, run)
    out.append(limits)
    print()
    for row in limits:
        print(
            f"{row.provider}, {row.threads} thread(s): {row.p50} {row.unit} ({row.p20} to {row.p80})"
        )
    busy = load.others()
    if busy is not None:
        out.append([report.load_row(suite, "during the run", busy, run)])
        if busy > BUSY:
            print(f"warning: others used {busy:.1f} cores during the run; figures may be off")
    print("\n".join(report.summary(results)))
    print(f"written: {out.path}")
    _draw(suite, out.path)
    if done < len(cases):
        return 130
    return 1 if any(result.red for result in results) else 0


def _count(case: Count, out: report.CsvFile, run: report.Run) -> None:
    """Takes a case's figures; each is on disk as soon as it is there."""
    print(report.heading(case), flush=True)
    for figure in case.take():
        out.append([report.row(case, figure, run)])
        print(report.figure_line(figure), flush=True)


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
