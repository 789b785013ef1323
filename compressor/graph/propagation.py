"""How every operator moves, unites or fixes the channels of what it is given.

An operator that is not known here fixes the channels that reach it, so that what is missing costs choice and never
correctness.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from compressor.graph.contraction import attention, contract, convolve, reduce
from compressor.graph.labels import HIDDEN, Axis, Labels, Value, compact, flat
from compressor.graph.operator_kinds import FILLS, MEANS, MOVES, NO_CHANNELS, POINTWISE, POOLS
from compressor.graph.tracing import Trace

Result = Value | list[Value] | None
aten = torch.ops.aten


class Propagation:
    """Runs a trace on labels."""

    def __init__(self, trace: Trace, labels: Labels) -> None:
        self.trace, self.labels = trace, labels
        self.symbols: dict[tuple[str, int], Tensor] = {}
        self.consumed: set[tuple[str, int]] = set()
        self.statistics: set[tuple[str, int]] = set()
        self._values: dict[fx.Node, Any] = {}

    def run(self) -> None:
        for node in self.trace.graph.nodes:
            if node.op == "placeholder":
                self._values[node] = self._placeholder(node)
            elif node.op == "call_function":
                self._values[node] = self._call(node)
            elif node.op == "output":
                for value in map(self.value, node.all_input_nodes):
                    self.fix(value, "reaches the network's output")

    def value(self, node: Any) -> Value:
        """What a node computes; no channels in what is no tensor."""
        found = self._values.get(node) if isinstance(node, fx.Node) else None
        return found if isinstance(found, Value) else Value(torch.Size())

    def fix(self, value: Value | None, reason: str) -> None:
        for axis in value.axes if value else ():
            self.labels.fix(axis.labels, reason)

    def parameter(self, name: str, dim: int, n: int) -> Tensor:
        """The labels (n,) of one dimension of a parameter or buffer, the same wherever it is used."""
        if (name, dim) not in self.symbols:
            self.symbols[name, dim] = self.labels.fresh(n)
        return self.symbols[name, dim]

    def _placeholder(self, node: fx.Node) -> Value | None:
        found = node.meta.get("val")
        if not isinstance(found, Tensor):
            return None
        name, constant = self.trace.tensors.get(node.name), self.trace.constants.get(node.name)
        if name is None or constant is not None:
            return Value(found.shape, (), constant)
        axes = []
        for dim, size in enumerate(found.shape):
            if size > 1:
                shape = [size if d == dim else 1 for d in range(found.dim())]
                symbols = self.parameter(name, dim, size).view(shape).expand(found.shape)
                axes.append(Axis(symbols, True, (name, dim)))
        return Value(found.shape, tuple(axes))

    def _call(self, node: fx.Node) -> Result:
        if node.target is operator.getitem:
            source = self._values.get(node.args[0])  # type: ignore[arg-type]
            return source[node.args[1]] if isinstance(source, list) else source  # type: ignore[index]
        name = getattr(node.target, "_opname", None) or str(node.target)
        if all(value.constant is not None for value in map(self.value, node.all_input_nodes)) and node.all_input_nodes:
            known = self._constant(node)
            if known is not None:
                return known
        if name in RULES:
            return RULES[name](self, node)
        if name in MOVES:
            return self._move(node, name)
        if name in POOLS:
            return self._pool(node)
        of_two = len(node.args) > 1 and isinstance(node.args[1], fx.Node)  # the smaller of two values, entry by entry
        if (name in MEANS or name == "sum") and not of_two:
            return self._reduce(node, name)
        pointwise = isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags
        if name in POINTWISE or pointwise or (name in ("min", "max") and of_two):
            return self._pointwise(node)
        if name not in NO_CHANNELS:
            for source in node.all_input_nodes:
                found = self._values.get(source)
                for value in found if isinstance(found, list) else [found]:
                    self.fix(value, f"reaches {name} {place(node)}, which channels are not followed through")
        return _bare(node, name in FILLS)

    def _constant(self, node: fx.Node) -> Result:
        """The value itself, where all arguments are known."""
        if not isinstance(node.target, torch._ops.OpOverload):
            return None
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: self.value(n).constant)  # type: ignore[misc]
        found = node.target(*args, **kwargs)
        return Value(found.shape, (), found) if isinstance(found, Tensor) else None

    def _move(self, node: fx.Node, name: str) -> Result:
        """The same movement of the labels."""
        source = self.value(node.args[0])
        target = aten.reshape.default if name in ("view", "_unsafe_view") else node.target
        shapes = node.meta["val"]
        several = isinstance(shapes, (list, tuple))
        kinds: list[list[Axis]] = [[] for _ in shapes] if several else [[]]
        for axis in source.axes:
            args = fx.map_arg(node.args[1:], lambda n: self._plain(n))
            moved = target(axis.labels, *args, **node.kwargs)  # type: ignore[operator]
            for axes, labels in zip(kinds, moved if several else [moved], strict=True):
                axes.append(replace(axis, labels=compact(labels)))
        found = [
            Value(val.shape, tuple(axis for axis in axes if axis.varies))
            for axes, val in zip(kinds, shapes if several else [shapes], strict=True)
        ]
        if name == "expand":
            offset = len(shapes.shape) - len(source.shape)
            grown = {dim for dim in range(len(source.shape)) if source.shape[dim] == 1} | source.even
            even = frozenset(range(offset)) | frozenset(offset + dim for dim in grown)
            return replace(found[0], even=even)
        return found if several else found[0]

    def _plain(self, node: fx.Node) -> Tensor:
        """Another tensor argument of a movement: its value, or first places where that is not known."""
        value = self.value(node)
        return value.constant if value.constant is not None else torch.zeros(value.shape, dtype=torch.int64)

    def _pointwise(self, node: fx.Node) -> Value:
        sources = [arg for arg in node.all_input_nodes if isinstance(self._values.get(arg), Value)]
        operands = [self.value(source) for source in sources]

        def zero(flags: tuple[bool, ...]) -> bool:
            return zero_stays(node, dict(zip(sources, flags, strict=True)))

        axes = self.labels.meet(operands, zero, f"in {node.target._opname} {place(node)}")  # type: ignore[union-attr]
        shape = node.meta["val"].shape
        spread = {len(shape) + dim for value in operands for dim in value.extents}
        even = frozenset(dim for dim in range(len(shape)) if shape[dim] > 1 and dim not in spread)
        return Value(shape, tuple(replace(axis, labels=axis.labels.expand(shape)) for axis in axes), even=even)

    def _pool(self, node: fx.Node) -> Result:
        """Over all but the first two dimensions."""
        source, val = self.value(node.args[0]), node.meta["val"]
        spatial = range(source_channels(source), len(source.shape))
        axes = []
        for axis in source.axes:
            kept = self.labels.tie(axis, spatial, f"is pooled over {place(node)}")
            if kept is not None:
                axes.append(kept)
        shapes = val if isinstance(val, (list, tuple)) else [val]
        found = [
            Value(each.shape, tuple(replace(axis, labels=_resized(axis.labels, each.shape)) for axis in axes))
            for each in shapes
        ]
        return found if isinstance(val, (list, tuple)) else found[0]

    def _reduce(self, node: fx.Node, name: str) -> Result:
        source, val = self.value(node.args[0]), node.meta["val"]
        if name == "linalg_vector_norm" or name == "norm":
            dims = node.args[2] if len(node.args) > 2 else None
        else:
            dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        listed = [dims] if isinstance(dims, int) else list(dims or range(len(source.shape)))  # type: ignore[call-overload]
        listed = [dim % max(1, len(source.shape)) for dim in listed]
        reason = f"{'summed' if name == 'sum' else 'normalised'} together by {name} {place(node)}"
        shapes = val if isinstance(val, (list, tuple)) else [val]
        found = [reduce(self, source, listed, each.shape, reason, name) for each in shapes]
        return found if isinstance(val, (list, tuple)) else found[0]


def source_channels(value: Value) -> int:
    """How many dimensions lie before the positions of a feature map, (n, c, …): two."""
    return min(2, len(value.shape))


def place(node: fx.Node) -> str:
    """Where in the module an operator is, for messages."""
    stack = node.meta.get("nn_module_stack") or {}
    names = [path for path, _ in stack.values() if path]
    return f"in '{names[-1]}'" if names else "in the network's forward"


def zero_stays(node: fx.Node, zeros: dict[fx.Node, bool]) -> bool:
    """Whether an operator on single numbers gives 0, for every sign of those that are not 0."""
    target: Any = node.target

    def numbers(sign: float) -> Callable[[fx.Node], Tensor]:
        def number(n: fx.Node) -> Tensor:
            val = n.meta["val"]
            return (torch.zeros(1) if zeros.get(n) else torch.full((1,), sign)).to(val.dtype)

        return number

    for sign in (-0.7, 1.3):
        args, kwargs = fx.map_arg((node.args, node.kwargs), numbers(sign))  # type: ignore[misc]
        found = target(*args, **kwargs)
        if not bool((found == 0).all()):
            return False
    return True


def _resized(labels: Tensor, shape: torch.Size) -> Tensor:
    """Labels that vary on the first two dimensions only, with other positions."""
    for dim in range(2, labels.dim()):
        labels = labels.narrow(dim, 0, 1)
    return labels.expand(shape)


def _bare(node: fx.Node, filled: bool = False) -> Result:
    val = node.meta.get("val")
    if filled and isinstance(val, Tensor):
        return Value(val.shape, even=frozenset(range(val.dim())))
    if isinstance(val, (list, tuple)):
        return [Value(each.shape) if isinstance(each, Tensor) else Value(torch.Size()) for each in val]
    return Value(val.shape) if isinstance(val, Tensor) else None


def _linear(run: Propagation, node: fx.Node) -> Value:
    x, weight = run.value(node.args[0]), run.value(node.args[1])
    right = Value(weight.shape[::-1], tuple(replace(axis, labels=axis.labels.transpose(0, 1)) for axis in weight.axes))
    found = contract(run, x, right, place(node))
    return _with_bias(run, node, found, run.value(node.args[2])) if len(node.args) > 2 and node.args[2] else found


def _with_bias(run: Propagation, node: fx.Node, value: Value, bias: Value) -> Value:
    return Value(value.shape, run.labels.meet([value, bias], all, f"in the bias {place(node)}"))


def _matmul(run: Propagation, node: fx.Node) -> Value:
    return contract(run, run.value(node.args[0]), run.value(node.args[1]), place(node))


def _addmm(run: Propagation, node: fx.Node) -> Value:
    found = contract(run, run.value(node.args[1]), run.value(node.args[2]), place(node))
    return _with_bias(run, node, found, run.value(node.args[0]))


def _convolution(run: Propagation, node: fx.Node) -> Value:
    arguments = list(node.args) + [None] * 9
    if node.target._opname == "convolution":  # type: ignore[union-attr]
        transposed, groups = bool(arguments[6]), arguments[8]
    elif "transpose" in node.target._opname:  # type: ignore[union-attr]
        transposed, groups = True, arguments[6]
    else:
        transposed, groups = False, arguments[6]
    x, weight = run.value(arguments[0]), run.value(arguments[1])
    found = convolve(run, x, weight, node.meta["val"].shape, int(groups or 1), transposed, place(node))  # type: ignore[arg-type]
    if arguments[2] is None:
        return found
    bias = run.value(arguments[2])
    column = (bias.shape[0], *[1] * (len(found.shape) - 2))
    axes = tuple(replace(axis, labels=axis.labels.view(column)) for axis in bias.axes)
    return _with_bias(run, node, found, Value(torch.Size(column), axes))


def _embedding(run: Propagation, node: fx.Node) -> Value:
    weight, shape = run.value(node.args[0]), node.meta["val"].shape
    axes = []
    for axis in weight.axes:
        if 0 in axis.varies:
            run.labels.fix(axis.labels, HIDDEN)
        else:
            axes.append(replace(axis, labels=axis.labels[0].expand(shape), origin=None))
    return Value(shape, tuple(axes))


def _cat(run: Propagation, node: fx.Node) -> Value:
    parts = [run.value(each) for each in node.args[0]]  # type: ignore[union-attr]
    shape = node.meta["val"].shape
    dim = int(node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)) % len(shape)  # type: ignore[call-overload,arg-type]
    parts = [part for part in parts if len(part.shape) == len(shape)]
    joined = [[axis for axis in part.axes if dim in axis.varies] for part in parts]
    others = [
        Value(
            torch.Size([1 if d == dim else n for d, n in enumerate(part.shape)]),
            tuple(replace(a, labels=a.labels.narrow(dim, 0, 1)) for a in part.axes if dim not in a.varies),
        )
        for part in parts
    ]
    axes = list(run.labels.meet(others, all, f"joined {place(node)}"))
    axes = [replace(axis, labels=axis.labels.expand(shape)) for axis in axes]
    if any(joined):
        pieces, zero = [], True
        for part, found in zip(parts, joined, strict=True):
            for extra in found[1:]:
                run.labels.fix(extra.labels, f"its units overlap in part with others {place(node)}")
            if found:
                pieces.append(found[0].labels)
                zero = zero and found[0].zero
            else:
                fixed = run.labels.fresh(part.shape[dim])
                run.labels.fix(fixed, "is joined with values of a fixed size")
                pieces.append(fixed.view([-1 if d == dim else 1 for d in range(len(shape))]).expand(part.shape))
        axes.append(Axis(_concatenated(pieces, dim), zero))
    return Value(shape, tuple(axes))


def _concatenated(pieces: list[Tensor], dim: int) -> Tensor:
    """Labels joined along `dim`, still constant where all pieces are."""
    size = list(pieces[0].shape)
    varies = {d for piece in pieces for d in range(piece.dim()) if piece.shape[d] > 1 and piece.stride(d) != 0}
    small = [piece[tuple(slice(None) if d in varies or d == dim else slice(0, 1) for d in range(piece.dim()))]
             for piece in pieces]  # fmt: skip
    size[dim] = sum(piece.shape[dim] for piece in pieces)
    return torch.cat(small, dim).expand(size)


def _stack(run: Propagation, node: fx.Node) -> Value:
    parts, shape = [run.value(each) for each in node.args[0]], node.meta["val"].shape  # type: ignore[union-attr]
    dim = int(node.args[1] if len(node.args) > 1 else 0) % len(shape)  # type: ignore[arg-type]
    axes = run.labels.meet(parts, all, f"stacked {place(node)}")
    return Value(shape, tuple(replace(axis, labels=axis.labels.unsqueeze(dim).expand(shape)) for axis in axes))


def _index(run: Propagation, node: fx.Node) -> Value:
    source, shape = run.value(node.args[0]), node.meta["val"].shape
    indices = [None if each is None else run._plain(each) for each in node.args[1]]  # type: ignore[union-attr,arg-type]
    unknown = [
        dim for dim, each in enumerate(node.args[1]) if each is not None and run.value(each).constant is None  # type: ignore[arg-type,union-attr]
    ]  # fmt: skip
    axes = []
    for axis in source.axes:
        kept = run.labels.tie(axis, unknown, f"is looked up by number {place(node)}")
        if kept is not None:
            labels = compact(aten.index.Tensor(kept.labels, indices))
            axes.append(replace(kept, labels=labels))
    return Value(shape, tuple(axis for axis in axes if axis.varies))


def _pad(run: Propagation, node: fx.Node) -> Value:
    arguments = list(node.args)
    source, shape = run.value(arguments[0]), node.meta["val"].shape
    zero = len(arguments) < 3 or arguments[2] == 0
    axes = []
    for axis in source.axes:
        labels = aten.constant_pad_nd.default(axis.labels.contiguous() + 1, arguments[1], 0) - 1
        grown = [dim for dim in axis.varies if shape[dim] != source.shape[dim]]
        if grown:
            new = run.labels.fresh(1)
            run.labels.fix(new, "is joined with values of a fixed size")
            labels = torch.where(labels < 0, new, labels)
            axes.append(replace(axis, labels=compact(labels), zero=axis.zero and zero))
        else:
            axes.append(replace(axis, labels=_resize_flat(axis, shape), zero=axis.zero and zero))
    return Value(shape, tuple(axes))


def _resize_flat(axis: Axis, shape: torch.Size) -> Tensor:
    labels = axis.labels
    for dim in range(labels.dim()):
        if dim not in axis.varies:
            labels = labels.narrow(dim, 0, 1)
    return labels.expand(shape)


def _batch_norm(run: Propagation, node: fx.Node) -> list[Value] | Value:
    """The affine parameters make a masked channel zero whatever comes in."""
    x = run.value(node.args[0])
    column = torch.Size((x.shape[1], *[1] * (len(x.shape) - 2)))
    operands = [x]
    for i, each in enumerate(node.args[1:5]):
        if isinstance(each, fx.Node):
            labels, name = None, run.trace.tensors.get(each.name)
            if name is not None:
                labels = run.parameter(name, 0, x.shape[1]).view(column)
                if i >= 2:
                    run.statistics.add((name, 0))
            operands.append(Value(column, (Axis(labels, True),) if labels is not None else ()))
    affine = isinstance(node.args[1], fx.Node)
    axes = run.labels.meet(operands, lambda _: affine, f"in the normalisation {place(node)}")
    val = node.meta["val"]
    if isinstance(val, (list, tuple)):
        return [Value(x.shape, axes), *[Value(each.shape) for each in val[1:]]]
    return Value(x.shape, axes)


def _prelu(run: Propagation, node: fx.Node) -> Value:
    """Slopes below zero, one for each channel or one for all: zero stays zero."""
    x, slope = run.value(node.args[0]), node.args[1]
    n = math.prod(slope.meta["val"].shape) if isinstance(slope, fx.Node) else 1
    name = run.trace.tensors.get(slope.name) if isinstance(slope, fx.Node) else None
    if n == 1 or name is None:
        return run._pointwise(node)
    column = torch.Size((n, *[1] * (len(x.shape) - 2)))
    slopes = Value(column, (Axis(run.parameter(name, 0, n).view(column), True),))
    axes = run.labels.meet([x, slopes], lambda flags: flags[0], f"in prelu {place(node)}")
    return Value(x.shape, tuple(replace(axis, labels=axis.labels.expand(x.shape)) for axis in axes))


def _layer_norm(run: Propagation, node: fx.Node) -> Value:
    x, normalised = run.value(node.args[0]), len(node.args[1])  # type: ignore[arg-type]
    reason = f"normalised together {place(node)}"
    axes = []
    for each in node.args[2:4]:
        for entry in run.value(each).axes:
            run.labels.fix(entry.labels, reason)
            for axis in x.axes:
                if axis.varies == (len(x.shape) - 1,) and normalised == 1:
                    run.labels.unite(entry.labels, axis.labels.reshape(-1, x.shape[-1])[0])
    for axis in x.axes:
        kept = run.labels.tie(axis, range(len(x.shape) - normalised, len(x.shape)), reason)
        if kept is not None:
            axes.append(replace(kept, zero=False))
    return Value(x.shape, tuple(axes))


def _group_norm(run: Propagation, node: fx.Node) -> Value:
    x, n_groups = run.value(node.args[0]), int(node.args[1])  # type: ignore[arg-type]
    reason = f"normalised together {place(node)}"
    n, operands = x.shape[1], []
    column = (n, *[1] * (len(x.shape) - 2))
    norm = [run.value(each) for each in node.args[2:4] if isinstance(each, fx.Node)]
    spatial = range(2, len(x.shape))
    axes = tuple(kept for axis in x.axes if (kept := run.labels.tie(axis, spatial, reason)) is not None)
    operands = [Value(x.shape, axes)] + [
        Value(torch.Size(column), tuple(replace(a, labels=a.labels.view(column)) for a in value.axes)) for value in norm
    ]
    found = []
    for axis in run.labels.meet(operands, lambda _: bool(norm), f"in the normalisation {place(node)}"):
        grouped = axis.labels.select(0, 0).reshape(n, -1)[:, 0].reshape(n_groups, -1)
        if 1 in axis.varies and n_groups == 1:
            run.labels.fix(grouped, reason)
            continue
        run.labels.unite(grouped, flat(grouped, (1,)))
        found.append(axis)
    return Value(x.shape, tuple(found))


def _attention(run: Propagation, node: fx.Node) -> Value:
    q, k, v = (run.value(each) for each in node.args[:3])
    given = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
    mask = run.value(given) if isinstance(given, fx.Node) else None
    found = attention(run, q, k, v, mask, place(node))
    return Value(node.meta["val"].shape, found.axes)


RULES: dict[str, Callable[[Propagation, fx.Node], Result]] = {
    "linear": _linear,
    **dict.fromkeys(("matmul", "mm", "bmm"), _matmul),
    "addmm": _addmm,
    **dict.fromkeys(
        ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "convolution"),
        _convolution,
    ),
    "embedding": _embedding,
    "cat": _cat,
    "stack": _stack,
    "index": _index,
    **dict.fromkeys(("pad", "constant_pad_nd"), _pad),
    **dict.fromkeys(("batch_norm", "_native_batch_norm_legit_no_training"), _batch_norm),
    **dict.fromkeys(("prelu", "_prelu_kernel"), _prelu),
    **dict.fromkeys(("layer_norm", "rms_norm"), _layer_norm),
    "group_norm": _group_norm,
    "scaled_dot_product_attention": _attention,
}
"""By the operator's name."""
