"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PART = ".part"  # suffix of files that are being written


@contextmanager
def draft(path: Path) -> Iterator[Path]:
    """Context with a path beside `path` to write to. At its end the file replaces `path`; after an error it is removed.

    The name is unique, so that processes that write the same file do not mix their parts.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}{PART}")
    try:
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    """Write a file atomically: a reader sees the old content or the new one, never a part, even if the process is killed."""
    with draft(path) as part:
        part.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write text in UTF-8 as `write_bytes` does; line ends are not changed."""
    write_bytes(path, text.encode())


def remove_drafts(folder: Path) -> None:
    """Remove what processes that were killed while they wrote have left. No other process may write to the folder."""
    for part in folder.glob(f".*{PART}"):
        part.unlink(missing_ok=True)
