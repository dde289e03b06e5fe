"""
A regularisation path, certified
================================

Which pixels tell a three from the other digits? A lasso over 40 strengths answers: at the largest strength no pixel is used, then
one after the other enters. ``sparse_code`` solves all 40 problems at once, each to a relative duality gap below 1e-9.
"""

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits

from proxopt import L1, max_strength, sparse_code

images, labels = load_digits(return_X_y=True)
A = images - images.mean(0)
A /= np.maximum(A.std(0), 1e-6)
b = (labels == 3) - (labels == 3).mean()

largest = max_strength(A.T @ b, L1(1.0))
strengths = largest * np.geomspace(1, 1e-3, 40)
found = sparse_code(A, b, strengths, tol=1e-9)
print(f"largest relative gap: {found.gap.max():.0e}; pixels used: {(found.x != 0).sum(1).min()} to {(found.x != 0).sum(1).max()}")

figure, axes = plt.subplots(1, 4, figsize=(14, 4), width_ratios=[2.2, 1, 1, 1], constrained_layout=True)
axes[0].plot(strengths / largest, found.x, linewidth=1)
axes[0].set(xscale="log", xlabel="strength / the one that zeroes everything", ylabel="coefficient of each pixel")
axes[0].invert_xaxis()
for axis, place in zip(axes[1:], (6, 16, 39)):
    coefficients = found.x[place].reshape(8, 8)
    limit = abs(coefficients).max()
    axis.imshow(np.where(coefficients == 0, np.nan, coefficients), cmap="RdBu", vmin=-limit, vmax=limit)
    axis.set_facecolor("#d8d8d8")
    used = int((coefficients != 0).sum())
    axis.set(title=f"strength {strengths[place] / largest:.3f} of it\n{used} of 64 pixels", xticks=[], yticks=[])
plt.show()
