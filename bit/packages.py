"""What a command line needs beside PyTorch, asked for before the imports that would fail."""

from __future__ import annotations

import sys
from importlib.util import find_spec


def require(prog: str, *names: str) -> None:
    """Exit with code 2 and one line on what to install, where one of the packages is missing."""
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        told = f"{' and '.join(missing)} can't be imported; pip install {' '.join(missing)}"
        print(f"{prog}: error: {told}", file=sys.stderr)
        sys.exit(2)
