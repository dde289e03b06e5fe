"""Sharded parameters (DTensor): two ranks compute together what one process computes, or raise the same error on both."""

from __future__ import annotations

import copy
import faulthandler
import io
import logging
import os
import time
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from torch import distributed, nn
from torch_cases import Foreign

from proxopt import L1, ElasticNet, GroupL2, Groups, Nested, NonNegative, SparseGroupLasso, Sphere
from proxopt_torch import HAPG, AdamHAPG, ProxAdam, Proximal, ProxSGD, groups, max_strength, sparsity_report

WORLD = 2
STEPS = 3
HANGS_AFTER = timedelta(seconds=30)
MAKERS = {
    "ProxSGD": lambda p, **k: ProxSGD(p, lr=torch.tensor(0.1, dtype=torch.float64), **k),
    "HAPG": lambda p, **k: HAPG(p, lr=0.05, **k),
    "ProxAdam": lambda p, **k: ProxAdam(p, lr=0.02, **k),
    "AdamHAPG": lambda p, **k: AdamHAPG(p, lr=0.02, foreach=True, **k),
    "Proximal": lambda p, **k: Proximal(torch.optim.Adam(p, lr=0.02), **k),
}
COLUMNS, ROWS = Groups.along(0), Groups.along(1)
SUPPORTED = {  # on every sharding that splits evenly
    "none": None,
    "l1": L1(1.0),
    "elastic": ElasticNet(1.0, 0.5),
    "foreign": Foreign(),
    "columns": GroupL2(0.5, COLUMNS, metric="support"),
    "rows": SparseGroupLasso(0.5, groups=ROWS, metric="support"),
    "whole": SparseGroupLasso(0.5, metric="exact"),
    "nested": Nested(L1(0.2), GroupL2(0.2, ROWS, metric="support"), GroupL2(0.2, metric="support")),
    "nonnegative": NonNegative(SparseGroupLasso(0.2, groups=ROWS, metric="support")),
}
PROJECTIONS = {"l1": torch.relu, "rows": Sphere(ROWS), "whole": Sphere(radius=2.0), "nonnegative": Sphere(COLUMNS)}
LABELS = GroupL2(0.5, Groups.labels([0, 1, 0, 1]))
# optimizer, penalty, shape, sharded axis, joint, a part of the message
REFUSED = {
    "joint": ("HAPG", GroupL2(0.5), (4, 6), 0, True, "must not be in a joint group: take joint=False"),
    "joint l1": ("Proximal", L1(0.5), (4, 6), 0, True, "must not be in a joint group"),
    "labels": ("ProxSGD", LABELS, (4, 6), 1, False, "must not have a penalty with Groups.labels"),
    "labels, replicated": ("AdamHAPG", LABELS, (4, 6), None, False, "must not have a penalty with Groups.labels"),
    "median": ("AdamHAPG", GroupL2(0.5, COLUMNS), (4, 6), 0, False, "take metric='exact' or 'support', shard another axis"),
    "median, whole": ("AdamHAPG", GroupL2(0.5), (4, 6), 1, False, "along the sharded axis 1 with the metric 'median'"),
    "median, by name": ("ProxAdam", GroupL2(0.5, ROWS, metric="median"), (4, 6), 1, False, "the sharded axis 1 with the metric"),
    "median, nested": (
        "AdamHAPG",
        Nested(L1(0.1), GroupL2(0.5, ROWS, metric="median"), GroupL2(0.5, metric="median")),
        (4, 6),
        0,
        False,
        "with the metric 'median', got Groups.whole()",
    ),
    "uneven": ("ProxAdam", GroupL2(0.5, COLUMNS), (5, 6), 0, False, "the unevenly sharded axis 0 (5 over 2 ranks)"),
    "uneven, whole": ("HAPG", GroupL2(0.5), (4, 3), 1, False, "the unevenly sharded axis 1 (3 over 2 ranks), got Groups.whole()"),
    "empty shard": ("HAPG", GroupL2(0.5, COLUMNS), (1, 6), 0, False, "the unevenly sharded axis 0 (1 over 2 ranks)"),
    "empty shard beside": ("ProxAdam", GroupL2(0.5, ROWS), (1, 6), 0, False, "must have entries on every rank"),
    "strengths": ("ProxAdam", L1(torch.ones(4, 6)), (4, 6), 0, False, "must have a number as strength, got an array"),
    "weights": (
        "HAPG",
        GroupL2(0.5, COLUMNS, weights=[1.0] * 6),
        (4, 6),
        0,
        False,
        "must have a number as weights, got an array",
    ),
    "weights of a level": ("HAPG", Nested(GroupL2(0.5, ROWS, weights=[1.0] * 4)), (4, 6), 0, False, "a number as weights"),
}


class Rank:
    """The checks of one process. Both run the same methods in the same order; the tests compare what they return."""

    def __init__(self, mesh):
        self.mesh = mesh
        self.number = distributed.get_rank()

    def shard(self, x, axis):
        from torch.distributed.tensor import Replicate, Shard, distribute_tensor

        return distribute_tensor(x.clone(), self.mesh, [Replicate() if axis is None else Shard(axis)])

    def check_agreement(self):
        """Every optimizer on every supported pair of a penalty and a sharding, beside the run without shards."""
        cases = [(name, (4, 6), axis) for name in SUPPORTED for axis in (0, 1)]
        cases += [("whole", (4, 6), None), ("rows", (5, 6), 0), ("foreign", (5, 6), 0), ("l1", (1,), 0), ("none", (), None)]
        return {name: self.agrees(make, cases[i % 2 :: 2]) for i, (name, make) in enumerate(MAKERS.items())}

    def agrees(self, make, cases):
        optimizers = []
        for sharded in (False, True):
            generator = torch.Generator().manual_seed(0)
            shard = self.shard if sharded else lambda x, axis: x.clone()
            param_groups, slopes = [], []
            for name, shape, axis in cases:
                start, scale, target = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
                param_groups.append(
                    {
                        "params": [nn.Parameter(shard(start, axis))],
                        "penalty": SUPPORTED[name],
                        "projection": PROJECTIONS.get(name),
                    }
                )
                slopes.append((shard(scale.abs() + 0.1, axis), shard(target, axis)))
            optimizer = make(param_groups)
            for _ in range(STEPS):
                for group, (scale, target) in zip(optimizer.param_groups, slopes):
                    p = group["params"][0]
                    p.grad = scale * (p.detach() - target)
                optimizer.step()
            optimizers.append(optimizer)
        return compare(*optimizers, cases)

    def check_refusals(self):
        """The messages of the constructor, and of the first step where parameters are sharded after the construction."""
        found = {}
        for name, (maker, penalty, shape, axis, joint, _) in REFUSED.items():
            p = nn.Parameter(self.shard(torch.ones(shape), axis))
            early = message(MAKERS[maker], [{"params": [("w", p)], "penalty": penalty, "joint": joint}])
            free, plain = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(shape))
            optimizer = MAKERS[maker]([{"params": [free]}, {"params": [plain], "penalty": penalty, "joint": joint}])
            optimizer.param_groups[1]["params"] = [p]
            free.grad, p.grad = torch.ones(2), torch.ones_like(p)
            late = message(optimizer.step)
            found[name] = (early, late, bool((free == 1).all()) and bool((p.full_tensor() == 1).all()))
        return found

    def check_projections(self):
        """The messages for projections that are refused."""
        labels, uneven = Sphere(Groups.labels([0, 1, 0, 1])), (5, 6)
        cases = [((4, 6), labels, False), ((4, 6), Sphere(), True), (uneven, Sphere(COLUMNS), False)]
        return [
            message(HAPG, [{"params": [self.shard(torch.ones(shape), 0)], "projection": projection, "joint": joint}])
            for shape, projection, joint in cases
        ]

    def check_gradients(self):
        """One rank has a NaN, in its shard or in a parameter that is not sharded; a replicated and a partial gradient."""
        from torch.distributed.tensor import DTensor, Partial

        found, x = {}, torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(4, 6)
        for bad in ("sharded", "plain"):
            p, q = nn.Parameter(self.shard(x, 0)), nn.Parameter(torch.ones(3))
            optimizer = ProxAdam([{"params": [("q", q)]}, {"params": [("p", p)], "penalty": L1(0.1)}])
            p.grad, q.grad = self.shard(x, 0), torch.ones(3)
            if self.number == 1:
                (p.grad.to_local()[0] if bad == "sharded" else q.grad).fill_(torch.nan if bad == "sharded" else torch.inf)
            found[bad] = (message(optimizer.step), torch.equal(p.full_tensor(), x), bool((q == 1).all()))
        points = []
        for spread in ("none", "replicated", "partial"):
            p = nn.Parameter(x.clone() if spread == "none" else self.shard(x, 0))
            optimizer = ProxAdam([p], lr=0.1, penalty=SparseGroupLasso(0.5, groups=ROWS))
            part = DTensor.from_local(x * (0.25 if self.number else 0.75), self.mesh, [Partial()])
            p.grad = {"none": x.clone(), "replicated": self.shard(x, None), "partial": part}[spread]
            optimizer.step()
            points.append(p.detach() if spread == "none" else p.detach().full_tensor())
        found["spread"] = [float((points[0] - other).abs().max()) for other in points[1:]]
        return found

    def check_fsdp(self):
        """Training a sharded model, with the checkpoints of torch.distributed in between, beside the model that is whole."""
        from torch.distributed.checkpoint import state_dict as checkpoint

        def options(full):
            return checkpoint.StateDictOptions(full_state_dict=full, broadcast_from_rank0=full)

        def save(model, optimizer, full):
            saved = checkpoint.get_state_dict(model, optimizer, options=options(full))
            return copy.deepcopy(saved) if self.number == 0 or not full else ({}, {})

        def load(saved, make, full):
            model = self.fsdp(network())
            optimizer = make(model)
            checkpoint.set_model_state_dict(model, saved[0], options=options(full))
            checkpoint.set_optimizer_state_dict(model, optimizer, saved[1], options=options(full))
            return model, optimizer

        makers = {
            "ProxAdam": lambda m: ProxAdam(groups.output_channels(m, SparseGroupLasso(0.3)), lr=0.05),
            "AdamHAPG": lambda m: AdamHAPG(groups.output_channels(m, GroupL2(0.3)), lr=0.05),
            "Proximal": lambda m: Proximal(torch.optim.Adam(groups.output_channels(m, L1(0.3)), lr=0.05)),
        }
        found = {}
        for name, make in makers.items():
            whole, model = network(), self.fsdp(network())
            expected, optimizer = make(whole), make(model)
            for part, own in ((whole, expected), (model, optimizer)):
                train(part, own, 2)
                own.freeze_zeros()  # the masks are states that a new optimizer does not have
                train(part, own, 1)
            resumed = {"from a whole model": load(save(whole, expected, True), make, True)}
            if name != "AdamHAPG":
                resumed["full"] = load(save(model, optimizer, True), make, True)
                resumed["sharded"] = load(save(model, optimizer, False), make, False)
            else:
                optimizer.eval()
                found["saved in eval mode"] = message(load, save(model, optimizer, True), make, True)
                optimizer.train()
                stream = io.BytesIO()
                torch.save((model.state_dict(), optimizer.state_dict()), stream)
                stream.seek(0)
                saved = torch.load(stream, weights_only=True)
                other = self.fsdp(network())
                resumed["torch.save"] = other, make(other)
                for part, state in zip(resumed["torch.save"], saved):
                    part.load_state_dict(state)
            resumed["never saved"] = model, optimizer
            train(whole, expected, 2)
            for m, o in resumed.values():
                train(m, o, 2)
            wrong = {way: compare(expected, o) for way, (_, o) in resumed.items()}
            optimizer.load_state_dict(expected.state_dict())
            found[name] = (wrong, message(train, model, optimizer, 1))
        return found

    def check_sharding_after_construction(self):
        """The optimizer keeps parameters that the model no longer has, or gets the new ones."""
        found = {}
        for name, make in {"ProxAdam": ProxAdam, "Proximal": lambda p: Proximal(torch.optim.SGD(p, lr=0.1))}.items():
            model = network()
            optimizer = make(model.parameters())
            old = list(model.parameters())
            self.fsdp(model)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                late = message(train, model, optimizer, 1)
                early = message(make, old)
                for p in old:
                    p.__dict__.pop("_fsdp_orig_uid", None)  # as in earlier releases of torch
                train(model, optimizer, 2)
            found[name] = (late, early, [str(w.message) for w in caught if "no gradient" in str(w.message)])
        model, whole = network(), network()
        optimizer, expected = (ProxAdam(groups.output_channels(m, GroupL2(0.3)), lr=0.05) for m in (model, whole))
        places = [[next(n for n, q in model.named_parameters() if q is p) for p in g["params"]] for g in optimizer.param_groups]
        self.fsdp(model)
        for group, names in zip(optimizer.param_groups, places):
            group["params"] = [model.get_parameter(n) for n in names]
        train(model, optimizer, 2)
        train(whole, expected, 2)
        found["given the new ones"] = compare(expected, optimizer)
        return found

    def check_report(self):
        """Zeros and groups of the whole tensors, those too that no optimizer steps."""
        x = torch.zeros(5, 4)
        x[0, 1] = x[4, 3] = 1.0
        rows = []
        for axis in (0, 1, None):
            model = nn.ParameterDict({"x": nn.Parameter(self.shard(x, axis))})
            report = sparsity_report(model)
            rows.append((report.rows[0].shape, report.zeros, report.entries))
            optimizer = HAPG(model.parameters(), penalty=GroupL2(1.0, ROWS) if axis == 0 else L1(1.0))
            if axis == 0:
                row = sparsity_report(optimizer).rows[0]
                rows.append((row.zeros, row.groups, row.living))
            model.x.grad = model.x.detach() * 3
            rows.append(round(max_strength(optimizer), 5))
        return rows

    def fsdp(self, model):
        from torch.distributed.fsdp import fully_shard

        for module in (model[0], model[2], model):
            fully_shard(module, mesh=self.mesh)
        return model


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)).double()  # 3 outputs are an uneven shard


def train(model, optimizer, steps):
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(8, n, generator=generator, dtype=torch.float64) for n in (6, 3))
    for _ in range(steps):
        model.zero_grad()
        ((model(x) - y) ** 2).mean().backward()
        optimizer.step()


def compare(expected, optimizer, cases=None):
    """Differences of an optimizer of whole and one of sharded parameters, at the search point and at the prox point."""
    wrong = []
    for point in ("search", "prox"):
        if point == "prox":
            expected.eval()
            optimizer.eval()
        pairs = [(p, q) for g, h in zip(expected.param_groups, optimizer.param_groups) for p, q in zip(g["params"], h["params"])]
        for place, (p, q) in enumerate(pairs):
            case = cases[place] if cases else tuple(p.shape)
            whole = q.detach().full_tensor()
            if not torch.allclose(p, whole, rtol=1e-9, atol=1e-12) or not torch.equal(p == 0, whole == 0):
                wrong.append((point, case, float((p - whole).abs().max())))
            for key, value in optimizer.state[q].items():
                if value.shape == q.shape and q.ndim and value.placements != q.placements:
                    wrong.append((key, case, str(value.placements)))
    reports = [sparsity_report(o) for o in (expected, optimizer)]
    if reports[0] != reports[1]:
        wrong.append(("report", *map(str, reports)))
    expected.train()
    optimizer.train()
    return wrong


def message(f, *args):
    try:
        f(*args)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def process(number, folder):
    """Run all checks of one rank, and write what each returns, or its error, to a file."""
    faulthandler.enable()  # an abort shows where the threads were
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    found = {}
    try:
        store = f"file://{folder}/store"
        distributed.init_process_group("gloo", init_method=store, rank=number, world_size=WORLD, timeout=HANGS_AFTER)
        from torch.distributed.device_mesh import init_device_mesh

        rank = Rank(init_device_mesh("cpu", (WORLD,)))
    except RuntimeError as error:
        found["unavailable"] = str(error)
    else:
        for name in [n for n in vars(Rank) if n.startswith("check_")]:
            try:
                found[name] = getattr(rank, name)()
            except Exception:
                found[name] = traceback.format_exc()
        distributed.destroy_process_group()
    torch.save(found, Path(folder) / f"{number}.pt")
    # Python's teardown ends threads of gloo that wait for the interpreter in the middle of C++ code, which sometimes aborts
    os._exit(0)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The results of the two ranks, which are started once for all workers of pytest."""
    if not (distributed.is_available() and distributed.is_gloo_available()):
        pytest.skip("this build of torch has no gloo backend")
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "two_ranks"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            started = torch.multiprocessing.spawn(process, (str(folder),), nprocs=WORLD, join=False)
            deadline = time.monotonic() + 300
            while not started.join(timeout=5):
                if time.monotonic() > deadline:
                    for p in started.processes:
                        p.kill()
                    pytest.fail("the two ranks did not end within 300 seconds")
    found = [torch.load(folder / f"{number}.pt", weights_only=False) for number in range(WORLD)]
    if "unavailable" in found[0]:
        pytest.skip(f"two processes cannot talk to each other here: {found[0]['unavailable']}")
    return found


def test_sharded_steps_are_those_of_one_process(ranks):
    for found in ranks:
        assert found["check_agreement"] == {name: [] for name in MAKERS}


def test_what_is_not_supported_is_refused_alike_on_all_ranks(ranks):
    assert ranks[0]["check_refusals"] == ranks[1]["check_refusals"]
    for name, (_, _, shape, _, _, text) in REFUSED.items():
        early, late, untouched = ranks[0]["check_refusals"][name]
        assert early.startswith(f"ValueError: w (a DTensor of shape {shape} with placements (") and text in early, name
        assert late.startswith(f"ValueError: param_groups[1]['params'][0] (a DTensor of shape {shape} ") and text in late, name
        assert untouched, name


def test_a_gradient_that_is_not_finite_on_one_rank_stops_both(ranks):
    for found in (r["check_gradients"] for r in ranks):
        nothing = "must be finite, got {}; nothing was updated"
        assert found["sharded"] == (f"ValueError: gradient of p (shape (4, 6)) {nothing.format('NaN')}", True, True)
        assert found["plain"] == (f"ValueError: gradient of q (shape (3,)) {nothing.format('inf')}", True, True)


def test_a_gradient_may_be_laid_out_in_another_way(ranks):
    assert all(max(r["check_gradients"]["spread"]) < 1e-12 for r in ranks)


def test_fully_sharded_models_train_and_resume_like_whole_ones(ranks):
    for found in (r["check_fsdp"] for r in ranks):
        saved = found.pop("saved in eval mode")
        assert "must hold a sharded search_point for param_groups[0]['params'][0], since it was saved in eval mode, got" in saved
        for name, (resumed, refused) in found.items():
            assert all(wrong == [] for wrong in resumed.values()), (name, resumed)
            assert "must have a sharded state, got a plain tensor as" in refused and "set_optimizer_state_dict" in refused


def test_sharding_after_the_construction_is_noticed(ranks):
    for found in (r["check_sharding_after_construction"] for r in ranks):
        assert found.pop("given the new ones") == []
        for late, early, warned in found.values():
            if late != "no error":  # a release of torch that marks the parameters that it replaces
                replaced = "is no longer a parameter of the model, fully_shard has replaced it: call fully_shard first"
                assert replaced in late and replaced in early
            assert len(warned) == 1 and "construct it again from the parameters of the sharded model" in warned[0]


def test_reports_count_whole_tensors(ranks):
    for found in (r["check_report"] for r in ranks):
        assert found == [("5x4", 18, 20), (18, 5, 2), 1.5, ("5x4", 18, 20), 3.0, ("5x4", 18, 20), 3.0]


def test_projections_are_refused_where_torch_would_fail_later(ranks):
    for messages in (rank["check_projections"] for rank in ranks):
        parts = ("a projection with Groups.labels", "in a joint group with a projection", "the unevenly sharded axis 0")
        for found, part in zip(messages, parts):
            assert part in found, found
