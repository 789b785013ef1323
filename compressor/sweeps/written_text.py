"""Text that the original itself writes, to calibrate and to distil on beside real text.

LLM-QAT (Liu et al., arXiv 2305.17888): what a language model was trained on is rarely at hand, but it can be sampled
from the model. Here every window is a document of its own, drawn token by token at temperature 1 from the token that
separates documents. The original is mapped from a scratch file meanwhile, in bfloat16 where the
processor multiplies that in hardware, and as many documents are written side by side as their keys and values have room
for. A token at a time torch's fused attention takes most of the time, so that of a single query is two products of
matrices here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers.cache_utils import DynamicLayer

from compressor.checkpoints.skeleton import parameter_names
from compressor.core.device import HOST
from compressor.core.errors import CheckpointError, first_line, is_out_of_memory
from compressor.core.fake import shapes_alone
from compressor.core.files import whole
from compressor.core.memory import give_back
from compressor.data.start_token import start_token
from compressor.export.causal import plain
from compressor.ops.draws import draw
from compressor.plan.memory import documents_at_once
from compressor.plan.recipe import WINDOWS_AT_ONCE

_GIVEN_BACK = 16
"""Tokens after which what the growing keys and values have left behind goes back to the system."""


def refuse_forgetful(checkpoint: Any) -> None:
    """Refuses a decoder that does not go on from what it has kept, found out without its weights.

    Raises:
        CheckpointError: Its text would be read again for each token.
    """
    network, past = plain(checkpoint.build()), None
    with shapes_alone():
        for _ in range(2):
            try:
                past = _read(network, torch.zeros(2, 1, dtype=torch.int64), past)[1]
            except (DataDependentOutputException, GuardOnDataDependentSymNode):
                return  # what it does depends on values
            except Exception as error:  # somebody else's forward; anything may come out of it
                if is_out_of_memory(error):
                    raise
                raise _forgetful(checkpoint, first_line(error)) from error
            if past is None:
                raise _forgetful(checkpoint, "it gives no past_key_values back")


def _forgetful(checkpoint: Any, why: str) -> CheckpointError:
    return CheckpointError(
        f"{checkpoint.path}: {checkpoint.architecture} cannot write text a token at a time ({why}); write --set "
        "calibration.generated=0 and --set distill.generated=0"
    )


def _read(module: nn.Module, tokens: Tensor, past: Any) -> tuple[Tensor, Any]:
    """The logits after the last of the tokens, and what was kept."""
    output = module(tokens, past_key_values=past, use_cache=True)
    return output.logits[:, -1].float(), getattr(output, "past_key_values", None)


def generated_tokens(
    checkpoint: Any, tokenizer: Path, n: int, length: int, folder: Path, generator: Callable[[str], torch.Generator],
    fast: bool, advance: Callable[[], None] = lambda: None, device: str | torch.device = HOST,
) -> Tensor:  # fmt: skip
    """`n` documents of `length` tokens each, int64 (n, length); `advance` is called once per batch of documents.

    The whole network is on the device meanwhile; what it writes is on the host.

    Each batch lies in `folder` once it is drawn, and draws from a generator of its own, so that an interrupted run goes
    on where it was and gives the same tokens.

    Raises:
        DataError: The network is no decoder, or its tokenizer and config name no token to begin with.
    """
    first, module, parts = start_token(checkpoint, tokenizer), None, []
    scratch, at_once = folder / "original.bin", documents_at_once(checkpoint.config or {}, length)
    for number, begin in enumerate(range(0, n, WINDOWS_AT_ONCE)):
        file = folder / f"generated-{number}.safetensors"
        if not file.exists():
            module = _mapped(checkpoint, scratch, fast, device) if module is None else module
            rows = min(WINDOWS_AT_ONCE, n - begin)
            drawn = sample_documents(module, first, rows, length, generator(f"generated {number}"), at_once)
            with whole(file) as partial:
                save_file({"tokens": drawn}, partial)
        parts.append(load_file(file)["tokens"])
        advance()
    del module
    scratch.unlink(missing_ok=True)
    return torch.cat(parts)


def n_batches(n: int) -> int:
    """In how many batches `n` documents are drawn."""
    return -(-n // WINDOWS_AT_ONCE)


@torch.no_grad()
def sample_documents(
    module: nn.Module, first: int, rows: int, length: int, generator: torch.Generator, at_once: int = WINDOWS_AT_ONCE
) -> Tensor:  # fmt: skip
    """Tokens (rows, length) drawn one after another from the network's own distribution; `first` comes before them.

    Which numbers decide does not depend on how many documents are written `at_once`.
    """
    chances = torch.rand(length, rows, generator=generator)
    return torch.cat([_drawn(module, first, part) for part in chances.split(at_once, 1)]).cpu()


def _drawn(module: nn.Module, first: int, chances: Tensor) -> Tensor:
    """Tokens (rows, length), as `chances` (length, rows) in 0 … 1 decide."""
    token = torch.full((chances.shape[1], 1), first, device=next(module.parameters()).device)
    past, drawn = None, []
    for number, chance in enumerate(chances):
        if not number % _GIVEN_BACK:
            give_back()
        with SingleQueries():
            logits, past = _read(module, token, past)
        if number == 0:
            _make_room(past, len(chances))
        token = draw(logits.softmax(-1), chance.unsqueeze(1))
        drawn.append(token)
        del logits
    return torch.cat(drawn, 1)


def _make_room(past: Any, length: int) -> None:
    """Has what a cache of transformers keeps of each token written into arrays that are there from the start, where it
    would copy all that it has with every token."""
    layers = getattr(past, "layers", None) or []
    for at, layer in enumerate(layers):
        if type(layer) is DynamicLayer and layer.is_initialized:
            layers[at] = Roomy(layer, length)


class Roomy(DynamicLayer):
    """A layer of a cache with room for `length` tokens, of which the first are those of `kept`; it grows no further."""

    def __init__(self, kept: DynamicLayer, length: int) -> None:
        super().__init__()
        assert kept.keys is not None and kept.values is not None
        self.is_initialized, self.dtype, self.device = True, kept.dtype, kept.device
        self._arrays = tuple(
            each.new_empty((*each.shape[:-2], length, each.shape[-1])) for each in (kept.keys, kept.values)
        )
        self.keys, self.values = (each[..., :0, :] for each in self._arrays)
        self.update(kept.keys, kept.values)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """All keys and values (batch, heads, n, width) with those of the next tokens."""
        assert self.keys is not None
        begin = self.keys.shape[-2]
        end = begin + key_states.shape[-2]
        for array, states in zip(self._arrays, (key_states, value_states), strict=True):
            array[..., begin:end, :] = states
        self.keys, self.values = (array[..., :end, :] for array in self._arrays)
        return self.keys, self.values


class SingleQueries(TorchFunctionMode):
    """Within it, scaled_dot_product_attention of one query without a mask is `attend`: several times faster on CPUs."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention and len(args) == 3 and args[0].shape[-2] == 1:
            plain = kwargs.get("attn_mask") is None and not kwargs.get("dropout_p") and not kwargs.get("is_causal")
            if plain and args[0].dim() == 4:
                return attend(*args, scale=kwargs.get("scale"))
        return func(*args, **kwargs)


def attend(query: Tensor, keys: Tensor, values: Tensor, scale: float | None = None) -> Tensor:
    """softmax(scale·qKᵀ)·V of query (batch, heads, 1, width), keys and values (batch, fewer or as many heads, n, width)

    Heads in a row share keys and values. The scale is 1/√width if it is None.
    """
    batch, heads, _, width = query.shape
    shared = query.reshape(batch * keys.shape[1], -1, width)
    scores = torch.bmm(shared, keys.flatten(0, 1).transpose(1, 2)).float()
    shares = (scores * (scale or 1 / math.sqrt(width))).softmax(-1).to(values.dtype)
    return torch.bmm(shares, values.flatten(0, 1)).view(batch, heads, 1, -1)


def _mapped(checkpoint: Any, scratch: Path, fast: bool, device: str | torch.device) -> nn.Module:
    """The original, its parameters mapped from a file that is written here: the system may take their pages back. On a
    GPU they are copies of it."""
    module: nn.Module = checkpoint.build().requires_grad_(False)
    dtype = torch.bfloat16 if fast else torch.float32
    names = [group[0] for group in parameter_names(module).values()]
    checkpoint.materialise(
        module, set(module.state_dict()) - set(dict(module.named_parameters(remove_duplicate=False)))
    )
    shapes: dict[str, torch.Size] = {}
    with scratch.open("wb") as file:
        for name in names:
            checkpoint.materialise(module, [name])
            parameter = module.get_parameter(name)
            if parameter.is_floating_point():
                shapes[name] = parameter.shape
                file.write(parameter.data.to(dtype).contiguous().flatten().view(torch.uint8).numpy().data)
                parameter.data = torch.empty(0, dtype=dtype)
    sizes = [shape.numel() for shape in shapes.values()]
    flat = torch.from_file(str(scratch), shared=True, size=sum(sizes), dtype=dtype)
    for (name, shape), part in zip(shapes.items(), flat.split(sizes), strict=True):
        module.get_parameter(name).data = part.view(shape).to(device)
    return module.to(device, dtype).eval()
