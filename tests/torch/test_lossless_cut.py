"""The benchmark of accuracy before and after a cut, on small made-up images."""

import re

import gpu
import lossless_cut
import pytest
import torch
from lossless_cut import DENSE, Training, best_values, finals, main, read_rows, register, summary, text_table, trials
from lossless_cut_methods import METHODS, PRESETS, Data, Setting, optimizer_for, phase, run, size
from nas.engine.log import write_csv
from pruning.networks import ResNet

TINY = {"width": 4, "pixels": 8, "images": 96, "held_out": 32, "batch": 16, "epochs": 6, "tuning_epochs": 1}


@pytest.fixture
def setting(images):
    return Setting(images, **TINY)


def test_the_cut_of_ours_changes_nothing(setting):
    (row,) = run("prox_sgd", 0.7, (0.6,), setting, 0, "held out")["rows"]
    assert 0 < row["macs"] < 1 and 0 < row["parameters"] < 1
    assert row["gap"] < 1e-5 and row["before"] == row["after"]


PRUNERS = [("magnitude", "in all layers"), ("magnitude", "in each layer"), ("torch_pruning", 1e-3)]


@pytest.mark.parametrize(("name", "value"), PRUNERS)
def test_a_pruner_cuts_one_training_to_several_budgets(setting, name, value):
    pytest.importorskip("torch_pruning")
    rows = run(name, value, (DENSE, 0.6), setting, 0, "test")["rows"]
    assert [row["budget"] for row in rows] == [DENSE, 0.6]
    assert rows[0]["macs"] == 1 and rows[0]["gap"] == 0 and rows[0]["before"] == rows[0]["after"]
    assert 0.2 < rows[1]["macs"] <= 0.6 and rows[0]["before"] == rows[1]["before"]


def test_prox_sgd_without_a_penalty_takes_the_steps_of_sgd(setting):
    data, weights = Data(setting), []
    for name in ("SGD", "ProxSGD"):
        torch.manual_seed(0)
        net = ResNet(1, 4)
        phase(net, optimizer_for(name, net.parameters(), setting), data.batches(setting, 0, 0), 1, setting)
        weights.append(net.classifier.weight.detach())
    assert torch.allclose(*weights, rtol=1e-4, atol=1e-6)


def test_multiply_adds_of_a_known_network():
    macs, parameters = size(ResNet(3, 16), torch.zeros(2, 3, 32, 32))
    shortcuts = 16 * 32 * 16**2 + 32 * 64 * 8**2  # 1x1 convolutions
    assert parameters == 269_722 + 16 * 32 + 32 * 64 + 2 * (32 + 64), "269 722 is that with shortcuts without parameters"
    assert macs == 40_551_040 + shortcuts


def test_every_method_runs_with_its_best_trial_value_and_every_seed():
    assert [t.value for t in trials(["prox_adam_sgl"], 0.25)] == [0.5, 0.7, 0.9], "that of the group lasso"
    trial = {"seed": lossless_cut.TRIAL_SEED, "budget": 0.25}
    rows = [{"method": "prox_adam", "value": v, "trained": a, **trial} for v, a in ((0.5, 40.0), (0.7, 42.0), (0.9, 41.0))]
    rows += [{"method": "prox_adam", "value": 0.9, "trained": 99.0, "seed": 0, "budget": 0.25}]
    assert best_values(rows, 0.25) == {"prox_adam": 0.7}
    best = {name: method.values[0] for name, method in METHODS.items() if method.values}
    found = finals(["magnitude", "torch_pruning", "prox_adam", "prox_adam_sgl"], [0.5, 0.25], [0, 1], best)
    assert [t.seed for t in found] == [0] * 6 + [1] * 6
    assert [t.budgets for t in found[:6]] == [(1.0, 0.5, 0.25), (0.5, 0.25), (0.5,), (0.25,), (0.5,), (0.25,)]
    assert len({t.key for t in found}) == len(found) and not any(t.trial for t in found)
    assert Training("magnitude", "in all layers", (0.25,), 1000).key == "magnitude/in_all_layers-0.25-seed1000"


ROWS = [
    {"method": name, "title": METHODS[name].title, "value": 0.5, "seed": seed, "budget": budget, "macs": budget - 0.01}
    | {"parameters": 0.4, "before": 50.0 + seed, "after": 50.0, "trained": 51.0 + seed, "gap": 1e-7, "cpu_seconds": 9.0}
    for name, budget in (("magnitude", DENSE), ("prox_sgd", 0.5))
    for seed in (0, 1, 2, 1000)
]


def test_the_summary_is_over_the_seeds_without_the_trial(tmp_path):
    write_csv(tmp_path / "runs.csv", ROWS)
    entries = summary(read_rows(tmp_path / "runs.csv"))
    assert [(e["title"], e["budget"], e["seeds"]) for e in entries] == [
        ("dense network, SGD", 1, 3),
        ("ProxSGD, group lasso", 0.5, 3),
    ]
    assert (entries[1]["before"], entries[1]["before_sd"], entries[1]["after_sd"]) == (51, 1, 0)
    (pattern, form), *_ = gpu.COMPARED_CUTS
    lines = [re.match(pattern, line) for line in text_table(entries).split("\n")]
    assert [m is None for m in lines] == [True, True, False, False]
    assert form.format(*lines[3].groups()) == "ProxSGD, group lasso at 0.490: 51.0 %, cut 50.0 %, trained 52.0 %"
    assert main(["--only-summary", "--out", str(tmp_path)]) == 0 and (tmp_path / "lossless_cut.png").stat().st_size > 10_000


def test_results_of_a_value_that_the_trials_no_longer_choose_are_not_in_the_summary():
    trial = {"method": "prox_sgd", "value": 0.7, "seed": lossless_cut.TRIAL_SEED, "trained": 2000.0}
    rows = [*ROWS, next(r for r in ROWS if r["method"] == "prox_sgd") | trial]
    rows += [r | {"value": 0.7, "trained": 60.0} for r in ROWS if r["method"] == "prox_sgd" and r["seed"] == 0]
    (entry,) = (e for e in summary(rows) if e["method"] == "prox_sgd")
    assert (entry["value"], entry["seeds"], entry["trained"]) == (0.7, 1, 60)


def test_what_does_not_fit_is_refused(tmp_path, setting, capsys):
    (tmp_path / "runs.csv").write_text("method,title,value,seed,budget\nprox_sgd,x,0.5,zero,0.5\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"runs\.csv, line 2 is no row of this benchmark"):
        read_rows(tmp_path / "runs.csv")
    register(PRESETS["small"], tmp_path)
    with pytest.raises(ValueError, match=r"has results of other settings .*width is 16, not 4"):
        register(setting, tmp_path)
    with pytest.raises(ValueError, match="epochs must be > 0, got 0"):
        Setting(epochs=0)
    with pytest.raises(ValueError, match=r"images \+ held_out must be <= 160, got 50000 \+ 2000"):
        Data(Setting(setting.data_dir, images=50_000))
    for words, message in (
        (["--budgets", "1.5"], r"--budgets must be different shares in (0, 1), got 1.5"),
        (["--seeds", "0", "1000"], "--seeds must be different numbers >= 0 but 1000, got 0 1000"),
        (["--jobs", "0"], "--jobs must be >= 1, got 0"),
    ):
        with pytest.raises(SystemExit):
            main(words)
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit, match="must have finished trainings, got none"):
        main(["--only-summary", "--out", str(tmp_path / "none")])
