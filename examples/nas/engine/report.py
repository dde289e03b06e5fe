"""The report of a finished search: pictures, and an HTML page with all of them."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..space import drawing
from ..space.genotype import AnyGenotype, load_genotype
from ..space.spaces import Space
from . import curves

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; }
td, th { padding: .15rem .7rem; border-bottom: 1px solid #ddd; text-align: right; }
td:first-child, th:first-child { text-align: left; }
svg { width: 100%; height: auto; }
pre { background: #f6f6f6; padding: 1rem; }
.warning { background: #fff3d6; padding: .5rem 1rem; }
"""
COLUMNS = (
    *("epoch", "strength", "train_accuracy", "valid_accuracy", "restricted_accuracy"),
    *("train_perplexity", "valid_perplexity", "restricted_perplexity"),
    *("paths_normal", "paths_reduce", "paths_recurrent", "nodes_recurrent", "frozen_nodes", "stopped_nodes"),
)


def write(
    out: Path,
    method: str,
    rows: Sequence[Mapping[str, Any]],
    point: Mapping[str, Any],
    space: Space,
    settings: Mapping[str, Any],
) -> None:
    """Write cells.svg, cells.png, weights.png, curves.png and report.html to `out`, which contains genotype.json."""
    genotype = load_genotype(out / "genotype.json", space.kind)
    title = f"{method}, space {space.name}, {settings['data']}, seed {settings['seed']}"
    pictures = {
        "cells": drawing.cells(genotype, title),
        "weights": drawing.heat_map(space, point),
        "curves": curves.curves({method: rows}),
    }
    texts = {name: drawing.svg(figure) for name, figure in pictures.items()}
    page = _page(title, genotype, rows, texts, settings)
    (out / "cells.svg").write_text(texts["cells"], encoding="utf-8")
    drawing.save(pictures["cells"], out / "cells.png")
    drawing.save(pictures["weights"], out / "weights.png")
    drawing.save(pictures["curves"], out / "curves.png")
    (out / "report.html").write_text(page, encoding="utf-8")


def architecture_columns(genotype: AnyGenotype, point: Mapping[str, Any]) -> dict[str, int]:
    """The columns of an architecture in the table of epochs: zeros, paths, active nodes and skip connections of each cell."""
    row = {}
    for cell in genotype.layout.cells:
        active = [path.operation for path in genotype.paths(cell)]
        row[f"zeros_{cell}"] = int((point[cell] == 0).sum())
        row[f"paths_{cell}"] = len(active)
        row[f"nodes_{cell}"] = len(genotype.active_nodes(cell))
        if "skip_connect" in genotype.layout.operations:
            row[f"skips_{cell}"] = active.count("skip_connect")
    return row


def warnings(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Reasons to doubt the result, to be read before it is trained."""
    last, found = rows[-1], []
    for cell in [key.removeprefix("skips_") for key in last if key.startswith("skips_")]:
        paths, skips = last[f"paths_{cell}"], last[f"skips_{cell}"]
        if paths and skips > paths / 2:
            found.append(f"{skips} of the {paths} paths of the {cell} cell are skip connections: the search may have collapsed")
    for cell in [key.removeprefix("guarded_") for key in last if key.startswith("guarded_")]:
        if guarded := sum(row.get(f"guarded_{cell}", 0) for row in rows):
            found.append(f"{guarded} updates left no path in the {cell} cell: the guard, which is not published, restored one")
    if stopped := last.get("stopped_nodes", 0):
        found.append(f"{last['frozen_nodes']} nodes frozen by themselves, {stopped} stopped: more --search-epochs may help")
    if "restricted_accuracy" in last and last["restricted_accuracy"] < last["valid_accuracy"] - 0.1:
        found.append("the nonzero paths alone are more than ten points worse than the supernet: it has not settled yet")
    if "restricted_perplexity" in last and not last["restricted_perplexity"] < 1.25 * last["valid_perplexity"]:
        found.append(
            "the perplexity of the nonzero paths alone is more than a quarter above the supernet's: it has not settled yet"
        )
    return found


def _page(
    title: str, genotype: AnyGenotype, rows: Sequence[Mapping[str, Any]], pictures: Mapping[str, str], settings: Mapping[str, Any]
) -> str:
    shown = [c for c in COLUMNS if c in rows[-1]]
    head = "".join(f"<th>{c.replace('_', ' ')}</th>" for c in shown)
    body = "".join("<tr>" + "".join(f"<td>{_cell(c, row[c])}</td>" for c in shown) + "</tr>" for row in rows)
    chosen = "".join(f"<tr><td>{html.escape(k)}</td><td>{html.escape(str(v))}</td></tr>" for k, v in settings.items())
    notes = "".join(f'<p class="warning">{html.escape(w)}</p>' for w in warnings(rows))
    drawn = {name: text[text.index("<svg") :] for name, text in pictures.items()}
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style></head><body>
<h1>{html.escape(title)}</h1>
{notes}
<h2>Cells</h2>{drawn["cells"]}
<h2>Architecture weights at the prox point</h2>{drawn["weights"]}
<h2>Over the epochs</h2>{drawn["curves"]}
<table><tr>{head}</tr>{body}</table>
<h2>Genotype</h2><pre>{html.escape(genotype.to_json())}</pre>
<h2>Settings</h2><table>{chosen}</table>
</body></html>
"""


def _cell(column: str, value: Any) -> str:
    return f"{100 * value:.2f} %" if "accuracy" in column else f"{value:.4g}" if isinstance(value, float) else str(value)
