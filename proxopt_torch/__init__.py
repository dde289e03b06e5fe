"""Proximal optimizers for torch: drop-in replacements whose steps land on exact zeros."""

try:
    import torch as _torch  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise ModuleNotFoundError('proxopt_torch needs PyTorch: pip install "proxopt[torch]"', name="torch") from error

from proxopt_torch import groups
from proxopt_torch.base import ProximalOptimizer
from proxopt_torch.budgets import Budget, BudgetRecord
from proxopt_torch.compaction import Compacted, compact, load_compact
from proxopt_torch.optimizers import HAPG, AdamHAPG, ProxAdam, ProxSGD
from proxopt_torch.proximal import Proximal
from proxopt_torch.report import SparsityReport, max_strength, sparsity_report
from proxopt_torch.strength_path import StrengthPath

__all__ = [
    "HAPG",
    "AdamHAPG",
    "Budget",
    "BudgetRecord",
    "Compacted",
    "ProxAdam",
    "ProxSGD",
    "Proximal",
    "ProximalOptimizer",
    "SparsityReport",
    "StrengthPath",
    "compact",
    "groups",
    "load_compact",
    "max_strength",
    "sparsity_report",
]
