"""A smaller form of ``nn.MultiheadAttention``, which torch itself has none of: it needs queries of size ``embed_dim``.

The replacement is a ``torch.fx.GraphModule``, which is pickled with its code, so that a model that holds it loads without this
package. Its parameters have the names of the original.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import fx, nn
from torch.nn import functional as F

SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")

REQUIRED = ("query", "key", "value")
OPTIONAL = {
    "key_padding_mask": None,
    "need_weights": True,
    "attn_mask": None,
    "average_attn_weights": True,
    "is_causal": False,
}


def is_plain(module: nn.Module) -> bool:
    """Whether a module is an ``nn.MultiheadAttention`` with torch's own forward pass."""
    return isinstance(module, nn.MultiheadAttention) and type(module).forward is nn.MultiheadAttention.forward


def inner_size(module: Any) -> int:
    """The size of all heads together, after the tensors of the module were sliced."""
    weight = module.in_proj_weight if module.in_proj_weight is not None else module.q_proj_weight
    return int(weight.shape[0]) // (3 if module.in_proj_weight is not None else 1)


def is_smaller(module: Any) -> bool:
    """Whether the tensors of an ``nn.MultiheadAttention`` no longer have the sizes that it was built with."""
    return bool(inner_size(module) != module.embed_dim or module.out_proj.weight.shape[0] != module.embed_dim)


def smaller(module: Any) -> Any:
    """A module that computes the attention of an ``nn.MultiheadAttention`` whose tensors were sliced.

    The head size is that of the original, so that the number of heads follows from the tensors. Where heads and queries still
    have the same size, the result is ``module`` itself with new sizes.
    """
    inner, queries = inner_size(module), _query_size(module)
    heads = inner // module.head_dim
    if inner == queries == module.out_proj.weight.shape[0]:
        module.embed_dim, module.num_heads = inner, heads
        keys = (module.k_proj_weight, module.v_proj_weight) if module.in_proj_weight is None else (module.in_proj_weight,) * 2
        module.kdim, module.vdim = (weight.shape[1] for weight in keys)
        return module
    root = nn.Module()
    tensors = [key for key in ("in_proj_weight", *SEPARATE, "in_proj_bias", "bias_k", "bias_v") if _has(module, key)]
    for key in tensors:
        setattr(root, key, getattr(module, key))
    root.out_proj = module.out_proj
    # ``nn.TransformerEncoderLayer`` looks at these attributes. A GraphModule keeps, when it is pickled and copied, only what its
    # graph uses, so that they are modules that return their argument: an empty Sequential is False.
    root.batch_first = nn.Identity() if module.batch_first else nn.Sequential()
    root._qkv_same_embed_dim = nn.Sequential()
    if "in_proj_bias" not in tensors:
        root.in_proj_bias = nn.Sequential()
    replacement = fx.GraphModule(root, _graph(module, tensors, inner, heads), "MultiheadAttention")
    replacement.num_heads, replacement.head_dim, replacement.dropout = heads, module.head_dim, module.dropout
    return replacement.train(module.training)


def _has(module: Any, key: str) -> bool:
    return getattr(module, key, None) is not None


def _query_size(module: Any) -> int:
    weight = module.in_proj_weight if module.in_proj_weight is not None else module.q_proj_weight
    return int(weight.shape[1])


def _graph(module: Any, tensors: list[str], inner: int, heads: int) -> fx.Graph:
    """The forward pass of ``nn.MultiheadAttention`` with queries that are projected before attention, to the size of the heads.

    ``F.multi_head_attention_forward`` applies the square projection of the queries that it asks for: an identity.
    """
    graph = fx.Graph()
    given: dict[str, Any] = {name: graph.placeholder(name) for name in REQUIRED}
    given |= {name: graph.placeholder(name, default_value=value) for name, value in OPTIONAL.items()}
    held: dict[str, Any] = {key: graph.get_attr(key) for key in tensors}
    if "in_proj_weight" in held:
        parts = graph.call_method("chunk", (held["in_proj_weight"], 3))
        weights = [graph.call_function(operator.getitem, (parts, index)) for index in range(3)]
    else:
        weights = [held[key] for key in SEPARATE]
    query = graph.call_function(F.linear, (given["query"], weights[0]))
    identity = graph.call_method("diag", (graph.call_method("new_ones", (weights[0], inner)),))
    sequences = [query, given["key"], given["value"]]
    if module.batch_first:  # to sequence first; sequences without batch have two dimensions and are returned unchanged
        sequences = [graph.call_method("transpose", (x, 0, -2)) for x in sequences]
    out_bias = graph.get_attr("out_proj.bias") if module.out_proj.bias is not None else None
    attended = graph.call_function(
        F.multi_head_attention_forward,
        (
            *sequences,
            inner,
            heads,
            None,
            held.get("in_proj_bias"),
            held.get("bias_k"),
            held.get("bias_v"),
            module.add_zero_attn,
            module.dropout,
            graph.get_attr("out_proj.weight"),
            out_bias,
        ),
        {
            "training": _training(graph, "in_proj_bias" not in held),
            "use_separate_proj_weight": True,
            "q_proj_weight": identity,
            "k_proj_weight": weights[1],
            "v_proj_weight": weights[2],
            **{name: given[name] for name in OPTIONAL},
        },
    )
    output = graph.call_function(operator.getitem, (attended, 0))
    if module.batch_first:
        output = graph.call_method("transpose", (output, 0, -2))
    graph.output((output, graph.call_function(operator.getitem, (attended, 1))))
    return graph


def _training(graph: fx.Graph, without_bias: bool) -> fx.Node:
    """A node with the present mode of the module.

    Unpickling traces the code again, where ``self.training`` would become a constant; that of a module which a leaf returns does
    not.
    """
    node = graph.get_attr("out_proj")
    for name in ("batch_first", "_qkv_same_embed_dim", *(["in_proj_bias"] if without_bias else [])):
        node = graph.call_module(name, (node,))
    return graph.call_function(getattr, (node, "training"))
