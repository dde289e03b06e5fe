"""Time to import the packages beside that of their libraries: python benchmarks/import_time.py [--rounds 9]

Each import runs in a fresh process, in turn, round after round, with the bytecode of all modules cached. The table has wall and
CPU seconds, best and median; --out writes it to a CSV file. --modules lists the modules that take longest in `import proxopt`,
without what they import themselves.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
IMPORTS = ("numpy", "array_api_compat", "proxopt", "proxopt.solvers", "torch", "proxopt_torch", "jax, optax", "proxopt_jax")
CODE = "import time; t, c = time.perf_counter, time.process_time; w, d = t(), c(); import {}; print(t() - w, c() - d)"
COLUMNS = ("imports", "wall_best", "wall_median", "cpu_best", "cpu_median", "rounds", "machine")


def seconds(imports: str, environment: dict[str, str]) -> tuple[float, float]:
    """Wall and CPU seconds of an import in a fresh process."""
    command = [sys.executable, "-c", CODE.format(imports)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    wall, cpu = map(float, done.stdout.split())
    return wall, cpu


def slowest(environment: dict[str, str], count: int = 15) -> list[tuple[int, str]]:
    """(microseconds, module): the own times of the modules that `import proxopt` imports."""
    command = [sys.executable, "-X", "importtime", "-c", "import proxopt"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    rows = [line.removeprefix("import time:").split("|") for line in done.stderr.splitlines() if "|" in line]
    return sorted(((int(own), name.strip()) for own, _, name in rows if own.strip().isdigit()), reverse=True)[:count]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", nargs="*", default=IMPORTS, help="what to import, of the lines of the table or anything else")
    parser.add_argument("--modules", action="store_true", help="list the slowest modules instead")
    parser.add_argument("--out", type=Path, help="a CSV file")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONPYCACHEPREFIX": cache}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        if args.modules:
            seconds("proxopt", environment)
            for own, name in slowest(environment):
                print(f"{own / 1000:8.1f} ms  {name}")
            return
        for imports in args.only:
            seconds(imports, environment)  # writes the bytecode
        found: dict[str, list[tuple[float, float]]] = {imports: [] for imports in args.only}
        for _ in range(args.rounds):
            for imports in args.only:
                found[imports].append(seconds(imports, environment))
    machine = f"{os.cpu_count()} CPUs, {platform.machine()}, Python {platform.python_version()}"
    rows = []
    print(f"{'import':20}{'wall s, best':>14}{'median':>9}{'CPU s, best':>14}{'median':>9}")
    for imports, times in found.items():
        wall, cpu = zip(*times)
        numbers = min(wall), statistics.median(wall), min(cpu), statistics.median(cpu)
        print(f"{imports:20}{numbers[0]:14.3f}{numbers[1]:9.3f}{numbers[2]:14.3f}{numbers[3]:9.3f}")
        rows.append(dict(zip(COLUMNS, (imports, *(round(n, 4) for n in numbers), args.rounds, machine))))
    if args.out:
        with args.out.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
