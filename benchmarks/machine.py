"""What the figures of a run depend on: processor, caches, versions, other work, the allocator.

`kind` is "cpu" or "cuda". What a GPU's driver says of its clocks is in gpu_state.py.
"""

import contextlib
import ctypes
import importlib.metadata
import os
import platform
import re
import resource
import subprocess
import time
from pathlib import Path

import torch

import bit_kernels
from benchmarks import gpu_state

CPU = Path("/sys/devices/system/cpu")
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h


def cache_bytes(level: int) -> int | None:
    """Size in bytes of the first core's data (or unified) cache of `level`; None if not known."""
    for entry in sorted((CPU / "cpu0/cache").glob("index*")):
        try:
            kind = (entry / "type").read_text().strip()
            if int((entry / "level").read_text()) != level or kind == "Instruction":
                continue
            size = (entry / "size").read_text().strip()
        except (OSError, ValueError):
            continue
        return int(size.rstrip("KMG")) << {"K": 10, "M": 20, "G": 30}.get(size[-1], 0)
    return None


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def short_name(kind: str = "cpu") -> str:
    """The processor as a part of file names, for instance "epyc-2-cores" or "h100-80gb-hbm3"."""
    if kind == "cuda":
        words = re.findall(r"[a-z0-9]+", torch.cuda.get_device_name(0).lower())
        return "-".join(word for word in words if word not in ("nvidia", "amd"))
    model = re.sub(r"\(.*?\)|@.*|\b(AMD|Intel|CPU|Processor|\d+-Core)\b", " ", _model())
    words = re.findall(r"[a-z0-9]+", model.lower())
    return "-".join([*words, f"{cores()}-cores"])


def device(kind: str = "cpu") -> str:
    """The processor in one line, for instance "AMD EPYC, 2 cores, AVX512, L2 1 MiB, L3 32 MiB", or
    "NVIDIA H100 80GB HBM3, 132 multiprocessors, 79 GiB, L2 50 MiB".
    """
    if kind == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        return (
            f"{gpu.name}, {gpu.multi_processor_count} multiprocessors, "
            f"{gpu.total_memory >> 30} GiB, L2 {gpu.L2_cache_size >> 20} MiB"
        )
    parts = [_model(), f"{cores()} cores", torch.backends.cpu.get_cpu_capability()]
    for level in (2, 3):
        size = cache_bytes(level)
        if size:
            amount = f"{size >> 20} MiB" if size >= 1 << 20 else f"{size >> 10} KiB"
            parts.append(f"L{level} {amount}")
    return ", ".join(parts)


def versions(kind: str = "cpu") -> str:
    """Versions that the figures belong to, with the checkout's commit ("+" when it was edited)."""
    parts = [
        f"torch {torch.__version__}",
        f"bit_kernels {bit_kernels.__version__}",
        f"python {platform.python_version()}",
    ]
    if kind == "cuda":
        parts.append(f"CUDA {torch.version.cuda or torch.version.hip}")
        parts.append(f"cuDNN {torch.backends.cudnn.version()}")
        driver = gpu_state.driver()
        parts += [f"driver {driver}"] if driver else []
    rivals = ("timm", "onnxruntime", "torchvision", "jax", "libtpu")
    on_gpu = ("triton", "timm", "liger-kernel", "apex")
    for rival in on_gpu if kind == "cuda" else rivals:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            parts.append(f"{rival} {importlib.metadata.version(rival)}")
    commit = _git("rev-parse", "--short", "HEAD")
    if commit:
        parts.append(f"commit {commit}{'+' if _git('status', '--porcelain', '-uno') else ''}")
    return "; ".join(parts)


def _git(*arguments: str) -> str:
    try:
        answer = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout.strip() if answer.returncode == 0 else ""


def keep_freed_memory(reserve: int) -> bool:
    """Makes malloc keep what is freed, and gives it `reserve` bytes to start; False if it can't.

    A long training process has all the memory it will use. A young one is given its outputs page
    by page as it first writes to them: on a virtual machine that took ten times as long as the
    kernel that was to be timed, and hid every difference between rivals. Keeping alone isn't
    enough: before 2.38 glibc seldom reuses an aligned block for another of the same size.
    """
    libc = ctypes.CDLL(None) if os.name == "posix" else None
    mallopt = getattr(libc, "mallopt", None)
    if mallopt is None or not (mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1)):
        return False
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    size = min(reserve, os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4)
    block = libc.malloc(size)
    if block:
        ctypes.memset(block, 1, size)
    libc.free(block)
    return bool(block)


def page_faults() -> int:
    """Pages of memory that this process was given so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


class Load:
    """How many cores other processes (or the hypervisor) kept busy since this object was made."""

    def __init__(self):
        self._start = time.perf_counter(), self._busy(), self._own()

    def others(self) -> float | None:
        """Mean number of cores in use by others, from Linux' /proc/stat; None elsewhere."""
        start, busy, own = self._start
        if busy is None:
            return None
        ours = self._own() - own
        return max(0.0, (self._busy() - busy - ours) / (time.perf_counter() - start))

    @staticmethod
    def _own() -> float:
        """Seconds on cores of this process and of its children that have ended."""
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return time.process_time() + children.ru_utime + children.ru_stime

    @staticmethod
    def _busy() -> float | None:
        try:
            fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        except OSError:
            return None
        user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields)
        return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def load_at_rest(seconds: float = 0.5) -> float:
    """Cores in use by others while this process sleeps for `seconds`; else the load average."""
    load = Load()
    time.sleep(seconds)
    others = load.others()
    return os.getloadavg()[0] if others is None else others
