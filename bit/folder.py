"""The folder of a run or a study: is it free, and if not, is it the same one to go on with."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

# Settings that may differ when a run is resumed: none of them reaches the weights.
RESUMABLE = {
    "root",
    "out",
    "resume",
    "eval_every",
    "save_every",
    "eval_batch",
    "threads",
    "workers",
}


def open_folder(path: str | Path, config: Any, *, resume: bool) -> Path:
    """Make the folder and write `config`, a dataclass tree, into it as config.json.

    Raises ValueError if the folder holds a run and `resume` is off, or if that run was started
    with other settings; the message names them.
    """
    folder = Path(path)
    file = folder / "config.json"
    text = json.dumps(dataclasses.asdict(config), indent=2) + "\n"
    if file.exists():
        if not resume:
            raise ValueError(
                f"out is {str(folder)!r}, which holds a run already; go on with it by --resume, "
                "give --out another folder, or remove this one"
            )
        earlier = json.loads(file.read_text(encoding="utf-8"))
        if changed := differences(earlier, json.loads(text)):
            raise ValueError(
                f"resume is True, but the run in {str(folder)!r} was started with other settings: "
                + "; ".join(changed)
            )
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return folder


def differences(earlier: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """List the settings, "name: earlier -> now", whose change forbids a resume."""
    before, after = _leaves(earlier), _leaves(now)
    return [
        f"{name}: {before.get(name)!r} -> {after.get(name)!r}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name) and name.rpartition(".")[2] not in RESUMABLE
    ]


def _leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            leaves |= _leaves(value, f"{prefix}{name}.")
        else:
            leaves[prefix + name] = value
    return leaves
