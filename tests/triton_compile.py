"""Compile the Triton kernel for a device that this machine does not have: python tests/triton_compile.py

The interpreter accepts what the compiler refuses. Needs Triton, which brings the assembler; the environment variable
TRITON_INTERPRET must not be set.
"""

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from proxopt_torch.device import triton_steps
from proxopt_torch.device.triton_kernels import step_kernel

HOPPER = GPUTarget("cuda", 90, 32)
POINTERS = {
    "tensors": "*i64",
    **dict.fromkeys(("plain", "counted", "group_weight"), "*fp32"),
    **dict.fromkeys(("group_first", "group_size", "group_row", "group_problem", "tensor_of"), "*i32"),
    "base_of": "*i64",
    **dict.fromkeys(("length_of", "inner_of", "outer_of", "stride_of"), "*i32"),
}
KINDS = [
    ("prox_sgd", "one_step", "contiguous", torch.float32, 32),
    ("prox_sgd_tau", "one_step", "strided runs", torch.float16, 0),
    ("hapg", "none", "contiguous", torch.bfloat16, 1024),
    ("prox_adam", "exact", "contiguous", torch.float32, 1024),
    ("prox_adam", "exact", "strided", torch.float32, 256),
    ("prox_adam", "support", "strided runs", torch.float32, 8192),
    ("adam_hapg", "median", "strided", torch.bfloat16, 128),
    ("adam_hapg", "exact", "contiguous", torch.float32, 0),
]


def compiled(kind: triton_steps.Kind) -> bytes:
    """The program of a kind of groups."""
    constants = triton_steps.options(kind)
    flags = {name: constants.pop(name) for name in ("num_warps", "maxnreg")}
    names = step_kernel.arg_names
    signature = {name: POINTERS.get(name, "i32" if name == "n_groups" else "constexpr") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in POINTERS}
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(step_kernel, signature=signature, constexprs=values, attrs=aligned)
    return triton.compile(source, target=HOPPER, options=flags).asm["cubin"]


if __name__ == "__main__":
    for kind in KINDS:
        print(*kind, len(compiled(kind)), "bytes", flush=True)
