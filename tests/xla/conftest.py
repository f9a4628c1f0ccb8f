"""JAX as these tests need it: on the CPU, as eight devices. Set before anything imports it."""

import os
import tempfile
from importlib.util import find_spec

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
DEVICES = "--xla_force_host_platform_device_count=8"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DEVICES}".strip()

if not all(map(find_spec, ("jax", "flax", "optax"))):
    collect_ignore_glob = ["test_*.py"]
else:
    import jax

    # The same programs are compiled by many tests.
    jax.config.update("jax_compilation_cache_dir", tempfile.mkdtemp(prefix="xla-tests-"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


@pytest.fixture(scope="module")
def x64():
    """float64 in all threads for a module's tests; jax.enable_x64 is of one thread."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)
