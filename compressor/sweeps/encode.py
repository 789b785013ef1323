"""The encoding sweep: every block once, with inputs from the compressed prefix or from the original, its parts to disk.

What is finished lies as one safetensors file per block in the run's working folder, so that an interrupted run goes on
with the blocks that have none, and gives the same bytes.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from compressor.core.batch import Batch
from compressor.core.contract import Statistics
from compressor.core.encoding import Affine, Dense, Layout, Refined
from compressor.core.log import LOGGER
from compressor.core.passes import WeightSettings
from compressor.core.spec import RefinedSpec
from compressor.core.tensors import EncodedTensor, EncodedTensors, named_tensors, write_tensors
from compressor.core.work import Work
from compressor.graph.blocks import layers, layout_of, recurrent, unfolds, weight_of
from compressor.learning.reconstruction import reconstruct
from compressor.learning.student import Student
from compressor.passes.registry import load_pass
from compressor.plan.plan import Plan
from compressor.plan.recipe import Recipe
from compressor.sweeps.backward import head_of
from compressor.sweeps.chain import Chain, Choice, Learners
from compressor.sweeps.drift import Drift, blocks_beside
from compressor.sweeps.gradients import load_gradients
from compressor.sweeps.held import Held, folder_of_held
from compressor.sweeps.means import Means, correct_means, layer_means
from compressor.sweeps.moments import groups_of, layer_stages, moments_of
from compressor.sweeps.network import Arguments, Network, hidden_of, n_examples
from compressor.sweeps.prefix import Settled
from compressor.sweeps.sparsity import allocated_shares
from compressor.sweeps.survey import Survey, head_moment

_UNREACHED = "no token of the calibration data reaches %s: rounded as if every input counted alike"


@torch.no_grad()
def encode_network(
    network: Network, batches: list[Batch], recipe: Recipe, plan: Plan, survey: Survey, work: Work,
    advance: Callable[[str], None], elsewhere: Elsewhere | None = None,
) -> tuple[EncodedTensors, list[Path]]:  # fmt: skip
    """Encodes all tensors of a network; returns them, read lazily from the working folder, and the files.

    Args:
        elsewhere: Other processes, where blocks that are encoded on the original's inputs go to them.
    """
    files = []
    choice, survey = Choice(recipe, plan), survey.to(network.device)
    head = last_head(network, batches, recipe, survey)
    if network.outside:
        files.append(_outside(network, choice, survey, token_counts(batches), work, head))
        network.slack.give_back()
        advance("tables")
    shares = allocated_shares(network, plan, work.folder)
    if not choice.on_prefix:
        files += _encode_apart(network, batches, Apart(choice, shares, survey, work), advance, elsewhere)
        return EncodedTensors(files, _ties(network)), files
    files += _encode_in_order(network, batches, choice, shares, survey, work, advance)
    if head in network.outside:
        gc.collect()  # the original's last block and inputs: networks hold themselves in cycles
        network.slack.give_back()
        files.append(_head(network, batches, head, choice, survey, work))
        advance("head")
    return EncodedTensors(files, _ties(network)), files


def _encode_in_order(
    network: Network, batches: list[Batch], choice: Choice, shares: Mapping[str, float], survey: Survey, work: Work,
    advance: Callable[[str], None],
) -> list[Path]:  # fmt: skip
    """Encodes each block on what the compressed ones before it give."""
    files, recipe, plan = [], choice.recipe, choice.plan
    learning = recipe.learns_blocks if has_blocks(network) else None
    targets = None if learning is None else _original_outputs(network, batches)
    beside = blocks_beside(network, batches) if recipe.corrects_drift and has_blocks(network) else None
    with folder_of_held(work.folder / "held") as folder:
        for name, block, reached in network.sweep(batches):
            file = work.file(name)
            if not name:  # only by running it was found to have no blocks
                beside = targets = learning = None
            original = None if beside is None else next(beside)
            wanted = next(targets) if targets is not None else []
            if file.exists():
                _compute_with(block, name, EncodedTensors([file], device=network.device))
            else:
                means = layer_means(block, reached) if recipe.calibration.correct_means else {}
                learners: Learners = {}
                held = Held(network, block, reached, folder)
                drift = (
                    None if original is None else Drift(*original, f"{name}.", recipe.calibration, folder / "original")
                )
                tensors = _encode_block(
                    network, block, name, reached, choice, shares, survey, work, learners, held, drift
                )
                if learning is not None:
                    tensors |= _reconstruct(
                        network, block, name, tensors, reached, wanted, survey, learning, plan.pruned, work, learners
                    )
                if means:
                    tensors |= _with_means(network, block, name, reached, means, choice)
                write_tensors(file, tensors)
                del tensors
                same = _compute_with(block, name, EncodedTensors([file], device=network.device))
                if same and learning is None and not means:
                    held.settle()
                if drift is not None:
                    drift.settle()
            files.append(file)
            advance(name)
            if name == "":
                break
    return files


def last_head(network: Network, batches: list[Batch], recipe: Recipe, survey: Survey | None = None) -> str | None:
    """The weight of an output head that is encoded behind all blocks, on what the compressed ones give it.

    Not so where it is the embeddings' table too, which comes first, or where a survey knows the original's inputs.
    """
    known = survey is not None and survey.head_moment is not None
    if known or not batches or recipe.calibration.inputs != "prefix" or "data" not in recipe.required:
        return None
    return network.own_head


@dataclass(frozen=True)
class Apart:
    """All that a block's encoding depends on besides the original: not on any other block's."""

    choice: Choice
    shares: Mapping[str, float]
    survey: Survey
    work: Work

    def encode(self, network: Network, name: str, block: nn.Module, reached: list[Arguments]) -> None:
        """Writes the tensors of a block, which computes as before afterwards."""
        before = {each: tensor.data for each, tensor in named_tensors(block).items()}
        choice, work = self.choice, self.work
        means = layer_means(block, reached) if choice.recipe.calibration.correct_means else {}
        with folder_of_held(work.folder / f"held-{name}") as folder:
            held = Held(network, block, reached, folder)
            tensors = _encode_block(network, block, name, reached, choice, self.shares, self.survey, work, {}, held)
        if means:
            _compute_with(block, name, tensors)
            tensors |= _with_means(network, block, name, reached, means, choice)
            for each, tensor in named_tensors(block).items():
                tensor.data = before[each]
        write_tensors(work.file(name), tensors)


class Elsewhere(Protocol):
    """Processes that encode blocks."""

    def put(self, apart: Apart, network: Network, name: str, reached: list[Arguments]) -> Iterator[str]:
        """Has a block encoded; yields the names of others that are done by now.

        Raises:
            UsageError: It is the whole network.
        """
        ...

    def rest(self) -> Iterator[str]:
        """The names of those that were not done yet."""
        ...


def _encode_apart(
    network: Network, batches: list[Batch], apart: Apart, advance: Callable[[str], None], elsewhere: Elsewhere | None
) -> list[Path]:
    """Encodes each block on the original's inputs, which goes forwards once, as far as a block is missing."""
    left: list[str] | None = None
    for name, block, reached in network.sweep(batches):
        if left is None:  # only now is it known what the blocks are
            left = [each for each in network.blocks if not apart.work.file(each).exists()]
            for each in (each for each in network.blocks if each not in left):
                advance(each)
        if name in left:
            left.remove(name)
            if elsewhere is None:
                apart.encode(network, name, block, reached)
                advance(name)
            else:
                for done in elsewhere.put(apart, network, name, reached):
                    advance(done)
        if not left:
            break
    for done in elsewhere.rest() if elsewhere is not None else ():
        advance(done)
    return [apart.work.file(name) for name in network.blocks]


def _with_means(
    network: Network, block: nn.Module, prefix: str, reached: list[Arguments], means: Means, choice: Choice
) -> dict[str, EncodedTensor]:
    """What gives an encoded block's layers the means that they had."""
    moved = correct_means(block, reached, means)
    named = {_stored_name(network, prefix, part): tensor for part, tensor in moved.items()}
    return {name: choice.dense(name, tensor) for name, tensor in named.items()}


def _stored_name(network: Network, block: str, part: str) -> str:
    """The name that a block's parameter is stored by, which may be another's that it is tied to."""
    name = f"{block}.{part}" if block else part
    return network.checkpoint.tied.get(name, name)


def has_blocks(network: Network) -> bool:
    """Whether the network has blocks to stream, and is not one itself."""
    return network.blocks != [""]


def _original_outputs(network: Network, batches: list[Batch]) -> Iterator[list[Tensor]]:
    """What each block of the original gives, from the original's own inputs."""
    original = Network(network.checkpoint, network.fast, network.device)
    sweep = original.sweep(batches)
    next(sweep)
    for _, _, reached in sweep:
        yield [hidden_of(arguments) for arguments in reached]
    yield original.last


def _reconstruct(
    network: Network, block: nn.Module, prefix: str, tensors: dict[str, EncodedTensor],
    reached: list[Arguments], wanted: list[Tensor], survey: Survey, settings: WeightSettings, pruned: Collection[str],
    work: Work, learners: Learners,
) -> dict[str, EncodedTensor]:  # fmt: skip
    """The block's codebooks, scales, codes, norms and biases after learning on the original's output."""
    dotted, learning = f"{prefix}.", settings.block_learning
    assert learning is not None
    student = Student(block, tensors, learning.moves, dotted, pruned, learners)
    if not student.learned:
        return {}
    entry = reconstruct(
        student, dotted, lambda module, i: network.step(module, reached[i]), wanted, survey.importance.get(prefix),
        survey.channels.get(prefix), learning, load_pass(settings).optimiser,
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


def _outside(
    network: Network, choice: Choice, survey: Survey, counts: Tensor, work: Work, later: str | None
) -> Path:  # fmt: skip
    """Encodes what lies in no block, but for what comes `later`: embeddings, head, norms; the network computes with the
    result from here on, where blocks are given what the compressed ones before them make."""
    file = work.file("outside")
    ties = _ties(network)
    canonical = dict.fromkeys(ties.get(name, name) for name in network.outside if name != later)
    if not file.exists():
        tensors: dict[str, EncodedTensor] = {}
        for name in canonical:  # one at a time: tables are large
            with network.loaded([name]):
                tensors[name] = encode_outside(network, name, choice, survey, counts, work)
        write_tensors(file, tensors)
    stored = EncodedTensors([file], device=network.device)
    for name in stored if choice.on_prefix else ():
        tensor = stored[name]
        if not isinstance(tensor.encoding, Dense) or tensor.encoding.values.dtype == torch.float16:
            network.replace(name, lambda name=name: stored[name].decode())
    return file


def _head(
    network: Network, batches: list[Batch], name: str, choice: Choice, survey: Survey, work: Work
) -> Path:  # fmt: skip
    """Encodes the output head on what the compressed network gives it."""
    file = work.file("head")
    if not file.exists():
        known = dataclasses.replace(survey, head_moment=head_moment(network, batches, network.last))
        with network.loaded([name]):
            tensor = encode_outside(network, name, choice, known, token_counts(batches), work)
        write_tensors(file, {name: tensor})
    return file


def encode_outside(
    network: Network, name: str, choice: Choice, survey: Survey, counts: Tensor, work: Work
) -> EncodedTensor:
    """A tensor that lies in no block, from what is loaded."""
    module = layers(network.module).get(name)
    if name in recurrent(network.module) and (chain := choice.of_matrix(name)) is not None:
        return _by_values(chain, name, network.module.get_parameter(name), work)
    chain = choice.of(name, module) if module is not None else None
    if module is None or chain is None:
        return choice.dense(name, network.module.state_dict(keep_vars=True)[name])
    moment, head = None, head_of(network.module)
    if survey.head_moment is not None and head is not None and head.weight is module.weight:
        moment = survey.head_moment / survey.head_moment.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
        if isinstance(module, nn.Embedding):
            moment = moment + choice.recipe.embeddings.ridge * torch.eye(len(moment), device=moment.device)
    found = chain.of_layer(name, module, Statistics(moment), work.generator(name))
    spec = choice.spec(name)
    if not isinstance(spec, RefinedSpec):
        return found
    assert isinstance(found.encoding, Affine)
    rows = _most_frequent(counts, found.encoding.shape[0], spec.n).to(network.device)
    left = found.layout.matrix(weight_of(module).data)[rows].float() - found.encoding.of_rows(rows)
    extra = Chain(load_pass(choice.recipe.embeddings.extra()))
    encoded = extra.of_matrix(name, left, Statistics(moment), work.generator(name))
    assert isinstance(encoded, Affine)
    return EncodedTensor(Refined(found.encoding.shape, found.encoding, encoded, rows.int()), found.layout)


def _most_frequent(counts: Tensor, n_rows: int, n: int) -> Tensor:
    """The `n` rows (n,) of a table whose tokens are most frequent, ascending; of equals the first.

    Vocabularies begin with their most frequent tokens, so that these make up for a short text.
    """
    padded = torch.zeros(n_rows, dtype=torch.long)
    padded[: min(len(counts), n_rows)] = counts[:n_rows]
    return padded.argsort(descending=True, stable=True)[:n].sort().values


def _encode_block(
    network: Network, block: nn.Module, prefix: str, reached: list[Arguments], choice: Choice,
    shares: Mapping[str, float], survey: Survey, work: Work, learners: Learners, held: Held, drift: Drift | None = None,
) -> dict[str, EncodedTensor]:  # fmt: skip
    """The tensors of one block. On the compressed prefix its weights are replaced as they are encoded, so that later
    layers make up for it."""
    dotted = f"{prefix}." if prefix else ""
    found = layers(block, dotted)
    chains = {name: chain for name, module in found.items() if (chain := choice.of(name, module)) is not None}
    wanted = any(chain.wants_gradient for chain in chains.values())
    gradients = load_gradients(work.folder, prefix, network.device) if wanted else {}
    n_sequences = max(1, sum(n_examples(arguments) for arguments in reached))
    tensors = encode_recurrent(block, dotted, choice, work)
    encoded = [weight_of(found[name]) for name in chains]
    settled = None if prefix else Settled(network, block, reached, encoded)
    for stage in layer_stages(network, block, dotted, reached[0]) if reached else ():
        for due in groups_of(stage, chains, found):
            moments: dict[str, tuple[Tensor, int]] = {}
            if unfolds(found[due[0]]) and any("data" in chains[name].needs for name in due):
                moments = moments_of(
                    network, block, found, due, stage, reached, survey.importance, settled or held, drift
                )  # fmt: skip
                if unreached := [name for name, (_, n_rows) in moments.items() if not n_rows]:
                    LOGGER.warning(_UNREACHED, ", ".join(unreached))
                network.slack.give_back()
                if drift is not None:
                    for name in due:
                        _correct(drift, name, found[name], *moments[name], name == due[-1])
                    drift.forget()
                network.slack.give_back()
            for name in due:
                moment, n_rows = moments.get(name, (None, 0))
                known = Statistics(moment, gradients.get(name), n_sequences, n_rows // n_sequences, shares.get(name))
                tensors[name] = chains[name].of_layer(name, found[name], known, work.generator(name), learners)
                weight = weight_of(found[name])
                if choice.on_prefix:
                    weight.data = tensors[name].decode()
                if settled is not None:
                    settled.done(weight)
                network.slack.give_back()
    for name, chain in chains.items():
        if name not in tensors:
            tensors[name] = chain.of_layer(name, found[name], Statistics(), work.generator(name))
    done = tensors.keys() | _ties(network).keys()
    return tensors | {
        f"{dotted}{name}": choice.dense(f"{dotted}{name}", tensor)
        for name, tensor in block.state_dict(keep_vars=True).items()
        if f"{dotted}{name}" not in done
    }


def _correct(drift: Drift, name: str, module: nn.Module, moment: Tensor, n_rows: int, last: bool) -> None:
    """Moves a layer's weights towards the original's outputs, before they are encoded."""
    layout = layout_of(module)
    assert layout is not None
    weight = weight_of(module)
    weight.data = layout.tensor(drift.corrected(name, layout.matrix(weight.data.float()), moment, n_rows, last))


def encode_recurrent(module: nn.Module, prefix: str, choice: Choice, work: Work) -> dict[str, EncodedTensor]:
    """The matrices of recurrent networks, by their values alone; on the compressed prefix they are replaced, and what
    follows makes up for it."""
    tensors: dict[str, EncodedTensor] = {}
    for name, parameter in recurrent(module, prefix).items():
        chain = choice.of_matrix(name)
        if chain is None:
            continue
        tensors[name] = _by_values(chain, name, parameter, work)
        if choice.on_prefix:
            parameter.data = tensors[name].decode()
    return tensors


def _by_values(chain: Chain, name: str, parameter: nn.Parameter, work: Work) -> EncodedTensor:
    """A matrix that is a parameter as it is, without anything known of its inputs."""
    encoding = chain.of_matrix(name, parameter.data.float(), Statistics(), work.generator(name))
    return EncodedTensor(encoding, Layout(tuple(parameter.shape)))


def _compute_with(block: nn.Module, prefix: str, tensors: Mapping[str, EncodedTensor]) -> bool:
    """Puts the decoded weights into the loaded block: what is evaluated is what is shipped. Whether it had them."""
    dotted = f"{prefix}." if prefix else ""
    held, same = named_tensors(block), True
    for name in tensors:
        tensor = held.get(name.removeprefix(dotted))
        if tensor is not None and tensor.is_floating_point():
            decoded = tensors[name].decode()
            same &= torch.equal(tensor.data, decoded)
            tensor.data = decoded
    return same
