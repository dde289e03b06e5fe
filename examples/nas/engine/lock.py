"""The lock of a folder, so that two runs never write to the same one: a file with process and host."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..space.files import remove_drafts, write_text

NAME = "run.lock"
_held: set[Path] = set()  # folders that this process has locked; a run inside of a locked folder may lock it again


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Context in which no other process may run in `folder`, which is created if it is missing.

    The lock of a process that has ended without removing it, as after ``kill -9``, is taken over on the same host. A folder that
    is still empty after an error is removed if it was created here.

    Raises:
      FileExistsError: another process runs in `folder`, or may do so on another host; `folder` is a file.
    """
    place = folder.resolve()
    if place in _held:
        yield
        return
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"out must be a folder, got the file {folder}")
    created = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    _acquire(folder)
    _held.add(place)
    try:
        yield
    finally:
        _held.discard(place)
        (folder / NAME).unlink(missing_ok=True)
        if created:
            with suppress(OSError):
                folder.rmdir()  # fails unless it is empty


def _acquire(folder: Path) -> None:
    file = folder / NAME
    with _one_at_a_time(folder):
        holder = _read(file)
        if holder is not None and _may_run(holder):
            raise FileExistsError(_refusal(folder, holder))
        remove_drafts(folder)
        started = _start_of(os.getpid())
        write_text(file, json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "started": started}) + "\n")


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Context that one process of a host enters at a time, so that two cannot take over the same lock."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    opened = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems have no such locks
            fcntl.flock(opened, fcntl.LOCK_EX)
        yield
    finally:
        os.close(opened)


def _read(file: Path) -> dict[str, Any] | None:
    """The content of a lock; None if there is none. A damaged one has no process and host."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _may_run(holder: dict[str, Any]) -> bool:
    """Whether the process of a lock may still run: it is on another host, or it is here and has not ended."""
    pid = holder.get("pid")
    if holder.get("host") != socket.gethostname() or not isinstance(pid, int) or os.name != "posix":
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user
        pass
    return pid != os.getpid() and holder.get("started") in (None, _start_of(pid))  # else the number was given again


def _start_of(pid: int) -> str | None:
    """When a process was started, in the unit of the system; None where this is unknown."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return stat.rpartition(")")[2].split()[19]  # the name in parentheses may contain spaces


def _refusal(folder: Path, holder: dict[str, Any]) -> str:
    file = folder / NAME
    if holder.get("host") == socket.gethostname():
        return f"{folder} is in use by process {holder.get('pid')}: wait for its end, or choose another --out"
    who = f"process {holder['pid']} on {holder['host']}" if {"pid", "host"} <= holder.keys() else "an unknown process"
    written = time.strftime("%Y-%m-%d %H:%M", time.localtime(file.stat().st_mtime))
    return f"{folder} is in use by {who} since {written}: choose another --out, or remove {file} if that process has ended"
