"""Sums over channels: matrix products, convolutions, attention, reductions."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from compressor.graph.labels import HIDDEN, Axis, Following, Value, compact, flat

ZERO_OF_ZEROS = frozenset(
    ["sum", "mean", "amax", "amin", "max", "min", "norm", "linalg_vector_norm", "std", "var", "cumsum"]
)
NOT_ZERO = "is not zero where its channel is masked"


def contract(run: Following, left: Value, right: Value, where: str) -> Value:
    """left (…, n, k) @ right (…, k, m): channels along k meet and end; those of n, m and the batch go on.

    The columns of the operand that is a parameter are consumers. Where channels along k are parts of others (positions
    inside of a head), they are fused into these.
    """
    vector = len(left.shape) == 1
    left, right = _matrix(left, 0), _matrix(right, 1)
    inner = _consumed(run, [_inner(run, left, -1, -2), _inner(run, right, -2, -1)])
    ending = run.labels.meet(inner, any, f"in a product {where}")
    left_on = [axis for axis in left.axes if len(left.shape) - 1 not in axis.varies]
    right_on = [axis for axis in right.axes if len(right.shape) - 2 not in axis.varies]
    batch = torch.broadcast_shapes(*(value.shape[:-1] for value in inner))
    last = len(batch)
    for axis in ending:
        if last not in axis.varies:
            continue
        if not axis.zero:
            run.labels.fix(axis.labels, f"{NOT_ZERO}, {where}")
        if axis.varies != (last,):
            labels = run.labels.fuse(axis, (last,)).labels.select(-1, 0)[..., None, None]
            for going_on in (left_on, right_on):
                going_on.append(Axis(labels.expand(*batch, 1, 1), True))
    operands = [
        _reduced(left, left_on, -1), _reduced(right, right_on, -2),
    ]  # fmt: skip
    axes = run.labels.meet(operands, any, f"in a product {where}")
    shape = torch.broadcast_shapes(*(value.shape for value in operands))
    axes = tuple(replace(a, labels=a.labels.expand(shape), origin=None) for a in axes)
    if vector:
        shape, axes = shape[:-2] + shape[-1:], tuple(replace(a, labels=a.labels.select(-2, 0)) for a in axes)
    return Value(shape, axes)


def _consumed(run: Following, inner: list[Value]) -> list[Value]:
    """Notes which parameter reads the other operand: its columns are removed but not zero where a unit is masked."""
    reader = 1 if any(axis.origin for axis in inner[1].axes) else 0
    axes = inner[reader].axes
    run.consumed.update(axis.origin for axis in axes if axis.origin)
    inner[reader] = Value(inner[reader].shape, tuple(replace(a, zero=a.zero and a.origin is None) for a in axes))
    return inner


def _matrix(value: Value, at: int) -> Value:
    """A vector as a matrix: (k) as (1, k) or (k, 1)."""
    if len(value.shape) != 1:
        return value
    axes = tuple(replace(axis, labels=axis.labels.unsqueeze(at)) for axis in value.axes)
    return Value(torch.Size([1, *value.shape] if at == 0 else [*value.shape, 1]), axes)


def _inner(run: Following, value: Value, k: int, other: int) -> Value:
    """What a product sums over: (…, k), with the axes that vary on k."""
    n = len(value.shape)
    axes = []
    for axis in value.axes:
        if n + k in axis.varies:
            axis = run.labels.fuse(axis, (n + other,))
            axes.append(replace(axis, labels=axis.labels.select(other, 0)))
    shape = [size for dim, size in enumerate(value.shape) if dim != n + other]
    return Value(torch.Size(shape), tuple(axes))


def _reduced(value: Value, axes: list[Axis], k: int) -> Value:
    """The value without its extent along k, with these of its axes."""
    shape = list(value.shape)
    shape[k] = 1
    kept = []
    for axis in axes:
        labels = axis.labels
        if labels.shape[k] > 1:
            labels = labels.narrow(k, 0, 1)
        kept.append(replace(axis, labels=labels))
    full = torch.broadcast_shapes(torch.Size(shape[:-2]), *(axis.labels.shape[:-2] for axis in kept))
    return Value(torch.Size([*full, *shape[-2:]]), tuple(
        replace(axis, labels=axis.labels.expand(*full, *axis.labels.shape[-2:])) for axis in kept
    ))  # fmt: skip


def convolve(
    run: Following, x: Value, weight: Value, shape: torch.Size, groups: int, transposed: bool, where: str,
) -> Value:  # fmt: skip
    """Channels of the input end, those of the weight's outputs begin; the groups of a grouped one go through."""
    inputs, outputs = (0, 1) if transposed else (1, 0)
    channels = []
    for axis in x.axes:
        kept = run.labels.tie(axis, [dim for dim in range(len(x.shape)) if dim != 1], f"is convolved over {where}")
        if kept is not None:
            channels.append(replace(kept, labels=kept.labels.select(0, 0).reshape(x.shape[1], -1)[:, 0]))
    rows, columns = _of_weight(run, weight, outputs), _of_weight(run, weight, inputs)
    n_out = shape[1]
    if groups == 1:
        found = contract(
            run,
            Value(torch.Size((1, x.shape[1])), tuple(replace(a, labels=a.labels[None]) for a in channels)),
            _pair(columns, rows, x.shape[1], n_out),
            where,
        )
        labels = [axis.labels[0] for axis in found.axes]
    else:
        labels = _grouped(run, x, channels, rows, columns, groups, n_out, transposed, where)
    place = [1, n_out, *[1] * (len(shape) - 2)]
    return Value(shape, tuple(Axis(each.reshape(place).expand(shape), True) for each in labels))


def _of_weight(run: Following, weight: Value, dim: int) -> Axis | None:
    """The labels (n,) of one of a kernel's first two dimensions. Positions of the kernel are no units."""
    found = None
    for axis in weight.axes:
        if axis.varies == (dim,):
            found = replace(axis, labels=axis.labels.select(1 - dim, 0).reshape(weight.shape[dim], -1)[:, 0])
        elif axis.varies not in ((0,), (1,)):
            run.labels.fix(axis.labels, HIDDEN)
    return found


def _pair(columns: Axis | None, rows: Axis | None, n_in: int, n_out: int) -> Value:
    """A kernel without its positions, as a matrix (in, out)."""
    axes = []
    if columns is not None:
        axes.append(replace(columns, labels=columns.labels[:, None].expand(n_in, n_out)))
    if rows is not None:
        axes.append(replace(rows, labels=rows.labels[None].expand(n_in, n_out)))
    return Value(torch.Size((n_in, n_out)), tuple(axes))


def _grouped(
    run: Following, x: Value, channels: list[Axis], rows: Axis | None, columns: Axis | None, groups: int,
    n_out: int, transposed: bool, where: str,
) -> list[Tensor]:  # fmt: skip
    """A group's inputs and outputs are one unit.

    A kernel (out, in / groups) has the groups along its outputs; a transposed one (in, out / groups) along its inputs.
    """
    along, inside = (columns, rows) if transposed else (rows, columns)
    if inside is not None:
        run.labels.fix(inside.labels, HIDDEN)
    if along is None or not channels:
        for axis in (along, *channels):
            if axis is not None:
                run.labels.fix(axis.labels, f"a grouped convolution of the network's input {where}")
        return []
    per_group = along.labels.reshape(groups, -1)
    seen = channels[0].labels.reshape(groups, -1)
    for labels in (per_group, seen):
        run.labels.unite(labels, flat(labels, (1,)))
    run.labels.unite(per_group[:, :1], seen[:, :1])
    return [per_group[:, :1].expand(groups, n_out // groups).reshape(-1) if n_out != groups else per_group[:, 0]]


def attention(run: Following, q: Value, k: Value, v: Value, mask: Value | None, where: str) -> Value:
    """softmax(qkᵀ/√d)·v over (…, heads, tokens, d): heads are units, a key head with the query heads of it."""
    heads = q.shape[:-2]
    k, v = (_for_heads(value, heads) for value in (k, v))
    over = [replace_axes(run, value, where) for value in (q, k, v)]
    operands = [Value(torch.Size([*value.shape[:-2], 1, 1]), axes) for value, axes in zip((q, k, v), over, strict=True)]
    if mask is not None:
        axes = tuple(a for axis in mask.axes if (a := run.labels.tie(axis, _last_two(mask), where)) is not None)
        shape = torch.Size([*mask.shape[:-2], 1, 1])
        operands.append(Value(shape, tuple(replace(a, labels=a.labels[..., :1, :1]) for a in axes), even=mask.even))
    axes = run.labels.meet(operands, any, f"in the attention {where}")
    shape = torch.Size([*heads, q.shape[-2], v.shape[-1]])
    return Value(shape, tuple(replace(axis, labels=axis.labels.expand(shape), zero=True) for axis in axes))


def replace_axes(run: Following, value: Value, where: str) -> tuple[Axis, ...]:
    """Axes of (…, tokens, d) fused to heads, of shape (…, 1, 1)."""
    reason = f"is a head dimension that all units of the attention {where} share"
    kept = [run.labels.tie(axis, _last_two(value), reason) for axis in value.axes]
    return tuple(replace(axis, labels=axis.labels[..., :1, :1]) for axis in kept if axis is not None)


def _last_two(value: Value) -> tuple[int, int]:
    return len(value.shape) - 2, len(value.shape) - 1


def _for_heads(value: Value, heads: torch.Size) -> Value:
    """Key and value heads repeated for the query heads that share them."""
    if len(value.shape) < 3 or value.shape[-3] == heads[-1]:
        return value
    times = heads[-1] // value.shape[-3]
    axes = tuple(replace(axis, labels=compact(axis.labels.repeat_interleave(times, -3))) for axis in value.axes)
    return Value(torch.Size([*value.shape[:-3], heads[-1], *value.shape[-2:]]), axes)


def reduce(run: Following, value: Value, dims: list[int], shape: torch.Size, reason: str, how: str) -> Value:
    """Over `dims`: a sum of what is zero where masked lets its channels end; anything else keeps them together."""
    axes = []
    for axis in value.axes:
        if how == "sum" and axis.zero and axis.origin is None and set(axis.varies) <= set(dims):
            continue
        kept = run.labels.tie(axis, dims, reason)
        if kept is None:
            continue
        labels = kept.labels
        if len(shape) < len(value.shape):
            for dim in sorted(dims, reverse=True):
                labels = labels.select(dim, 0)
        else:
            labels = flat(labels, dims)
            labels = labels[tuple(slice(0, n) for n in shape)]
        axes.append(replace(kept, labels=labels, zero=kept.zero and how in ZERO_OF_ZEROS))
    return Value(shape, tuple(axes))
