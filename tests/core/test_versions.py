"""python -m proxopt says what works, and survives libraries that are missing, broken, crash or hang."""

from __future__ import annotations

import pytest

from proxopt import __main__ as versions

BROKEN = {
    "raise RuntimeError('no driver')": "BROKEN: RuntimeError: no driver",
    "import os; os._exit(3)": "BROKEN: the process ended with code 3",
    "print('a long story'); version = 1": "BROKEN: ",  # what imports, but is something else
}


@pytest.mark.parametrize("source", BROKEN)
def test_a_broken_library_is_a_line(source, tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text(source, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert versions.tried("torch").startswith(BROKEN[source])


def test_a_library_that_does_not_answer_is_a_line(tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("import time; time.sleep(600)", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(versions, "SECONDS", 1.0)
    assert versions.tried("torch") == "BROKEN: no answer within 1 seconds"


def test_a_missing_library_names_its_extra(monkeypatch):
    def missing(name):
        raise versions.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(versions.metadata, "version", missing)
    assert versions.state("jax") == ("not installed", 'pip install "proxopt[jax]"')
    assert versions.state("triton") == ("not installed", "")


def test_the_table_has_a_line_for_each_library(capsys, monkeypatch):
    monkeypatch.setattr(versions, "SHOWN", ("numpy", "array-api-compat"))
    versions.main()
    head, python, numpy, _ = capsys.readouterr().out.splitlines()
    assert head.startswith("proxopt ") and python.startswith("Python ") and numpy.endswith("proxopt works")
