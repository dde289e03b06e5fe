"""Networks in JAX with the weights of networks in torch."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from nas.nets.jax import rnn
from nas.nets.torch import rnn as torch_rnn


def recurrent_like(net: torch_rnn.CellModel, model: rnn.LanguageModel) -> tuple[Any, nnx.State]:
    """The graph of `model`, and its parameters with the values of `net`, in double precision."""
    graph, params = nnx.split(model, nnx.Param)
    products = torch.stack([*net.products.values()])
    for name, value in {"embedding": net.embedding, "bias": net.bias, "entry": net.entry, "products": products}.items():
        params[name] = params[name].replace(jnp.array(value.detach().numpy()))
    return graph, params


def as_torch(tree: Any) -> Any:
    return jax.tree.map(lambda x: torch.from_numpy(np.array(x)), tree)
