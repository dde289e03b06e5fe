"""What may happen to a run: it diverges, is stopped, finds the disk full or its folder in use, and is continued by its folder."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import nas
import nas_cifar10
import nas_ptb
import prune_operations
import pytest
import torch
import train_cifar10
import train_ptb
from nas.engine import checkpoint, lock, resume, signals
from nas.engine.lock import locked
from nas.engine.loop import Loop, refuse_other
from nas.methods.settings.darts import DartsSettings
from nas.space import files
from nas.train.settings import CifarTrainSettings
from nas.train.train_cifar import ImageTraining
from nas_cases import TINY, TINY_TEXT, rows_of, same, stopped

ROOT = Path(__file__).parents[2]
RECIPE = "--valid-images 16 --auxiliary 0".split()
DIVERGES = "--lr 1e30 --clip 0".split()
ONCE = ["--checkpoint-minutes", "0"]
pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture
def train(images, tmp_path):
    """A training with these further options in tmp_path."""
    return lambda *options: train_cifar10.main(
        [*TINY, *RECIPE, "--data-dir", str(images), "--out", str(tmp_path / "out"), *options]
    )


def message(stop):
    """What a program says that ends with an error."""
    with pytest.raises(SystemExit) as stopped:
        stop()
    return str(stopped.value)


# -- divergence -------------------------------------------------------------------------------

ONE_STAGE = "--method ista --one-stage --space cherry --search-epochs 1 --tolerance 1e9".split()


@pytest.mark.parametrize(
    ("main", "options"),
    [
        (train_cifar10.main, []),
        (nas_cifar10.main, ONE_STAGE),
        (nas_cifar10.main, "--method gsparsity --space cherry --tau 1".split()),
        (prune_operations.main, ["--mu", "0.5"]),
    ],
    ids=["training", "one stage", "gsparsity", "pruning"],
)
def test_a_run_that_diverges_stops_and_names_its_learning_rate(main, options, images, tmp_path):
    argv = [*options, *TINY, *RECIPE, *DIVERGES, *ONCE, "--data-dir", str(images), "--out", str(tmp_path)]
    said = message(lambda: main(argv))
    assert re.fullmatch(r"error: the .* epoch 1.* must be finite, got .*; lr is 1e\+30: a lower lr may help", said)
    assert not [file for name in ("network.pt", "result.json", "report.html") for file in tmp_path.rglob(name)]
    assert not list(tmp_path.rglob(lock.NAME))


def test_a_search_that_diverges_after_its_nodes_are_frozen_stops(images, tmp_path, monkeypatch):
    begin = ImageTraining.train_step

    def train_step(self, batch):
        if self.epoch == 1:
            assert not self.searching
            self.params[0].data.fill_(float("nan"))
        begin(self, batch)

    monkeypatch.setattr(ImageTraining, "train_step", train_step)
    argv = [*ONE_STAGE, *TINY, *RECIPE, "--data-dir", str(images), "--out", str(tmp_path)]
    assert "the train loss of epoch 2 must be finite, got nan; lr is 0.025" in message(lambda: nas_cifar10.main(argv))
    assert not (tmp_path / "network.pt").exists()
    assert checkpoint.load(tmp_path / "checkpoint.pt")["progress"]["epoch"] == 1, "the last good checkpoint is kept"


def test_a_diverged_state_does_not_replace_the_last_good_checkpoint(train, tmp_path, monkeypatch):
    step = ImageTraining.train_step

    def train_step(self, batch):
        step(self, batch)
        if (self.epoch, self.step) == (1, 1):
            self.params[0].data.fill_(float("inf"))

    monkeypatch.setattr(ImageTraining, "train_step", train_step)
    assert "the train loss of epoch 2 must be finite, got nan" in message(lambda: train(*ONCE))
    kept = checkpoint.load(tmp_path / "out" / "checkpoint.pt")
    assert (kept["progress"]["epoch"], kept["progress"]["step"]) == (1, 1)
    assert all(value.isfinite().all() for value in kept["state"]["net"].values())


# -- the folder of a run ----------------------------------------------------------------------


def other_process(folder, **content):
    """A lock of another process. Returns its file."""
    folder.mkdir(exist_ok=True)
    (folder / lock.NAME).write_text(json.dumps(content))
    return folder / lock.NAME


def test_a_folder_in_use_is_refused_until_it_is_free(train, tmp_path):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as holder:
        place = {"host": lock.socket.gethostname(), "started": lock._start_of(holder.pid)}
        file = other_process(tmp_path / "out", pid=holder.pid, **place)
        said = message(train)
        assert said == f"error: {tmp_path / 'out'} is in use by process {holder.pid}: wait for its end, or choose another --out"
        assert file.exists(), "the lock of the other process stays"
        holder.communicate(b"\n")
    with locked(tmp_path / "out"):  # the process has ended without removing its lock
        assert json.loads(file.read_text())["pid"] == os.getpid()
        with locked(tmp_path / "out"):
            pass
        assert file.exists(), "a run inside of another one does not end its lock"
    assert not file.exists()


def test_a_number_that_was_given_to_another_process_is_no_lock(tmp_path):
    other_process(tmp_path, pid=os.getppid(), host=lock.socket.gethostname(), started="of another process")
    with locked(tmp_path):
        pass


def test_the_lock_of_another_host_is_removed_by_hand(tmp_path):
    file = other_process(tmp_path, pid=7, host="elsewhere")
    with pytest.raises(
        FileExistsError, match=rf"in use by process 7 on elsewhere since .* remove {file} if that process has end"
    ):
        locked(tmp_path).__enter__()
    file.write_text("")
    with pytest.raises(FileExistsError, match="in use by an unknown process"):
        locked(tmp_path).__enter__()


def test_what_a_killed_process_was_writing_is_removed(tmp_path):
    (tmp_path / ".train.csv.1-2.part").touch()
    with locked(tmp_path):
        assert [file.name for file in tmp_path.iterdir()] == [lock.NAME]


def test_a_folder_without_a_run_is_not_left(tmp_path):
    with pytest.raises(ValueError, match="no"), locked(tmp_path / "out"):
        raise ValueError("no")
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="out must be a folder, got the file"):
        locked(tmp_path / "file").__enter__()


# -- Ctrl-C, SIGTERM, a full disk, files of something else ------------------------------------


def at_step(monkeypatch, epoch, step, action):
    """Do something after this step."""
    progressed = Loop._stop_is_due

    def stop_is_due(self):
        if (self.epoch, self.step) == (epoch, step):
            action()
        return progressed(self)

    monkeypatch.setattr(Loop, "_stop_is_due", stop_is_due)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_run_after_its_step_and_says_how_it_goes_on(number, status, train, tmp_path, monkeypatch, capsys):
    before = [signal.getsignal(s) for s in signals.STOPPING]
    (whole,) = train("--out", str(tmp_path / "whole"))
    with monkeypatch.context() as patched:
        at_step(patched, 1, 2, lambda: os.kill(os.getpid(), number))
        patched.setattr(sys, "argv", ["examples/train_cifar10.py"])
        assert message(train) == str(status)
    out = tmp_path / "out"
    said = f"stopped by {number.name} after step 2 of epoch 2; continue with: "
    assert f"{said}python examples/train_cifar10.py --resume --out {out}\n" in capsys.readouterr().err
    assert [signal.getsignal(s) for s in signals.STOPPING] == before and not (out / lock.NAME).exists()
    assert checkpoint.load(out / "checkpoint.pt")["progress"]["step"] == 2
    assert same([whole], train_cifar10.main(["--resume", "--out", str(out)]))
    nets = [checkpoint.load(tmp_path / name / "network.pt") for name in ("whole", "out")]
    assert same(*nets)


def test_the_second_signal_ends_the_process_at_once():
    program = """
import os, signal
from nas.engine.signals import StopRequest
with StopRequest() as stop:
    os.kill(os.getpid(), signal.SIGINT)
    print(stop.number, flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    print("not reached")
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "examples")))}
    ended = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert (ended.stdout, ended.returncode) == ("2\n", -signal.SIGINT)


def test_a_signal_before_the_first_step_ends_the_program(tmp_path, capsys):
    def stop():
        with signals.stops_in_one_line(tmp_path, lambda: True):
            os.kill(os.getpid(), signal.SIGTERM)

    assert message(stop) == "143"
    assert capsys.readouterr().err == "\nstopped by SIGTERM before the first step: start it again with the same command\n"


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with signals.StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert not stop.number
    finally:
        signal.signal(signal.SIGINT, before)


def test_processes_are_continued_as_they_were_started():
    argv = ["a.py", "--coordinator", "host:1", "--processes=2", "--process", "1", "--lr", "2"]
    words = "python a.py --resume --out 'my run' --coordinator=host:1 --processes=2 --process=1"
    assert resume.resume_command(Path("my run"), argv, {}) == words
    torchrun = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}
    assert resume.resume_command(Path("x"), ["a.py"], torchrun) == "torchrun --nproc-per-node 4 a.py --resume --out x"


@pytest.mark.parametrize("name", ["checkpoint.pt", "train.csv", "network.pt"])
def test_a_full_disk_leaves_whole_files(name, train, tmp_path, monkeypatch):
    out, fsync, constant = tmp_path / "out", os.fsync, "--lr 0.01 --lr-min 0.01 --drop-path 0".split()
    train(*constant, "--epochs", "1")

    def full(number):
        if f".{name}." in os.readlink(f"/proc/self/fd/{number}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(number)

    before = (out / name).read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(files.os, "fsync", full)
        said = message(lambda: train(*constant, "--epochs", "2", "--resume"))
    assert said.startswith("error: the disk is full") and "continue with --resume from the last checkpoint" in said
    assert not list(out.glob(".*")) and (out / name).read_bytes() == before
    (row,) = train_cifar10.main(["--resume", "--out", str(out), "--epochs", "2"])
    assert row["epoch"] == 2


FOREIGN = {
    "an empty file": (lambda file: file.touch(), "must be a complete checkpoint, but is an empty file"),
    "a folder": (lambda file: file.mkdir(), "must be a complete checkpoint, but is a folder"),
    "text": (lambda file: file.write_text("hello\n" * 99), "must be a complete checkpoint, but could not be read: "),
    "a pickle of a class": (lambda file: torch.save(Path("x"), file), "must be a complete checkpoint, but could not be read: "),
    "a list": (lambda file: torch.save([1, 2], file), "must be a complete checkpoint, but contains an object of type list"),
    "weights": (lambda file: torch.save({"a": torch.ones(2)}, file), "must be the checkpoint of a run, but has no 'identity'"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_file_of_something_else_is_no_checkpoint(kind, train, tmp_path):
    write, reason = FOREIGN[kind]
    (tmp_path / "out").mkdir()
    write(tmp_path / "out" / "checkpoint.pt")
    said = message(lambda: train("--resume"))
    assert said.startswith(f"error: {tmp_path / 'out' / 'checkpoint.pt'} {reason}") and "\n" not in said and len(said) < 500


def test_a_state_that_does_not_fit_is_named(train, tmp_path):
    train("--epochs", "1")
    content = checkpoint.load(tmp_path / "out" / "checkpoint.pt")
    content["state"]["net"].popitem()
    checkpoint.save(tmp_path / "out" / "checkpoint.pt", content)
    said = message(lambda: train("--epochs", "1", "--resume"))
    assert "must be the checkpoint of this training, but its state does not fit: " in said and "\n" not in said


# -- settings.json ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("program", "options"),
    [
        ("nas_cifar10", "--method darts --space cherry --order first"),
        ("nas_cifar10", "--method ista --one-stage --space cherry --search-epochs 1 --valid-images 16"),
        ("nas_cifar10", "--method gsparsity --space cherry --tau direct --want-paths 3 --bisect-runs 1 --valid-images 16"),
        ("nas_ptb", "--method ista --arch-clip 0.5"),
        ("train_cifar10", "--genotype ISTA --valid-images 16"),
        ("train_ptb", "--genotype LSTM"),
        ("prune_operations", "--genotype ISTA --mu 0.5 --retrain-epochs 0 --tau 2 --valid-images 16"),
    ],
)
def test_a_folder_is_all_that_resume_needs(program, options, images, corpus, tmp_path):
    main = {m.__name__: m for m in (nas_cifar10, nas_ptb, train_cifar10, train_ptb, prune_operations)}[program].main
    text = program.endswith("ptb")
    argv = [*(TINY_TEXT if text else TINY), *options.split(), "--epochs", "1", "--data-dir", str(corpus if text else images)]
    whole = main([*argv, "--out", str(tmp_path / "whole")])
    stopped(main, [*argv, *ONCE, "--out", str(tmp_path / "parts")], 1)
    assert same(whole, main(["--resume", "--out", str(tmp_path / "parts")]))
    found = [json.loads((tmp_path / part / "settings.json").read_text()) for part in ("whole", "parts")]
    if "genotype" in found[1]:
        assert found[1].pop("genotype") in ("LSTM", str(tmp_path / "parts" / "genotype.json")) and found[0].pop("genotype")
    assert same({**found[0], "checkpoint_minutes": 0.0}, found[1]) and found[0]["command"] == program


def test_all_seeds_go_on_or_start(train, tmp_path):
    seeds = ["--seeds", "0", "1", "--epochs", "1"]
    stopped(lambda argv: train(*argv), [*seeds, *ONCE], 1)
    out = tmp_path / "out"
    assert [folder.name for folder in out.iterdir()] == ["seed-0"]
    rows = train_cifar10.main(["--resume", "--out", str(out)])
    assert [row["seed"] for row in rows] == [0, 1]
    assert [row["seed"] for row in train_cifar10.main(["--resume", "--out", str(out / "seed-1")])] == [1]


def test_a_config_is_a_new_run_with_its_settings(train, tmp_path):
    (row,) = train("--epochs", "1")
    again = ["--config", str(tmp_path / "out" / "settings.json"), "--out"]
    (other,) = train_cifar10.main([*again, str(tmp_path / "again")])
    assert same(row, other)
    train_cifar10.main([*again, str(tmp_path / "wider"), "--channels=3"])
    assert json.loads((tmp_path / "wider" / "settings.json").read_text())["channels"] == 3
    said = message(lambda: train_cifar10.main([*again, str(tmp_path / "a"), "--preset", "small"]))
    assert said.startswith("error: --config and --preset exclude each other")
    said = message(lambda: nas_cifar10.main([*again, str(tmp_path / "a")]))
    assert "must be of a run of nas_cifar10.py, but is of one of train_cifar10.py" in said
    for content in ("[]", "{", '{"a": 1}'):
        (tmp_path / "file.json").write_text(content)
        said = message(lambda: train_cifar10.main(["--config", str(tmp_path / "file.json")]))
        assert "must be the settings of a run" in said
    assert "no file" in message(lambda: train_cifar10.main(["--config", str(tmp_path / "none.json")]))


def test_another_method_does_not_continue_a_search(images, tmp_path):
    argv = [*TINY, "--method", "darts", "--space", "cherry", "--data-dir", str(images), "--out", str(tmp_path)]
    stopped(nas_cifar10.main, [*argv, *ONCE], 1)
    said = message(lambda: nas_cifar10.main(["--resume", "--out", str(tmp_path), "--method", "ista"]))
    assert said == "error: method must be that of the settings to continue with, 'darts', got 'ista'"
    said = message(lambda: nas_cifar10.main(["--resume", "--out", str(tmp_path), "--batch", "4", "--arch-lr", "1"]))
    assert "in the checkpoint batch is 8, not 4; arch_lr is 0.003, not 1.0" in said


def test_epochs_are_added_where_no_schedule_follows_their_number(train, tmp_path):
    out = ["--out", str(tmp_path / "out"), "--resume"]
    constant = "--lr 0.01 --lr-min 0.01 --drop-path 0".split()
    (whole,) = train(*constant, "--epochs", "2", "--out", str(tmp_path / "whole"))
    train(*constant, "--epochs", "1")
    assert same([whole], train_cifar10.main([*out, "--epochs", "2"]))
    assert json.loads((tmp_path / "out" / "settings.json").read_text())["epochs"] == 2
    said = message(lambda: train_cifar10.main([*out, "--epochs", "1"]))
    assert "in the checkpoint epochs is 2, not 1 (it can only grow)" in said
    with pytest.raises(ValueError, match=r"epochs is 2, not 3 \(lr from 1 to 0 and drop_path follow the number of epochs\)"):
        refuse_other("training", {"epochs": 3}, {"epochs": 2}, {}, ["lr from 1 to 0", "drop_path"])


@pytest.mark.parametrize(
    ("settings", "followers"),
    [
        (CifarTrainSettings(drop_path=0.0), ["lr from 0.025 to 0"]),
        (CifarTrainSettings(schedule="linear_tail", lr_min=0.025, drop_path=0.0), ["lr from 0.025 to 0"]),
        (CifarTrainSettings(schedule="exponential"), ["drop_path"]),
        (DartsSettings(lr_min=0.025, drop_path=0.1, cutout=4), ["drop_path", "cutout"]),
    ],
)
def test_what_follows_the_number_of_epochs_is_known(settings, followers):
    assert settings.schedules() == followers


def test_a_folder_without_a_run_is_not_resumed(train, tmp_path):
    said = message(lambda: train_cifar10.main(["--resume", "--out", str(tmp_path / "typo")]))
    assert said == f"error: {tmp_path / 'typo'} contains no run to resume: neither settings.json nor a checkpoint"
    assert train("--epochs", "1", "--resume"), "the command of a run may be repeated from its start"


def test_a_pruning_with_several_seeds_has_one_table_of_all(tmp_path, monkeypatch):
    rows = [{"mu": 0.5, "before": 0.25, "retrained": 0.5}, {"mu": 0.5, "before": 0.25}]
    monkeypatch.setattr(prune_operations, "every_mu", lambda *args: rows)
    prune_operations.main(["--seeds", "0", "1", "--out", str(tmp_path)])
    assert [row["seed"] for row in rows_of(tmp_path / "seeds.csv")] == ["0", "0", "1", "1"]


@pytest.mark.parametrize("seeds", [["0", "0"], ["1", "-1"]])
def test_seeds_are_different_and_not_negative(seeds, train):
    said = message(lambda: train("--seeds", *seeds))
    assert said == f"error: --seeds must be different numbers >= 0, got {' '.join(seeds)}"


# -- trained networks -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("main", "options", "folder"),
    [
        (train_cifar10.main, "--auxiliary 0.4", "."),
        (nas_cifar10.main, "--method ista --one-stage --space cherry --search-epochs 1 --auxiliary 0.4", "."),
        (prune_operations.main, "--mu 3 --lr 1 --lr-min 1 --tau direct --retrain-epochs 0 --thresholds 0.7", "mu-3"),
    ],
    ids=["training", "one stage", "pruning"],
)
def test_a_trained_network_is_loaded_from_its_folder(main, options, folder, images, tmp_path, capsys):
    data = ["--data-dir", str(images)]
    (row,) = main([*TINY, "--valid-images", "16", *options.split(), "--epochs", "1", *data, "--out", str(tmp_path)])
    wanted = row["after" if "after" in row else "valid_accuracy"]
    (evaluated,) = train_cifar10.main(["--evaluate", str(tmp_path / folder)])
    assert evaluated["valid_accuracy"] == wanted
    assert f"validation accuracy {100 * wanted:.2f} %" in capsys.readouterr().out
    net = nas.load(tmp_path / folder)
    pixels = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    logits = net(pixels)
    assert not net.training and logits.shape == (2, net.classes) == (2, 10)
    assert torch.equal(logits, net(net.normalised(pixels)))
    exported = torch.export.export(net, (net.normalised(pixels),)).module()
    torch.testing.assert_close(exported(net.normalised(pixels)), logits)
    (tmp_path / folder / "settings.json").unlink()  # as in a folder of an earlier release
    assert torch.equal(nas.load(tmp_path / folder)(pixels), logits)
    net.train()(pixels).sum().backward()


def test_a_network_for_large_images_is_loaded_from_its_folder(tmp_path):
    from PIL import Image

    for split in ("train", "val"):
        for label in ("cat", "dog"):
            (tmp_path / "tree" / split / label).mkdir(parents=True)
            for i in range(2):
                Image.new("RGB", (70 + i, 60), (90 * i, 200 if label == "cat" else 0, 10)).save(
                    tmp_path / "tree" / split / label / f"{i}.png"
                )
    options = (
        "--imagenet --preset small --epochs 1 --batch 4 --channels 2 --layers 3 --pixels 64 --workers 0 --device cpu".split()
    )
    out = tmp_path / "out"
    argv = [*options, "--auxiliary", "0", "--data-dir", str(tmp_path / "tree"), "--out", str(out)]
    (row,) = train_cifar10.main(argv)
    (evaluated,) = train_cifar10.main(["--evaluate", str(out)])
    assert evaluated["valid_loss"] == row["valid_loss"]
    net = nas.load(out)
    assert net(torch.zeros(1, 3, 64, 64)).shape == (1, 2) and net.mean == (0.485, 0.456, 0.406)


def test_loading_needs_torch(monkeypatch, tmp_path):
    monkeypatch.delitem(sys.modules, "nas.train.loading", raising=False)
    monkeypatch.delattr(sys.modules["nas.train"], "loading", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match=r"nas\.load needs PyTorch, in which networks are trained: pip install torch"):
        nas.load(tmp_path)


def test_a_training_starts_with_trained_weights(train, images, tmp_path):
    train("--epochs", "1", "--channels", "3", "--genotype", "ISTA")
    begun = ["--start", str(tmp_path / "out"), "--preset", "small", "--images", "32", *RECIPE, "--data-dir", str(images)]
    argv = [*begun, *"--epochs 1 --batch 8 --device cpu --lr 0 --weight-decay 0 --drop-path 0 --out".split(), str(tmp_path / "b")]
    train_cifar10.main(argv)
    old, new = (dict(nas.load(tmp_path / name).named_parameters()) for name in ("out", "b"))
    assert old.keys() == new.keys() and all(torch.equal(old[k], new[k]) for k in old)
    said = message(lambda: train_cifar10.main([*argv[:-1], str(tmp_path / "c"), "--channels", "2"]))
    assert "must hold the weights of this network" in said


def test_the_network_of_a_one_stage_search_is_trained_further(images, tmp_path):
    data = [*RECIPE, "--data-dir", str(images)]
    nas_cifar10.main([*TINY, *ONE_STAGE, *data, "--epochs", "1", "--out", str(tmp_path / "search")])
    settings = "--preset small --images 32 --batch 8 --device cpu --lr 0 --weight-decay 0 --drop-path 0 --epochs 1".split()
    train_cifar10.main(["--start", str(tmp_path / "search"), *settings, *data, "--out", str(tmp_path / "further")])
    old, new = (dict(nas.load(tmp_path / name).named_parameters()) for name in ("search", "further"))
    assert old.keys() == new.keys() and all(torch.equal(old[k], new[k]) for k in old)


def test_a_training_with_a_start_is_resumed_by_the_same_options(train, tmp_path):
    train("--epochs", "1", "--channels", "3", "--genotype", "ISTA")
    start, out = ["--start", str(tmp_path / "out")], ["--out", str(tmp_path / "further")]
    (row,) = train(*start, *out, "--channels", "3", "--genotype", "ISTA", "--lr", "0.01")
    assert train_cifar10.main(["--resume", *start, *out]) == [row]


def test_the_genotype_of_another_network_is_not_printed_whole(train, tmp_path):
    train("--epochs", "1", "--genotype", "ISTA")
    said = message(lambda: train_cifar10.main(["--resume", "--out", str(tmp_path / "out"), "--genotype", "DARTS_V1"]))
    assert said == "error: --resume must continue with the settings of the training: in the checkpoint architecture is another"


def test_a_damaged_file_of_a_network_is_named(train, tmp_path):
    train("--epochs", "1")
    out = tmp_path / "out"
    (out / "cells.json").write_text('[["a"')
    with pytest.raises(ValueError, match=r"out must contain the network of its settings, .*cells\.json is not valid JSON"):
        nas.load(out)
    (out / "cells.json").unlink()
    found = json.loads((out / "settings.json").read_text())
    for name, value in (("statistics", [1]), ("architecture", "{")):
        (out / "settings.json").write_text(json.dumps({**found, name: value}))
        with pytest.raises(ValueError, match="out must contain the network of its settings, but they do not fit"):
            nas.load(out)


def test_a_search_whose_cells_are_empty_ends_well(images, tmp_path, capsys):
    options = "--method gsparsity --space cherry --mu 100 --weighting initial_norm --valid-images 16 --epochs 1".split()
    nas_cifar10.main([*TINY, *options, "--data-dir", str(images), "--out", str(tmp_path)])
    said = capsys.readouterr().out
    assert "0 paths in the normal cell" in said and "a cell without paths cannot be trained" in said
    assert "nan" not in said and "report.html" not in said


def test_a_language_model_is_loaded_from_its_folder(corpus, tmp_path, capsys):
    argv = [*TINY_TEXT, "--epochs", "1", "--data-dir", str(corpus), "--test-batch", "5"]
    for genotype in ("DARTS_V1", "LSTM"):
        out = tmp_path / genotype
        (row,) = train_ptb.main([*argv, "--genotype", genotype, "--out", str(out)])
        (found,) = train_ptb.main(["--evaluate", str(out)])
        assert all(found[name] == row[name] for name in ("valid_perplexity", "test_perplexity"))
        net = nas.load(out)
        words = torch.tensor([[net.vocabulary.index("w1")], [net.vocabulary.index("w2")]])
        logits = net(words)
        assert logits.shape == (2, 1, len(net.vocabulary))
        first, state = net.continued(words[:1], net.network.start(1))
        torch.testing.assert_close(torch.cat([first, net.continued(words[1:], state)[0]]), logits)
    train_ptb.main([*argv, "--start", str(out), "--genotype", "LSTM", "--out", str(tmp_path / "further")])
    other = tmp_path / "other"
    other.mkdir()
    (other / "text.txt").write_text("some other words\n" * 99)
    said = message(lambda: train_ptb.main(["--evaluate", str(out), "--data-dir", str(other)]))
    assert "the text must have the vocabulary of the training, 11 words in the same order, got another of 4" in said
    assert "must be the folder of a training on images" in message(lambda: train_cifar10.main(["--evaluate", str(out)]))
    for script in (train_cifar10, train_ptb):
        words = ["--evaluate", str(tmp_path), "--threads", "-1"]
        assert message(partial(script.main, words)) == "error: threads must be >= 0, got -1"


def test_a_folder_without_a_trained_network_is_named(train, images, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*none of a training"):
        nas.load(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"must be the folder of a training, with settings.json and network\.pt"):
        nas.load(tmp_path)
    stopped(lambda argv: train(*argv), ONCE, 1)
    with pytest.raises(FileNotFoundError, match=r"must contain network\.pt: the training has not ended"):
        nas.load(tmp_path / "out")
    search = ["--method", "darts", "--space", "cherry", *TINY, "--data-dir", str(images), "--out", str(tmp_path / "search")]
    stopped(nas_cifar10.main, [*search, *ONCE], 1)
    with pytest.raises(FileNotFoundError, match=r"is the folder of a search, which trains no network: train_cifar10\.py"):
        nas.load(tmp_path / "search")
    torch.save({"classifier.weight": torch.ones(10, 2)}, tmp_path / "out" / "network.pt")
    with pytest.raises(ValueError, match="must contain the network of its settings, but they do not fit: "):
        nas.load(tmp_path / "out")


def test_a_new_process_loads_the_network_with_the_same_accuracy(train, images, tmp_path):
    (row,) = train("--epochs", "2")
    program = """
import sys, torch
import nas
assert "torch.nn" in sys.modules and "nas.train" not in sys.modules  # nas itself imports nothing
from nas_cases import fake_cifar
from functools import partial
from pathlib import Path
fake_cifar(Path(sys.argv[1]))
from nas.data.cifar import load_cifar
test = load_cifar("cifar10", sys.argv[1]).test.select(slice(16))
net = nas.load(sys.argv[2])
print(float((net(test.images).argmax(1) == test.labels).float().mean()))
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "examples", ROOT / "tests")))}
    words = [sys.executable, "-c", program, str(images), str(tmp_path / "out")]
    assert (
        float(subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout) == row["valid_accuracy"]
    )
