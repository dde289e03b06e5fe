"""Ctrl-C and SIGTERM: a run finishes its step, saves, and stops."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from .resume import find_settings, resume_command

STOPPING = (signal.SIGINT, signal.SIGTERM)
FULL = (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC))  # Windows has no quota


class Interrupted(KeyboardInterrupt):
    """A run was stopped by a signal, after it has saved. number: of the signal. place: where it has stopped."""

    def __init__(self, number: int, place: str = "") -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}{place}")
        self.number = number


class StopRequest:
    """Context in which the first SIGINT or SIGTERM is only recorded, as `number`. The same one again ends the process at once.

    torchrun sends SIGTERM to the processes that have received SIGINT from the terminal already, so that both count as one. A
    signal that is ignored, as SIGINT by a job in the background, stays so, and threads cannot handle signals. At the end of the
    context a signal that came too late for the run to react raises Interrupted.
    """

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            handled = [number for number in STOPPING if signal.getsignal(number) not in (signal.SIG_IGN, None)]
            self._before = {number: signal.signal(number, self._record) for number in handled}
        return self

    def __exit__(self, kind: Any, *rest: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self.number and kind is None:
            raise Interrupted(self.number)

    def _record(self, number: int, frame: FrameType | None) -> None:
        self.number = self.number or number
        signal.signal(number, signal.SIG_DFL)


def _raise(number: int, frame: FrameType | None) -> None:
    raise Interrupted(number)


@contextmanager
def stops_in_one_line(out: Path, first: Callable[[], bool]) -> Iterator[None]:
    """End the program with one line and the status of the signal when Ctrl-C or SIGTERM stops the run in `out`.

    first: whether this process prints.
    """
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    if main:
        signal.signal(signal.SIGTERM, _raise)
    try:
        yield
    except KeyboardInterrupt as stopped:
        if first():
            reason = str(stopped) or "stopped by SIGINT"
            print(f"\n{reason}{_how_to_continue(out)}", file=sys.stderr)
        number = stopped.number if isinstance(stopped, Interrupted) else signal.SIGINT
        raise SystemExit(128 + number) from None
    finally:
        if main:
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def file_error(error: OSError) -> str:
    """One sentence about a file that could not be read or written, whether the message has its name or not."""
    if error.errno in FULL:
        return (
            f"the disk is full, or its quota used up ({error.strerror}): free some space, and continue with --resume from the"
            " last checkpoint"
        )
    if error.filename is None or error.strerror is None:
        return str(error)
    return f"{error.filename}: {error.strerror}"


def _how_to_continue(out: Path) -> str:
    if find_settings(out) is None:
        return " before the first step: start it again with the same command"
    return f"; continue with: {resume_command(out, sys.argv, os.environ)}"
