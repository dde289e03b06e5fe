"""Write the tables of the last run of each command from the rows of `gpu.py`: python benchmarks/last_runs.py [--check]

Reads benchmarks/results/*/runs.jsonl and replaces the text between two markers, in README.md by a table of the main commands, and
in benchmarks/results/README.md by one of all commands. --check only reports whether both are up to date.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import gpu

RESULTS = gpu.ROOT / "benchmarks" / "results"
MAIN = ("prune_convnet", "digits", "optimizers")  # the parts in the table of README.md
FILES = {gpu.ROOT / "README.md": MAIN, RESULTS / "README.md": ()}
START, END = "<!-- last runs: python benchmarks/last_runs.py -->", "<!-- end of last runs -->"
NEVER = "not yet"
STATES = {"done": "", "failed": "**failed**: ", "timeout": "**stopped**: "}


def last(rows: Iterable[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    """(command, device): its last row. Rows of a dry run do not count."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        key = row["command"], row["device"]
        if not row.get("dry") and (key not in found or row["date"] >= found[key]["date"]):
            found[key] = row
    return found


def cell(row: dict[str, Any] | None) -> str:
    """Date, device, seconds (of the CPU where that is the device, which others may use too), memory, result."""
    if row is None:
        return NEVER
    threads = {0: "", 1: ", one thread"}.get(row.get("threads", 0), f", {row.get('threads')} threads")
    own = row["device"] == "cpu" and row.get("cpu_seconds")
    seconds = f"{own:.4g} CPU s" if own else f"{row['seconds']:.4g} s" if row.get("seconds") else ""
    memory = f"{row['peak_mib']} MiB" if row.get("peak_mib") else ""
    facts = ", ".join(filter(None, (row["date"][:10], f"{row['machine']}{threads}", seconds, memory)))
    text = f"{facts}: {STATES[row['state']]}{row['result']}"
    return text.replace("|", "\\|").replace("<", "&lt;")


def table(rows: Iterable[dict[str, Any]], names: Sequence[str] = ()) -> str:
    """Markdown: a line for each command of these parts, or of all in `gpu.PARTS` and others that there are rows of."""
    found = last(rows)
    parts = [part for part in gpu.PARTS if not names or part.name in names]
    others = [] if names else [command for command, _ in found]
    commands = dict.fromkeys([c for part in parts for c in part.commands] + others)
    head = ["command", *(device.upper() for device in gpu.DEVICES)]
    lines = [head, ["---"] * len(head)]
    lines += [[f"`{c}`", *(cell(found.get((c, device))) for device in gpu.DEVICES)] for c in commands]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def updated(text: str, rows: Iterable[dict[str, Any]], names: Sequence[str] = ()) -> str:
    """The text with the table of these rows and parts; ValueError where it has no place for it."""
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ValueError(f"README.md must hold the lines {START!r} and {END!r}")
    return f"{before}{START}\n\n{table(rows, names)}\n\n{END}{after}"


def all_rows() -> list[dict[str, Any]]:
    return [row for file in sorted(RESULTS.glob("*/runs.jsonl")) for row in gpu.rows_of(file)]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 where a table is not up to date")
    args = parser.parse_args(argv)
    for file, names in FILES.items():
        text = file.read_text(encoding="utf-8")
        new = updated(text, all_rows(), names)
        if args.check and new != text:
            sys.exit(f"{file} is not up to date: run python benchmarks/last_runs.py")
        if not args.check:
            file.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
