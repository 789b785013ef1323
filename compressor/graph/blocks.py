"""What a network is made of: its repeated blocks in execution order, and the layers whose weights are encoded.

A block is a child of the largest ModuleList whose children are alike. Its first argument is the hidden state and so is
its output (or the first of a tuple). A network without such a list, or that calls a block twice, is one block. Lists of
lists are none: what is in them runs in an order of its own.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from compressor.core.encoding import Layout

_NEVER_CALLED = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
"""Which have no forward: whoever holds them runs what is in them."""
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class InputsFirst(nn.Module):
    """x @ W + b for W (inputs, outputs), as ONNX's MatMul and GPT-2's Conv1D store it."""

    def __init__(self, n_in: int, n_out: int, bias: bool = True, device: str | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_in, n_out, device=device))
        self.bias = nn.Parameter(torch.empty(n_out, device=device)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        product = x @ self.weight
        return product if self.bias is None else product + self.bias


def _is_inputs_first(module: nn.Module) -> bool:
    return isinstance(module, InputsFirst) or type(module).__name__ == "Conv1D"


def block_names(module: nn.Module) -> list[str]:
    """Names of the blocks in execution order; [""] where the network is one block.

    An encoder and a decoder are two rows of blocks, and what the second is given of the first is no hidden state: they
    are one block.
    """
    if getattr(getattr(module, "config", None), "is_encoder_decoder", False):
        return [""]
    best: tuple[int, list[str]] = (0, [])
    for name, child in module.named_modules():
        if not isinstance(child, nn.ModuleList) or len(child) < 2 or len({type(block) for block in child}) > 1:
            continue
        if not isinstance(child[0], _NEVER_CALLED):
            size = sum(parameter.numel() for parameter in child.parameters())
            if size > best[0]:
                best = (size, [f"{name}.{i}" for i in range(len(child))])
    return best[1] or [""]


def layout_of(module: nn.Module) -> Layout | None:
    """How the module's `weight` is a matrix (outputs, inputs), or None for a layer that is not encoded.

    A grouped convolution's columns are the inputs of one group; a transposed convolution's rows are its inputs.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() < 2:
        return None
    if isinstance(module, (nn.Linear, nn.Embedding, *_CONVOLUTIONS)):
        return Layout(tuple(weight.shape))
    if _is_inputs_first(module):
        return Layout(tuple(weight.shape), transposed=True)
    return None


def weight_of(module: nn.Module) -> Tensor:
    """A layer's weight: torch types an attribute of a module as one of many things."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def matrix_of(module: nn.Module) -> Tensor:
    """The weight of a layer that is encoded, as a matrix (outputs, inputs)."""
    layout = layout_of(module)
    assert layout is not None
    return layout.matrix(weight_of(module).data)


def without_cache(module: nn.Module) -> None:
    """A language model's forwards keep nothing for later tokens from now on."""
    config = getattr(module, "config", None)
    # Other networks' config may be anything.
    if config is not None and isinstance(getattr(config, "use_cache", None), bool):
        with contextlib.suppress(AttributeError, TypeError):
            config.use_cache = False


def layers(module: nn.Module, prefix: str = "") -> dict[str, nn.Module]:
    """The encodable layers below `module` by the name of their weight; a shared layer once, by its first name."""
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()
    for name, child in module.named_modules():
        if layout_of(child) is not None and id(weight_of(child)) not in seen:
            seen.add(id(weight_of(child)))
            found[f"{prefix}{name}.weight" if name else f"{prefix}weight"] = child
    return found


class Gates(nn.Module):
    """A module that holds matrices of recurrent networks among its parameters: `gates` are their names."""

    gates: Sequence[str] = ()


def recurrent(module: nn.Module, prefix: str = "") -> dict[str, nn.Parameter]:
    """The matrices (gates and outputs, inputs) of recurrent networks and cells below `module`, by name, each once.

    They are no layers: their module computes with several, and what one is given shows nowhere.
    """
    found: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for name, child in module.named_modules():
        held: Iterable[tuple[str, nn.Parameter]] = ()
        if isinstance(child, (nn.RNNBase, nn.RNNCellBase)):
            held = child.named_parameters(recurse=False)
        elif isinstance(child, Gates):
            held = [(key, child.get_parameter(key)) for key in child.gates]
        for key, parameter in held:
            if parameter.dim() == 2 and id(parameter) not in seen:
                seen.add(id(parameter))
                found[f"{prefix}{name}.{key}" if name else f"{prefix}{key}"] = parameter
    return found


def unfolded_pieces(module: nn.Module, inputs: Tensor, most: int) -> Iterator[Tensor]:
    """`unfold_inputs`, in order, in pieces of about `most` numbers; of convolutions only, where each number is read by
    several rows. Pieces are of whole examples, or of one example's positions."""
    if not isinstance(module, nn.Conv1d | nn.Conv2d) or inputs.dim() != module.weight.dim() or not len(inputs):
        yield unfold_inputs(module, inputs)
        return
    reach, stride = module.dilation[0] * (module.kernel_size[0] - 1) + 1, module.stride[0]
    padded = functional.pad(inputs[:1].float(), _padding(module))
    n = (padded.shape[2] - reach) // stride + 1
    across = padded[0, 0, 0].numel() / math.prod(module.stride[1:])
    line = max(1.0, across * module.weight[0].numel())  # numbers of the positions in a line, of which an example has n
    at_once = int(most / (n * line))
    if at_once:
        for part in inputs.split(at_once):
            yield unfold_inputs(module, part)
        return
    lines = max(1, int(most / line))
    for i in range(len(inputs)):
        padded = functional.pad(inputs[i : i + 1].float(), _padding(module))
        for first in range(0, n, lines):
            last = min(first + lines, n) - 1
            yield _unfolded(module, padded[:, :, first * stride : last * stride + reach])


def unfold_inputs(module: nn.Module, inputs: Tensor) -> Tensor:
    """The inputs of a layer as rows (tokens or positions, columns of its matrix), float32.

    Of layers that `unfolds` says yes to.
    """
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        return _unfolded(module, functional.pad(inputs.float(), _padding(module)))
    return inputs.float().reshape(-1, inputs.shape[-1])


def _unfolded(module: nn.Conv1d | nn.Conv2d, padded: Tensor) -> Tensor:
    """The rows of inputs that are padded already."""
    if isinstance(module, nn.Conv2d):
        patches = functional.unfold(padded, module.kernel_size, module.dilation, 0, module.stride)
        return patches.transpose(1, 2).flatten(0, 1)
    reach = module.dilation[0] * (module.kernel_size[0] - 1) + 1
    windows = padded.unfold(2, reach, module.stride[0])[..., :: module.dilation[0]]
    return windows.permute(0, 2, 1, 3).flatten(0, 1).flatten(1)


def _padding(module: nn.Conv1d | nn.Conv2d) -> list[int]:
    """As functional.pad takes it: before and after, the last axis first."""
    found: list[int] = []
    for axis in reversed(range(len(module.kernel_size))):
        if not isinstance(module.padding, str):
            found += [module.padding[axis]] * 2
            continue
        total = module.dilation[axis] * (module.kernel_size[axis] - 1) if module.padding == "same" else 0
        found += [total // 2, total - total // 2]
    return found


def unfolds(module: nn.Module) -> bool:
    """Whether the layer's output is its inputs, as rows, times its whole matrix.

    Not so of grouped convolutions, which have a matrix per group, of transposed and three-dimensional ones, and of
    embeddings.
    """
    plain = isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)) or _is_inputs_first(module)
    return plain and getattr(module, "groups", 1) == 1


def geometry(module: nn.Module) -> tuple:
    """Equal for layers that unfold the same input to the same rows."""
    if not isinstance(module, (nn.Conv1d, nn.Conv2d)):
        return ()
    sizes = (module.kernel_size, module.stride, module.padding, module.dilation)
    return tuple(tuple(size) if isinstance(size, list) else size for size in sizes)


@dataclass
class Stage:
    """Layers that see the same input, in the order in which a forward reaches them.

    Or, where they do not `share` it, layers of which none sees what another makes: those of several experts.
    """

    names: list[str]
    calls: int
    share: bool = True


def stages(order: Sequence[tuple[str, Hashable]]) -> list[Stage]:
    """Groups calls (layer name, identity of its input) into stages; a layer that is called again stays in its first."""
    calls = Counter(name for name, _ in order)
    found: list[tuple[Hashable, Stage]] = []
    placed: set[str] = set()
    for name, source in order:
        if name in placed:
            continue
        placed.add(name)
        if found and found[-1][0] == source and calls[name] == found[-1][1].calls:
            found[-1][1].names.append(name)
        else:
            found.append((source, Stage([name], calls[name])))
    return [stage for _, stage in found]


@contextlib.contextmanager
def patched(forwards: dict[nn.Module, Callable]) -> Iterator[None]:
    """Modules compute something else meanwhile."""
    own = {module: vars(module)["forward"] for module in forwards if "forward" in vars(module)}
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module in forwards:
            if module in own:
                module.forward = own[module]
            else:
                del module.forward


def on_input(layer: nn.Module, look: Callable[[Tensor], None]) -> RemovableHandle:
    """From now on `look` is shown what a layer is given before each of its calls, by place or by keyword."""
    return layer.register_forward_pre_hook(
        lambda _, args, kwargs: look(first_tensor((*args, *kwargs.values()))), with_kwargs=True
    )


def first_tensor(output: Any) -> Tensor:
    """The hidden state of a block's output: the tensor itself, or the first of a tuple, a list or a model output."""
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, dict) else output
    for value in values:
        if isinstance(value, Tensor):
            return value
    raise TypeError(f"a block returned {type(output).__name__} without a tensor")


def detached(value: Any) -> Any:
    """The same structure with its tensors cut from the graph of gradients."""
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, (tuple, list)):
        return type(value)(detached(item) for item in value)
    if isinstance(value, dict):
        return {key: detached(item) for key, item in value.items()}
    return value


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors of a structure."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(item)
