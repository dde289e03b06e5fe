"""What is installed, and what of it works: python -m proxopt

Each library is tried in a process of its own, so that one which is broken, crashes or does not answer is a line of the table.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import proxopt

SECONDS = 120.0  # to import a library and find its devices, on a slow disk
CALL = "import sys; from proxopt.__main__ import PROBES; print('\\n' + PROBES[sys.argv[1]]())"
EXTRAS = {"numba": "fast", "torch": "torch", "jax": "jax", "jaxlib": "jax", "optax": "jax"}


def _numpy() -> str:
    """One prox."""
    import numpy as np

    from proxopt import kernels

    with kernels.enabled(False):
        found = proxopt.L1(1.0).prox(np.array([3.0, 0.5]))
    return "proxopt works" if found.tolist() == [2.0, 0.0] else f"proxopt computes {found.tolist()}"


def _scipy() -> str:
    """One certified solution."""
    import numpy as np

    found = proxopt.sparse_code(np.eye(2), np.array([3.0, 0.5]), 1.0)
    return "solvers work" if bool(found.success) else "solvers fail"


def _numba() -> str:
    """Whether the compiled loops are used; compiling them here would take seconds."""
    from proxopt import kernels

    if os.environ.get("PROXOPT_KERNELS", "1") == "0":
        return "compiled loops are off (PROXOPT_KERNELS=0)"
    return "compiled loops are on" if kernels.usable() else "compiled loops cannot be imported"


def _torch() -> str:
    """One step, and the devices."""
    import torch

    import proxopt_torch
    from proxopt import kernels

    w = torch.nn.Parameter(torch.tensor([1.0, 0.01]))
    optimizer = proxopt_torch.ProxAdam([w], lr=0.1, penalty=proxopt.L1(0.5))
    w.grad = 2 * w.detach()
    with kernels.enabled(False):
        optimizer.step()
    works = "works" if w[1] == 0 else "computes wrong steps"
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    devices += ["mps"] if torch.backends.mps.is_available() else []
    return f"proxopt_torch {works}; devices: {', '.join([f'cpu with {torch.get_num_threads()} threads', *devices])}"


def _triton() -> str:
    """Whether the kernels for CUDA devices can be imported."""
    import proxopt_torch.device.triton_kernels  # noqa: F401

    switch = "on" if os.environ.get("PROXOPT_TRITON") == "1" else "off, PROXOPT_TRITON=1 switches them on"
    return f"kernels can be imported ({switch})"


def _jax() -> str:
    """One step, and the devices."""
    import jax
    import jax.numpy as jnp
    import optax

    import proxopt_jax

    w = jnp.array([1.0, 0.01])
    tx = proxopt_jax.proximal(optax.sgd(0.1), proxopt.L1(0.5), learning_rate=0.1)
    update, _ = tx.update(2 * w, tx.init(w), w)
    works = "works" if optax.apply_updates(w, update)[1] == 0 else "computes wrong steps"
    names = [f"{d.platform}:{d.id} {d.device_kind}" for d in jax.devices()]
    return f"proxopt_jax {works}; devices: {', '.join(names)}"


PROBES: dict[str, Callable[[], str]] = {
    "numpy": _numpy,
    "scipy": _scipy,
    "numba": _numba,
    "torch": _torch,
    "triton": _triton,
    "jax": _jax,
}
"""What is tried of each library: functions that return a line of text, and may fail in any way."""

SHOWN = ("numpy", "scipy", "array-api-compat", "numba", "torch", "triton", "jax", "jaxlib", "optax")


def state(library: str) -> tuple[str, str]:
    """(version, what works) of a library. Never raises."""
    try:
        version = metadata.version(library)
    except Exception:  # not installed, or its metadata are damaged
        hint = f'pip install "proxopt[{EXTRAS[library]}]"' if library in EXTRAS else ""
        return "not installed", hint
    return version, tried(library) if library in PROBES else ""


def tried(library: str) -> str:
    """The line of a probe, or how it failed."""
    path = os.pathsep.join([str(Path(proxopt.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-W", "ignore", "-c", CALL, library]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
            timeout=SECONDS,
            env={**os.environ, "PYTHONPATH": path, "PYTHONIOENCODING": "utf-8"},
        )
    except subprocess.TimeoutExpired:
        return f"BROKEN: no answer within {SECONDS:.0f} seconds"
    except OSError as error:
        return f"not tried: {error}"
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    if done.returncode == 0 and lines:
        return lines[-1]
    return f"BROKEN: {lines[-1] if lines else f'the process ended with code {done.returncode}'}"


def main() -> None:
    """Print the table, line by line as the libraries answer."""
    print(f"proxopt {proxopt.__version__} in {Path(proxopt.__file__).parent}")
    print(f"Python {platform.python_version()} in {sys.executable}, {platform.platform()}, {os.cpu_count()} CPUs")
    for library in SHOWN:
        version, works = state(library)
        print(f"  {library:18}{version:16}{works}".rstrip(), flush=True)


if __name__ == "__main__":
    main()
