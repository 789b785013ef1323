"""Sizes that a traced graph has taken over from its example, as how often a loop over parts of a text was run.

torch.export notes such a decision as a condition on the lengths of the inputs, and torch.onnx drops it: the graph is
right for texts like the example, and fails or is wrong for others. So the conditions are tried on a longer text.
"""

from __future__ import annotations

from collections.abc import Mapping

import sympy
import torch
from torch.export import ExportedProgram
from torch.utils._sympy.functions import Min

BATCH, LONGEST = 5, 597
"""Of what the conditions are tried on: sizes that no forward has of its own."""


def fixed_size(program: ExportedProgram, axes: Mapping[str, Mapping[int, str]]) -> str | None:
    """A condition that does not hold for a long text; None where all hold.

    Args:
        axes: What the free axes of the inputs are called, of each in order.
    """
    names = set(program.graph_signature.user_inputs)
    values = [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder" and node.name in names]
    called: dict[sympy.Symbol, str] = {}
    for value, free in zip(values, axes.values(), strict=True):
        sizes = [(value.shape[axis], label) for axis, label in free.items()]
        called |= {size.node.expr: label for size, label in sizes if _is_free(size)}
    longest = min([LONGEST, *(program.range_constraints[symbol].upper for symbol in called)])
    given = {symbol: sympy.Integer(size) for symbol, size in _sizes(called, int(longest)).items()}
    noted = values[0].fake_mode.shape_env.deferred_runtime_asserts.values() if called else ()
    conditions = [each.expr for several in noted for each in several]
    broken = [each for each in conditions if not _is_limit(each) and each.xreplace(given) == sympy.false]
    named = {symbol: sympy.Symbol(label, integer=True) for symbol, label in called.items()}
    return min((str(each.xreplace(named)) for each in broken), key=len, default=None)


def _is_free(size: object) -> bool:
    return isinstance(size, torch.SymInt) and isinstance(size.node.expr, sympy.Symbol)


def _sizes(called: Mapping[sympy.Symbol, str], longest: int) -> dict[sympy.Symbol, int]:
    """Of a text of which a third is past, where there is a past."""
    past = longest // 3 if "past_sequence_length" in called.values() else 0
    known = {"batch_size": BATCH, "past_sequence_length": past, "total_sequence_length": longest}
    return {symbol: known.get(label, longest - past) for symbol, label in called.items()}


def _is_limit(condition: sympy.Basic) -> bool:
    """Whether it only says how long a text may be, as a table of positions does, or a slice of one."""
    if isinstance(condition, sympy.Equality):
        sides = ((condition.lhs, condition.rhs), (condition.rhs, condition.lhs))
        return any(_is_least_of(some, other) for some, other in sides)
    return isinstance(condition, sympy.LessThan | sympy.StrictLessThan) and condition.rhs.is_number


def _is_least_of(some: sympy.Basic, least: sympy.Basic) -> bool:
    """Whether one side is the least of the other and of a number: a slice of a table, which is as long as that."""
    rest = [each for each in least.args if each != some]
    return isinstance(least, sympy.Min | Min) and len(rest) < len(least.args) and all(each.is_number for each in rest)
