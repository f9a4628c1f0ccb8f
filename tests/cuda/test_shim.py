"""The headers that kernels are compiled for the host with: they find what they say they find."""

import ctypes
import re

import on_host
import pytest
import torch

SOURCE = on_host.ROOT / "tests/cuda/shim/faults.cu"

# As in faults.cu, with what is said of each.
FAULTS = {
    "none": None,
    "no_barrier": "other results",
    "barrier_in_a_branch": "wait for others that never come: .* at __syncthreads in line",
    "barriers_of_two_branches": "wait for each other on lines",
    "shuffle_without_all": "62 at a shuffle in line",
    "no_wait_for_copies": "copies that it never waited for",
    "copy_outside": "copy to outside shared memory, line",
    "copy_misaligned": "misaligned asynchronous copy, line",
    "write_outside": "written outside of shared memory",
    "remote_too_early": "before all blocks of the cluster are known to run, line",
    "remote_after_its_end": "block that has begun to end, line|never come",
    "remote_outside": "an address outside shared memory, line",
    "no_cluster_barrier": "other results",
    "arrive_without_wait": "barrier_arrive twice without barrier_wait, line",
    "end_without_wait": "ended after barrier_arrive without barrier_wait",
    "overwritten": "other results",
}


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    return on_host.Host(SOURCE, tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize("fault", FAULTS)
def test_finds(fault, faults):
    values = torch.randint(0, 100, (65,), generator=torch.Generator().manual_seed(0)).float()
    expected = torch.full((128,), 2 * values[:64].sum().item())
    found = []
    for order in (0, 1, 2):
        faults.reset()
        faults.library.shim_order(order)
        output = torch.full((128,), torch.nan)
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (values, output)]
        try:
            faults.call("run_faulty", list(FAULTS).index(fault), *pointers)
        except RuntimeError as error:
            found.append(str(error))
        else:
            found.append("" if torch.equal(output, expected) else "other results")
    if FAULTS[fault] is None:
        assert found == ["", "", ""]
        return
    message = FAULTS[fault]
    assert any(found), "not found in any order"
    for text in filter(None, found):
        assert re.search(message, text), found


@pytest.mark.parametrize(
    "blocks, cluster, threads, shared, message",
    [
        (2, 2, 2048, 0, "a block of too many threads"),
        (3, 2, 64, 0, "a cluster of 2 blocks in a grid of 3"),
        (16, 16, 64, 0, "a cluster of 16 blocks"),
        (2, 2, 64, 49 << 10, "more shared memory than was asked for"),
    ],
)
def test_refuses_launches_that_a_device_refuses(blocks, cluster, threads, shared, message, faults):
    faults.reset()
    with pytest.raises(RuntimeError, match=message):
        faults.call("run_nothing", blocks, cluster, threads, ctypes.c_int64(shared))


def test_refuses_clusters_where_there_are_none(faults):
    faults.reset(major=8)
    with pytest.raises(RuntimeError, match="a device without clusters"):
        faults.call("run_nothing", 2, 2, 64, ctypes.c_int64(0))
