"""Tensors by the names, and in the layouts, that transformers gives them as it loads a checkpoint.

From version 5 on, transformers computes with other tensors than files hold: it renames (`vit.encoder.layer` became
`vit.layers`), cuts (one table of queries, keys and values becomes three) and stacks (the experts of a layer become one
tensor). Its rules are data, `transformers.conversion_mapping`, and are applied here as it applies them, to one tensor
when that tensor is read. Some parameters stand in no file, since the class computes them (sinusoids of positions):
those are computed as the class does.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor, nn

from compressor.checkpoints.experts import Experts, Part
from compressor.checkpoints.safetensors_file import TORCH_NAMES
from compressor.checkpoints.scales import belongs_to_scales, has_scales, with_scales
from compressor.checkpoints.source import Source, TensorInfo
from compressor.core.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.core_model_loading import WeightConverter

DTYPES = {code: getattr(torch, name) for code, name in TORCH_NAMES.items()}
CODES = {dtype: code for code, dtype in DTYPES.items()}


class Origin(Protocol):
    """Where a tensor of a module comes from: the stored tensors that it is made of, and how."""

    @property
    def stored(self) -> tuple[str, ...]: ...

    def read(self, source: Source) -> Tensor: ...


@dataclass(frozen=True)
class Conversion:
    """One of the tensors that a rule of transformers makes of stored ones; `first` names the first of them.

    `parts` are (pattern of the rule, stored name).
    """

    name: str
    first: str
    rule: WeightConverter
    module: PreTrainedModel
    parts: tuple[tuple[str, str], ...]

    @property
    def stored(self) -> tuple[str, ...]:
        return tuple(name for _, name in self.parts)

    def read(self, source: Source) -> Tensor:
        return self.apply(with_scales(source, name) for name in self.stored)[self.name].contiguous()

    def apply(self, tensors: Iterable[Tensor]) -> dict[str, Tensor]:
        """All that the rule makes of the tensors of `parts`, in their order."""
        rule = deepcopy(self.rule)
        for (pattern, name), tensor in zip(self.parts, tensors, strict=True):
            rule.add_tensor(self.first, name, pattern, cast(Any, tensor))
        made = rule.convert(self.first, model=self.module, config=self.module.config)
        return {name: found[0] if isinstance(found, list) else found for name, found in made.items()}


@dataclass(frozen=True)
class Cut:
    """One expert of a tensor of all: of a stored one, by its name, or of one that is made."""

    whole: str | Conversion
    part: Part

    @property
    def stored(self) -> tuple[str, ...]:
        return (self.whole,) if isinstance(self.whole, str) else self.whole.stored

    def read(self, source: Source) -> Tensor:
        if not isinstance(self.whole, str):
            found = self.whole.read(source)[self.part.index]
        elif has_scales(source.tensors, self.whole):
            found = with_scales(source, self.whole)[self.part.index]
        else:
            found = source.read_row(self.whole, self.part.index)
        return (found.T if self.part.transposed else found).contiguous()


@dataclass(frozen=True)
class Initial:
    """A parameter that stands in no file: the class computes it."""

    model: PreTrainedModel
    name: str

    stored = ()

    def read(self, source: Source) -> Tensor:
        return _initialised(self.model, self.name)


@dataclass
class ConvertedSource(Source):
    """The files of `original`, and what is made of their tensors."""

    original: Source = field(kw_only=True)
    origins: dict[str, Origin] = field(kw_only=True)

    def file_of(self, name: str) -> Path:
        stored = self.origins[name].stored if name in self.origins else (name,)
        return self.original.file_of(stored[0]) if stored else self.files[0]

    def read(self, name: str) -> Tensor:
        return self.origins[name].read(self.original) if name in self.origins else self.original.read(name)


def converted(
    source: Source, module: PreTrainedModel, known: Collection[str], path: Path
) -> tuple[Source, dict[str, str]]:
    """A source by the names of a module, as `from_pretrained` decides them; itself where names alone differ.

    Args:
        known: The names of all that the module is made of.

    Returns:
        The source, and each of its names -> the module's name for it, which is not in `known` where it has no use.

    Raises:
        CheckpointError: A rule of transformers cannot be applied to what is there.
    """
    parts = _experts(module)
    targets, made = _matched(source, module, {*known, *(part.whole for part in parts.values())})
    stored = {target: name for name, target in reversed(targets.items())}
    origins: dict[str, Origin] = {}
    infos: dict[str, TensorInfo] = {}
    cut: dict[str, dict[str, Part]] = {}
    for name, part in parts.items():
        cut.setdefault(part.whole, {})[name] = part
    for conversion in made:
        for name, info in _described(source, conversion, path).items():
            found = replace(conversion, name=name)
            if name not in cut:
                origins[name], infos[name] = found, info
            for expert, part in _held(cut.get(name, {}), info):
                origins[expert], infos[expert] = _one_of(found, part, info.shape[0]), _info_of_part(expert, info, part)
    for whole in [each for each in cut if each in stored]:
        info = source.tensors[stored[whole]]
        for expert, part in _held(cut[whole], info):
            origins[expert], infos[expert] = Cut(stored[whole], part), _info_of_part(expert, info, part)
        del targets[stored[whole]]
    for name, parameter in _initial(module).items():
        if name not in stored and name not in origins:
            origins[name], infos[name] = Initial(module, name), _info(name, parameter)
    if not origins:
        return source, targets
    used = {name: info for name, info in source.tensors.items() if name not in targets}
    left = {name: info for name, info in source.tensors.items() if name in targets}
    left = {name: info for name, info in left.items() if not belongs_to_scales(name, used)}
    by_names = ConvertedSource(
        source.kind, source.files, left | infos, source.shared, source.module, original=source, origins=origins
    )
    return by_names, {name: targets[name] for name in left} | {name: name for name in origins}


def _experts(module: nn.Module) -> dict[str, Part]:
    """Every parameter of an expert: which part of which parameter of a fused mixture it is."""
    found: dict[str, Part] = {}
    for path, child in module.named_modules():
        if isinstance(child, Experts):
            prefix = f"{path}." if path else ""
            found |= {prefix + name: replace(part, whole=prefix + part.whole) for name, part in child.parts().items()}
    return found


def _matched(
    source: Source, module: PreTrainedModel, known: Collection[str]
) -> tuple[dict[str, str], list[Conversion]]:
    """Stored name -> the module's for what stays as it is, used or not; and what is made of the others."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    rules = get_model_conversion_mapping(module)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    names = dict.fromkeys(known, True)
    targets: dict[str, str] = {}
    parts: dict[str, list[tuple[str, str]]] = {}
    for name in source.tensors:
        target, pattern = rename_source_key(name, renamings, converters, module.base_model_prefix, names)
        if target not in names and name in names:
            target, pattern = name, None
        if pattern is None or target not in names:
            targets[name] = target if pattern is None else name
        else:
            parts.setdefault(target, []).append((pattern, name))
    made = []
    for first, found in parts.items():
        found.sort(key=lambda part: dot_natural_key(part[1]))
        made.append(Conversion(first, first, by_pattern[found[0][0]], module, tuple(found)))
    return targets, made


def _held(experts: dict[str, Part], whole: TensorInfo) -> Iterator[tuple[str, Part]]:
    """Those experts that a tensor has; the others are missing."""
    return ((name, part) for name, part in experts.items() if part.index < whole.shape[0])


def _one_of(whole: Conversion, part: Part, n_experts: int) -> Cut:
    """One expert of what a rule makes: of its own stored tensors alone, where each pattern has one for each expert."""
    by_pattern: dict[str, list[str]] = {}
    for pattern, name in whole.parts:
        by_pattern.setdefault(pattern, []).append(name)
    if any(len(names) != n_experts for names in by_pattern.values()):
        return Cut(whole, part)
    own = tuple((pattern, names[part.index]) for pattern, names in by_pattern.items())
    return Cut(replace(whole, parts=own), replace(part, index=0))


def _described(source: Source, conversion: Conversion, path: Path) -> dict[str, TensorInfo]:
    """What a conversion will give: it is applied to tensors without memory."""
    stored = [source.tensors[name] for name in conversion.stored]
    try:
        made = conversion.apply(
            torch.empty(info.shape, dtype=_read_as(source, info), device="meta") for info in stored
        )  # fmt: skip
    except (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError, StopIteration) as error:
        raise CheckpointError(
            f"{path}: transformers makes '{conversion.first}' of {len(stored)} stored tensors, '{stored[0].name}' of "
            f"shape {stored[0].shape} and so on, and cannot; {error}; give the whole checkpoint, or the right config"
        ) from error
    return {name: _info(name, tensor) for name, tensor in made.items()}


def _read_as(source: Source, info: TensorInfo) -> torch.dtype:
    return torch.float32 if has_scales(source.tensors, info.name) else DTYPES[info.dtype]


def _info(name: str, tensor: Tensor) -> TensorInfo:
    return TensorInfo(name, tuple(tensor.shape), CODES[tensor.dtype], tensor.nbytes)


def _info_of_part(name: str, whole: TensorInfo, part: Part) -> TensorInfo:
    shape = whole.shape[1:]
    return TensorInfo(name, shape[::-1] if part.transposed else shape, whole.dtype, whole.nbytes // whole.shape[0])


def _initial(module: PreTrainedModel) -> dict[str, nn.Parameter]:
    """The parameters that a class says may be missing, and initialises with no chance in it."""
    ignored = getattr(module, "_keys_to_ignore_on_load_missing", None) or ()
    return {
        name: parameter
        for name, parameter in module.named_parameters()
        if any(re.search(pattern, name) for pattern in ignored)
        and torch.equal(_initialised(module, name, 0), _initialised(module, name, 1))
    }


def _initialised(model: PreTrainedModel, name: str, seed: int = 0) -> Tensor:
    """A parameter as its class initialises it; where that leaves it as it was, another for each seed."""
    owner = model.get_submodule(name.rpartition(".")[0])
    fresh = deepcopy(owner).to_empty(device="cpu")
    for tensor in (*fresh.parameters(), *fresh.buffers()):
        tensor.data.fill_(seed + 7)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model._init_weights(fresh)
    return fresh.get_parameter(name.rpartition(".")[2]).detach()
