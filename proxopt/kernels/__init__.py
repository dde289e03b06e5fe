"""Compiled loops for a CPU, used where numba is installed: ``pip install "proxopt[fast]"``.

They compute the same proxes and optimizer steps as the array code, in one pass over memory instead of one pass for each
operation. Values agree up to rounding, and the same groups are zeroed, except where a norm is within rounding of the threshold.
Without numba, or for arrays that the loops cannot handle, the array code runs. numba is imported at the first use.

``prox`` of an array uses them from 32768 entries on, and from 4096 on where each entry has a step of its own. The torch
optimizers use them for all dense parameters in float32 and float64 whose penalty declares a ``Shrinkage``, but not inside of
``torch.compile`` and ``torch.func``, nor with ``differentiable=True`` or ``capturable=True``.

The first use compiles the loops, which takes about ten seconds for an optimizer, and stores them in ``__pycache__`` beside
this file, or in the folder that the environment variable ``NUMBA_CACHE_DIR`` names.

The environment variable ``PROXOPT_KERNELS=0``, set before proxopt is imported, switches the loops off, and so does
`enabled` in a ``with`` block. `calls` counts the launches of each loop, which shows whether they are used.

>>> import numpy as np
>>> from proxopt import L1, kernels
>>> with kernels.enabled(False):
...     L1(1.0).prox(np.array([3.0, 0.5]))
array([2., 0.])
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["available", "calls", "enabled", "usable"]

calls: Counter[str] = Counter()
"""How often each loop was launched in this process, by its name: ``"ProxAdam"``, ``"shrink_rows"``, ..."""

_switch = os.environ.get("PROXOPT_KERNELS", "1") != "0"


@contextmanager
def enabled(flag: bool = True) -> Iterator[None]:
    """A ``with`` block in which the compiled loops are used (True) or not (False), in all threads of the process."""
    global _switch
    before, _switch = _switch, bool(flag)
    try:
        yield
    finally:
        _switch = before


def available() -> bool:
    """Whether the compiled loops are switched on and numba is installed. Does not import numba."""
    return _switch and _has_numba()


def usable() -> bool:
    """Whether the compiled loops are switched on and could be imported, which is tried here and takes half a second.

    Warns once where numba is installed, but fails to import, for example because NumPy is too new for it.
    """
    return available() and _imported()


@functools.cache
def _imported() -> bool:
    try:
        importlib.import_module("proxopt.kernels.steps")
        importlib.import_module("proxopt.kernels.prox")
    except Exception as error:  # of numba, which raises errors of several kinds, for example where its llvmlite is another one
        warnings.warn(
            f"proxopt runs without compiled loops, because importing numba failed: {error!r}", RuntimeWarning, stacklevel=4
        )
        return False
    return True


@functools.cache
def _has_numba() -> bool:
    if os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0"):
        return False
    try:
        return importlib.util.find_spec("numba") is not None
    except (ImportError, ValueError):  # sys.modules["numba"] is None, or a module without a spec
        return False
