"""Prune a flax convolutional network to a smaller one: python examples/prune_flax.py --strength 1e-3 --out runs/prune_flax

An nnx network is trained on scikit-learn's 8x8 digits by Adam with a group lasso. Kernel and bias of each output channel of a
convolution, and of each neuron of a dense layer, are one group. Channels and neurons that are exactly zero are removed, and the
smaller network is trained again without penalty; orbax writes it with its optimizer to OUT/checkpoint. Expected: 97.8 % test
accuracy, as with the full network, with a tenth of its parameters; 40 seconds on one core.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import proxopt_jax
from proxopt import GroupL2

BATCH, RATE = 64, 2e-3
LAYERS = ("conv1", "conv2", "dense", "out")


class Net(nnx.Module):
    """Two convolutions and two dense layers on images (batch, 8, 8, 1); ``widths`` are those of the first three."""

    def __init__(self, widths=(16, 32, 64)):
        first, second, third = widths
        rngs = nnx.Rngs(0)
        self.conv1 = nnx.Conv(1, first, (3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(first, second, (3, 3), strides=2, rngs=rngs)
        self.dense = nnx.Linear(4 * 4 * second, third, rngs=rngs)
        self.out = nnx.Linear(third, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.conv2(nnx.relu(self.conv1(x))))
        return self.out(nnx.relu(self.dense(x.reshape(len(x), -1))))


def widths_of(net):
    return [getattr(net, name).bias.shape[0] for name in LAYERS]


def group_lasso(net, strength):
    """A penalty for each layer but the last, whose groups span kernel and bias; their last axis is that of the outputs."""
    labels = {name: {"bias": range(n), "kernel": range(n)} for name, n in zip(LAYERS[:-1], widths_of(net))}
    return [(f"{name}/*", GroupL2(strength, proxopt_jax.tree_labels(tree, axis=-1))) for name, tree in labels.items()]


@nnx.jit
def step(net, optimizer, x, y):
    loss = lambda net: optax.softmax_cross_entropy_with_integer_labels(net(x), y).mean()
    optimizer.update(net, nnx.grad(loss)(net))


def train(net, tx, x, y, epochs):
    """Train on minibatches and return the optimizer; after each step of ``proximal`` the parameters are exactly sparse."""
    optimizer, random = nnx.Optimizer(net, tx, wrt=nnx.Param), np.random.default_rng(0)
    for _ in range(epochs):
        for batch in random.permutation(len(x))[: len(x) // BATCH * BATCH].reshape(-1, BATCH):
            step(net, optimizer, x[batch], y[batch])
    return optimizer


def compact(net):
    """Return the network without the channels and neurons that are zero. Its outputs are the same, because relu(0) = 0."""
    params, inputs = nnx.to_pure_dict(nnx.state(net, nnx.Param)), np.ones(1, bool)
    for name in LAYERS:
        kernel, bias = np.asarray(params[name]["kernel"]), np.asarray(params[name]["bias"])
        outputs = kernel.any(axis=tuple(range(kernel.ndim - 1))) | (bias != 0) | (name == "out")
        if not outputs.any():
            raise SystemExit(f"strength must leave a channel in every layer, none is left in {name}: choose a smaller one")
        inputs = np.tile(inputs, kernel.shape[-2] // len(inputs))  # flattened (4, 4, channels): the channel varies fastest
        params[name] = {"kernel": jnp.asarray(kernel[..., inputs, :][..., outputs]), "bias": jnp.asarray(bias[outputs])}
        inputs = outputs
    small = Net([len(params[name]["bias"]) for name in LAYERS[:-1]])
    nnx.update(small, params)
    return small


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strength", type=float, default=1e-3, help="of the group lasso; a larger strength gives fewer channels")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("runs/prune_flax"))
    args = parser.parse_args(argv)
    images, labels = load_digits(return_X_y=True)
    images = images.astype(np.float32).reshape(-1, 8, 8, 1) / 16
    x, x_test, y, y_test = train_test_split(images, labels, test_size=0.25, random_state=0, stratify=labels)

    plain, sparse = Net(), Net()
    train(plain, optax.adam(RATE), x, y, args.epochs)
    penalty = group_lasso(sparse, args.strength)
    train(sparse, proxopt_jax.proximal(optax.adam(RATE), penalty, joint=True), x, y, args.epochs)
    small = compact(sparse)
    assert np.allclose(small(x_test), sparse(x_test), atol=1e-4), "compaction changed the outputs"
    again, tx = nnx.clone(small), optax.adam(RATE / 3)
    optimizer = train(again, tx, x, y, args.epochs // 3)

    rows = []
    print(f"{'network':<20}{'widths':>14}{'parameters':>12}{'accuracy':>10}")
    for name, net in (("Adam", plain), ("sparse", sparse), ("compact", small), ("compact, retrained", again)):
        size = sum(p.size for p in jax.tree.leaves(nnx.state(net, nnx.Param)))
        rows.append((name, widths_of(net), size, float((net(x_test).argmax(1) == y_test).mean())))
        print(f"{name:<20}{'-'.join(map(str, rows[-1][1])):>14}{size:>12}{rows[-1][-1]:>10.3f}")

    path, fresh = (args.out / "checkpoint").absolute(), Net(widths_of(again)[:-1])
    trained, restored = (again, optimizer), (fresh, nnx.Optimizer(fresh, tx, wrt=nnx.Param))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, nnx.state(trained), force=True)
        checkpointer.wait_until_finished()
        nnx.update(restored, checkpointer.restore(path, nnx.state(restored)))
    pairs = zip(jax.tree.leaves(nnx.state(trained)), jax.tree.leaves(nnx.state(restored)), strict=True)
    assert all(np.array_equal(a, b) for a, b in pairs), "the checkpoint differs from what was saved"
    print(f"written: {path}, restored bit for bit")
    return rows


if __name__ == "__main__":
    main()
