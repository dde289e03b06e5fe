"""How often sparse coding recovers the supports that ISTA-NAS relies on: python benchmarks/nas_recovery.py

Draws sparse codes z of size 1e-3, compresses them to b = A z, and recovers them by the lasso of the search (strength 1e-5). The
result is the share of draws in which the largest entries of the recovered code are those of z, over the number of rows of A, for
both distributions of A and the numbers of paths into the four nodes. Every recovery is certified by its duality gap; all draws of
a width are solved in one batch. Writes recovery.csv and recovery.png to --out.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from nas.engine.log import write_csv
from nas.methods.ista import measurement_matrix
from nas.space import drawing
from nas.space.drawing import plt

from proxopt import sparse_code

WIDTHS = (14, 21, 28, 35)
KINDS = ("uniform", "gaussian")


def rate(kind: str, rows: int, width: int, sparsity: int, draws: int, strength: float) -> tuple[float, float, float]:
    """Return the share of recovered supports, the mean coherence of the matrices, and the largest relative duality gap."""
    draw_matrix = measurement_matrix(kind)
    A = np.stack([draw_matrix(rows, width) for _ in range(draws)])
    z = np.zeros((draws, width))
    for code in z:
        places = torch.randperm(width)[:sparsity].numpy()
        code[places] = 1e-3 * torch.randn(sparsity, dtype=torch.float64).numpy()
    found = sparse_code(A, np.einsum("bmn,bn->bm", A, z), strength)
    kept = np.argsort(-np.abs(found.x), axis=1)[:, :sparsity]
    right = [set(k) == set(np.nonzero(code)[0]) for k, code in zip(kept, z)]
    unit = A / np.linalg.norm(A, axis=1, keepdims=True)
    products = np.abs(np.einsum("bmi,bmj->bij", unit, unit)) * (1 - np.eye(width))
    return float(np.mean(right)), float(products.max((1, 2)).mean()), float(found.gap.max())


def picture(table: list[dict], sparsity: int) -> plt.Figure:
    figure, axes = plt.subplots(1, len(KINDS), figsize=(9, 3.8), sharey=True, constrained_layout=True)
    for axis, kind in zip(axes, KINDS):
        for width in WIDTHS:
            own = [row for row in table if row["matrix"] == kind and row["paths"] == width]
            axis.plot([row["rows"] for row in own], [100 * row["recovered"] for row in own], marker=".", label=f"{width} paths")
        axis.set(title=f"{kind} matrices", xlabel="rows m")
        axis.grid(alpha=0.25)
        axis.legend(frameon=False)
    axes[0].set(ylabel=f"{sparsity}-sparse supports recovered (%)", ylim=(0, 102))
    return figure


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[3, 5, 7, 9, 11, 14])
    parser.add_argument("--sparsity", type=int, default=2)
    parser.add_argument("--strength", type=float, default=1e-5)
    parser.add_argument("--draws", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/nas_recovery"))
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    table = []
    print(f"{'matrix':10}{'rows':>5}" + "".join(f"{f'{w} paths':>10}" for w in WIDTHS) + f"{'coherence':>11}{'gap':>9}")
    for kind in KINDS:
        for rows in args.rows:
            cells = [rate(kind, rows, width, args.sparsity, args.draws, args.strength) for width in WIDTHS]
            for width, (share, coherence, gap) in zip(WIDTHS, cells):
                table.append(
                    {"matrix": kind, "rows": rows, "paths": width, "recovered": share, "coherence": coherence, "gap": gap}
                )
            shares = "".join(f"{100 * c[0]:>9.0f}%" for c in cells)
            print(f"{kind:10}{rows:>5}{shares}{np.mean([c[1] for c in cells]):>11.2f}{max(c[2] for c in cells):>9.0e}")
    args.out.mkdir(parents=True, exist_ok=True)
    write_csv(args.out / "recovery.csv", table)
    drawing.save(picture(table, args.sparsity), args.out / "recovery.png")
    print(f"written: {args.out}/recovery.csv, {args.out}/recovery.png")


if __name__ == "__main__":
    main()
