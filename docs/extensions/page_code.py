"""The code of the pages: python docs/extensions/page_code.py docs/start/torch.md [--write]

The blocks of a page run in order, in one namespace and in an empty folder. A block marked ``text`` that follows one marked
``python`` shows what it prints; ``--write`` puts it there. The tests compare all but the numbers, which differ between
processors. Blocks marked ``pycon`` are doctests, which must agree exactly. A block that imports a library of others which is not
installed is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import doctest
import io
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1]
OTHERS = {"jaxopt", "torch_pruning", "torchao", "lightning", "transformers", "accelerate"}  # needed for single blocks
FENCE = re.compile(r"^```(python|pycon)\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A block of code: its kind, its source, what the page says that it prints (None: nothing), and its place in the text."""

    kind: str
    source: str
    shown: str | None
    line: int
    place: tuple[int, int]  # of what it prints


def pages() -> list[Path]:
    """The pages that have code to run."""
    found = [p for p in DOCS.rglob("*.md") if not {"_build", "auto_gallery", "generated"} & set(p.relative_to(DOCS).parts)]
    return sorted(p for p in found if FENCE.search(p.read_text(encoding="utf-8")))


def blocks(text: str) -> list[Block]:
    """The blocks of a page in order."""
    return [Block(m[1], m[2], m[3], text.count("\n", 0, m.start()) + 2, m.span(3)) for m in FENCE.finditer(text)]


def run(page: Path) -> Iterator[tuple[Block, str]]:
    """Each block with what it printed; for doctests, the report of what failed."""
    names: dict[str, Any] = {"__name__": "__main__"}
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            for block in blocks(page.read_text(encoding="utf-8")):
                yield block, _printed(block, names, page)
        finally:
            os.chdir(before)


def _printed(block: Block, names: dict[str, Any], page: Path) -> str:
    out = io.StringIO()
    if block.kind == "pycon":
        test = doctest.DocTestParser().get_doctest(block.source, names, page.name, str(page), block.line)
        doctest.DocTestRunner().run(test, out=out.write, clear_globs=False)
        names.update(test.globs)
        return out.getvalue()
    code = compile("\n" * (block.line - 1) + block.source, str(page), "exec")
    with contextlib.redirect_stdout(out):
        try:
            exec(code, names)
        except ModuleNotFoundError as error:
            if error.name is None or error.name.split(".")[0] not in OTHERS:
                raise
            return block.shown or ""
    return out.getvalue()


def masked(text: str) -> list[str]:
    """The words of a text with all numbers replaced, line by line."""
    return [" ".join(re.sub(r"-?\d[\d.,]*(e[+-]?\d+)?", "#", line).split()) for line in text.strip().splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", type=Path, nargs="*", help="all, if none is named")
    parser.add_argument("--write", action="store_true", help="write what the blocks print into the pages")
    args = parser.parse_args()
    for page in [p.resolve() for p in args.pages] or pages():
        text, shift = page.read_text(encoding="utf-8"), 0
        for block, printed in run(page):
            if block.kind == "pycon" and printed:
                print(f"{page}:{block.line}\n{printed}")
            elif block.kind == "python" and block.shown is not None and args.write:
                start, end = (place + shift for place in block.place)
                text = text[:start] + printed + text[end:]
                shift += len(printed) - (end - start)
            elif block.kind == "python":
                print(f"{page}:{block.line}\n{printed}")
        if args.write:
            page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
