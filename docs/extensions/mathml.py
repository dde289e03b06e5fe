"""Formulas as MathML, which browsers draw without a script and without the network. The converter is that of docutils."""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from docutils.utils.math import MathError, latex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging

logger = logging.getLogger(__name__)


TAG = re.compile(r"\\tag\{(\w+)\}")
KNOWN = {  # what the converter does not know, and what it knows in its place
    r"\\([bB]ig)(?=[(\[|])": r"\\\1l",
    r"\\([bB]ig)(?=[)\]])": r"\\\1r",
    r"\\operatorname\*\{arg\\,min\}": r"\\arg\\min",
    r"\\([dt]?frac)(\d)(\d)": r"\\\1{\2}{\3}",
    r"(\\(?:hat|bar|tilde) ?(?:\w|\{\w\}))(?=[_^])": r"\1{}",  # else a subscript stands below the letter
    r"\\iff\b": r"\\Longleftrightarrow",
    r"\\texttt\b": r"\\mathtt",
}


def converted(node: nodes.Element, text: str, block: bool) -> str:
    """A formula as MathML."""
    for pattern, known in KNOWN.items():
        text = re.sub(pattern, known, text)
    if block and "\\\\" in text and "\\begin{" not in text:
        text = f"\\begin{{aligned}}{text}\\end{{aligned}}"
    if "\\operatorname*" in text:  # the converter draws the star
        logger.warning("formula cannot be converted: \\operatorname* in %r", text, location=node)
    try:
        return str(latex2mathml.tex2mathml(text, as_block=block))
    except MathError as error:
        logger.warning("formula cannot be converted: %s in %r", error, text, location=node)
        return f"<code>{text}</code>"


def visit_math(translator: Any, node: nodes.math) -> None:
    translator.body.append(converted(node, node.astext().strip(), block=False))
    raise nodes.SkipNode


def visit_math_block(translator: Any, node: nodes.math_block) -> None:
    text = node.astext().strip()
    number = "".join(f'<span class="eqno">({tag})</span>' for tag in TAG.findall(text))
    translator.body.append(f'<div class="math">{number}{converted(node, TAG.sub("", text), block=True)}</div>\n')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
