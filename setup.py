"""The description of the package on PyPI: the README with absolute links. Everything else is in setup.cfg."""

import configparser
import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent


def absolute_links(text: str, repository: str, version: str) -> str:
    """Relative links and pictures of a Markdown text, as addresses of the tagged version in the repository on GitHub."""
    pictures = re.compile(r'(!\[[^]]*\]\(|src=")(?![a-z]+:)')
    links = re.compile(r"((?<!!)\[[^]]*\]\()(?![a-z]+:|#)")
    return links.sub(rf"\1{repository}/blob/v{version}/", pictures.sub(rf"\1{repository}/raw/v{version}/", text))


if __name__ == "__main__":
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    (version,) = re.findall(r'__version__ = "(.+)"', (ROOT / "proxopt" / "_version.py").read_text(encoding="utf-8"))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    setup(
        long_description=absolute_links(readme, config["metadata"]["url"], version),
        long_description_content_type="text/markdown",
    )
