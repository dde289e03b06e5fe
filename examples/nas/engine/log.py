"""Tables as CSV files, and the log of a run: one row for each epoch, in TensorBoard too where it is installed."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..space.files import write_text


def write_csv(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the rows to a CSV file atomically; a row without some column has an empty cell there."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(dict.fromkeys(column for row in rows for column in row)))
    writer.writeheader()
    writer.writerows(rows)
    write_text(file, text.getvalue())


class Log:
    """Writes the rows of a run. All rows are in the checkpoint, so a resumed run writes the file of an uninterrupted one."""

    def __init__(self, out: Path, name: str = "search.csv") -> None:
        self.file, self.board = out / name, None
        out.mkdir(parents=True, exist_ok=True)
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:  # optional, and part of torch: other libraries write the CSV file only
            return
        self.board = SummaryWriter(str(out / "tensorboard"))

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write all rows to the CSV file, and the last one to TensorBoard."""
        write_csv(self.file, rows)
        if self.board is not None:
            for key, value in rows[-1].items():
                if key != "epoch" and isinstance(value, (int, float)):
                    self.board.add_scalar(key, value, rows[-1]["epoch"])
            self.board.flush()
