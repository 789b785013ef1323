"""The encoding sweep: every block once, in order, with inputs from the compressed prefix, and its parts to disk.

What is finished lies as one safetensors file per block in the run's working folder, so that an interrupted run goes on
at the first block without one, and gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressor.core.batch import Batch
from compressor.core.encoding import Affine, Dense, Layout, Refined
from compressor.core.errors import PassError
from compressor.core.passes import Need, Statistics
from compressor.core.spec import DenseSpec, RefinedSpec, Spec
from compressor.core.tensors import EncodedTensor, EncodedTensors, write_tensors
from compressor.core.work import Work
from compressor.graph.blocks import geometry, layers, layout_of, unfolds
from compressor.learning.distillation import Rates, Student, reconstruct
from compressor.passes.registry import load_pass
from compressor.plan.plan import Plan, PlannedTensor
from compressor.plan.recipe import Recipe
from compressor.sweeps.backward import head_of
from compressor.sweeps.gradients import load_gradients
from compressor.sweeps.means import correct_means, layer_means
from compressor.sweeps.network import Network, hidden_of, layer_stages, n_examples, second_moments
from compressor.sweeps.prefix import Settled
from compressor.sweeps.sparsity import allocated_shares
from compressor.sweeps.survey import Survey

_ROWS = 4096
"""Looked at in one piece: masks of a whole table are large."""

Learners = dict[str, Any]
"""Name of a tensor -> what learns it on its block's output, of a pass's own."""


@dataclass(frozen=True)
class Chain:
    """What one matrix goes through: `prune` says which weights stay, `encode` how they are stored."""

    encode: Any
    prune: Any = None

    @property
    def needs(self) -> frozenset[Need]:
        return self.encode.needs | (self.prune.needs if self.prune else frozenset())


@dataclass(frozen=True)
class Choice:
    """Which passes a tensor goes through, as the plan says."""

    recipe: Recipe
    plan: Plan

    def of(self, name: str, module: nn.Module) -> Chain | None:
        """The passes, or None where the tensor stays dense."""
        planned = self._planned.get(name)
        if planned is None or planned.method is None or layout_of(module) is None:
            return None
        return Chain(load_pass(planned.method), planned.prune and load_pass(planned.prune))

    def spec(self, name: str) -> Spec | None:
        """How the plan says a tensor is stored."""
        return self._planned[name].spec if name in self._planned else None

    def dense(self, name: str, tensor: Tensor) -> EncodedTensor:
        """The tensor as it is, floats in the precision that the plan says."""
        if not tensor.is_floating_point():
            return EncodedTensor.dense(tensor, tensor.dtype)
        spec = self.spec(name)
        half = spec.dtype == "F16" if isinstance(spec, DenseSpec) else self.recipe.export.dense == "float16"
        return EncodedTensor.dense(tensor, torch.float16 if half else torch.float32)

    @cached_property
    def _planned(self) -> dict[str, PlannedTensor]:
        return {tensor.name: tensor for tensor in self.plan.tensors}


@torch.no_grad()
def encode_network(
    network: Network, batches: list[Batch], recipe: Recipe, plan: Plan, survey: Survey, work: Work,
    advance: Callable[[str], None],
) -> tuple[EncodedTensors, list[Path]]:  # fmt: skip
    """Encodes all tensors of a network; returns them, read lazily from the working folder, and the files."""
    files = []
    choice = Choice(recipe, plan)
    if network.outside:
        files.append(_outside(network, choice, survey, token_counts(batches), work))
        advance("tables")
    shares = allocated_shares(network, plan, work.folder)
    learning = next((step.settings for step in recipe.passes if getattr(step.settings, "block_steps", 0)), None)
    targets = _original_outputs(network, batches) if learning and has_blocks(network) else None
    for name, block, reached in network.sweep(batches):
        file = work.file(name)
        wanted = next(targets) if targets else []
        if not file.exists():
            means = layer_means(block, reached) if recipe.calibration.correct_means else {}
            learners: Learners = {}
            tensors = _encode_block(network, block, name, reached, choice, shares, survey, work, learners)
            if targets:
                open_tensors = _reconstruct(
                    network, block, name, tensors, reached, wanted, survey, learning, plan.pruned, work, learners
                )
                tensors |= open_tensors
            if means:
                moved = correct_means(block, reached, means)
                named = {_stored_name(network, name, part): tensor for part, tensor in moved.items()}
                tensors |= {each: choice.dense(each, tensor) for each, tensor in named.items()}
            write_tensors(file, tensors)
        _compute_with(network, block, name, EncodedTensors([file]))
        files.append(file)
        advance(name)
        if name == "":
            break
    return EncodedTensors(files, _ties(network)), files


def _stored_name(network: Network, block: str, part: str) -> str:
    """The name that a block's parameter is stored by, which may be another's that it is tied to."""
    name = f"{block}.{part}" if block else part
    return network.checkpoint.tied.get(name, name)


def has_blocks(network: Network) -> bool:
    """Whether the network has blocks to stream, and is not one itself."""
    return network.blocks != [""]


def _original_outputs(network: Network, batches: list[Batch]) -> Iterator[list[Tensor]]:
    """What each block of the original gives, from the original's own inputs."""
    original = Network(network.checkpoint, network.fast)
    sweep = original.sweep(batches)
    next(sweep)
    for _, _, reached in sweep:
        yield [hidden_of(arguments) for arguments in reached]
    yield original.last


def _reconstruct(
    network: Network, block: nn.Module, prefix: str, tensors: dict[str, EncodedTensor], reached: list,
    wanted: list[Tensor], survey: Survey, settings: Any, pruned: Collection[str], work: Work, learners: Learners,
) -> dict[str, EncodedTensor]:  # fmt: skip
    """The block's codebooks, scales, codes, norms and biases after learning on the original's output."""
    dotted = f"{prefix}."
    student = Student(
        block, tensors, settings.mapping_rate, settings.neighbours, settings.delta, dotted, pruned, learners
    )
    if not student.learned:
        return {}
    rates = Rates(settings.codebook_rate, settings.scale_rate, settings.dense_rate)
    entry = reconstruct(
        student, dotted, lambda module, i: network.step(module, reached[i]), wanted, survey.importance.get(prefix),
        survey.channels.get(prefix), settings.block_steps, rates, getattr(load_pass(settings), "optimiser", None),
    )  # fmt: skip
    work.log.append({"block": prefix} | entry)
    return student.results()


def _ties(network: Network) -> dict[str, str]:
    first: dict[int, str] = {}
    ties = {}
    for name, parameter in network.module.named_parameters(remove_duplicate=False):
        canonical = first.setdefault(id(parameter), name)
        if canonical != name:
            ties[name] = canonical
    return ties


def token_counts(batches: list[Batch]) -> Tensor:
    """How often each token id is in the text, as far as the largest; empty where the network is given none."""
    ids = [batch["input_ids"].flatten() for batch in batches if "input_ids" in batch]
    return torch.bincount(torch.cat(ids)) if ids else torch.zeros(0, dtype=torch.long)


def _outside(network: Network, choice: Choice, survey: Survey, counts: Tensor, work: Work) -> Path:
    """Encodes what lies in no block: embeddings, head, norms; the network computes with the result from here on."""
    file = work.file("outside")
    ties = _ties(network)
    canonical = dict.fromkeys(ties.get(name, name) for name in network.outside)
    if not file.exists():
        tensors: dict[str, EncodedTensor] = {}
        for name in canonical:  # one at a time: tables are large
            with network.loaded([name]):
                tensors[name] = encode_outside(network, name, choice, survey, counts, work)
        write_tensors(file, tensors)
    stored = EncodedTensors([file])
    for name in stored:
        tensor = stored[name]
        if not isinstance(tensor.encoding, Dense) or tensor.encoding.values.dtype == torch.float16:
            network.replace(name, lambda name=name: stored[name].decode())
    return file


def encode_outside(
    network: Network, name: str, choice: Choice, survey: Survey, counts: Tensor, work: Work
) -> EncodedTensor:
    """A tensor that lies in no block, from what is loaded."""
    module = layers(network.module).get(name)
    chain = choice.of(name, module) if module is not None else None
    if module is None or chain is None:
        return choice.dense(name, network.module.state_dict(keep_vars=True)[name])
    moment, head = None, head_of(network.module)
    if survey.head_moment is not None and head is not None and head.weight is module.weight:
        moment = survey.head_moment / survey.head_moment.diagonal().mean()
        if isinstance(module, nn.Embedding):
            moment = moment + choice.recipe.embeddings.ridge * torch.eye(len(moment))
    found = _encode(chain, name, module, Statistics(moment), work)
    spec = choice.spec(name)
    if not isinstance(spec, RefinedSpec):
        return found
    assert isinstance(found.encoding, Affine)
    rows = _most_frequent(counts, found.encoding.shape[0], spec.n)
    left = found.layout.matrix(module.weight.data.float())[rows] - found.encoding.decode()[rows]
    extra = load_pass(choice.recipe.embeddings.extra())
    encoded = extra.encode(left, torch.eye(left.shape[1]) if moment is None else moment, work.generator(name))
    return EncodedTensor(Refined(found.encoding.shape, found.encoding, encoded, rows.int()), found.layout)


def _most_frequent(counts: Tensor, n_rows: int, n: int) -> Tensor:
    """The `n` rows (n,) of a table whose tokens are most frequent, ascending; of equals the first.

    Vocabularies begin with their most frequent tokens, so that these make up for a short text.
    """
    padded = torch.zeros(n_rows, dtype=torch.long)
    padded[: min(len(counts), n_rows)] = counts[:n_rows]
    return padded.argsort(descending=True, stable=True)[:n].sort().values


def _encode_block(
    network: Network, block: nn.Module, prefix: str, reached: list, choice: Choice, shares: Mapping[str, float],
    survey: Survey, work: Work, learners: Learners,
) -> dict[str, EncodedTensor]:  # fmt: skip
    """The tensors of one block; its weights are replaced as they are encoded, so that later layers make up for it."""
    dotted = f"{prefix}." if prefix else ""
    found = layers(block, dotted)
    passes = {name: choice.of(name, module) for name, module in found.items()}
    gradients = load_gradients(work.folder, prefix) if any(_wants_gradient(chain) for chain in passes.values()) else {}
    n_sequences = max(1, sum(n_examples(arguments) for arguments in reached))
    tensors: dict[str, EncodedTensor] = {}
    encoded = [module.weight for name, module in found.items() if passes[name] is not None]
    settled = Settled(network, block, () if prefix else reached, encoded)
    for stage in layer_stages(network, block, dotted, reached[0]) if reached else ():
        for due in alike([name for name in stage.names if passes[name] is not None], found):
            moments, n_rows = {}, 0
            if unfolds(found[due[0]]) and any("data" in passes[name].needs for name in due):
                settled.advance()
                moments, n_rows = second_moments(
                    network, block, found, due, stage.calls, reached, survey.importance, settled.begun
                )  # fmt: skip
            for name in due:
                known = Statistics(moments.get(name), gradients.get(name), n_sequences, n_rows // n_sequences)
                known = replace(known, sparsity=shares.get(name))
                tensors[name] = _encode(passes[name], name, found[name], known, work, learners)
                found[name].weight.data = tensors[name].decode()
                settled.done(found[name].weight)
    for name, module in found.items():
        if passes[name] is not None and name not in tensors:
            tensors[name] = _encode(passes[name], name, module, Statistics(), work)
    done = tensors.keys() | _ties(network).keys()
    return tensors | {
        f"{dotted}{name}": choice.dense(f"{dotted}{name}", tensor)
        for name, tensor in block.state_dict(keep_vars=True).items()
        if f"{dotted}{name}" not in done
    }


def alike(names: list[str], found: Mapping[str, nn.Module]) -> list[list[str]]:
    """The layers in groups that make the same rows of their shared input: its second moment is that of the group."""
    groups: dict[tuple, list[str]] = {}
    for name in names:
        module = found[name]
        groups.setdefault((unfolds(module), geometry(module), layout_of(module).transposed), []).append(name)
    return list(groups.values())


def _wants_gradient(chain: Chain | None) -> bool:
    return chain is not None and chain.prune is not None and chain.prune.gradient_norm is not None


def _encode(
    chain: Chain, name: str, module: nn.Module, known: Statistics, work: Work, learners: Learners | None = None
) -> EncodedTensor:
    """A layer's weight through its chain; `learners` gets what is to learn on the block's output."""
    layout = layout_of(module)
    assert layout is not None
    weight, mask = layout.matrix(module.weight.data.float()), None
    if known.hessian is None and "data" in chain.needs:
        known = replace(known, hessian=torch.eye(weight.shape[1]))
    if chain.prune is not None:
        weight, mask = chain.prune.prune(weight, known)
    if learners is not None and getattr(chain.encode, "unit", "layer") == "block":
        learners[name] = chain.encode.learner(weight, known.hessian, mask)
        encoding = learners[name].result()
    else:
        encoding = chain.encode.encode(weight, known.hessian, work.generator(name), mask)
    decoded = encoding.decode()
    finite = all(bool(rows.isfinite().all()) for rows in decoded.split(_ROWS))
    if encoding.shape != tuple(weight.shape) or not finite:
        raise PassError(f"{name}: {chain.encode.name} gave an encoding that does not rebuild {tuple(weight.shape)}")
    if mask is not None and bool((decoded[~mask] != 0).any()):
        raise PassError(f"{name}: {chain.encode.name} brought back weights that {chain.prune.name} had dropped")
    return EncodedTensor(encoding, Layout(layout.shape, layout.transposed))


def _compute_with(network: Network, block: nn.Module, prefix: str, tensors: EncodedTensors) -> None:
    """Puts the decoded weights into the loaded block: what is evaluated is what is shipped."""
    dotted = f"{prefix}." if prefix else ""
    held = {**dict(block.named_parameters()), **dict(block.named_buffers())}
    for name in tensors:
        tensor = held.get(name.removeprefix(dotted))
        if tensor is not None and tensor.is_floating_point():
            tensor.data = tensors[name].decode()
