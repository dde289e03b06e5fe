"""Write what the optimizers of the present release save, as a fixture that every later release must load.

    PYTHONPATH=.:tests python tests/checkpoints/make_optimizers.py

It writes `optimizers_VERSION.pt` and refuses to replace a file: add a file for a new release, never write an old one again.
Each case holds the parameters and the state_dict after 20 steps, and the prox point that the release reached 5 steps later.
"""

import io
from pathlib import Path

import torch
from torch import nn
from torch_cases import PENALTIES, Foreign, groups_of, problem, snapshot, train

import proxopt
from proxopt import L1, GroupL2, Groups
from proxopt_torch import HAPG, AdamHAPG, ProxAdam, Proximal, ProxSGD

HERE = Path(__file__).parent
KINDS = ["none", "l1", "whole", "sgl inverse", "sgl exact", "labels", "nested"]
ROWS = Groups.labels([range(5), range(5)], axis=0)


def joint(net: nn.Module) -> list[dict]:
    first = {"params": [net[0].weight, net[0].bias], "penalty": GroupL2(0.05, ROWS), "joint": True}
    return [first, {"params": [*net[2].parameters(), *net[4].parameters()]}]


def named(net: nn.Module) -> list[dict]:
    weights = [pair for pair in net.named_parameters() if pair[0].endswith("weight")]
    others = [pair for pair in net.named_parameters() if pair[0].endswith("bias")]
    return [{"params": weights, "penalty": PENALTIES["elastic"]}, {"params": others}]


# As they were in 0.1.0; the cases of `torch_cases` may move on.
MAKERS = {
    "ProxSGD": lambda p: ProxSGD(p, lr=0.05),
    "ProxSGD tau": lambda p: ProxSGD(p, lr=0.1, tau=5.0),
    "HAPG": lambda p: HAPG(p, lr=0.05),
    "HAPG as printed": lambda p: HAPG(p, lr=0.05, extrapolation="as_printed"),
    "HAPG capped": lambda p: HAPG(p, lr=0.05, extrapolation=0.7),
    "ProxAdam": lambda p: ProxAdam(p, lr=0.01),
    "ProxAdam decay": lambda p: ProxAdam(p, lr=0.01, weight_decay=0.1),
    "ProxAdamW": lambda p: ProxAdam(p, lr=0.01, weight_decay=0.1, decoupled_weight_decay=True),
    "AdamHAPG": lambda p: AdamHAPG(p, lr=0.01),
}

# name -> what to make of the network of `torch_cases.problem`
CASES = {
    **{name: lambda net, m=make: m(groups_of(net, PENALTIES["sgl"])) for name, make in MAKERS.items()},
    **{f"ProxAdam, {key}": lambda net, k=key: MAKERS["ProxAdam"](groups_of(net, PENALTIES[k])) for key in KINDS},
    "ProxAdam, named": lambda net: ProxAdam(named(net), lr=0.01),
    "AdamHAPG, exact, eval": lambda net: AdamHAPG(groups_of(net, PENALTIES["sgl exact"]), lr=0.01),
    "HAPG, joint": lambda net: HAPG(joint(net), lr=0.05),
    "ProxAdam, joint": lambda net: ProxAdam(joint(net), lr=0.01),
    "ProxSGD, tau, joint, eval": lambda net: ProxSGD(joint(net), lr=0.1, tau=5.0),
    "ProxAdam, foreign": lambda net: ProxAdam(groups_of(net, Foreign()), lr=0.01),
    "ProxAdam, strengths": lambda net: ProxAdam(groups_of(net, L1(torch.linspace(0.0, 0.05, 6, dtype=torch.float64))), lr=0.01),
    "HAPG, tensor lr": lambda net: HAPG(groups_of(net, PENALTIES["l1"]), lr=torch.tensor(0.05, dtype=torch.float64)),
    "ProxAdam, stacked": lambda net: ProxAdam(net.parameters(), lr=0.01, penalty=L1(0.01), foreach=True),
    "Proximal(Adam)": lambda net: Proximal(torch.optim.Adam(groups_of(net, PENALTIES["sgl"]), lr=0.01)),
    "Proximal(SGD)": lambda net: Proximal(torch.optim.SGD(groups_of(net, PENALTIES["sgl"]), lr=0.05)),
}


def main() -> None:
    saved = {}
    for name, make in CASES.items():
        net, x, y = problem()
        optimizer = make(net)
        train(optimizer, net, x, y, 20)
        if name.endswith("eval"):
            optimizer.eval()
        torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, file := io.BytesIO())
        file.seek(0)
        saved[name] = torch.load(file, weights_only=True)  # a copy: the state goes on below
        optimizer.train()
        train(optimizer, net, x, y, 5)
        saved[name]["later"] = snapshot(net, optimizer)
    target = HERE / f"optimizers_{proxopt.__version__}.pt"
    if target.exists():
        raise FileExistsError(f"{target} is the fixture of a release and must not be replaced")
    torch.save(saved, target)


if __name__ == "__main__":
    main()
