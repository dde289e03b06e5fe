"""
A convolutional network at a third of its cost
==============================================

A small residual network on the digits is asked to become three times cheaper. ``groups.coupled`` finds what can only be removed
together, ``Budget`` raises the strength until 35 % of the multiply-adds are left, and the zeros are frozen; then training goes on
without penalty. ``compact`` cuts the zeroed channels: the outputs stay the same.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

from proxopt import GroupL2
from proxopt_torch import Budget, ProxAdam, compact, groups


class Net(nn.Module):
    """A stem, a residual block and a head."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.block = nn.Sequential(
            nn.Conv2d(16, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 16, 3, padding=1), nn.BatchNorm2d(16)
        )
        self.head = nn.Linear(16 * 4, 10)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        return self.head(nn.functional.adaptive_avg_pool2d((x + self.block(x)).relu(), 2).flatten(1))


torch.manual_seed(0)
torch.set_num_threads(1)
x, y = (torch.tensor(a) for a in load_digits(return_X_y=True))
x = (x / 16).float().reshape(-1, 1, 8, 8)
order = torch.randperm(len(x))
train, valid = order[:1350], order[1350:]

net = Net()
EPOCHS, BATCH = 24, 96
steps = EPOCHS * -(-len(train) // BATCH)
optimizer = ProxAdam(groups.coupled(net, x[:2], GroupL2(1.0)), lr=4e-3)
budget = Budget(optimizer, net, x[:2], macs=0.35, steps=int(0.6 * steps), start=0.1)
accuracies = []
for _ in range(EPOCHS):
    net.train()
    for batch in train[torch.randperm(len(train))].split(BATCH):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x[batch]), y[batch]).backward()
        optimizer.step()
        budget.step()
    net.eval()
    with torch.no_grad():
        accuracies.append(100 * float((net(x[valid]).argmax(1) == y[valid]).float().mean()))
small = compact(net, x[:2])
print(small)

# %%
# The share of the multiply-adds follows its schedule; after the zeros are frozen, training goes on without penalty. Below, the
# norms of the channels of the three convolutions: grey ones are exactly zero, and gone in the smaller network.

figure, axes = plt.subplots(1, 2, figsize=(11, 3.4), constrained_layout=True)
log = budget.log
axes[0].plot([r["step"] for r in log], [r["wanted"] for r in log], color="0.6", label="schedule")
axes[0].plot([r["step"] for r in log], [r["share"] for r in log], color="#2b5d8a", label="measured")
frozen = next((r["step"] for r in log if r["frozen"]), None)
if frozen is not None:
    axes[0].axvline(frozen, color="#d94801", linewidth=1, label="zeros frozen")
axes[0].set(xlabel="step", ylabel="share of the multiply-adds", ylim=(0, 1.05))
axes[0].legend(frameon=False)
axes[1].plot(range(1, EPOCHS + 1), accuracies, color="#2b5d8a", marker="o", markersize=3)
axes[1].set(xlabel="epoch", ylabel="accuracy % on held-out images")
for axis in axes:
    axis.grid(alpha=0.25)
plt.show()

# %%

figure, axes = plt.subplots(1, 3, figsize=(12, 2.8), constrained_layout=True)
for axis, (name, layer) in zip(axes, {"stem": net.stem, "block.0": net.block[0], "block.3": net.block[3]}.items()):
    norms = layer.weight.detach().flatten(1).norm(dim=1).numpy()
    axis.bar(np.arange(len(norms)), np.where(norms > 0, norms, norms.max() / 40), color=np.where(norms > 0, "#2b5d8a", "#c8c8c8"))
    axis.set(title=f"{name}: {int((norms > 0).sum())} of {len(norms)} channels", xlabel="output channel")
axes[0].set_ylabel("norm of its weights")
plt.show()
