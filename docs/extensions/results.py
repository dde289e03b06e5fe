"""Tables of the files under benchmarks/results, made when the site is built.

::

    ```{results} optimizer_step.csv
    :rows: optimizer
    :columns: model
    :values: ratio :.2f; cpu_ms :.1f = CPU ms
    :where: kernels = on
    ```

has a row for each optimizer, two columns for each model, and in each cell a number; several rows of the file that fall into one
cell are shown as mean ± standard deviation. Below the table are the command, the date and the machine, from
benchmarks/results/README.md. ``{other-results}`` shows the files that no ``results`` on the page names, as they are.
"""

from __future__ import annotations

import csv
import json
import re
import statistics
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
LONGEST = 12  # rows and columns of a file that is shown as it is
VALUE = re.compile(
    r"\s*(?P<column>\w+)\s*(?:\*\s*(?P<factor>[\d.e+-]+))?\s*(?::(?P<format>[^=\s]+))?\s*(?:=\s*(?P<title>.+?))?\s*$"
)


class Value(NamedTuple):
    """What a cell shows: a column of the file, times a factor, in a format."""

    column: str
    factor: float
    format: str
    title: str

    @classmethod
    def parse(cls, text: str) -> Value:
        found = VALUE.match(text)
        if found is None:
            raise ValueError(f"a value must be 'column * factor :format = title', got {text!r}")
        column = found["column"]
        return cls(column, float(found["factor"] or 1), found["format"] or "", found["title"] or column.replace("_", " "))

    def cell(self, rows: list[dict[str, str]]) -> str:
        """The value, or mean ± standard deviation of several."""
        texts = [row[self.column] for row in rows if row.get(self.column) not in (None, "")]
        if not texts or not self.format:
            return ", ".join(dict.fromkeys(texts))
        numbers = [self.factor * float(text) for text in texts]
        mean = format(statistics.fmean(numbers), self.format)
        return mean if len(numbers) == 1 else f"{mean} ± {format(statistics.stdev(numbers), self.format)}"


def read(name: str) -> list[dict[str, str]]:
    """The rows of a CSV or JSON-lines file."""
    text = (RESULTS / name).read_text(encoding="utf-8")
    if name.endswith(".jsonl"):
        return [{k: str(v) for k, v in json.loads(line).items()} for line in text.splitlines()]
    return list(csv.DictReader(text.splitlines()))


def provenance(name: str) -> tuple[str, str]:
    """The command that wrote a file, and when and where, as benchmarks/results/README.md has them."""
    where = ""
    for line in (RESULTS / "README.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split(" | ")]
        if not line.startswith("| ") or len(cells) != 3 or cells[0] in ("file", "---"):
            continue
        if not cells[2].startswith("the same"):
            where = here = cells[2]
        else:  # the machine named last, and what differs
            here = where + cells[2].removeprefix("the same")
        patterns = [re.escape(file).replace(r"\*", "[^/]*") for file in cells[0].split(", ")]
        if any(re.fullmatch(pattern, name) for pattern in patterns):
            return cells[1], here
    return "", ""


def matches(row: dict[str, str], where: str) -> bool:
    """Whether a row has the values that are asked for: ``column = value | value; ...``."""
    for condition in filter(None, (part.strip() for part in where.split(";"))):
        column, _, wanted = (part.strip() for part in condition.partition("="))
        if column not in row:
            raise ValueError(f"where must name a column, {', '.join(row)}, got {column!r}")
        if row[column] not in [value.strip() for value in wanted.split("|")]:
            return False
    return True


def label(text: str) -> str:
    """A key: numbers with three digits."""
    try:
        return format(float(text), ".3g") if re.search(r"[.e]", text) else text
    except ValueError:
        return text


def table(rows: list[dict[str, str]], keys: list[str], across: list[str], values: list[Value]) -> list[list[str]]:
    """Heading and cells: a row for each combination of ``keys``, a column for each of ``across`` and each value."""
    down = list(dict.fromkeys(tuple(row[key] for key in keys) for row in rows))
    columns = list(dict.fromkeys(tuple(row[key] for key in across) for row in rows))
    heading = [key.replace("_", " ") for key in keys]
    for column in columns:
        place = ", ".join(map(label, column))
        heading += [place if across and len(values) == 1 else f"{place}, {v.title}" if across else v.title for v in values]
    lines = [heading]
    for row in down:
        line = [label(text) for text in row]
        for column in columns:
            here = [r for r in rows if tuple(r[k] for k in keys) == row and tuple(r[k] for k in across) == column]
            line += [value.cell(here) for value in values]
        lines.append(line)
    return lines


class Results(SphinxDirective):
    """One table of one file."""

    required_arguments = 1
    option_spec: ClassVar[dict[str, Any]] = dict.fromkeys(("rows", "columns", "values", "where"), directives.unchanged)

    def run(self) -> list[nodes.Node]:
        name = self.arguments[0]
        self.env.note_dependency(str(RESULTS / name))
        self.env.note_dependency(str(RESULTS / "README.md"))
        self.env.metadata[self.env.docname].setdefault("results", []).append(name)
        names = lambda option: [part.strip() for part in self.options.get(option, "").split(",") if part.strip()]
        try:
            rows = [row for row in read(name) if matches(row, self.options.get("where", ""))]
            values = [Value.parse(part) for part in self.options["values"].split(";")]
            shown = table(rows, names("rows"), names("columns"), values)
        except (OSError, KeyError, ValueError) as error:
            raise self.error(f"{name}: {type(error).__name__}: {error}") from error
        return self.rendered(shown) + self.caption(name)

    def rendered(self, lines: list[list[str]]) -> list[nodes.Node]:
        escaped = [[cell.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*") for cell in line] for line in lines]
        marks = ["---"] * len(lines[0])
        text = "\n".join("| " + " | ".join(line) + " |" for line in [escaped[0], marks, *escaped[1:]])
        found = self.parse_text_to_nodes(text)
        for node in found:
            if isinstance(node, nodes.table):
                node["classes"].append("results")
        return found

    def caption(self, name: str) -> list[nodes.Node]:
        command, where = provenance(name)
        text = f"{{repo}}`{name} <benchmarks/results/{name}>`"
        text += f": {command}; {where}." if command else ""
        found = self.parse_text_to_nodes(text)
        for node in found:
            node["classes"] = [*node.get("classes", []), "provenance"]
        return found


class OtherResults(Results):
    """The files that no table of the page shows."""

    required_arguments = 0
    option_spec: ClassVar[dict[str, Any]] = {}

    def run(self) -> list[nodes.Node]:
        shown = self.env.metadata[self.env.docname].get("results", [])
        found: list[nodes.Node] = []
        for path in sorted([*RESULTS.rglob("*.csv"), *RESULTS.rglob("*.jsonl")]):
            name = path.relative_to(RESULTS).as_posix()
            if name in shown or not (rows := read(name)):
                continue
            self.env.note_dependency(str(path))
            columns = list(rows[0])[:LONGEST]
            lines = [
                [c.replace("_", " ") for c in columns],
                *([label(row.get(c, "")) for c in columns] for row in rows[:LONGEST]),
            ]
            more = len(rows) - LONGEST
            section = nodes.section(ids=[nodes.make_id(name)], names=[nodes.fully_normalize_name(name)])
            section += nodes.title(text=name)
            section += self.rendered(lines) + ([nodes.paragraph(text=f"and {more} more rows.")] if more > 0 else [])
            section += self.caption(name)
            found.append(section)
        return found


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("results", Results)
    app.add_directive("other-results", OtherResults)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
