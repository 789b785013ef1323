"""What it costs to store a tensor in fewer bits: an estimate for each tensor and width, from the untouched network.

The error of a width is e = tr(D·H·Dᵀ), the mean squared error of the layer's output, with D = W − Ŵ of a sample of
rows and H the second moment of its inputs. A width's Ŵ comes from a quick stand-in for the pass, times how much better
the pass itself is at one width, on inputs that it was not given. What an error costs is k·e:

    fisher     k = ½·s, s the mean of (∂ℓ/∂y)² that the survey found, with H weighted by token: the second-order rise of
               ℓ in nats (Kronecker-factored, as in `survey`). For language models with blocks
    measured   k = (rise of the loss with this tensor alone at one width) / e, of the network's outputs. For all others

Costs add up. How the sum relates to the loss that is reported is measured with noise of the same costs (`Curve`). The
idea of importance as a measured or a Fisher loss: Yvinec et al., arXiv 2308.07662; additive costs: HAWQ-V3, Yao et al.,
ICML 2021, arXiv 2011.10680.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compressor.core.batch import Batch
from compressor.core.contract import Statistics
from compressor.core.passes import WeightSettings
from compressor.core.work import Work
from compressor.graph.blocks import Stage, layers, matrix_of, unfolds, weight_of
from compressor.ops.sums import total
from compressor.passes.registry import load_pass
from compressor.sweeps.backward import head_of
from compressor.sweeps.encode import has_blocks
from compressor.sweeps.moments import groups_of, layer_stages, moments_of
from compressor.sweeps.network import Arguments, Network
from compressor.sweeps.prefix import Settled
from compressor.sweeps.survey import Survey
from compressor.widths.ladder import Option, Options

Moments = tuple[Tensor, Tensor]
"""Second moments (in, in) of a layer's inputs: those that a pass is given, and those that its error is measured by."""

ROWS = 64
"""Of a matrix, on which widths are compared."""
TABLE_ROWS = 512


@dataclass(frozen=True)
class Errors:
    """Of one tensor: e of each option; e of the quick stand-in at `probe`, and of white noise of variance 1."""

    options: tuple[float, ...]
    quick: float
    probe: Option
    white: float


@torch.no_grad()
def tensor_errors(
    network: Network, batches: list[Batch], options: Options, survey: Survey, work: Work, advance: Callable[[str], None]
) -> dict[str, Errors]:
    """The errors of every option, block by block, in the untouched network."""
    found: dict[str, Errors] = {}
    for name, module in layers(network.module).items():
        if name in network.outside and name in options:
            with network.loaded([name]):
                found[name] = _outside(network, name, module, batches, options[name], survey, work)
    advance("tables")
    for block, module, reached in network.sweep(batches):
        prefix = f"{block}." if block else ""
        inside = layers(module, prefix)
        moments: dict[str, Moments] = {}
        compared = [weight_of(inside[name]) for name in inside.keys() & options.keys()]
        settled = Settled(network, module, () if block else reached, compared)
        for stage in layer_stages(network, module, prefix, reached[0]):
            for due in groups_of(stage, options, inside):
                if unfolds(inside[due[0]]):
                    moments = _moments(network, module, inside, due, stage, reached, survey, settled)
                for name in due:
                    settled.done(weight_of(inside[name]))
                    found[name] = _of_layer(inside[name], moments.pop(name, None), options[name], work.generator(name))
        for name in inside.keys() & options.keys() - found.keys():
            found[name] = _of_layer(inside[name], None, options[name], work.generator(name))
        advance(block)
        if not block:
            break
    return {name: found[name] for name in options if name in found}


def _moments(
    network: Network, block: nn.Module, inside: Mapping[str, nn.Module], due: list[str], stage: Stage,
    reached: list[Arguments], survey: Survey, settled: Settled,
) -> dict[str, Moments]:  # fmt: skip
    """Of each layer: to encode by, and to measure the error by.

    They are of different batches where importance is measured: fitted to 256 vectors of 1280 values, as behind a
    pooling, a pass looks better than it is.
    """
    n_parts = 1 if survey.importance or len(reached) < 2 else 2
    parts = [
        moments_of(
            network, block, inside, due, stage, reached[part::n_parts], survey.importance,
            settled.every(n_parts, part),
        )
        for part in range(n_parts)
    ]  # fmt: skip
    return {name: (parts[0][name][0], parts[-1][name][0]) for name in due}


def _outside(
    network: Network, name: str, module: nn.Module, batches: list[Batch], options: tuple[Option, ...], survey: Survey,
    work: Work,
) -> Errors:  # fmt: skip
    """A table of a language model: each row counts as often as its token comes, at the input and in the head."""
    generator, head = work.generator(name), head_of(network.module)
    if not survey.scales or head is None:
        return _of_layer(module, None, options, generator)
    weight = matrix_of(module).float()
    moment = survey.scales[""] * isinstance(module, nn.Embedding) * torch.eye(weight.shape[1])
    if head.weight is module.weight and survey.head_moment is not None:
        moment = moment + survey.head_moment
    ids = torch.cat([batch["input_ids"].flatten() for batch in batches])
    if len(weight) != head.weight.shape[0]:
        ids = torch.arange(len(weight))
    rows = ids[torch.randperm(len(ids), generator=generator)[:TABLE_ROWS]]
    return _errors(weight[rows], (moment, moment), 1 / len(rows), options, generator)


def _of_layer(
    module: nn.Module, moments: Moments | None, options: tuple[Option, ...], generator: torch.Generator
) -> Errors:
    weight = matrix_of(module).float()
    rows = torch.randperm(len(weight), generator=generator)[: ROWS if moments is not None else TABLE_ROWS]
    if moments is None:
        plain = torch.eye(weight.shape[1])
        moments = plain, plain
    return _errors(weight[rows], moments, len(weight) / len(rows), options, generator)


def _errors(
    weight: Tensor, moments: Moments, factor: float, options: tuple[Option, ...], generator: torch.Generator
) -> Errors:
    """Of rows (n, in) that stand for n·factor rows."""
    given, moment = moments

    def error(method: WeightSettings) -> float:
        difference = weight - load_pass(method).encode(weight, Statistics(given), generator).decode()
        return factor * float(total((difference @ moment) * difference).clamp_min(0))

    probe = len(options) // 2
    quick = [error(option.method.quick()) for option in options]
    better = error(options[probe].method) / max(quick[probe], 1e-30)
    white = factor * len(weight) * float(moment.diagonal().sum())
    return Errors(tuple(better * each for each in quick), quick[probe], options[probe], white)


def fisher_factors(network: Network, errors: Mapping[str, Errors], survey: Survey) -> dict[str, float]:
    """k of each tensor from the survey's gradients; nats per unit of error."""
    outside = set(network.outside)
    return {name: 0.5 * (1.0 if name in outside else survey.scales.get(name, 0.0)) for name in errors}


def has_fisher(network: Network, survey: Survey) -> bool:
    """Whether the survey tells what errors cost."""
    return has_blocks(network) and bool(survey.scales)
