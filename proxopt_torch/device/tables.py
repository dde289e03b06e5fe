"""The numbers that the Triton kernel reads from tables on the device: the names of their columns, and their values."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from proxopt import Shrinkage
from proxopt._arrays import is_number
from proxopt_torch.param_groups import ParamGroup

METHODS = ("prox_sgd", "prox_sgd_tau", "hapg", "prox_adam", "adam_hapg")
METRICS = ("none", "one_step", "support", "median", "exact")  # none: no groups; one_step: the same step for all entries
LAYOUTS = ("contiguous", "strided", "strided runs")

ADDRESSES = ("x", "grad", "mean", "square", "point")  # of the first entry of a tensor, of its gradient and of its states
STATES = {"velocity": "mean", "exp_avg": "mean", "exp_avg_sq": "square", "point": "point"}

PLAIN = (
    *("lr", "step", "l1", "l2", "sign", "decay", "decoupled"),
    *("keep_mean", "new_mean", "keep_square", "new_square", "eps"),
)
COUNTED = ("mean_scale", "root_scale", "momentum")


def method(kernel: str, group: ParamGroup) -> str:
    """The method of a param group; the name of ProxSGD has two, because with ``tau`` it is another update."""
    return "prox_sgd_tau" if kernel == "prox_sgd" and group["tau"] is not None else kernel


def numeric(kernel: str, group: ParamGroup) -> bool:
    """Whether all hyperparameters but the learning rate are numbers; a tensor would have to be read."""
    betas = group.get("betas", ())
    values = [group["weight_decay"], group.get("rho", 0), group.get("eps", 0), *betas]
    if "extrapolation" in group and not isinstance(group["extrapolation"], str):
        values.append(group["extrapolation"])
    if group.get("tau") is not None:
        values.append(group["tau"])
    return kernel in METHODS and all(is_number(v) for v in values)


def plain(kernel: str, group: ParamGroup, form: Shrinkage | None) -> list[float | Tensor]:
    """The row of a param group. Tensors without axes are copied on the device, without being read."""
    lr, tau = group["lr"], group.get("tau")
    if kernel == "prox_sgd":
        keep, new = (1 - group["rho"], group["rho"]), (0.0, 0.0)
    else:
        beta1, beta2 = group.get("betas", (0.0, 0.0))
        keep, new = (beta1, 1 - beta1), (beta2, 1 - beta2)
    decoupled = bool(group.get("decoupled_weight_decay"))
    decay = group["weight_decay"]
    values: dict[str, Any] = {
        "lr": lr,
        "step": lr if tau is None else 1 / tau,
        "l1": 0.0 if form is None or form.l1 is None else form.l1,
        "l2": 0.0 if form is None or form.l2 is None else form.l2,
        "sign": -1.0 if group["maximize"] else 1.0,
        "decay": 0.0 if decoupled else decay,
        "decoupled": lr * decay if decoupled and decay else 0.0,
        "keep_mean": keep[0],
        "new_mean": keep[1],
        "keep_square": new[0],
        "new_square": new[1],
        "eps": group.get("eps", 0.0),
    }
    return [values[name] if isinstance(values[name], Tensor) else float(values[name]) for name in PLAIN]


def counted(group: ParamGroup, count: Any) -> list[Any]:
    r"""The columns that depend on the number t of the step, a float64 array of NumPy or torch.

    They are Adam's corrections of the bias, :math:`1 / (1 - \beta_1^t)` and :math:`(1 - \beta_2^t)^{-1/2}`, and the extrapolation
    :math:`u_t` of HAPG.
    """
    one = 0 * count + 1
    beta1, beta2 = group.get("betas", (None, None))
    scales = [one, one] if beta1 is None else [1 / (1 - float(beta1) ** count), (1 - float(beta2) ** count) ** -0.5]
    rule = group.get("extrapolation")
    if rule is None:
        return [*scales, 0 * count]
    u = (count - 2) / (count + 1)
    if rule != "as_printed":
        u = u.clip(0, 1 if rule == "nesterov" else float(rule))
    return [*scales, u]
