"""Gradients of the weights, summed over sequences: one backward pass each, block by block, on the untouched network.

    Σ_n |g_n| or √Σ_n g_n²    g_n = ∂ℓ_n/∂W of sequence n, ℓ_n a mean over its tokens (GBLM, arXiv 2311.04902)

ℓ is the cross-entropy of the next token of the text itself; for a masked language model of the masked tokens, 15 % of
them; for any other network the loss on a target drawn from its own prediction, which makes g_n a sample whose square is
the diagonal of the Fisher information: a class from class logits, else the output plus Gaussian noise. Memory is one
block, its sums and the hidden states; a network without blocks is held whole, as is one whose blocks share weights.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from compressor.core.batch import Batch
from compressor.core.device import HOST
from compressor.core.errors import CheckpointError
from compressor.core.files import whole
from compressor.core.memory import give_back
from compressor.graph.blocks import layers, layout_of, weight_of
from compressor.sweeps.backward import HiddenFiles, back_through, find_logits, head_input, head_of, label_gradient
from compressor.sweeps.network import Network, Stop, hidden_of

OUTSIDE = "outside"
"""Block name of what lies in no block."""
_MASKED_FRACTION = 0.15
_IGNORED = -100
Sequence = tuple[Batch, Tensor | None]
"""One example as the network takes it, and its labels (1, tokens): −100 where nothing is predicted."""


def load_gradients(folder: Path, block: str, device: str | torch.device = HOST) -> dict[str, Tensor]:
    """What was gathered for a block's weights, (out, in) by name; "outside" for what lies in none."""
    return {name: total.to(device) for name, total in load_file(_file(folder, block)).items()}


def _file(folder: Path, block: str) -> Path:
    return folder / f"gradients-{block or 'network'}.safetensors"


class GradientFiles:
    """Where sums are spilled to, which weights are asked for (None: all), and the norm's p.

    watch(sequence, name, gradient (out, in)) is shown every sequence's own gradient.
    """

    def __init__(
        self, folder: Path, p: Literal[1, 2], wanted: Container[str] | None = None,
        watch: Callable[[int, str, Tensor], None] | None = None,
    ) -> None:  # fmt: skip
        self.folder, self.p, self.wanted, self.watch = folder, p, wanted, watch

    def chosen(self, network: Network, block: str | None) -> dict[str, nn.Module]:
        """The layers whose gradients are gathered: of a block, or (None) all; tables and heads are not."""
        prefix = f"{block}." if block else ""
        found = layers(network.block(block) if block else network.module, prefix)
        head = head_of(network.module)
        return {
            name: module
            for name, module in found.items()
            if not isinstance(module, nn.Embedding) and module is not head
            and (self.wanted is None or name in self.wanted)
        }  # fmt: skip

    def write(self, block: str, sums: Mapping[str, Tensor], n_sequences: int) -> None:
        """One block's file, whole or not at all."""
        found = {name: (total if self.p == 1 else total.sqrt_()).cpu().contiguous() for name, total in sums.items()}
        for name, total in found.items():
            if not bool(total.isfinite().all()):
                raise CheckpointError(f"{self.folder}: the gradient of '{name}' is not finite; is the network sound?")
        with whole(_file(self.folder, block)) as partial:
            save_file(found, partial, metadata={"p": json.dumps(self.p), "n_sequences": json.dumps(n_sequences)})


class _Sums:
    """Σ|g| or Σg² of some layers' weights."""

    def __init__(self, files: GradientFiles, chosen: Mapping[str, nn.Module]) -> None:
        self.files, self.chosen = files, chosen
        self.totals: dict[str, Tensor] = {}

    def open(self) -> None:
        """Asks for the gradients of the weights as they are loaded now."""
        for module in self.chosen.values():
            weight_of(module).requires_grad_(True)

    def add(self, sequence: int) -> None:
        """Takes a sequence's gradients off the weights."""
        for name, module in self.chosen.items():
            weight, layout = weight_of(module), layout_of(module)
            if weight.grad is None or layout is None:
                continue
            gradient = layout.matrix(weight.grad)
            weight.grad = None
            if self.files.watch is not None:
                self.files.watch(sequence, name, gradient)
            if name not in self.totals:
                self.totals[name] = torch.zeros(gradient.shape, device=gradient.device)
            if self.files.p == 1:
                self.totals[name].add_(gradient.abs_())
            else:
                self.totals[name].addcmul_(gradient, gradient)


def gather_gradients(
    network: Network, batches: list[Batch], files: GradientFiles, generator: torch.Generator,
    advance: Callable[[], None] = lambda: None,
) -> None:  # fmt: skip
    """Runs the untouched network over every sequence of `batches`; `advance` is called per block and direction."""
    sequences = _sequences(network, batches, generator)
    if network.blocks == [""] or _share_weights(network, files):
        return _whole(network, sequences, files, generator, advance)
    stored = HiddenFiles(files.folder, network)
    try:
        for name, _, reached in network.sweep([batch for batch, _ in sequences]):
            if not name:  # only by running it was found to have no blocks
                break
            stored.add([hidden_of(arguments) for arguments in reached])
            del reached
            give_back()
            advance()
        if network.blocks == [""]:
            return _whole(network, sequences, files, generator, advance)
        _streamed(network, sequences, stored, files, generator, advance)
    finally:
        stored.close()


def _streamed(
    network: Network, sequences: list[Sequence], stored: HiddenFiles, files: GradientFiles, generator: torch.Generator,
    advance: Callable[[], None],
) -> None:  # fmt: skip
    """Tail, blocks from the last to the first, entry."""
    every = files.chosen(network, None)
    outside = _Sums(files, {name: module for name, module in every.items() if name in network.outside})
    upstream = _through_tail(network, sequences, outside, generator)
    before = outside.chosen.keys() - outside.totals.keys()
    for index in reversed(range(len(network.blocks))):
        name = network.blocks[index]
        sums = _Sums(files, files.chosen(network, name))
        if before or any(files.chosen(network, earlier) for earlier in network.blocks[: index + 1]):
            with network.loaded(network.names_in(name)):
                sums.open()
                back_through(network, index, stored, upstream, sums.add)
            files.write(name, sums.totals, len(sequences))
            del sums
            give_back()
        advance()
    if before:
        _through_entry(network, sequences, upstream, outside)
    files.write(OUTSIDE, outside.totals, len(sequences))


def _through_tail(
    network: Network, sequences: list[Sequence], outside: _Sums, generator: torch.Generator
) -> list[Tensor]:
    """∂ℓ/∂(last hidden state) per sequence."""
    upstream = []
    states, network.last = network.last, []
    with network.tail() as run:
        if sequences and sequences[0][1] is not None:
            find_logits(network, lambda: run(sequences[0][0], states[0]))
        outside.open()
        for i, (batch, labels) in enumerate(sequences):
            state = states[i].detach().requires_grad_(True)
            with torch.enable_grad():
                _backward(network, lambda batch=batch, state=state: run(batch, state), labels, generator)
            upstream.append(state.grad)
            outside.add(i)
    return upstream


def _through_entry(network: Network, sequences: list[Sequence], upstream: list[Tensor], outside: _Sums) -> None:
    """Back from the first block's input to the layers before it."""
    caught: list[Tensor] = []

    def catch(_: nn.Module, args: tuple, kwargs: dict) -> None:
        caught[:] = [hidden_of((args, kwargs))]
        raise Stop

    entry = network.block(network.blocks[0])
    with entry.register_forward_pre_hook(catch, with_kwargs=True), network.loaded(network.outside):
        outside.open()
        for i, (batch, _) in enumerate(sequences):
            with torch.enable_grad(), contextlib.suppress(Stop), network.autocast():
                network.call(batch)
            if caught[0].requires_grad:
                caught[0].backward(upstream[i].to(caught[0].dtype))
            outside.add(i)


def _whole(
    network: Network, sequences: list[Sequence], files: GradientFiles, generator: torch.Generator,
    advance: Callable[[], None],
) -> None:  # fmt: skip
    """The same with all weights in memory."""
    sums = _Sums(files, files.chosen(network, None))
    with network.loaded(list(network.module.state_dict(keep_vars=True))), torch.enable_grad():
        if sequences and sequences[0][1] is not None:
            find_logits(network, lambda: network.call(sequences[0][0]))
        sums.open()
        advance()
        for i, (batch, labels) in enumerate(sequences):
            _backward(network, lambda batch=batch: network.call(batch), labels, generator)
            sums.add(i)
    left = dict(sums.totals)
    for block in network.blocks:
        own = [name for name in left if name.startswith(f"{block}." if block else "")]
        files.write(block, {name: left.pop(name) for name in own}, len(sequences))
        advance()
    if network.blocks != [""]:
        files.write(OUTSIDE, left, len(sequences))


def _share_weights(network: Network, files: GradientFiles) -> bool:
    """Whether two blocks compute with one weight: |g| is of the sum over its uses, which no single block knows."""
    owner: dict[int, str] = {}
    return any(
        owner.setdefault(id(module.weight), block) != block
        for block in network.blocks
        for module in files.chosen(network, block).values()
    )


def _backward(network: Network, run: Callable[[], Any], labels: Tensor | None, generator: torch.Generator) -> None:
    """The loss's gradient from the network's output to whatever of what `run` computes with is open."""
    if labels is not None and network.logits is not None:
        caught = head_input(network, run)
        flat = labels.flatten()
        gradient = label_gradient(network, caught.detach().flatten(0, -2), flat)
        caught.backward((gradient / int((flat >= 0).sum())).view_as(caught).to(caught.dtype))
        return
    with network.autocast():
        output = run()
    loss = _own_loss(output, generator) if labels is None else _label_loss(output, labels.to(network.device))
    loss.backward()


def _label_loss(output: Any, labels: Tensor) -> Tensor:
    return functional.cross_entropy(output["logits"].float().flatten(0, -2), labels.flatten(), ignore_index=_IGNORED)


def _own_loss(output: Any, generator: torch.Generator) -> Tensor:
    """The mean loss per position on a target drawn from the network's own prediction, as the module says.

    Class logits are an output of that name, or a tensor (examples, classes) that is all of the output. For others
    ½‖y − (y₀ + noise)‖² has the gradient −noise.
    """
    named = output.get("logits") if isinstance(output, dict) else None
    y: Any = output if named is None else named
    while not isinstance(y, Tensor):
        y = next(iter(y.values())) if isinstance(y, dict) else y[0]
    rows = y.float().flatten(0, -2) if y.dim() > 1 else y.float().unsqueeze(0)
    classes = (y.dim() in (2, 3) and named is not None) or (y.dim() == 2 and isinstance(output, Tensor))
    if classes and rows.shape[-1] > 1:
        drawn = torch.multinomial(rows.detach().softmax(-1).cpu(), 1, generator=generator)
        return functional.cross_entropy(rows, drawn.flatten().to(rows.device))
    noise = torch.randn(rows.shape, generator=generator).to(rows.device)
    return -(rows * noise).sum(-1).mean()


def _sequences(network: Network, batches: list[Batch], generator: torch.Generator) -> list[Sequence]:
    """Every example by itself, with the labels that the kind of network predicts."""
    singles = [
        {name: values[i : i + 1] for name, values in batch.items()}
        for batch in batches
        for i in range(len(next(iter(batch.values()))))
    ]
    family = network.checkpoint.family
    if head_of(network.module) is None or family not in ("decoder", "encoder"):
        return [(batch, None) for batch in singles]
    if family == "decoder":
        return [(batch, next_tokens(batch)) for batch in singles if batch["input_ids"].shape[1] > 1]
    mask = mask_token(network.checkpoint.tokenizer_files)
    return [masked(batch, mask, generator) for batch in singles]


def next_tokens(batch: Batch) -> Tensor:
    """Labels (1, tokens): at each position the token that follows; none at the last, and none of padding."""
    ids, kept = batch["input_ids"].long(), batch.get("attention_mask")
    labels = functional.pad(ids[:, 1:], (0, 1), value=_IGNORED)
    if kept is not None:
        labels = labels.masked_fill(functional.pad(kept[:, 1:], (0, 1)) == 0, _IGNORED)
    return labels


def masked(batch: Batch, mask: int | None, generator: torch.Generator) -> Sequence:
    """The sequence with 15 % of its tokens replaced by the mask, and these as labels; without a mask by one another."""
    ids, kept = batch["input_ids"].long(), batch.get("attention_mask")
    candidates = torch.ones_like(ids) if kept is None else kept
    places = candidates.flatten().nonzero().flatten()
    n = max(1, round(_MASKED_FRACTION * len(places)))
    chosen = places[torch.randperm(len(places), generator=generator)[:n]]
    others = places[torch.randint(len(places), (n,), generator=generator)]
    changed, labels = ids.clone(), torch.full_like(ids, _IGNORED)
    labels.view(-1)[chosen] = ids.view(-1)[chosen]
    changed.view(-1)[chosen] = ids.view(-1)[others] if mask is None else mask
    return {**batch, "input_ids": changed}, labels


def mask_token(files: list[Path]) -> int | None:
    """The number of [MASK] or <mask> in a tokenizer's files."""
    for path in files:
        if path.name == "tokenizer.json":
            added = json.loads(path.read_text(encoding="utf-8")).get("added_tokens", [])
            vocabulary = {token["content"]: token["id"] for token in added}
        elif path.name == "vocab.txt":
            vocabulary = {token: i for i, token in enumerate(path.read_text(encoding="utf-8").splitlines())}
        else:
            continue
        found = next((vocabulary[token] for token in ("[MASK]", "<mask>") if token in vocabulary), None)
        if found is not None:
            return found
    return None
