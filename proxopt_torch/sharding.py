"""Checks for parameters that are sharded over ranks: ``DTensor``, from ``fully_shard`` (FSDP2) and tensor parallelism.

The steps of ``proxopt.updates`` run on DTensors, and torch inserts the collectives. Supported are

- no penalty, and elementwise penalties (``L1``, ``ElasticNet``), on any sharding;
- ``Groups.along`` with axes that are not sharded, which needs no communication;
- ``Groups.along`` and ``Groups.whole`` across a sharded axis that splits evenly, unless the metric is ``"median"``;
- any other operator: its ``prox`` receives the DTensor, and must call the same operations on every rank.

``check`` raises for everything else, because torch would fail in the middle of a step, or not on every release of it: labels and
arrays of weights are plain tensors, which do not mix with DTensors, and a rank whose shard is empty leaves the others waiting.

An error on one rank alone has the same effect: the others wait in a collective for ever. The checks therefore use only what is
equal on all ranks (global shapes, placements, meshes, penalties), or reduce over the ranks what is not.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from proxopt import Groups, ProxOperator
from proxopt.penalties import declared
from proxopt_torch.param_groups import ParamGroup

if TYPE_CHECKING:
    from proxopt_torch.penalised import Penalised

UNSHARDED = "or leave it unsharded (ignored_params of fully_shard)"
FINITE, INF, NAN = 0, 1, 2  # in this order: the ranks agree on the largest


def check(optimizer: Penalised, group: ParamGroup, penalty: ProxOperator | None) -> None:
    """Raise where the penalty is not supported on a sharded parameter of the group, with the same message on every rank.

    Raises:
      ValueError: a joint group, labels, arrays of strengths or weights, a median over a sharded axis, groups across an axis
        that does not split evenly, a placement that neither shards nor replicates, a state that is not sharded.
      RuntimeError: ``fully_shard`` has replaced the parameter in the model.
    """
    if torch.compiler.is_compiling() or (kind := _dtensor()) is None:
        return
    for place, p in enumerate(group["params"]):
        if p.grad is None and hasattr(p, "_fsdp_orig_uid"):  # fully_shard marks a parameter that it replaces
            raise RuntimeError(
                f"{label(optimizer, group, place)} (shape {tuple(p.shape)}) is no longer a parameter of the model, fully_shard "
                "has replaced it: call fully_shard first, then construct the optimizer from the parameters of the sharded model"
            )
        if isinstance(p, kind):
            # for the reductions of `all_finite`; a dict, because the order must be the same on all ranks
            optimizer.__dict__.setdefault("_meshes", {})[p.device_mesh] = None
            fault = (
                _fault(optimizer, group["joint"], penalty, p)
                or _projection_fault(group.get("projection"), group["joint"], p)
                or _state_fault(optimizer, p)
            )
            if fault:
                where = (
                    f"a DTensor of shape {tuple(p.shape)} with placements {p.placements} on a mesh {tuple(p.device_mesh.shape)}"
                )
                raise ValueError(f"{label(optimizer, group, place)} ({where}) {fault}")


def check_step(optimizer: Penalised, group: ParamGroup, penalty: ProxOperator | None) -> None:
    """``check`` before a step, and warn once where no parameter at all has a gradient.

    This is the case if the model was sharded after the optimizer was constructed: the optimizer then holds parameters that the
    model no longer uses. ``check`` finds those that ``fully_shard`` marks, but earlier releases of torch do not mark them, and
    tensor parallelism never does.
    """
    check(optimizer, group, penalty)
    if torch.compiler.is_compiling() or _dtensor() is None or any(p.grad is not None for p in group["params"]):
        return
    if "_warned_of_no_gradient" in optimizer.__dict__ or not torch.distributed.is_initialized():
        return
    if all(p.grad is None for g in optimizer.param_groups for p in g["params"]):
        optimizer.__dict__["_warned_of_no_gradient"] = True
        warnings.warn(
            "step() found no gradient in any parameter, nothing is updated: if the model was sharded after this optimizer was "
            "constructed, construct it again from the parameters of the sharded model",
            stacklevel=2,
        )


def label(optimizer: Penalised, group: ParamGroup, place: int) -> str:
    """The name of a parameter of a group for error messages."""
    if "param_names" in group:
        return str(group["param_names"][place])
    number = next((i for i, g in enumerate(optimizer.param_groups) if g is group), None)
    return f"params[{place}]" if number is None else f"param_groups[{number}]['params'][{place}]"


def gathered(x: Tensor) -> Tensor:
    """The whole tensor of a DTensor, which is a collective on all its ranks; any other tensor unchanged."""
    whole: Tensor = x.full_tensor() if is_sharded(x) else x  # type: ignore[attr-defined]
    return whole


def is_sharded(x: object) -> bool:
    """Whether ``x`` is a DTensor."""
    kind = _dtensor()
    return kind is not None and isinstance(x, kind)


def all_finite(optimizer: Penalised, grads: Sequence[Tensor]) -> bool:
    """Whether the norm of the gradients is finite: if parameters are sharded, on all ranks that share them."""
    # one norm of all gradients, which is NaN or inf if an entry is, costs less than a test of every entry
    finite = torch.isfinite(get_total_norm([local(g) for g in grads]))
    if not optimizer.__dict__.get("_meshes"):
        return bool(finite)
    return not bool(_largest(optimizer, (~finite).reshape(1).to(torch.int32)).any())


def first_not_finite(optimizer: Penalised, grads: Sequence[Tensor | None]) -> tuple[int, str] | None:
    """The index of the first gradient that is not finite, and "NaN" or "inf", the same on all ranks; None if all are finite."""
    codes = torch.tensor([FINITE if g is None else _code(local(g)) for g in grads], dtype=torch.int32)
    for place, code in enumerate(_largest(optimizer, codes).tolist()):
        if code != FINITE:
            return place, "NaN" if code == NAN else "inf"
    return None


def _dtensor() -> Any:
    """The class DTensor; None while its module is not imported, for then there are no such tensors. The import takes a second."""
    return getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)


def local(x: Tensor) -> Tensor:
    """The shard of a DTensor on this rank; any other tensor unchanged."""
    kind = _dtensor()
    return x.to_local() if kind is not None and isinstance(x, kind) else x


def _code(x: Tensor) -> int:
    return NAN if bool(x.isnan().any()) else FINITE if bool(torch.isfinite(x).all()) else INF


def _largest(optimizer: Penalised, codes: Tensor) -> Tensor:
    """The maximum of the codes over the ranks of the optimizer's sharded parameters."""
    for mesh in optimizer.__dict__.get("_meshes", ()):
        if mesh.get_coordinate() is not None:
            codes = codes.to(mesh.device_type)
            for axis in range(mesh.ndim):
                torch.distributed.all_reduce(codes, torch.distributed.ReduceOp.MAX, group=mesh.get_group(axis))
    return codes


def _fault(optimizer: Penalised, joint: bool, penalty: ProxOperator | None, p: Any) -> str | None:
    """The end of an error message: why a penalty is not supported on a sharded parameter, and the remedy; None if it is."""
    if any(not (hasattr(q, "dim") or q.is_replicate()) for q in p.placements):
        return "must be sharded or replicated along each axis of the mesh"
    if penalty is None:
        return None
    if joint:
        return f"must not be in a joint group: take joint=False, {UNSHARDED}"
    if not (getattr(penalty, "elementwise", False) or declared.partition(penalty) is not None):
        return None
    levels = declared.levels(penalty)
    for owner in (penalty, *levels):
        for key in ("strength", "weights"):
            if _is_plain_array(getattr(owner, key, None)):
                return f"must have a number as {key}, got an array that is not sharded like it: take a number, {UNSHARDED}"
    for level in levels:
        groups = declared.partition(level)
        if groups is not None:
            median = optimizer.metric is not None and (getattr(level, "metric", None) or optimizer.metric) == "median"
            fault = _group_fault(groups, "penalty", p, median)
            if fault:
                return fault
    return None


def _projection_fault(projection: Any, joint: bool, p: Any) -> str | None:
    """Likewise for a projection with groups; any other receives the DTensor."""
    groups = declared.partition(projection)
    if groups is None:
        return None
    if joint:
        return f"must not be in a joint group with a projection: take joint=False, {UNSHARDED}"
    return _group_fault(groups, "projection", p)


def _group_fault(groups: Groups, owner: str, p: Any, median: bool = False) -> str | None:
    """Likewise for the groups of a projection, of a penalty, or of one level of a nested one."""
    if groups.kind == "labels":
        return f"must not have a {owner} with Groups.labels: take Groups.along or Groups.whole, {UNSHARDED}"
    shards = _shards(p)
    inside = groups.axes(p.ndim)
    elsewhere = f"shard another axis (shard_placement_fn of fully_shard), {UNSHARDED}"
    for axis in sorted(set(shards) & {a % p.ndim for a in inside}):
        if median:
            return (
                f"must not have groups along the sharded axis {axis} with the metric 'median', got {groups}: "
                f"take metric='exact' or 'support', {elsewhere}"
            )
        length, over = p.shape[axis], math.prod(shards[axis])
        if length % over or length == 1:  # torch does not drop a sharded axis, not even one of length 1
            uneven = f"the unevenly sharded axis {axis} ({length} over {over} ranks)"
            return f"must not have groups along {uneven}, got {groups}: {elsewhere}"
    for axis, counts in shards.items():
        if _smallest(p.shape[axis], counts) == 0:
            return (
                f"must have entries on every rank for a {owner} with groups, got {p.shape[axis]} along axis {axis} over "
                f"{math.prod(counts)} ranks: {elsewhere}"
            )
    return None


def _shards(p: Any) -> dict[int, list[int]]:
    """For each sharded axis, the numbers of parts into which the axes of the mesh split it, one after the other."""
    out: dict[int, list[int]] = {}
    for placement, size in zip(p.placements, p.device_mesh.shape):
        if hasattr(placement, "dim") and p.ndim:
            out.setdefault(placement.dim % p.ndim, []).append(size)
    return out


def _smallest(length: int, counts: list[int]) -> int:
    """Length of the last chunk, after ``length`` was split as by ``torch.chunk`` once for each of the counts."""
    for count in counts:
        length = max(length - -(-length // count) * (count - 1), 0)
    return length


def _is_plain_array(value: Any) -> bool:
    kind = _dtensor()
    return isinstance(value, (list, tuple)) or (getattr(value, "ndim", 0) > 0 and not isinstance(value, kind))


def _state_fault(optimizer: Penalised, p: Any) -> str | None:
    """The end of an error message about a state that is not sharded like its parameter; None if all are."""
    for key, value in optimizer.state.get(p, {}).items():
        if isinstance(value, Tensor) and value.shape == p.shape and p.ndim and not isinstance(value, type(p)):
            return (
                f"must have a sharded state, got a plain tensor as {key}: load a checkpoint with "
                "torch.distributed.checkpoint.state_dict.set_optimizer_state_dict, with full_state_dict=True if it is not sharded"
            )
    return None
