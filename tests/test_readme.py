"""The README as a newcomer reads it: each snippet runs alone, CI runs its test command, its links lead somewhere."""

import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


SNIPPETS = re.findall(r"```python\n(.*?)```\s*```text\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_a_snippet_runs_when_it_is_pasted_alone_and_prints_what_is_shown(number, capsys):
    """What is printed does not depend on rounding: numbers of units that a budget leaves, useless inputs, bounds."""
    code, shown = SNIPPETS[number]
    exec(code, {})
    assert capsys.readouterr().out == shown


def test_every_snippet_shows_its_output_and_the_whole_is_short():
    assert len(SNIPPETS) == len(blocks("python")) == 3
    assert len(TEXT.splitlines()) <= 150


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


def test_links_are_absolute_in_the_description_of_the_package():
    import importlib.util

    spec = importlib.util.spec_from_file_location("proxopt_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = module.absolute_links(TEXT, "https://example.org/code", "1.2")
    assert not re.findall(r'(?:\]\(|src=")(?!https?:)[^)"]*', text)
    assert "](https://example.org/code/raw/v1.2/benchmarks/results/overview.png)" in text
    assert 'src="https://example.org/code/raw/v1.2/' in text and "](https://example.org/code/blob/v1.2/docs/" in text


@pytest.mark.filterwarnings("ignore:the target parameters=0.25 is not reached")
def test_the_script_of_the_picture(tmp_path, capsys):
    import overview

    overview.main(["--steps", "40", "--out", str(tmp_path)])
    dense, sparse, small, written = capsys.readouterr().out.splitlines()
    assert dense == "64 hidden units, 4,810 parameters" and written == f"written: {tmp_path / 'overview.png'}"
    assert re.findall(r"accuracy (\S+) %", sparse) == re.findall(r"(\S+) %", small)
    assert (tmp_path / "overview.png").stat().st_size > 10_000
