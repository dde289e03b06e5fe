"""Shared by all tests: the settings of Hypothesis, the programs that JAX has compiled, and fixtures."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side, and their tensors are small

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from libraries import Library, open_library

# Compilation takes most of the time of tests in JAX: the processes of a run share what they have compiled.
PROGRAMS = "" if "JAX_COMPILATION_CACHE_DIR" in os.environ else tempfile.mkdtemp(prefix="proxopt-programs-")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", PROGRAMS)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

settings.register_profile("laws", deadline=None, max_examples=15, derandomize=True, database=None)
# for another version of the libraries: `pytest --hypothesis-profile few`
settings.register_profile("few", settings.get_profile("laws"), max_examples=3)
settings.load_profile("laws")


def pytest_unconfigure() -> None:
    if PROGRAMS:  # in the process that has made the folder
        shutil.rmtree(PROGRAMS, ignore_errors=True)


@pytest.fixture(params=["numpy", "torch", "jax", "array_api_strict"])
def library(request: pytest.FixtureRequest) -> Iterator[Library]:
    """Each array library in turn, with double precision at hand."""
    yield from open_library(request.param)


@pytest.fixture(params=["torch", "jax"])
def autograd_library(request: pytest.FixtureRequest) -> Iterator[Library]:
    """The libraries that differentiate."""
    yield from open_library(request.param)


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A --data-dir with a small CIFAR-10 of fake images, which `nas.data.cifar_files` takes for the real one."""
    from nas.data import cifar_files
    from nas_cases import fake_cifar

    real, folder = dict(cifar_files.SOURCES), tmp_path_factory.mktemp("images")
    fake_cifar(folder)
    yield folder
    cifar_files.SOURCES.update(real)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A --data-dir with a small text."""
    from nas_cases import fake_text

    folder = tmp_path_factory.mktemp("text") / "corpus"
    fake_text(folder)
    return folder


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Searches and trainings draw nothing and count no network: for tests of other things."""
    from nas.engine import report
    from nas.nets.torch import cnn
    from nas.space import drawing

    monkeypatch.setattr(report, "write", lambda *args: None)
    monkeypatch.setattr(drawing, "save", lambda figure, *files: drawing.plt.close(figure))
    monkeypatch.setattr(cnn, "network_size", lambda *args: {"parameters": 1, "macs": 1})


@pytest.fixture
def exact_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the convolutions of `nas.nets.torch.convolution_kernels` in double precision too, to compare them exactly."""
    from nas.nets.torch import convolution_kernels, operations

    anywhere = lambda x: True
    monkeypatch.setattr(convolution_kernels, "use_custom_gradient", anywhere)
    monkeypatch.setattr(operations, "use_custom_gradient", anywhere)
    monkeypatch.setattr(convolution_kernels, "MANY_VALUES", 0)
