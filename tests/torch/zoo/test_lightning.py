"""``ProximalCallback`` in the Trainer of Lightning."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from architectures import declare_operators_of_torchvision
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from trainer_cases import differing, examples, network, optimizer_of, zeros

from proxopt import GroupL2, Groups
from proxopt_torch import Budget, ProxAdam, StrengthPath, compact, load_compact, sparsity_report

# pytest-xdist imports the classes of warnings in its main process, where the libraries of others may not be importable.
pytestmark = [pytest.mark.zoo, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def pl():
    return library("lightning.pytorch")


def library(name):
    declare_operators_of_torchvision()
    return pytest.importorskip(name)


def callback(**arguments):
    from proxopt_torch.integrations.lightning import ProximalCallback

    return ProximalCallback(**arguments)


def module(pl, maker="AdamHAPG", strength=0.02, example=True, make=None):
    class Regression(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = network()
            self.example_input_array = examples(2)[0] if example else None
            self.seen, self.overflows = [], set()

        def see(self, kind):
            modes = [g["mode"] for o in self.trainer.optimizers for g in getattr(o, "param_groups", []) if "mode" in g]
            self.seen.append((kind, values(self), set(modes)))

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, batch_idx):
            self.see("train")
            loss = F.mse_loss(self(batch[0]), batch[1])
            self.log("loss", loss)
            return loss * torch.inf if self.global_step in self.overflows else loss

        def validation_step(self, batch, batch_idx):
            self.see("validate")
            self.log("error", F.mse_loss(self(batch[0]), batch[1]))

        def configure_optimizers(self):
            return make(self) if make else optimizer_of(maker, self.net, strength)

    return Regression()


def loader():
    return DataLoader(TensorDataset(*examples()), batch_size=8)


def trainer(pl, *callbacks, epochs=4, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return pl.Trainer(callbacks=list(callbacks), max_epochs=epochs, **{**quiet, "enable_checkpointing": False, **options})


def saving(pl, folder, **options):
    return pl.callbacks.ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, **options)


@pytest.mark.parametrize(("maker", "scaled"), [("AdamHAPG", True), ("ProxSGD tau", False), ("ProxAdam", False)])
def test_a_resumed_fit_is_the_uninterrupted_one(pl, maker, scaled, tmp_path):
    """With validations within an epoch, accumulated gradients, a budget, and updates that a gradient scaler skips."""
    options = {"accumulate_grad_batches": 2, "val_check_interval": 0.5, "enable_checkpointing": True, "epochs": 6}
    runs = []
    for checkpoint in (None, tmp_path / "epoch=1.ckpt"):
        model, own = module(pl, maker), callback(budget={"macs": 0.6}, compact=True)
        if scaled:
            scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=10)
            options["plugins"] = pl.plugins.MixedPrecision("16-mixed", "cpu", scaler=scaler)
            model.overflows = {3, 17}
        fit = trainer(pl, own, saving(pl, tmp_path), **options)
        fit.fit(model, loader(), loader(), ckpt_path=checkpoint)
        assert own.optimizer is fit.optimizers[0] and own.budget.steps == own.budget.record.step == 24
        states = model.state_dict(), own.optimizer.state_dict(), own.budget.state_dict(), own.compacted.model.state_dict()
        runs.append((states, own.report))
    assert differing(runs[0][0], runs[1][0]) == [] and runs[0][1] == runs[1][1]
    assert {int(state["step"]) for state in own.optimizer.state.values()} == {22 if scaled else 24}


def test_a_trainer_that_fits_once_more_makes_a_budget_for_the_updates_to_come(pl):
    own, model = callback(budget={"macs": 0.6}), module(pl)
    fit = trainer(pl, own, epochs=2)
    fit.fit(model, loader())
    first, updates = own.budget, fit.global_step
    assert first.steps == first.record.step == updates
    fit.fit_loop.max_epochs = 5
    fit.fit(model, loader())
    assert own.budget is not first and own.budget.steps == own.budget.record.step == fit.global_step - updates > 0


def test_checkpoints_hold_the_sparse_point_and_the_search_point(pl, tmp_path):
    """With weights only, as a whole, within an epoch, and after the fit; the module trains on at the search point."""

    class Watch(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            self.search = values(pl_module)
            self.copied = copy.deepcopy(pl_module).state_dict()
            with own.optimizer.at_prox_point():
                self.prox = values(pl_module)

    whole, parts = saving(pl, tmp_path / "whole"), saving(pl, tmp_path / "parts", every_n_train_steps=9)
    weights = saving(pl, tmp_path / "weights", save_weights_only=True, monitor="zero_share")
    own, watch, model = callback(), Watch(), module(pl, make=lambda m: optimizer_of("AdamHAPG", m.net, 0.02))
    fit = trainer(pl, own, watch, whole, weights, parts, epochs=5, enable_checkpointing=True)
    fit.fit(model, loader())
    fit.save_checkpoint(tmp_path / "after.ckpt")
    assert zeros(watch.prox) > 0 and differing(watch.prox, watch.search)
    assert differing(dict(watch.copied), watch.search) == []  # a copy has no optimizer
    for path in (tmp_path / "whole" / "epoch=4.ckpt", tmp_path / "weights" / "epoch=4.ckpt", tmp_path / "after.ckpt"):
        found = torch.load(path, weights_only=True)
        assert differing(dict(found["state_dict"]), watch.prox) == []
        if "weights" not in path.parts:
            (saved,) = found["optimizer_states"]
            points = {name: saved["state"][i]["search_point"] for name, i in numbers(model, saved).items()}
            assert differing(points, watch.search) == [] and {g["mode"] for g in saved["param_groups"]} == {"eval"}
    for path in (tmp_path / "parts").iterdir():
        found = torch.load(path, weights_only=True)
        (saved,) = found["optimizer_states"]
        points = {name: saved["state"][i]["point"] for name, i in numbers(model, saved).items()}
        assert differing(dict(found["state_dict"]), points) == []


def values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def numbers(model, saved):
    """The number of each parameter in the state_dict of an optimizer of the network of the module."""
    return {f"net.{name}": i for g in saved["param_groups"] for name, i in zip(g["param_names"], g["params"])}


@pytest.mark.parametrize("maker", ["AdamHAPG", "ProxAdam"])
def test_validations_see_the_sparse_point(pl, maker):
    model, own = module(pl, maker), callback()
    fit = trainer(pl, own, epochs=6, val_check_interval=0.5)
    fit.fit(model, loader(), loader())
    validated = [seen for kind, seen, _ in model.seen if kind == "validate"][-1]
    assert differing(validated, values(model)) == [] and 0 < zeros(validated) == own.report.zeros
    assert all(modes == {"eval" if kind == "validate" else "train"} for kind, _, modes in model.seen)
    assert float(fit.callback_metrics["zero_share"]) == pytest.approx(own.report.share)
    assert 0 < float(fit.callback_metrics["living_groups"]) < 1
    fit.validate(model, loader(), verbose=False)  # after the fit the module stays at the prox point
    assert differing(validated, model.seen[-1][1]) == []


def test_the_budget_is_met_and_the_compact_model_computes_the_same(tmp_path):
    """In the Trainer of the package ``pytorch_lightning``, whose callbacks have another base class."""
    either = library("pytorch_lightning")
    path = tmp_path / "new" / "small.pt"
    own = callback(budget={"parameters": 0.5, "tolerance": 0.05}, network="net", compact={"tolerance": 1e-5}, save_compact=path)
    model = module(either)
    fit = trainer(either, own, epochs=20)
    fit.fit(model, loader())
    assert own.budget.record.reached and own.budget.record.frozen and len(own.budget.log) == 160
    assert float(fit.logged_metrics["budget_share"]) == pytest.approx(own.budget.record.share)
    x, small = examples()[0], own.compacted.model
    assert own.compacted.parameters[1] <= 0.53 * own.compacted.parameters[0]
    assert torch.allclose(small(x), model(x), atol=1e-5) and type(small) is type(model.net)
    loaded = load_compact(network(), torch.load(path, weights_only=True))
    assert torch.equal(loaded(x), small(x))
    assert "proxopt" not in str(pickle.dumps(small)), "the compact model loads without this package"
    again = own.compacted.optimizer(own.optimizer)
    assert again.param_groups[0]["zeros_frozen"]


def test_a_function_makes_the_budget_or_a_strength_path(pl):
    strengths = []

    def path(optimizer, net, example_inputs, steps):
        assert type(net).__name__ == "Regression" and example_inputs.shape == (2, 8) and steps == 16
        return StrengthPath(optimizer, lambda update: strengths.append(update) or 0.001 * update)

    own = callback(budget=path)
    trainer(pl, own, epochs=2).fit(module(pl), loader())
    assert strengths[-1] == own.budget.epoch == 16 and own.optimizer.param_groups[0]["strength"] == 0.016
    own = callback(budget=lambda optimizer, net, example, steps: Budget(optimizer, net, None, sparsity=0.5, steps=steps))
    trainer(pl, own, epochs=1).fit(module(pl, example=False), loader())
    assert own.budget.record.step == 8 and own.report.zeros >= 0


def test_a_fit_that_an_error_ends_leaves_the_sparse_model(pl, tmp_path):
    """And the next fit, with the same callback, starts anew or from a checkpoint."""
    own, model = callback(budget={"macs": 0.5}), module(pl)
    step = model.training_step

    def fail(batch, batch_idx):
        if model.global_step == 30:
            raise RuntimeError("stop")
        return step(batch, batch_idx)

    model.training_step = fail
    with pytest.raises(RuntimeError, match="stop"):
        trainer(pl, own, saving(pl, tmp_path), epochs=5, enable_checkpointing=True).fit(model, loader())
    assert zeros(dict(model.named_parameters())) == sparsity_report(own.optimizer).zeros
    model.training_step = step
    trainer(pl, own, epochs=5).fit(model, loader(), ckpt_path=tmp_path / "epoch=2.ckpt")
    first = own.budget.state_dict()
    trainer(pl, callback(budget={"macs": 0.5}), epochs=5).fit(whole := module(pl), loader())
    assert first["calls"] == 40 and differing(dict(model.state_dict()), dict(whole.state_dict())) == []


def test_a_test_of_a_checkpoint_leaves_the_budget_alone(pl, tmp_path):
    own, model = callback(budget={"macs": 0.5}), module(pl)
    model.test_step = model.validation_step
    fit = trainer(pl, own, saving(pl, tmp_path), epochs=2, enable_checkpointing=True)
    fit.fit(model, loader())
    before = own.budget.state_dict()
    fit.test(model, loader(), ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False)
    assert own.budget.state_dict() == before
    saved = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)["state_dict"]
    assert differing(dict(model.state_dict()), dict(saved)) == []


def test_a_checkpoint_of_the_end_needs_no_more_training(pl, tmp_path):
    model, own = module(pl), callback(compact=True)
    trainer(pl, own, saving(pl, tmp_path), epochs=2, enable_checkpointing=True).fit(model, loader())
    again, second = module(pl), callback(compact=True)
    trainer(pl, second, epochs=2).fit(again, loader(), ckpt_path=tmp_path / "epoch=1.ckpt")
    assert differing(dict(model.state_dict()), dict(again.state_dict())) == []
    assert str(second.compacted) == str(own.compacted)


def test_the_search_for_a_learning_rate_leaves_no_trace(pl, tmp_path):
    class Rate(pl.callbacks.LearningRateFinder):
        pass

    states = []
    for callbacks in ([], [Rate(num_training_steps=5, update_attr=False)]):
        model = module(pl)
        model.lr = 0.01
        trainer(pl, callback(), *callbacks, default_root_dir=tmp_path).fit(model, loader(), loader())
        states.append(dict(model.state_dict()))
    assert differing(*states) == []


def plain(model):
    return torch.optim.Adam(model.parameters())


def without_penalty(model):
    return ProxAdam(model.parameters())


def two(model):
    columns = GroupL2(0.1, Groups.along(0))
    return [ProxAdam([model.net[i].weight], penalty=columns) for i in (0, 2)], []


@pytest.mark.parametrize(
    ("make", "arguments", "error", "text"),
    [
        (plain, {}, TypeError, "the optimizer of the trainer must be an optimizer of proxopt_torch, got Adam"),
        (without_penalty, {}, ValueError, "must have a penalty, got ProxAdam without any"),
        (two, {}, ValueError, r"must have one optimizer of proxopt_torch, got \['ProxAdam', 'ProxAdam'\]"),
        (None, {"budget": {"macs": 0.5}}, ValueError, "example_inputs must be given for macs, got None: set example_input_array"),
        (None, {"compact": True}, ValueError, "example_inputs must be given for compact, got None"),
        (None, {"network": "body"}, ValueError, r"network must name a submodule of Regression, e.g. of \['net'\], got"),
        (None, {"budget": lambda *_: None}, TypeError, "budget must return a Budget or a StrengthPath, got NoneType"),
        (None, {"budget": {"sparsity": 2}}, ValueError, "sparsity must"),
    ],
)
def test_what_does_not_fit_is_refused_when_the_fit_starts(pl, make, arguments, error, text):
    model = module(pl, make=make, example=False)
    if make is two:
        model.automatic_optimization = False
    with pytest.raises(error, match=text):
        trainer(pl, callback(**arguments)).fit(model, loader())
    assert model.seen == []


def test_an_unknown_number_of_updates_is_refused(pl):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return zip(*examples())

    with pytest.raises(ValueError, match="budget must hold 'steps', since the trainer does not know"):
        trainer(pl, callback(budget={"sparsity": 0.5})).fit(module(pl), DataLoader(Stream(), batch_size=8))
    own = callback(budget=lambda optimizer, net, example, steps: StrengthPath(optimizer, lambda update: 1 if steps else 0.1))
    trainer(pl, own, epochs=1).fit(module(pl), DataLoader(Stream(), batch_size=8))
    assert own.budget.epoch == 8 and own.budget.get_last_strength()[0] == 0.1


def test_a_checkpoint_with_a_budget_needs_one(pl, tmp_path):
    fit = trainer(pl, callback(budget={"sparsity": 0.5}), saving(pl, tmp_path), epochs=1, enable_checkpointing=True)
    fit.fit(module(pl), loader())
    with pytest.raises(ValueError, match="budget must be given to resume a training with one, got None"):
        trainer(pl, callback()).fit(module(pl), loader(), ckpt_path=tmp_path / "epoch=0.ckpt")


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"budget": 0.5}, TypeError, "budget must be a dict of arguments of Budget, a function"),
        ({"budget": {"mac": 0.5}}, TypeError, r"budget must hold arguments of Budget, .* got \['mac'\]"),
        ({"network": None}, TypeError, "network must be the name of a submodule"),
        ({"compact": "yes"}, TypeError, "compact must be True, False or a dict"),
        ({"compact": {"input": True}}, TypeError, r"compact must hold arguments of compact, .* got \['input'\]"),
        ({"save_compact": "small.pt"}, ValueError, "save_compact must be None where compact is False"),
        ({"save_compact": True, "compact": True}, TypeError, "save_compact must be the path of a file or None, got True"),
        ({"save_compact": "/", "compact": True}, ValueError, "save_compact must be the path of a file, got the folder '/'"),
    ],
)
def test_arguments_are_checked_at_once(pl, arguments, error, text):
    with pytest.raises(error, match=text):
        callback(**arguments)


def test_one_fit_with_another_optimizer_beside_it(pl):
    """Manual optimization of two optimizers, one of torch: the budget counts batches, as the trainer does."""
    other = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], 0.1)
    model = module(pl, make=lambda m: [optimizer_of("AdamHAPG", m.net), other])
    model.automatic_optimization = False

    def step(batch, batch_idx):
        for optimizer in model.optimizers():
            optimizer.zero_grad()
        model.manual_backward(F.mse_loss(model(batch[0]), batch[1]))
        for optimizer in model.optimizers():
            optimizer.step()

    model.training_step = step
    own = callback(budget={"macs": 0.5}, compact=True)
    trainer(pl, own, epochs=3).fit(model, loader(), loader())
    assert own.budget.record.step == own.budget.steps == 24
    x = examples()[0]
    assert torch.allclose(compact(model, x).model(x), own.compacted.model(x), atol=1e-6)
