"""How each operator passes units on: one rule per ATen operator, in the table ``RULES``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from .flow import Affine, Even, Flow, Step, where
from .trace import args_of, module_path, shape_of
from .units import Block, Ints, Link, Piece, Read

Rule = Callable[[Flow, fx.Node], None]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Enter a rule into the table for operators of these names, in all overloads."""

    def enter(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return enter


def argument(node: fx.Node, name: str, default: Any = None) -> Any:
    """An argument of an operator by its name in the schema."""
    for k, entry in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if entry.name == name:
            if k < len(args_of(node)):
                return args_of(node)[k]
            if name in node.kwargs:
                return node.kwargs[name]
            return entry.default_value if entry.has_default_value() else default
    return default


def apply(flow: Flow, node: fx.Node) -> None:
    """Apply the rule of an operator; one without rule pins everything that it takes."""
    if shape_of(node) is None and not isinstance(node.meta.get("val"), (tuple, list)):
        if flow.tensors(node) and base_name(node) not in NOT_READ:
            flow.barrier(node)  # a number computed from a tensor
        return
    found = RULES.get(base_name(node))
    if found is None and torch.Tag.pointwise in getattr(node.target, "tags", ()):
        found = elementwise
    if any(x in flow.volatile for x in flow.tensors(node)) or node in flow.volatile:
        flow.barrier(node, f"{where(node)} uses a tensor that is changed through a view of it")
    elif found is None:
        flow.barrier(node)
    else:
        try:
            found(flow, node)
        except (AttributeError, IndexError, KeyError, StopIteration, TypeError, ValueError):
            # Arguments that the rule was not written for. What it has united stays united, which is safe.
            flow.barrier(node)


def base_name(node: fx.Node) -> str:
    """The name of an operator without overload, and without the underscore of those that work in place."""
    name = str(node.target).split(".")[1] if "." in str(node.target) else getattr(node.target, "__name__", str(node.target))
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


NOT_READ = {"_assert_tensor_metadata", "sym_size", "sym_numel", "sym_stride", "_assert_scalar"}


def axis(dim: Any, count: int) -> int:
    return int(dim) % max(count, 1)


def axes(dims: Any, count: int) -> set[int]:
    if dims is None or (isinstance(dims, (list, tuple)) and not dims):
        return set(range(count))
    return {axis(d, count) for d in (dims if isinstance(dims, (list, tuple)) else [dims])}


# Elementwise operators.


def elementwise(flow: Flow, node: fx.Node) -> None:
    """Indices that meet in an aligned dimension are removed together; dimensions of size 1 are broadcast."""
    shape = flow.shape(node)
    step = flow.step(node, "elementwise")
    operands = []
    for x in flow.tensors(node):
        count = len(flow.shape(x))
        if count > len(shape):
            return flow.barrier(node)
        operands.append((x, tuple(range(len(shape) - count, len(shape)))))
    _elementwise(flow, step, operands, len(shape))


def _elementwise(flow: Flow, step: Step, operands: list[tuple[fx.Node, tuple[int, ...]]], count: int) -> None:
    """The blocks of an output with the dimensions of the joint index space."""
    pieces = flow.pieces(operands)
    for joined in flow.join(step, operands, count, pieces):
        flow.put(step, operands, joined, {d: d for d in joined.block.dims})
    if all(flow.stored(x) for x, _ in operands):
        return
    added = base_name(step.node) in ("add", "sub", "rsub")
    for piece in pieces:
        if flow.stored(operands[piece.operand][0]):
            owner = flow.owner(int(piece.block.atoms.flat[0]))
            flow.roles.setdefault(owner, "computes" if added or owner[0].endswith("bias") else "scales")


# Elementwise operators that torch does not tag as such.
COPIES = ["clone", "contiguous", "to", "_to_copy", "detach", "alias", "lift_fresh_copy", "float", "half", "double"]
FUNCTIONS = ["relu6", "selu", "celu", "rrelu", "log_sigmoid", "hardtanh", "hardswish", "softplus", "square", "rsub"]
FUNCTIONS += ["clamp_min", "clamp_max", "masked_fill", "where", "dropout", "alpha_dropout", "feature_dropout"]
FUNCTIONS += ["__and__", "__or__", "__xor__", "__lshift__", "__rshift__"]
rule(*COPIES, *FUNCTIONS)(elementwise)


@rule("type_as")
def _type_as(flow: Flow, node: fx.Node) -> None:
    step = flow.step(node, "same")
    x = args_of(node)[0]
    for source, block in enumerate(flow.blocks(x)):
        flow.take(step, x, source, block.dims, _positions(block))


@rule("_weight_norm")
def _weight_norm(flow: Flow, node: fx.Node) -> None:
    """The rows of a weight by their own scales; the norm of a row combines the other dimensions."""
    direction, scale = args_of(node)[:2]
    dim = axis(argument(node, "dim", 0), len(flow.shape(direction)))
    step = flow.step(node)
    operands = [(direction, tuple(range(len(flow.shape(direction))))), (scale, tuple(range(len(flow.shape(scale)))))]
    for piece in flow.pieces(operands):
        if piece.block.dims != (dim,):
            flow.lose(step, operands[piece.operand][0], piece.source, f"{where(node)} combines all of them")
    for joined in flow.join(step, operands, len(flow.shape(node)), [p for p in flow.pieces(operands) if p.block.dims == (dim,)]):
        flow.put(step, operands, joined, {dim: dim})


@rule("glu")
def _glu(flow: Flow, node: fx.Node) -> None:
    """The two halves are multiplied."""
    x = args_of(node)[0]
    dim = axis(argument(node, "dim", -1), len(flow.shape(x)))
    step = flow.step(node, "glu")
    for source, block in enumerate(flow.blocks(x)):
        if dim not in block.dims:
            flow.take(step, x, source, block.dims, _positions(block))
            continue
        place = block.dims.index(dim)
        half = block.atoms.shape[place] // 2
        flow.even.append(Even(block.atoms, place, [half, 2 * half], f"{where(node)} splits them into two halves"))
        first, second = np.split(_positions(block), 2, place)
        atoms = block.atoms.ravel()
        flow.atoms.unite(atoms[first], atoms[second])
        index = flow.add(step, Block(block.dims, atoms[first]))
        for part in (first, second):
            _link_or_read(step, x, source, part.ravel(), index, np.arange(part.size))


@rule("prelu")
def _prelu(flow: Flow, node: fx.Node) -> None:
    x, weight = args_of(node)[:2]
    count = len(flow.shape(x))
    step = flow.step(node, "prelu")
    _elementwise(flow, step, [(x, tuple(range(count))), (weight, (min(1, count - 1),))], count)


# Operators that move, repeat or select entries.


def _positions(block: Block) -> Ints:
    return np.arange(block.atoms.size).reshape(block.atoms.shape)


def _moved(flow: Flow, node: fx.Node, place: Callable[[int], int]) -> Step:
    """The blocks of the first input with the dimension d at place(d)."""
    step = flow.step(node, "same")
    for source, block in enumerate(flow.blocks(args_of(node)[0])):
        flow.take(step, args_of(node)[0], source, [place(d) for d in block.dims], _positions(block))
    return step


@rule("permute")
def _permute(flow: Flow, node: fx.Node) -> None:
    order = [axis(d, len(args_of(node)[1])) for d in args_of(node)[1]]
    _moved(flow, node, order.index)


@rule("transpose", "swapaxes", "swapdims", "t", "numpy_T", "mT", "adjoint")
def _transpose(flow: Flow, node: fx.Node) -> None:
    count = len(flow.shape(node))
    if base_name(node) == "numpy_T":
        _moved(flow, node, lambda d: count - 1 - d)
        return
    named = list(args_of(node)[1:]) if len(args_of(node)) > 1 else [0, 1] if base_name(node) == "t" else [-2, -1]
    a, b = (axis(d, count) for d in named[:2]) if count > 1 else (0, 0)
    _moved(flow, node, lambda d: b if d == a else a if d == b else d)


@rule("movedim", "moveaxis")
def _movedim(flow: Flow, node: fx.Node) -> None:
    count = len(flow.shape(node))
    old, new = ([axis(d, count) for d in (a if isinstance(a, (list, tuple)) else [a])] for a in args_of(node)[1:3])
    order = [d for d in range(count) if d not in old]
    for target, source in sorted(zip(new, old)):
        order.insert(target, source)
    _moved(flow, node, order.index)


@rule("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as")
def _reshape(flow: Flow, node: fx.Node) -> None:
    """Dimensions are grouped into the smallest sets whose sizes multiply to the same; blocks over a set are reshaped with it."""
    x = args_of(node)[0]
    if str(node.target).endswith("view.dtype"):
        return flow.barrier(node)
    old, new = flow.shape(x), flow.shape(node)
    if base_name(node) not in ("squeeze", "unsqueeze"):
        flow.views.append(node)
    step = flow.step(node, "same")
    if 0 in old:
        return
    sets = _matched(old, new)
    touched = [{k for k, (a, _) in enumerate(sets) if set(a) & set(block.dims)} for block in flow.blocks(x)]
    for source, block in enumerate(flow.blocks(x)):
        mine = touched[source]
        others = [flow.blocks(x)[k] for k, other in enumerate(touched) if k != source and mine & other]
        fixed = [flow.atoms.pinned(b.atoms) for b in (block, *others)] if others else []
        # One of them passes: the first that can be removed.
        if any((is_fixed, b.dims) < (fixed[0], block.dims) for is_fixed, b in zip(fixed[1:], others)):
            flow.lose(step, x, source, f"{where(node)} merges them into a dimension that is cut in another way")
            continue
        before = [d for k in sorted(mine) for d in sets[k][0]]
        after = [d for k in sorted(mine) for d in sets[k][1]]
        size = [block.atoms.shape[block.dims.index(d)] if d in block.dims else 1 for d in before]
        at = np.broadcast_to(_positions(block).reshape(size), [old[d] for d in before]).reshape([new[d] for d in after])
        _take_varying(flow, step, x, source, after, at)


def _matched(old: tuple[int, ...], new: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """The smallest sets of neighbouring dimensions with the same product before and after a view."""
    sets, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        a, b = [i] if i < len(old) else [], [j] if j < len(new) else []
        p, q = (old[i] if a else 1), (new[j] if b else 1)
        i, j = i + len(a), j + len(b)
        while p != q:
            if p < q:
                a, p, i = [*a, i], p * old[i], i + 1
            else:
                b, q, j = [*b, j], q * new[j], j + 1
        sets.append((a, b))
    return sets


def _take_varying(flow: Flow, step: Step, x: fx.Node, source: int, dims: list[int], at: Ints) -> None:
    """A block with positions ``at`` of one of the input, without the dimensions along which the atoms are the same (a batch)."""
    atoms = flow.blocks(x)[source].atoms.ravel()[at]
    kept = [k for k in range(at.ndim) if at.shape[k] > 1 and bool((atoms != atoms.take([0], k)).any())]
    kept = kept or [int(np.argmax(at.shape))]
    sizes = [n if k in kept else 1 for k, n in enumerate(at.shape)]
    targets = np.broadcast_to(np.arange(int(np.prod(sizes))).reshape(sizes), at.shape)
    first = tuple(slice(None) if k in kept else 0 for k in range(at.ndim))
    index = flow.add(step, Block(tuple(dims[k] for k in kept), atoms[first]))
    _link_or_read(step, x, source, at.ravel(), index, targets.ravel())


@rule("expand", "expand_as", "broadcast_to")
def _expand(flow: Flow, node: fx.Node) -> None:
    """Copies along a new dimension: any of them can be removed (queries that share one key and value head)."""
    x, shape = args_of(node)[0], flow.shape(node)
    more = len(shape) - len(flow.shape(x))
    flow.views.append(node)
    step = _moved(flow, node, lambda d: d + more)
    old = (1,) * more + flow.shape(x)
    for dim, size in enumerate(node.meta["val"].shape):
        if isinstance(size, int) and size > 1 and old[dim] == 1 and not (dim == 0 and size in flow.trace.batches):
            flow.add(step, Block((dim,), flow.atoms.new(size)))


@rule("repeat", "tile")
def _repeat(flow: Flow, node: fx.Node) -> None:
    x = args_of(node)[0]
    more = len(flow.shape(node)) - len(flow.shape(x))
    step = flow.step(node, "same")
    for source, block in enumerate(flow.blocks(x)):
        dims = [d + more for d in block.dims]
        times = [flow.shape(node)[d] // n for d, n in zip(dims, block.atoms.shape)]
        flow.take(step, x, source, dims, np.tile(_positions(block), times))


@rule("repeat_interleave")
def _repeat_interleave(flow: Flow, node: fx.Node) -> None:
    x, times, dim = args_of(node)[0], argument(node, "repeats"), argument(node, "dim")
    if not isinstance(times, int) or dim is None:
        return flow.barrier(node)
    step = flow.step(node, "same")
    for source, block in enumerate(flow.blocks(x)):
        at = _positions(block)
        place = axis(dim, len(flow.shape(x)))
        if place in block.dims:
            at = at.repeat(times, block.dims.index(place))
        flow.take(step, x, source, block.dims, at)


def _selected(flow: Flow, node: fx.Node, x: fx.Node, dim: int, chosen: Any, drop: bool = False) -> None:
    """The entries ``chosen`` (a slice, or an index) of a dimension; drop: the output lacks the dimension."""
    step = flow.step(node, "same")
    for source, block in enumerate(flow.blocks(x)):
        at = _positions(block)
        dims = list(block.dims)
        if dim in dims:
            place = dims.index(dim)
            kept = at[(slice(None),) * place + (slice(chosen, chosen + 1) if drop else chosen,)]
            whole = base_name(node) == "getitem"  # of a split, whose other parts are read too
            if flow.stored(x) and kept.size < at.size and not whole:
                gone = np.setdiff1d(at.ravel(), kept.ravel())
                flow.atoms.pin(block.atoms.flat[gone], f"{where(node)} takes as many as the input needs")
            if drop:
                flow.rigid.append((block.atoms, place))
                if len(dims) == 1:
                    flow.atoms.pin(block.atoms, f"{where(node)} takes one by its index")
            if kept.size == 0:
                continue
            if drop:
                kept, dims = kept.squeeze(place), dims[:place] + dims[place + 1 :]
            at = kept
        flow.take(step, x, source, [d - (drop and d > dim) for d in dims], at)


@rule("slice", "narrow")
def _slice(flow: Flow, node: fx.Node) -> None:
    x = args_of(node)[0]
    dim = axis(argument(node, "dim", 0), len(flow.shape(x)))
    start = argument(node, "start")
    if base_name(node) == "narrow":
        end, jump = start + argument(node, "length") if isinstance(start, int) else None, 1
    else:
        end, jump = argument(node, "end"), argument(node, "step", 1)
    if any(isinstance(v, fx.Node) for v in (start, end, jump)):
        if any(dim in block.dims for block in flow.blocks(x)):
            return flow.barrier(node, f"{where(node)} takes as many as the input needs")
        start = end = None
    if jump != 1:  # what is skipped would change
        for block in flow.blocks(x):
            if block.dims == (dim,):
                flow.atoms.pin(block.atoms, f"{where(node)} takes every {jump}th of them")
            elif dim in block.dims:
                flow.atoms.collapse(block, {dim})
    flow.views.append(node)
    _selected(flow, node, x, dim, slice(start, end, jump))


@rule("select")
def _select(flow: Flow, node: fx.Node) -> None:
    x = args_of(node)[0]
    dim, index = axis(args_of(node)[1], len(flow.shape(x))), args_of(node)[2]
    if not isinstance(index, int):
        return flow.barrier(node, f"{where(node)} takes one by an index that is computed")
    _selected(flow, node, x, dim, index % flow.shape(x)[dim], drop=True)


@rule("chunk", "split", "split_with_sizes", "unbind", "tensor_split", "unsafe_chunk", "unsafe_split")
def _parts(flow: Flow, node: fx.Node) -> None:
    """The parts are read by getitem. Those of a count, or of one size, must stay equal."""
    flow.step(node, "same")
    flow.views.append(node)
    sizes = argument(node, "split_sizes", argument(node, "split_size"))
    if base_name(node) == "unbind" or isinstance(sizes, (list, tuple)):
        return
    x = args_of(node)[0]
    dim = axis(argument(node, "dim", 0), len(flow.shape(x)))
    ends = list(np.cumsum([part.shape[dim] for part in node.meta["val"]]))
    for block in flow.blocks(x):
        if dim in block.dims:
            reason = f"{where(node)} splits them into {len(ends)} parts of the same size"
            flow.even.append(Even(block.atoms, block.dims.index(dim), [int(n) for n in ends], reason))


@rule("getitem")
def _getitem(flow: Flow, node: fx.Node) -> None:
    whole, k = args_of(node)
    name = base_name(whole)
    if name in ("chunk", "split", "split_with_sizes", "tensor_split", "unsafe_chunk", "unsafe_split", "unbind"):
        x = args_of(whole)[0]
        dim = axis(argument(whole, "dim", 0), len(flow.shape(x)))
        if name == "unbind":
            return _selected(flow, node, x, dim, k % flow.shape(x)[dim], drop=True)
        sizes = [int(np.asarray(part.shape[dim])) for part in whole.meta["val"]]
        k %= len(sizes)
        return _selected(flow, node, x, dim, slice(sum(sizes[:k]), sum(sizes[: k + 1])))
    found = RESULTS.get(name)
    if found is None:
        flow.step(node)  # a barrier pinned the inputs
    else:
        found(flow, node)


@rule("cat", "concat", "concatenate")
def _cat(flow: Flow, node: fx.Node) -> None:
    parts = [x for x in args_of(node)[0] if 0 not in flow.shape(x)]
    count = len(flow.shape(node))
    dim = axis(argument(node, "dim", 0), count)
    step = flow.step(node, "same")
    along = {x: [k for k, block in enumerate(flow.blocks(x)) if dim in block.dims] for x in parts}
    if any(along.values()):
        _cat_tracked(flow, step, parts, dim, along)
    operands = [(x, tuple(range(count))) for x in parts]
    pieces = [p for p in flow.pieces(operands) if dim not in p.block.dims]
    taken = {d for block in step.blocks for d in block.dims}
    for joined in flow.join(step, operands, count, pieces):
        if taken & set(joined.block.dims):
            flow.put(step, operands, joined, {}, f"{where(node)} joins tensors that are cut differently")
        else:
            flow.put(step, operands, joined, {d: d for d in joined.block.dims})


def _cat_tracked(flow: Flow, step: Step, parts: list[fx.Node], dim: int, along: dict[fx.Node, list[int]]) -> None:
    """Concatenation along a dimension that can be cut in some parts; those of the others are fixed."""
    every = [flow.blocks(x)[k] for x in parts for k in along[x]]
    dims = every[0].dims
    shape = [flow.shape(parts[0])[d] for d in dims]
    place = dims.index(dim)
    same = all(block.dims == dims for block in every) and (len(dims) == 1 or all(along[x] for x in parts))
    if not same:
        for x in parts:
            for k in along[x]:
                flow.lose(step, x, k, f"{where(step.node)} joins tensors that are cut differently")
        return
    arrays = []
    for x in parts:
        if along[x]:
            arrays.append(flow.blocks(x)[along[x][0]].atoms)
        else:
            shape[place] = flow.shape(x)[dim]
            fresh = flow.atoms.new(*shape)
            flow.atoms.pin(fresh, f"{where(step.node)} joins it to a tensor of fixed size")
            arrays.append(fresh)
    atoms = np.concatenate(arrays, place)
    index = flow.add(step, Block(dims, atoms))
    start = 0
    numbers = np.arange(atoms.size).reshape(atoms.shape)
    for x, array in zip(parts, arrays):
        stop = start + array.shape[place]
        targets = numbers[(slice(None),) * place + (slice(start, stop),)].ravel()
        for k in along[x]:
            if index is not None:
                step.links.append(Link(x, k, np.arange(array.size), index, targets))
        start = stop


@rule("stack")
def _stack(flow: Flow, node: fx.Node) -> None:
    """Like cat of tensors with one dimension more, of size 1."""
    count = len(flow.shape(node))
    dim = axis(argument(node, "dim", 0), count)
    step = flow.step(node, "same")
    others = tuple(d for d in range(count) if d != dim)
    operands = [(x, others) for x in args_of(node)[0]]
    if any(len(block.dims) > 1 for x, _ in operands for block in flow.blocks(x)):
        return flow.barrier(node, f"{where(node)} stacks tensors that are cut in several dimensions")
    for joined in flow.join(step, operands, count):
        flow.put(step, operands, joined, {d: d for d in joined.block.dims})


@rule("roll", "flip")
def _roll(flow: Flow, node: fx.Node) -> None:
    x = args_of(node)[0]
    count = len(flow.shape(x))
    dims = argument(node, "dims")
    moved = axes(dims, count)
    step = flow.step(node, "same")
    for source, block in enumerate(flow.blocks(x)):
        if moved & set(block.dims):
            flow.lose(step, x, source, f"{where(node)} moves them by a fixed number")
        else:
            flow.take(step, x, source, block.dims, _positions(block))


@rule("pad", "constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d")
def _pad(flow: Flow, node: fx.Node) -> None:
    x = args_of(node)[0]
    count, sizes = len(flow.shape(x)), args_of(node)[1]
    before = {count - 1 - k // 2: n for k, n in enumerate(sizes) if k % 2 == 0}
    padded = {count - 1 - k // 2 for k, n in enumerate(sizes) if n != 0}
    constant = base_name(node) == "constant_pad_nd" or (
        base_name(node) == "pad" and argument(node, "mode", "constant") == "constant"
    )
    step = flow.step(node, "zero" if constant and not argument(node, "value") else "varies" if constant else "same")
    for source, block in enumerate(flow.blocks(x)):
        grown = padded & set(block.dims)
        if not grown:
            flow.take(step, x, source, block.dims, _positions(block))
        elif len(block.dims) == 1 and constant and isinstance(before[block.dims[0]], int) and before[block.dims[0]] >= 0:
            _pad_tracked(flow, step, x, source, before[block.dims[0]])
        elif len(block.dims) > len(grown):
            flow.atoms.collapse(block, grown)
            reduce_block(flow, step, x, source, grown, {d: d for d in range(count)})
        else:
            flow.lose(step, x, source, f"{where(node)} adds to them")


def _pad_tracked(flow: Flow, step: Step, x: fx.Node, source: int, before: int) -> None:
    """Zero channels around those of the input (a shortcut of a residual network without weights)."""
    block = flow.blocks(x)[source]
    size = flow.shape(step.node)[block.dims[0]]
    if size < before + block.atoms.size:
        return flow.lose(step, x, source, f"{where(step.node)} cuts some off")
    atoms = flow.atoms.new(size)
    flow.atoms.pin(atoms[:before], f"{where(step.node)} adds a fixed number of channels")
    flow.atoms.pin(atoms[before + block.atoms.size :], f"{where(step.node)} adds a fixed number of channels")
    atoms[before : before + block.atoms.size] = block.atoms
    index = flow.add(step, Block(block.dims, atoms))
    if index is not None:
        here = np.arange(block.atoms.size)
        step.links.append(Link(x, source, here, index, here + before))


@rule("index", "index_select")
def _index(flow: Flow, node: fx.Node) -> None:
    """Entries that are looked up stay; dimensions beside those looked up pass where their place is certain."""
    x = args_of(node)[0]
    count, result = len(flow.shape(x)), len(flow.shape(node))
    if base_name(node) == "index_select":
        indices = [None] * axis(args_of(node)[1], count) + [args_of(node)[2]]
    else:
        indices = list(args_of(node)[1])
    places = [d for d, i in enumerate(indices) if i is not None]
    step = flow.step(node, "same")
    for index in indices:
        for source in range(len(flow.blocks(index))):
            flow.lose(step, index, source, f"{where(node)} uses them as an index")
    adjacent = bool(places) and places == list(range(places[0], places[-1] + 1))
    masks = any(i is not None and i.meta["val"].dtype in (torch.bool, torch.uint8) for i in indices)
    more = result - (count - len(places))
    for source, block in enumerate(flow.blocks(x)):
        if set(places) & set(block.dims) or not adjacent or masks:
            flow.lose(step, x, source, f"{where(node)} looks them up by an index")
        else:
            flow.take(step, x, source, [d if d < places[0] else d - len(places) + more for d in block.dims], _positions(block))


@rule("embedding")
def _embedding(flow: Flow, node: fx.Node) -> None:
    weight, index = args_of(node)[:2]
    step = flow.step(node, "same")
    for source in range(len(flow.blocks(index))):
        flow.lose(step, index, source, f"{where(node)} uses them as an index")
    for source, block in enumerate(flow.blocks(weight)):
        if 0 in block.dims:
            flow.lose(step, weight, source, f"{where(node)} looks them up by an index")
        else:
            flow.role(weight, 1, "computes")
            flow.take(step, weight, source, [len(flow.shape(node)) - 1], _positions(block))


@rule("pixel_shuffle")
def _pixel_shuffle(flow: Flow, node: fx.Node) -> None:
    """r * r neighbouring channels become one."""
    x = args_of(node)[0]
    dim, square = len(flow.shape(x)) - 3, args_of(node)[1] ** 2
    step = flow.step(node, "same")
    for source, block in enumerate(flow.blocks(x)):
        if block.dims == (dim,):
            grouped = Block((dim, dim + 1), block.atoms.reshape(-1, square))
            flow.atoms.collapse(grouped, {dim + 1})
            index = flow.add(step, Block((dim,), grouped.atoms[:, 0]))
            targets = np.arange(block.atoms.size) // square
            _link_or_read(step, x, source, np.arange(block.atoms.size), index, targets)
        elif set(block.dims) & {dim, dim + 1, dim + 2}:
            flow.lose(step, x, source, f"{where(node)} mixes them")
        else:
            flow.take(step, x, source, block.dims, _positions(block))


@rule("pixel_unshuffle", "im2col")
def _pixel_unshuffle(flow: Flow, node: fx.Node) -> None:
    """Each channel becomes several neighbouring ones."""
    x = args_of(node)[0]
    shape, new = flow.shape(x), flow.shape(node)
    dim = len(shape) - 3
    step = flow.step(node, "same" if base_name(node) == "pixel_unshuffle" else "zero")
    for source, block in enumerate(flow.blocks(x)):
        if block.dims == (dim,):
            flow.take(step, x, source, [dim], _positions(block).repeat(new[dim] // shape[dim]))
        elif set(block.dims) & {dim, dim + 1, dim + 2}:
            flow.lose(step, x, source, f"{where(node)} mixes them")
        else:
            flow.take(step, x, source, block.dims, _positions(block))


def _link_or_read(step: Step, x: fx.Node, source: int, positions: Ints, index: int | None, targets: Ints) -> None:
    if index is None:
        step.reads.append(Read(x, source, positions))
    else:
        step.links.append(Link(x, source, positions, index, targets))


# Operators that combine all entries along some dimensions.


def reduce_block(flow: Flow, step: Step, x: fx.Node, source: int, dims: set[int], place: dict[int, int]) -> None:
    """A block without some dimensions, along which its atoms are united; place: dimension of the input -> of the output."""
    block = flow.blocks(x)[source]
    flow.atoms.collapse(block, dims & set(block.dims))
    operands = [(x, tuple(range(len(flow.shape(x)))))]
    for joined in flow.join(step, operands, len(flow.shape(x)), [p for p in flow.pieces(operands) if p.source == source]):
        flow.put(step, operands, joined, {d: place[d] for d in joined.block.dims if d not in dims})


def combine(flow: Flow, node: fx.Node, dims: set[int], value: str, keep: bool, read: fx.Node | None = None) -> Step:
    """An operator that mixes entries along ``dims``: whole slices across them can go, single entries cannot.

    keep: the output still has these dimensions.
    """
    x = args_of(node)[0] if read is None else read
    count = len(flow.shape(x))
    place = {d: d if keep else d - sum(e < d for e in dims) for d in range(count)}
    step = flow.step(node, value)
    for source, block in enumerate(flow.blocks(x)):
        if not dims & set(block.dims):
            flow.take(step, x, source, [place[d] for d in block.dims], _positions(block))
        elif set(block.dims) <= dims:
            flow.lose(step, x, source, f"{where(node)} combines all of them")
        else:
            reduce_block(flow, step, x, source, dims, place)
    return step


@rule("mean", "amax", "amin")
def _mean(flow: Flow, node: fx.Node) -> None:
    combine(flow, node, axes(argument(node, "dim"), len(flow.shape(args_of(node)[0]))), "same", bool(argument(node, "keepdim")))


@rule("sum", "norm", "linalg_vector_norm", "std", "var", "logsumexp", "prod", "argmax", "argmin", "any", "all")
def _sum(flow: Flow, node: fx.Node) -> None:
    zero = base_name(node) in ("sum", "norm", "linalg_vector_norm", "std", "var")
    dims = axes(argument(node, "dim"), len(flow.shape(args_of(node)[0])))
    combine(flow, node, dims, "zero" if zero else "varies", bool(argument(node, "keepdim")))


@rule("softmax", "_softmax", "log_softmax", "_log_softmax", "cumsum", "cumprod", "argsort", "normalize")
def _softmax(flow: Flow, node: fx.Node) -> None:
    zero = base_name(node) in ("cumsum", "cumprod", "normalize")
    dims = axes(argument(node, "dim"), len(flow.shape(args_of(node)[0])))
    combine(flow, node, dims, "zero" if zero else "varies", True)


@rule("sort")
def _sort(flow: Flow, node: fx.Node) -> None:
    flow.step(node)  # pairs of (values, indices) are read by getitem


def _sort_result(flow: Flow, node: fx.Node) -> None:
    whole, k = args_of(node)
    x = args_of(whole)[0]
    combine(flow, node, axes(argument(whole, "dim"), len(flow.shape(x))), "varies" if k else "same", True, read=x)


@rule("max", "min")
def _max(flow: Flow, node: fx.Node) -> None:
    if len(flow.tensors(node)) > 1:
        return elementwise(flow, node)
    if argument(node, "dim") is None:
        combine(flow, node, axes(None, len(flow.shape(args_of(node)[0]))), "same", False)
    else:
        flow.step(node)  # pairs of (values, indices) are read by getitem


def _max_result(flow: Flow, node: fx.Node) -> None:
    whole, k = args_of(node)
    x = args_of(whole)[0]
    dims = axes(argument(whole, "dim"), len(flow.shape(x)))
    combine(flow, node, dims, "varies" if k else "same", bool(argument(whole, "keepdim")), read=x)


def _pool_dims(flow: Flow, node: fx.Node) -> set[int]:
    spatial = int("".join(c for c in base_name(node) if c.isdigit())[0])
    count = len(flow.shape(args_of(node)[0]))
    return set(range(count - spatial, count))


POOLS = [f"{kind}_pool{n}d" for kind in ("avg", "max", "adaptive_avg", "adaptive_max", "lp") for n in (1, 2, 3)]


@rule(*POOLS)
def _pool(flow: Flow, node: fx.Node) -> None:
    if shape_of(node) is None:
        return flow.barrier(node)  # with indices
    constant = base_name(node).startswith(("max", "adaptive"))  # others pad with zeros, or scale by the size of the window
    combine(flow, node, _pool_dims(flow, node), "same" if constant else "zero", True)


KINDS = ("nearest", "nearest_exact", "linear", "bilinear", "bicubic", "trilinear")
UPSAMPLE = [f"{start}upsample_{kind}{n}d{end}" for start in ("", "_") for kind in KINDS for n in (1, 2, 3) for end in ("", "_aa")]


@rule(*UPSAMPLE)
def _upsample(flow: Flow, node: fx.Node) -> None:
    count = len(flow.shape(args_of(node)[0]))
    combine(flow, node, set(range(2, count)), "same", True)


# Norms.


@rule("batch_norm", "instance_norm")
def _batch_norm(flow: Flow, node: fx.Node) -> None:
    """Each channel has its own statistics, weight and bias. Statistics of the batch mix the other dimensions."""
    x = args_of(node)[0]
    count = len(flow.shape(x))
    stored = [a for a in args_of(node)[1:5] if isinstance(a, fx.Node)]
    if any(len(flow.shape(s)) != 1 for s in stored):
        return flow.barrier(node)
    step = flow.step(node, "batch_norm")
    operands = [(x, tuple(range(count))), *((s, (1,)) for s in stored)]
    batch = argument(node, "training") or argument(node, "use_input_stats")
    if batch and any(len(block.dims) > 1 or block.dims != (1,) for block in flow.blocks(x)):
        return flow.barrier(node, f"{where(node)} takes statistics of the batch")
    _elementwise(flow, step, operands, count)


@rule("layer_norm", "rms_norm")
def _layer_norm(flow: Flow, node: fx.Node) -> None:
    x, shape = args_of(node)[0], args_of(node)[1]
    count = len(flow.shape(x))
    dims = set(range(count - len(shape), count))
    stored = [a for a in args_of(node)[2:4] if isinstance(a, fx.Node)]
    step = flow.step(node, "norm")
    operands = [(x, tuple(range(count))), *((s, tuple(sorted(dims))) for s in stored)]
    reason = f"{where(node)} combines all of them"
    whole = [block for block in flow.blocks(x) if dims & set(block.dims)]
    if all(set(block.dims) <= dims for block in whole) and (len(dims) == 1 or not whole):
        for block in whole:
            flow.atoms.pin(block.atoms, reason)
        _mixed(flow, step, x, [k for k, block in enumerate(flow.blocks(x)) if block in whole])
        return _elementwise(flow, step, operands, count)
    for block in whole:
        if set(block.dims) <= dims:
            flow.atoms.pin(block.atoms, reason)
    for s in stored:  # the same for all slices that can be removed
        for source in range(len(flow.blocks(s))):
            flow.lose(step, s, source, reason)
    blocks, step.reads = step.reads, []
    combine(flow, node, dims, "varies", True)
    flow.steps[node].reads += blocks


def _mixed(flow: Flow, step: Step, x: fx.Node, sources: list[int]) -> None:
    """Each position is read by all positions of the output."""
    for source in sources:
        step.reads.append(Read(x, source, np.arange(flow.blocks(x)[source].atoms.size)))


@rule("group_norm")
def _group_norm(flow: Flow, node: fx.Node) -> None:
    """Whole groups of channels can be removed."""
    x, groups = args_of(node)[0], args_of(node)[1]
    count = len(flow.shape(x))
    stored = [a for a in args_of(node)[2:4] if isinstance(a, fx.Node)]
    step = flow.step(node, "group_norm")
    operands = [(x, tuple(range(count))), *((s, (1,)) for s in stored)]
    if any(block.dims != (1,) for block in flow.blocks(x)):
        return flow.barrier(node, f"{where(node)} combines all of them")
    _elementwise(flow, step, operands, count)
    for source, block in enumerate(flow.blocks(x)):
        array = block.atoms.reshape(groups, -1)
        if groups == 1:
            flow.atoms.pin(array, f"{where(node)} combines all of them")
        flow.atoms.unite(array[:, :1], array)
        flow.views.append(node)
        # Each output depends on all channels of its group.
        index = next(link.block for link in step.links if link.node is x)
        places = np.arange(array.size).reshape(array.shape)
        pairs = np.broadcast_arrays(places[:, :, None], places[:, None, :])
        step.links.append(Link(x, source, pairs[0].ravel(), index, pairs[1].ravel()))


# Layers with weights.


def _fold(flow: Flow, node: fx.Node, weight: Any, bias: Any) -> str:
    """The bias that a constant can be added to: that of the operator, or a new one of a layer without. Empty: there is none."""
    name = flow.name(bias)
    if name is not None:
        once = _uses(flow, bias) == 1 and (flow.name(weight) is None or _uses(flow, weight) == 1)
        return name if once and isinstance(flow.trace.tensors[name], torch.nn.Parameter) else ""
    if bias is not None:
        return ""
    path, owner = module_path(node), flow.name(weight)
    try:
        module = flow.trace.model.get_submodule(path)
    except AttributeError:
        return ""
    layers = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
    own = isinstance(module, layers) and module.bias is None and owner is not None
    same = own and flow.trace.tensors[str(owner)] is module.weight
    return path if same and len(weight.users) == 1 else ""


def _uses(flow: Flow, node: fx.Node) -> int:
    """How many operators use a tensor, under all its names."""
    name = flow.trace.names.get(node)
    return sum(len(n.users) for n, other in flow.trace.names.items() if other == name)


def affine(
    flow: Flow,
    node: fx.Node,
    x: fx.Node,
    channel: int,
    weight: fx.Node,
    rows: int,
    columns: int,
    bias: Any = None,
    space: frozenset[int] = frozenset(),
    groups: int = 1,
    padded: bool = False,
    order: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """A layer that maps channels to channels.

    channel: the dimension of the input, and of the output, that holds them. rows, columns: those of the weight for the
    channels of the output and of the input. space: dimensions of the input along which the layer mixes. order: arranges the
    weight as (groups, rows, columns, taps).
    """
    if any(isinstance(w, fx.Node) and not flow.stored(w) for w in (weight, bias)):
        return flow.barrier(node, f"{where(node)} has a weight that depends on the input")
    step = flow.step(node, "affine")
    source, at = channels(flow, step, x, channel, space)
    out = flow.shape(node)[channel]
    by_dim = {block.dims: block.atoms for block in flow.blocks(weight)}
    row_atoms, column_atoms = by_dim.get((rows,)), by_dim.get((columns,))
    for k, block in enumerate(flow.blocks(weight)):
        if len(block.dims) > 1 and {rows, columns} & set(block.dims):
            flow.lose(step, weight, k, f"{where(node)} uses a weight that is computed from several")
    if groups > 1:
        row_atoms = _grouped(flow, step, x, source, at, weight, row_atoms, column_atoms, rows, columns, groups, out)
    else:
        flow.role(weight, rows, "computes")
        flow.role(weight, columns, "reads")
        if source is not None and column_atoms is not None:
            flow.atoms.unite(flow.blocks(x)[source].atoms.ravel()[at], column_atoms[:, None])
        elif source is not None:
            flow.lose(step, x, source, f"{where(node)} uses a weight that cannot be cut")
        elif column_atoms is not None:
            flow.atoms.pin(column_atoms, f"{where(node)} reads the input of the model, or a tensor that cannot be cut")
    made = None
    if row_atoms is not None and row_atoms.size == out:
        made = flow.add(step, Block((channel,), row_atoms))
    for k, block in enumerate(flow.blocks(bias)) if bias is not None else ():
        if row_atoms is not None and block.atoms.shape == row_atoms.shape:
            flow.atoms.unite(block.atoms, row_atoms)
            flow.role(bias, block.dims[0], "computes")
        else:
            flow.lose(step, bias, k, f"{where(node)} has a weight that cannot be cut")
    arrange = order or (lambda w: w.reshape(1, *w.shape, 1))
    step.affine = Affine(x, source, at, made, weight, arrange, bias, padded, _fold(flow, node, weight, bias))


def channels(flow: Flow, step: Step, x: fx.Node, channel: int, space: frozenset[int]) -> tuple[int | None, Ints]:
    """The block with the input channels, and its positions for each; the other blocks pass."""
    found, at = None, np.zeros((flow.shape(x)[channel], 0), np.int64)
    for source, block in enumerate(flow.blocks(x)):
        dims = set(block.dims)
        if channel in dims and dims <= space | {channel}:
            flow.atoms.collapse(block, dims - {channel})
            at = np.moveaxis(_positions(block), block.dims.index(channel), 0).reshape(flow.shape(x)[channel], -1)
            found = source
        elif channel in dims:
            flow.lose(step, x, source, f"{where(step.node)} is applied to each of them with the same weight")
        elif dims <= space:
            flow.lose(step, x, source, f"{where(step.node)} combines all of them")
        elif dims & space:
            reduce_block(flow, step, x, source, set(space), {d: d for d in range(len(flow.shape(x)))})
        else:
            flow.take(step, x, source, block.dims, _positions(block))
    return found, at


def _grouped(
    flow: Flow,
    step: Step,
    x: fx.Node,
    source: int | None,
    at: Ints,
    weight: fx.Node,
    row_atoms: Ints | None,
    column_atoms: Ints | None,
    rows: int,
    columns: int,
    groups: int,
    out: int,
) -> Ints | None:
    """A grouped convolution loses whole groups, with the channels that they take and make."""
    transposed = rows == 1
    inside, across = (row_atoms, column_atoms) if transposed else (column_atoms, row_atoms)
    if inside is not None:
        flow.atoms.pin(inside, f"{where(step.node)} has the same number of channels in each group")
    if transposed:
        made = flow.atoms.new(out)
        if across is not None:
            flow.atoms.unite(across.reshape(groups, -1)[:, :1], across.reshape(groups, -1))
            flow.atoms.unite(across.reshape(groups, -1)[:, :1], made.reshape(groups, -1))
        flow.role(weight, columns, "computes")
    else:
        made = across if across is not None else flow.atoms.new(out)
        flow.role(weight, rows, "scales" if groups == out == len(at) else "computes")
    first = made.reshape(groups, -1)[:, :1]
    flow.atoms.unite(first, made.reshape(groups, -1))
    if source is None:
        flow.atoms.pin(made, f"{where(step.node)} reads the input of the model, or a tensor that cannot be cut")
    else:
        flow.atoms.unite(first, flow.blocks(x)[source].atoms.ravel()[at].reshape(groups, -1))
    return made


@rule("linear")
def _linear(flow: Flow, node: fx.Node) -> None:
    x, weight = args_of(node)[:2]
    if len(flow.shape(weight)) != 2:
        return flow.barrier(node)
    affine(flow, node, x, len(flow.shape(x)) - 1, weight, 0, 1, argument(node, "bias"))


@rule("addmm")
def _addmm(flow: Flow, node: fx.Node) -> None:
    bias, x, weight = args_of(node)[:3]
    if not flow.stored(weight) or len(flow.shape(bias)) != 1 or argument(node, "beta", 1) != 1 or argument(node, "alpha", 1) != 1:
        return flow.barrier(node)
    affine(flow, node, x, 1, weight, 1, 0, bias, order=_columns_first)


def _columns_first(weight: Tensor) -> Tensor:
    return weight.t().reshape(1, weight.shape[1], weight.shape[0], 1)


@rule("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "convolution")
def _conv(flow: Flow, node: fx.Node) -> None:
    x, weight = args_of(node)[:2]
    bias, groups = argument(node, "bias"), argument(node, "groups", 1)
    transposed = "transpose" in base_name(node) or bool(argument(node, "transposed"))
    taps = len(flow.shape(weight)) - 2
    channel = len(flow.shape(x)) - taps - 1
    space = frozenset(range(channel + 1, channel + 1 + taps))
    padding = argument(node, "padding", 0)
    padding = [padding] if isinstance(padding, int) else padding
    padded = transposed or (padding != "valid" if isinstance(padding, str) else any(padding))

    def order(w: Tensor) -> Tensor:
        w = w.flatten(2)
        if transposed:
            return w.reshape(groups, -1, *w.shape[1:]).transpose(1, 2)
        return w.reshape(groups, -1, *w.shape[1:])

    rows, columns = (1, 0) if transposed else (0, 1)
    affine(flow, node, x, channel, weight, rows, columns, bias, space, groups, padded, order)


# Products of two tensors.


def contract(flow: Flow, node: fx.Node, operands: list[tuple[fx.Node, tuple[int, ...]]], out: dict[int, int], count: int) -> Step:
    """A sum of products over the dimensions of a joint index space that the output lacks."""
    step = flow.step(node, "product")
    weighted = any(flow.stored(x) for x, _ in operands)
    reason = "" if weighted else f"{where(node)} sums over them, and their number may be part of a scale"
    for x, labels in operands if not all(flow.stored(x) for x, _ in operands) else ():
        for dim, label in enumerate(labels):
            flow.role(x, dim, "computes" if label in out else "reads")
    summed = frozenset() if weighted else frozenset(range(count)) - set(out)
    for joined in flow.join(step, operands, count, summed=summed):
        if not weighted and len({p.operand for p in joined.pieces}) > 1 and set(joined.block.dims) & set(out):
            flow.atoms.mark(joined.block.atoms, "attention heads")
        flow.put(step, operands, joined, out, reason)
    return step


@rule("matmul", "mm", "bmm", "mv", "dot")
def _matmul(flow: Flow, node: fx.Node) -> None:
    a, b = (x for x in args_of(node)[:2])
    m, n = len(flow.shape(a)), len(flow.shape(b))
    if n == 2 and flow.stored(b) and not flow.stored(a) and m >= 2:
        return affine(flow, node, a, m - 1, b, 1, 0, order=_columns_first)
    if m < 2 or n < 2:
        return flow.barrier(node)
    batch = max(m, n) - 2
    operands = [(a, (*range(batch - m + 2, batch), batch, batch + 1)), (b, (*range(batch - n + 2, batch), batch + 1, batch + 2))]
    contract(flow, node, operands, {**{d: d for d in range(batch + 1)}, batch + 2: batch + 1}, batch + 3)


@rule("baddbmm")
def _baddbmm(flow: Flow, node: fx.Node) -> None:
    added, a, b = (x for x in args_of(node)[:3])
    shape = flow.shape(added)
    if any(flow.blocks(added)) or len(shape) > 3:
        return flow.barrier(node)
    operands = [(a, (0, 1, 2)), (b, (0, 2, 3)), (added, (*range(3 - len(shape), 2), 3))]
    contract(flow, node, operands, {0: 0, 1: 1, 3: 2}, 4).value = "varies"


@rule("einsum")
def _einsum(flow: Flow, node: fx.Node) -> None:
    equation, parts = args_of(node)[0].replace(" ", ""), list(args_of(node)[1])
    if "..." in equation or "->" not in equation:
        return flow.barrier(node, f"{where(node)} is written with '...' or without '->'")
    left, right = equation.split("->")
    terms = left.split(",")
    letters = list(dict.fromkeys(right + left.replace(",", "")))
    if any(len(set(term)) < len(term) for term in terms):
        return flow.barrier(node, f"{where(node)} takes a diagonal")
    operands = [(x, tuple(letters.index(c) for c in term)) for x, term in zip(parts, terms)]
    contract(flow, node, operands, {letters.index(c): k for k, c in enumerate(right)}, len(letters))


@rule("scaled_dot_product_attention")
def _attention(flow: Flow, node: fx.Node) -> None:
    """Queries, keys and values of a head are removed with its outputs.

    The graph gets a node for the scores, the products of queries and keys, which stand between them and the values.
    """
    q, k, v = args_of(node)[:3]
    mask = argument(node, "attn_mask")
    count = len(flow.shape(q))
    batch = tuple(range(count - 2))
    heads, length, other, inner = count - 3, count - 2, count - 1, count
    with flow.trace.graph.inserting_before(node):
        scores = flow.trace.graph.call_function(torch.ops.aten.matmul.default, (q, k))
    shape = (*flow.shape(q)[:-1], flow.shape(k)[-2])
    scores.meta = {**node.meta, "val": torch.empty(shape, device="meta")}
    step = flow.step(scores)
    operands = [(q, (*batch, length, inner)), (k, (*batch, other, inner))]
    if mask is not None:
        labels = (*batch, length, other)
        operands.append((mask, labels[len(labels) - len(flow.shape(mask)) :]))
    reason = f"{where(node)} combines all of them"
    for joined in flow.join(step, operands, count + 1, _grouped_queries(flow, node, operands, heads), frozenset({inner})):
        flow.put(step, operands, joined, {d: d for d in range(count)}, reason)
    step = flow.step(node, "attention" if mask is None and not argument(node, "dropout_p") else "attention with mask")
    step.operands = [v]
    operands = [(scores, (*batch, length, other)), (v, (*batch, other, inner))]
    for joined in flow.join(step, operands, count + 1, _grouped_queries(flow, node, operands, heads), frozenset({other})):
        if heads in joined.block.dims:
            flow.atoms.mark(joined.block.atoms, "attention heads")
        flow.put(step, operands, joined, {**{d: d for d in (*batch, length)}, inner: count - 1}, reason)


def _grouped_queries(flow: Flow, node: fx.Node, operands: list[tuple[fx.Node, tuple[int, ...]]], dim: int) -> list[Piece]:
    """The blocks of the operands; a key or value head that several queries share stands once for each of them."""
    pieces = flow.pieces(operands)
    if not argument(node, "enable_gqa"):
        return pieces
    return [_repeated(p, dim, flow.shape(node)[dim]) for p in pieces]


def _repeated(piece: Piece, dim: int, size: int) -> Piece:
    """A key or value head that several queries share, once for each."""
    if dim not in piece.block.dims or piece.block.atoms.shape[place := piece.block.dims.index(dim)] == size:
        return piece
    times = size // piece.block.atoms.shape[place]
    block = Block(piece.block.dims, piece.block.atoms.repeat(times, place))
    return Piece(piece.operand, piece.source, block, piece.at.repeat(times, place))


# Recurrent layers.


# Tensors that hold nothing of the input.


@rule("zeros", "ones", "full", "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full")
def _filled(flow: Flow, node: fx.Node) -> None:
    """Any slice of a tensor that holds one number can be removed; its sizes stand in the code of the model."""
    shape = flow.shape(node)
    step = flow.step(node, "filled")
    symbolic = [not isinstance(size, int) for size in node.meta["val"].shape]
    for dim, size in enumerate(shape):
        if size > 1 and not symbolic[dim] and not (dim == 0 and size in flow.trace.batches):
            flow.add(step, Block((dim,), flow.atoms.new(size)))
    flow.views.append(node)


@rule("empty", "arange", "rand", "randn", "randint", "randperm", "linspace", "eye", "scalar_tensor", "tril_indices", "tensor")
@rule("empty_like", "rand_like", "randn_like", "randint_like", "new_empty", "bernoulli", "multinomial")
def _new(flow: Flow, node: fx.Node) -> None:
    """Nothing of the input is read but its size."""
    flow.step(node)


@rule("gather", "tril", "triu", "one_hot", "bincount", "topk", "searchsorted", "isin")
def _positions_matter(flow: Flow, node: fx.Node) -> None:
    flow.barrier(node, f"{where(node)} depends on their positions")


RESULTS: dict[str, Rule] = {"max": _max_result, "min": _max_result, "sort": _sort_result}
