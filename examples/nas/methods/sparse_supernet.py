"""SparseNAS: architecture weights multiply the paths of the supernet, under a sparse group lasso and updated by HAPG or AdamHAPG.

Any number of paths and nodes may remain. `optimizer="adam"` is the baseline of the paper's Table 5 and Fig. 7: Adam on the loss
plus the penalty, by its subgradient, and a hard threshold at the end.

    min_A L_val(w*(A), A) + strength * (l1_ratio ||A||_1 + (1 - l1_ratio) sum_n sqrt(size_n) ||A_n||_2)

A_n are the weights of all paths into node n of a cell type: 14, 21, 28 and 35 entries in the DARTS space, 4, 8, ..., 32 in the
recurrent one. The strength (lambda in the paper) starts at 0 and grows by `strength_step` in each epoch.

The sound rule (`--rule sound`, settings.sparse_supernet.sound) keeps this idea and changes how the steps are taken:

    A >= 0,  ||A_e||_2 = 1 for each edge e:   the loss does not see the common size of the weights, so it is held fixed, and the
                                              penalty acts on the shares of the paths
    q = prox(A - lr grad),  p = project(q),  A = project(q + min(cap, u) (q - p_before)):   HAPG with one step size for all
                                              entries and a capped extrapolation
    the network weights are trained alone in the first epochs; both gradients come from one pass over each batch (`levels=1`),
    which is new data in the first pass through the images; every path ends in a batch norm; a weight that has become zero stays
    zero, and is removed from A without rescaling the others

Not in the paper: the guard, which keeps every cell connected (see `Guard`). The columns guarded_... of the table count its
interventions in each epoch; with `guard=False` a search ends with an error as soon as a cell has no path left.

Source: Wu, Liu, Huang, Wang, Zhang, Van Gool, "Neural architecture search as sparse supernet", AAAI 2021.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from proxopt import Groups, NonNegative, SparseGroupLasso, Sphere
from proxopt_torch import HAPG, AdamHAPG, ProximalOptimizer

from ..bilevel.host_copy import HostCopy
from ..engine.settings import cosine
from ..space.genotype import AnyGenotype
from ..space.spaces import Masks, Space, Weights
from .connected import check_connected
from .sparse_rules import spheres, strengths

BETAS = (0.5, 0.999)  # of Adam and AdamHAPG


class SparseSupernet:
    """SparseNAS. parameters: the architecture weights, a vector for each cell, at the search point A.

    On an accelerator the flags of the nonzero paths come to the host while the device computes the weight step, so that no step
    waits for the device. A weight step therefore computes the paths that were nonzero before the architecture step in front of
    it: a path that this one made zero is computed once more, and one that it made nonzero again from the next step on. Likewise
    the architecture is frozen before the next step, not before the weight step. On a CPU both happen at once.
    """

    name = "sparse_supernet"

    def __init__(self, space: Space, settings: Any, device: torch.device) -> None:
        self.space, self.settings, self.cells = space, settings, space.layout.cells
        self.spheres = spheres(space, settings.hold_norm)
        start = [settings.init + 1e-3 * torch.randn(len(space.paths(c))) for c in self.cells]
        if self.spheres:
            start = [self.spheres[cell].project(a) for cell, a in zip(self.cells, start)]
        self.parameters = [nn.Parameter(a.to(device)) for a in start]
        self.lr = settings.arch_lr if settings.arch_lr is not None else settings.usual_lr[settings.optimizer]
        self.strength_of, self.strength = strengths(settings), 0.0
        self.penalties = {cell: self._penalty(cell) for cell in self.cells}
        self.optimizer = self._optimizer()
        self.guards = {cell: Guard(space, cell, device, self.spheres.get(cell)) for cell in self.cells}
        self.is_final = self.waits = False
        self._lags = device.type != "cpu"
        self._masks: Masks | None = None  # on an accelerator: of the search point, as last read
        self._copied: HostCopy | None = None  # flags of the search point and of the prox point, not yet read

    @property
    def frozen(self) -> bool:
        """Whether the architecture is not trained: it is final, or its first step is still to come."""
        return self.is_final or self.waits

    def _penalty(self, cell: str) -> SparseGroupLasso | NonNegative:
        s = self.settings
        metric = s.metric if s.optimizer == "adamhapg" else None
        penalty = SparseGroupLasso(0.0, s.l1_ratio, Groups.labels(self.space.nodes(cell)), metric=metric)
        return NonNegative(penalty) if s.nonnegative else penalty

    def _optimizer(self) -> torch.optim.Optimizer:
        if self.settings.optimizer == "adam":
            return torch.optim.Adam(self.parameters, self.lr, BETAS)
        groups = [
            {"params": [(cell, a)], "penalty": self.penalties[cell], "projection": self.spheres.get(cell)}
            for cell, a in zip(self.cells, self.parameters)
        ]
        cap: Any = self.settings.cap if self.settings.cap < 1 else "nesterov"
        if self.settings.optimizer == "adamhapg":
            return AdamHAPG(groups, lr=self.lr, extrapolation=cap, betas=BETAS)
        return HAPG(groups, lr=self.lr, extrapolation=cap)

    def begin_epoch(self, epoch: int) -> None:
        self.waits = epoch < self.settings.frozen_epochs
        self._set_strength(self.strength_of(epoch))
        for guard in self.guards.values():
            guard.count.zero_()
        if self.settings.optimizer == "hapg" and not self.settings.constant_arch_lr:
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr * cosine(epoch / self.settings.epochs)

    def _set_strength(self, strength: float) -> None:
        self.strength = strength
        self.penalties = {cell: penalty.with_strength(strength) for cell, penalty in self.penalties.items()}
        if isinstance(self.optimizer, ProximalOptimizer):
            for group in self.optimizer.param_groups:
                group["strength"] = strength

    def weights(self) -> Weights:
        return dict(zip(self.cells, self.parameters))

    def begin_step(self) -> None:
        """Read the flags that the last update has sent to the host."""
        if self._copied is None:
            return
        flags, self._copied = self._copied.tolist(), None
        sizes = [len(a) for a in self.parameters]
        split = [flags[sum(sizes[:i]) : sum(sizes[: i + 1])] for i in range(len(sizes))]
        self._masks = dict(zip(self.cells, split))
        self._freeze_at_target(sum(flags[sum(sizes) :]))

    def active_paths(self) -> Masks | None:
        masks = self._masks
        if masks is None:
            masks = {cell: (a != 0).tolist() for cell, a in zip(self.cells, self.parameters)}
        if self._lags:
            self._masks = masks
        if not self.settings.guard:
            check_connected(self.space.genotype(masks).clean(), self.strength)
        return None if all(map(all, masks.values())) else masks

    def needs_zeroed_paths(self, step: int) -> bool:
        every = self.settings.probe_every
        return every > 0 and step % every == 0

    def update(self, grads: list[Tensor]) -> None:
        if self.settings.optimizer == "adam":
            self._subgradient_step(grads)
        else:
            self._prox_step(grads)
        self._follow()

    def _subgradient_step(self, grads: list[Tensor]) -> None:
        """Take a step of Adam on loss + penalty, with the symmetric subgradient of the penalty, 0 at 0."""
        for cell, a, g in zip(self.cells, self.parameters, grads):
            a.grad = g + torch.autograd.grad(self.penalties[cell].value(a), a)[0]
        self.optimizer.step()

    @torch.no_grad()
    def _prox_step(self, grads: list[Tensor]) -> None:
        before = self.point()
        for a, g in zip(self.parameters, grads):
            a.grad = g
        self.optimizer.step()
        for cell, a in zip(self.cells, self.parameters):
            point = self.optimizer.state[a]["point"]
            if self.settings.guard:
                self.guards[cell](a, point, before[cell])
            if not self.settings.probe_every:
                a.mul_(point != 0)  # the extrapolation would make the search point of a new zero nonzero again

    @torch.no_grad()
    def _follow(self) -> None:
        """Send the flags of an update to the host, or freeze the architecture there and then, where the device is the host."""
        if self._lags:
            flags = [a != 0 for a in self.parameters]
            self._copied = HostCopy(torch.cat([*flags, *self.flags().values()]))
        elif self.settings.target_paths:
            self._freeze_at_target(sum(int(mask.sum()) for mask in self.flags().values()))

    @torch.no_grad()
    def _freeze_at_target(self, paths: int) -> None:
        """Freeze the architecture at its prox point if `paths`, their number, has reached the target.

        Adam's prox point is its iterate, of which paths below the hard threshold become zero.
        """
        if not self.settings.target_paths or paths > self.settings.target_paths or self.is_final:
            return
        self.is_final, self._masks = True, None
        for cell, a, p in zip(self.cells, self.parameters, self.point().values()):
            a.copy_(torch.where(self._kept(cell, p)[0], p, 0) if self.settings.optimizer == "adam" else p)

    @torch.no_grad()
    def point(self) -> dict[str, Tensor]:
        state = self.optimizer.state
        return {cell: state.get(a, {}).get("point", a).detach().clone() for cell, a in zip(self.cells, self.parameters)}

    def _kept(self, cell: str, point: Tensor) -> tuple[Tensor, Tensor]:
        """Flags of the paths in the genotype, and whether it is the guard that keeps them."""
        s, guard = self.settings, self.guards[cell]
        kept = point.abs() > (s.cut * point.abs().max()).clamp_min(s.hard_threshold)
        lost = ~guard.connects(torch.where(kept, point, 0))
        return (torch.where(lost, guard.backbone(point), kept) if s.guard else kept), lost

    def flags(self) -> dict[str, Tensor]:
        """Flags of the nonzero paths at the prox point, on the device."""
        return {cell: self._kept(cell, p)[0] for cell, p in self.point().items()}

    def masks(self) -> Masks:
        """Flags of the nonzero paths at the prox point."""
        return {cell: flags.tolist() for cell, flags in self.flags().items()}

    def genotype(self) -> AnyGenotype:
        found = self.space.genotype(self.masks()).clean()
        check_connected(found, self.strength)
        return found

    def log(self) -> dict[str, float]:
        point = self.point()
        value = sum(float(self.penalties[cell].value(p)) for cell, p in point.items())
        largest = max(float(a.detach().abs().max()) for a in self.parameters)
        own = {"strength": self.strength, "penalty": value, "largest_weight": largest}
        # paths that a threshold removes from the genotype only are restored once, in the genotype of the epoch
        return own | {f"guarded_{cell}": int(self.guards[cell].count + self._kept(cell, p)[1]) for cell, p in point.items()}

    def state_dict(self) -> dict[str, Any]:
        self.begin_step()
        return {
            "parameters": [a.detach() for a in self.parameters],
            "optimizer": self.optimizer.state_dict(),
            "strength": self.strength,
            "guarded": [guard.count for guard in self.guards.values()],
            "waits": self.waits,
            "rests": self.is_final,  # the key of release 0.1.0, whose checkpoints must load
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        torch._foreach_copy_(self.parameters, state["parameters"])
        self.optimizer.load_state_dict(state["optimizer"])
        # release 0.1.0 keeps the epoch, and has no counts
        self._set_strength(state["strength"] if "strength" in state else self.strength_of(state["path"]["epoch"]))
        for guard, count in zip(self.guards.values(), state.get("guarded", ())):
            guard.count.copy_(count)
        self.is_final, self.waits = state["rests"], state.get("waits", False)
        self._masks = self._copied = None


class Guard:
    """Keeps a cell connected: if no path from an input is left after a prox step, its strongest route is restored.

    Batch norms make the loss independent of the common scale of all weights, so a growing strength can zero a whole cell.
    Everything is computed on the device, without waiting for values on the host. sphere: where norms are held, the weights of the
    restored route have them too. count: the number of restorations.
    """

    def __init__(self, space: Space, cell: str, device: torch.device, sphere: Sphere | None = None) -> None:
        paths = space.paths(cell)
        into = lambda values: torch.tensor(values, device=device)
        self.nodes, self.inputs, self.outputs = space.layout.nodes, space.layout.inputs, space.layout.outputs
        self.sphere = sphere
        self.count = torch.zeros((), dtype=torch.int64, device=device)
        self.node = {n: into([p.node == n and p.operation != "none" for p in paths]) for n in self.nodes}
        self.source = {n: into([p.source == n for p in paths]) for n in (*self.inputs, *self.nodes)}

    def reachable(self, point: Tensor) -> dict[int, Tensor]:
        """For each node flags of its nonzero paths whose source is an input or a reachable node."""
        from_input = torch.stack([self.source[n] for n in self.inputs]).any(0)
        out = {}
        for n in self.nodes:
            out[n] = self.node[n] & from_input & (point != 0)
            from_input = from_input | (self.source[n] & out[n].any())
        return out

    def backbone(self, point: Tensor) -> Tensor:
        """Flags of the strongest route: the strongest path into the strongest node, then into its source, up to an input."""
        reachable = self.reachable(point)
        norms = torch.stack([torch.where(reachable[n], point, 0).norm() - 1e9 * (n not in self.outputs) for n in self.nodes])
        wanted = at(norms.argmax(), norms)
        kept = torch.zeros_like(point, dtype=torch.bool)
        for i, n in reversed(list(enumerate(self.nodes))):
            best = torch.where(reachable[n], point.abs(), -1).argmax()
            chosen = at(best, point) & reachable[n] & wanted[i]
            kept |= chosen
            below = torch.stack([(chosen & self.source[m]).any() for m in self.nodes])
            wanted = wanted | below
        return kept

    def connects(self, point: Tensor) -> Tensor:
        """Whether a nonzero path leads from an input to a node of the output."""
        reachable = self.reachable(point)
        return torch.stack([reachable[n].any() for n in self.outputs]).any()

    def __call__(self, search: Tensor, point: Tensor, before: Tensor) -> None:
        """Restore the strongest route of `before`, the last prox point, in place in both points if `point` is not connected."""
        connected = self.connects(point)
        self.count += ~connected
        repaired = torch.where(self.backbone(before), before, 0)
        if self.sphere is not None:
            repaired = self.sphere.project(repaired)
        search.copy_(torch.where(connected, search, repaired))
        point.copy_(torch.where(connected, point, repaired))


def at(index: Tensor, like: Tensor) -> Tensor:
    """Flags of the shape of a vector: True at this index."""
    return torch.arange(len(like), device=like.device) == index
