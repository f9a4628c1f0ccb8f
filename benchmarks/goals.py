"""What is to be shown on a GPU, and how far it is: read from the suites' CSVs, nothing measured.

Only the standard library is needed, so that a run that is short of time can say where it stands.
"""

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

VARIANTS = ("", "_graph", "_compiled")
LAYOUT = "channels_last"
# A network and how it is called, likewise what takes its place where timm is missing, and the goal.
RIVALS = (
    ("timm", "timm's BiT", "eager", "plain PyTorch (timm is missing)", 1.8),
    (
        "timm_batch_norm",
        "its BatchNorm twin",
        "batch_norm",
        "its BatchNorm twin in plain PyTorch (timm is missing)",
        0.95,
    ),
)
NOTE = """
Of timm's BiT it is the faster, or the smaller, of channels_last and NCHW: CUDA's own GroupNorm gives
contiguous outputs, so that from the first of them on it convolves in NCHW whatever it is given.
A rival of CUDA graphs and of what is compiled may be what it is without, where that is faster.
"""


@dataclass(frozen=True)
class Goal:
    """what: in words; goal: the number, `at_most` or at least; value: None while not measured."""

    what: str
    goal: float | None
    at_most: bool
    value: float | None

    @property
    def line(self) -> str:
        if self.value is None:
            return f"| {self.what} | {self._goal} | not measured | |"
        met = ""
        if self.goal is not None:
            met = "met" if (self.value <= self.goal) == self.at_most else "missed"
            met = "met" if self.value == self.goal else met
        return f"| {self.what} | {self._goal} | {self.value:.3g} | {met} |"

    @property
    def _goal(self) -> str:
        if self.goal is None:
            return ""
        return f"{'at most' if self.at_most else 'at least'} {self.goal:g}"


def summary(files: dict[str, Path]) -> str:
    """A table in Markdown. files: suite -> CSV, which need not be there."""
    rows = {suite: list(_rows(path)) for suite, path in files.items()}
    lines = ["| | goal | measured | |", "| --- | --- | ---: | --- |"]
    lines += [goal.line for goal in _goals(rows)]
    return "\n".join(lines) + "\n" + NOTE


def _rows(path: Path) -> Iterator[dict[str, str]]:
    """The rows of the newest run of each case."""
    if not path.is_file():
        return
    with path.open(newline="") as file:
        found = list(csv.DictReader(file))
    newest: dict[tuple, str] = {}
    for row in found:
        key = row["case"], row["dtype"]
        newest[key] = max(row["date"], newest.get(key, ""))
    yield from (row for row in found if row["date"] == newest[row["case"], row["dtype"]])


def _goals(rows: dict[str, list[dict[str, str]]]) -> Iterator[Goal]:
    step, memory = rows.get("step", []), rows.get("memory", [])
    no_timm = any(row["provider"].startswith("batch_norm") for row in step)
    for variant in VARIANTS:
        suffix = {"": "", "_graph": ", as CUDA graphs", "_compiled": ", compiled"}[variant]
        ours = _find(step, "R50x1/", f"bit{variant}/{LAYOUT}", "images_per_s", variant)
        for *rival, goal in RIVALS:
            network, words = rival[2:] if no_timm else rival[:2]
            theirs = _fastest(step, "R50x1/", network, variant)
            what = f"R50x1, images/s over {words}{suffix}"
            yield Goal(what, goal, False, ours / theirs if ours and theirs else None)
    tuned = rows.get("step_tuned", [])
    for network, found, words in (
        ("R50x1", step, ""),
        ("R50x1", tuned, ", convolutions tuned"),
        ("R152x4", step, ""),
    ):
        if found is tuned and not tuned:
            continue
        rate = _fastest(found, f"{network}/", "bit", "_graph")
        yield Goal(f"{network}, images/s{words}, the best of ours", None, False, rate)
        ratios = [
            _find(found, f"{network}/", f"bit{variant}/{LAYOUT}", "times_limit", variant)
            for variant in VARIANTS
        ]
        best = min((value for value in ratios if value), default=None)
        yield Goal(f"{network}, step over conv_only{words}, the best of ours", 1.10, True, best)
    for network in ("R50x1", "R152x4"):
        share = _find(memory, f"{network}/", f"bit/{LAYOUT}", "peak_share_of_timm")
        yield Goal(f"{network}, peak memory over timm's", 0.55, True, share)
    largest = _find(memory, "R50x1/", f"bit/{LAYOUT}", "largest_batch_of_timm")
    yield Goal("R50x1, largest batch over timm's", None, False, largest)
    for direction in ("forward", "backward"):
        shares = _shares(rows.get("ops", []), direction)
        what = f"GroupNorm+ReLU {direction}, batch 32 and up, bfloat16, channels_last"
        yield Goal(f"{what}: lowest share of copy", 0.85, False, min(shares, default=None))
        middle = sorted(shares)[len(shares) // 2] if shares else None
        yield Goal(f"{what}: median share of copy", None, False, middle)


def _fastest(rows: list[dict[str, str]], case: str, network: str, variant: str) -> float | None:
    """Images/s of a network in its faster layout, as it is or in the variant."""
    found = [
        _find(rows, case, f"{network}{way}/{layout}", "images_per_s", variant)
        for way in ("", variant)
        for layout in (LAYOUT, "NCHW")
    ]
    return max((value for value in found if value), default=None)


def _find(
    rows: list[dict[str, str]], case: str, provider: str, metric: str, variant: str = ""
) -> float | None:
    """The median of the first such row; compiled rivals are in cases of their own."""
    for row in rows:
        apart = row["case"].endswith("/compiled")
        if (
            row["case"].startswith(case)
            and apart == (variant == "_compiled")
            and (row["provider"], row["metric"]) == (provider, metric)
        ):
            return float(row["p50"])
    return None


def _shares(rows: list[dict[str, str]], direction: str) -> list[float]:
    """Of each case, that of the better of our backends."""
    best: dict[str, float] = {}
    for row in rows:
        parts = row["case"].split("/")
        if (
            parts[0] == "group_norm_relu"
            and parts[-2:] == [LAYOUT, direction]
            and row["dtype"] == "bfloat16"
            and row["provider"] in ("triton", "cuda")
            and row["metric"] == "share_of_copy"
            and int(parts[2].partition("x")[0]) >= 32
        ):
            best[row["case"]] = max(best.get(row["case"], 0.0), float(row["p50"]))
    return list(best.values())
