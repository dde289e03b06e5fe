"""Strengths that make a network reach a given cost."""

from proxopt_torch.budgets.budget import Budget, BudgetRecord

__all__ = ["Budget", "BudgetRecord"]
