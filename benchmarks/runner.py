"""Run commands in processes of their own, each with a time limit, and report the result of each as a row. Used by `gpu.py`.

    place = Place("cpu", out, data, work)
    for row in run(Part("name", ("script.py", "--option", "1")), place, seconds=60): ...

As a script, `python benchmarks/runner.py REPORT WORDS`, it is the program of such a process: it runs `python WORDS`, and at the
end writes the device that the process has used, and its memory, to the file REPORT.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import json
import os
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SITE = ROOT / "runs" / "site"  # packages for these commands alone
DEVICES = {"cpu": "cpu", "gpu": "cuda", "tpu": "tpu"}  # by column of the table: what torch and JAX call it
LEAST = 20.0  # seconds; a part is not worth starting with less
GRACE = 5.0  # seconds between SIGTERM and SIGKILL
LONGEST = 400  # characters of a result
LOG = threading.Lock()


@dataclass(frozen=True)
class Part:
    """A command, and how its output becomes a row.

    Args:
      name: for --only, and for file names.
      words: the command line after `python`, as a user types it and as the table shows it.
      more: further options; {data}, {out}, {device}, {seconds} and {workers} are filled in.
      dry: options for a small run, in place of the same options in `words` and `more`.
      share: the largest share of the remaining time that it may take.
      patterns: (pattern, form) pairs. A line of output that matches the pattern is reported as the form, filled with its groups.
      counts: words whose lines are counted, for a command that may be stopped before it prints a summary.
      keeps: files of {out} to copy to --out.
      shows: the commands of the rows that it prints itself, as lines `ROW {...}`.
      devices: the devices on which it runs.
    """

    name: str
    words: tuple[str, ...]
    more: tuple[str, ...] = ()
    dry: tuple[str, ...] = ()
    share: float = 0.9
    patterns: tuple[tuple[str, str], ...] = ()
    counts: tuple[str, ...] = ()
    keeps: tuple[str, ...] = ()
    shows: tuple[str, ...] = ()
    devices: tuple[str, ...] = ("cpu", "gpu")

    @property
    def command(self) -> str:
        return " ".join(["python", *(f'"{w}"' if " " in w else w for w in self.words)])

    @property
    def commands(self) -> tuple[str, ...]:
        """The commands of its rows."""
        return self.shows or (self.command,)

    @property
    def file(self) -> str:
        return self.name.replace(",", "").replace(" ", "_")


@dataclass
class Place:
    """Where and how parts run.

    Args:
      device: a key of DEVICES.
      out: folder for rows, logs and results. work: folder that commands write into.
      data: images, for --data-dir.
      threads: of the CPU; 0 leaves the choice to the commands.
      dry: whether the commands are made small.
      code, machine, versions: written into each row.
    """

    device: str
    out: Path
    data: Path
    work: Path
    threads: int = 0
    dry: bool = False
    code: str = ""
    machine: str = ""
    versions: dict[str, str] = field(default_factory=dict)

    def words(self, part: Part, seconds: float = 0.0) -> list[str]:
        """Those of a part, filled in. seconds: that it may take."""
        words, dry = (*part.words, *part.more), part.dry if self.dry else ()
        known = {"data": self.data, "out": self.folder(part), "device": DEVICES[self.device], "seconds": f"{seconds:.0f}"}
        workers = ["-n", str(min(8, os.cpu_count() or 1))] if find("xdist") and not self.dry else []
        filled: list[str] = []
        for word in (*without(words, dry), *dry):
            filled += workers if word == "{workers}" else [word.format(**known)]
        return filled

    def folder(self, part: Part) -> Path:
        return self.work / part.file

    def environment(self) -> dict[str, str]:
        """Variables with which this checkout can be imported, and no other device than the chosen one is found."""
        found = {**os.environ, "PYTHONUNBUFFERED": "1", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        found["PYTHONPATH"] = os.pathsep.join(map(str, filter(None, (SITE, ROOT, os.environ.get("PYTHONPATH")))))
        if self.device == "cpu":
            found |= {"CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu"}
        if self.device == "tpu":
            found["JAX_PLATFORMS"] = "tpu"
        if self.threads:
            found |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(self.threads))
        return found


def without(words: Sequence[str], others: Sequence[str]) -> list[str]:
    """The words without the options that `others` have too, with their values."""
    options = {word for word in others if word.startswith("-")}
    kept, left_out = [], False
    for word in words:
        if word.startswith("-"):
            left_out = word in options
        if not left_out:
            kept.append(word)
    return kept


def find(module: str) -> bool:
    return importlib.util.find_spec(module) is not None or (SITE / module).is_dir()


def limit(left: float, share: float) -> float:
    """Seconds that a part may take: its share of those left, at least LEAST, and no more than there are."""
    return min(max(share * left, LEAST), left)


# -- the process of a part --------------------------------------------------------------------------


@dataclass(frozen=True)
class Ended:
    """How a process ended. code: None where its time was over. seconds: of wall time. cpu: seconds of the CPU. peak: MiB."""

    code: int | None
    seconds: float
    cpu: float = 0.0
    peak: float = 0.0


def launch(words: Sequence[str], seconds: float, log: Path, environment: dict[str, str], report: Path) -> Iterator[str | Ended]:
    """Run `python WORDS`: lines of output as they come, then how it ended. Whatever happens here, nothing of it runs on.

    log: file for its output. report: file for the result of `device_report` at its end.
    """
    with log.open("ab") as file:
        place = file.seek(0, os.SEEK_END)
        start = time.monotonic()
        command = [sys.executable, __file__, str(report), *words]
        options: dict[str, Any] = {"cwd": ROOT, "env": environment, "process_group": 0}
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, **options)
    usage = None
    try:
        while usage is None and time.monotonic() - start < seconds:
            time.sleep(0.05)
            place, lines = read(log, place)
            yield from lines
            usage = wait(process)
        in_time = usage is not None
        if not in_time:
            process.send_signal(signal.SIGTERM)  # it has a report to write
            while usage is None and time.monotonic() - start < seconds + GRACE:
                time.sleep(0.05)
                usage = wait(process)
    finally:
        kill(process)
        usage = usage or wait(process, block=True)
    _, lines = read(log, place, whole=True)
    yield from lines
    cpu, peak = usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024
    yield Ended(process.returncode if in_time else None, time.monotonic() - start, cpu, peak)


def wait(process: subprocess.Popen, block: bool = False) -> Any:
    """The resources that a process has used, which has its exit code then; None while it runs."""
    pid, status, usage = os.wait4(process.pid, 0 if block else os.WNOHANG)
    if not pid:
        return None
    process.returncode = os.waitstatus_to_exitcode(status)
    return usage


def kill(process: subprocess.Popen) -> None:
    """End a process with all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def read(log: Path, place: int, whole: bool = False) -> tuple[int, list[str]]:
    """The lines of a file from a place on, and the place behind them; an unfinished line only if `whole`."""
    with log.open("rb") as file:
        file.seek(place)
        content = file.read()
    if not whole:
        content = content[: content.rfind(b"\n") + 1]
    return place + len(content), [line for line in re.split("[\r\n]+", content.decode(errors="replace")) if line.strip()]


def main(report: str, *words: str) -> None:
    """Run a script or a module as `python WORDS` does."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    atexit.register(lambda: Path(report).write_text(json.dumps(device_report()), encoding="utf-8"))
    if words[0] == "-m":
        sys.argv, sys.path[0] = list(words[1:]), str(ROOT)
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = list(words), str(Path(words[0]).resolve().parent)
        runpy.run_path(words[0], run_name="__main__")


def device_report() -> dict[str, Any]:
    """Name of the device that this process has used, and the peak of its memory there, or of the host's where there is none."""
    torch, jax = sys.modules.get("torch"), sys.modules.get("jax")
    if torch is not None and torch.cuda.is_initialized():
        return {"machine": torch.cuda.get_device_name(), "peak_mib": round(torch.cuda.max_memory_allocated() / 2**20)}
    if jax is not None and jax.default_backend() != "cpu":
        device = jax.devices()[0]
        return {
            "machine": device.device_kind,
            "peak_mib": round((device.memory_stats() or {}).get("peak_bytes_in_use", 0) / 2**20),
        }
    return {"peak_mib": round(host_peak())} if torch is None or not torch.cuda.is_available() else {}


def host_peak() -> float:
    """Peak memory in MiB of this process, or of a child that has ended.

    `ru_maxrss` of this process is no measure of it: at the start it is the memory of the process that launched this one.
    """
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return max(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, children) / 1024
    own = re.search(r"^VmHWM:\s*(\d+) kB", status, re.MULTILINE)
    return max(int(own[1]) if own else 0, children) / 1024


# -- the rows of a part -----------------------------------------------------------------------------


def run(part: Part, place: Place, seconds: float) -> Iterator[dict[str, Any]]:
    """The rows of a part, each as soon as it is known."""
    words, log, report = place.words(part, seconds), place.out / f"{part.file}.log", place.work / f"{part.file}.json"
    shutil.rmtree(place.folder(part), ignore_errors=True)
    place.folder(part).mkdir(parents=True)
    report.unlink(missing_ok=True)
    log.write_text(
        f"$ python {' '.join(words)}    # {datetime.now():%Y-%m-%d %H:%M:%S}, at most {seconds:.0f} s\n", encoding="utf-8"
    )
    shared: dict[str, Any] = {"part": part.name, "device": place.device, "machine": place.machine, "threads": place.threads}
    shared |= {"code": place.code, "versions": place.versions, "dry": place.dry}
    stamped = lambda: {**shared, "date": datetime.now().isoformat(timespec="seconds")}
    lines: list[str] = []
    reported: set[str] = set()
    ended = Ended(None, 0.0)
    try:
        for line in launch(words, seconds, log, place.environment(), report):
            if isinstance(line, Ended):
                ended = line
            elif line.startswith("ROW {"):
                row = {**stamped(), **json.loads(line[4:])}
                reported.add(row["command"])
                yield row
            else:
                lines.append(line)
    finally:
        with LOG, (place.out / "log.txt").open("a", encoding="utf-8") as file:
            file.write(f"{log.read_text(encoding='utf-8', errors='replace')}\n")
        log.unlink()
    for name in part.keeps:
        if (place.folder(part) / name).exists():
            shutil.copy(place.folder(part) / name, place.out / f"{part.file}{Path(name).suffix}")
    known = json.loads(report.read_text(encoding="utf-8")) if report.exists() else {}
    state = "timeout" if ended.code is None else "done" if ended.code == 0 else "failed"
    unreported = [command for command in part.commands if command not in reported]
    if reported and (state == "done" or not unreported):
        return
    peak = known.get("peak_mib") or (round(ended.peak) if place.device == "cpu" else None)
    row = {**stamped(), "command": unreported[0], "state": state, "seconds": round(ended.seconds, 1)}
    row |= {"cpu_seconds": round(ended.cpu, 1), "peak_mib": peak}
    yield row | {"machine": known.get("machine", place.machine), "result": result(part, state, ended, lines)}


def result(part: Part, state: str, ended: Ended, lines: Sequence[str]) -> str:
    """What a part gave, in one line; of one that failed or was stopped also how."""
    matches = ((form, re.search(pattern, line)) for line in lines for pattern, form in part.patterns)
    found = list(dict.fromkeys(form.format(*m.groups()) for form, m in matches if m))
    counted = {word: sum(word in line.split() for line in lines) for word in part.counts}
    found = found or [f"{n} {word}" for word, n in counted.items() if n]
    last = [re.sub(r"\|[^|]*\|", " ", line).strip() for line in lines if line.strip()][-3:]  # without bars of progress
    if state == "failed":
        text = f"exit code {ended.code}: " + "; ".join(found or last or ["no output"])
    else:
        text = f"not done after {ended.seconds:.0f} s: " if state == "timeout" else ""
        text += "; ".join(found or last[-1:] or ["no output"])
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."


def rows_of(file: Path) -> list[dict[str, Any]]:
    """The rows of a runs.jsonl; a line that was cut off is left out."""
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def append(file: Path, row: dict[str, Any]) -> None:
    """One more line, on the disk before this returns."""
    cut_off = file.exists() and file.stat().st_size > 0 and not file.read_bytes().endswith(b"\n")
    with file.open("ab") as out:
        out.write(b"\n" * cut_off + json.dumps(row).encode() + b"\n")
        out.flush()
        os.fsync(out.fileno())


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("usage: python benchmarks/runner.py REPORT WORDS (see benchmarks/gpu.py, which runs it)")
    main(*sys.argv[1:])
