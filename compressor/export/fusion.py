"""What torch traces in many small steps, and onnxruntime does in few: RMS norms, rotations, heads that share keys.

A norm that is traced as a square, a mean, a root, a reciprocal and two products is one operator, and so is the rotation
of halves by positions. Where several heads of queries share one of keys and values, those are traced as copied for
each: with the queries of a group one below the other, the products are the same and nothing is copied.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from compressor.export.builder import CONTRIBUTED, GraphBuilder, scalar
from compressor.export.lowering import Mode

_NORMS: dict[Mode, str] = {
    "default": "SimplifiedLayerNormalization",
    "compat": "SimplifiedLayerNormalization",
    "standard": "RMSNormalization",
}


def fuse(model: ir.Model, mode: Mode) -> None:
    """Rewrites a traced graph; what it computes stays the same."""
    builder = GraphBuilder(model.graph, stem="fused.")
    for node in list(model.graph):
        if node.op_type == "Reciprocal":
            _fuse_norm(builder, node, _NORMS[mode])
        elif node.op_type == "Add":
            _fuse_rotation(builder, node, mode)
        elif node.op_type == "MatMul":
            _group_product(builder, node)
    RemoveUnusedNodesPass()(model)
    model.graph.sort()


def _fuse_norm(builder: GraphBuilder, reciprocal: ir.Node, operator: str) -> None:
    """x · 1/√(mean(x²) + ε) · weight, over the last axis, as one node."""
    root = _made_by(reciprocal.inputs[0], "Sqrt")
    shifted = _made_by(root and root.inputs[0], "Add")
    mean = _made_by(shifted and shifted.inputs[0], "ReduceMean")
    square = _made_by(mean and mean.inputs[0], "Pow")
    if shifted is None or mean is None or square is None:
        return
    x, epsilon = square.inputs[0], scalar(shifted.inputs[1])
    over_last = _integers(mean.inputs[1] if len(mean.inputs) > 1 else None) == [-1]
    normed = _only_use(reciprocal.outputs[0], "Mul")
    scaled = _only_use(normed and normed.outputs[0], "Mul")
    if x is None or epsilon is None or not over_last or scalar(square.inputs[1]) != 2.0 or scaled is None:
        return
    assert normed is not None
    if x not in normed.inputs or x.shape is None or x.dtype != ir.DataType.FLOAT:
        return
    weight = next(value for value in scaled.inputs if value is not normed.outputs[0])
    if weight is None or weight.shape is None or list(weight.shape) != [x.shape[-1]]:
        return
    builder.before = scaled
    found = builder.op(operator, x, weight, axis=-1, epsilon=epsilon, stash_type=1)
    _put_in_place(builder.graph, scaled.outputs[0], found)


def _fuse_rotation(builder: GraphBuilder, total: ir.Node, mode: Mode) -> None:
    """x · cos + (−second half of x, first half) · sin, by tables whose halves are alike, as one node."""
    parts = [_made_by(value, "Mul") for value in total.inputs]
    for plain, turned in (parts, parts[::-1]):
        if plain is None or turned is None:
            continue
        halves = next((found for value in turned.inputs if (found := _made_by(value, "Concat"))), None)
        x = _turned_halves(halves)
        if halves is None or x is None or x not in plain.inputs:
            continue
        cosine = next((value for value in plain.inputs if value is not x), None)
        sine = next((value for value in turned.inputs if value is not halves.outputs[0]), None)
        if cosine is None or sine is None or not (_is_table(cosine, "Cos", x) and _is_table(sine, "Sin", x)):
            continue
        single = _rows(cosine) == 1
        if _rows(sine) != _rows(cosine) or not (single or _rows(cosine) == _rows(x)) or (single and mode == "standard"):
            continue
        builder.before = total
        tables = [_half_table(builder, each, mode) for each in (cosine, sine)]
        if mode == "standard":
            found = builder.op("RotaryEmbedding", x, *tables)
        else:
            places = builder.integers(0) if single else _places(builder, cosine)
            found = builder.op("RotaryEmbedding", x, places, *tables, domain=CONTRIBUTED)
        _put_in_place(builder.graph, total.outputs[0], found)
        return


def _turned_halves(halves: ir.Node | None) -> ir.Value | None:
    """x (batch, heads, length, size), where a Concat is of minus its second half and its first."""
    if halves is None or len(halves.inputs) != 2 or halves.attributes["axis"].as_int() not in (-1, 3):
        return None
    negated = _made_by(halves.inputs[0], "Neg")
    second, first = _made_by(negated and negated.inputs[0], "Slice"), _made_by(halves.inputs[1], "Slice")
    if first is None or second is None or first.inputs[0] is not second.inputs[0]:
        return None
    x = first.inputs[0]
    size = x.shape[-1] if x is not None and x.shape is not None and len(x.shape) == 4 else None
    if not isinstance(size, int) or size % 2 or x is None or not isinstance(x.shape and x.shape[1], int):
        return None
    half = size // 2
    for part, start, least, most in ((first, 0, half, half), (second, half, size, np.inf)):
        if len(part.inputs) < 4:
            return None
        starts, ends, axes, *steps = (_integers(value) for value in part.inputs[1:])
        if starts != [start] or axes not in ([3], [-1]) or steps not in ([], [[1]]):
            return None
        if ends is None or not least <= ends[0] <= most:
            return None
    return x


def _is_table(table: ir.Value, operator: str, x: ir.Value) -> bool:
    """Whether (batch, 1, length, size) is of this function, and its second half as the first."""
    if table.shape is None or x.shape is None or len(table.shape) != 4 or [*table.shape][1::2] != [1, x.shape[-1]]:
        return False
    single = _made_by(table, "Unsqueeze")
    if single is None or _integers(single.inputs[1]) != [1]:
        return False
    node, seen = single.inputs[0] and single.inputs[0].producer(), False
    while node is not None and node.op_type in (operator, "Mul", "Cast"):
        seen |= node.op_type == operator
        if node.op_type == "Mul" and all(scalar(value) is None for value in node.inputs):
            return False
        value = next((value for value in node.inputs if scalar(value) is None), None)
        node = value and value.producer()
    return (
        seen and node is not None and node.op_type == "Concat" and len(node.inputs) == 2
        and node.inputs[0] is node.inputs[1] and node.attributes["axis"].as_int() in (-1, 2)
    )  # fmt: skip


def _half_table(builder: GraphBuilder, table: ir.Value, mode: Mode) -> ir.Value:
    """(batch, length, size / 2), for onnxruntime's own operator (batch · length, size / 2)."""
    half = _size(table) // 2

    def made() -> ir.Value:
        first = builder.slice(builder.op("Squeeze", table, builder.integers(1)), half, 2)
        return first if mode == "standard" else builder.reshape(first, -1, half)

    return builder.once(("table", table), made)


def _places(builder: GraphBuilder, table: ir.Value) -> ir.Value:
    """Where each token's row lies in tables of all: (batch, length)."""

    def made() -> ir.Value:
        sizes = builder.op("Gather", builder.op("Shape", table), builder.integers(0, 2))
        n = builder.op("ReduceProd", sizes, keepdims=0)
        zero, one = (builder.constant(np.array(each, np.int64)) for each in (0, 1))
        return builder.op("Reshape", builder.op("Range", zero, n, one), sizes)

    return builder.once(("places", table), made)


def _rows(value: ir.Value) -> int | ir.SymbolicDim | None:
    """How many texts it is of: a table of one row is the same for all."""
    return None if value.shape is None else value.shape[0]


def _size(value: ir.Value) -> int:
    return 0 if value.shape is None else _known(value.shape[-1])


def _group_product(builder: GraphBuilder, product: ir.Node) -> None:
    """a @ (keys or values copied for each head of a group): the rows of a group's heads become those of one matrix."""
    a, b = product.inputs
    turned = _made_by(b, "Transpose")
    if turned is not None and list(turned.attributes["perm"].as_ints()) != [0, 1, 3, 2]:
        return
    copied = _copied_for_heads(turned.inputs[0] if turned else b)
    if copied is None or a is None or a.shape is None or len(a.shape) != 4:
        return
    kept, groups, heads = copied
    if a.shape[1] != heads:
        return
    builder.before = product
    key = builder.op("Transpose", kept, perm=[0, 1, 3, 2]) if turned else kept
    rows = builder.op("Reshape", a, _shape(builder, groups, a))
    found = builder.op("MatMul", rows, key)
    found.shape, found.type = None, product.outputs[0].type
    last = product
    scale = _only_use(product.outputs[0], "Mul")
    if scale is not None and any(scalar(value) is not None for value in scale.inputs):
        # A factor right after a product is part of it for onnxruntime.
        builder.before = last = scale
        found = builder.op("Mul", *(found if value is product.outputs[0] else value for value in scale.inputs))
    back = _shape(builder, heads, last.outputs[0], found)
    _put_in_place(builder.graph, last.outputs[0], builder.op("Reshape", found, back))


def _copied_for_heads(value: ir.Value | None) -> tuple[ir.Value, int, int] | None:
    """(what was copied, its heads, the heads of all copies): keys or values (batch, heads, length, size) that
    `repeat_kv` of transformers copies for each head of queries."""
    merged = _made_by(value, "Reshape")
    spread = _made_by(merged and merged.inputs[0], "Expand")
    single = _made_by(spread and spread.inputs[0], "Unsqueeze")
    if merged is None or spread is None or single is None or _integers(single.inputs[1]) != [2]:
        return None
    kept, before, after = single.inputs[0], spread.outputs[0].shape, merged.outputs[0].shape
    if kept is None or kept.shape is None or before is None or after is None or len(before) != 5 or len(after) != 4:
        return None
    heads, groups = after[1], kept.shape[1]
    if not isinstance(heads, int) or not isinstance(groups, int) or before[1] != groups:
        return None
    if groups * _known(before[2]) != heads or list(before[3:]) != list(after[2:]):
        return None
    return kept, groups, heads


def _shape(builder: GraphBuilder, heads: int, like: ir.Value, of: ir.Value | None = None) -> ir.Value:
    """The shape (as it is, heads, what is left, the last size), the last that of `of`, or of `like`."""
    last = like.shape[-1] if like.shape is not None else None
    if isinstance(last, int):
        return builder.integers(0, heads, -1, last)

    def made() -> ir.Value:
        return builder.op("Concat", builder.integers(0, heads, -1), builder.op("Shape", of or like, start=-1), axis=0)

    named = last.value if last is not None else None  # values whose sizes have one name are as long
    return builder.once(("shape", heads, named), made) if named is not None else made()


def _put_in_place(graph: ir.Graph, old: ir.Value, new: ir.Value) -> None:
    new.shape, new.type = old.shape, old.type
    for user, at in list(old.uses()):
        user.replace_input_with(at, new)
    for at, value in enumerate(graph.outputs):
        if value is old:
            graph.outputs[at] = new
            old.name, new.name = f"{old.name}.unfused", old.name


def _made_by(value: ir.Value | None, operator: str) -> ir.Node | None:
    """The node that writes a value, where it is of this kind."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == operator and node.domain == "" else None


def _only_use(value: ir.Value | None, operator: str) -> ir.Node | None:
    """The one node that reads a value, where it is of this kind."""
    if value is None or value.is_graph_output():
        return None
    users = {user for user, _ in value.uses()}
    node = users.pop() if len(users) == 1 else None
    return node if node is not None and node.op_type == operator else None


def _integers(value: ir.Value | None) -> list[int] | None:
    held = None if value is None else value.const_value
    return [int(each) for each in held.numpy().reshape(-1)] if held is not None and held.size < 8 else None


def _known(size: int | ir.SymbolicDim) -> int:
    return size if isinstance(size, int) else 0
