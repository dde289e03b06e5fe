"""The outcome of a bilevel search, whatever library computes it: the row of an epoch, the epoch chosen, the files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..data.text import Corpus, describe
from ..engine import curves, report, results
from ..engine.loop import Diverged, Loop
from ..space import drawing
from ..space.genotype import AnyGenotype
from ..space.spaces import Space
from . import early_stopping
from .settings import BilevelSettings

Measured = tuple[float, float]  # mean loss, and the measure of quality


class Outcome(Loop):
    """The part of a bilevel search that no library computes. measure: of quality, reported in addition to the loss.

    points: by epoch, for each cell the weights at the prox point, on the host. name: of the method. genotype_size: counts the
    evaluation network of a genotype. size: that of the result, once the search is finished.
    """

    kind, table, command = "search", "search.csv", "nas_cifar10"
    measure = "accuracy"
    name: str
    space: Space
    settings: BilevelSettings
    points: list[dict[str, Any]]
    genotype_size: Callable[[Any], dict[str, int]]
    size: Mapping[str, int] | None = None

    def epoch_row(
        self,
        lr: float,
        trained: Measured,
        valid: Measured,
        restricted: Measured,
        genotype: AnyGenotype,
        point: Mapping[str, Any],
    ) -> dict[str, Any]:
        """The columns of an epoch, and its genotype as a file.

        Args:
          trained, valid, restricted: of the weight steps, of the supernet, and of its nonzero paths alone.
          point: the weights at the prox point; kept for the report.
        """
        row: dict[str, Any] = {"lr": lr}
        for part, found in (("train", trained), ("valid", valid), ("restricted", restricted)):
            row |= dict(zip((f"{part}_loss", f"{part}_{self.measure}"), found))
        self.points.append(dict(point))
        if self.processes.first:
            results.save_epoch(self.out, self.epoch, genotype)
        return row | report.architecture_columns(genotype, point)

    def check_finite(self, part: str, loss: float, largest: float | None = None) -> None:
        """Raise Diverged for a loss that is infinite or NaN, from which the search cannot recover.

        largest: the largest architecture weight, for the message.
        """
        if not loss < float("inf"):
            known = "" if largest is None else f" and the largest architecture weight {largest:.3g}"
            raise Diverged(
                f"the {part} loss of epoch {self.epoch + 1} must be finite, got {loss}; lr is {self.settings.lr:g}{known}:"
                " a lower lr or arch_lr may help"
            )

    def epochs(self) -> int:
        return self.settings.epochs if self.stopped() is None else len(self.rows)

    def stopped(self) -> int | None:
        """The epoch to which a search that stops early returns, as soon as it does."""
        return (
            early_stopping.epoch_to_return_to(self.rows, self.settings) if getattr(self.settings, "early_stop", False) else None
        )

    def result(self) -> dict[str, Any]:
        if (stopped := self.stopped()) is not None:
            return {**self.rows[stopped - 1], **(self.size or {})}
        limit, cells = self.settings.pick_below, self.space.layout.cells
        sparse = [row for row in self.rows if sum(row[f"paths_{cell}"] for cell in cells) <= limit]
        return {**(min(sparse, key=self.selection_loss) if sparse else self.rows[-1]), **(self.size or {})}

    def selection_loss(self, row: dict[str, Any]) -> float:
        """The quantity that `pick_below` minimises over the epochs."""
        return -row["restricted_accuracy"]

    def title(self) -> str:
        return f"{self.name}, {super().title()}"

    def finish(self) -> None:
        row = self.result()
        if self.stopped() is not None:
            print(f"stopped early after epoch {len(self.rows)}: the result is the genotype after epoch {row['epoch']}")
        epoch = row["epoch"] - 1  # rows count from 1
        results.select_epoch(self.out, epoch, self.space.kind)
        details = report.Details(row, self.genotype_size, self.settings.data_dir)
        if "distance" in self.rows[-1]:
            drawing.save(curves.distances(self.rows), self.out / "distances.png")
        self.size = results.write_report(self.out, self.name, self.rows, self.points[epoch], self.space, self.identity(), details)

    def identity(self) -> dict[str, Any]:
        return {"method": self.name, **super().identity()}


class TextOutcome(Outcome):
    """The outcome of a search on text, by perplexity."""

    measure, command = "perplexity", "nas_ptb"
    corpus: Corpus

    def data_text(self) -> str:
        return describe(self.corpus, self.settings.tokens)

    def selection_loss(self, row: dict[str, Any]) -> float:
        return row["restricted_loss"]
