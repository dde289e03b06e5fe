r"""
The prox of every family
========================

A proximal operator moves a point towards smaller values of a penalty, and weighs the distance against the gain. For penalties
with kinks the result is often exactly zero. The upper row shows one entry of the result over one entry of the argument, while a
second entry is 0.5. The lower row shows the level sets of each penalty in the plane, and where its prox sends a grid of points.
"""

import matplotlib.pyplot as plt
import numpy as np

from proxopt import L1, ElasticNet, GroupL2, Groups, NonNegative, SparseGroupLasso

pairs = Groups.along(-1)  # the last axis runs inside a group: many points in the plane at once
penalties = {
    "L1": L1(1.0),
    "ElasticNet": ElasticNet(1.0, l1_ratio=0.5),
    "GroupL2": GroupL2(1.0, pairs, weights="none"),
    "SparseGroupLasso": SparseGroupLasso(1.0, 0.5, pairs, weights="none"),
    "NonNegative(L1)": NonNegative(L1(1.0)),
}

line = np.linspace(-3, 3, 241)
plane = np.stack(np.meshgrid(line[::10], line[::10]), axis=-1)
starts = np.stack(np.meshgrid(np.linspace(-2.7, 2.7, 7), np.linspace(-2.7, 2.7, 7)), axis=-1).reshape(-1, 2)

figure, axes = plt.subplots(2, len(penalties), figsize=(14, 5.8), constrained_layout=True)
for (name, penalty), above, below in zip(penalties.items(), *axes):
    moved = penalty.prox(np.stack([line, np.full_like(line, 0.5)], axis=1))
    above.plot(line, line, color="0.8", linewidth=1)
    above.plot(line, moved[:, 0], color="#2b5d8a", linewidth=2)
    zero = line[moved[:, 0] == 0]
    above.plot(zero, 0 * zero, color="#d94801", linewidth=4, solid_capstyle="butt")
    above.set(title=name, xlabel="$x_1$", xlim=(-3, 3), ylim=(-3, 3), aspect="equal")

    values = np.array([[float(penalty.value(point)) for point in row] for row in plane])
    below.contour(line[::10], line[::10], np.where(np.isfinite(values), values, np.nan), levels=6, colors="0.6", linewidths=0.9)
    ends = penalty.prox(starts)
    for start, end in zip(starts, ends):
        below.plot(*np.stack([start, end]).T, color="#2b5d8a", linewidth=0.7, alpha=0.6)
    sparse = (ends == 0).any(axis=1)
    below.scatter(*ends[~sparse].T, s=12, color="#2b5d8a", zorder=3)
    below.scatter(*ends[sparse].T, s=18, color="#d94801", zorder=4)
    below.set(xlabel="$x_1$", xlim=(-3, 3), ylim=(-3, 3), aspect="equal")
axes[0, 0].set_ylabel("first entry of the prox (orange: zero)")
axes[1, 0].set_ylabel("$x_2$ (orange: an entry is zero)")
plt.show()

# %%
# Steps that differ
# -----------------
#
# Adam gives each entry a step of its own. The region that a group lasso maps to zero is then an ellipse, the set of all x with
# :math:`\|x / s\| \le \lambda`. ``metric="support"`` has the same region, ``metric="median"`` the circle of one step.

figure, axes = plt.subplots(1, 3, figsize=(10.5, 4.2), constrained_layout=True, sharey=True)
steps = np.array([1.8, 0.4])
grid = np.stack(np.meshgrid(np.linspace(-3, 3, 101), np.linspace(-3, 3, 101)), axis=-1)
for metric, axis in zip(("exact", "support", "median"), axes):
    penalty = GroupL2(1.0, pairs, weights="none", metric=metric)
    zero = ~penalty.prox(grid, steps).any(axis=-1)
    axis.contourf(grid[..., 0], grid[..., 1], zero, levels=[0.5, 1], colors=["#fdd0a2"])
    ends = penalty.prox(starts, steps)
    for start, end in zip(starts, ends):
        axis.plot(*np.stack([start, end]).T, color="#2b5d8a", linewidth=0.7, alpha=0.6)
    axis.scatter(*ends.T, s=12, color="#2b5d8a", zorder=3)
    axis.set(title=f'metric="{metric}"', xlabel="$x_1$ (step 1.8)", xlim=(-3, 3), ylim=(-3, 3), aspect="equal")
axes[0].set_ylabel("$x_2$ (step 0.4)")
plt.show()
