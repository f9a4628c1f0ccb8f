"""What a run tells while it goes: a progress bar, log.jsonl, TensorBoard and a picture.

log.jsonl has one JSON object a line, told apart by `kind`:
    train   step, loss, lr, images_per_s, data_share, seconds
    eval    step, split, loss, top1, top5, mean_per_class, images, seconds
`step` counts finished updates; `seconds` is the run's own time, over all its sittings;
`data_share` is the share of the update's time in which it waited for its images, 0 to 1.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import SupportsFloat, TextIO

from tqdm import tqdm

from bit import plots
from bit.metrics import Metrics

LINE_EVERY = 10.0  # seconds between progress lines where there is no terminal for a bar
SCORES = ("loss", "top1", "top5", "mean_per_class")


class RunLog:
    """The log of one sitting of a run; a context manager, so that files are closed on errors.

    folder: of the run. total: its updates. batch: images an update. start: updates already done;
    what an earlier sitting logged beyond them, or of the final evaluations, is cut off, since it
    is about to happen again.
    seconds: already spent. label: shown with the progress. full: also TensorBoard and curves.png.
    """

    def __init__(
        self,
        folder: Path,
        *,
        total: int,
        batch: int,
        start: int = 0,
        seconds: float = 0.0,
        label: str = "train",
        full: bool = True,
    ) -> None:
        self.folder, self.total, self.batch, self.label, self.full = (
            folder, total, batch, label, full,
        )  # fmt: skip
        self._earlier = seconds
        self._began = self._last_step = time.monotonic()
        self.rows = [
            row
            for row in read(folder)
            if row["step"] <= start and (row["kind"], row["step"]) != ("eval", total)
        ]
        self._file = _rewritten(folder / "log.jsonl", self.rows)
        self._board = _board(folder, start) if full else None
        self._bar = tqdm(
            total=total * batch,
            initial=start * batch,
            desc=label,
            unit="image",
            unit_scale=True,
            leave=full,
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
        )
        self._start, self._last_line, self._training = start, self._began, 0.0
        self._waited = 0.0
        self._unread: Callable[[], None] | None = None

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._bar.close()
        self._file.close()
        if self._board:
            self._board.close()

    @property
    def seconds(self) -> float:
        """Seconds spent on the run so far, over all sittings."""
        return self._earlier + time.monotonic() - self._began

    def train(self, step: int, loss: SupportsFloat, lr: float, waited: float) -> None:
        """Record update number `step` (1 for the first), which waited so many s for its images.

        A loss that is no float yet, because a device is at it, is read and recorded at the next
        call, so that it doesn't hold up the update after it, or by `settle`.
        """
        self.settle()
        now = time.monotonic()
        spent = max(now - self._last_step, 1e-9)
        self._last_step = now
        self._unread = partial(self._trained, step, loss, lr, waited, spent)
        if isinstance(loss, float):
            self.settle()

    def settle(self) -> None:
        """Record an update whose loss is still to be read, if there is one."""
        if self._unread is not None:
            record, self._unread = self._unread, None
            record()

    def _trained(
        self, step: int, loss: SupportsFloat, lr: float, waited: float, spent: float
    ) -> None:
        loss = float(loss)
        rate, share = self.batch / spent, min(waited / spent, 1.0)
        self._training += spent
        self._waited += waited
        self._write(
            {
                "kind": "train",
                "step": step,
                "loss": loss,
                "lr": lr,
                "images_per_s": round(rate, 1),
                "data_share": round(share, 4),
            }
        )
        if self._board:
            for name, value in (
                ("train/loss", loss),
                ("lr", lr),
                ("images_per_s", rate),
                ("data_share", share),
            ):
                self._board.add_scalar(name, value, step)
        self._bar.set_postfix_str(f"step {step}/{self.total} loss {loss:.3f}", refresh=False)
        self._bar.update(self.batch)
        now = time.monotonic()
        if self._bar.disable and now - self._last_line > LINE_EVERY:
            self._last_line = now
            done = step - self._start
            left = (self.total - step) * (now - self._began) / done
            self.say(
                f"step {step}/{self.total}  loss {loss:.4f}  lr {lr:.2g}  "
                f"{done * self.batch / self._training:.0f} images/s  "
                f"{self._waited / self._training:.1%} waiting for data  {_clock(left)} left"
            )

    def evaluated(self, step: int, split: str, scores: Metrics) -> None:
        """Record the scores after `step` updates on the split "val" or "test"."""
        values = {name: getattr(scores, name) for name in SCORES}
        row = {"kind": "eval", "step": step, "split": split, **values, "images": scores.images}
        self._write(row)
        if self._board:
            for name, value in values.items():
                self._board.add_scalar(f"{split}/{name}", value, step)
        if self.full:
            plots.curves(self.rows, self.folder / "curves.png", title=self.label)
            self.say(
                f"step {step}/{self.total}  {split}: top-1 {scores.top1:.2%}  "
                f"per class {scores.mean_per_class:.2%}  loss {scores.loss:.4f}"
            )
        self._last_step = time.monotonic()  # evaluation is no part of the training speed

    def say(self, text: str) -> None:
        """Print a line to stderr without breaking the bar."""
        tqdm.write(f"{self.label}: {text}", file=sys.stderr)

    def _write(self, row: dict) -> None:
        row = {key: _finite(value) for key, value in row.items()}
        row["seconds"] = round(self.seconds, 3)
        self.rows.append(row)
        self._file.write(json.dumps(row) + "\n")


def read(folder: str | Path) -> list[dict]:
    """Return the rows of a run's log.jsonl; none if it has no log. A torn last line is dropped."""
    path = Path(folder) / "log.jsonl"
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _rewritten(path: Path, rows: list[dict]) -> TextIO:
    """Cut a log to `rows` and open it for appending, each line to disk as it is written."""
    cut = path.with_suffix(".jsonl.new")
    cut.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    os.replace(cut, path)
    return open(path, "a", buffering=1, encoding="utf-8")


def _board(folder: Path, start: int):
    from torch.utils.tensorboard import SummaryWriter  # a second to import: only where it is used

    return SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1 if start else None)


def _finite(value):
    """JSON has no NaN and no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
