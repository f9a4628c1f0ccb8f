"""The kernels, compiled for the host once a run; every test starts with the same device."""

import on_host
import pytest


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cuda")


@pytest.fixture(scope="session")
def group_norm_kernels(folder):
    return on_host.GroupNorm(folder)


@pytest.fixture
def group_norm(group_norm_kernels):
    group_norm_kernels.reset()
    return group_norm_kernels


@pytest.fixture(scope="session")
def sgd_kernels(folder):
    return on_host.Sgd(folder)


@pytest.fixture
def sgd(sgd_kernels):
    sgd_kernels.reset()
    return sgd_kernels


@pytest.fixture(scope="session")
def ops_on_host(group_norm_kernels, sgd_kernels, folder):
    on_host.load_ops(folder)
