"""Removal of zeroed channels, heads, neurons and inputs from a network, which becomes smaller and computes the same function."""

from proxopt_torch.compaction.loading import load_compact
from proxopt_torch.compaction.result import Compacted
from proxopt_torch.compaction.surgery import compact

__all__ = ["Compacted", "compact", "load_compact"]
