"""Searches in JAX by their command lines: files, resumption, several devices and processes, programs for TPUs."""

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import jax
import nas_cifar10
import nas_ptb
import numpy as np
import pytest
from nas.bilevel.jax.search_cifar import CifarSearch
from nas.bilevel.jax.search_text import TextSearch
from nas.engine import report
from nas.engine.jax import run
from nas.engine.jax.checkpoint import Checkpoints
from nas.engine.jax.devices import join_devices
from nas.methods.jax import darts, gsparsity, registry
from nas_cases import TINY_JAX, TINY_TEXT_JAX, rows_of, same

ROOT = Path(__file__).parents[2]
FILES = {"cells.png", "cells.svg", "curves.png", "genotype.json", "report.html", "search.csv", "settings.json", "weights.png"}
FILES |= {"result.json"}
# name: (main, options, after how many checkpoints it stops; an epoch of two steps writes two, and its end a third)
RUNS = {
    "sparse_supernet": (nas_cifar10.main, "--space cherry --strength-step 0.5 --arch-lr 0.02", (4,)),
    "gsparsity": (nas_cifar10.main, "--method gsparsity --space cherry --mu 0.4 --tau 1 --valid-images 16 --lr 0.3", (5,)),
    "text": (nas_ptb.main, "--strength-step 0.3 --arch-lr 0.02 --drop-words 0.1", (3,)),
}


pytestmark = pytest.mark.usefixtures("fast_compilation")


def command(name, images, corpus):
    main, options, stops = RUNS[name]
    text = main is nas_ptb.main
    words = [*(TINY_TEXT_JAX if text else TINY_JAX), *options.split(), "--data-dir", str(corpus if text else images)]
    return main, words, stops


def stopped(monkeypatch, main, argv, saves):
    """Run a command, and stop it after so many checkpoints, as if it were killed."""

    class Stop(Exception):
        pass

    save, count = Checkpoints.save, iter(range(1, saves + 1))

    def counting(self, *args):
        save(self, *args)
        if next(count) == saves:
            raise Stop

    with monkeypatch.context() as patched, pytest.raises(Stop):
        patched.setattr(Checkpoints, "save", counting)
        main(argv)


@pytest.mark.parametrize("name", ["text", *(pytest.param(n, marks=pytest.mark.slow) for n in ("gsparsity", "sparse_supernet"))])
def test_what_is_stopped_goes_on_bit_for_bit(name, images, corpus, tmp_path, monkeypatch):
    main, argv, stops = command(name, images, corpus)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    rows = main([*argv, "--out", str(whole)])
    assert {file.name for file in whole.iterdir()} >= FILES
    size = {"parameters": rows[0]["parameters"], "macs": rows[0].get("macs")}
    monkeypatch.setattr(report, "write", lambda *args: {k: v for k, v in size.items() if v is not None})
    argv = [*argv, "--checkpoint-minutes", "0", "--out", str(parts)]
    for number, saves in enumerate(stops):
        stopped(monkeypatch, main, [*argv, *(["--resume"] if number else [])], saves)
    again = main(["--resume", "--out", str(parts)])  # the folder has the library, the method and the settings
    assert same(rows, again) and rows_of(whole / "search.csv") == rows_of(parts / "search.csv")
    assert (whole / "genotype.json").read_bytes() == (parts / "genotype.json").read_bytes()


@pytest.mark.parametrize("words, text", [
    ("--method pc_darts", "--method must be one of darts, gsparsity, ista, sparse_supernet, got 'pc_darts'"),
    ("--method darts --early-stop", "early_stop must be False with --framework jax, got True"),
    ("--method ista --one-stage", "--one-stage belongs to --method ista of --framework torch, got --method ista"),
    ("--threads 2", "threads must be 0 with --framework jax, got 2"),
    ("--method gsparsity --images 5000", "images must be at most 160, got 5000"),
    ("--method gsparsity --cutout 8", "cutout must be 0 with --framework jax, got 8"),
    ("--device tpu", "device must be one that JAX finds on this machine"),
    ("--processes 2", "--processes and --process belong to --coordinator, which is missing"),
    ("--coordinator localhost:1 --processes two --process 0", "--processes must be a number >= 0, got 'two'"),
    ("--coordinator localhost:1 --processes 2 --process 2", r"process must lie in \[0, processes\)"),
])  # fmt: skip
def test_options_that_do_not_apply_are_refused(words, text, images, tmp_path):
    with pytest.raises(SystemExit, match=text):
        nas_cifar10.main([*TINY_JAX[:2], "--preset", "small", *words.split(), "--data-dir", str(images), "--out", str(tmp_path)])


def test_a_batch_that_devices_cannot_share_is_refused(images, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "join_devices", lambda device: eight_devices())
    with pytest.raises(SystemExit, match="batch must be a multiple of the 8 devices, got 6"):
        nas_cifar10.main([*TINY_JAX, "--batch", "6", "--data-dir", str(images), "--out", str(tmp_path)])


def eight_devices():
    class Eight(type(join_devices("cpu"))):
        count = 8

    return Eight(join_devices("cpu").mesh)


def test_a_run_with_other_settings_is_not_continued(images, tmp_path, monkeypatch):
    main, argv, _ = command("gsparsity", images, None)
    argv = [*argv, "--out", str(tmp_path)]
    stopped(monkeypatch, main, argv, 1)
    with pytest.raises(SystemExit, match="already contains a run: continue it with --resume"):
        main(argv)
    with pytest.raises(SystemExit, match=r"in the checkpoint mu is 0\.4, not 0\.5"):
        main([*argv, "--resume", "--mu", "0.5"])


def searches(images, corpus, tmp_path, **own):
    """A search of each kind, ready for its first step."""
    make = {
        "images": (CifarSearch, registry.CIFAR["sparse_supernet"], {"space": "cherry", "images": 32, "channels": 2, "layers": 3}),
        "text": (TextSearch, registry.TEXT["sparse_supernet"], {"hidden": 6, "bptt": 9, "tokens": 300}),
    }
    for name, (kind, method, options) in make.items():
        preset = method.presets["small"]
        where = {"data_dir": images if name == "images" else corpus, "out": tmp_path, "batch": 8}
        settings = type(preset)(**{**vars(preset), **where, **options, **own})
        yield name, kind(method.method, settings, 0, tmp_path / name, join_devices("cpu"))


def test_every_step_is_a_program_for_tpus(images, corpus, tmp_path):
    programs = {}
    for name, search in searches(images, corpus, tmp_path, order="second"):  # a step of first order is a part of it
        search.begin_epoch()
        place = search.place(next(iter(search.batches())))
        programs |= {f"{name}, architecture": partial(search.steps._architecture, probes=True)}
        programs |= {f"{name}, weights": search.steps._weights}
        args = (search.search, search.data, place)
        for step in list(programs):
            if step.startswith(name):
                check_program(programs[step], args)
    search = group_search(images, tmp_path)
    search.begin_epoch()
    check_program(partial(search.operations.batch_step, search.devices), (search.search, search.train, *search.place(0)))


def group_search(images, tmp_path):
    settings = gsparsity.GSparsitySettings(
        data_dir=images, images=32, valid_images=8, channels=2, layers=3, space="cherry", batch=8, out=tmp_path
    )
    return gsparsity.GSparsitySearch(settings, 0, tmp_path, join_devices("cpu"))


def test_a_search_by_groups_that_diverges_is_ended(images, tmp_path):
    search = group_search(images, tmp_path)
    search.search = search.search._replace(sums=np.full(3, np.nan, np.float32))
    with pytest.raises(ValueError, match=r"the train loss of epoch 1 must be finite, got nan; lr is 0\.001: a lower lr may help"):
        search.end_epoch()


def check_program(step, args):
    text = jax.export.export(jax.jit(step), platforms=["tpu"])(*args).mlir_module()
    assert "f64" not in text and "callback" not in text


def test_every_batch_is_divided_over_the_devices(images, corpus, tmp_path):
    for name, search in searches(images, corpus, tmp_path):
        search.begin_epoch()
        place = search.place(next(iter(search.batches())))
        args = (search.search, search.data, place)
        for step in (search.steps._architecture, search.steps._weights):
            own = {"probes": True} if step == search.steps._architecture else {}
            assert "sharding_constraint" in str(jax.make_jaxpr(partial(step, **own))(*args)), name


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["text", "images"])
def test_no_step_is_compiled_twice(kind, images, corpus, tmp_path):
    """Strength, learning rate, place and length of the window, and active paths are inputs of one program.

    On text there is one for each set of nodes with paths.
    """
    for name, search in searches(images, corpus, tmp_path, epochs=3, strength_step=0.3, arch_lr=0.02, target_paths=0):
        if name != kind:
            continue
        for epoch in range(3):
            search.epoch, search.step = epoch, 0
            search.begin_epoch()
            for batch in search.batches():
                search.train_step(batch)
                search.step += 1
        assert search.steps.architecture._cache_size() == search.steps.weights._cache_size() == len(search.programs), name
        assert len(search.programs) <= (1 if name == "images" else len(search.space.layout.nodes)), name


# -- whole command lines, in processes of their own ---------------------------------------------


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A function that starts a command line on some devices, for which every program is compiled once."""
    own = {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'examples'}",
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("programs")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }

    def of(words, devices=1):
        environment = {**os.environ, **own, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
        command = [sys.executable, str(ROOT / "examples" / words[0]), *words[1:]]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return of


def finished(process):
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    return out


@pytest.fixture(scope="module")
def own_text(tmp_path_factory):
    """A text of the right length, which needs no data set."""
    folder = tmp_path_factory.mktemp("text")
    for part, lines in (("train", 300), ("valid", 60), ("test", 60)):
        (folder / f"{part}.txt").write_text("".join(" ".join(f"w{(s + i) % 10}" for i in range(4)) + "\n" for s in range(lines)))
    return folder


def text_search(own_text, out, *more):
    words = [*TINY_TEXT_JAX, "--batch", "8", "--strength-step", "0.3", "--arch-lr", "0.02"]
    return ["nas_ptb.py", *words, "--data-dir", str(own_text), "--out", str(out), *more]


def numbers(file):
    with open(file) as opened:
        return [{k: float(v) for k, v in row.items() if k != "seconds"} for row in csv.DictReader(opened)]


@pytest.mark.commands
def test_a_search_that_is_killed_goes_on_bit_for_bit(start, own_text, tmp_path):
    finished(start(text_search(own_text, tmp_path / "whole")))
    words = text_search(own_text, tmp_path / "parts", "--checkpoint-minutes", "0")
    folder = tmp_path / "parts" / "checkpoint"
    for number in range(2):
        seen = set(folder.iterdir()) if folder.exists() else set()
        process = start([*words, *(["--resume"] if number else [])])
        while process.poll() is None and not (folder.exists() and len(set(folder.iterdir()) - seen) >= 1):
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    finished(start([*words, "--resume"]))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert (whole / "genotype.json").read_bytes() == (parts / "genotype.json").read_bytes()
    assert numbers(whole / "search.csv") == numbers(parts / "search.csv")


@pytest.mark.commands
def test_eight_devices_and_two_processes_search_as_one_does(start, own_text, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    hosts = [["--coordinator", f"localhost:{port}", "--processes", "2", "--process", str(i)] for i in (0, 1)]
    # more than 8 steps in an epoch, and small ones: large ones amplify the rounding of sums over a divided batch
    short = ["--bptt", "4", "--lr", "0.5"]
    # the clock of the first process alone decides when all of them write a checkpoint
    clocks = [["--checkpoint-minutes", minutes] for minutes in ("0", "1000")]
    runs = [start(text_search(own_text, tmp_path / "two", *words, *own, *short), 4) for words, own in zip(hosts, clocks)]
    printed = [finished(process) for process in runs]
    assert "written:" in printed[0] and "written:" not in printed[1]
    finished(start(text_search(own_text, tmp_path / "one", *short)))
    finished(start(text_search(own_text, tmp_path / "eight", *short), 8))
    for other in ("two", "eight"):
        for row, expected in zip(numbers(tmp_path / other / "search.csv"), numbers(tmp_path / "one" / "search.csv"), strict=True):
            assert row == pytest.approx(expected, rel=1e-3)
        names = [(tmp_path / run / "genotype.json").read_text() for run in (other, "one")]
        assert names[0] == names[1]
    settings = json.loads((tmp_path / "two" / "settings.json").read_text())
    assert settings["devices"] == 8 and settings["framework"] == "jax"


def test_methods_have_the_same_names_and_presets_in_both_libraries():
    from nas.methods import registry as of_torch

    assert of_torch.CIFAR.keys() - registry.CIFAR.keys() == {"pc_darts"}, "a baseline in PyTorch only"
    for ours, theirs in ((registry.CIFAR, of_torch.CIFAR), (registry.TEXT, of_torch.TEXT)):
        assert ours.keys() <= theirs.keys()
        assert all(ours[name].presets is theirs[name].presets for name in ours)
    assert darts.Darts.name == of_torch.darts.Darts.name
