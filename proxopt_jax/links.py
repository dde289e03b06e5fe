"""Sparse group lasso, lasso and group lasso as the last link of an ``optax.chain``."""

# no deferred annotations in this module: tools for optax compare them with optax.ScalarOrSchedule

import optax
from jax.typing import ArrayLike

from proxopt import L1, GroupL2, Groups, SparseGroupLasso
from proxopt_jax.proximal import proximal


def sgl(
    strength: optax.ScalarOrSchedule,
    l1_ratio: float = 0.5,
    groups: Groups | None = None,
    weights: str | ArrayLike = "sqrt_size",
    *,
    learning_rate: optax.ScalarOrSchedule,
    joint: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Sparse group lasso as the last link of an ``optax.chain``.

    The update u of the preceding transformations is replaced by u', with which ``optax.apply_updates`` yields the prox:

    .. math::

        f(x) = \lambda \Big(\alpha \|x\|_1 + (1 - \alpha) \sum_g w_g \|x_g\|_2\Big), \qquad
        x + u' = \mathrm{prox}_{\eta f}(x + u)
               = \mathrm{argmin}_z \; f(z) + \frac{1}{2 \eta} \|z - (x + u)\|^2

    with :math:`\lambda` = ``strength``, :math:`\alpha` = ``l1_ratio``, :math:`w_g` = ``weights`` and :math:`\eta` =
    ``learning_rate``. The link must come last: a transformation that scales the update afterwards destroys the zeros.

    **The unit of the strength.** Parameters that are 0 stay 0 if :math:`\mathrm{prox}_{\eta f}(u) = 0`: the strength is measured
    against :math:`u / \eta`. ``max_strength`` returns the strength at which a given update is zeroed altogether.

    - Behind SGD, :math:`u / \eta` is the gradient. The link is the exact proximal gradient step for loss + penalty, and
      strengths are those of the solvers. Start at 1e-3 to 1e-1 of ``max_strength``.
    - Behind Adam, :math:`u / \eta` is the gradient divided by its root mean square: its entries are below about 1, whatever the
      loss. Strengths of SGD and of ``proximal(optax.adam(...), penalty)`` are often a thousand times too small, and leave few
      zeros. ``max_strength`` is about 1; start at a tenth to a half.
    - Behind Lion all entries of :math:`u / \eta` are 1 or -1: few zeros last at strengths below 1.

    Behind Adam and Lion the limit is not a stationary point of loss + penalty. Prefer ``proximal(optax.adam(...), penalty)``,
    which uses the metric of Adam and the strengths of SGD. Zero weights and test accuracy in percent of a small network on the
    digits with batches of 64, means over 3 seeds (benchmarks/link_strength.py):

    ===================================  ======  =====  =====  =====  =====  =====
    strength                             0.0002  0.002  0.02   0.1    0.2    0.5
    ===================================  ======  =====  =====  =====  =====  =====
    ``proximal(adam)``, zeros            29.6    53.3
    ``proximal(adam)``, accuracy         97.3    96.0
    ``chain(sgd, link)``, zeros          3.9     60.0   100.0
    ``chain(sgd, link)``, accuracy       96.9    97.0   10.1
    ``chain(adam, link)``, zeros         0.0     0.1    1.6    11.9   28.6   77.3
    ``chain(adam, link)``, accuracy      97.2    97.3   97.4   97.4   97.0   87.7
    ===================================  ======  =====  =====  =====  =====  =====

    Args:
      strength: a number >= 0, a traced number, or a schedule, in the unit of u / learning_rate.
      l1_ratio: share of the L1 part, in [0, 1].
      groups: a ``proxopt.Groups``; None makes each leaf one group.
      weights: "sqrt_size", "inverse_sqrt_size", "none", or an array with one number per group.
      learning_rate: that of the preceding optimizer: a number >= 0 or the same schedule.
      joint: treat all leaves as one problem, so that ``Groups.whole()`` and ``Groups.labels`` span them. By default each leaf
        is a problem of its own.

    Returns:
      An ``optax.GradientTransformationExtraArgs``, whose ``update`` needs ``params``. To penalise some leaves only, see
      ``proximal`` with path patterns, or ``optax.masked``.

    Raises:
      ValueError: an argument is out of its domain; at ``init``, the groups do not fit a leaf, which is named by its path.
      TypeError: at ``init``, a leaf is not floating point.

    Source: Simon, Friedman, Hastie, Tibshirani, "A sparse-group lasso", 2013; SparseNAS, Eq. 3, 9, 10.

    A badly scaled regression with full gradients, where the link after Adam produces no zeros and ``prox_adam`` all five:

    >>> import jax, jax.numpy as jnp, optax, proxopt_jax
    >>> from proxopt import SparseGroupLasso
    >>> scale = jnp.array([1.0, 0.1, 0.1, 0.1, 0.1, 0.1])
    >>> grad = lambda w: scale * (scale * w - jnp.array([1.0, 0.1, -0.1, 0.1, -0.1, 0.1]))
    >>> def zeros(tx):
    ...     def step(carry, _):
    ...         w, state = carry
    ...         update, state = tx.update(grad(w), state, w)
    ...         return (optax.apply_updates(w, update), state), None
    ...     (w, _), _ = jax.lax.scan(step, (jnp.ones(6), tx.init(jnp.ones(6))), length=3000)
    ...     return int((w == 0).sum())
    >>> zeros(optax.chain(optax.adam(0.01), proxopt_jax.sgl(0.02, l1_ratio=1.0, learning_rate=0.01)))
    0
    >>> zeros(proxopt_jax.prox_adam(0.01, SparseGroupLasso(0.02, l1_ratio=1.0)))
    5
    """
    penalty = SparseGroupLasso(0.0, l1_ratio=l1_ratio, groups=groups, weights=weights)
    return proximal(penalty, learning_rate=learning_rate, strength=strength, joint=joint)


def l1(strength: optax.ScalarOrSchedule, *, learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformationExtraArgs:
    r"""Lasso as the last link of an ``optax.chain``.

    The update u of the preceding transformations is replaced by u', with which ``optax.apply_updates`` yields the soft threshold:

    .. math::

        f(x) = \lambda \|x\|_1, \qquad
        x + u' = \mathrm{sign}(x + u) \max(|x + u| - \eta \lambda, 0)

    with :math:`\lambda` = ``strength`` and :math:`\eta` = ``learning_rate``. The link must come last: a transformation that
    scales the update afterwards destroys the zeros.

    The strength is measured against :math:`u / \eta`: behind SGD the gradient, with which the link is the exact proximal gradient
    step; behind Adam and Lion steps of size about 1, whatever the loss. There it must be much larger, and the limit is not a
    stationary point of loss + penalty: prefer ``proximal(optax.adam(...), penalty)``. ``sgl`` explains and compares both;
    ``max_strength`` returns the strength at which a given update is zeroed altogether.

    Args:
      strength: a number >= 0, a traced number, or a schedule, in the unit of u / learning_rate.
      learning_rate: that of the preceding optimizer: a number >= 0 or the same schedule.

    Returns:
      An ``optax.GradientTransformationExtraArgs``, whose ``update`` needs ``params``. To penalise some leaves only, see
      ``proximal`` with path patterns, or ``optax.masked``.

    Raises:
      ValueError: an argument is out of its domain.
      TypeError: at ``init``, a leaf is not floating point.

    Source: Tibshirani, "Regression shrinkage and selection via the lasso", 1996; SparseNAS, Eq. 9.

    >>> import jax.numpy as jnp, optax, proxopt_jax
    >>> w = jnp.array([1.0, 0.01])
    >>> tx = optax.chain(optax.sgd(0.1), proxopt_jax.l1(0.5, learning_rate=0.1))
    >>> update, state = tx.update(2 * w, tx.init(w), w)
    >>> optax.apply_updates(w, update)
    Array([0.75, 0.  ], dtype=float32)
    """
    return proximal(L1(0.0), learning_rate=learning_rate, strength=strength)


def group_l2(
    strength: optax.ScalarOrSchedule,
    groups: Groups | None = None,
    weights: str | ArrayLike = "sqrt_size",
    *,
    learning_rate: optax.ScalarOrSchedule,
    joint: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Group lasso as the last link of an ``optax.chain``.

    The update u of the preceding transformations is replaced by u', with which ``optax.apply_updates`` yields the prox:

    .. math::

        f(x) = \lambda \sum_g w_g \|x_g\|_2, \qquad
        (x + u')_g = \max\Big(1 - \frac{\eta \lambda w_g}{\|(x + u)_g\|_2}, 0\Big) \, (x + u)_g

    with :math:`\lambda` = ``strength``, :math:`w_g` = ``weights`` and :math:`\eta` = ``learning_rate``. The link must come
    last: a transformation that scales the update afterwards destroys the zeros.

    The strength is measured against :math:`u / \eta`: behind SGD the gradient, with which the link is the exact proximal gradient
    step; behind Adam and Lion steps of size about 1, whatever the loss. There it must be much larger, and the limit is not a
    stationary point of loss + penalty: prefer ``proximal(optax.adam(...), penalty)``. ``sgl`` explains and compares both;
    ``max_strength`` returns the strength at which a given update is zeroed altogether.

    Args:
      strength: a number >= 0, a traced number, or a schedule, in the unit of u / learning_rate.
      groups: a ``proxopt.Groups``; None makes each leaf one group.
      weights: "sqrt_size", "inverse_sqrt_size", "none", or an array with one number per group.
      learning_rate: that of the preceding optimizer: a number >= 0 or the same schedule.
      joint: treat all leaves as one problem, so that ``Groups.whole()`` and ``Groups.labels`` span them. By default each leaf
        is a problem of its own.

    Returns:
      An ``optax.GradientTransformationExtraArgs``, whose ``update`` needs ``params``. To penalise some leaves only, see
      ``proximal`` with path patterns, or ``optax.masked``.

    Raises:
      ValueError: an argument is out of its domain; at ``init``, the groups do not fit a leaf, which is named by its path.
      TypeError: at ``init``, a leaf is not floating point.

    Source: Yuan and Lin, "Model selection and estimation in regression with grouped variables", 2006.

    >>> import jax.numpy as jnp, optax, proxopt_jax
    >>> from proxopt import Groups
    >>> w = jnp.array([[3.0, 0.1], [4.0, 0.1]])
    >>> tx = optax.chain(optax.sgd(1.0), proxopt_jax.group_l2(1.0, Groups.along(0), "none", learning_rate=1.0))
    >>> update, state = tx.update(jnp.zeros((2, 2)), tx.init(w), w)
    >>> optax.apply_updates(w, update)
    Array([[2.4, 0. ],
           [3.2, 0. ]], dtype=float32)
    """
    penalty = GroupL2(0.0, groups=groups, weights=weights)
    return proximal(penalty, learning_rate=learning_rate, strength=strength, joint=joint)
