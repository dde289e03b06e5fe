"""Every command of examples/PUBLISHED.md and of the guides is understood by its script. None of them runs."""

import argparse
import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest
from nas.methods import registry
from nas.space import genotype

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "examples" / "PUBLISHED.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", PAGE, flags=re.S) for line in block.splitlines() if line]
GUIDES = "".join((ROOT / "docs" / "guides" / name).read_text(encoding="utf-8") for name in ("search.md", "tpu.md"))
IN_GUIDES = re.findall(r"^python examples/.*$", GUIDES, flags=re.M)


class Understood(Exception):
    """The command line was parsed."""


@pytest.mark.parametrize("command", COMMANDS + IN_GUIDES)
def test_a_command_is_understood(command, monkeypatch):
    python, script, *words = shlex.split(command)
    assert python == "python" and (ROOT / script).is_file()
    monkeypatch.setattr(sys, "path", [str((ROOT / script).parent), *sys.path])
    program = importlib.import_module(Path(script).stem)

    def understood(*args, **options):
        raise Understood

    if "run_each_seed" in vars(program):  # a genotype may be that of a search to come
        known = genotype.load_genotype
        load = lambda name, *kind: known("DARTS_V2" if str(name).startswith("runs/") else name, *kind)
        for place in (genotype, program):
            if "load_genotype" in vars(place):
                monkeypatch.setattr(place, "load_genotype", load)
        monkeypatch.setattr(program, "run_each_seed", understood)
    else:
        parse = argparse.ArgumentParser.parse_args
        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", lambda *args: understood(parse(*args)))
    with pytest.raises(Understood):
        program.main(words)


def test_the_page_has_every_table_and_figure_and_known_presets():
    assert len(COMMANDS) > 25 and len(IN_GUIDES) > 3
    for paper, tables, figures in (("SparseNAS", "12345", "12345678"), ("ISTA-NAS", "1234", "12"), ("GSparsity", "123", "1")):
        (section,) = re.findall(rf"^## {paper}\n(.*?)(?=^## |\Z)", PAGE, flags=re.M | re.S)
        named = set(re.findall(r"\*\*(?:Table|Figure)[^*]*\*\*", section))
        for kind, numbers in (("Table", tables), ("Figure", figures)):
            found = {n for name in named for part in re.findall(rf"{kind} ([\d, and]+)", name) for n in re.findall(r"\d", part)}
            assert found == set(numbers), (paper, kind, found)
    for method, stage, preset in re.findall(r"--method (\w+) (--one-stage )?--preset (\w+)", PAGE):
        assert preset in (registry.ONE_STAGE if stage else registry.CIFAR)[method].presets
