"""The README as a newcomer reads it: its snippets run in order, CI runs its test command, its links lead somewhere."""

import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def test_the_snippets_run_one_after_the_other(capsys):
    names: dict = {}
    for snippet in blocks("python"):
        exec(snippet, names)
    assert names["small"].model[0].in_features == 3, "the README says that 17 of the 20 inputs are useless"


def test_ci_runs_the_test_command_of_the_readme():
    command = next(b for b in blocks("bash") if "pytest" in b)
    said = [shlex.split(line) for line in command.splitlines()]
    done = [shlex.split(line, comments=True) for line in (ROOT / ".ci" / "run").read_text().splitlines() if "<<" not in line]
    for words in said:
        assert words in [[w for w in line if w != "-q"] for line in done], f".ci/run must run {shlex.join(words)}"


NAMED = re.findall(r"(?:\]\(|`|python )([\w./-]+\.(?:py|md|csv|json|png|svg|txt|cfg))\b", TEXT)


@pytest.mark.parametrize("path", sorted(set(NAMED)))
def test_the_files_that_the_readme_names_exist(path):
    assert path.startswith("runs/") or (ROOT / path).exists()
