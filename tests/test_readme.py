"""The README as a newcomer reads it: each snippet runs alone, CI runs its test command, its links lead somewhere."""

import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_a_snippet_runs_when_it_is_pasted_alone(number, capsys):
    names: dict = {}
    exec(blocks("python")[number], names)
    if "coupled" in names:
        table = next(block for block in blocks("text") if block.startswith("kind "))
        assert capsys.readouterr().out.startswith(table)
    if "small" in names:
        assert names["small"].model[0].in_features == 3, "the README says that 17 of the 20 inputs are useless"
    if "params" in names:
        assert int((names["params"]["w"] == 0).sum()) == 17, "the README says that 17 of the 20 inputs are useless"


def test_what_the_readme_installs_is_there():
    """Names of extras in the install lines, and no line that needs a release on PyPI."""
    import configparser

    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    for line in re.findall(r"pip install [^\n`]*", TEXT):
        assert "-e" in shlex.split(line), f"{line!r} does not install from a checkout"
        for extra in re.findall(r"\.\[([\w,]+)\]", line):
            assert set(extra.split(",")) <= set(config["options.extras_require"])


def test_ci_runs_the_test_command_of_the_readme():
    command = next(b for b in blocks("bash") if "pytest" in b)
    said = [shlex.split(line) for line in command.splitlines()]
    done = [
        shlex.split(line, comments=True)
        for line in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
        if "<<" not in line
    ]
    for words in said:
        assert words in [[w for w in line if w != "-q"] for line in done], f".ci/run must run {shlex.join(words)}"


NAMED = re.findall(r"(?:\]\(|`|python )([\w./-]+\.(?:py|md|csv|json|png|svg|txt|cfg))\b", TEXT)


@pytest.mark.parametrize("path", sorted(set(NAMED)))
def test_the_files_that_the_readme_names_exist(path):
    assert path.startswith("runs/") or (ROOT / path).exists()
