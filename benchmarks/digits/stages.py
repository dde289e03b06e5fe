"""Files of finished stages and of checkpoints, from which a run that was stopped goes on: arrays and the settings, as .npz."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tqdm import tqdm

from digits.problem import Arrays, Settings


def stage(path: Path, settings: Settings, work: Callable[[], Arrays], count: int, bar: tqdm) -> Arrays:
    """The arrays of a finished stage from its file, or computed now and written there; `took` is wall and CPU time."""
    if path.exists():
        bar.update(count)
        return load(path, settings)
    start = time.perf_counter(), time.process_time()
    arrays = work()
    took = np.array([time.perf_counter() - start[0], time.process_time() - start[1]])
    return save(path, settings, arrays | {"took": took})


def save(path: Path, settings: Settings, arrays: Arrays) -> Arrays:
    """Write to a draft and rename it: the file is complete or absent."""
    draft = path.with_suffix(".part")
    with draft.open("wb") as file:
        np.savez(file, settings=np.array(json.dumps(settings.plain())), **arrays)
    os.replace(draft, path)
    return arrays


def load(path: Path, settings: Settings) -> Arrays:
    """What `save` wrote, if it was under the same settings."""
    try:
        with np.load(path) as file:
            arrays = dict(file)
        saved = json.loads(str(arrays.pop("settings")))
    except Exception as error:
        raise SystemExit(f"{path} cannot be read ({error}); delete it, or start over with --fresh") from None
    if saved != settings.plain():
        raise SystemExit(f"{path} was written with other settings, {saved}: choose another --out, or --fresh")
    return arrays
