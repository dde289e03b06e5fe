"""constraints-lowest.txt holds the lowest versions that setup.cfg allows; a test run with it shows whether these suffice."""

from __future__ import annotations

import configparser
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def bounds() -> dict[str, str]:
    """The lower bounds of what the core and the two plugins need."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    extras = config["options.extras_require"]
    lines = "\n".join([config["options"]["install_requires"], extras["torch"], extras["jax"]])
    return dict(re.findall(r"^([\w-]+)>=([\d.]+)", lines, re.MULTILINE))


def pins() -> dict[str, str]:
    text = (ROOT / "constraints-lowest.txt").read_text(encoding="utf-8")
    return dict(re.findall(r"^([\w-]+)==([\d.]+)$", text, re.MULTILINE))


@pytest.mark.parametrize("name", sorted(bounds()))
def test_the_lowest_version_is_pinned(name):
    plain = lambda version: [int(part) for part in re.sub(r"(\.0)+$", "", version).split(".")]
    assert plain(pins()[name]) == plain(bounds()[name]), f"{name} in constraints-lowest.txt must be the lower bound in setup.cfg"
