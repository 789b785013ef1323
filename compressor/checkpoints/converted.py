"""Tensors by the names, and in the layouts, that transformers gives them as it loads a checkpoint.

From version 5 on, transformers computes with other tensors than files hold: it renames (`vit.encoder.layer` became
`vit.layers`), cuts (one table of queries, keys and values becomes three) and stacks (the experts of a layer become one
tensor). Its rules are data, `transformers.conversion_mapping`, and are applied here as it applies them, to one tensor
when that tensor is read. Some parameters stand in no file, since the class computes them (sinusoids of positions):
those are computed as the class does.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compressor.checkpoints.safetensors_file import TORCH_NAMES
from compressor.checkpoints.source import Source, TensorInfo
from compressor.core.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.core_model_loading import WeightConverter

DTYPES = {code: getattr(torch, name) for code, name in TORCH_NAMES.items()}
CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Conversion:
    """A rule of transformers and what it is applied to, which may give several tensors; `first` is one's name.

    `parts` are (pattern of the rule, stored name).
    """

    first: str
    rule: WeightConverter
    module: PreTrainedModel
    parts: tuple[tuple[str, str], ...]

    def apply(self, tensors: Iterable[Tensor]) -> dict[str, Tensor]:
        """The tensors of the module, of those of `parts` in their order."""
        rule = deepcopy(self.rule)
        for (pattern, name), tensor in zip(self.parts, tensors, strict=True):
            rule.add_tensor(self.first, name, pattern, tensor)  # type: ignore[arg-type]  # takes tensors as well
        made = rule.convert(self.first, model=self.module, config=self.module.config)
        return {name: found[0] if isinstance(found, list) else found for name, found in made.items()}


@dataclass
class ConvertedSource(Source):
    """The files of `original` by other names: what is converted or computed has a name of the module.

    Names of neither `original` nor `conversions` are of parameters that `computed`'s class initialises.
    """

    original: Source = field(kw_only=True)
    conversions: dict[str, Conversion] = field(kw_only=True)
    computed: PreTrainedModel = field(kw_only=True)

    def file_of(self, name: str) -> Path:
        if name in self.conversions:
            return self.original.file_of(self.conversions[name].parts[0][1])
        return self.original.file_of(name) if name in self.original.tensors else self.files[0]

    def read(self, name: str) -> Tensor:
        if name in self.conversions:
            conversion = self.conversions[name]
            made = conversion.apply(self.original.read(part) for _, part in conversion.parts)
            return made[name].clone(memory_format=torch.contiguous_format)
        if name in self.original.tensors:
            return self.original.read(name)
        return _initialised(self.computed, name)


@dataclass(frozen=True)
class Converted:
    """What a module's tensors are made of: a source, its names -> the module's names, and what has no use."""

    source: Source
    names: dict[str, str]
    unused: list[str]


def converted(source: Source, module: PreTrainedModel, path: Path) -> Converted:
    """A source by the names of a module, as `from_pretrained` decides them; itself where names alone differ.

    Raises:
        CheckpointError: A rule of transformers cannot be applied to what is there.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    rules = get_model_conversion_mapping(module)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    expected, prefix = module.state_dict(keep_vars=True), module.base_model_prefix
    renamed: dict[str, str] = {}  # the module's name -> the stored one
    parts: dict[str, list[tuple[str, str]]] = {}
    unused: list[str] = []
    for name in sorted(source.tensors, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, expected)
        if target not in expected and name in expected:
            target, pattern = name, None
        if target not in expected:
            unused.append(name)
        elif pattern is None:
            renamed.setdefault(target, name)
        else:
            parts.setdefault(target, []).append((pattern, name))
    made: dict[str, Conversion] = {}
    infos: dict[str, TensorInfo] = {}
    for first, found in parts.items():
        conversion = Conversion(first, by_pattern[found[0][0]], module, tuple(found))
        described = _described(source, conversion, path)
        made |= dict.fromkeys(described, conversion)
        infos |= described
    computed = {name: info for name, info in _computed(module).items() if name not in renamed and name not in made}
    names = {name: target for target, name in renamed.items()}
    if not made and not computed:
        return Converted(source, names, unused)
    kept = {name: source.tensors[name] for name in names}
    by_names = ConvertedSource(
        source.kind, source.files, kept | infos | computed, source.shared, source.module,
        original=source, conversions=made, computed=module,
    )  # fmt: skip
    return Converted(by_names, names | {name: name for name in (*infos, *computed)}, unused)


def _described(source: Source, conversion: Conversion, path: Path) -> dict[str, TensorInfo]:
    """What a conversion will give: it is applied to tensors without memory."""
    stored = [source.tensors[name] for _, name in conversion.parts]
    try:
        made = conversion.apply(torch.empty(info.shape, dtype=DTYPES[info.dtype], device="meta") for info in stored)
    except (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError, StopIteration) as error:
        raise CheckpointError(
            f"{path}: transformers makes '{conversion.first}' of {len(stored)} stored tensors, '{stored[0].name}' of "
            f"shape {stored[0].shape} and so on, and cannot; {error}; give the whole checkpoint, or the right config"
        ) from error
    return {name: _info(name, tensor) for name, tensor in made.items()}


def _info(name: str, tensor: Tensor) -> TensorInfo:
    return TensorInfo(name, tuple(tensor.shape), CODES[tensor.dtype], tensor.nbytes)


def _computed(module: PreTrainedModel) -> dict[str, TensorInfo]:
    """The parameters that a class says may be missing, and initialises with no chance in it."""
    ignored = getattr(module, "_keys_to_ignore_on_load_missing", None) or ()
    found: dict[str, TensorInfo] = {}
    for name, parameter in module.named_parameters():
        if not any(re.search(pattern, name) for pattern in ignored):
            continue
        first, second = (_initialised(module, name, seed) for seed in (0, 1))
        if torch.equal(first, second):
            found[name] = _info(name, parameter)
    return found


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
