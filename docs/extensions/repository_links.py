"""The role ``{repo}`PATH```: a link to a file or folder of the repository, which must exist."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.nodes import Node, system_message
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxRole

ROOT = Path(__file__).parents[2]


class Repository(SphinxRole):
    """A link to the file, shown as its path or as ``text <path>``."""

    def run(self) -> tuple[list[Node], list[system_message]]:
        shown, _, path = self.text.rstrip(">").rpartition(" <") if self.text.endswith(">") else ("", "", self.text)
        if not (ROOT / path).exists():
            message = self.inliner.reporter.warning(f"the repository has no {path!r}", line=self.lineno)
            return [self.inliner.problematic(self.rawtext, self.rawtext, message)], [message]
        kind = "tree" if (ROOT / path).is_dir() else "blob"
        content = nodes.Text(shown) if shown else nodes.literal("", path)
        link = nodes.reference("", "", content, refuri=f"{self.config.repository_url}/{kind}/main/{path}", internal=False)
        return [link], []


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_config_value("repository_url", "", "env", str)
    app.add_role("repo", Repository())
    return {"parallel_read_safe": True, "parallel_write_safe": True}
