"""What a run prints: help, header, expected time, progress."""

import re
from dataclasses import fields
from types import SimpleNamespace

import nas_cifar10
import nas_ptb
import prune_convnet
import prune_operations
import pytest
import train_cifar10
import train_ptb
from nas.engine import console
from nas.engine.command_line import field_texts
from nas.engine.loop import Loop
from nas.methods import registry
from nas.space import amounts
from nas_cases import TINY, TINY_TEXT

CPU, GPU = (console.Machine("torch 2", name, name == "GPU", lambda: 3 * 2**30) for name in ("CPU", "GPU"))


def help_of(main, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*words, "--help"])
    assert stopped.value.code in (0, None)
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("main", "words", "listed"),
    [
        (nas_cifar10.main, [], "--framework --coordinator --processes --process --method --one-stage --preset --l1-ratio"),
        (nas_cifar10.main, "--method ista --one-stage".split(), "--method --tolerance"),
        (nas_ptb.main, ["--method", "darts"], "--framework --method --preset --arch-beta1"),
        (train_cifar10.main, [], "--imagenet --preset --genotype"),
        (train_ptb.main, [], "--preset --genotype"),
        (prune_operations.main, [], "--preset --mu"),
        (prune_convnet.main, [], "--evaluate --preset --macs --blocks"),
    ],
)
def test_help_lists_the_options_that_select_settings_among_the_others(main, words, listed, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    text = help_of(main, words, capsys)
    for name in listed.split():
        assert re.search(rf"^\W*{name}\b", text, flags=re.M), name
    assert "The options below, with their defaults, are those of `" in text and "--preset small --help" in text.replace("\n", " ")
    assert "small: " in text, "the settings that a preset changes"


def test_help_shows_the_defaults_of_the_preset(capsys):
    defaults = [help_of(nas_cifar10.main, ["--preset", name], capsys) for name in ("paper", "small")]
    assert [re.search(r"--epochs INT.*?\(default:\s+(\d+)\)", text, flags=re.S)[1] for text in defaults] == ["50", "10"]


def test_every_setting_has_a_help_text():
    tables = [registry.CIFAR, registry.ONE_STAGE, registry.TEXT]
    presets = [method.presets for table in tables for method in table.values()]
    presets += [train_cifar10.CIFAR_TRAIN_PRESETS, train_cifar10.IMAGENET_TRAIN_PRESETS, train_ptb.TEXT_TRAIN_PRESETS]
    for named in (*presets, prune_operations.PRESETS):
        texts = field_texts(type(named["paper"]))
        assert not {f.name for f in fields(named["paper"])} - {*texts}
        assert all(len(text) > 15 for text in texts.values())


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("script", ["images", "text"])
def test_a_header_says_what_will_be_computed(script, images, corpus, tmp_path, capsys):
    main, words, place = {"images": (nas_cifar10.main, TINY, images), "text": (nas_ptb.main, TINY_TEXT, corpus)}[script]
    row = main([*words, "--data-dir", str(place), "--method", "darts", "--epochs", "1", "--seeds", "3", "--out", str(tmp_path)])
    header = capsys.readouterr().err
    for part in (
        "search   darts, ",
        "seed 3",
        "device   torch ",
        " 1 thread\n",
        " parameters",
        "steps    1 epoch of ",
        "batch size",
    ):
        assert part in header, header
    assert {"images": "16 images to train on, 16 to validate", "text": "300 words to train on"}[script] in header
    assert row


def test_the_first_steps_give_the_expected_time_and_memory():
    steps = console.FirstSteps(skip=1)
    assert [steps.add(seconds) for seconds in (50.0, 1.0, 0.9, 1.1)] == [False, False, False, True]
    assert steps.expectation(720, CPU) == "expected 12 min for 720 steps at 1 s each, plus evaluations, 3 GB of memory so far"
    long = steps.expectation(100_000, CPU)
    assert "expected 28 h for 100 000 steps" in long and "--preset small" in long
    assert "--preset small" not in steps.expectation(100_000, GPU) and "device memory" in steps.expectation(1, GPU)
    quick = console.FirstSteps()
    assert [quick.add(0.01) for _ in range(console.MOST)].index(True) == console.MOST - 1
    slow = console.FirstSteps()
    assert slow.add(30.0), "a step of half a minute is enough"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.035, "35 ms"), (1.234, "1.2 s"), (80, "80 s"), (840, "14 min"), (12_600, "3.5 h"), (219_600, "61 h (2.5 days)")],
)
def test_durations_have_the_unit_that_suits_them(seconds, text):
    assert amounts.duration(seconds) == text


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"valid_accuracy": 0.5, "paths_normal": 30, "paths_reduce": 12, "zeros_normal": 7}, "valid 50.00 %, 42 paths left"),
        (
            {"valid_accuracy": 0.5, "paths_normal": 8, "entropy_normal": 1.5, "entropy_reduce": 2.0},
            "valid 50.00 %, edge entropy 1.750",
        ),
        ({"valid_accuracy": 0.5, "paths_normal": 8, "moved": 0.012}, "valid 50.00 %, codes moved 0.012"),
        ({"valid_accuracy": 0.5, "paths_normal": 8, "moved": 0.01, "frozen_nodes": 3}, "valid 50.00 %, 3 of 8 nodes frozen"),
        ({"valid_accuracy": 0.5}, "valid 50.00 %"),
        ({"valid_perplexity": 123.4, "paths_recurrent": 20}, "valid perplexity 123.4, 20 paths left"),
        (
            {"valid_accuracy": 0.5, "dead_operations": 4, "pruned_share": 0.25},
            "valid 50.00 %, 4 operations zero, 25.0 % of the weights",
        ),
    ],
)
def test_progress_shows_how_far_the_architecture_has_come(row, text):
    assert console.progress(row) == text


def test_a_resumed_run_says_where_it_continues():
    class Resumed(Loop):
        __len__ = lambda self: 7
        epochs = lambda self: 5

    run = Resumed(SimpleNamespace(epochs=3), 0, "out", SimpleNamespace(world=2))
    run.epoch, run.step = 2, 5
    text = console.header(run)
    assert "note" not in text
    assert "at most 5 epochs of 7 steps, continued from epoch 3, step 6" in text and "2 processes" in text
    assert "data" not in text and "network" not in text


@pytest.mark.parametrize("method", ["sparse_supernet", "darts", "ista", "gsparsity"])
def test_a_long_run_on_a_cpu_is_announced_before_its_first_step(method):
    texts = {}
    for name, settings in registry.CIFAR[method].presets.items():

        class Search(Loop):
            images = (settings.images or 50_000) // (1 if method == "gsparsity" else 2)
            __len__ = lambda self: self.images // self.settings.batch

        texts[name] = console.header(Search(settings, 0, "out", SimpleNamespace(world=1)))
    assert "no accelerator is in use" in texts["paper"] and "--preset small" in texts["paper"]
    assert "no accelerator" not in texts["small"]
