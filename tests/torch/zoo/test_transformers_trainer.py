"""``ProximalTrainerCallback`` in the Trainer of transformers."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from architectures import declare_operators_of_torchvision
from torch import nn
from torch.utils.data import Dataset
from trainer_cases import differing, examples, network, optimizer_of, zeros

from proxopt import GroupL2, Groups
from proxopt_torch import ProxAdam, StrengthPath, groups, load_compact, sparsity_report

# pytest-xdist imports the classes of warnings in its main process, where the libraries of others may not be importable.
pytestmark = [pytest.mark.zoo, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def hf():
    declare_operators_of_torchvision()
    return pytest.importorskip("transformers")


def callback(**arguments):
    from proxopt_torch.integrations.transformers import ProximalTrainerCallback

    return ProximalTrainerCallback(**arguments)


class Regression(nn.Module):
    """With dropout, whose random state a resumed training restores."""

    def __init__(self):
        super().__init__()
        self.net, self.dropout = network(), nn.Dropout(0.1)

    def forward(self, x, labels=None):
        out = self.net(self.dropout(x))
        return {"out": out} if labels is None else {"loss": nn.functional.mse_loss(out, labels), "out": out}


class Rows(Dataset):
    def __init__(self, number=64):
        self.x, self.y = examples(number)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return {"x": self.x[i], "labels": self.y[i]}


def arguments(hf, folder, **options):
    given = {"num_train_epochs": 4, "save_strategy": "no", "logging_steps": 4, "use_cpu": True, "report_to": [], **options}
    return hf.TrainingArguments(folder, per_device_train_batch_size=8, disable_tqdm=True, learning_rate=0.01, **given)


def trainer(hf, folder, *callbacks, maker="AdamHAPG", model=None, optimizer=None, **options):
    model = Regression() if model is None else model
    optimizer = optimizer_of(maker, model.net) if optimizer is None else optimizer
    args = arguments(hf, folder, **options)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + 0.01 * step))
    return hf.Trainer(
        model, args, train_dataset=Rows(), eval_dataset=Rows(16), callbacks=list(callbacks), optimizers=(optimizer, schedule)
    )


def weights(path):
    from safetensors.torch import load_file

    return load_file(path / "model.safetensors")


@pytest.mark.parametrize(("maker", "bf16"), [("AdamHAPG", True), ("Proximal", False)])
def test_a_resumed_training_is_the_uninterrupted_one(hf, maker, bf16, tmp_path):
    """With shuffled data, dropout, accumulated gradients, evaluations, a budget, and mixed precision."""
    options = {"num_train_epochs": 6, "gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 3, "bf16": bf16}
    found = []
    for resume in (None, str(tmp_path / "checkpoint-10")):
        own = callback(budget={"macs": 0.6}, compact=True)
        training = trainer(hf, tmp_path, own, maker=maker, save_strategy="steps", save_steps=5, **options)
        training.train(resume_from_checkpoint=resume)
        assert own.budget.steps == own.budget.record.step == 24
        states = training.model.state_dict(), own.optimizer.state_dict(), own.budget.state_dict()
        # the mean of the first logging window after an interruption lacks the updates before it
        losses = [entry["loss"] for entry in training.state.log_history if "loss" in entry][3:]
        found.append((*states, own.compacted.model.state_dict(), losses))
    assert differing(*found) == []
    x, small = examples()[0], own.compacted.model  # in the precision of its parameters, without the wrapper of Accelerate
    assert torch.allclose(small(x)["out"], Regression.forward(training.model.eval(), x)["out"], atol=1e-5)
    assert "forward" not in vars(small) and "_original_forward" not in vars(small)


def test_checkpoints_hold_the_sparse_point(hf, tmp_path):
    own = callback()
    seen = []

    class Watch(hf.TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            if state.global_step == 27:
                with own.optimizer.at_prox_point():
                    seen.append({k: v.clone() for k, v in model.state_dict().items()})

    class Held(Regression):
        def forward(self, x, labels=None):
            self.training or seen.append({k: v.detach().clone() for k, v in self.named_parameters()})
            return super().forward(x, labels)

    training = trainer(hf, tmp_path, own, Watch(), model=Held(), save_strategy="steps", save_steps=9, save_only_model=True)
    training.train()
    assert differing(weights(tmp_path / "checkpoint-27"), seen[0]) == [] and zeros(seen[0]) > 0
    training.save_model(tmp_path / "after")
    assert differing(weights(tmp_path / "after"), dict(training.model.state_dict())) == []
    training.evaluate()
    assert differing(seen[-1], dict(training.model.state_dict())) == [] and zeros(seen[-1]) == own.report.zeros


@pytest.mark.parametrize("maker", ["AdamHAPG", "ProxAdam"])
def test_the_best_model_stays_until_the_end(hf, maker, tmp_path):
    """And an evaluation after the training is one of this model, not of the last update."""
    own, better = callback(compact=True), iter([3.0, 1.0, 2.0])
    options = {"eval_strategy": "steps", "eval_steps": 10, "save_strategy": "steps", "save_steps": 10}
    training = trainer(hf, tmp_path, own, maker=maker, load_best_model_at_end=True, **options)
    training.compute_metrics = lambda _: {"score": next(better, 9.0)}
    training.args.metric_for_best_model, training.args.greater_is_better = "score", False
    training.train()
    best = weights(tmp_path / "checkpoint-20")
    assert training.state.best_model_checkpoint.endswith("checkpoint-20")
    training.evaluate()
    assert differing(dict(training.model.state_dict()), best) == [] and own.report.zeros == zeros(best)
    x = examples()[0]
    assert torch.allclose(own.compacted.model(x)["out"], training.model.eval()(x)["out"], atol=1e-6)


def test_a_language_model_meets_its_budget_and_becomes_smaller(hf, tmp_path):
    """BERT with tied embeddings, through ``save_pretrained``, with reports in the log of each reporter."""
    torch.manual_seed(0)
    config = hf.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, max_position_embeddings=8
    )
    model = hf.BertForMaskedLM(config)
    tokens = torch.randint(0, 30, (32, 8))
    data = [{"input_ids": t, "attention_mask": torch.ones_like(t), "labels": t} for t in tokens]
    example = {"input_ids": tokens[:2], "attention_mask": torch.ones_like(tokens[:2])}
    optimizer = ProxAdam(groups.coupled(model, example, GroupL2(1e-3), include="hidden units"), lr=0.01)
    budget = {"macs": 0.5, "tolerance": 0.05, "modules": "bert.encoder.layer.0.intermediate*"}
    own = callback(budget=budget, compact=True, save_compact=tmp_path / "s.pt")
    args = arguments(hf, tmp_path, num_train_epochs=20, logging_steps=10)
    logged = []

    class Reporter(hf.TrainerCallback):  # as those of TensorBoard or W&B, which come before the callbacks of users
        def on_log(self, args, state, control, logs, **kwargs):
            logged.append((state.global_step, set(logs)))

    training = hf.Trainer(model, args, train_dataset=data, optimizers=(optimizer, None), callbacks=[Reporter(), own])
    own.attach(training)
    own.attach(training)
    training.train()
    assert own.budget.record.frozen and own.budget.record.reached and len(own.budget.log) == 80
    names = {"zero_share", "living_groups", "budget_share", "budget_wanted", "budget_strength"}
    assert [step for step, found in logged if names <= found] == [*range(10, 81, 10), 80]
    last = training.state.log_history[-1]
    assert last["living_groups"] == own.budget.record.share == last["budget_share"]
    small, expected = own.compacted.model.eval(), model.eval()(**example).logits.detach()
    assert torch.allclose(small(**example).logits, expected, atol=1e-4 * float(expected.abs().max()))
    loaded = load_compact(hf.BertForMaskedLM(config), torch.load(tmp_path / "s.pt", weights_only=True)).eval()
    assert torch.equal(loaded(**example).logits, small(**example).logits)
    training.save_model(tmp_path / "after")
    again = hf.BertForMaskedLM.from_pretrained(tmp_path / "after")
    assert differing(dict(again.state_dict()), dict(model.state_dict())) == []


def test_a_second_training_starts_the_budget_anew(hf, tmp_path):
    own = callback(budget={"macs": 0.6})
    training = trainer(hf, tmp_path, own, num_train_epochs=1)
    training.train()
    first = own.budget
    training.train()
    assert own.budget is not first and own.budget.record.step == 8
    assert own.budget.state_dict()["own"] == first.state_dict()["own"] == {0: pytest.approx(0.02)}


def test_a_strength_path_and_strengths_as_arrays_are_resumed(hf, tmp_path):
    """The state goes through JSON: keys that are numbers, and tensors."""

    def columns(model):
        penalty = GroupL2(torch.linspace(0.01, 0.02, 8), Groups.along(0))
        return ProxAdam([{"params": [model.net[0].weight], "penalty": penalty}], lr=0.01)

    for budget in ({"living_groups": 0.5}, lambda optimizer, *_: StrengthPath(optimizer, lambda update: 1e-4 * update)):
        found = []
        for resume in (None, str(tmp_path / "checkpoint-6")):
            own, model = callback(budget=budget), Regression()
            training = trainer(hf, tmp_path, own, model=model, optimizer=columns(model), save_strategy="steps", save_steps=6)
            training.train(resume_from_checkpoint=resume)
            found.append((own.budget.state_dict(), own.optimizer.state_dict(), model.state_dict()))
        assert differing(*found) == []
        shutil.rmtree(tmp_path)


def test_a_checkpoint_of_a_training_without_the_callback_is_continued(hf, tmp_path):
    trainer(hf, tmp_path, num_train_epochs=2, save_strategy="epoch").train()
    own = callback()
    training = trainer(hf, tmp_path, own, num_train_epochs=3, save_strategy="epoch")
    training.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    stored = json.loads((tmp_path / "checkpoint-24" / "trainer_state.json").read_text(encoding="utf-8"))
    assert stored["stateful_callbacks"]["ProximalTrainerCallback"] == {"args": {}, "attributes": {"saved": {}}}
    assert own.report == sparsity_report(own.optimizer)
    own = callback(budget={"living_groups": 0.5})
    trainer(hf, tmp_path, own, num_train_epochs=3).train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert own.budget.steps == own.budget.record.step == 16, "a new budget is for the updates that are left"


@pytest.mark.parametrize(
    "stored", [[1], {"attributes": {}}, {"attributes": {"saved": 3}}, {"attributes": {"saved": {"budget": 1}}}]
)
def test_a_damaged_state_in_a_checkpoint_is_refused(hf, tmp_path, stored):
    trainer(hf, tmp_path, callback(budget={"living_groups": 0.5}), num_train_epochs=1, save_strategy="epoch").train()
    file = tmp_path / "checkpoint-8" / "trainer_state.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["stateful_callbacks"]["ProximalTrainerCallback"] = stored
    file.write_text(json.dumps(content), encoding="utf-8")
    training = trainer(hf, tmp_path, callback(budget={"living_groups": 0.5}), num_train_epochs=2)
    with pytest.raises(
        ValueError, match=r"trainer_state.json must hold the state of ProximalTrainerCallback as it was saved, got "
    ):
        training.train(resume_from_checkpoint=str(file.parent))


def test_after_an_interruption_the_optimizer_in_eval_mode_ends_what_was_changed(hf, tmp_path):
    class Stop(hf.TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 5:
                raise KeyboardInterrupt

    own = callback()
    training = trainer(hf, tmp_path, own, Stop())
    with pytest.raises(KeyboardInterrupt):
        training.train()
    own.optimizer.eval()
    with torch.no_grad():
        training.model.net[0].weight.add_(1)
    assert all(torch.equal(value, training.model.state_dict()[name]) for name, value in training.model.named_parameters())


def restoring(hf, folder, own):
    trainer(hf, folder, own, num_train_epochs=1, restore_callback_states_from_checkpoint=True).train()


def plain(hf, folder, own):
    model = Regression()
    trainer(hf, folder, own, model=model, optimizer=torch.optim.Adam(model.parameters())).train()


def without_penalty(hf, folder, own):
    model = Regression()
    trainer(hf, folder, own, model=model, optimizer=ProxAdam(model.parameters())).train()


def missing_budget(hf, folder, own):
    first = trainer(hf, folder, callback(budget={"sparsity": 0.5}), save_strategy="epoch", num_train_epochs=1)
    first.train()
    trainer(hf, folder, own).train(resume_from_checkpoint=True)


def as_usual(hf, folder, own):
    trainer(hf, folder, own).train()


def unwrapped_rows(hf, folder, own):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from Rows()

    training = trainer(hf, folder, own, max_steps=4)
    training.train_dataset = Stream()
    training.train()


@pytest.mark.parametrize(
    ("case", "arguments", "error", "text"),
    [
        (restoring, {}, ValueError, "restore_callback_states_from_checkpoint must be False with ProximalTrainerCallback"),
        (plain, {}, TypeError, "the optimizer of the trainer must be an optimizer of proxopt_torch, got Adam"),
        (without_penalty, {}, ValueError, "must have a penalty, got ProxAdam without any"),
        (missing_budget, {}, ValueError, "budget must be given to resume a training with one, got None"),
        (as_usual, {"network": "body"}, ValueError, r"network must name a submodule of Regression, e.g. of \['net', 'dropout'\]"),
        (as_usual, {"network": "net", "compact": True}, ValueError, "example_inputs must be given for compact, got None"),
        (unwrapped_rows, {"budget": {"macs": 0.5}}, ValueError, "example_inputs must be given for macs, got None"),
    ],
)
def test_what_does_not_fit_is_refused_when_the_training_starts(hf, tmp_path, case, arguments, error, text):
    with pytest.raises(error, match=text):
        case(hf, tmp_path, callback(**arguments))
