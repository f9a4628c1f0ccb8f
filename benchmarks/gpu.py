"""python benchmarks/gpu.py: builds, tests and measures on a GPU, the most important first.

For a machine that is lent for minutes and has no network: Python, torch, triton and nvcc are there,
everything else may be missing and is named. Each part is a process of its own with a limit of time,
so that a broken kernel or a full memory ends one part, and what was measured before is on disk.

A call takes 9 minutes at most. The first does the most important parts, build to step_large, and of
the others those for which time is left. What takes minutes of compiling or trying is for a second
and a third: the fused convolution (tune, step_tuned), then compiled rivals and compute-sanitizer.

A part that is cut off by its limit, or for which no time is left, or a package is missing, is named
but not red.

Leaves in the folder --out (default: $OUT, else benchmarks/results) a CSV and a picture a suite, the
log gpu.log with all output, and the summary gpu-GPU.md. The part tune measures which convolutions
are faster fused, writes that into the table by which norm_relu_conv chooses from then on, and leaves
a copy; the part step_tuned shows what it brings. Exit status: 0, or 1 if anything is red, or 2
without a GPU.

Examples:
  python benchmarks/gpu.py                          the most important parts, in 9 minutes
  python benchmarks/gpu.py --only build tune step_tuned
  python benchmarks/gpu.py --only build compiled ops_compiled memcheck racecheck
  python benchmarks/gpu.py --skip tests --minutes 4
"""

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "bit_kernels" / "triton" / "norm_relu_conv.csv"
PYTHON = sys.executable
PATIENCE = 12  # seconds in which a part that was interrupted writes down what it has
ARCHIVE = "results.zip"
CUT_OFF = -1  # status of a part whose time was over
LEAST = 15  # seconds below which a part is not begun
CSVS = ("step", "step_tuned", "ops", "memory", "inference", "data")
PACKAGES = (  # what is for: its import name
    ("the build", "ninja"),
    ("the build", "pybind11"),
    ("tests", "pytest"),
    ("tests of torch's operators (opcheck)", "expecttest"),
    ("rivals in every suite of networks", "timm"),
    ("a rival in ops", "liger_kernel"),
    ("a rival in ops", "apex"),
    ("training, in data and accuracy, and saved bytes in memory", "tyro"),
    ("training, in data and accuracy", "tqdm"),
)
# What is asked of the GPU: its name in files, then in full, versions, its compute capability.
NAMES = """
import torch
from benchmarks import machine
print(machine.short_name("cuda"))
print(machine.device("cuda"))
print(machine.versions("cuda"))
print(*torch.cuda.get_device_capability())
"""


@dataclass(frozen=True)
class Part:
    """name: for --only and --skip; command: of Python, or options of the suite; seconds: at most;
    suite: which it runs; budget: seconds in which that still begins cases; csv: which it writes, that
    of its suite if None; needs: packages without which it is left out.
    """

    name: str
    command: tuple[str, ...]
    seconds: int
    suite: str | None = None
    budget: int = 0
    csv: str | None = None
    needs: tuple[str, ...] = ()


STEP = ("--rounds", "7", "--filter")
SANITIZE = ("-m", "benchmarks", "ops", "--device", "cuda", "--sanitize")
TESTS = (  # the first have not run elsewhere
    "tests/cuda/test_on_a_gpu.py",
    "tests/ops",
    "tests/triton",
    "tests/training/test_cuda.py",
)
PARTS = (
    Part(
        "build",
        ("setup.py", "--quiet", "build_ext", "--inplace", "--parallel", "3"),
        50,
        needs=("ninja", "pybind11"),
    ),
    Part("tests", ("-m", "pytest", *TESTS, "-q", "--maxfail=30"), 70, needs=("pytest",)),
    Part("step", (*STEP, "R50x1"), 120, "step", 60),
    Part("ops", (), 50, "ops", 35),
    Part("memory", (), 90, "memory", 75),
    Part("step_large", (*STEP, "R152x4"), 100, "step", 60),
    # Until here all are begun within 9 minutes, even if each is cut off.
    Part("inference", (), 40, "inference", 25),
    Part("data", (), 30, "data", 15),
    Part("tune", ("-m", "bit_kernels.triton.tune"), 300),
    # In a file of its own, since of a case that is measured again only the newest run is read.
    Part(
        "step_tuned",
        (*STEP, "R50x1", "--rivals", "bit", "conv_only"),
        100,
        "step",
        60,
        "step_tuned",
    ),
    Part("compiled", (*STEP, "R50x1", "compiled", "--compile"), 200, "step", 60),
    Part(
        "ops_compiled",
        (
            "--compile",
            "--dtype",
            "bfloat16",
            "--filter",
            "group_norm_relu",
            "/32x",
            "channels_last",
        ),
        90,
        "ops",
        60,
    ),
    Part("memcheck", (*SANITIZE, "memcheck"), 200),
    Part("racecheck", (*SANITIZE, "racecheck"), 200),
)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [part.name for part in PARTS]
    parser.add_argument("--out", type=Path, help="folder for results")
    parser.add_argument("--minutes", type=float, default=9.0, help="in all (default: 9)")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="PART")
    parser.add_argument("--skip", nargs="+", choices=names, default=[], metavar="PART")
    parser.add_argument(
        "--few-files",
        action="store_true",
        help="CSVs and pictures in one archive, results.zip, where few files come back",
    )
    options = parser.parse_args()
    deadline = time.monotonic() + 60 * options.minutes
    out = options.out or Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results")
    out = out.resolve()
    if options.few_files and (out / ARCHIVE).exists():
        parser.error(f"--few-files writes {out / ARCHIVE}, which is there already")
    out.mkdir(parents=True, exist_ok=True)
    with (out / "gpu.log").open("a") as file:
        log = Log(file)
        try:
            status = _run(options, out, log, deadline)
        except KeyboardInterrupt:
            log.say("interrupted")
            status = 130
    return status


class Log:
    """Screen and file; lines come from one thread after the other."""

    def __init__(self, file):
        self._file = file

    def say(self, line: str) -> None:
        print(line, flush=True)
        self._file.write(line + "\n")
        self._file.flush()


def _run(options: argparse.Namespace, out: Path, log: Log, deadline: float) -> int:
    described = _describe(log)
    if described is None:
        return 2
    gpu, architecture = described
    red, unfinished, left_out = [], [], []
    for part in PARTS:
        if part.name not in options.only or part.name in options.skip:
            continue
        if missing := [name for name in part.needs if importlib.util.find_spec(name) is None]:
            log.say(f"== {part.name}: left out; pip install {' '.join(missing)}")
            left_out.append(part.name)
            continue
        left = deadline - time.monotonic()
        if left < LEAST:
            log.say(f"== {part.name}: not begun, {left:.0f} s are left")
            unfinished.append(part.name)
            continue
        limit = min(part.seconds, left - PATIENCE / 2)
        began = time.monotonic()
        status = execute(
            _command(part, out, gpu, limit), limit, log, _environment(part, architecture)
        )
        log.say(f"== {part.name}: status {status} after {time.monotonic() - began:.0f} s")
        if status == CUT_OFF:
            unfinished.append(part.name)
        elif status:
            red.append(f"{part.name} (status {status})")
        if part.name == "tune":
            shutil.copy(TABLE, out)
        _summarise(out, gpu, log if part.suite else None)
    if options.few_files:
        _pack(out, gpu)
    if left_out:
        log.say(f"left out: {', '.join(left_out)}")
    if unfinished:
        log.say(f"not finished: {', '.join(unfinished)}")
    log.say(f"red: {', '.join(red)}" if red else "nothing is red")
    log.say(f"results: {out}")
    return 1 if red else 0


def _describe(log: Log) -> tuple[str, str] | None:
    """Says what is here and what is missing; the GPU's short name and its architecture as nvcc is
    given it, None if there is no GPU.
    """
    log.say(f"Python {sys.version.split()[0]}, {os.cpu_count()} cores")
    log.say(f"nvcc: {_nvcc() or 'not here, so the CUDA C++ kernels are left out'}")
    for purpose, package in PACKAGES:
        if importlib.util.find_spec(package) is None:
            log.say(f"missing: {package}, for {purpose}")
    asked = subprocess.run([PYTHON, "-c", NAMES], cwd=ROOT, capture_output=True, text=True)
    lines = asked.stdout.splitlines()
    if asked.returncode or len(lines) < 4:
        said = (asked.stderr.strip().splitlines() or ["no word"])[-1]
        log.say(f"there is no GPU to measure on, or no library to ask: {said}")
        return None
    log.say("\n".join(lines[:3]))
    major, minor = lines[3].split()
    return lines[0], f"{major}{minor}{'a' if int(major) >= 9 else ''}"


def _nvcc() -> str | None:
    """On PATH, or where toolkits are installed and nobody has put them there."""
    installed = sorted(Path("/usr/local").glob("cuda*/bin/nvcc"))
    return shutil.which("nvcc") or (str(installed[-1]) if installed else None)


def _environment(part: Part, architecture: str) -> dict[str, str]:
    more = {"PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *_paths()])}
    if part.name == "tests":
        more["DEVICE"] = "cuda"
    if part.name == "build":
        chosen = os.environ.get("BIT_KERNELS_CUDA_ARCHS")
        more["BIT_KERNELS_CUDA_ARCHS"] = chosen or architecture  # others take as long again, each
        if nvcc := _nvcc():
            more["NVCC"] = nvcc
    return os.environ | more


def _paths() -> list[str]:
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]


def _command(part: Part, out: Path, gpu: str, limit: float) -> list[str]:
    if part.name == "tests":
        command = [PYTHON, *part.command]
        if not list((ROOT / "bit_kernels").glob("_cuda*.so")):
            command.remove("tests/cuda/test_on_a_gpu.py")
        if importlib.util.find_spec("tyro") is None:
            command.remove("tests/training/test_cuda.py")
        if importlib.util.find_spec("xdist"):
            command += ["-n", "8"]  # kernels are compiled on the host
        if importlib.util.find_spec("expecttest") is None:
            command += ["-k", "not opcheck"]
        return command
    if part.suite is None:
        return [PYTHON, *part.command]
    csv = out / f"{part.csv or part.suite}-{gpu}.csv"
    budget = str(max(5, int(min(part.budget, limit - PATIENCE))))
    suite = ["-m", "benchmarks", part.suite, "--device", "cuda", "--out", str(csv)]
    return [PYTHON, *suite, "--seconds", budget, *part.command]


def execute(command: list[str], limit: float, log: Log, environment: dict[str, str]) -> int:
    """The command's exit status; CUT_OFF if it was interrupted after `limit` seconds, and killed if
    it didn't mind. All that it prints is logged as it comes.
    """
    log.say(f"\n$ {' '.join(command)}   (at most {limit:.0f} s)")
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # so that what it has started can be ended with it
    )
    reader = threading.Thread(target=lambda: [log.say(line.rstrip()) for line in process.stdout])
    reader.start()
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        log.say(f"{limit:.0f} s are over")
        _end(process)
        return CUT_OFF
    except KeyboardInterrupt:
        _end(process)
        raise
    finally:
        reader.join(PATIENCE)


def _end(process: subprocess.Popen) -> None:
    for how in (signal.SIGINT, signal.SIGKILL):
        try:
            os.killpg(process.pid, how)
            process.wait(PATIENCE / 2)
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:  # it is through
            break


def _summarise(out: Path, gpu: str, log: Log | None) -> None:
    """The summary so far; said, too, where a suite has just ended."""
    from benchmarks import goals

    text = goals.summary({name: out / f"{name}-{gpu}.csv" for name in CSVS})
    (out / f"gpu-{gpu}.md").write_text(text)
    if log is not None:
        log.say(text)


def _pack(out: Path, gpu: str) -> None:
    """What this GPU's suites left, from the folder into one file."""
    found = sorted([*out.glob(f"*-{gpu}.csv"), *out.glob(f"*-{gpu}.png")])
    with zipfile.ZipFile(out / ARCHIVE, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in found:
            archive.write(path, path.name)
    for path in found:
        path.unlink()


if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    sys.exit(main())
