"""Genotypes by name and file, their networks' sizes, and the spaces they come from."""

import json
import re

import pytest
import torch
import train_cifar10
from nas.nets.torch import cnn
from nas.space import genotype, spaces
from nas.space.genotype import CELLS, Genotype, Path, RecurrentGenotype, load_genotype

SIZES = {
    "DARTS_V1": (3_169_414, 3_221_344, 4_510_432, 501, 506),
    "DARTS_V2": (3_349_342, 3_401_272, 4_718_752, 528, 530),
    "PC_DARTS": (3_634_678, 3_686_608, 5_270_560, 557, 571),
    "ISTA": (3_316_726, 3_368_656, 4_820_608, 515, 528),
    "ISTA_ImageNet": (4_017_862, 4_069_792, 5_651_392, 619, 621),
}


@pytest.mark.parametrize("name", SIZES)
def test_published_genotypes_have_the_published_sizes(name, capsys):
    cifar10, cifar100, imagenet, macs, imagenet_macs = SIZES[name]
    other = ["--classes", "100"] if name == "ISTA" else ["--data", "cifar100"]
    for options, parameters, millions in (
        ([], cifar10, macs),
        (other, cifar100, macs),
        (["--imagenet"], imagenet, imagenet_macs),
    ):
        train_cifar10.main(["--genotype", name, "--count", *options])
        found = json.loads(capsys.readouterr().out)
        assert found["parameters"] == parameters
        assert round(found["macs"] / 1e6) in (millions, millions - 1)


def test_the_auxiliary_heads_have_the_published_sizes():
    for kind, classes, size in ((cnn.Network, 10, 476_426), (cnn.Network, 100, 545_636), (cnn.ImageNetNetwork, 1000, 1_260_776)):
        with torch.device("meta"):
            net = kind(load_genotype("DARTS_V1"), classes=classes)
        assert sum(p.numel() for p in net.auxiliary.parameters()) == size


@pytest.mark.parametrize("name", ["darts", "darts_zero"])
def test_the_supernet_has_the_published_size_and_node_groups(name):
    space = spaces.get_space(name)
    with torch.device("meta"):
        assert sum(p.numel() for p in cnn.Supernet(space).parameters()) == 1_930_618
    if name == "darts":
        for cell in CELLS:
            assert [space.nodes(cell).count(n) for n in (2, 3, 4, 5)] == [14, 21, 28, 35]


def test_every_space_builds_and_runs():
    for name in [name for name, space in spaces.SPACES.items() if space.kind is Genotype]:
        net = cnn.Supernet(spaces.get_space(name), 2, 3)
        assert net(torch.randn(2, 3, 8, 8)).shape == (2, 10)
    with pytest.raises(ValueError, match="unknown convolutional space 'dart'; did you mean 'darts'"):
        spaces.get_space("dart")


def test_a_file_comes_back_as_it_was(tmp_path):
    found = Genotype(
        {"2": [["sep_conv_3x3", 0], ["skip_connect", 0], ["max_pool_3x3", 1]], "4": [["dil_conv_5x5", 2]]},
        {"3": [["skip_connect", 1]]},
    )
    found.save(tmp_path / "g.json")
    assert load_genotype(tmp_path / "g.json") == found
    assert json.loads((tmp_path / "g.json").read_text())["normal"]["4"] == [["dil_conv_5x5", 2]]
    assert found.active_nodes("normal") == (2, 4)
    assert cnn.network_size(cnn.Network(found, 4, 3, auxiliary=False), (3, 32, 32))["parameters"] > 0


def test_dead_ends_are_cleaned_away():
    tangled = Genotype(
        {"3": [("skip_connect", 2)], "4": [("skip_connect", 3), ("skip_connect", 0)]}, {"2": [("skip_connect", 0)]}
    )
    assert tangled.clean() == Genotype({"4": [("skip_connect", 0)]}, {"2": [("skip_connect", 0)]})
    with pytest.raises(ValueError, match="no path of the genotype reaches an input of the normal cell"):
        cnn.Network(Genotype({"3": [("skip_connect", 2)]}, {"2": [("skip_connect", 0)]}))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", "a convolutional genotype is an object with the keys 'normal' and 'reduce', got list"),
        ('{"normal": {}}', "got 'normal'"),
        ('{"normal": {"7": []}, "reduce": {}}', "normal: nodes are 2, 3, 4, 5, got '7'"),
        ('{"normal": {"2": [["sep_conv_3", 0]]}, "reduce": {}}', "did you mean 'sep_conv_3x3'"),
        ('{"normal": {"2": [["skip_connect", 2]]}, "reduce": {}}', "must be one of 0 to 1, got 2"),
        ('{"normal": {"2": [["skip_connect", 0], ["skip_connect", 0]]}, "reduce": {}}', "appears twice"),
        ('{"normal": {"2": ["skip_connect"]}, "reduce": {}}', "expected [operation, source], got 'skip_connect'"),
    ],
)
def test_a_bad_file_says_where(content, message, tmp_path, capsys):
    file = tmp_path / "g.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        load_genotype(file)
    with pytest.raises(SystemExit, match=re.escape(message)):
        train_cifar10.main(["--genotype", str(file), "--count"])


def test_an_unknown_name_gets_a_hint():
    with pytest.raises(ValueError, match=r"unknown genotype 'DARTS_V3': .* did you mean DARTS_V"):
        load_genotype("DARTS_V3")
    with pytest.raises(FileNotFoundError, match="no genotype file"):
        load_genotype("runs/none/genotype.json")


def test_masks_and_genotypes_are_two_forms_of_one_thing():
    space = spaces.get_space("darts")
    for name in genotype.PUBLISHED["convolutional"]:
        assert space.genotype(space.masks(load_genotype(name))).clean().paths("normal") == tuple(
            sorted(load_genotype(name).paths("normal"), key=space.paths("normal").index)
        )
    with pytest.raises(ValueError, match="normal: space 'cherry' has no path"):
        spaces.get_space("cherry").masks(
            Genotype.from_paths(normal=[Path(2, 0, "max_pool_3x3")], reduce=[Path(2, 0, "skip_connect")])
        )


# -- genotypes as the published code prints them ----------------------------------------------


def printed(found, ranges=True):
    """A genotype of two paths (in a recurrent cell one) for each node as a printed named tuple."""
    fields = []
    for cell, concat in zip(found.layout.cells, found.layout.printed[1::2]):
        nodes = found.active_nodes(cell)
        pairs = [(path.operation, path.source) for path in found.paths(cell)]
        fields += [f"{cell}={pairs}", f"{concat}={range(nodes[0], nodes[-1] + 1) if ranges else list(nodes)}"]
    return f"Genotype({', '.join(fields)})"


@pytest.mark.parametrize("kind", [Genotype, RecurrentGenotype])
def test_a_printed_genotype_is_read_from_a_file_or_the_command_line(kind, tmp_path):
    file = tmp_path / "found.txt"
    for known in genotype.PUBLISHED[kind.layout.name].values():
        assert load_genotype(printed(known), kind) == known
        assert load_genotype(" DARTS = " + printed(known, ranges=False) + "\n", kind) == known
        assert load_genotype(repr(known), kind) == known
        for before, after in (("", ""), ("\ufeff# found\r\nFOUND = ", "  # best\r\n"), ("05:12 INFO genotype = ", "\n")):
            text = before + printed(known) + after
            file.write_bytes(text.encode())
            assert load_genotype(file, kind) == known
    assert printed(load_genotype("DARTS_V2")).startswith("Genotype(normal=[('sep_conv_3x3', 0), ('sep_conv_3x3', 1), ")


def test_the_command_line_counts_a_printed_genotype(capsys):
    counted = []
    for given in ("DARTS_V2", printed(load_genotype("DARTS_V2"))):
        train_cifar10.main(["--genotype", given, "--count", "--channels", "4", "--layers", "3"])
        counted.append(json.loads(capsys.readouterr().out))
    assert counted[0] == counted[1]


PAIRS = "[('skip_connect', 0), ('skip_connect', 1)]"
ONE_NODE = f"Genotype(normal={PAIRS}, normal_concat=[2], reduce={PAIRS}, reduce_concat=range(2, 3))"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (ONE_NODE, ONE_NODE[:-2], "a printed genotype must be Genotype(field=..., ...) of lists, pairs and ranges, but "),
        (ONE_NODE, ONE_NODE + ".clean()", "but something follows it"),
        (ONE_NODE, f"{ONE_NODE} or {ONE_NODE}", "one printed genotype is read at a time, got 2"),
        ("normal=", "", "but not all of its fields have names"),
        ("normal=", "**", "but not all of its fields have names"),
        ("normal=", "usual=", "has the fields normal, normal_concat, reduce, reduce_concat, got usual, normal_concat, reduce"),
        ("[2]", "__import__('os').getcwd()", "but __import__('os').getcwd() is none of them"),
        ("[2]", "range(10**12)", "but 10 ** 12 is none of them"),
        ("[2]", "range(1000000000000)", "range(1000000000000) is no range of nodes"),
        ("[2]", "range(2, 3, 0)", "arg 3 must not be zero"),
        ("[2]", "range('2')", "cannot be interpreted as an integer"),
        ("[2]", "[2, 3]", "normal_concat must hold all nodes with paths, 2: others cannot be built, got [2, 3]"),
        ("[2]", "2", "normal_concat must hold all nodes with paths, 2: others cannot be built, got 2"),
        ("1)]", "1), ('skip_connect', 2)]", "normal: expected a list of (operation, source), 2 for each node"),
        (f"normal={PAIRS}", f"normal={PAIRS} * 5", "is none of them"),
        ("'skip_connect', 0", "'skip_connect', 2", "normal, node 2: the source of skip_connect must be one of 0 to 1, got 2"),
        ("'skip_connect', 0", "'none', 0", "normal, node 2: 'none' means that there is no path"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_printed_genotype_is_said(old, new, message, tmp_path):
    assert load_genotype(ONE_NODE) == Genotype.from_paths(
        **{cell: [Path(2, s, "skip_connect") for s in (0, 1)] for cell in CELLS}
    )
    text = ONE_NODE.replace(old, new, 1)
    with pytest.raises(ValueError, match=re.escape(message)):
        load_genotype(text)
    (tmp_path / "g.txt").write_text(text)
    with pytest.raises(ValueError, match=rf"g\.txt: .*{re.escape(message)}"):
        load_genotype(tmp_path / "g.txt")


def test_the_nodes_of_other_cells_are_refused():
    five = PAIRS[:-1] + ", " + ", ".join(f"('skip_connect', {s})" for s in (0, 1) * 4) + "]"
    with pytest.raises(ValueError, match="normal: nodes are 2, 3, 4, 5, got 6"):
        load_genotype(f"Genotype(normal={five}, normal_concat=range(2, 7), reduce={PAIRS}, reduce_concat=[2])")
    with pytest.raises(ValueError, match="a printed recurrent genotype has the fields recurrent, concat, got normal"):
        load_genotype(ONE_NODE, RecurrentGenotype)


def test_a_name_as_long_as_a_genotype_is_an_unknown_name():
    with pytest.raises(ValueError, match="no such file, and no such name"):
        load_genotype("x" * 5000)


@pytest.mark.parametrize(
    ("word", "meant"),
    [("none", None), ("Sep_Conv_3x3", "sep_conv_3x3"), ("skipconnect", "skip_connect"), ("mbconv_3x3", None), ("zero", None)],
)
def test_only_a_misspelling_gets_a_hint(word, meant):
    with pytest.raises(ValueError) as error:
        Genotype({"2": [[word, 0]]}, {})
    assert str(error.value).count("did you mean") == (meant is not None)
    assert meant is None or f"did you mean {meant!r}? known" in str(error.value)


def test_other_methods_and_files_are_no_misspelt_genotypes():
    for name in ("none", "data", "GDAS", "first", "NASNet"):
        with pytest.raises(ValueError, match=f"unknown genotype '{name}': no such file, and no such name; known names"):
            load_genotype(name)
    for kind, name in ((Genotype, "none"), (RecurrentGenotype, "gelu")):
        with pytest.raises(ValueError, match=f"unknown {kind.layout.name} space '{name}'; known"):
            spaces.get_space(name, kind)
