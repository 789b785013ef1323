"""Modules without weights: construct one, compare it with a checkpoint, load tensors into it by name."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.overrides import TorchFunctionMode

from compressor.checkpoints.architecture import Architecture
from compressor.checkpoints.computed import Computed, computed_in, fold, paired
from compressor.checkpoints.expected import COMPUTED
from compressor.checkpoints.experts import unfuse
from compressor.checkpoints.scales import belongs_to_scales
from compressor.checkpoints.source import Place, Source, TensorInfo
from compressor.checkpoints.unused import AVERAGES, refuse_unused
from compressor.core.errors import CheckpointError
from compressor.graph.blocks import layers, recurrent, weight_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Checkpoint(Protocol):
    """What of a `checkpoints.Checkpoint` a module is compared with and filled from."""

    path: Path
    architecture: str
    blueprint: Architecture
    config: dict[str, Any] | None
    source: Source
    tensors: dict[str, TensorInfo]
    tied: dict[str, str]
    skipped: list[str]
    notes: list[str]
    aligned: bool

    def name_tensors(
        self, rename: dict[str, str], ties: Any, computed: dict[str, tuple[Computed, dict[str, str]]] = ...
    ) -> None: ...

    def file_of(self, name: str) -> Path: ...

    def read(self, name: str) -> Tensor: ...


RANDOM_INIT = (
    "uniform_", "normal_", "trunc_normal_", "xavier_uniform_", "xavier_normal_", "kaiming_uniform_",
    "kaiming_normal_", "orthogonal_",
)  # fmt: skip
FACTORIES = (torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn)
LARGEST_BUFFER = 2**32
"""Bytes: sixteen times a causal mask of 8,192 positions in float32."""
_WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|module)\.")
"""Parts of names that whatever wraps a module, or a part of one, puts in: torch.compile, data parallelism, FSDP."""
_BESIDE = "beside:"
"""Begins the name of what is no part of the network that was taken."""
LEGACY = (
    (re.compile(r"LayerNorm\.gamma$"), "LayerNorm.weight"),
    (re.compile(r"LayerNorm\.beta$"), "LayerNorm.bias"),
)


@contextlib.contextmanager
def empty_parameters() -> Iterator[None]:
    """Parameters that are registered inside go to the meta device; buffers stay real (accelerate's trick).

    A parameter that is on meta already is kept as it is, so that ties hold. Random initialisation is skipped. What no
    buffer has the size of is on meta from the start: a config can ask for more than any machine has.
    """
    register = nn.Module.register_parameter
    init = {name: getattr(nn.init, name) for name in RANDOM_INIT}

    def register_empty(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(self, name, param)
        if param is not None and param.device.type != "meta":
            self._parameters[name] = _on_meta(param)

    nn.Module.register_parameter = register_empty
    for name in RANDOM_INIT:
        setattr(nn.init, name, lambda tensor, *args, **kwargs: tensor)
    try:
        with _Economical():
            yield
    finally:
        nn.Module.register_parameter = register
        for name, function in init.items():
            setattr(nn.init, name, function)


class _Economical(TorchFunctionMode):
    """Makes tensors of over LARGEST_BUFFER bytes without memory, and draws no values for those that have none, as
    transformers does by functions of torch that it kept."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        tensor = (kwargs or {}).get("tensor")  # so torch.nn.init's functions hand it on
        if tensor is not None and tensor.is_meta and getattr(func, "__name__", "") in RANDOM_INIT:
            return tensor
        if func in FACTORIES and (kwargs or {}).get("device") is None:
            described = func(*args, **{**(kwargs or {}), "device": "meta"})
            if described.nbytes > LARGEST_BUFFER:
                return described
        return func(*args, **(kwargs or {}))


def _on_meta(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)


def construct(architecture: Architecture, config: dict[str, Any] | None) -> nn.Module:
    """The module of an architecture in eval mode, its parameters on meta, its buffers real.

    Code of the user's that looks at values of parameters while it makes them is run again as it is.
    """
    try:
        with empty_parameters():
            module = architecture.construct(config)
    except CheckpointError as error:
        if config is not None or "meta" not in str(error.__cause__):
            raise
        module = architecture.construct(config)
    if is_of_transformers(module):
        unfuse(module)
    fold(module)
    for group in parameter_names(module).values():
        parameter = module.get_parameter(group[0])
        if parameter.device.type != "meta":
            _set_parameter(module, group, _on_meta(parameter))
    return module.eval()


def parameter_names(module: nn.Module) -> dict[int, list[str]]:
    """The names of each parameter, by its identity, in the module's order; a tied one has several."""
    groups: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return groups


def _set_parameter(module: nn.Module, names: Iterable[str], parameter: nn.Parameter) -> None:
    for name in names:
        parent, _, attribute = name.rpartition(".")
        setattr(module.get_submodule(parent), attribute, parameter)


def align(checkpoint: Checkpoint, module: nn.Module) -> None:
    """Name the checkpoint's tensors as the module does; tie in the module what is tied in the checkpoint.

    What the module ties but the files hold with different values is untied in a transformers model, as
    transformers does; in another module it is refused.
    """
    if not checkpoint.aligned:
        _rename(checkpoint, module)
    for group in parameter_names(module).values():
        apart = [name for name in group[1:] if name in checkpoint.tensors]
        for name in apart:
            _set_parameter(module, [name], _on_meta(module.get_parameter(name)))
    slots = {name for group in parameter_names(module).values() for name in group}
    for alias, canonical in checkpoint.tied.items():
        if alias in slots and canonical in slots:
            _set_parameter(module, [alias], module.get_parameter(canonical))


def _rename(checkpoint: Checkpoint, module: nn.Module) -> None:
    """By the rules of transformers for its own networks; else a prefix and old spellings are all that may differ."""
    expected = set(module.state_dict(keep_vars=True))
    computed = computed_in(module)
    known = expected.union(*(each.parts for each in computed.values()))
    if is_of_transformers(module):
        from compressor.checkpoints.converted import converted

        checkpoint.source, targets = converted(checkpoint.source, module, known, checkpoint.path)
    else:
        targets = {name: _module_name(name, known) for name in checkpoint.source.tensors}
    if not _covers(targets, module):
        targets = _unwrapped(checkpoint, module, known) or targets
    made, parts = _computed(expected, computed, {target: name for name, target in targets.items()})
    groups = [group for group in parameter_names(module).values() if len(group) > 1]

    def ties(names: Iterable[str], _: Any) -> dict[str, str]:
        present = set(names)
        return {alias: group[0] for group in groups if present & set(group) for alias in group[1:]}

    checkpoint.name_tensors({name: target for name, target in targets.items() if target in expected}, ties, made)
    _refuse_conflicts(checkpoint, groups)
    stored = checkpoint.source.tensors
    dropped = [name for name in stored if targets.get(name, name) not in expected and name not in parts]
    dropped = [name for name in dropped if not belongs_to_scales(name, stored)]
    checkpoint.skipped = [name for name in dropped if not COMPUTED.search(name)]
    beside = {name for name in dropped if targets.get(name, "").startswith(_BESIDE)}
    refuse_unused(checkpoint, expected, [name for name in checkpoint.skipped if name not in beside])
    checkpoint.aligned = True


def is_of_transformers(module: nn.Module) -> TypeGuard[PreTrainedModel]:
    """Whether a module is a network of transformers' classes, which then are imported already."""
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(module, transformers.PreTrainedModel)


def _covers(rename: Mapping[str, str], module: nn.Module) -> bool:
    """Whether there is a tensor for each parameter that is stored as it is computed with."""
    found, computed = set(rename.values()), computed_in(module)
    groups = parameter_names(module).values()
    return all(any(name in found or name in computed for name in group) for group in groups)


def _unwrapped(checkpoint: Checkpoint, module: nn.Module, known: set[str]) -> dict[str, str] | None:
    """Stored name -> name in the module, where the network was stored as a part of something larger, or wrapped in
    parts: the name of what held it is taken off. None where that does not give the whole network.

    Of several that fit, an average is taken last, and a note says what else there is.
    """
    stored = list(checkpoint.source.tensors)
    plain = {name: _WRAPPERS.sub("", name) for name in stored}
    beginnings = dict.fromkeys(_beginnings(plain.values()))
    fitting = []
    for beginning in beginnings:
        found = {
            name: target
            for name, each in plain.items()
            if each.startswith(beginning) and (target := each.removeprefix(beginning)) in known
        }
        if _covers(found, module):
            fitting.append((beginning, found))
    if not fitting:
        return None
    fitting.sort(key=lambda each: bool(AVERAGES.search(each[0].rstrip("."))))
    beginning, found = fitting[0]
    for other, _ in fitting[1:]:
        what = "an average of the weights" if AVERAGES.search(other.rstrip(".")) else "another network of this kind"
        checkpoint.notes.append(f"the tensors of '{beginning}' are taken; '{other}' holds {what}, which is left out")
    return found | {name: f"{_BESIDE}{name}" for name in stored if not plain[name].startswith(beginning)}


def _beginnings(names: Iterable[str]) -> Iterator[str]:
    """What names begin with, one to three parts of them, shortest first; and nothing."""
    split = [name.split(".") for name in names]
    yield ""
    for depth in (1, 2, 3):
        yield from dict.fromkeys(".".join(parts[:depth]) + "." for parts in split if len(parts) > depth)


def _computed(
    expected: set[str], computed: dict[str, Computed], stored: dict[str, str]
) -> tuple[dict[str, tuple[Computed, dict[str, str]]], set[str]]:
    """Each weight that is in no file as it is and is computed from what is: how, and the stored names of the parts by
    the module's; and all of these.

    Args:
        stored: The name in the files of what the module calls so.
    """
    made: dict[str, tuple[Computed, dict[str, str]]] = {}
    for name in sorted(expected - stored.keys()):
        known = computed.get(name)
        if known is None or not all(part in stored for part in known.parts):
            known = paired(name, stored)
        if known is not None:
            made[name] = (known, {part: stored[part] for part in known.parts})
    return made, {part for _, parts in made.values() for part in parts.values()}


def _refuse_conflicts(checkpoint: Checkpoint, groups: list[list[str]]) -> None:
    for group in groups:
        for name in group[1:]:
            if name in checkpoint.tensors and checkpoint.config is None:
                raise CheckpointError(
                    f"{checkpoint.path}: '{name}' and '{group[0]}' are one parameter of the module, but "
                    "their values differ in the file; correct the module of --arch, or the file"
                )


def _module_name(name: str, expected: set[str]) -> str:
    for pattern, replacement in LEGACY:
        name = pattern.sub(replacement, name)
    candidates = (name, f"model.{name}", name.removeprefix("model."))
    return next((candidate for candidate in candidates if candidate in expected), name)


def check(checkpoint: Checkpoint, module: nn.Module) -> None:
    """Refuse a checkpoint that lacks a tensor of the module, or has it in another shape."""
    align(checkpoint, module)
    for name, wanted in module.state_dict(keep_vars=True).items():
        canonical = checkpoint.tied.get(name, name)
        if canonical not in checkpoint.tensors:
            if COMPUTED.search(name) and not isinstance(wanted, nn.Parameter):
                continue
            near = f"; not used: {', '.join(checkpoint.skipped[:3])}" if checkpoint.skipped else ""
            raise CheckpointError(
                f"{checkpoint.path}: tensor '{name}' of shape {tuple(wanted.shape)} is missing{near}; "
                f"{checkpoint.architecture} needs it; give the whole checkpoint, or the right config or "
                "--arch"
            )
        stored = checkpoint.tensors[canonical].dtype
        if wanted.is_floating_point() and re.fullmatch(r"BOOL|[IU]\d+", stored):
            raise CheckpointError(
                f"{checkpoint.file_of(canonical)}: tensor '{name}' is stored as whole numbers ({stored}), and "
                f"{checkpoint.architecture} computes with floats; what they stand for is not beside them; give the "
                "checkpoint before it was quantised"
            )
        if checkpoint.tensors[canonical].dtype.startswith("C"):
            raise CheckpointError(
                f"{checkpoint.file_of(canonical)}: tensor '{name}' holds complex numbers, which ONNX has no operators "
                "for; give a network that holds real and imaginary parts (torch.view_as_real)"
            )
        found = checkpoint.tensors[canonical].shape
        if found != tuple(wanted.shape):
            raise CheckpointError(
                f"{checkpoint.file_of(canonical)}: tensor '{name}' has shape {found}; "
                f"{checkpoint.architecture} needs {tuple(wanted.shape)}; correct the config or --arch"
            )
    _place(checkpoint, module)


def _place(checkpoint: Checkpoint, module: nn.Module) -> None:
    """Notes of each tensor what the module does with it."""
    found = layers(module).values()
    of_layers = {id(weight_of(layer)): getattr(layer, "groups", 1) for layer in found}
    transposed = {id(weight_of(layer)) for layer in found if isinstance(layer, _ConvTransposeNd)}
    of_recurrent = {id(parameter) for parameter in recurrent(module).values()}
    for name, parameter in module.named_parameters():
        name = checkpoint.tied.get(name, name)
        if id(parameter) in of_recurrent:
            place: Place = "recurrent"
        else:
            place = "layer" if id(parameter) in of_layers else "elsewhere"
            place = "transposed" if id(parameter) in transposed else place
        groups = of_layers.get(id(parameter))
        checkpoint.tensors[name] = replace(checkpoint.tensors[name], place=place, groups=groups)


def load(checkpoint: Checkpoint, module: nn.Module, names: Iterable[str] | None, device: str | torch.device) -> None:
    """Load parameters and persistent buffers by name; every name of a tied parameter gets the same object."""
    groups = {name: group for group in parameter_names(module).values() for name in group}
    persistent = module.state_dict(keep_vars=True)
    done: set[str] = set()
    for name in persistent if names is None else names:
        if name in done:
            continue
        if name in persistent and name not in groups and name not in checkpoint.tensors:
            continue  # a buffer that the module computes; `check` refused the others
        tensor = checkpoint.read(name).to(device)
        if name in groups:
            trains = module.get_parameter(name).requires_grad and tensor.is_floating_point()
            _set_parameter(module, groups[name], nn.Parameter(tensor, requires_grad=trains))
            done.update(groups[name])
        else:
            parent, _, attribute = name.rpartition(".")
            module.get_submodule(parent)._buffers[attribute] = tensor


def load_buffers(checkpoint: Checkpoint, module: nn.Module) -> None:
    """Take buffers that are on meta from a freshly constructed module; persistent ones are then loaded."""
    empty = [name for name, buffer in module.named_buffers() if buffer.device.type == "meta"]
    if not empty:
        return
    fresh = dict(construct(checkpoint.blueprint, checkpoint.config).named_buffers())
    for name in empty:
        parent, _, attribute = name.rpartition(".")
        module.get_submodule(parent)._buffers[attribute] = fresh[name]
    load(checkpoint, module, [name for name in empty if name in checkpoint.tensors], "cpu")
