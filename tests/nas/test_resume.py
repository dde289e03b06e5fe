"""What is stopped goes on bit for bit: searches and trainings in this process, and whole command lines that are killed."""

import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from nas.engine import checkpoint
from nas.methods import registry
from nas_cases import TINY, TINY_CONVNET, TINY_TEXT, TINY_TRANSFORMER, rows_of, same, stopped

ROOT = Path(__file__).parents[2]
ONCE = ["--checkpoint-minutes", "0"]
PROXSGD = "--lr 0.3 --lr-min 0.3 --auxiliary 0".split()
# (program, options, after how many checkpoints of each process it stops: 4 steps make an epoch of a training, 2 of a search)
RUNS = {
    "sparse_supernet": ("nas_cifar10", "--space S1 --strength-step 0.5 --arch-lr 0.02 --probe-every 2", (1, 3)),
    "hapg": ("nas_cifar10", "--space S1 --optimizer hapg --strength-step 3 --arch-lr 0.1 --order second", (4,)),
    "adam": ("nas_cifar10", "--optimizer adam --space cherry --strength-step 1 --arch-lr 0.02 --order first", (3,)),
    "darts": ("nas_cifar10", "--method darts --space S3", (4,)),
    "pc_darts": (
        "nas_cifar10",
        "--method pc_darts --space cherry --channels 4 --frozen-epochs 1 --drop-path 0.3 --cutout 8",
        (3,),
    ),
    "ista": ("nas_cifar10", "--method ista --space S2 --recover-every 2", (4,)),
    "one stage": ("nas_cifar10", "--method ista --one-stage --space S2 --search-epochs 2 --tolerance 0", (3, 4, 7)),
    "gsparsity": ("nas_cifar10", "--method gsparsity --space S1 --mu 0.4 --tau 1", (3, 3)),
    "training": ("train_cifar10", "--genotype ISTA --drop-path 0.3", (3, 3)),
    "pruning": ("prune_operations", "--genotype DARTS_V2 --mu 0.5 --tau adaptive --retrain-epochs 1", (3, 4, 5)),
    "pruning of channels": ("prune_convnet", "--penalty sparse_group_lasso --cutout 8 --macs 0.6", (3, 8, 2)),
    "pruning of heads": ("prune_transformer", "--dropout 0.1 --start 0 --macs 0.7", (14, 4)),
    "text": ("nas_ptb", "--strength-step 0.3 --arch-lr 0.02 --drop-words 0.1", (3, 5)),
    "text training": ("train_ptb", "--genotype DARTS_V2 --epochs 6 --patience 1 --lr 25", (3, 25)),
    "lstm": ("train_ptb", "--genotype LSTM --drop-words 0.1", (7,)),
}


def command(name, images, corpus):
    """(main, argv without --out, after how many checkpoints it stops)."""
    program, options, stops = RUNS[name]
    text = program.endswith(("ptb", "transformer"))
    tiny = {"prune_convnet": TINY_CONVNET, "prune_transformer": TINY_TRANSFORMER}.get(program, TINY_TEXT if text else TINY)
    argv = [*tiny, *options.split(), *ONCE, "--data-dir", str(corpus if text else images)]
    if program in ("train_cifar10", "prune_operations") or name in ("gsparsity", "one stage"):
        argv += ["--valid-images", "16", *PROXSGD]
    return importlib.import_module(program).main, argv, stops


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("name", RUNS)
def test_what_is_stopped_goes_on_bit_for_bit(name, images, corpus, tmp_path):
    main, argv, stops = command(name, images, corpus)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    rows = main([*argv, "--out", str(whole)])
    for number, saves in enumerate(stops):
        torch.manual_seed(number)  # another process has another state
        stopped(main, [*argv, "--out", str(parts), *(["--resume"] if number else [])], saves)
    torch.manual_seed(99)
    again = main([*argv, "--out", str(parts), "--resume"])
    assert same(rows, again)
    tables = sorted(file.relative_to(whole) for file in whole.rglob("*.csv"))
    assert tables and all(rows_of(whole / table) == rows_of(parts / table) for table in tables)
    for file in [file.relative_to(whole) for file in whole.rglob("*.pt")]:
        one, other = checkpoint.load(whole / file), checkpoint.load(parts / file)
        assert same(one, other), file


def test_a_setting_that_is_new_since_the_checkpoint_has_its_default(images, tmp_path, monkeypatch):
    main, argv, _ = command("darts", images, None)
    stopped(main, [*argv, "--out", str(tmp_path)], 1)
    content = checkpoint.load(tmp_path / "checkpoint.pt")
    del content["identity"]["arch_beta1"]
    checkpoint.save(tmp_path / "checkpoint.pt", content)
    with pytest.raises(SystemExit, match=r"--resume must continue .* in the checkpoint arch_beta1 is 0\.5, not 0\.9"):
        main([*argv, "--out", str(tmp_path), "--resume", "--arch-beta1", "0.9"])
    stopped(main, [*argv, "--out", str(tmp_path), "--resume"], 1)
    assert checkpoint.load(tmp_path / "checkpoint.pt")["identity"]["arch_beta1"] == 0.5


def test_every_kind_of_settings_has_a_default():
    for methods in (registry.CIFAR, registry.ONE_STAGE, registry.TEXT):
        for method in methods.values():
            for preset in method.presets.values():
                assert type(preset)().plain().keys() == preset.plain().keys()


# -- whole command lines ----------------------------------------------------------------------

PROGRAM = """
import sys, importlib
from pathlib import Path
import nas_cases
nas_cases.fake_cifar(Path(sys.argv[1]))
importlib.import_module(sys.argv[2]).main(sys.argv[3:])
"""


def process(tmp_path, *argv, launch=()):
    paths = [ROOT / "tests", ROOT, ROOT / "examples", ROOT / "benchmarks"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    file = tmp_path / "program.py"
    file.write_text(PROGRAM)
    words = [sys.executable, *launch, str(file), str(tmp_path / "data"), *argv]
    return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


LIMIT = 900  # seconds after which a process hangs, however busy the machine is


def ended(running):
    """What a process said, when it has ended."""
    try:
        said, _ = running.communicate(timeout=LIMIT)
    finally:
        running.kill()
    return said


def finished(running):
    said = ended(running)
    assert running.returncode == 0, said


@pytest.mark.commands
@pytest.mark.parametrize("name", ["sparse_supernet", "training", "text", "text training", "pruning of heads"])
def test_what_is_killed_goes_on_bit_for_bit(name, corpus, tmp_path):
    _, argv, _ = command(name, tmp_path / "data", corpus)
    argv = [RUNS[name][0], *argv, "--epochs", "6"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    part = "sparse" if name == "pruning of heads" else ""  # the folder of the training that is killed
    finished(process(tmp_path, *argv, "--out", str(whole)))
    running = process(tmp_path, *argv, "--out", str(killed))
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline and running.poll() is None:
        file = killed / part / "checkpoint.pt"
        if file.exists() and (p := checkpoint.load(file)["progress"])["epoch"] >= 1 and p["step"] >= 1:
            break
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    ended(running)
    before = checkpoint.load(file)["progress"]
    assert 1 <= before["epoch"] < 6, "it must be killed before its end"
    assert "--resume" in ended(process(tmp_path, *argv, "--out", str(killed)))
    finished(process(tmp_path, *argv, "--out", str(killed), "--resume"))
    names = sorted(str(file.relative_to(whole)) for file in whole.rglob("*") if "tensorboard" not in str(file))
    assert names == sorted(str(file.relative_to(killed)) for file in killed.rglob("*") if "tensorboard" not in str(file))
    for table in (n for n in names if n.endswith(".csv")):
        assert rows_of(whole / table) == rows_of(killed / table)
    for file in (n for n in names if n.endswith(".pt")):
        assert same(checkpoint.load(whole / file), checkpoint.load(killed / file))
    for file in (n for n in names if n.endswith((".svg", ".json")) and not n.endswith("result.json")):
        assert (whole / file).read_text() == (killed / file).read_text()


@pytest.mark.commands
@pytest.mark.parametrize("name", ["sparse_supernet", "darts", "gsparsity", "training"])
def test_two_processes_share_the_batches(name, tmp_path):
    _, argv, _ = command(name, tmp_path / "data", None)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    finished(process(tmp_path, RUNS[name][0], *argv, "--out", str(tmp_path / "out"), launch=launch))
    written = checkpoint.load(tmp_path / "out" / "checkpoint.pt")
    assert written["identity"]["processes"] == 2 and len(written["progress"]["rows"]) == 2


@pytest.mark.commands
def test_text_is_read_by_one_process(tmp_path, corpus):
    _, argv, _ = command("text", None, corpus)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    said = ended(process(tmp_path, "nas_ptb", *argv, "--out", str(tmp_path / "out"), launch=launch))
    assert "text is read by one process; start it without torchrun, got 2 processes" in said
