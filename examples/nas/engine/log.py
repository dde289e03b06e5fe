"""The table of epochs: a CSV file, and TensorBoard where it is installed."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path
from typing import Any


class Log:
    """Writes the rows of a run, which are all in its checkpoint: after a stop the file is as if there had been none."""

    def __init__(self, out: Path, name: str = "search.csv") -> None:
        self.file, self.board = out / name, None
        out.mkdir(parents=True, exist_ok=True)
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:  # an optional extra
            return
        self.board = SummaryWriter(str(out / "tensorboard"))

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Replace the file by one with these rows; the last of them goes to TensorBoard."""
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(rows[-1]))
        writer.writeheader()
        writer.writerows(rows)
        draft = self.file.with_suffix(".part")
        draft.write_text(text.getvalue(), encoding="utf-8")
        os.replace(draft, self.file)
        if self.board is not None:
            for key, value in rows[-1].items():
                if key != "epoch" and isinstance(value, (int, float)):
                    self.board.add_scalar(key, value, rows[-1]["epoch"])
            self.board.flush()
