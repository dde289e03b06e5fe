"""The table of NAS-Bench-201 and the benchmark on it, with a made-up table: the real one is not shipped."""

import numpy as np
import pytest
from nas.data import nats_bench
from nas.data.nats_bench import COLUMNS, OPTIMA, Table, all_cells, size

ALL_3X3 = "|nor_conv_3x3~0|+|nor_conv_3x3~0|nor_conv_3x3~1|+|nor_conv_3x3~0|nor_conv_3x3~1|nor_conv_3x3~2|"
ONE_1X1 = "|none~0|+|none~0|none~1|+|nor_conv_1x1~0|none~1|none~2|"


def made_up_rows():
    """Accuracies that grow with the number of parameters and have ties; the best are the published optima."""
    cells = list(all_cells())
    sizes = np.array([size(cell) for cell in cells])
    noise = np.random.default_rng(0).integers(20, size=len(cells))
    cifar10 = 10 + sizes + noise / 10
    cifar10[cells.index(ALL_3X3)] = OPTIMA[0]
    columns = [cifar10, cifar10 * OPTIMA[1] / OPTIMA[0], cifar10 * OPTIMA[2] / OPTIMA[0]]
    return [f"{a:.4f},{b:.4f},{c:.4f},{cell},x" for a, b, c, cell in zip(*columns, cells)]


@pytest.fixture(scope="module")
def lines():
    return [",".join((*COLUMNS, "UniqueString")), *made_up_rows()]


@pytest.fixture(scope="module")
def table_file(lines, tmp_path_factory):
    file = tmp_path_factory.mktemp("table") / "table.csv"
    file.write_text("\n".join(lines) + "\n")
    return file


@pytest.fixture(scope="module")
def table(table_file):
    return Table.read(table_file)


def test_a_cell_has_a_rank_and_two_percentiles(table):
    best = table.place(ALL_3X3)
    assert (best.cifar10, best.rank, best.percentile) == (OPTIMA[0], 1, 100 / 15625)
    assert (best.same_size, best.size_percentile) == (1, 50.0), "a cell that is alone has no better and no worse"
    places = [table.place(cell) for cell in table.architectures if size(cell) == size(ONE_1X1)]
    assert len(places) == 6 * 3**5 == table.place(ONE_1X1).same_size
    assert np.mean([p.size_percentile for p in places]) == pytest.approx(50)
    equal = [p for p in places if p.cifar10 == places[0].cifar10]
    assert len({(p.rank, p.size_percentile) for p in equal}) == 1 and len(equal) > 1
    assert places[0].rank == 1 + sum(table.cifar10 > places[0].cifar10)


def test_a_cell_is_looked_up_as_object_too(table):
    class Cell:
        def to_string(self):
            return ONE_1X1

    assert table.place(Cell()) == table.place(ONE_1X1)
    with pytest.raises(ValueError, match=r"cell must be one of the 15 625 cells of NAS-Bench-201, got 'DARTS_V2'"):
        table.place("DARTS_V2")


def changed(lines, number, old, new):
    return [line.replace(old, new) if i == number else line for i, line in enumerate(lines)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines[:-1], r"must have all 15 625 cells, got 15 624; \|avg_pool_3x3~0\|.* is missing"),
        (lambda lines: [*lines, lines[7]], r"line 15627: \|none~0\|.* appears twice"),
        (lambda lines: changed(lines, 0, COLUMNS[1], "Accuracy"), r"line 1 must name the columns .*: CIFAR100.* is missing"),
        (lambda lines: changed(lines, 3, lines[3][:5], "nan"), r"line 4: CIFAR10.* must be a number in \[0, 100\], got 'nan"),
        (lambda lines: changed(lines, 3, lines[3][:5], "x"), r"line 4: CIFAR10.* must be a number in \[0, 100\], got 'x"),
        (lambda lines: changed(lines, 2, "none~0|+", "zero~0|+"), r"line 3: ArchitectureString must be a cell such as \|none"),
        (lambda lines: [lines[0]], r"must have all 15 625 cells, got 0"),
        (lambda lines: [], r"line 1 must name the columns .*, got none"),
    ],
)
def test_a_wrong_table_is_refused_with_its_line(change, message, lines, tmp_path):
    file = tmp_path / "wrong.csv"
    file.write_text("\n".join(change(lines)))
    with pytest.raises(ValueError, match=r"wrong.csv.*" + message):
        Table.read(file)


def test_a_table_of_another_export_is_refused(lines, tmp_path):
    file = tmp_path / "other.csv"
    file.write_text("\n".join(line.replace(f"{OPTIMA[0]:.4f}", "93.1") for line in lines))
    with pytest.raises(ValueError, match=r"best accuracy on cifar10 must be the published one, 94.37 %, got 93.10 %"):
        Table.read(file)


def test_a_missing_table_names_where_users_get_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*none.csv .*nats_bench of its authors"):
        Table.read(tmp_path / "none.csv")
    assert nats_bench.COLUMNS[0] in nats_bench.HOW_TO_GET
