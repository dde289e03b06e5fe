"""The networks at the end of a pruning: dense, sparse, and compact, with their quality, size and speed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from nas.engine.log import write_csv
from nas.space.amounts import grouped
from torch import Tensor, nn

from proxopt_torch import Compacted, compact

from .task import Layer, Quality
from .training import Pruning

NAMES = {"dense": "dense", "sparse": "sparse, before the cut", "compact": "compact, after the cut"}


def cut(run: Pruning) -> Compacted:
    """Remove what is zero in the network of a run that has ended."""
    with run.optimizer.at_prox_point():
        return compact(run.net.eval(), run.task.example())


def compare(run: Pruning, small: Compacted, dense: nn.Module | None) -> list[dict[str, Any]]:
    """A row for each network: quality on all validation data, parameters, multiply-adds, milliseconds of a pass.

    The milliseconds are a median, with the quartiles. The row of the compact network has the largest difference of an output
    from that of the sparse network, over the largest output. dense: trained without a budget; None: there is none.
    """
    sparse, s = run.net.eval(), run.settings
    assert small.multiply_adds is not None
    networks = {"dense": dense, "sparse": sparse, "compact": small.model}
    found = {name: net for name, net in networks.items() if net is not None}
    times = latencies(found, run.task.example(s.latency_batch), s.latency_runs)
    rows = []
    for name, net in found.items():
        size, macs = (pair[name == "compact"] for pair in (small.parameters, small.multiply_adds))
        low, middle, high = times[name]
        row = {"network": name, **run.task.evaluate(net), "parameters": size, "macs": macs}
        row |= {"latency_ms": middle, "latency_low": low, "latency_high": high}
        if name == "compact":
            row["largest_change"] = largest_change(run, sparse, net)
        rows.append(row)
    return rows


def largest_change(run: Pruning, before: nn.Module, after: nn.Module) -> float:
    """The largest difference of an output for the validation data, over the largest output."""
    change = largest = 0.0
    for a, b in zip(run.task.outputs(before), run.task.outputs(after), strict=True):
        change, largest = max(change, float((a - b).abs().max())), max(largest, float(a.abs().max()))
    return change / largest if largest else change


@torch.no_grad()
def latencies(networks: Mapping[str, nn.Module], example: Tensor, runs: int) -> dict[str, tuple[float, float, float]]:
    """Milliseconds of a pass on one thread: the lower quartile, the median and the upper quartile for each network.

    The networks take turns, so that other work on the machine slows all of them.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for net in networks.values():
            milliseconds(net, example)  # the first pass allocates, and chooses kernels
        found = [{name: milliseconds(net, example) for name, net in networks.items()} for _ in range(runs)]
    finally:
        torch.set_num_threads(threads)
    return {name: _quartiles([turn[name] for turn in found]) for name in networks}


def milliseconds(net: nn.Module, example: Tensor) -> float:
    """The time of one pass."""
    _synchronize(example)
    start = time.perf_counter()
    net(example)
    _synchronize(example)
    return 1000 * (time.perf_counter() - start)


def _synchronize(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def table(rows: Sequence[Mapping[str, Any]], qualities: Sequence[Quality]) -> str:
    """The rows as text. qualities: the columns that tell how good a network is."""
    heads = ["network", *(quality.label for quality in qualities), "parameters", "multiply-adds", "ms a pass (quartiles)"]
    cells = []
    for row in rows:
        shown = [quality.show(row[quality.column]) for quality in qualities]
        time = f"{row['latency_ms']:.2f} ({row['latency_low']:.2f} - {row['latency_high']:.2f})"
        size = [f"{grouped(row[name])}{_share(row[name], rows[0][name])}" for name in ("parameters", "macs")]
        cells.append([NAMES[row["network"]], *shown, *size, time])
    widths = [max(map(len, column)) for column in zip(heads, *cells)]
    line = lambda words: "  ".join(w.ljust(n) if i == 0 else w.rjust(n) for i, (w, n) in enumerate(zip(words, widths)))
    return "\n".join(map(line, [heads, *cells]))


def _share(value: int, dense: int) -> str:
    return f" ({100 * value / dense:.1f} %)"


def write_tables(out: Path, rows: Sequence[Mapping[str, Any]], layers: Sequence[Layer]) -> None:
    """Write table.csv and layers.csv."""
    write_csv(out / "table.csv", rows)
    write_csv(out / "layers.csv", [vars(layer) for layer in layers])
