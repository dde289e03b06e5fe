"""proxopt needs neither torch nor JAX, and its docstrings run."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import subprocess
import sys

import pytest
from architectures import declare_operators_of_torchvision

PACKAGES = ("proxopt", "proxopt_torch", "proxopt_jax")

OPTIONAL = {"proxopt_torch.device.triton_kernels": "triton"}  # what a module imports that need not be installed
TRAINERS = {f"proxopt_torch.integrations.{library}": library for library in ("lightning", "transformers")}

NO_EXAMPLE = ("Penalty", "Compacted", "SparsityReport", "ProximalState")  # a base, and what functions return

WITHOUT_FRAMEWORKS = """
import sys
for name in ("torch", "jax", "optax"):
    sys.modules[name] = None  # import torch: ModuleNotFoundError
import numpy as np
import proxopt
from proxopt import L1, GroupL2, Groups, SparseGroupLasso, max_strength, sparsity, updates
x = np.linspace(-1, 1, 12).reshape(4, 3)
for penalty in (L1(0.1), GroupL2(0.1, Groups.along(0)), SparseGroupLasso(0.1, 0.5, Groups.labels([0, 1, 1, 0]))):
    proxopt.testing.check_prox(penalty, x, np.abs(x) + 0.1)
    updates.adam_hapg(x, x, None, penalty, lr=0.1)
    max_strength(x, penalty)
sparsity.summary(x)
assert not any(m.split(".")[0] in ("torch", "jax", "optax") for m in sys.modules if sys.modules[m] is not None)
"""


def test_proxopt_works_where_neither_torch_nor_jax_is_installed():
    subprocess.run([sys.executable, "-W", "error", "-c", WITHOUT_FRAMEWORKS], check=True)


def test_importing_proxopt_imports_no_framework():
    code = "import sys, proxopt; assert not {'torch', 'jax', 'optax', 'scipy.optimize'} & set(sys.modules)"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def modules() -> list[str]:
    """All modules of the packages by name."""
    found = []
    for package in map(importlib.import_module, PACKAGES):
        found += [package.__name__] + [m.name for m in pkgutil.walk_packages(package.__path__, package.__name__ + ".")]
    return found


@pytest.mark.parametrize("name", [pytest.param(m, marks=pytest.mark.zoo) if m in TRAINERS else m for m in modules()])
def test_the_examples_in_the_docstrings_run(name):
    if name in OPTIONAL:
        pytest.importorskip(OPTIONAL[name])
    if name in TRAINERS:
        declare_operators_of_torchvision()
        pytest.importorskip(TRAINERS[name])
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def public() -> list[tuple[str, str]]:
    """What the packages export."""
    return [(p, name) for p in PACKAGES for name in importlib.import_module(p).__all__]


@pytest.mark.parametrize(("package", "name"), public())
def test_what_a_user_meets_has_an_example(package, name):
    thing = getattr(importlib.import_module(package), name)
    if not (inspect.isfunction(thing) or inspect.isclass(thing)) or name in NO_EXAMPLE:
        return
    assert ">>>" in thing.__doc__


def test_a_plugin_without_its_framework_names_the_extra():
    for package, framework in (("proxopt_torch", "torch"), ("proxopt_jax", "jax"), ("proxopt_jax", "optax")):
        code = f"import sys; sys.modules[{framework!r}] = None\nimport {package}"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert f'pip install "proxopt[{package[8:]}]"' in done.stderr


def test_a_callback_without_its_trainer_names_the_extra():
    """``import proxopt_torch`` needs none of them: it succeeds where they cannot be imported."""
    hidden = "import sys\nfor name in ('lightning', 'pytorch_lightning', 'transformers', 'accelerate'): sys.modules[name] = None"
    for module in TRAINERS:
        code = f"{hidden}\nimport proxopt_torch\nprint('imported')\nimport {module}"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.stdout == "imported\n" and 'pip install "proxopt[trainers]"' in done.stderr
