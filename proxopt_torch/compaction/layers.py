"""Sizes that layers hold as numbers beside their tensors."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from proxopt_torch import wrappers
from proxopt_torch.compaction import attention

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMS = (nn.modules.batchnorm._NormBase,)

KNOWN = (
    *(nn.Linear, nn.Bilinear, *CONVS, *TRANSPOSED, *NORMS, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.PReLU),
    *(nn.Embedding, nn.EmbeddingBag, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention),
)


def is_known(module: nn.Module) -> bool:
    """Whether ``refresh`` sets the sizes that a module holds."""
    return isinstance(module, KNOWN)


def refresh(model: nn.Module) -> nn.Module:
    """Set the sizes of all layers to those of their tensors, and replace attention layers that cannot have such sizes.

    Returns ``model``, or its replacement where it is an attention layer itself.
    """
    for module in list(model.modules()):
        _refresh(module)
    for module in list(model.modules()):
        if attention.is_plain(module) and attention.is_smaller(module):
            new = attention.smaller(module)
            _replace(model, module, new)
            model = new if module is model else model
    for module in model.modules():
        # its nested tensors, for masks of padding, are only for layers that torch fuses
        if isinstance(module, nn.TransformerEncoder) and any(isinstance(part, fx.GraphModule) for part in module.modules()):
            module.use_nested_tensor = False
    return model


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a module in the place of another, wherever the model holds it."""
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if child is old and key == wrappers.COMPILED:  # what was compiled is the call of the old one
                _replace(model, parent, new)
            elif child is old:
                parent._modules[key] = new


def _refresh(module: Any) -> None:
    weight: Any = getattr(module, "weight", None)
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, nn.Bilinear):
        module.out_features, module.in1_features, module.in2_features = weight.shape
    elif isinstance(module, CONVS):
        module.groups = groups_left(weight.shape[0], module.out_channels, module.groups)
        module.in_channels, module.out_channels = weight.shape[1] * module.groups, weight.shape[0]
    elif isinstance(module, TRANSPOSED):
        module.groups = groups_left(weight.shape[0], module.in_channels, module.groups)
        module.in_channels, module.out_channels = weight.shape[0], weight.shape[1] * module.groups
    elif isinstance(module, NORMS):
        held = module.running_mean if module.running_mean is not None else weight
        if held is not None:
            module.num_features = len(held)
    elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        if weight is not None:
            module.normalized_shape = tuple(weight.shape)
    elif isinstance(module, nn.GroupNorm):
        if weight is not None:
            module.num_groups = groups_left(len(weight), module.num_channels, module.num_groups)
            module.num_channels = len(weight)
    elif isinstance(module, nn.PReLU):
        module.num_parameters = weight.numel()
    elif isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        module.num_embeddings, module.embedding_dim = weight.shape
    elif isinstance(module, nn.RNNBase):
        _refresh_recurrent(module)
    elif isinstance(module, nn.RNNCellBase):
        module.input_size, module.hidden_size = module.weight_ih.shape[1], module.weight_hh.shape[1]
    elif isinstance(getattr(module, "nf", None), int) and getattr(weight, "ndim", 0) == 2:  # Conv1D of transformers
        if isinstance(getattr(module, "nx", None), int):
            module.nx = weight.shape[0]
        module.nf = weight.shape[1]


def _refresh_recurrent(module: Any) -> None:
    module.input_size = module.weight_ih_l0.shape[1]
    if module.proj_size:
        module.proj_size = module.weight_hr_l0.shape[0]
        module.hidden_size = module.weight_hr_l0.shape[1]
    else:
        module.hidden_size = module.weight_hh_l0.shape[1]
    module._flat_weights = [getattr(module, name, None) for name in module._flat_weights_names]
    module._init_flat_weights()


def groups_left(channels: int, before: int, groups: int) -> int:
    """The number of groups with ``channels`` of the ``before`` channels left: whole groups go, so that they keep their size."""
    return groups if channels == before else max(1, channels // (before // groups))
