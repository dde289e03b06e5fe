"""The command of a pruning script: two trainings, the cut, a table, a picture, and the compact network in a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nas.engine.command_line import SEEDS, CommandLine, errors_in_one_line, run_each_seed
from nas.engine.lock import locked
from nas.engine.log import write_csv
from nas.engine.loop import refuse_existing
from nas.engine.resume import expand, write_settings
from nas.engine.run import join, launch
from nas.space import drawing

from . import comparison, loading, pictures
from .settings import PruningSettings
from .task import Task
from .training import Pruning

EVALUATE = "Folder of a pruning whose compact network is evaluated on all validation data; nothing is trained."


def run(argv: list[str] | None, task: type[Task], presets: Mapping[str, PruningSettings], about: str) -> list[dict[str, Any]]:
    """Prune, or evaluate; return a row for each network and seed. about: the text of --help."""
    words = CommandLine(expand(argv, task.command, f"runs/{task.command}"))
    folder = words.value("--evaluate", EVALUATE, "FOLDER")
    settings = words.settings(presets, about)
    if folder is not None:
        with errors_in_one_line():
            return [evaluate(task, settings, Path(folder))]
    found = run_each_seed(settings, lambda seed, out: {"rows": prune(task, settings, seed, out)})
    rows = [{"seed": seed["seed"], **row} for seed in found for row in seed["rows"]]
    if len(settings.seeds) > 1:
        write_csv(settings.out / SEEDS, rows)
    return rows


def prune(task: type[Task], settings: PruningSettings, seed: int, out: Path) -> list[dict[str, Any]]:
    """Train, cut and compare with one seed; return a row for each network. Writes all files of the script to `out`."""
    with locked(out):
        refuse_existing(any(out.glob("*/checkpoint.pt")), out, settings.resume)
        write_settings(out, settings, command=task.command, seed=seed)
        dense = train(task, settings, False, seed, out / "dense") if settings.baseline else None
        sparse = train(task, settings, True, seed, out / "sparse")
        small = comparison.cut(sparse)
        layers = sparse.task.layers(sparse.net, small.model)
        loading.save(out, sparse.task, small)
        rows = comparison.compare(sparse, small, None if dense is None else dense.net.eval())
        comparison.write_tables(out, rows, layers)
        measured = sparse.budget.log if sparse.budget is not None else []
        before = [] if dense is None else dense.rows
        figure = pictures.pruning(layers, sparse.rows, before, measured, len(sparse), sparse.task.qualities[0])
        drawing.save(figure, out / "pruning.png")
    print(f"\n{comparison.table(rows, sparse.task.qualities)}")
    print(f"largest change of an output by the cut: {rows[-1]['largest_change']:.1e} of the largest output")
    print(f"written: {out}/table.csv, {out}/pruning.png, {out}/{loading.NAME}")
    print(f'to load the compact network, with PYTHONPATH=examples: pruning.load("{out}")')
    return rows


def train(task: type[Task], settings: PruningSettings, sparse: bool, seed: int, out: Path) -> Pruning:
    """Train, or continue a training that was interrupted; one that has ended is only read."""
    made: list[Pruning] = []

    def make(*place: Any) -> Pruning:
        made.append(Pruning(task, settings, sparse, seed, out, *place))
        return made[0]

    launch(make, settings, out)
    return made[0]


def evaluate(task: type[Task], settings: PruningSettings, folder: Path) -> dict[str, Any]:
    """Print how good the compact network in a folder is, and return it with its size."""
    _, device = join(settings)
    found = loading.read(folder)
    if found["network"] != task.network:
        raise ValueError(f"{folder} must be the folder of a pruning by {task.command}.py, got one with a {found['network']}")
    loading.check_about(folder, found, task)
    net = loading.load(folder, device)
    measured = task(settings, 0, device, found["about"])
    loading.refuse_other_data(found, measured)
    row = {**measured.evaluate(net), "parameters": sum(p.numel() for p in net.parameters())}
    shown = ", ".join(f"{quality.label} {quality.show(row[quality.column])}" for quality in task.qualities)
    print(f"{shown}, {row['parameters']} parameters")
    return row
