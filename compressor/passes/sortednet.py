"""SortedNet: networks of many sizes in one, each the first units of the next larger, trained together.

Valipour et al., "SortedNet: a place for every network and every network in its place", arXiv 2309.00255; of language
models Kavehzadeh et al., "Sorted LLaMA", arXiv 2309.08968. What the first leaves unsaid is as in Hou et al.,
"DynaBERT", arXiv 2004.04037 (importance of units, which blocks stay), and Yu and Huang, "Universally slimmable
networks", arXiv 1903.05134 (widths, the sandwich rule, statistics of batch norms).

The units of each dependency group are sorted by importance, so that a smaller width is the first rows and columns of
every tensor. A step of the training sends parts of a batch through sizes that are drawn, and follows the mean of their
gradients: what a size does not have gets nothing from it. Every size has batch-norm statistics of its own, and norms
and biases where `vectors` says so.

We leave the papers in this: the width of a residual stream stays whole; the importance of what is between two layers
counts everything that makes a unit, with its norms; blocks of trained networks are chosen by what the outputs lose
(`blocks: chain`), not by their place; statistics of batch norms are pooled over all examples, where the reference
averages the variances of batches.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from compressor.core.absent import KEPT, kept_children
from compressor.core.batch import Batch, call
from compressor.core.contract import StructurePass
from compressor.core.errors import CheckpointError, RecipeError
from compressor.core.groups import Branches, Group, Operator
from compressor.core.nested import Foretold, Size
from compressor.core.structure import Outcome, Subject, Surgeon
from compressor.core.tensors import named_tensors
from compressor.ops.attribution import Composite, Observed, Rule, attribute, first_output, start_of
from compressor.passes.parts.nest import Nest, beginning, lay_over
from compressor.passes.parts.units import unit_scores
from compressor.passes.settings.sortednet import JUDGED_TOKENS, SortednetSettings

_JUDGED = 128
"""Examples on which the order of blocks is found; of texts no more than come to the tokens that the settings say."""
_ENOUGH = 0.9
"""Of what is asked for, that a rounded width has at least."""
_SAME = 1e-5
_STATISTICS = (".running_mean", ".running_var")
_COUNT = ".num_batches_tracked"
_RULES = Composite("lrp", Rule("zplus"), Rule("epsilon", {"epsilon": 1e-6}), True)


def widths(full: int, shares: Sequence[float], multiple: int) -> list[int]:
    """max(d, d⌊(v + d/2)/d⌋) of v = full · share, one d more where that is below 0.9 v; at most `full`, which share 1
    is."""
    found = []
    for share in shares:
        wanted = full * share
        n = max(multiple, multiple * int((wanted + multiple / 2) // multiple))
        n = n + multiple if n < _ENOUGH * wanted else n
        found.append(full if share >= 1 else min(full, n))
    return found


def neuron_importance(w1: Tensor, g1: Tensor, b1: Tensor, gb1: Tensor, w2: Tensor, g2: Tensor) -> Tensor:
    """|Σ_in w₁⊙g₁ + b₁g₁ᵇ| + |Σ_out w₂⊙g₂| of the neurons between two layers: (units,).

    Args:
        w1, g1: The layer that makes them and its gradient, (units, in).
        b1, gb1: Its bias, (units,).
        w2, g2: The layer that reads them, (out, units).
    """
    return ((w1 * g1).sum(1) + b1 * gb1).abs() + (w2 * g2).sum(0).abs()


def blocks_kept(n: int, depth: int, rule: str | Sequence[int]) -> list[int]:
    """Which of `n` blocks a network of `depth` blocks has, ascending.

    Args:
        rule: prefix, the first ones; spread, ⌊i·n/depth⌋; or the blocks in the order in which they go, so that what is
            kept is nested.
    """
    if rule == "prefix":
        return list(range(depth))
    if rule == "spread":
        return [i * n // depth for i in range(depth)]
    gone = set(list(rule)[: n - depth])
    return [block for block in range(n) if block not in gone]


def draw(n: int, k: int, generator: torch.Generator, rule: str) -> list[int]:
    """Which of `n` sizes, smallest first, learn in a step.

    Args:
        rule: random, k with replacement; sandwich, the largest, the smallest, and k − 2 random; all.
    """
    if rule == "all":
        return list(range(n))
    ends = [n - 1, 0][:k] if rule == "sandwich" else []
    return ends + torch.randint(n, (k - len(ends),), generator=generator).tolist()


def accumulated_gradient(gradients: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """The mean of gradients of beginnings of a tensor of this `shape`, 0 beyond each; one of no entries counts too."""
    total = gradients[0].new_zeros(tuple(shape))
    for gradient in gradients:
        beginning(total, gradient.shape).add_(gradient)
    return total / len(gradients)


def prefix_span(shape: Sequence[int], kept: Sequence[int], itemsize: int) -> int | None:
    """The bytes from its first on that the beginning `kept` of a stored tensor takes; None where it does not lie in
    one piece."""
    cut = [axis for axis, (n, size) in enumerate(zip(kept, shape, strict=True)) if n != size]
    return None if cut and math.prod(kept[: cut[-1]]) > 1 else math.prod(kept) * itemsize


def pooled_statistics(batches: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and variance over the first axis of all batches as one, float64: (…) each."""
    pool = _Pool()
    for batch in batches:
        pool.add(batch.double(), (0,))
    return pool.mean, pool.variance


def nested_target(weight: Tensor, error: Tensor, hessian: Tensor, start: int) -> Tensor:
    """W₂ − E₁H₁₂H₂₂⁻¹: what columns from `start` on aim at, once those before them are stored with an error.

    Args:
        weight: (…, columns).
        error: (…, start), the stored weights less the wanted ones.
        hessian: (columns, columns), the inputs' second moment.
    """
    moved = (error @ hessian[:start, start:]).reshape(-1, hessian.shape[0] - start)
    shift = torch.linalg.solve(hessian[start:, start:], moved, left=False)
    return weight[..., start:] - shift.reshape(weight[..., start:].shape)


class _Pool:
    """Mean and variance of what is added batch by batch (Chan, Golub, LeVeque 1979)."""

    def __init__(self) -> None:
        self.n, self.mean, self.squares = 0, torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)

    def add(self, batch: Tensor, over: Sequence[int]) -> None:
        """Adds what lies along the dimensions `over`."""
        variance, mean = torch.var_mean(batch, list(over), correction=0)
        n = math.prod(batch.shape[dim] for dim in over)
        apart, total = mean.double() - self.mean, self.n + n
        self.squares = self.squares + variance.double() * n + apart.square() * (self.n * n / total)
        self.mean, self.n = self.mean + apart * (n / total), total

    @property
    def variance(self) -> Tensor:
        return self.squares / max(1, self.n)


class Sortednet(SortednetSettings, StructurePass):
    """The network, its units sorted, and the smaller ones in it; see the module."""

    def restructure(self, subject: Subject) -> Outcome:
        """The network with networks of all sizes in it, trained together.

        Raises:
            CheckpointError: It has no units or no blocks that sizes could differ in.
        """
        original = copy.deepcopy(subject.module) if self.epochs else None
        groups = self._groups(subject)
        moved = self._sort(subject, groups)
        blocks, order = self._blocks(subject)
        subject.advance(0.1, "sorted")
        sizes = sorted(
            (self._size(subject, groups, blocks, order, width, depth) for width, depth in self.pairs),
            key=lambda size: (size.name == self.largest_name, size.facts["parameters"], size.facts["blocks"]),
        )
        self._refuse_alike((size.name, _likeness(size)) for size in sizes)
        whole, log = subject.module, []
        nest = self._nest(whole, sizes)
        if original is not None:
            log = subject.trainer(self, teacher=original, other=nest).train()
        for size in sizes:
            if not self._is_frozen(size):
                _measure(size.module, subject.batches)
            size.module.requires_grad_(False)
        if not self._is_frozen(sizes[-1]):  # its tensors are the whole's already, but for the statistics of its norms
            whole.load_state_dict(sizes[-1].module.state_dict())
        for size in sizes:
            _count_as(whole, size)
        report: dict[str, Any] = {
            "sizes": [{"size": size.name} | dict(size.facts) for size in sizes],
            "groups": len(groups), "moved": moved, "order": order,
        }  # fmt: skip
        chosen = tuple(size for size in sizes if self._is_within(size.name))
        return Outcome(whole.requires_grad_(False), report | ({"training": log} if log else {}), chosen)

    def foretell(self, subject: Subject) -> tuple[Foretold, ...]:
        """The sizes but for the largest, by shapes: where blocks go by what the outputs lose, as if the last ones went.

        Raises:
            CheckpointError: The network has no units or no blocks that sizes could differ in.
            RecipeError: Two sizes are the same network.
        """
        groups, branches = self._groups(subject), self._branches(subject)
        order = self._gone(branches, lambda allowed, gone: allowed[-1])
        sizes = [
            self._foretold(subject, groups, branches.operators, order, width, depth) for width, depth in self.pairs
        ]
        self._refuse_alike(
            (size.name, (pair, tuple(size.held.items()))) for pair, size in zip(self.pairs, sizes, strict=True)
        )
        return tuple(size for size in sizes if self._is_within(size.name))

    def _foretold(
        self, subject: Subject, groups: Sequence[Group], blocks: Sequence[Operator], order: Sequence[int],
        width: float, depth: float,
    ) -> Foretold:  # fmt: skip
        removal = self.removal(subject.module, groups, blocks, order, [width] * len(groups), depth)
        shapes, parameters = subject.surgeon.shapes(subject.module, removal), dict(subject.module.named_parameters())
        called = _numbered_anew(shapes, [block.name for block in blocks if block.whole], removal)
        learns = self.vectors == "own" and self.epochs > 0
        own = frozenset(
            called[name] for name, shape in shapes.items()
            if name.endswith(_STATISTICS) or (learns and name in parameters and len(shape) < 2)
        )  # fmt: skip
        name = self.names[self.pairs.index((width, depth))]
        return Foretold(name, {called[stored]: (stored, shape) for stored, shape in shapes.items()}, own)

    def _refuse_alike(self, sizes: Iterable[tuple[str, tuple[tuple[float, float], Any]]]) -> None:
        """Refuses shares of which two come to the same network, of widths at the full depth and of depths at the full
        width; where all that has a width is left out, widths are alike and may be.

        Args:
            sizes: Names, each with width and depth, and what tells the networks apart.

        Raises:
            RecipeError: They do, since what stays is a multiple.
        """
        known: dict[Any, str] = {}
        for name, (pair, key) in sizes:
            if 1.0 not in pair:
                continue
            if key in known:
                raise RecipeError(
                    f"sortednet: sizes {known[key]} and {name} are the same network, as its channels and neurons "
                    f"stay in multiples of {self.multiple}; write other widths or depths, or a smaller multiple"
                )
            known[key] = name

    def _is_within(self, name: str) -> bool:
        """Whether the size is one of those that the artifact holds beside the largest."""
        return name in (self.ship or self.names) and name != self.largest_name

    def _is_frozen(self, size: Size) -> bool:
        """Whether it stays the original."""
        return size.name == self.largest_name and (self.largest == "frozen" or not self.epochs)

    def _groups(self, subject: Subject) -> list[Group]:
        """What gets narrower: units that lie one after another in every tensor, and are no residual stream."""
        if not self.chooses_units:
            return []
        tensors = named_tensors(subject.module)
        places = {name: place for place, name in enumerate(tensors)}
        found = [
            group for group in subject.choosable() if _in_a_row(group, tensors) and not _is_stream(group, places)
        ]  # fmt: skip
        if not found:
            raise CheckpointError(
                f"{type(subject.module).__name__}: sortednet finds no channels, heads or neurons that lie one after "
                "another and are no residual stream; write widths: [1] and several depths"
            )
        return found

    def _sort(self, subject: Subject, groups: Sequence[Group]) -> int:
        """Puts the most important units first; how many of them have moved.

        Raises:
            CheckpointError: The network then computes something else.
        """
        if self.order == "none" or not groups:
            return 0
        with torch.no_grad():
            before = first_output(subject.call(subject.batches[0]))
        moved = 0
        for group, scores in zip(groups, self._scores(subject, groups), strict=True):
            order = torch.argsort(scores, descending=True, stable=True)
            moved += int((order != torch.arange(len(order))).sum())
            subject.surgeon.sort(subject.module, group, order)
        with torch.no_grad():
            apart = (first_output(subject.call(subject.batches[0])) - before).abs().max()
        if float(apart) > max(_SAME, _SAME * float(before.abs().max())):
            raise CheckpointError(
                f"{type(subject.module).__name__}: with its units in another order it computes something else, by "
                f"{float(apart):.2g}; write order: none, or widths: [1] and several depths"
            )
        return moved

    def _scores(self, subject: Subject, groups: Sequence[Group]) -> list[Tensor]:
        """The importance of every unit, (units,) per group."""
        if self.order == "taylor":
            return _taylor(subject, groups)
        if self.order == "lrp":
            names = {id(parameter): name for name, parameter in subject.module.named_parameters()}
            layers = attribute(names, subject.call, subject.batches, subject.labels, _RULES)
        else:
            squares = {name: p.detach().square() for name, p in subject.module.named_parameters()}
            layers = {name: each for name, each in squares.items() if each.dim() > 1}
        return [unit_scores(group, layers) for group in groups]

    def _blocks(self, subject: Subject) -> tuple[list[Operator], list[int]]:
        """What depths differ in, and the order in which it goes.

        Raises:
            CheckpointError: There is nothing that could go.
        """
        branches = self._branches(subject)
        if not branches.operators:
            return [], []
        return list(branches.operators), self._order(subject, branches)

    def _branches(self, subject: Subject) -> Branches:
        """The blocks, or branches that end in a sum; none where all sizes are as deep.

        Raises:
            CheckpointError: There is nothing that could go.
        """
        if self.depths == (1.0,):
            return Branches((), {}, frozenset())
        found = subject.surgeon.blocks(subject.module)
        branches = Branches(tuple(found), {}, frozenset()) if found else subject.erasable()
        if not branches.operators:
            raise CheckpointError(
                f"{type(subject.module).__name__}: sortednet finds no blocks, nor branches that end in a sum, to leave "
                "out; write depths: [1]"
            )
        tensors = named_tensors(subject.module)
        return Branches(_one_of_each_sum(branches, tensors), branches.feeds, branches.sums)

    def _order(self, subject: Subject, branches: Branches) -> list[int]:
        """The order in which blocks go: each next one is that without which the outputs change least."""
        batches = _first(subject.batches, len(branches.operators)) if self.blocks == "chain" else []
        with torch.no_grad():
            wanted = [first_output(subject.call(batch)) for batch in batches]

        def missed_least(allowed: Sequence[int], gone: Sequence[int]) -> int:
            errors = {
                b: _apart(subject, batches, [branches.operators[each] for each in (*gone, b)], wanted) for b in allowed
            }
            return min(errors, key=errors.__getitem__)

        return self._gone(branches, missed_least)

    def _gone(self, branches: Branches, choose: Callable[[Sequence[int], Sequence[int]], int]) -> list[int]:
        """The order in which blocks go, down to the smallest depth; nothing where it is told by their places.

        Args:
            choose: Of the blocks that may go next, one, given those that are gone.

        Raises:
            CheckpointError: So many cannot go.
        """
        if self.blocks != "chain" or not branches.operators:
            return []
        n = len(branches.operators)
        least = min(_n_blocks(share, branches.operators) for share in self.depths)
        gone: list[int] = []
        while len(gone) < n - least:
            left = [block for block in range(n) if block not in gone]
            allowed = [b for b in left if branches.connected([branches.operators[each] for each in (*gone, b)])]
            if not allowed:
                raise CheckpointError(
                    f"sortednet: without {len(gone) + 1} of its {n} branches nothing leads through the network; write "
                    f"depths of {1 - len(gone) / n:.2f} and more"
                )
            gone.append(choose(allowed, gone))
        return gone

    def _size(
        self, subject: Subject, groups: Sequence[Group], blocks: Sequence[Operator], order: Sequence[int],
        width: float, depth: float,
    ) -> Size:  # fmt: skip
        """The network of one size alone, its parameters views of the whole's."""
        removal = self.removal(subject.module, groups, blocks, order, [width] * len(groups), depth)
        name = self.names[self.pairs.index((width, depth))]
        module, renamed = self.part(subject.surgeon, subject.module, removal)
        facts = {
            "width": width, "depth": depth, "blocks": _n_blocks(depth, blocks),
            "parameters": sum(parameter.numel() for parameter in module.parameters()),
        }  # fmt: skip
        return Size(name, module, renamed, facts)

    def groups_and_blocks(self, subject: Subject) -> tuple[list[Group], list[Operator]]:
        """What may get narrower, and what may be left out, of a network that is sorted already."""
        return self._groups(subject), list(self._branches(subject).operators)

    def removal(
        self, module: nn.Module, groups: Sequence[Group], blocks: Sequence[Operator], order: Sequence[int],
        shares: Sequence[float], depth: float,
    ) -> dict[Group, Tensor]:  # fmt: skip
        """What goes of each group, of which a share of its own stays, and which blocks.

        Args:
            module: The whole network.
            shares: Widths of `widths`, one for each group.
            order: Of `blocks: chain`, that in which blocks go.
        """
        found: dict[Group, Tensor] = {}
        tensors = named_tensors(module)
        for group, width in zip(groups, shares, strict=True):
            share, multiple = width, self.multiple
            rows = max(member.index.shape[1] for member in group.producers)
            if rows > 1 and any(tensors[member.tensor].dim() > 2 for member in group.producers):
                multiple //= math.gcd(multiple, rows)  # groups of a convolution, each of so many channels
            elif rows > 1:
                share, multiple = self.heads_of(width), 1
            kept = widths(group.size, [share], multiple)[0]
            if kept < group.size:
                found[group] = torch.arange(kept, group.size)
        rule = order if self.blocks == "chain" else self.blocks
        stays = set(blocks_kept(len(blocks), _n_blocks(depth, blocks), rule))
        return found | {block: torch.tensor([0]) for number, block in enumerate(blocks) if number not in stays}

    def part(
        self, surgeon: Surgeon, whole: nn.Module, removal: Mapping[Group, Tensor]
    ) -> tuple[nn.Module, dict[str, str]]:  # fmt: skip
        """The network without these, its parameters views of the whole's; and its tensors that are called otherwise."""
        module = surgeon.remove(copy.deepcopy(whole), removal)
        renamed = _renamed(whole, module)
        lay_over(module, whole, renamed)
        return module, renamed

    def measured(self, module: nn.Module, batches: Sequence[Batch]) -> None:
        """The network's batch norms take mean and variance anew, in place."""
        _measure(module, batches)

    def _nest(self, whole: nn.Module, sizes: Sequence[Size]) -> Nest:
        n = len(sizes) - (self.largest == "frozen")

        def own(number: int, name: str, tensor: Tensor) -> bool:
            return self.vectors == "own" and tensor.dim() < 2 and number < len(sizes) - 1

        return Nest(
            whole, [size.module for size in sizes], [size.renamed for size in sizes], own,
            lambda generator: draw(n, self.draws, generator, self.draw), accumulated_gradient,
            self.largest == "frozen", self.draw == "random", self.draw == "sandwich",
        )  # fmt: skip


def _likeness(size: Size) -> tuple[tuple[float, float], Any]:
    """Its width and depth, and what tells its network from others."""
    shapes = tuple((name, tuple(tensor.shape)) for name, tensor in size.module.named_parameters())
    return (size.facts["width"], size.facts["depth"]), (shapes, *sorted(size.renamed.items()))


def _numbered_anew(names: Iterable[str], blocks: Sequence[str], gone: Collection[Group]) -> dict[str, str]:
    """Tensor of a network -> as it is called in one whose list of `blocks` is shorter by those that are gone."""
    without = {group.name for group in gone}
    number = {name: place for place, name in enumerate(name for name in blocks if name not in without)}
    found = {name: name for name in names}
    for block, place in number.items():
        path = block.rpartition(".")[0]
        for name in found:
            if name.startswith(f"{block}."):
                found[name] = f"{path}.{place}.{name[len(block) + 1 :]}"
    return found


def _count_as(whole: nn.Module, size: Size) -> None:
    """A size's norms have seen as many batches as the whole's: nothing computes with it, and it need not be stored."""
    counts = {name: buffer for name, buffer in whole.named_buffers() if name.endswith(_COUNT)}
    for name, buffer in size.module.named_buffers():
        stored = size.renamed.get(name, name)
        if stored in counts:
            buffer.copy_(counts[stored])


def _n_blocks(share: float, blocks: Sequence[Operator]) -> int:
    """How many stay; of blocks of a list one at least."""
    n = round(share * len(blocks))
    return max(1, n) if blocks and blocks[0].whole else n


def _one_of_each_sum(branches: Branches, tensors: Mapping[str, Tensor]) -> tuple[Operator, ...]:
    """Of branches that cannot both go, as the two sides of a sum, the one that holds more; in their order."""
    size = {
        operator: sum(tensors[name].numel() for name in {member.tensor for member in operator.members})
        for operator in branches.operators
    }
    kept: list[Operator] = []
    for operator in sorted(branches.operators, key=lambda each: -size[each]):
        if all(branches.connected([operator, other]) for other in kept):
            kept.append(operator)
    return tuple(operator for operator in branches.operators if operator in kept)


def _in_a_row(group: Group, tensors: dict[str, Tensor]) -> bool:
    """Whether in every tensor the units are all there is, one after another: the first ones are its beginning."""
    return all(
        torch.equal(member.index.sort(1).values.flatten(), torch.arange(tensors[member.tensor].shape[member.dim]))
        for member in group.members
    )


def _is_stream(group: Group, places: dict[str, int]) -> bool:
    """Whether layers add to what others have read already, by the order in which the network holds them."""
    read = [places[m.tensor] for m in group.members if m.role == "consumer" and not m.tensor.endswith(_STATISTICS)]
    return bool(read) and min(read) < max(places[member.tensor] for member in group.producers)


def _taylor(subject: Subject, groups: Sequence[Group]) -> list[Tensor]:
    """Σ over batches of |Σ w⊙g| of what makes a unit, and of what reads it; float64 (units,) per group."""
    found = [torch.zeros(group.size, dtype=torch.float64) for group in groups]
    parameters = dict(subject.module.named_parameters())
    chosen = {member.tensor for group in groups for member in group.members} & set(parameters)
    wanted = {name: parameters[name].requires_grad_(True) for name in sorted(chosen)}
    for number, batch in enumerate(subject.batches):
        mode = Observed({}, Composite("taylor", Rule("zplus"), Rule("epsilon"), False))
        with torch.enable_grad(), mode:
            output = mode.logits(first_output(subject.call(batch)))
        label = None if subject.labels is None else subject.labels[number]
        start = start_of(output.detach(), label, "taylor", torch.Generator().manual_seed(number))
        gradients = torch.autograd.grad(output, list(wanted.values()), start, allow_unused=True)
        by_name = dict(zip(wanted, gradients, strict=True))
        for group, scores in zip(groups, found, strict=True):
            for role in ("producer", "consumer"):
                scores += _products(group, role, wanted, by_name).abs()
    subject.module.requires_grad_(False)
    return found


def _products(
    group: Group, role: str, weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor | None]
) -> Tensor:  # fmt: skip
    """Σ w⊙g of the entries that a unit has in tensors of that role: (units,)."""
    total = torch.zeros(group.size, dtype=torch.float64)
    for member in group.members:
        gradient = gradients.get(member.tensor)
        if member.role == role and gradient is not None:
            product = (weights[member.tensor].detach() * gradient).movedim(member.dim, 0).double()
            total += product.reshape(len(product), -1).sum(1)[member.index].sum(1)
    return total


@torch.no_grad()
def _apart(
    subject: Subject, batches: Sequence[Batch], gone: Sequence[Operator], wanted: Sequence[Tensor]
) -> float:  # fmt: skip
    """How far the outputs are from the `wanted` without these blocks: the sum of squares, of classes of their logs."""
    total = 0.0
    with subject.surgeon.skipping(subject.module, gone):
        for batch, target in zip(batches, wanted, strict=True):
            output = first_output(subject.call(batch))
            if output.dim() == 2:
                log_p, log_q = target.log_softmax(-1), output.log_softmax(-1)
                total += float((log_p.exp() * (log_p - log_q)).sum())
            else:
                total += float((output - target).square().mean())
    return total


def _first(batches: Sequence[Batch], n_blocks: int) -> list[Batch]:
    """Examples that tell the order of so many blocks: batches, or a part of the first one."""
    rows = next(iter(batches[0].values()))
    tokens = rows[0].numel() if "input_ids" in batches[0] else 1
    n = max(1, min(_JUDGED, JUDGED_TOKENS // n_blocks**2 // tokens))
    if n < len(rows):
        return [{name: values[:n] for name, values in batches[0].items()}]
    found, counted = [], 0
    for batch in batches:
        if found and counted >= n:
            break
        found.append(batch)
        counted += len(next(iter(batch.values())))
    return found


def _renamed(whole: nn.Module, smaller: nn.Module) -> dict[str, str]:
    """Tensor of the smaller network -> the whole's, where a list of blocks became shorter."""
    lists = {}
    for path, holder in smaller.named_modules():
        if getattr(holder, KEPT, None):
            before = kept_children(whole.get_submodule(path))
            lists[path] = [before.index(child) for child in kept_children(holder)]
    found = {}
    for name in [*smaller.state_dict(), *dict(smaller.named_buffers())]:
        for path, kept in lists.items():
            if name.startswith(f"{path}."):
                number, _, rest = name[len(path) + 1 :].partition(".")
                found[name] = f"{path}.{kept[int(number)]}.{rest}"
    return {name: stored for name, stored in found.items() if name != stored}


@torch.no_grad()
def _measure(module: nn.Module, batches: Sequence[Batch]) -> None:
    """The network's batch norms take mean and variance anew, pooled over all examples; each of them computes with those
    of its batch meanwhile."""
    norms = [child for child in module.modules() if isinstance(child, _BatchNorm) and child.track_running_stats]
    kept = [(norm.running_mean, norm.running_var, norm.num_batches_tracked) for norm in norms]
    pools = [_Pool() for _ in norms]

    def added_to(pool: _Pool) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, inputs: pool.add(inputs[0], [dim for dim in range(inputs[0].dim()) if dim != 1])

    pairs = zip(norms, pools, strict=True)
    handles = [norm.register_forward_pre_hook(added_to(pool)) for norm, pool in pairs]
    for norm in norms:
        norm.running_mean = norm.running_var = norm.num_batches_tracked = None
        norm.train()
    for batch in batches if norms else ():
        call(module, batch)
    for handle in handles:
        handle.remove()
    for norm, pool, (mean, variance, count) in zip(norms, pools, kept, strict=True):
        norm.running_mean, norm.running_var, norm.num_batches_tracked = mean, variance, count
        if pool.n and mean is not None and variance is not None:
            mean.copy_(pool.mean)
            variance.copy_(pool.variance)
    module.eval()
