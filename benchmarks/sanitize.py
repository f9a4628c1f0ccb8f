"""The ops' gate under the tools of compute-sanitizer: memory, races inside a block, barriers.

Each tool watches a process of its own that runs every op once, forward and backward, on small
shapes. It takes ten to a hundred times as long as without; what it says is printed as it comes, so
that a run which is cut short has told what it found.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

TOOLS = ("memcheck", "racecheck", "synccheck")
FOUND = 9  # exit status for what a tool found, beside the command's own
COMMAND = ("-m", "benchmarks", "ops", "--device", "cuda", "--quick", "--check")
OURS = ("--rivals", "triton", "cuda", "eager", "--dtype", "bfloat16", "float32")


def program() -> str | None:
    """Where compute-sanitizer is."""
    homes = [
        os.environ.get("CUDA_HOME"),
        "/usr/local/cuda",
        *sorted(Path("/usr/local").glob("cuda-*")),
    ]
    places = [Path(home) / "bin" / "compute-sanitizer" for home in homes if home]
    found = shutil.which("compute-sanitizer")
    return found or next((str(place) for place in places if place.is_file()), None)


def run(tools: Sequence[str] = TOOLS) -> int:
    """0 if no tool found anything, 1 if one did or could not run, with what it said."""
    sanitizer = program()
    if sanitizer is None:
        print("compute-sanitizer is not here; it comes with the CUDA toolkit (PATH or CUDA_HOME)")
        return 1
    return max(_run(sanitizer, tool) for tool in tools)


def _run(sanitizer: str, tool: str) -> int:
    command = [
        sanitizer,
        f"--tool={tool}",
        f"--error-exitcode={FOUND}",
        "--print-limit=20",
        sys.executable,
        *COMMAND,
        *OURS,
    ]
    # Without the allocator's pools every tensor has bounds of its own.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, cwd=Path(__file__).parents[1], env=environment)
    status = {0: "nothing found", FOUND: "FOUND ERRORS"}.get(
        done.returncode, f"the checks failed with status {done.returncode}"
    )
    print(f"{tool}: {status}", flush=True)
    return 1 if done.returncode else 0
