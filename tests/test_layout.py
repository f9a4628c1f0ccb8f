"""Every op has all its places, under its one name (CONTRIBUTING.md), and imports point one way."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from bit_kernels import functional, reference

ROOT = Path(__file__).parents[1]
OPS = sorted(functional.__all__)


@pytest.mark.parametrize("op", OPS)
def test_places(op):
    places = [f"bit_kernels/ops/{op}.py", f"csrc/cpu/{op}.cpp", f"tests/ops/test_{op}.py"]
    places += [f"bit_kernels/{kind}/{op}.py" for kind in ("triton", "xla")]
    places += [f"tests/xla/test_{op}.py"]
    # An op made of others' kernels has none of its own; it is those that are timed.
    if op != "norm_relu_conv":
        places += [f"csrc/cpu/{op}_kernel.h", f"benchmarks/ops/{op}.py"]
    for path in places:
        assert (ROOT / path).is_file(), path
    assert callable(getattr(reference, op))
    if op == "mixup":  # takes NumPy arrays and has no gradient: it is none of torch's operators
        assert 'm.def("mixup"' in (ROOT / "csrc/cpu/mixup.cpp").read_text()
        return
    backends = importlib.import_module("bit_kernels.backends")
    assert op in backends.small_elements
    schema = (ROOT / f"bit_kernels/ops/{op}.py").read_text()
    registered = (ROOT / f"csrc/cpu/{op}.cpp").read_text()
    # An op that works in place and gives nothing back has no backward.
    in_place = f'"{op}(Tensor(a!)' in schema
    for name in (op,) if in_place else (op, f"{op}_backward"):
        assert f'"{name}(Tensor' in schema and f'm.impl("{name}"' in registered


def test_no_op_beside_these():
    files = {p.stem for p in (ROOT / "bit_kernels/ops").glob("*.py") if p.stem[0] != "_"}
    assert files == set(OPS)


def imports(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.split(".")[0])
    return found


def test_imports_point_one_way():
    for path in (ROOT / "bit_kernels").rglob("*.py"):
        assert not imports(path) & {"bit", "benchmarks"}, path
    for path in (ROOT / "bit").rglob("*.py"):
        assert "benchmarks" not in imports(path), path
    assert imports(ROOT / "bit/hyperrule.py") == set()


def test_xla_imports_no_torch():
    for path in (ROOT / "bit_kernels/xla").rglob("*.py"):
        assert "torch" not in imports(path), path


def test_xla_works_without_torch():
    pytest.importorskip("jax")
    pytest.importorskip("optax")
    script = """
import sys
sys.modules["torch"] = None  # as where it isn't installed
import bit_kernels.xla
try:
    bit_kernels.StdConv2d
except ImportError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout == "bit_kernels.StdConv2d needs torch, which is not installed here\n", (
        run.stderr
    )


def test_no_pickle_is_loaded():
    for package in ("bit", "bit_kernels", "benchmarks"):
        for path in (ROOT / package).rglob("*.py"):
            assert "pickle" not in imports(path), path
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call):
                    assert ast.unparse(node.func) != "torch.load", path
                    for keyword in node.keywords:
                        if keyword.arg == "allow_pickle":
                            assert ast.unparse(keyword.value) == "False", path
