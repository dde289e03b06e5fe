"""Cost of sparse codes, ours beside scikit-learn, spams and cvxpy: python benchmarks/sparse_coding.py

First 256 signals in a 64x256 dictionary at a tenth of the largest useful strength, for signals of 8 and of 16 atoms with noise
and for pure noise; then the recovery problems of ISTA-NAS, 7 rows and 14 to 35 columns drawn from [0, 1), strength 1e-5, in
double precision: the 8 of one search, and 60 searches at once. One thread, all contenders in turn in one process. CPU
milliseconds (median over the rounds), the ratio to the first contender with its range, and the largest gap relative to the
objective.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import csv
import importlib.util
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import cvxpy as cp
import numpy as np
from sklearn.decomposition import sparse_encode

from proxopt import L1, sparse_code
from proxopt.solvers import LeastSquares, fista

Contenders = dict[str, Callable[[], list[np.ndarray]]]
Case = tuple[list[np.ndarray], list[np.ndarray], float, Contenders]


def signals(atoms: int, seed: int = 0) -> Case:
    """256 signals of so many atoms and noise of size 0.01 (no atoms: of size 1), and who codes them."""
    rng = np.random.default_rng(seed)
    A = rng.normal(size=(64, 256))
    A /= np.linalg.norm(A, axis=0)
    codes = np.zeros((256, 256))
    for code in codes:
        code[rng.choice(256, atoms, replace=False)] = rng.normal(size=atoms)
    b = codes @ A.T + (0.01 if atoms else 1.0) * rng.normal(size=(256, 64))
    strength = 0.1 * float(np.abs(b @ A).max())
    f, start = LeastSquares(A, b), np.zeros((256, 256))
    contenders: Contenders = {
        "scikit-learn, coordinate descent": lambda: [sparse_encode(b, A.T, algorithm="lasso_cd", alpha=strength, max_iter=1000)],
        "scikit-learn, LARS": lambda: [sparse_encode(b, A.T, algorithm="lasso_lars", alpha=strength, max_iter=1000)],
        "proxopt.sparse_code": lambda: [sparse_code(A, b, strength).x],
        "proxopt fista": lambda: [fista(f, L1(strength), start).x],
    }
    if importlib.util.find_spec("spams"):
        import spams

        D, X = np.asfortranarray(A), np.asfortranarray(b.T)
        contenders["spams"] = lambda: [spams.lasso(X, D=D, lambda1=strength, numThreads=1).toarray().T]
    return [A], [b], strength, contenders


def recovery(searches: int, seed: int = 0) -> Case:
    """The eight problems of ISTA-NAS, of so many searches."""
    rng = np.random.default_rng(seed)
    dictionaries = [rng.uniform(size=(7, 7 * (2 + i % 4))) for i in range(8 * searches)]
    b, strength = 1e-3 * rng.normal(size=(8 * searches, 7)), 1e-5

    def loop(scale: float) -> list[np.ndarray]:
        found = []
        for A, signal in zip(dictionaries, b):
            z = cp.Variable(A.shape[1])
            objective = cp.sum_squares(A @ z - scale * signal) / 2 + scale * strength * cp.norm1(z)
            cp.Problem(cp.Minimize(objective)).solve(solver=cp.CLARABEL)
            found.append(z.value[None] / scale)
        return found

    contenders: Contenders = {
        "cvxpy, as it is": lambda: loop(1.0),
        "cvxpy, scaled to size 1": lambda: loop(1e3),
        "proxopt.sparse_code": lambda: [z[None] for z in sparse_code(dictionaries, b, strength).x],
    }
    return dictionaries, [signal[None] for signal in b], strength, contenders


CASES: dict[str, Callable[[], Case]] = {
    "256 signals of 8 atoms": lambda: signals(8),
    "256 signals of 16 atoms": lambda: signals(16),
    "256 signals of noise": lambda: signals(0),
    "8 recovery problems": lambda: recovery(1),
    "480 recovery problems": lambda: recovery(60),
}


def gap(A: np.ndarray, b: np.ndarray, strength: float, z: np.ndarray) -> float:
    """The largest duality gap relative to the objective, from its definition."""
    residual = b - z @ A.T
    u = residual * np.minimum(1, strength / np.abs(residual @ A).max(1))[:, None]
    primal = (residual**2).sum(1) / 2 + strength * np.abs(z).sum(1)
    dual = (b**2).sum(1) / 2 - ((b - u) ** 2).sum(1) / 2
    return float(((primal - dual) / primal).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="CSV file for the table")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = []
    for case, make in CASES.items():
        dictionaries, b, strength, contenders = make()
        spent: dict[str, list[float]] = {name: [] for name in contenders}
        worst = {}
        for name, work in contenders.items():
            worst[name] = max(gap(A, y, strength, z) for A, y, z in zip(dictionaries, b, work()))
        for _ in range(args.rounds):
            for name, work in contenders.items():
                start = time.process_time()
                work()
                spent[name].append(1000 * (time.process_time() - start))
        print(f"\n{case:34}{'CPU ms':>10}{'ratio':>8}   {'range':18}{'gap':>9}")
        base = spent[next(iter(contenders))]
        for name, times in spent.items():
            ratios = [t / r for t, r in zip(times, base)]
            ratio, low, high = statistics.median(ratios), min(ratios), max(ratios)
            print(f"{name:34}{statistics.median(times):10.2f}{ratio:8.3f}   {low:.3f} - {high:.3f}{worst[name]:14.1e}")
            cpu = round(statistics.median(times), 3)
            row = {"case": case, "contender": name, "cpu_ms": cpu, "ratio": ratio, "low": low, "high": high, "gap": worst[name]}
            rows.append(row)
    if args.out:
        with args.out.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
