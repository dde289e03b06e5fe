"""Search methods on NAS-Bench-201, where the accuracy of every cell is known:

    python benchmarks/nas_bench_201.py --table nats_bench.csv --data-dir data

Every method searches with every seed, as by `examples/nas_cifar10.py` with the options that are printed first, in --jobs worker
processes of one thread each. For every run as it ends: the accuracy of its cell on CIFAR-10, CIFAR-100 and ImageNet16-120 in the
table, its rank among all 15 625 cells, its percentile among all and among the cells with as many parameters, and CPU seconds. At
the end a summary with baselines, and a picture. Written to --out: runs.csv, summary.csv, summary.txt, nas_bench_201.png, and a
folder for each run. Finished runs there are not repeated, and interrupted ones are resumed; --only-summary makes table and picture
from runs.csv alone.

Baselines that are run: random_search, which trains --cells random cells by the network and data of the search, each for the same
share of --cost CPU seconds, and returns the one with the best accuracy on held-out images. Baselines for free: a random cell, the
largest of --cells random cells, the cell with a 3x3 convolution on every edge, and published figures.

--ablation runs the sound rule of sparse_supernet, and the same with one switch after the other as in the published rule.

--table is a CSV file with the columns {columns},
which is not shipped. It is exported from the file NATS-tss-v1_0-3ffb9-simple of the authors (Dong et al., NATS-Bench, 2021) by
their package nats_bench: the mean test accuracy after 200 epochs.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import shlex
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from nas.data.nats_bench import COLUMNS, DATA_SETS, Table
from nas.engine.command_line import CommandLine
from nas.engine.lock import locked
from nas.engine.log import write_csv
from nas.space import drawing
from nas.space.amounts import duration
from nas.space.files import write_text
from nas_bench_201_summary import picture, summary, text_table
from worker_processes import Done, Job, run

RULES = ("published", "sound")
SWITCHES = ("path_norm", "hold_norm", "warmup", "nonnegative", "cap", "levels", "probe_every", "strength", "optimizer")
SPARSE, RANDOM = "sparse_supernet", "random_search"


@dataclass(frozen=True)
class Kind:
    """A method of the command line. words: options of `examples/nas_cifar10.py` beside --method."""

    title: str
    method: str
    words: tuple[str, ...] = ()


METHODS = {
    "adamhapg": Kind("SparseNAS, AdamHAPG", SPARSE, ("--optimizer", "adamhapg")),
    "hapg": Kind("SparseNAS, HAPG", SPARSE, ("--optimizer", "hapg")),
    "ista": Kind("ISTA-NAS", "ista"),
    "gsparsity": Kind("GSparsity", "gsparsity"),
    "darts_first": Kind("DARTS, first order", "darts", ("--order", "first")),
    "darts_second": Kind("DARTS, second order", "darts", ("--order", "second")),
    RANDOM: Kind("best of {cells} random cells, trained", RANDOM),
}
