"""Imports in `examples/nas`: none from a later layer, none in a circle, and none of torch where another library must do."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import nas
import pytest

ROOT = Path(nas.__file__).parent
LAYERS = re.findall(r"^    (\w+)  ", nas.__doc__, flags=re.M)  # in the order of the docstring
FILES = {".".join(f.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): f for f in ROOT.rglob("*.py")}
WITHOUT_TORCH = [
    *(name for name in FILES if name.startswith("nas.space") or "settings" in name.split(".")),
    *(
        f"nas.engine.{name}"
        for name in (
            *("command_line", "console", "loop", "log", "curves", "report", "results", "bisection", "selection"),
            *("lock", "resume", "signals"),
        )
    ),
    *(f"nas.data.{name}" for name in ("cifar_files", "image_files", "image_sets", "nats_bench", "text")),
    *("nas.bilevel.outcome", "nas.methods.connected", "nas.methods.group_sparsity", "nas.methods.frameworks"),
    *("nas.methods.selection", "nas.methods.sparse_rules", "nas.nets.nasbench201"),
]


def imported(name):
    """The modules of `nas` that a module imports, wherever in its code."""
    package = name.split(".") if FILES[name].name == "__init__.py" else name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            source = ".".join([*above, *(node.module or "").split(".")]).strip(".")
            found |= {f"{source}.{alias.name}" if f"{source}.{alias.name}" in FILES else source for alias in node.names}
    return {module for module in found if module in FILES}


def test_the_docstring_lists_all_packages():
    assert sorted(LAYERS) == sorted(d.name for d in ROOT.iterdir() if (d / "__init__.py").exists())


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_module_imports_from_its_own_layer_and_those_before_it(name):
    if name == "nas":
        return
    place = lambda module: LAYERS.index(module.split(".")[1])
    later = {module for module in imported(name) if place(module) > place(name)}
    assert not later


def test_no_modules_import_each_other_in_a_circle():
    left = {name: imported(name) - {name} for name in FILES}
    while left:
        free = [name for name, needs in left.items() if not needs & left.keys()]
        assert free, f"a circle among {', '.join(sorted(left))}"
        for name in free:
            del left[name]


def test_settings_spaces_tables_and_reports_do_without_torch(tmp_path):
    program = f"""
import sys
sys.modules["torch"] = None  # an import of it fails
import importlib
for name in {WITHOUT_TORCH!r}:
    importlib.import_module(name)
from pathlib import Path
from nas.engine.log import Log
Log(Path(sys.argv[1])).write([{{"epoch": 0}}])
"""
    words = [sys.executable, "-c", program, str(tmp_path)]
    environment = {"PYTHONPATH": str(ROOT.parent), "PATH": ""}
    assert subprocess.run(words, env=environment, capture_output=True, text=True).stderr == ""
