"""What a GPU's driver says while it works: clocks, temperature, power, and how busy it was before.

All by nvidia-smi, which is only asked and sets nothing. Where it isn't there, nothing is known.
"""

import contextlib
import shutil
import subprocess
import tempfile
from collections.abc import Iterable

import torch

# name in nvidia-smi -> metric and unit in the CSV
ASKED = {
    "clocks.sm": ("sm_clock", "MHz"),
    "clocks.mem": ("memory_clock", "MHz"),
    "temperature.gpu": ("temperature", "C"),
    "power.draw": ("power", "W"),
}
EVERY_MS = 1000


def driver() -> str | None:
    """The driver's version."""
    return _ask("driver_version")


def busy() -> float | None:
    """Share of the last second in which the GPU had work, whoever's it was."""
    answer = _ask("utilization.gpu")
    with contextlib.suppress(TypeError, ValueError):
        return float(answer) / 100
    return None


class Watch:
    """Asks every second from when it is made until `samples` is called."""

    def __init__(self):
        self._file = tempfile.TemporaryFile("w+")
        self._process = None
        command = _command(",".join(ASKED), f"--loop-ms={EVERY_MS}")
        if command:
            with contextlib.suppress(OSError):
                self._process = subprocess.Popen(
                    command, stdout=self._file, stderr=subprocess.DEVNULL
                )

    def samples(self) -> dict[str, list[float]]:
        """metric of ASKED -> what was seen; without those that the driver doesn't tell."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
        self._file.seek(0)
        return parse(self._file.read().splitlines())


def parse(lines: Iterable[str]) -> dict[str, list[float]]:
    """nvidia-smi's lines of numbers, in the order of ASKED; a line cut short is left out."""
    found: dict[str, list[float]] = {}
    for line in lines:
        cells = line.split(",")
        if len(cells) != len(ASKED):
            continue
        for (metric, _), cell in zip(ASKED.values(), cells):
            with contextlib.suppress(ValueError):  # "[N/A]"
                value = float(cell)
                found.setdefault(metric, []).append(value)
    return found


def _ask(what: str) -> str | None:
    command = _command(what)
    if not command:
        return None
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None if answer.returncode == 0 else None


def _command(what: str, *more: str) -> list[str] | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    # Several GPUs are told apart by their names: torch and the driver count them differently.
    properties = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    unique = getattr(properties, "uuid", None)
    chosen = [f"--id=GPU-{unique}"] if unique else []
    return [program, f"--query-gpu={what}", "--format=csv,noheader,nounits", *chosen, *more]
