"""
Heads of a transformer
======================

A transformer reads the digits as eight rows of pixels. A group lasso on its attention heads removes those that it does not need:
query, key, value and output weights of a head become zero together.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

from proxopt import GroupL2
from proxopt_torch import ProxAdam, compact, groups

HEADS, WIDTH = 8, 32


class Net(nn.Module):
    """Two encoder layers on the rows of an image."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(8, WIDTH)
        self.place = nn.Parameter(0.1 * torch.randn(8, WIDTH))
        layer = lambda: nn.TransformerEncoderLayer(WIDTH, HEADS, 64, dropout=0.0, batch_first=True)
        self.first, self.second = layer(), layer()
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x):
        return self.head(self.second(self.first(self.embed(x) + self.place)).mean(1))


torch.manual_seed(0)
torch.set_num_threads(1)
x, y = (torch.tensor(a) for a in load_digits(return_X_y=True))
x = (x / 16).float().reshape(-1, 8, 8)
order = torch.randperm(len(x))
train, valid = order[:1350], order[1350:]

net = Net()
optimizer = ProxAdam(groups.attention_heads(net, GroupL2(1e-3)), lr=3e-3)


def head_norms():
    """The norm of the output weights of each head, which are columns of the output projection."""
    projections = [layer.self_attn.out_proj.weight.detach() for layer in (net.first, net.second)]
    return torch.stack([w.reshape(WIDTH, HEADS, -1).norm(dim=(0, 2)) for w in projections])


history, accuracies = [], []
for _ in range(30):
    net.train()
    for batch in train[torch.randperm(len(train))].split(128):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x[batch]), y[batch]).backward()
        optimizer.step()
    net.eval()
    with torch.no_grad():
        accuracies.append(100 * float((net(x[valid]).argmax(1) == y[valid]).float().mean()))
    history.append(head_norms())
history = torch.stack(history)
print(compact(net, x[:2]))

# %%
# A head that is not needed falls to exactly zero and stays there. ``compact`` then removes it from the attention.

figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), constrained_layout=True)
for axis, name, norms in zip(axes, ("first layer", "second layer"), history.unbind(1)):
    for head in range(HEADS):
        alive = bool(norms[-1, head] > 0)
        axis.plot(range(1, len(norms) + 1), norms[:, head], color="#2b5d8a" if alive else "#d94801", linewidth=1.2)
    axis.set(title=f"{name}: {int((norms[-1] > 0).sum())} of {HEADS} heads are left", xlabel="epoch", ylabel="norm of a head")
axes[2].plot(range(1, len(accuracies) + 1), accuracies, color="0.3")
axes[2].set(title="accuracy % on held-out images", xlabel="epoch")
for axis in axes:
    axis.grid(alpha=0.25)
plt.show()
