"""Run functions in worker processes, so that nothing is lost when one of them or all are killed. Used by `nas_bench_201.py`.

    jobs = [Job("ista, seed 0", search, (settings, 0), Path("runs/ista/seed-0"))]
    for job, done in run(jobs, workers=2): ...

Each job has a process of its own, started afresh (`spawn`). Its result is in its folder as soon as it is finished; a job that is
finished is not run again. A job that is run again after an interruption is expected to continue by itself, from checkpoints.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from nas.space.files import write_text

RESULT, CLOCK = "found.json", "cpu_seconds.json"
BETWEEN_CLOCKS = 2.0  # seconds
IN_USE = 60.0  # seconds to wait for a folder whose last process is still saving


@dataclass(frozen=True)
class Job:
    """A call of a function of a module, which returns plain data.

    name: for messages. out: its folder, in which it is alone. modules: those that are imported before its time is measured.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    out: Path
    modules: tuple[str, ...] = ()

    @property
    def log(self) -> Path:
        """The file with all that it prints."""
        return self.out / "output.log"


@dataclass(frozen=True)
class Done:
    """How a job has ended. found: what it returned. error: the last line that a failed one printed, empty for others.

    cpu_seconds, seconds: of processor and wall time, including those of attempts that were interrupted.
    """

    found: Any
    error: str = ""
    cpu_seconds: float = 0.0
    seconds: float = 0.0


def run(jobs: Sequence[Job], workers: int) -> Iterator[tuple[Job, Done]]:
    """Run the jobs, `workers` at a time; yield each as soon as it has ended, finished ones of earlier calls first.

    When the caller stops, by an exception or Ctrl-C too, the processes get SIGTERM, and are awaited: searches save and end.
    """
    waiting = []
    for job in jobs:
        if (job.out / RESULT).is_file():
            yield job, _read(job)
        else:
            waiting.append(job)
    context = multiprocessing.get_context("spawn")
    running: dict[int, tuple[Job, Any]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                job = waiting.pop(0)
                job.out.mkdir(parents=True, exist_ok=True)
                process = context.Process(target=_work, args=(job,), name=job.name)
                process.start()
                running[process.sentinel] = job, process
            for sentinel in connection.wait(list(running)):
                job, process = running.pop(sentinel)  # type: ignore[call-overload]
                process.join()
                yield job, _read(job) if process.exitcode == 0 else Done(None, _reason(job, process.exitcode))
    finally:
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.join()


def _read(job: Job) -> Done:
    try:
        content = json.loads((job.out / RESULT).read_text(encoding="utf-8"))
        return Done(content["found"], "", content["cpu_seconds"], content["seconds"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{job.out / RESULT} must be the result of a finished run, but could not be read: {error}") from None


def _reason(job: Job, code: int) -> str:
    """Why a process ended: the signal, or the last line of its output."""
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    lines = job.log.read_text(encoding="utf-8", errors="replace").split("\n") if job.log.exists() else []
    return next((line.strip().removeprefix("error: ") for line in reversed(lines) if line.strip()), f"exit code {code}")


def _work(job: Job) -> None:
    """The program of a worker process."""
    with job.log.open("a", encoding="utf-8") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    for module in job.modules:
        importlib.import_module(module)
    clock = _Clock(job.out / CLOCK)
    threading.Thread(target=clock.watch, daemon=True).start()
    found = _when_free(job)
    clock.write()
    content = {"found": found, "cpu_seconds": clock.cpu_seconds(), "seconds": clock.seconds()}
    write_text(job.out / RESULT, json.dumps(content, indent=1) + "\n")


def _when_free(job: Job) -> Any:
    """Call the function. If a process of an earlier, killed command still saves in the same folder, wait for its end."""
    end = time.monotonic() + IN_USE
    while True:
        try:
            return job.function(*job.arguments)
        except FileExistsError as error:
            if "is in use" not in str(error) or time.monotonic() > end:
                raise
            time.sleep(0.5)


class _Clock:
    """Processor and wall time of a job over all attempts: a file has those of the attempts before, and is kept up to date."""

    def __init__(self, file: Path) -> None:
        self.file, self.start, self.cpu_start = file, time.monotonic(), time.process_time()
        try:
            self.before = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self.before = [0.0, 0.0]

    def cpu_seconds(self) -> float:
        return self.before[0] + time.process_time() - self.cpu_start

    def seconds(self) -> float:
        return self.before[1] + time.monotonic() - self.start

    def write(self) -> None:
        write_text(self.file, json.dumps([self.cpu_seconds(), self.seconds()]) + "\n")

    def watch(self) -> None:
        """Write the file every few seconds. When the process that started this one is gone, make this one save and end."""
        parent = multiprocessing.parent_process()
        while parent is None or not connection.wait([parent.sentinel], BETWEEN_CLOCKS):
            if parent is None:
                time.sleep(BETWEEN_CLOCKS)
            self.write()
        os.kill(os.getpid(), signal.SIGTERM)
