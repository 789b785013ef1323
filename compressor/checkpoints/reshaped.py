"""A checkpoint whose network became another: the original's module with other shapes, or layers on binary inputs.

A module cannot be rebuilt from weights alone, so beside them lies `structure.json`: which tensors have which new shape,
which attributes (out_channels, num_heads, …) tell it, which layers and blocks are gone, and which layers binarise their
inputs. It is applied to the module that the original's architecture makes. Where a transformers config can say the
same, the config does, and there is no such file.
"""

from __future__ import annotations

import copy
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.checkpoints.architecture import Architecture
from compressor.checkpoints.checkpoint import Checkpoint
from compressor.checkpoints.opening import open_source
from compressor.checkpoints.source import TensorInfo, read_json
from compressor.core.absent import apply_cuts, cuts, follow_depth
from compressor.core.errors import CheckpointError

SIGNED = (".input_threshold", ".input_size")

if TYPE_CHECKING:
    from torch import nn

RECORD, WEIGHTS, CONFIG = "structure.json", "model.safetensors", "config.json"
WIDTH_KEYS = ("intermediate_size", "d_ff", "ffn_dim", "n_inner", "hidden_dim", "encoder_ffn_dim", "decoder_ffn_dim")


@dataclass(frozen=True)
class Reshaping:
    """What to do to the original's module, in this order.

    lists        path of a list of blocks -> which it keeps
    absent       path -> [kind, n_outputs] of the `core.absent.Absent` that is there instead
    shapes       tensor -> [shape before, shape now]
    attributes   module's path -> attribute -> value now: an integer, or several
    gone         tensors that are absent -> their shapes, by which an architecture is recognised
    signed       layers on binary inputs
    """

    shapes: dict[str, list[list[int]]]
    attributes: dict[str, dict[str, Any]]
    lists: dict[str, list[int]] = field(default_factory=dict)
    absent: dict[str, list[Any]] = field(default_factory=dict)
    gone: dict[str, list[int]] = field(default_factory=dict)
    signed: tuple[str, ...] = ()

    @classmethod
    def between(cls, before: nn.Module, after: nn.Module) -> Reshaping:
        """What differs between a module, which is cut, and one that was made smaller from it."""
        from compressor.core.signing import signed_layers

        lists, absent = cuts(after)
        sizes = {name: list(tensor.shape) for name, tensor in before.state_dict().items()}
        before = apply_cuts(before, lists, absent)
        gone = {name: sizes[name] for name in sizes.keys() - before.state_dict().keys()} if absent else {}
        old, new = (dict([*m.named_parameters(), *m.named_buffers()]) for m in (before, after))
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
        return cls(shapes, attributes, lists, absent, dict(sorted(gone.items())), tuple(signed_layers(after)))

    @property
    def empty(self) -> bool:
        """Whether nothing but weights is another."""
        return not (self.shapes or self.attributes or self.lists or self.absent or self.signed)

    @classmethod
    def read(cls, file: Path) -> Reshaping:
        """From `structure.json`.

        Raises:
            CheckpointError: It is damaged.
        """
        content = read_json(file)
        known = set(cls.__dataclass_fields__)
        if not {"shapes", "attributes"} <= set(content) <= known:
            raise CheckpointError(f"{file}: has keys {sorted(content)}; expected {sorted(known)}; compress again")
        return cls(**content | {"signed": tuple(content.get("signed", ()))})

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
            if not (self.signed and name.endswith(SIGNED))
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

        apply_cuts(module, self.lists, self.absent)
        for path, values in self.attributes.items():
            for name, value in values.items():
                setattr(module.get_submodule(path), name, tuple(value) if isinstance(value, list) else value)
        names: dict[int, list[str]] = {}
        for name, tensor in [*module.named_parameters(remove_duplicate=False), *module.named_buffers()]:
            names.setdefault(id(tensor), []).append(name)
        tensors = dict([*module.named_parameters(), *module.named_buffers()])
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
        for path in self.signed:
            sign_inputs(module.get_submodule(path))
        return module

    def architecture(self, original: Architecture) -> Architecture:
        """The original's architecture, which then builds the smaller module."""
        return replace(original, construct=lambda config: self.apply(original.construct(config)))


def _tells_sizes(value: Any) -> bool:
    """An integer, or a tuple of them as a kernel's."""
    return type(value) is int or (isinstance(value, tuple) and all(type(each) is int for each in value))


def write_reshaped(original: Checkpoint, module: nn.Module, folder: Path) -> None:
    """Weights, and the config or record from which `open_reshaped` builds the module, into a new folder."""
    from safetensors.torch import save_file

    reshaping = Reshaping.between(original.build(), module)
    tied = set(original.tied)
    weights = {name: tensor.detach().contiguous() for name, tensor in module.state_dict().items() if name not in tied}
    save_file(weights, folder / WEIGHTS)
    config = None if original.config is None or reshaping.signed else _following(original, module, reshaping)
    if config is not None:
        (folder / CONFIG).write_text(json.dumps(config))
    else:
        (folder / RECORD).write_text(reshaping.text())


def open_reshaped(original: Checkpoint, folder: Path) -> Checkpoint:
    """What `write_reshaped` wrote, as a checkpoint like any other.

    Raises:
        CheckpointError: A decoder whose layers differ in shape, which its graph cannot have.
    """
    source = open_source([folder / WEIGHTS], None, False)
    config, architecture, reshaping = copy.deepcopy(original.config), original._architecture, None
    if (folder / CONFIG).is_file():
        config = read_json(folder / CONFIG)
    else:
        reshaping = Reshaping.read(folder / RECORD)
        architecture = reshaping.architecture(architecture)
        if original.family == "decoder":
            raise CheckpointError(
                f"{original.path}: its layers would differ in heads, width or parts, which a {original.architecture}'s "
                "config cannot say and the graph of decoders cannot have; leave structure passes out, or remove whole "
                "blocks"
            )
    found = Checkpoint(folder / WEIGHTS, source, architecture, config=config, tokenizer_files=original.tokenizer_files)
    found.kind, found.reshaping = original.kind, None if reshaping is None or reshaping.empty else reshaping
    return found


def _following(original: Checkpoint, module: nn.Module, reshaping: Reshaping) -> dict[str, Any] | None:
    """The config of the smaller network; None where the class's config cannot say its shapes."""
    from compressor.checkpoints.skeleton import construct

    config = copy.deepcopy(original.config or {})
    if reshaping.absent:
        return None
    for path, kept in reshaping.lists.items():
        follow_depth(config, len(list(original.build().get_submodule(path).children())), kept)
    for values in reshaping.attributes.values():
        config.update({name: value for name, value in values.items() if name in config})
        if "num_attention_heads" in values and "head_dim" not in config:
            size = {getattr(child, "head_dim", None) for child in module.modules()} - {None}
            config.update({"head_dim": size.pop()} if len(size) == 1 else {})
    for old, new in reshaping.shapes.values():
        for before, now in zip(old, new, strict=True):
            keys = [key for key in WIDTH_KEYS if (original.config or {}).get(key) == before and now != before]
            config.update(dict.fromkeys(keys, now))
    try:
        built = construct(original._architecture, config)
    except CheckpointError:
        return None
    wanted = {name: tensor.shape for name, tensor in module.state_dict().items()}
    found = {name: tensor.shape for name, tensor in built.state_dict().items()}
    return config if found == wanted else None
