"""The report of a finished search: pictures, and an HTML page with all of them."""

from __future__ import annotations

import html
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..space import drawing
from ..space.amounts import duration, plural
from ..space.files import write_text
from ..space.genotype import AnyGenotype, CellGenotype, cell_name, load_genotype
from ..space.spaces import Space
from . import curves

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
html { color: #222; background: #fff; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.scroll { overflow-x: auto; } svg { max-width: 100%; min-width: var(--least); height: auto; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
td, th { padding: .15rem .7rem; border-bottom: 1px solid #ddd; text-align: right; vertical-align: top; }
td:first-child, th:first-child { text-align: left; }
.facts td { text-align: left; overflow-wrap: anywhere; } .facts td:first-child { white-space: nowrap; color: #555; }
pre { background: #f6f6f6; padding: 1rem; white-space: pre-wrap; overflow-wrap: anywhere; }
.warning { background: #fff3d6; border-left: 4px solid #d99a00; padding: .5rem 1rem; }
@media print {
  body { max-width: none; margin: 0; font-size: 10pt; }
  svg { min-width: 0; } .scroll { overflow: visible; }
  svg, tr, .warning { break-inside: avoid; } h2 { break-after: avoid; }
}
"""
# Columns of the table of epochs that a reader follows, and their headings; EVALUATED is replaced by the data of the evaluation.
COLUMNS = {
    "epoch": "epoch",
    "strength": "strength",
    "train_accuracy": "training accuracy",
    "valid_accuracy": "EVALUATED accuracy",
    "restricted_accuracy": "EVALUATED accuracy, genotype only",
    "train_perplexity": "training perplexity",
    "valid_perplexity": "validation perplexity",
    "restricted_perplexity": "validation perplexity, genotype only",
    "paths_normal": "paths, normal cell",
    "paths_reduce": "paths, reduce cell",
    "paths_recurrent": "paths",
    "nodes_recurrent": "nodes",
    "zeros_cell": "zeros",
    "architecture": "cell",
    "frozen_nodes": "frozen nodes",
    "stopped_nodes": "stopped nodes",
}
# What the numbers of a method are. A method that is not listed has architecture weights.
QUANTITIES = {
    "sparse_supernet": "architecture weights at the prox point",
    "darts": "softmax weights of the operations of each edge",
    "pc_darts": "softmax weights of the operations of each edge, times those of the edges",
    "ista": "coefficients of the sparse code of each node",
    "gsparsity": "norms of the groups at the prox point, relative to their initial norms",
}
ON_ALL_IMAGES = ("gsparsity", "ista, one stage")  # trained on all training images, and so evaluated on others
SKETCH = {  # the network whose size is reported, and the script that trains it
    "convolutional": ("20 cells, 36 channels, 10 classes", "train_cifar10.py"),
    "nasbench201": ("15 cells in three stages, 16 channels, 10 classes", "train_cifar10.py"),
    "recurrent": ("hidden size 850, 10 000 words", "train_ptb.py"),
}
CLASSES = {"cifar10": 10, "cifar100": 100}
LARGE = 5e6  # parameters; published cells have 2.5 to 4 million on CIFAR-10
FILES = {
    "genotype.json": "the genotype, input of the training",
    "genotypes": "the genotype after each epoch",
    "cells.svg": "the picture of the cells (cells.png too)",
    "weights.png": "the weights",
    "curves.png": "the curves",
    "distances.png": "the distances of the codes between two recoveries",
    "search.csv": "the table of epochs with all columns",
    "settings.json": "the settings",
    "network.pt": "the trained network",
    "tensorboard": "the log for TensorBoard",
}


@dataclass(frozen=True)
class Details:
    """What a report has besides the files of the search.

    row: of the epoch that is the result; None: the last one. size: counts {"parameters": ..., "macs": ...} of the evaluation
    network of a genotype; without "macs" in networks for text. data_dir: the data, for the command that trains the result.
    """

    row: Mapping[str, Any] | None = None
    size: Callable[[Any], Mapping[str, int]] | None = None
    data_dir: Path | None = None


def write(
    out: Path,
    method: str,
    rows: Sequence[Mapping[str, Any]],
    point: Mapping[str, Any],
    space: Space,
    settings: Mapping[str, Any],
    details: Details | None = None,
) -> dict[str, int]:
    """Write cells.svg, cells.png, weights.png, curves.png and report.html to `out`, which contains genotype.json.

    Prints the warnings of the report. Returns the size of the evaluation network, empty without `details.size`.
    """
    details = details or Details()
    genotype = load_genotype(out / "genotype.json", space.kind)
    row = details.row or rows[-1]
    complete = all(genotype.output_nodes(cell) for cell in genotype.layout.cells)
    size = dict(details.size(genotype)) if details.size and complete else {}
    title = f"{method}, space {space.name}, {settings['data']}, seed {settings['seed']}"
    evaluated = evaluation(method, space, settings)
    quantity = QUANTITIES.get(method.partition(",")[0], "architecture weights")
    pictures = {
        "cells": drawing.cells(genotype, title, space, point),
        "weights": drawing.heat_map(space, point, quantity),
        "curves": curves.curves({method: rows}, evaluated),
    }
    texts = {name: drawing.svg(figure) for name, figure in pictures.items()}
    drawn = {name: _figure(text, pictures[name].get_figwidth()) for name, text in texts.items()}
    command = training_command(out, genotype, settings, details.data_dir)
    own_images = settings["data"] == "folder" and genotype.layout.name != "recurrent"
    notes = warnings([r for r in rows if r["epoch"] <= row["epoch"]], genotype, space, size, settings)
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        *(f'<p class="warning">{html.escape(note)}</p>' for note in notes),
        "<h2>Results</h2>",
        _facts(_results(genotype, rows, row, size, evaluated)),
        f"<h2>Cells</h2>{drawn['cells']}",
        f"<h2>Training of the result</h2><pre>{html.escape(command)}</pre>",
        f"<p>{_about_training(out, genotype, own_images)}</p>",
        f"<h2>{quantity[0].upper()}{quantity[1:]}</h2>{drawn['weights']}",
        f"<h2>Epochs</h2>{drawn['curves']}{_table(rows, row, evaluated)}",
        f"<h2>Genotype</h2><pre>{html.escape(genotype.to_json())}</pre>",
        f"<h2>Files</h2>{_facts(_files(out, row), links=True)}",
        f"<h2>Settings</h2>{_facts(settings)}",
    ]
    page = "\n".join(
        [
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>',
            f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>',
            *parts,
            "</body></html>\n",
        ]
    )
    write_text(out / "cells.svg", texts["cells"])
    drawing.save(pictures["cells"], out / "cells.png")
    drawing.save(pictures["weights"], out / "weights.png")
    drawing.save(pictures["curves"], out / "curves.png")
    write_text(out / "report.html", page)
    for note in notes:
        print(f"note: {note}")
    return size


def _figure(text: str, width: float) -> str:
    """A picture in the page: as wide as the page if its text stays readable, else with a scroll bar. width: in inches."""
    return f'<div class="scroll" style="--least: {72 * width:.0f}px">{text[text.index("<svg") :]}</div>'


def _about_training(out: Path, genotype: AnyGenotype, own_images: bool) -> str:
    of_benchmark = isinstance(genotype, CellGenotype)
    small = "use <code>--preset nasbench201_small</code>" if of_benchmark else "add <code>--preset small</code>"
    recipe = f"This is the published recipe, for a GPU; {small} for a short training on a CPU."
    if own_images and not of_benchmark:  # networks of the benchmark have no auxiliary head
        recipe += " Add <code>--auxiliary 0</code> unless the sides of the images are 32, 36 or 40 pixels."
    if (out / "network.pt").exists():
        return f"The search has trained network.pt; the command trains the genotype from new weights. {recipe}"
    return recipe


def evaluation(method: str, space: Space, settings: Mapping[str, Any]) -> str:
    """The data on which a search by this method is evaluated."""
    if space.layout.name == "recurrent":
        return "validation text"
    if method in ON_ALL_IMAGES:
        return evaluation_images(settings)
    return "held-out training images" if settings.get("levels") == 1 else "validation half"


def evaluation_images(settings: Mapping[str, Any]) -> str:
    """The images on which a training with these settings is evaluated."""
    if settings.get("hold_out"):
        return "held-out training images"
    return "validation images" if settings.get("data") == "folder" else "test images"


def training_command(out: Path, genotype: AnyGenotype, settings: Mapping[str, Any], data_dir: Path | None) -> str:
    """The command line that trains the genotype in `out`, with an option in each line."""
    options = {"--genotype": str(out / "genotype.json")}
    if genotype.layout.name == "nasbench201":
        options["--preset"] = "nasbench201"
    if genotype.layout.name != "recurrent":
        options["--data"] = str(settings["data"])
    if data_dir is not None:
        options["--data-dir"] = str(data_dir)
    options["--out"] = str(out / "train")
    lines = [f"python examples/{SKETCH[genotype.layout.name][1]}", *(shlex.join(option) for option in options.items())]
    return " \\\n    ".join(lines)


def architecture_columns(genotype: AnyGenotype, point: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of an architecture in the table of epochs: zeros, paths, active nodes and skip connections of each cell.

    A cell of NAS-Bench-201 has the column architecture too, its published string.
    """
    row: dict[str, Any] = {}
    for cell in genotype.layout.cells:
        active = [path.operation for path in genotype.paths(cell)]
        row[f"zeros_{cell}"] = int((point[cell] == 0).sum())
        row[f"paths_{cell}"] = len(active)
        row[f"nodes_{cell}"] = len(genotype.active_nodes(cell))
        if "skip_connect" in genotype.layout.operations:
            row[f"skips_{cell}"] = active.count("skip_connect")
    return row | ({"architecture": genotype.to_string()} if isinstance(genotype, CellGenotype) else {})


def warnings(
    rows: Sequence[Mapping[str, Any]],
    genotype: AnyGenotype | None = None,
    space: Space | None = None,
    size: Mapping[str, int] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> list[str]:
    """Reasons to doubt the result, to be read before it is trained. rows: up to that of the result.

    Arguments that are missing leave out the warnings that need them.
    """
    last = rows[-1]
    found = [*_quality_warnings(last, settings or {}), *_method_warnings(rows), *_skip_warnings(last)]
    if genotype is not None:
        found += _cell_warnings(genotype, space)
    if size and size.get("parameters", 0) > LARGE and "macs" in size:
        found.append(
            f"The evaluation network has {size['parameters'] / 1e6:.1f} million parameters, more than the 2.5 to 4 million of"
            " published cells: compare it with networks of its own size."
        )
    return found


def _quality_warnings(row: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    found = []
    classes = CLASSES.get(str(settings.get("data")))
    if classes and row.get("valid_accuracy", 1.0) < 1.5 / classes:
        found.append(
            f"The network classifies {100 * row['valid_accuracy']:.1f} % of the images correctly, hardly more than chance"
            f" ({100 / classes:g} %): it has not learned yet, and its architecture is arbitrary."
        )
    alone, whole = row.get("restricted_accuracy"), row.get("valid_accuracy")
    if alone is not None and whole is not None and alone < whole - 0.1:
        found.append(
            f"The paths of the genotype alone reach {100 * alone:.1f} %, the whole supernet {100 * whole:.1f} %: the search has"
            " not settled on them. More epochs may help."
        )
    alone, whole = row.get("restricted_perplexity"), row.get("valid_perplexity")
    if alone is not None and whole is not None and not alone < 1.25 * whole:
        found.append(
            f"The paths of the genotype alone have perplexity {alone:.0f}, the whole supernet {whole:.0f}: the search has not"
            " settled on them. More epochs may help."
        )
    return found


def _method_warnings(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Warnings about what a method did to end: cells that were kept from becoming empty, nodes that did not converge."""
    last, found = rows[-1], []
    for cell in [key.removeprefix("guarded_") for key in last if key.startswith("guarded_")]:
        if count := sum(row.get(f"guarded_{cell}", 0) for row in rows):
            found.append(
                f"{plural(count, 'update')} left no path through the {cell_name(cell)}, and the guard restored one, which is"
                " not in the published method. A smaller strength of the penalty, or --no-guard, avoids it."
            )
    if stopped := last.get("stopped_nodes", 0):
        frozen = last["frozen_nodes"]
        found.append(
            f"{plural(frozen, 'node')} frozen by {'itself' if frozen == 1 else 'themselves'}, {stopped} stopped: the"
            " codes of the latter had not converged, and their operations may be arbitrary. More --search-epochs may help."
        )
    return found


def _skip_warnings(row: Mapping[str, Any]) -> list[str]:
    found = []
    for cell in [key.removeprefix("skips_") for key in row if key.startswith("skips_")]:
        paths, skips = row[f"paths_{cell}"], row[f"skips_{cell}"]
        if paths and skips > paths / 2:
            found.append(
                f"{skips} of the {plural(paths, 'path')} of the {cell_name(cell)}"
                f" {'is a skip connection' if skips == 1 else 'are skip connections'}: the search may have collapsed, as such"
                " cells usually train to a low accuracy."
            )
    return found


def _cell_warnings(genotype: AnyGenotype, space: Space | None) -> list[str]:
    """Warnings about cells without paths, with nearly all of them, and about nodes without paths."""
    found = []
    for cell in genotype.layout.cells:
        paths, active = genotype.paths(cell), genotype.active_nodes(cell)
        if not genotype.output_nodes(cell):
            lacks = "paths" if not paths else f"path into node {genotype.layout.outputs[-1]}, its output"
            found.append(
                f"The {cell_name(cell)} has no {lacks}, and cannot be trained: a smaller strength of the penalty keeps some."
            )
            continue
        possible = sum(path.operation != "none" for path in space.paths(cell)) if space else 0
        if possible and len(paths) > possible / 2:
            found.append(
                f"{len(paths)} of the {possible} possible paths of the {cell_name(cell)} are left: the search ended before it"
                " had chosen. More epochs, or a larger strength of the penalty, leave fewer."
            )
        missing = [str(node) for node in genotype.layout.nodes if node not in active]
        if missing and not genotype.layout.last:
            nodes = f"{'node' if len(missing) == 1 else 'nodes'} {', '.join(missing)}"
            found.append(
                f"The {cell_name(cell)} has no path into {nodes}: its output"
                f" has {len(active)} of {len(genotype.layout.nodes)} nodes, and the trained network is smaller."
            )
    return found


def _results(
    genotype: AnyGenotype,
    rows: Sequence[Mapping[str, Any]],
    row: Mapping[str, Any],
    size: Mapping[str, int],
    evaluated: str,
) -> dict[str, str]:
    """What was found, in a few lines."""
    facts = {}
    for cell in genotype.layout.cells:
        nodes = ", ".join(map(str, genotype.active_nodes(cell))) or "none"
        facts[cell_name(cell)] = f"{plural(len(genotype.paths(cell)), 'path')}, into nodes: {nodes}"
    if isinstance(genotype, CellGenotype):
        facts["architecture"] = genotype.to_string()
    for key, what in (("accuracy", "accuracy"), ("perplexity", "perplexity")):
        if f"valid_{key}" in row:
            whole, alone = row[f"valid_{key}"], row.get(f"restricted_{key}")
            facts[f"{what} ({evaluated})"] = _number(key, whole) + (
                f"; with the paths of the genotype only: {_number(key, alone)}" if alone is not None and alone != whole else ""
            )
    if size:
        macs = f", {size['macs'] / 1e6:.0f} million multiply-adds" if "macs" in size else ""
        facts["evaluation network"] = (
            f"{size['parameters'] / 1e6:.2f} million parameters{macs} ({SKETCH[genotype.layout.name][0]})"
        )
    facts["epochs"] = f"{len(rows)}" if row is rows[-1] or row["epoch"] == len(rows) else f"{row['epoch']} of {len(rows)} chosen"
    seconds = float(rows[-1].get("seconds", math.nan))
    if math.isfinite(seconds):
        facts["time of the steps"] = duration(seconds)
    return facts


def _facts(facts: Mapping[str, Any], links: bool = False) -> str:
    """A table of two columns."""
    name = lambda key: f'<a href="{html.escape(key)}">{html.escape(key)}</a>' if links else html.escape(key)
    lines = "".join(f"<tr><td>{name(k)}</td><td>{html.escape(str(v))}</td></tr>" for k, v in facts.items())
    return f'<table class="facts">{lines}</table>'


def _files(out: Path, row: Mapping[str, Any]) -> dict[str, str]:
    """The files of the search; those that are written with the report need not be there yet."""
    own = ["cells.svg", "weights.png", "curves.png"] + ["distances.png"] * ("distance" in row)
    return {name: meaning for name, meaning in FILES.items() if name in own or (out / name).exists()}


def _table(rows: Sequence[Mapping[str, Any]], chosen: Mapping[str, Any], evaluated: str) -> str:
    """The table of epochs, the chosen one in bold."""
    shown = [c for c in COLUMNS if c in rows[-1]]
    for quality in ("accuracy", "perplexity"):  # where the genotype is always the whole network, one column is enough
        if all(row.get(f"restricted_{quality}") == row.get(f"valid_{quality}") for row in rows):
            shown = [c for c in shown if c != f"restricted_{quality}"]
    word = "test" if evaluated == "test images" else "validation"
    head = "".join(f"<th>{COLUMNS[c].replace('EVALUATED', word)}</th>" for c in shown)
    body = ""
    for row in rows:
        style = ' style="font-weight:600"' if row["epoch"] == chosen["epoch"] else ""
        body += f"<tr{style}>" + "".join(f"<td>{_number(c, row[c])}</td>" for c in shown) + "</tr>"
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def _number(column: str, value: Any) -> str:
    if isinstance(value, float) and math.isnan(value):
        return "none"
    return f"{100 * value:.2f} %" if "accuracy" in column else f"{value:.4g}" if isinstance(value, float) else str(value)
