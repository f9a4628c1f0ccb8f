"""`python -m bit_kernels`: the state of this installation, for bug reports."""

import os
import platform
import shutil
import sys
from pathlib import Path

import torch

import bit_kernels
from bit_kernels import _library


def lines() -> list[str]:
    native = _library.native
    rows = [
        f"bit_kernels   {bit_kernels.__version__} in {Path(bit_kernels.__file__).parent}",
        f"python        {platform.python_version()} on {platform.platform()}",
        f"torch         {torch.__version__}, {torch.get_num_threads()} threads, "
        f"CPU capability {torch.backends.cpu.get_cpu_capability()}",
        f"processor     {_processor()}",
    ]
    if native is None:
        rows.append(f"native        missing: {_library.why_not}")
    else:
        rows += [
            f"native        {native.__file__}",
            f"built with    {native.compiler()}",
            f"kernels       {native.isa()} (BIT_KERNELS_ISA={os.environ.get('BIT_KERNELS_ISA', '')})",
        ]
    data = _library.data
    rows.append(f"data          {data.__file__ if data else f'missing: {_library.why_not_data}'}")
    cuda = _library.cuda
    if cuda is None:
        rows.append(f"CUDA kernels  missing: {_library.why_not_cuda}")
    else:
        rows.append(
            f"CUDA kernels  {cuda.__file__} for {cuda.architectures()}, nvcc {cuda.compiler()}"
        )
    version = torch.version.cuda or "none: this torch is built without it"
    rows.append(f"CUDA          {version}; nvcc {shutil.which('nvcc') or 'not found'}")
    for op, report in bit_kernels.backends().items():
        rows.append(op)
        rows += [f"  {case:<16} {answer}" for case, answer in report.items()]
    return rows


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    print("\n".join(lines()))
    sys.exit(0)
