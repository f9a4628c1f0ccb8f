"""The command line of `python -m bit.train`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable

import tyro

from bit import allocator, demo, recipes, train, transfer
from bit.config import FINETUNE, PRETRAIN, Config

PROG = "python -m bit.train"
DESCRIPTION = (
    "Big Transfer: pre-train a network, fine-tune it by the BiT-HyperRule, or run a recipe. "
    "Without an argument: the demo."
)


def commands() -> dict[str, tuple[str, Config | transfer.Study]]:
    """Return what may be run: a description and the default configuration for each name."""
    return {
        "pretrain": ("Train from random weights by a BiT-S, BiT-M or BiT-L schedule.", PRETRAIN),
        "finetune": ("Train by the BiT-HyperRule, from a checkpoint or from nothing.", FINETUNE),
        "transfer-study": (
            "Pre-train once, then transfer to several data sets, against training from scratch.",
            transfer.Study(),
        ),
        "demo": ("All of it in small, on data that comes with scikit-learn.", demo.config()),
        **recipes.configs(),
    }


def parse(args: list[str]) -> Config | transfer.Study:
    """Parse a command line that starts with a command; exits with code 2 where it can't."""
    known = commands()
    kinds = tyro.extras.subcommand_type_from_defaults(
        {name: default for name, (_, default) in known.items()},
        {name: description for name, (description, _) in known.items()},
        prefix_names=False,
        sort_subcommands=False,
    )
    return tyro.cli(
        kinds,
        args=args,
        prog=PROG,
        description=DESCRIPTION,
        config=(tyro.conf.FlagCreatePairsOff,),
    )


def main(args: list[str] | None = None) -> int:
    """Run a command line and return its exit code: 0, 1 failed, 2 wrong, 128 + signal stopped."""
    args = (sys.argv[1:] if args is None else args) or ["demo"]
    config = parse(args)
    allocator.keep_memory()

    def command() -> None:
        if args[0] == "demo":
            demo.show(config)
        elif isinstance(config, transfer.Study):
            report = transfer.study(config)
            print(f"{report.text()}\n\nEverything is in {report.folder}")
        else:
            print(summary(train.run(config)))

    try:
        return guarded(PROG, command)
    except train.Stopped as stopped:
        again = list(args)
        if not any(a == "--out" or a.startswith("--out=") for a in args):
            again += ["--out", str(stopped.folder)]
        if "--resume" not in args:
            again.append("--resume")
        print(f"{stopped}\ngo on with: {PROG} {shlex.join(again)}", file=sys.stderr)
        return 128 + stopped.signum


def guarded(prog: str, command: Callable[[], None]) -> int:
    """Run `command`; an error that its user can mend becomes one line and an exit code.

    Under `python -X dev` every error shows its traceback.
    """
    if sys.flags.dev_mode:
        command()
        return 0
    try:
        command()
    except (ValueError, FileNotFoundError) as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 2
    except (train.TrainingFailed, OSError) as error:
        print(f"{prog}: failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def summary(result: train.Result) -> str:
    """Return what a finished run came to, in two or three lines."""
    scores = result.test
    text = (
        f"{result.folder}: {result.steps} updates in {result.seconds / 60:.1f} minutes\n"
        f"test, {scores.images} images: top-1 {scores.top1:.2%}, top-5 {scores.top5:.2%}, "
        f"mean per class {scores.mean_per_class:.2%}"
    )
    if result.best_step is not None:
        text += (
            f"\nbest.safetensors is of update {result.best_step}, with top-1 "
            f"{result.best_val_top1:.2%} on the validation images"
        )
    return text
