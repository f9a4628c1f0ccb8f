"""TPUs that are described and not there, for which libtpu compiles on any machine.

Rates are public figures of the makers of each chip (Jouppi et al., CACM 63 (7), 2020, for v2 and
v3; ISCA 2023, arXiv 2304.01433, for v4; Cloud TPU's pages for the others), the clock is the peak
over what the matrix units do in a cycle. The rates of links are the least sure: not every page says
whether it counts one way or both. The memory is what the compiler lets a program have.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from importlib.util import find_spec

GiB = 2**30


@dataclass(frozen=True)
class Device:
    """What JAX calls a device: a core of v2, v3 and 7x, a chip of the others.

    memory: bytes that a program may take. flops: a second, multiplications and additions in
    bfloat16. bandwidth: of its memory, bytes a second. links: to other chips, all together and one
    way, bytes a second; the other way goes at the same time. clock: cycles a second, None where it
    isn't known.
    """

    generation: str
    memory: float
    flops: float
    bandwidth: float
    links: float
    clock: float | None


def _device(generation, memory, tera, giga, gigabits, clock, devices=1) -> Device:
    return Device(
        generation,
        memory * GiB,
        tera * 1e12 / devices,
        giga * 1e9 / devices,
        gigabits * 1e9 / 8 / devices,
        clock and clock * 1e9,
    )


# generation: memory a device in GiB; of a chip bfloat16 TFLOP/s, memory GB/s, links Gbit/s one way;
# clock in GHz; devices a chip.
DEVICES = {
    "v2": _device("v2", 7.48, 46, 700, 1984, 0.70, 2),
    "v3": _device("v3", 15.48, 123, 900, 2624, 0.94, 2),
    "v4": _device("v4", 30.75, 275, 1228, 2400, 1.05),  # megacore
    "v5e": _device("v5e", 15.75, 197, 819, 1600, 1.50),
    "v5p": _device("v5p", 95.73, 459, 2765, 4800, 1.75),
    "v6e": _device("v6e", 31.24, 918, 1640, 3584, 1.75),
    "tpu7x": _device("tpu7x", 94.74, 2307, 7380, 4800, None, 2),
}
EXAMPLES = "v2:2x2, v3:16x16, v4:8x8x8, v5e:16x16, v5p:4x4x4, v6e:16x16, tpu7x:2x2x1"


@dataclass(frozen=True)
class Topology:
    """A slice of TPUs. devices: JAX's, which programs can be compiled for."""

    name: str
    device: Device
    devices: list


def describe(name: str) -> Topology:
    """The TPUs of `name`, GENERATION:AxB or AxBxC in chips, from libtpu, without a network.

    Raises ValueError for a name that it doesn't know, and where libtpu isn't installed.
    """
    match = re.fullmatch(r"(v2|v3|v4|v5e|v5p|v6e|tpu7x):\d+(x\d+){1,2}", name)
    if match is None:
        raise ValueError(f"topology is {name!r}; it must be like {EXAMPLES}, in chips")
    if find_spec("libtpu") is None:
        raise ValueError(
            f"topology is {name!r}, and compiling for it needs libtpu: pip install 'bit-kernels[tpu]'"
        )
    _keep_to_this_machine()
    from jax.experimental import topologies

    options = {"chip_config_name": "megacore"} if match[1] == "v4" else {}
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except Exception as error:  # libtpu's, of several classes
        raise ValueError(
            f"topology is {name!r}, which libtpu doesn't know ({str(error).splitlines()[0]}); it "
            f"must be like {EXAMPLES}, in chips"
        ) from error
    return Topology(name, DEVICES[match[1]], list(found.devices))


def _keep_to_this_machine() -> None:
    """Have libtpu neither look for TPUs nor ask a metadata server, and share it with others."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    # These name no machine; without them libtpu warns.
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_WORKER_ID", "0")
