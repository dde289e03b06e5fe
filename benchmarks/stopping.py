"""Ctrl-C and SIGTERM end a program with one line, in place of a traceback. Used by the scripts that run searches and trainings.

if __name__ == "__main__":
    with in_one_line():
        main()
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from nas.engine.signals import Interrupted


@contextmanager
def in_one_line(advice: str = "the same command continues") -> Iterator[None]:
    """End the program with this advice, and with the status of the signal, when Ctrl-C or SIGTERM stops it."""
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        yield
    except KeyboardInterrupt as stopped:
        print(f"\n{str(stopped) or 'stopped by SIGINT'}: {advice}", file=sys.stderr)
        raise SystemExit(128 + (stopped.number if isinstance(stopped, Interrupted) else signal.SIGINT)) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _stop(number: int, frame: FrameType | None) -> None:
    raise Interrupted(number)
