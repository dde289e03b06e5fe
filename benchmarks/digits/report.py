"""Records, table and picture of the ablation."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from digits.problem import CURVES, Arrays, Curve, Settings, weights_of


def records(
    curve: Curve, settings: Settings, found: Arrays, accuracies: np.ndarray, before: np.ndarray, dense: np.ndarray
) -> Iterator[dict]:
    """One record for each strength and seed of a curve."""
    for n, strength in enumerate(settings.strength_grid()):
        for seed in range(settings.seeds):
            own = [w[seed, n] for w in weights_of(found)]
            nonzero = [int((w != 0).any(0).sum()) for w in own]
            yield {
                "method": curve.method,
                "penalty": curve.penalty,
                "metric": curve.metric,
                "strength": strength,
                "seed": seed,
                "accuracy": float(accuracies[seed, n]),
                "sparsity": sum(int((w == 0).sum()) for w in own) / sum(w.size for w in own),
                "features": nonzero[0],
                "neurons": sum(nonzero[1:]),
                "accuracy_before_retraining": float(before[seed, n]),
                "dense_accuracy": float(dense[seed, 0]),
            }


def write(rows: list[dict], out: Path) -> None:
    (out / "ablation.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    with (out / "ablation.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def of_curve(rows: list[dict], curve: Curve) -> dict[float, list[dict]]:
    """The records of a curve, by strength."""
    wanted = (curve.method, curve.penalty, curve.metric)
    own = [r for r in rows if (r["method"], r["penalty"], r["metric"]) == wanted]
    return {s: [r for r in own if r["strength"] == s] for s in sorted({r["strength"] for r in own})}


PANELS = (
    ("accuracy", "validation accuracy, retrained", 100),
    ("features", "selected input features", 1),
    ("neurons", "remaining inner neurons", 1),
    ("sparsity", "zero weights", 100),
)
STYLES = {
    "sgd": ("#9c9c9c", "--"),
    "adam": ("#4d4d4d", "--"),
    "hapg": ("#d95f02", "-"),
    "adamhapg": ("#1b6ca8", "-"),
    "hapg_lasso": ("#e6ab02", ":"),
    "hapg_group_lasso": ("#a6761d", ":"),
    "adamhapg_exact": ("#66a61e", "-"),
    "proxadam": ("#7b3fa0", "-"),
}


def draw(rows: list[dict], path: Path) -> None:
    """Four panels over the strength, a line a curve: mean over the seeds, band of one standard deviation."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    figure, axes = plt.subplots(1, 4, figsize=(17, 4.4))
    for axis, (key, title, factor) in zip(axes, PANELS):
        for name, curve in CURVES.items():
            points = of_curve(rows, curve)
            if not points:
                continue
            values = [[factor * r[key] for r in group] for group in points.values()]
            mean = [statistics.mean(v) for v in values]
            spread = [statistics.pstdev(v) for v in values]
            color, line = STYLES[name]
            axis.plot(list(points), mean, line, color=color, label=curve.label, marker="o", markersize=3)
            low, high = [m - s for m, s in zip(mean, spread)], [m + s for m, s in zip(mean, spread)]
            axis.fill_between(list(points), low, high, color=color, alpha=0.12, linewidth=0)
        axis.set(xscale="log", xlabel="strength", title=title + (" (%)" if factor == 100 else ""))
        if factor == 1:
            axis.yaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.25)
    dense = 100 * statistics.mean(r["dense_accuracy"] for r in rows)
    axes[0].axhline(dense, color="black", linewidth=0.8)
    axes[0].annotate("dense", (min(r["strength"] for r in rows), dense), xytext=(2, 3), textcoords="offset points", fontsize=8)
    handles, labels = axes[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def table(rows: list[dict]) -> str:
    """Means and standard deviations over the seeds at the largest strength, as Markdown."""

    def cell(values: list[float], form: str) -> str:
        return f"{statistics.mean(values):{form}} ± {statistics.pstdev(values):{form}}"

    strength = max(r["strength"] for r in rows)
    seeds = len({r["seed"] for r in rows})
    dense = cell([100 * d for d in {r["seed"]: r["dense_accuracy"] for r in rows}.values()], ".2f")
    lines = [
        f"At strength {strength:.3g}, mean ± standard deviation over {seeds} seeds; the dense network reaches {dense} %.",
        "",
        "| curve | accuracy % | features of 64 | neurons of 60 | zero weights % |",
        "| --- | --- | --- | --- | --- |",
    ]
    for curve in CURVES.values():
        group = of_curve(rows, curve).get(strength)
        if group:
            cells = [cell([f * r[key] for r in group], ".2f" if key == "accuracy" else ".1f") for key, _, f in PANELS]
            lines.append(f"| {curve.label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
