"""Prune a digits classifier to a smaller one: python examples/digits_pruning.py --strength 1e-3 --out runs/digits

Trains a network 64-40-20-10 on scikit-learn's digits with a penalty on the outgoing weights of every pixel and neuron, removes
pixels and neurons whose weights are zero, retrains the smaller network, prints a table, and draws weights and used pixels into
OUT/digits.png. About 570 of 3630 parameters remain, with 97 % validation accuracy, after about ten seconds.
"""

import argparse
from pathlib import Path

import matplotlib
import torch
from sklearn.datasets import load_digits
from torch import nn

from proxopt import L1, GroupL2, Groups, SparseGroupLasso
from proxopt_torch import HAPG, AdamHAPG, ProxAdam, ProxSGD, compact, sparsity_report

matplotlib.use("Agg")
from matplotlib import pyplot as plt

OUTGOING = Groups.along(0)  # a column of a Linear weight: the outgoing weights of a pixel or neuron
PENALTIES = {
    "sgl": lambda strength: SparseGroupLasso(strength, l1_ratio=0.5, groups=OUTGOING),
    "group_l2": lambda strength: GroupL2(strength, groups=OUTGOING),
    "l1": L1,
}
OPTIMIZERS = {
    "adamhapg": lambda groups: AdamHAPG(
        groups, lr=3e-4, extrapolation="nesterov"
    ),  # without a cap on the momentum, as in SparseNAS
    "hapg": lambda groups: HAPG(groups, lr=0.05, extrapolation="nesterov"),
    "proxadam": lambda groups: ProxAdam(groups, lr=1e-3),
    "proxsgd": lambda groups: ProxSGD(groups, lr=0.1),
}


def digits(seed):
    """Load the images with pixels in [0, 1]; three quarters are for training, one for validation."""
    x, y = (torch.tensor(a) for a in load_digits(return_X_y=True))
    x = (x / 16).float()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    cut = round(0.75 * len(x))
    return (x[order[:cut]], y[order[:cut]]), (x[order[cut:]], y[order[cut:]])


def train(net, optimizer, data, epochs, batch=256):
    x, y = data
    for _ in range(epochs):
        for part in torch.randperm(len(x)).split(batch):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[part]), y[part]).backward()
            optimizer.step()


def accuracy(net, data):
    return float((net(data[0]).argmax(1) == data[1]).float().mean())


def row(name, net, valid):
    report = sparsity_report(net)
    weights = [p for n, p in net.named_parameters() if "weight" in n]
    used = [int((w != 0).any(0).sum()) for w in weights]
    print(f"{name:22} {accuracy(net, valid):8.4f} {used[0]:9} {sum(used[1:]):8} {report.entries:10} {100 * report.share:9.1f} %")


def draw(weights, pixels, path):
    """Draw the weight matrices, with zeros in grey, and the pixels that the network uses."""
    figure, axes = plt.subplots(1, 4, figsize=(15, 4.6), width_ratios=[3.2, 2, 1.4, 1.6], constrained_layout=True)
    titles = ("64 pixels to 40 neurons", "40 to 20 neurons", "20 neurons to 10 digits")
    for axis, weight, title in zip(axes, weights, titles):
        limit = float(weight.abs().flatten().quantile(0.99)) or 1.0
        shown = torch.where(weight == 0, torch.nan, weight)
        axis.set_facecolor("#c8c8c8")
        axis.imshow(shown.numpy(), cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
        axis.set(title=f"{title}\n{100 * float((weight == 0).float().mean()):.0f} % zeros (grey)", xlabel="from", ylabel="to")
        axis.locator_params(integer=True)
    axes[3].imshow(pixels.reshape(8, 8).numpy(), cmap="Greys", vmin=0, interpolation="nearest")
    axes[3].set(title=f"outgoing weight of each pixel\n{int((pixels > 0).sum())} of 64 used", xticks=[], yticks=[])
    for unused in (pixels == 0).nonzero().flatten().tolist():
        axes[3].text(unused % 8, unused // 8, "x", ha="center", va="center", color="firebrick", fontsize=11)
    figure.savefig(path, dpi=110)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="hapg")
    parser.add_argument("--penalty", choices=PENALTIES, default="sgl")
    parser.add_argument("--strength", type=float, default=1e-3, help="of the penalty; a larger strength gives fewer weights")
    parser.add_argument("--epochs", type=int, default=500)
    parser.add_argument("--retrain-epochs", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/digits"))
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # the matrices are too small for several threads
    data, valid = digits(args.seed)

    net = nn.Sequential(nn.Linear(64, 40), nn.LeakyReLU(), nn.Linear(40, 20), nn.LeakyReLU(), nn.Linear(20, 10))
    layers = [m for m in net if isinstance(m, nn.Linear)]
    penalised = {"params": [m.weight for m in layers], "penalty": PENALTIES[args.penalty](args.strength)}
    optimizer = OPTIMIZERS[args.optimizer]([penalised, {"params": [m.bias for m in layers]}])
    train(net, optimizer, data, args.epochs)
    optimizer.eval()  # the parameters are now those of the prox point, exactly sparse

    small = compact(net, valid[0], inputs=True)
    pick = lambda d: (d[0][:, small.inputs], d[1])
    print(f"{'network':22} {'accuracy':>8} {'features':>9} {'neurons':>8} {'parameters':>10} {'zeros':>11}")
    row("sparse", net, valid)
    row("compact", small.model, pick(valid))
    train(small.model, torch.optim.Adam(small.model.parameters(), lr=3e-4), pick(data), args.retrain_epochs)
    row("compact, retrained", small.model, pick(valid))

    draw([m.weight.detach() for m in layers], layers[0].weight.detach().norm(dim=0), args.out / "digits.png")
    torch.save({"inputs": small.inputs, "model": small.model.state_dict()}, args.out / "compact.pt")
    print(f"written: {args.out}/digits.png, {args.out}/compact.pt")


if __name__ == "__main__":
    main()
