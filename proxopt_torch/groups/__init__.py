"""Param groups from a model: which of its parameters become zero together.

Every function returns ``ParamGroups``, a list of param groups for an optimizer of proxopt_torch: first those with a penalty, then
one without, which holds all other parameters. Each parameter of the model is in exactly one of them. The results of several calls
are added with ``+``, and ``print`` shows what will be penalised.

Only parameters can become zero. A weight that is computed from others (weight_norm, a parametrization, a pruning mask), a buffer,
or a lazy layer before its first forward pass raises ValueError with its name and the remedy; ``coupled`` leaves it out and
reports it.
"""

from proxopt_torch.groups.coupling import coupled
from proxopt_torch.groups.layers import attention_heads, input_features, modules, output_channels
from proxopt_torch.groups.result import ParamGroups

__all__ = ["ParamGroups", "attention_heads", "coupled", "input_features", "modules", "output_channels"]
