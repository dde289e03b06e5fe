"""The table and the picture of `nas_bench_201.py`, from the rows of its runs and the table of all cells."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from scipy.stats import binomtest

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from nas.data.nats_bench import CELLS, DATA_SETS, Table
from nas.space.amounts import grouped
from nas.space.drawing import plt

ALL_3X3 = "|nor_conv_3x3~0|+|nor_conv_3x3~0|nor_conv_3x3~1|+|nor_conv_3x3~0|nor_conv_3x3~1|nor_conv_3x3~2|"
# accuracy on the test images of CIFAR-10 in percent, a mean over searches, as papers on this space cite it; not measured here
PUBLISHED = (
    ("ENAS", 53.89),
    ("DARTS", 54.30),
    ("RSPS", 87.66),
    ("PC-DARTS", 93.41),
    ("GDAS", 93.61),
    ("DrNAS", 94.36),
    ("best cell", 94.37),
)
DRAWS = 10_000  # of k random cells, from which the best of k by parameters is estimated
HEADINGS = {
    "title": "method",
    "runs": "runs",
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "imagenet16_120": "ImageNet16",
    "rank": "rank",
    "percentile": "of all, %",
    "worst": "worst, %",
    "size_percentile": "of size, %",
    "above": "above size median",
    "p": "sign test p",
    "cpu_seconds": "CPU s",
    "ranks": "ranks of all runs",
}
LEGEND = f"""\
Accuracies on test images in percent; they, rank and CPU s are medians over the runs. Ranks are among all {grouped(CELLS)} cells
by accuracy on CIFAR-10; equal cells share the best rank. of all: rank in percent of the cells; worst: that of the worst run. of
size: percentile among the cells with as many parameters, by midranks; 0 is best, 50 chance. above size median: runs whose cell
is better than the median cell of its size, with the one-sided sign test against chance. Published figures are as papers
cite them, for other networks and budgets, not measured here; their rank is that of a cell with this accuracy."""


def summary(rows: Sequence[Mapping[str, Any]], table: Table, cells: int = 0) -> list[dict[str, Any]]:
    """A row for each method in the order of its first run, then the baselines that need no run.

    cells: k of "best of k by parameters"; 0: left out.
    """
    titles = list(dict.fromkeys(row["title"] for row in rows))
    found = [_of_method(title, [row for row in rows if row["title"] == title]) for title in titles]
    return [*found, *baselines(table, cells)]


def _of_method(title: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    median = lambda name: statistics.median(float(row[name]) for row in rows)
    within = [float(row["size_percentile"]) for row in rows]
    above, compared = sum(p < 50 for p in within), sum(p != 50 for p in within)
    return {
        "title": title,
        "runs": len(rows),
        **{name: median(name) for name in (*DATA_SETS, "rank", "percentile", "size_percentile", "cpu_seconds")},
        "worst": max(float(row["percentile"]) for row in rows),
        "above": f"{above} of {compared}",
        "p": float(binomtest(above, compared, alternative="greater").pvalue) if compared else 1.0,
        "ranks": " ".join(str(row["rank"]) for row in rows),
    }


def baselines(table: Table, cells: int = 0) -> list[dict[str, Any]]:
    """The rows that need no run: random cells, the best of k by their number of parameters, all 3x3, and published figures."""
    rank_of = lambda accuracy: 1 + int((table.cifar10 > accuracy + 0.005).sum())
    without_none = [i for i, architecture in enumerate(table.architectures) if "none" not in architecture]
    found = [
        _of_cells("a random cell", table, np.arange(CELLS)),
        _of_cells("a random cell without none", table, np.array(without_none)),
    ]
    if cells:
        drawn = np.random.default_rng(0).choice(without_none, size=(DRAWS, cells))
        largest = drawn[np.arange(DRAWS), table.sizes[drawn].argmax(1)]
        found.append(_of_cells(f"most parameters of {cells} such cells", table, largest))
    found.append({**_of_cells("all 3x3", table, np.array([table.index(ALL_3X3)])), "size_percentile": None})
    for name, accuracy in PUBLISHED:
        rank = rank_of(accuracy)
        found.append({"title": f"{name}, published figure", "cifar10": accuracy, "rank": rank, "percentile": 100 * rank / CELLS})
    return found


def _of_cells(title: str, table: Table, which: np.ndarray) -> dict[str, Any]:
    """Medians over cells, which cost nothing."""
    accuracies = dict(zip(DATA_SETS, np.median(table.accuracies[which], axis=0).tolist()))
    rank, within = (float(np.median(values[which])) for values in (table.ranks, table.size_percentiles))
    places = {"rank": rank, "percentile": 100 * rank / CELLS, "size_percentile": within}
    return {"title": title, **accuracies, **places, "cpu_seconds": 0.0}


def text_table(rows: Iterable[Mapping[str, Any]]) -> str:
    """The summary as text, with a legend."""
    lines = [list(HEADINGS.values()), *([_text(name, row.get(name)) for name in HEADINGS] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADINGS))]
    left = {0, len(HEADINGS) - 1}  # text columns
    align = lambda i, cell: cell.ljust(widths[i]) if i in left else cell.rjust(widths[i])
    return "\n".join([*("  ".join(align(i, cell) for i, cell in enumerate(line)).rstrip() for line in lines), "", LEGEND])


def _text(name: str, value: Any) -> str:
    if value is None or value == "":
        return "-" if name not in ("ranks", "title") else ""
    if name in DATA_SETS:
        return f"{value:.2f}"
    if name == "rank":
        return grouped(round(value))
    if name in ("percentile", "worst", "size_percentile", "p"):
        return f"{value:.2g}" if value < 10 else f"{value:.0f}"
    return f"{value:.0f}" if name == "cpu_seconds" else str(value)


def picture(rows: Sequence[Mapping[str, Any]], table: Table) -> plt.Figure:
    """Percentiles of all runs over their cost: among all cells on the left, among those of the same size on the right."""
    titles = list(dict.fromkeys(row["title"] for row in rows))
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5.6), sharex=True)
    colours = plt.get_cmap("tab10" if len(titles) <= 10 else "tab20").colors  # type: ignore[attr-defined]
    for i, title in enumerate(titles):
        own = [row for row in rows if row["title"] == title]
        cost = [float(row["cpu_seconds"]) for row in own]
        style: dict[str, Any] = {"color": colours[i % len(colours)], "marker": "osD^vPX<>*"[i % 10]}
        for axis, name in ((left, "percentile"), (right, "size_percentile")):
            values = [float(row[name]) for row in own]
            axis.plot(cost, values, linestyle="", alpha=0.7, label=f"{title} ({len(own)})", **style)
            axis.plot(statistics.median(cost), statistics.median(values), markersize=13, fillstyle="none", mew=1.6, **style)
    for value, text in ((50.0, "a random cell"), (table.place(ALL_3X3).percentile, "all 3x3, free")):
        left.axhline(value, color="0.35", linewidth=1, linestyle="--")
        left.annotate(
            text, (0.005, value), (0, -3), xycoords=("axes fraction", "data"), textcoords="offset points", va="top", color="0.35"
        )
    right.axhline(50, color="0.35", linewidth=1, linestyle="--")
    costs = [max(float(row["cpu_seconds"]), 0.1) for row in rows]
    left.set(
        xlim=(min(costs) / 1.4, 1.4 * max(costs)),
        xscale="log",
        yscale="log",
        ylim=(130, 100 / CELLS / 1.5),
        ylabel="rank in percent of all cells (up is better)",
    )
    right.set(ylim=(103, -3), ylabel="percentile among cells of the same size (up is better)")
    left.set_yticks([100, 10, 1, 0.1, 0.01], ["100 %", "10 %", "1 %", "0.1 %", "0.01 %"])
    for axis in (left, right):
        axis.set_xlabel("CPU seconds of a run")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.grid(alpha=0.25)
    handles, labels = left.get_legend_handles_labels()
    columns = min(3, len(labels))
    rows_of_legend = -(-len(labels) // max(columns, 1))
    figure.legend(handles, labels, loc="lower center", ncols=max(columns, 1), frameon=False)
    figure.suptitle("Cells found in NAS-Bench-201: small marks are runs, large ones the medians of a method")
    figure.tight_layout(rect=(0, 0.045 * rows_of_legend + 0.01, 1, 1))
    return figure
