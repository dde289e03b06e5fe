"""Parameters and multiply-adds of a model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from proxopt_torch.compaction import verification
from proxopt_torch.dependencies import Arguments


def parameters(model: nn.Module) -> int:
    """The number of parameters; tied ones count once."""
    return sum(p.numel() for p in model.parameters())


def counted(model: nn.Module, given: Arguments) -> tuple[list[Tensor], int | None]:
    """The outputs of a model, and the multiply-adds of this pass; None where an operator does not run under the counter."""
    counter = FlopCounterMode(display=False, custom_mapping=more_operators())
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # the operators of fused layers are not counted
    try:
        with counter:
            outputs = verification.run(model, given)
        return outputs, counter.get_total_flops() // 2
    except Exception:
        torch.backends.mha.set_fastpath_enabled(fused)
        return verification.run(model, given), None
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def attention_macs(query: Sequence[int], key: Sequence[int], value: Sequence[int]) -> int:
    """The multiply-adds of attention, for the shapes (..., length, size): products with the keys, and with the values."""
    return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def recurrent_macs(sequence: Sequence[int], weights: Iterable[Sequence[int]]) -> int:
    """The multiply-adds of a recurrent layer, for shapes: every weight of its matrices acts once at each place of a sequence."""
    return math.prod(sequence[:-1]) * sum(math.prod(shape) for shape in weights)


def more_operators() -> dict[Any, Any]:
    """Operators of a CPU that torch does not count, with their numbers of operations."""

    def attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
        return 2 * attention_macs(query, key, value)

    def recurrent(sequence: Any, weight_ih: Any, weight_hh: Any, *args: Any, **kwargs: Any) -> int:
        return 2 * recurrent_macs(sequence, (weight_ih, weight_hh))

    return {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention,
        torch.ops.aten.mkldnn_rnn_layer: recurrent,
    }
