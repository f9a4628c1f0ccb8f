"""Stopping a run between two updates, on Ctrl-C or SIGTERM."""

from __future__ import annotations

import signal
import sys
import threading


class StopSignals:
    """Context manager that turns the first SIGINT or SIGTERM into a note, `signum`.

    A second one acts as it would without us. A signal that the process ignores stays ignored, as
    SIGINT is in a shell's background job. Outside the main thread, where Python delivers no
    signals, nothing changes.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._previous: dict[int, object] = {}

    def __bool__(self) -> bool:
        return self.signum is not None

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(signum) is not signal.SIG_IGN:
                    self._previous[signum] = signal.signal(signum, self._note) or signal.SIG_DFL
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._restore()

    def _note(self, signum: int, frame: object) -> None:
        self.signum = signum
        self._restore()
        print(
            f"\n{signal.Signals(signum).name}: stopping after this update; once more stops at once",
            file=sys.stderr,
        )

    def _restore(self) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous.clear()
