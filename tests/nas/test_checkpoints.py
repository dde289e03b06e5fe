"""Checkpoints and results of earlier releases are read. `checkpoints/write.py` made the files."""

import copy
import gzip
import hashlib
import importlib
import io
import json
from pathlib import Path

import digits_pruning
import pytest
import torch
from nas.engine import checkpoint
from nas.engine.run import Run
from nas.methods import operation_pruning
from nas.nets.torch import cnn
from nas.space import genotype
from nas_cases import fake_images
from torch import nn

from proxopt_torch import load_compact

RELEASES = sorted(p.parent for p in (Path(__file__).parents[1] / "checkpoints").glob("*/commands.json"))
WRITTEN = {folder: json.loads((folder / "commands.json").read_text()) for folder in RELEASES}
CASES = [pytest.param(f, name, id=f"{f.name}-{name}") for f in RELEASES for name in WRITTEN[f]["commands"]]


def unpacked(file):
    return gzip.decompress(file.read_bytes())


def tensors(state, place=()):
    """(place, tensor) for every tensor in nested dicts and lists."""
    if isinstance(state, torch.Tensor):
        yield place, state
    elif isinstance(state, (dict, list, tuple)):
        for key, part in state.items() if isinstance(state, dict) else enumerate(state):
            yield from tensors(part, (*place, key))


@pytest.mark.parametrize("release", RELEASES, ids=lambda folder: folder.name)
def test_the_fake_data_are_those_of_the_release(release, corpus):
    for name, known in WRITTEN[release]["data"].items():
        if name.endswith(".txt"):
            content = (corpus / name).read_bytes()
        else:
            made = fake_images(name, 32)
            content = made[b"data"].tobytes() + bytes(made[b"labels"])
        assert hashlib.sha256(content).hexdigest() == known


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(("release", "name"), CASES)
def test_a_run_of_an_earlier_release_goes_on(release, name, tmp_path, images, corpus, monkeypatch):
    command = WRITTEN[release]["commands"][name]
    file = tmp_path / command["file"]
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(unpacked(release / f"{name}.pt.gz"))
    before = checkpoint.load(file)
    loaded, run = [], Run.run

    def recording(self):
        loaded.append((copy.deepcopy(self.state()), self.epoch, self.step, list(self.rows)))
        return run(self)

    monkeypatch.setattr(Run, "run", recording)
    data = corpus if command["program"].endswith("ptb") else images
    options = [*command["options"].split(), "--data-dir", str(data), "--out", str(tmp_path), "--resume"]
    importlib.import_module(command["program"]).main(options)

    state, *progress = loaded[0]
    rows = [{**row, "epoch": row["epoch"] + 1} for row in before["progress"]["rows"]]  # release 0.1.0 counts from 0
    assert progress == [before["progress"]["epoch"], before["progress"]["step"], rows]
    found = dict(tensors(state))
    for place, saved in tensors(before["state"]):
        assert torch.equal(found[place], saved), place
    after = checkpoint.load(file)["progress"]
    assert after["rows"][: len(rows)] == rows and after["epoch"] == len(after["rows"]) > len(rows)
    assert [row["epoch"] for row in after["rows"]] == list(range(1, after["epoch"] + 1))


@pytest.mark.parametrize("release", RELEASES, ids=lambda folder: folder.name)
def test_results_of_an_earlier_release_are_read(release, tmp_path):
    results = release / "results"
    found = genotype.load_genotype(results / "genotype.json")
    assert json.loads(found.to_json()) == json.loads((results / "genotype.json").read_text())
    cell = genotype.load_genotype(results / "recurrent_genotype.json", genotype.RecurrentGenotype)
    assert json.loads(cell.to_json()) == json.loads((results / "recurrent_genotype.json").read_text())

    (tmp_path / "network.pt").write_bytes(unpacked(results / "network.pt.gz"))
    net = cnn.Network(genotype.load_genotype("DARTS_V2"), 1, 3, auxiliary=False)
    net.load_state_dict(operation_pruning.read_weights(tmp_path / "network.pt", net))
    assert net.eval()(torch.zeros(2, 3, 32, 32))[0].shape == (2, 10)

    saved = torch.load(io.BytesIO(unpacked(results / "compact.pt.gz")), weights_only=True)
    small = nn.Sequential(nn.Linear(64, 40), nn.LeakyReLU(), nn.Linear(40, 20), nn.LeakyReLU(), nn.Linear(20, 10))
    load_compact(small, saved["model"])
    _, (x, y) = digits_pruning.digits(0)
    assert digits_pruning.accuracy(small, (x[:, saved["inputs"]], y)) > 0.9
