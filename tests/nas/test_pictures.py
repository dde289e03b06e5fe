"""Pictures of cells, weights and curves, and the report: what they contain, and that nothing overlaps or is cut off."""

import itertools
import re
from pathlib import Path

import numpy as np
import pytest
from nas.engine import curves, report
from nas.space import drawing, spaces
from nas.space.genotype import CELLS, Genotype, RecurrentGenotype, load_genotype

DARTS, RECURRENT = spaces.SPACES["darts"], spaces.SPACES["recurrent"]
EVERY = {name: {cell: [True] * len(space.paths(cell)) for cell in space.layout.cells} for name, space in spaces.SPACES.items()}


def drawn(space, share, seed):
    """A genotype with about this share of the paths of a space, and weights of all of them, without dead ends."""
    rng = np.random.default_rng(seed)
    sizes = {cell: len(space.paths(cell)) for cell in space.layout.cells}
    point = {cell: rng.gamma(0.5, 0.1, size) * (rng.random(size) < share) for cell, size in sizes.items()}
    return space.genotype({cell: (p != 0).tolist() for cell, p in point.items()}).clean(), point


GENOTYPES = {
    "DARTS_V1": load_genotype("DARTS_V1"),
    "ISTA": load_genotype("ISTA"),
    "recurrent DARTS_V1": load_genotype("DARTS_V1", RecurrentGenotype),
    "every path": DARTS.genotype(EVERY["darts"]),
    "every activation": RECURRENT.genotype(EVERY["recurrent"]),
    "one path": Genotype({3: [("sep_conv_3x3", 1)]}, {2: [("skip_connect", 0)]}),
    "no path in a cell": Genotype({}, {2: [("skip_connect", 0)]}),
    "a dead end": Genotype({4: [("sep_conv_3x3", 1), ("dil_conv_5x5", 3)], 5: [("avg_pool_3x3", 4)]}, {2: [("noise", 0)]}),
    **{f"dense {seed}": drawn(DARTS, 0.4, seed)[0] for seed in range(3)},
    **{f"sparse {seed}": drawn(RECURRENT, 0.2, seed)[0] for seed in range(3)},
}
CELL_CASES = [pytest.param(found, cell, id=f"{name}-{cell}") for name, found in GENOTYPES.items() for cell in found.layout.cells]


@pytest.mark.parametrize(("found", "cell"), CELL_CASES)
def test_no_line_passes_a_box_and_nothing_is_cut_off(found, cell):
    placed = drawing._place(found, cell)
    columns = [[box for box in placed.boxes.values() if box.column == c] for c in range(len(placed.spans))]
    for column, (left, right) in zip(columns, placed.spans, strict=True):
        column.sort(key=lambda box: box.y)
        for a, b in itertools.pairwise(column):
            assert a.y + a.height / 2 < b.y - b.height / 2, "boxes and lanes of a column are apart"
        assert all(left - 1e-9 <= box.left and box.right <= right + 1e-9 for box in column)
        assert all(box.y - box.height / 2 + 1e-9 >= 0 and box.y + box.height / 2 <= placed.height + 1e-9 for box in column)
    for (_, right), (left, _) in itertools.pairwise(placed.spans):
        assert left > right, "lines bend between columns"
    assert placed.spans[-1][1] == placed.width
    for a, b in placed.links:
        assert placed.boxes[b].column == placed.boxes[a].column + 1
    ports = drawing._ports(placed)
    assert all(abs(y - placed.boxes[b].y) <= placed.boxes[b].height / 2 for (_, b), y in ports.items()), "arrows end at boxes"


@pytest.mark.parametrize(("found", "cell"), CELL_CASES)
def test_a_picture_has_one_box_for_all_operations_between_two_nodes(found, cell):
    placed = drawing._place(found, cell)
    edges = {(path.node, path.source) for path in found.paths(cell)}
    assert {key for key in placed.boxes if key in edges} == edges
    nodes = {key for key in placed.boxes if isinstance(key, int)}
    assert nodes == {node for edge in edges for node in edge}, "nodes and inputs without paths are left out"
    assert {a for a, b in placed.links if b in nodes} == edges
    into_output = {a if isinstance(a, int) else a[1] for a, b in placed.links if b == "out"}
    assert into_output == set(found.active_nodes(cell))


@pytest.mark.parametrize("name", ["no path in a cell", "a dead end", "sparse 0"])
def test_cells_are_drawn_as_svg_and_png(name, tmp_path):
    texts = []
    for _ in range(2):
        figure = drawing.cells(GENOTYPES[name], "a method with a long name, " * 5)
        texts.append(drawing.svg(figure))
        drawing.save(figure, tmp_path / "cells.png")
    assert texts[0] == texts[1] and texts[0].count("<svg") == 1
    assert (tmp_path / "cells.png").stat().st_size > 3000


def test_a_caption_names_what_is_left_out():
    assert drawing._caption(GENOTYPES["one path"], "normal") == [
        "normal cell: 1 path on 1 edge, into 1 node",
        "without paths: node 2, node 4, node 5, input k-2",
    ]
    assert drawing._caption(GENOTYPES["every path"], "reduce") == ["reduce cell: 98 paths on 14 edges, into 4 nodes"]


@pytest.mark.parametrize("name", ["S1", "S3", "recurrent"])
def test_the_weights_of_every_space_are_drawn(name):
    space = spaces.SPACES[name]
    _, point = drawn(space, 0.5, 0)
    figure = drawing.heat_map(space, point, "weights")
    for axis, cell in zip(figure.axes, space.layout.cells, strict=True):
        title, nonzero = axis.get_title(loc="left"), int((point[cell] != 0).sum())
        assert title == f"{cell} cell, weights: {nonzero} nonzero, {len(point[cell]) - nonzero} exactly 0"
    drawing.plt.close(figure)


# -- curves -----------------------------------------------------------------------------------


CELL_COLUMNS = {"paths_normal": 9, "nodes_normal": 4, "paths_reduce": 8, "nodes_reduce": 3}


def rows(count, quality="accuracy", **columns):
    """Rows of a table of epochs of a search."""
    made = []
    for epoch in range(1, count + 1):
        values = {f"{part}_{quality}": 0.3 + 0.01 * epoch for part in ("train", "valid", "restricted")}
        made.append({"epoch": epoch, **values, **CELL_COLUMNS, **columns})
    return made


def ticks(axis):
    axis.figure.canvas.draw()
    low, high = axis.get_xlim()
    return [tick for tick in axis.get_xticks() if low <= tick <= high]


@pytest.mark.parametrize(("count", "quality"), [(1, "accuracy"), (1, "perplexity"), (2, "accuracy"), (7, "perplexity")])
def test_epochs_have_whole_numbers_for_ticks_and_a_single_one_is_seen(count, quality):
    figure = curves.curves({"darts": rows(count, quality)})
    for axis in figure.axes:
        found = ticks(axis)
        assert found and all(tick == round(tick) for tick in found)
        assert all(line.get_marker() == "o" for line in axis.get_lines())
        legend = axis.get_legend().get_window_extent()
        assert legend.y1 < axis.get_window_extent().y0, "a legend hides no data"
        assert legend.y0 >= 0 and legend.x0 >= axis.get_tightbbox().x0 - 1
    drawing.plt.close(figure)


def test_a_training_of_one_epoch_is_drawn():
    row = {"epoch": 1, "train_loss": 2.0, "valid_loss": 1.9, "train_accuracy": 0.2, "valid_accuracy": 0.3}
    figure = curves.training([row], "test images")
    assert [ticks(axis) for axis in figure.axes] == [[1], [1]]
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["training", "test images"]
    text = {"epoch": 1, "train_perplexity": float("inf"), "valid_perplexity": 300.0, "averaged": 1, "rollbacks": 2}
    words = curves.perplexities([text])
    assert ticks(words.axes[0]) == [1] and len(words.axes[0].get_legend().get_texts()) == 4
    drawing.plt.close(figure)
    drawing.plt.close(words)


@pytest.mark.parametrize("moved", [0.5, 0.0])
def test_the_distances_of_codes_are_drawn(moved):
    figure = curves.distances([{"epoch": epoch, "distance": moved / epoch, "moved": moved} for epoch in (1, 2)])
    assert all(tick == round(tick) for tick in ticks(figure.axes[0]))
    drawing.plt.close(figure)


def test_what_is_always_equal_is_drawn_once():
    figure = curves.curves({"ista, one stage": rows(3)}, "test images")
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["training", "test images"]
    drawing.plt.close(figure)


# -- the report -------------------------------------------------------------------------------

SETTINGS = {"data": "cifar10", "seed": 3, "lr": 0.1}


def page_of(tmp_path, method="sparse_supernet", settings=SETTINGS, **details):
    found, point = drawn(DARTS, 0.2, 1)
    found.save(tmp_path / "genotype.json")
    details = report.Details(size=lambda found: {"parameters": 9_000_000, "macs": 500_000_000}, **details)
    made = [{**row, "seconds": 100.0} for row in rows(3)]
    assert report.write(tmp_path, method, made, point, DARTS, settings, details)["parameters"] == 9_000_000
    return (tmp_path / "report.html").read_text()


@pytest.fixture
def undrawn(monkeypatch):
    """Reports with empty pictures."""
    for module, name in ((drawing, "cells"), (drawing, "heat_map"), (curves, "curves")):
        monkeypatch.setattr(module, name, lambda *args: drawing.plt.figure())
    monkeypatch.setattr(drawing, "svg", lambda figure: "<svg></svg>")
    monkeypatch.setattr(drawing, "save", lambda figure, *files: drawing.plt.close(figure))


def test_a_report_tells_what_was_found_and_how_to_train_it(tmp_path, capsys):
    page = page_of(tmp_path, data_dir=Path("my data"))
    assert page.count("<svg") == 3 and "<script" not in page and not re.search(r'(src|href)="(http|//)', page)
    assert "9.00 million parameters, 500 million multiply-adds" in page and "more than the 2.5 to 4 million" in page
    command = page[page.index("python examples/train_cifar10.py") :].partition("</pre>")[0]
    assert f"--genotype {tmp_path / 'genotype.json'}" in command and "--data-dir &#x27;my data&#x27;" in command
    assert "--data cifar10" in command and "--auxiliary 0" not in page
    assert "note: The evaluation network has 9.0 million parameters" in capsys.readouterr().out, "printed too"
    for name in re.findall(r'<a href="([^"]+)"', page):
        assert (tmp_path / name).exists(), name


@pytest.mark.parametrize(
    ("method", "heading", "evaluated"),
    [
        ("sparse_supernet", "Architecture weights at the prox point", "validation half"),
        ("darts", "Softmax weights of the operations of each edge", "validation half"),
        ("ista", "Coefficients of the sparse code of each node", "validation half"),
        ("ista, one stage", "Coefficients of the sparse code of each node", "test images"),
        ("gsparsity", "Norms of the groups at the prox point, relative to their initial norms", "test images"),
        ("another", "Architecture weights", "validation half"),
    ],
)
def test_headings_fit_the_method(method, heading, evaluated, tmp_path, undrawn):
    page = page_of(tmp_path, method)
    assert f"<h2>{heading}</h2>" in page and f"accuracy ({evaluated})" in page
    assert ("validation accuracy" in page) == (evaluated == "validation half")


@pytest.mark.parametrize(
    ("settings", "evaluated", "column"),
    [
        ({"data": "folder"}, "validation images", "validation accuracy"),
        ({"hold_out": 0.1}, "held-out training images", "validation accuracy"),
    ],
)
def test_the_images_of_the_evaluation_are_named(settings, evaluated, column, tmp_path, undrawn):
    page = page_of(tmp_path, "gsparsity", {**SETTINGS, **settings})
    assert f"accuracy ({evaluated})" in page and column in page and "test images" not in page and "test acc" not in page


def test_the_result_of_own_images_is_trained_on_them(tmp_path, undrawn):
    page = page_of(tmp_path, settings={**SETTINGS, "data": "folder"}, data_dir=Path("flowers"))
    command = page[page.index("python examples/train_cifar10.py") :].partition("</pre>")[0]
    assert "--data folder" in command and "--data-dir flowers" in command
    assert "<code>--auxiliary 0</code> unless the sides of the images are 32, 36 or 40 pixels" in page
    found = GENOTYPES["recurrent DARTS_V1"]
    assert "--data folder" not in report.training_command(tmp_path, found, {"data": "folder"}, None), "a text of this name"


@pytest.mark.parametrize(
    ("row", "found", "words"),
    [
        ({"valid_accuracy": 0.11}, None, "hardly more than chance"),
        ({"valid_accuracy": 0.6, "restricted_accuracy": 0.4}, None, "alone reach 40.0 %, the whole supernet 60.0 %"),
        ({"valid_perplexity": 100, "restricted_perplexity": float("nan")}, None, "perplexity nan"),
        ({"skips_normal": 3, "paths_normal": 5}, None, "3 of the 5 paths of the normal cell are skip connections"),
        ({"guarded_normal": 2}, None, "2 updates left no path through the normal cell"),
        ({"frozen_nodes": 5, "stopped_nodes": 3}, None, "5 nodes frozen by themselves, 3 stopped"),
        ({}, "no path in a cell", "The normal cell has no paths"),
        ({}, "one path", "The normal cell has no path into nodes 2, 4, 5: its output has 1 of 4 nodes"),
        ({}, "every path", "98 of the 98 possible paths of the normal cell are left"),
    ],
)
def test_a_report_warns_in_plain_words(row, found, words):
    notes = report.warnings([row], GENOTYPES.get(found), DARTS, settings=SETTINGS)
    assert any(words in note for note in notes), notes


def test_a_good_search_has_no_warnings():
    cells = {f"{column}_{cell}": count for column, count in (("skips", 2), ("paths", 8)) for cell in CELLS}
    row = {"valid_accuracy": 0.8, "restricted_accuracy": 0.8, **cells}
    found = GENOTYPES["DARTS_V1"]
    assert report.warnings([row], found, DARTS, {"parameters": 3_300_000, "macs": 5 * 10**8}, SETTINGS) == []
