"""Weights that a module computes from other parameters: weight_norm and spectral_norm, of either form, and whatever
else is a parametrisation of torch's.

A network is compressed without them: `fold` puts a parameter in the place of what is computed, and what it was computed
from, read from the checkpoint, gives its values once. So do files whose weights are in two parts for a module that has
none.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from compressor.checkpoints.source import Computed

PAIRS = (("_g", "_v"), (".original0", ".original1"))
"""Endings of the length and the direction of a weight, in the old form and in the new one."""


_FOUND: WeakKeyDictionary[nn.Module, dict[str, Computed]] = WeakKeyDictionary()


def fold(module: nn.Module) -> nn.Module:
    """The module, whose weights are parameters now, on meta; `computed_in` knows what each was computed from."""
    found: dict[str, Computed] = {}
    for name, layer in list(module.named_modules()):
        prefix = f"{name}." if name else ""
        found |= {f"{prefix}{each}": made for each, made in _hooked(layer, prefix)}
        if parametrize.is_parametrized(layer):
            found |= {f"{prefix}{each}": made for each, made in _parametrised(layer, prefix)}
    if found:
        _FOUND[module] = found
    return module


def without_parametrisations(module: nn.Module) -> nn.Module:
    """The module; where it has parametrisations, which torch does not save, a copy with the weights that they give."""
    if not any(map(parametrize.is_parametrized, module.modules())):
        return module
    module = copy.deepcopy(module).eval()
    for layer in list(module.modules()):
        if parametrize.is_parametrized(layer):
            lists: Any = layer.parametrizations
            with torch.no_grad():
                values = {name: each().clone() for name, each in lists.items()}
            _undo(layer)
            for name, value in values.items():
                layer.register_parameter(name, nn.Parameter(value))
            layer._load_state_dict_pre_hooks.clear()  # torch's own, which it cannot save either
    return module


def computed_in(module: nn.Module) -> dict[str, Computed]:
    """What each folded weight of a module is computed from."""
    return _FOUND.get(module, {})


def paired(name: str, stored: Collection[str]) -> Computed | None:
    """A weight that the file alone has in two parts, its length and its direction; None where it has not."""
    owner, dot, last = name.rpartition(".")
    for stem in (name, f"{owner}{dot}parametrizations.{last}"):
        for parts in (tuple(f"{stem}{ending}" for ending in pair) for pair in PAIRS):
            if all(part in stored for part in parts):
                return Computed(parts, lambda values, parts=parts: with_length(*(values[part] for part in parts)))
    return None


def with_length(length: Tensor, direction: Tensor) -> Tensor:
    """g·v / ‖v‖, the norm over all axes along which g has one entry."""
    if length.dim() != direction.dim():
        return direction * (length / direction.norm())
    axes = [axis for axis in range(direction.dim()) if length.shape[axis] == 1]
    return direction * (length / direction.norm(dim=axes, keepdim=True)) if axes else direction.sign() * length


def _hooked(layer: nn.Module, prefix: str) -> Iterator[tuple[str, Computed]]:
    """Weights that a hook computes before each call, which is taken off."""
    for key, hook in list(layer._forward_pre_hooks.items()):
        if not isinstance(hook, (WeightNorm, SpectralNorm)):
            continue
        name, endings = hook.name, ("_g", "_v") if isinstance(hook, WeightNorm) else ("_orig", "_u", "_v")
        made = _by_length(hook) if isinstance(hook, WeightNorm) else _by_spectrum(hook)
        whole = getattr(layer, name + endings[1 if isinstance(hook, WeightNorm) else 0])
        del layer._forward_pre_hooks[key]
        for ending in endings:
            delattr(layer, name + ending)
        vars(layer).pop(name, None)
        layer._buffers.pop(name, None)
        _place(layer, name, tuple(whole.shape), whole.dtype)
        stems = tuple(f"{prefix}{name}{ending}" for ending in endings)
        yield name, Computed(stems, lambda values, stems=stems, made=made: made(*(values[stem] for stem in stems)))


def _by_length(hook: WeightNorm) -> Callable[..., Tensor]:
    dim = hook.dim
    return lambda length, direction: torch._weight_norm(direction, length, dim)


def _by_spectrum(hook: SpectralNorm) -> Callable[..., Tensor]:
    def divided(weight: Tensor, left: Tensor, right: Tensor) -> Tensor:
        return weight / torch.dot(left, hook.reshape_weight_to_matrix(weight) @ right)

    return divided


def _parametrised(layer: nn.Module, prefix: str) -> Iterator[tuple[str, Computed]]:
    """Weights that are computed whenever they are asked for; the layer is of its own class again."""
    lists: Any = layer.parametrizations
    made = {name: copy.deepcopy(each).eval() for name, each in lists.items()}
    _undo(layer)
    for name, each in made.items():
        with torch.no_grad():
            whole = copy.deepcopy(each).to("meta")()
        _place(layer, name, tuple(whole.shape), whole.dtype)
        stem = f"{prefix}parametrizations.{name}."
        yield (
            name,
            Computed(tuple(f"{stem}{part}" for part in each.state_dict(keep_vars=True)), _evaluating(each, stem)),
        )


def _undo(layer: nn.Module) -> None:
    """Makes a layer of its own class again. torch's way to do so changes the layer that it is a copy of."""
    layer.__class__ = type(layer).__bases__[0]
    del layer.parametrizations


def _evaluating(parametrisations: nn.Module, stem: str) -> Callable[[Mapping[str, Tensor]], Tensor]:
    def compute(values: Mapping[str, Tensor]) -> Tensor:
        filled = copy.deepcopy(parametrisations)
        for part in list(filled.state_dict(keep_vars=True)):
            owner, _, attribute = part.rpartition(".")
            holder, tensor = filled.get_submodule(owner), values[f"{stem}{part}"]
            if attribute in holder._parameters:
                holder._parameters[attribute] = nn.Parameter(tensor, requires_grad=False)
            else:
                holder._buffers[attribute] = tensor
        with torch.no_grad():
            return filled().detach().clone()

    return compute


def _place(layer: nn.Module, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    layer.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False))
