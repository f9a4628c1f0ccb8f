"""What exactly was run. A recipe is a file here with one function, `config()`.

Its docstring gives command, hardware, minutes and result; its first line is the help text of the
command, which has the file's name with dashes.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any


def configs() -> dict[str, tuple[str, Any]]:
    """Return for each recipe's command the first line of its docstring and its configuration."""
    found = {}
    for module in pkgutil.iter_modules(__path__):
        recipe = importlib.import_module(f"{__name__}.{module.name}").config
        first_line = recipe.__doc__.strip().splitlines()[0]
        found[module.name.replace("_", "-")] = (first_line, recipe())
    return found
