"""Which packages are here: what a command needs is asked for before the imports that would fail."""

from __future__ import annotations

import sys
from importlib.util import find_spec


def missing(*names: str) -> list[str]:
    """Those of the packages that can't be imported here."""
    return [name for name in names if find_spec(name) is None]


def require(prog: str, *names: str) -> None:
    """Exit with code 2 and one line on what to install, where one of the packages is missing."""
    if absent := missing(*names):
        told = f"{' and '.join(absent)} can't be imported; pip install {' '.join(absent)}"
        print(f"{prog}: error: {told}", file=sys.stderr)
        sys.exit(2)
