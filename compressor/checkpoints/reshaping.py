"""A checkpoint whose network became another: the original's module with other shapes, or layers on binary inputs.

A module cannot be rebuilt from weights alone, so beside them lies `structure.json`: which tensors have which new shape,
which attributes (out_channels, num_heads, …) tell it, which layers and blocks are gone, which biases are new, and which
layers binarise their inputs. It is applied to the module that the original's architecture makes.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.checkpoints.architecture import Architecture
from compressor.checkpoints.source import TensorInfo
from compressor.core.absent import apply_cuts, cuts
from compressor.core.errors import CheckpointError
from compressor.core.reading import read_json
from compressor.core.tensors import named_tensors

SIGNED = (".input_threshold", ".input_size")

if TYPE_CHECKING:
    from torch import nn

RECORD = "structure.json"


@dataclass(frozen=True)
class Reshaping:
    """What to do to the original's module, in this order.

    lists        path of a list of blocks -> which it keeps
    absent       path -> [kind, n_outputs] of the `core.absent.Absent` that is there instead
    shapes       tensor -> [shape before, shape now]
    attributes   module's path -> attribute -> value now: an integer, or several
    gone         tensors that are absent -> their shapes, by which an architecture is recognised
    signed       layers on binary inputs
    biases       new bias -> its length
    config       what the module is built from before, where that of the smaller network is none that its class takes
    """

    shapes: dict[str, list[list[int]]]
    attributes: dict[str, dict[str, Any]]
    lists: dict[str, list[int]] = field(default_factory=dict)
    absent: dict[str, list[Any]] = field(default_factory=dict)
    gone: dict[str, list[int]] = field(default_factory=dict)
    signed: tuple[str, ...] = ()
    biases: dict[str, int] = field(default_factory=dict)
    config: dict[str, Any] | None = None

    @property
    def is_empty(self) -> bool:
        """Whether nothing but weights is another."""
        return self.keeps_shapes and not (self.signed or self.biases)

    @property
    def keeps_shapes(self) -> bool:
        """Whether biases, or how inputs are taken, are all that is new."""
        return not (self.shapes or self.attributes or self.lists or self.absent)

    @classmethod
    def between(cls, before: nn.Module, after: nn.Module, cut: bool = True) -> Reshaping:
        """What differs between a module, which is cut where it is not yet, and one that was made smaller from it."""
        from compressor.core.signing import signed_layers

        lists, absent = cuts(after) if cut else ({}, {})
        sizes = {name: list(tensor.shape) for name, tensor in before.state_dict().items()}
        before = apply_cuts(before, lists, absent)
        gone = {name: sizes[name] for name in sizes.keys() - before.state_dict().keys()} if absent else {}
        old, new = (named_tensors(each) for each in (before, after))
        shapes = {
            name: [list(tensor.shape), list(new[name].shape)]
            for name, tensor in old.items()
            if tensor.shape != new[name].shape
        }
        attributes: dict[str, dict[str, int]] = {}
        modules = dict(after.named_modules())
        for path, module in before.named_modules():
            changed = {
                name: getattr(modules[path], name)
                for name, value in vars(module).items()
                if _tells_sizes(value) and getattr(modules[path], name) != value
            }
            if changed:
                attributes[path] = changed
        biases = {name: len(tensor) for name, tensor in new.items() if name not in old and not name.endswith(SIGNED)}
        return cls(
            shapes, attributes, lists, absent, dict(sorted(gone.items())), tuple(signed_layers(after)), biases
        )  # fmt: skip

    @classmethod
    def read(cls, file: Path) -> Reshaping:
        """From `structure.json`.

        Raises:
            CheckpointError: It is damaged.
        """
        return cls.of(read_json(file), file)

    @classmethod
    def of(cls, content: dict[str, Any], file: Path) -> Reshaping:
        """From the content of `file`.

        Raises:
            CheckpointError: It is damaged.
        """
        known = set(cls.__dataclass_fields__)
        if not {"shapes", "attributes"} <= set(content) <= known:
            raise CheckpointError(f"{file}: has keys {sorted(content)}; expected {sorted(known)}; compress again")
        return cls(**{**content, "signed": tuple(content.get("signed", ()))})

    def text(self) -> str:
        content = asdict(self)
        if not self.signed:
            del content["signed"]
        return json.dumps(content, separators=(",", ":"), sort_keys=True)

    def before(self, tensors: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
        """The tensors with the shapes that they had, by which an architecture is recognised."""
        whole = {
            name: replace(info, shape=tuple(self.shapes[name][0])) if name in self.shapes else info
            for name, info in tensors.items()
            if name not in self.biases and not (self.signed and name.endswith(SIGNED))
        }
        return whole | {name: TensorInfo(name, tuple(shape), "F32", 0) for name, shape in self.gone.items()}

    def apply(self, module: nn.Module) -> nn.Module:
        """The module with the new shapes, its changed tensors empty; the same object.

        Raises:
            CheckpointError: It is not the module that was made smaller.
        """
        import torch
        from torch import nn

        from compressor.core.signing import sign_inputs

        with _refusing():
            apply_cuts(module, self.lists, self.absent)
            for path, values in self.attributes.items():
                for name, value in values.items():
                    _set_size(module.get_submodule(path), name, value)
        names: dict[int, list[str]] = {}
        for name, tensor in [*module.named_parameters(remove_duplicate=False), *module.named_buffers()]:
            names.setdefault(id(tensor), []).append(name)
        tensors = named_tensors(module)
        for name, (old, new) in self.shapes.items():
            if name not in tensors or list(tensors[name].shape) != old:
                found = tuple(tensors[name].shape) if name in tensors else "no such tensor"
                raise CheckpointError(
                    f"{RECORD}: tensor '{name}' had shape {tuple(old)} in the network that was compressed, but the "
                    f"architecture has {found}; give the original's with --arch module:callable, or arch= in Python"
                )
            empty = torch.empty(new, dtype=tensors[name].dtype, device=tensors[name].device)
            fresh = nn.Parameter(empty) if isinstance(tensors[name], nn.Parameter) else empty
            for alias in names[id(tensors[name])]:
                owner, _, attribute = alias.rpartition(".")
                setattr(module.get_submodule(owner), attribute, fresh)
        with _refusing():
            for path in self.signed:
                sign_inputs(module.get_submodule(path))
            for name, length in self.biases.items():
                owner = module.get_submodule(name.rpartition(".")[0])
                weight = next(owner.parameters())
                owner.register_parameter(
                    "bias", nn.Parameter(torch.empty(length, dtype=weight.dtype, device=weight.device))
                )
        return module

    def architecture(self, original: Architecture) -> Architecture:
        """The original's architecture, which then builds the smaller module."""
        from compressor.checkpoints.computed import fold

        return replace(original, construct=lambda config: self.apply(fold(original.construct(self.config or config))))


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    """Whatever a record leads to that is not of this network becomes a refusal."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError, StopIteration) as error:
        raise CheckpointError(
            f"{RECORD}: does not fit the architecture; {type(error).__name__}: {error}; give the "
            "original's with --arch module:callable, or arch= in Python"
        ) from error


def _set_size(module: nn.Module, name: str, value: Any) -> None:
    """Sets an attribute that tells a size, and no other: a record says nothing else of a module."""
    new = tuple(value) if isinstance(value, list) else value
    if not _tells_sizes(getattr(module, name, None)) or not _tells_sizes(new):
        raise ValueError(f"'{name}' of {type(module).__name__} is no size")
    setattr(module, name, new)


def _tells_sizes(value: Any) -> bool:
    """An integer, or a tuple of them as a kernel's."""
    return type(value) is int or (isinstance(value, tuple) and all(type(each) is int for each in value))
