"""The operators of a network by torch.export, with the names of its parameters and buffers."""

from __future__ import annotations

import contextlib
import traceback
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressor.core.errors import CheckpointError

Example = tuple | Mapping[str, Any]
"""Arguments of a forward: by position, or by name."""


@dataclass(frozen=True, eq=False)
class Trace:
    """The graph of a forward.

    tensors    placeholder -> the parameter's or buffer's first name in the module
    constants  placeholder -> its value, of buffers and of tensors that the forward made on the spot
    """

    graph: torch.fx.Graph
    tensors: dict[str, str]
    constants: dict[str, Tensor]


def operator_name(node: torch.fx.Node) -> str:
    """aten's name without the overload; `getitem` and the like by their own."""
    packet = getattr(node.target, "overloadpacket", None)
    return packet.__name__ if packet is not None else getattr(node.target, "__name__", str(node.target))


def split_example(example: Example) -> tuple[tuple, dict[str, Any]]:
    """Positional and keyword arguments. {"": tensor} is one by position, as in `core.batch`."""
    if not isinstance(example, Mapping):
        return tuple(example), {}
    positional = (example[""],) if "" in example else ()
    return positional, {name: value for name, value in example.items() if name}


def trace(module: nn.Module, example: Example) -> Trace:
    """The module's forward as operators, functional, in eval mode.

    Raises:
        CheckpointError: torch.export cannot follow the forward; names the line that it stopped at.
    """
    args, kwargs = split_example(example)
    try:
        with _evaluated(module), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(module, args, kwargs, strict=False).run_decompositions({})
    # torch.export fails with whatever the forward or the tracer raises: any of it means that there is no graph.
    except Exception as error:
        raise CheckpointError(
            f"{type(module).__name__}: its forward cannot be traced at {_line(error)}; {_first_line(error)}; "
            "write that line without branches on the values of tensors, or leave passes that need a graph out"
        ) from error
    signature, names = program.graph_signature, _first_names(module)
    found = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    buffers = {
        place: program.state_dict.get(name, program.constants.get(name))
        for place, name in signature.inputs_to_buffers.items()
    }
    lifted = {place: program.constants[name] for place, name in signature.inputs_to_lifted_tensor_constants.items()}
    constants = {place: value.detach() for place, value in (buffers | lifted).items() if isinstance(value, Tensor)}
    return Trace(program.graph, {place: names[name] for place, name in found.items()}, constants)


@contextlib.contextmanager
def _evaluated(module: nn.Module) -> Iterator[None]:
    """In eval mode and without a cache of keys and values, which are no part of what is computed."""
    training = [child for child in module.modules() if child.training]
    configs = {id(config): config for child in module.modules() if (config := getattr(child, "config", None))}
    caching = [config for config in configs.values() if getattr(config, "use_cache", False)]
    module.eval()
    for config in caching:
        config.use_cache = False
    try:
        yield
    finally:
        for child in training:
            child.training = True
        for config in caching:
            config.use_cache = True


def _first_names(module: nn.Module) -> dict[str, str]:
    """Every name of every parameter and buffer -> the first one of the same tensor."""
    first: dict[int, str] = {}
    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return {name: first.setdefault(id(tensor), name) for name, tensor in tensors}


def _line(error: Exception) -> str:
    """file:line of the innermost frame that is neither torch's nor ours."""
    ours, theirs = Path(__file__).parents[1], Path(torch.__file__).parent
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not Path(frame.filename).is_relative_to(ours) and not Path(frame.filename).is_relative_to(theirs)
        and not frame.filename.startswith("<")
    ]  # fmt: skip
    return f"{frames[-1].filename}:{frames[-1].lineno} ({frames[-1].line})" if frames else "an unknown line"


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
