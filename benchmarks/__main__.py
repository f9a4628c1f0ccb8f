"""python -m benchmarks SUITE: measures, prints a table, and writes a CSV.

Examples:
  python -m benchmarks ops --quick
  python -m benchmarks ops --filter group_norm_relu/r50x1 backward --threads 2
  python -m benchmarks ops --out benchmarks/results/ops-mymachine.csv --markdown
"""

import argparse
import importlib
import sys
from datetime import datetime, timezone
from pathlib import Path

from benchmarks import machine, report
from benchmarks.runner import COPY, CopyLimit, Result, measure

RESULTS = Path(__file__).parent / "results"
SUITES = {
    # name -> module with cases(*, threads, dtypes, quick, compiled) -> list of runner.Case
    "ops": "benchmarks.ops",
    "data": "benchmarks.ops.mixup",
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
    suite = importlib.import_module(SUITES[options.suite])
    cases = [
        case
        for case in suite.cases(
            threads=options.threads,
            dtypes=options.dtype,
            quick=options.quick,
            compiled=options.compile,
        )
        if all(part in case.name for part in options.filter)
    ]
    if not cases:
        parser.error(
            f"--filter is {' '.join(options.filter)}; no case has that in its name (see --list)"
        )
    if options.list:
        print("\n".join(dict.fromkeys(case.name for case in cases)))
        return 0
    try:
        out = report.CsvFile(options.out or _default_out(options))
    except ValueError as error:
        parser.error(str(error))
    rounds = options.rounds or (7 if options.quick else 15)
    return _run(options.suite, cases, rounds, options.seed, out, options.markdown)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--quick", action="store_true", help="few cases, few rounds: a minute")
    parser.add_argument(
        "--threads",
        type=int,
        nargs="+",
        default=sorted({1, machine.cores()}),
        metavar="N",
        help="numbers of threads (default: 1 and all cores)",
    )
    parser.add_argument(
        "--filter",
        nargs="+",
        default=[],
        metavar="SUBSTRING",
        help="only cases with all of these in their name",
    )
    parser.add_argument(
        "--dtype",
        nargs="+",
        default=["float32"],
        choices=["float32", "bfloat16", "float16"],
    )
    parser.add_argument("--rounds", type=int, help="samples a figure (default: 15, quick: 7)")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the rivals")
    parser.add_argument(
        "--compile",
        action="store_true",
        help="also time torch.compile of the eager rival; needs a C++ compiler, and minutes",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="CSV",
        help="file to append to (default: a new one in benchmarks/results)",
    )
    parser.add_argument(
        "--markdown",
        action="store_true",
        help="also write a table beside the CSV, as .md",
    )
    parser.add_argument("--list", action="store_true", help="print the names of the cases and stop")
    return parser


def _default_out(options: argparse.Namespace) -> Path:
    kind = f"{options.suite}-quick" if options.quick else options.suite
    return RESULTS / f"{kind}-{datetime.now(timezone.utc):%Y-%m-%d-%H%M%S}.csv"


def _run(suite, cases, rounds: int, seed: int, out: report.CsvFile, markdown: bool) -> int:
    large = any(case.necessary_bytes for case in cases)
    keeps = machine.keep_freed_memory(RESERVE if large else RESERVE // 8)
    run = report.Run(
        machine.device(),
        machine.versions(),
        datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )
    print(f"{run.device}\n{run.versions}\n{len(cases)} cases, {rounds} rounds each")
    if not keeps:
        print("warning: malloc can't be told to keep memory here, so page faults are timed")
    busy = machine.load_at_rest()
    if busy > BUSY:
        print(f"warning: others use {busy:.1f} of {machine.cores()} cores; figures will be off")
    out.append([report.load_row(suite, "at start", busy, run)])
    load = machine.Load()
    copy = CopyLimit()
    results: list[Result] = []
    interrupted = False
    print(f"\n{report.HEADER}")
    try:
        for case in cases:
            results.append(measure(case, copy, rounds=rounds, seed=seed))
            out.append(report.rows(results[-1], run))
            print("\n".join(report.lines(results[-1])), flush=True)
    except KeyboardInterrupt:
        interrupted = True
        print(f"\ninterrupted after {len(results)} of {len(cases)} cases", file=sys.stderr)
    limits = report.limit_rows(suite, results, run)
    out.append(limits)
    print()
    for row in limits:
        print(f"{COPY}, {row.threads} thread(s): {row.p50} GB/s ({row.p20} to {row.p80})")
    busy = load.others()
    if busy is not None:
        out.append([report.load_row(suite, "during the run", busy, run)])
        if busy > BUSY:
            print(f"warning: others used {busy:.1f} cores during the run; figures may be off")
    print("\n".join(report.summary(results)))
    print(f"written: {out.path}")
    if markdown:
        path = out.path.with_suffix(".md")
        path.write_text(report.markdown(suite, results, run))
        print(f"written: {path}")
    if interrupted:
        return 130
    return 1 if any(result.red for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
