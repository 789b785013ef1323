"""Mixed precision: a width for every tensor, so that the network loses least within a budget of bytes.

Costs come from `sensitivity`, the exact choice from `ops.allocation`, and the file that it makes is weighed before
anything is encoded: the weights are known to the byte, and the graph is written without them. What was chosen lies in
the run's working folder, so that an interrupted run goes on with it.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compressor.core.batch import Batch
from compressor.core.contract import Statistics
from compressor.core.files import write_text
from compressor.core.options import RunOptions
from compressor.core.progress import Progress
from compressor.core.work import Work
from compressor.data.samples import Samples
from compressor.export.planned import planned_bytes
from compressor.graph.blocks import layers, layout_of
from compressor.ops.allocation import Frontier, frontier
from compressor.passes.registry import load_pass
from compressor.plan.plan import Plan
from compressor.sweeps.network import Network
from compressor.sweeps.survey import Survey
from compressor.widths.ladder import Ladder, Option
from compressor.widths.losses import MANY_EXAMPLES, Curve, Judge, Judged, Kind, outputs, probe
from compressor.widths.sensitivity import Errors, fisher_factors, has_fisher, tensor_errors

WORDS: dict[Kind, str] = {
    "perplexity": "rise of perplexity", "cosine": "loss of cosine", "accuracy": "share of changed classes",
    "error": "relative error",
}  # fmt: skip
UNITS = 25_000
"""Of a budget: sizes are rounded up to one of them."""
_SMALL, _MENUS = 0.02, 8
"""Where the graph has a larger share of the bytes, this many sets of widths are tried."""
_ROUNDS = 4
_LEVELS = (1.0, 0.3, 0.1, 0.03, 0.01)
"""Of the largest cost, at which the loss is measured with noise."""


@dataclass(frozen=True)
class Target:
    """What an allocation aims at; with both it is the size, and the loss is a gate.

    size       bytes of all files; None: as few as the loss allows
    loss       the largest, of the network's `kind`
    kind       see `losses.Kind`
    labelled   whether the outputs are known to be logits of classes
    """

    size: int | None
    loss: float | None
    kind: Kind
    labelled: bool = False


def target_of(options: RunOptions, family: str, samples: Samples) -> Target:
    """What the options ask of a network of this family."""
    kinds: dict[str, Kind] = {"decoder": "perplexity", "encoder": "cosine"}
    labelled = any(getattr(source, "labels", None) is not None for source in (samples.calibration, samples.evaluation))
    return Target(options.target_size, options.max_loss, kinds.get(family, "accuracy"), labelled)


@dataclass(frozen=True)
class Allocation:
    """The plan with the chosen widths, and what compression.json says of it."""

    plan: Plan
    report: dict[str, Any]


@dataclass(frozen=True)
class Costs:
    """What each option of each tensor costs, how it was found, and the loss of a sum of them, of which kind it is."""

    importance: str
    of: dict[str, tuple[float, ...]]
    curve: Curve
    kind: Kind


def allocate(
    checkpoint: Any, batches: list[Batch], survey: Survey, ladder: Ladder, target: Target, work: Work,
    progress: Progress,
) -> Allocation:  # fmt: skip
    """Chooses a width for every tensor that a pass encodes."""
    file = work.folder / "allocation.json"
    if not file.exists():
        costs = find_costs(checkpoint, batches, survey, ladder, target, work, progress)
        weigh = _weighed(checkpoint, batches, ladder)
        with progress.task("choosing widths", 1) as task:
            chosen = _choose(ladder, target, costs, weigh)
            task.advance()
        report = _report(ladder, chosen, costs, target)
        report["expected_bytes"] = weigh(ladder.plan_of(ladder.numbered(chosen)))
        write_text(file, json.dumps({"chosen": chosen, "report": report}))
    stored = json.loads(file.read_text())
    return Allocation(ladder.plan_of(ladder.numbered(stored["chosen"])), stored["report"])


def refuse_unreachable(checkpoint: Any, batches: list[Batch], ladder: Ladder, target: Target) -> None:
    """Refuses a size beyond the ladder's ends, which are weighed where headers leave it open.

    Raises:
        UsageError: No choice of widths comes within 1 % below it.
    """
    if target.size is not None and not ladder.is_certain(target.size):
        ladder.refuse_unreachable(target.size, _weighed(checkpoint, batches, ladder))


def find_costs(
    checkpoint: Any, batches: list[Batch], survey: Survey, ladder: Ladder, target: Target, work: Work,
    progress: Progress,
) -> Costs:  # fmt: skip
    """Costs of every option, and what they come to."""
    network = Network(checkpoint)
    with progress.task("comparing widths", len(network.blocks) + 1) as task:
        errors = tensor_errors(network, batches, ladder.options, survey, work, lambda note: task.advance(note=note))
    few, many = probe(batches, target.kind), probe(batches, target.kind, MANY_EXAMPLES)
    judge = Judge.of(checkpoint, many, target.kind, target.labelled)

    def loss(changed: dict[str, Callable[[], Tensor]], on: list[Batch] = many) -> Judged:
        return judge.judge(list(outputs(checkpoint, on, changed)))

    if has_fisher(network, survey):
        importance, factors = "fisher", fisher_factors(network, errors, survey)
    else:
        importance, factors = "measured", {}
        with progress.task("measuring importance", len(errors)) as task:
            for name, found in errors.items():
                rise = loss({name: _quantised(checkpoint, network, name, found.probe, work)}, few).rise
                factors[name] = rise / max(found.quick, 1e-30)
                task.advance(note=name)
    of = {name: tuple(factors[name] * each for each in found.options) for name, found in errors.items()}
    with progress.task("measuring what costs come to", len(_LEVELS)) as task:
        curve = _curve(checkpoint, judge.kind, of, errors, factors, work, loss, task.advance)
    return Costs(importance, of, curve, judge.kind)


def _quantised(checkpoint: Any, network: Network, name: str, option: Option, work: Work) -> Callable[[], Tensor]:
    """A tensor as a quick pass stores it."""
    layout = layout_of(layers(network.module)[name])
    assert layout is not None

    def change() -> Tensor:
        weight = layout.matrix(checkpoint.read(name).float())
        known = Statistics(torch.eye(weight.shape[1]))
        encoding = load_pass(option.method.quick()).encode(weight, known, work.generator(name))
        return layout.tensor(encoding.decode())

    return change


def _curve(
    checkpoint: Any, kind: Kind, costs: dict[str, tuple[float, ...]], errors: dict[str, Errors],
    factors: dict[str, float], work: Work,
    loss: Callable[[dict[str, Callable[[], Tensor]]], Judged], advance: Callable[[], None],
) -> Curve:  # fmt: skip
    """The loss with white noise in all tensors, each at its share of a sum of costs."""
    shares = {name: each[len(each) // 2] for name, each in costs.items()}
    largest, total = sum(max(each) for each in costs.values()), max(sum(shares.values()), 1e-30)

    def noisy(name: str, level: float) -> Callable[[], Tensor]:
        variance = level * largest * shares[name] / total / max(factors[name] * errors[name].white, 1e-30)

        def change() -> Tensor:
            tensor = checkpoint.read(name).float()
            return tensor + variance**0.5 * torch.randn(tensor.shape, generator=work.generator(f"noise {name}"))

        return change

    points = []
    for level in _LEVELS if largest > 0 else ():
        points.append((level * largest, loss({name: noisy(name, level) for name in costs}).promised))
        advance()
    return Curve.of(kind, points)


def _choose(ladder: Ladder, target: Target, costs: Costs, weigh: Callable[[Plan], int]) -> dict[str, int]:
    """The number of each tensor's option."""
    if target.size is None:
        assert target.loss is not None
        menu = Menu.of(ladder, costs, ladder.ends()[1].bytes_after)
        found = menu.frontier.smallest(costs.curve.cost(target.loss)) or menu.frontier.within(math.inf)
        return menu.chosen(found)
    size, graph = target.size, ladder.plan.files.get("model.onnx", 0)
    widths = sorted({option.spec.code_bits for options in ladder.options.values() for option in options})
    allowed = [set(widths)]
    if graph > _SMALL * size:  # what a width needs in the graph, once for all tensors, decides whether it is worth it
        allowed = [set(part) for n in range(1, len(widths) + 1) for part in itertools.combinations(widths, n)]
    menus = [Menu.of(ladder, costs, size + graph, part) for part in allowed]
    best: Weighed | None = None
    for menu in sorted(menus, key=lambda menu: menu.frontier.costs[-1])[:_MENUS]:
        if best is not None and best.close and menu.frontier.costs[-1] >= best.cost:
            break
        found = closest(menu, ladder, size, weigh)
        best = min((each for each in (best, found) if each is not None), key=lambda each: each.order, default=None)
    if best is not None:
        return best.chosen
    return dict.fromkeys(costs.of, 0)


@dataclass(frozen=True)
class Menu:
    """The tensors with some of their options, of some widths; `kept` are their numbers."""

    kept: dict[str, list[int]]
    frontier: Frontier
    costs: Costs

    @classmethod
    def of(cls, ladder: Ladder, costs: Costs, size: int, widths: Collection[float] | None = None) -> Menu:
        """For plans of up to `size` bytes."""
        kept = {}
        for name in costs.of:
            options = ladder.options[name]
            some = [at for at, each in enumerate(options) if widths is None or each.spec.code_bits in widths]
            kept[name] = some or list(range(len(options)))
        sizes = [[ladder.options[name][at].nbytes for at in some] for name, some in kept.items()]
        prices = [[costs.of[name][at] for at in some] for name, some in kept.items()]
        base, most = sum(map(min, sizes)), sum(map(max, sizes))
        rest = ladder.reach()[0] - sum(ladder.options[name][0].nbytes for name in costs.of)
        budget = max(base, min(most, size - rest))
        return cls(kept, frontier(sizes, prices, budget, max(1, (budget - base) // UNITS)), costs)

    def chosen(self, found: list[int]) -> dict[str, int]:
        """The options' numbers by tensor."""
        return {name: some[at] for (name, some), at in zip(self.kept.items(), found, strict=True)}

    def land(self, ladder: Ladder, limit: int) -> dict[str, int]:
        """The cheapest choice whose plan has at most `limit` bytes; the smallest where none has."""
        least, most = 0, len(self.frontier.costs) - 1
        while least < most:
            middle = (least + most + 1) // 2
            chosen = self.chosen(self.frontier.within(self.frontier.base + middle * self.frontier.resolution))
            fits = ladder.plan_of(ladder.numbered(chosen)).bytes_after <= limit
            least, most = (middle, most) if fits else (least, middle - 1)
        return self.chosen(self.frontier.within(self.frontier.base + least * self.frontier.resolution))


@dataclass(frozen=True)
class Weighed:
    """A choice, what it costs, and whether it comes within 1 % below the target."""

    chosen: dict[str, int]
    cost: float
    close: bool

    @property
    def order(self) -> tuple[bool, float]:
        return (not self.close, self.cost)


def closest(menu: Menu, ladder: Ladder, size: int, weigh: Callable[[Plan], int]) -> Weighed | None:
    """The cheapest choice of at most `size` bytes, in a few rounds: how far a plan is off shows when it is weighed."""
    best: Weighed | None = None
    limit, low, high, rounds = size, 0, 2 * size, 0
    while rounds < _ROUNDS or best is None:
        chosen = menu.land(ladder, limit)
        plan = ladder.plan_of(ladder.numbered(chosen))
        weight = weigh(plan)
        cost = sum(menu.costs.of[name][at] for name, at in chosen.items())
        if weight <= size:
            found = Weighed(chosen, cost, weight >= 0.99 * size)
            best = found if best is None else min(best, found, key=lambda each: each.order)
            if weight >= 0.998 * size or cost <= menu.frontier.costs[-1]:
                break
            low = limit
        elif plan.bytes_after >= high:
            break  # there is no smaller one
        else:  # what the plan itself has, not its limit, is too much
            limit = high = plan.bytes_after
        limit += size - weight
        if not low < limit < high:
            limit = (low + high) // 2
        if high - low < 0.0005 * size:
            break
        rounds += 1
    return best


def _weighed(checkpoint: Any, batches: list[Batch], ladder: Ladder) -> Callable[[Plan], int]:
    """Bytes of a plan's artifact: exactly, where the graph can be written without its weights."""
    kind, known = ladder.recipe.export.activations, {}
    if ladder.format != "onnx" or ladder.mode == "standard" or kind == "static_int8":
        return lambda plan: plan.bytes_after

    def weigh(plan: Plan) -> int:
        if plan.tensors not in known:
            known[plan.tensors] = planned_bytes(plan, checkpoint, ladder.mode, kind == "exact", batches)
        return known[plan.tensors]

    return weigh


def _report(ladder: Ladder, chosen: dict[str, int], costs: Costs, target: Target) -> dict[str, Any]:
    options = ladder.numbered(chosen)
    cost = sum(costs.of[name][at] for name, at in chosen.items())
    tensors = {
        name: {"bits": option.spec.code_bits, "stored": option.spec.label, "bytes": option.nbytes,
               "cost": costs.of[name][chosen[name]]}
        for name, option in options.items()
    }  # fmt: skip
    return {
        "target_size": target.size, "max_loss": target.loss, "kind": costs.kind, "importance": costs.importance,
        "cost": cost, "predicted_loss": costs.curve.loss(cost), "measured_costs": list(costs.curve.points),
        "tensors": tensors,
    }  # fmt: skip


def summary(report: dict[str, Any]) -> str:
    """The choice in lines of text: tensors that are alike in all blocks on one, with how many have which width."""
    rows: dict[str, Counter[str]] = {}
    for name, entry in report["tensors"].items():
        rows.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "*", name), Counter())[entry["stored"]] += 1
    lines = [f"widths by {report['importance']} importance:"]
    for name, counts in rows.items():
        lines.append(f"  {name}: {', '.join(f'{n} × {stored}' for stored, n in sorted(counts.items()))}")
    expected = f"about {report['expected_bytes'] / 1e6:,.2f} MB"
    return "\n".join([*lines, f"  {expected}; predicted {WORDS[report['kind']]}: {report['predicted_loss']:.2%}"])
