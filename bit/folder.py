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
    "distributed",
    "eval_every",
    "save_every",
    "eval_batch",
    "threads",
    "workers",
}


def check_folder(folder: Path, config: Any, *, resume: bool) -> None:
    """Raise ValueError if the folder holds a run that `config`, a dataclass tree, can't go on with.

    That is any run if `resume` is off, else one with other settings; the message names them.
    """
    file = folder / "config.json"
    if not file.exists():
        return
    if not resume:
        raise ValueError(
            f"out is {str(folder)!r}, which holds a run already; go on with it by --resume, give "
            "--out another folder, or remove this one"
        )
    earlier = json.loads(file.read_text(encoding="utf-8"))
    if changed := differences(earlier, json.loads(_text(config)), _defaults(config)):
        raise ValueError(
            f"resume is True, but the run in {str(folder)!r} was started with other settings: "
            + "; ".join(changed)
        )


def write_config(folder: Path, config: Any) -> None:
    """Make the folder, if need be, and write `config` into it as config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(_text(config), encoding="utf-8")


def differences(
    earlier: dict[str, Any], now: dict[str, Any], defaults: dict[str, Any]
) -> list[str]:
    """List the settings, "name: earlier -> now", whose change forbids a resume.

    A setting that the earlier run didn't know yet had its default's effect.
    """
    before, after = _leaves(defaults) | _leaves(earlier), _leaves(now)
    return [
        f"{name}: {before.get(name)!r} -> {after.get(name)!r}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name) and name.rpartition(".")[2] not in RESUMABLE
    ]


def _defaults(config: Any) -> dict[str, Any]:
    """Of a dataclass tree, as far as its settings have any."""
    found = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            found[field.name] = _defaults(value)
        elif field.default is not dataclasses.MISSING:
            found[field.name] = field.default
    return found


def _text(config: Any) -> str:
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def _leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            leaves |= _leaves(value, f"{prefix}{name}.")
        else:
            leaves[prefix + name] = value
    return leaves
