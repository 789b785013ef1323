"""Checkpoints of networks that became smaller: written by structure passes, opened as any other.

What a transformers config can say of the smaller network, the config does; the rest lies in `structure.json`, a
`Reshaping`; where the config says all, there is no such file.
"""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.checkpoints.checkpoint import Checkpoint
from compressor.checkpoints.opening import open_source
from compressor.checkpoints.reshaping import RECORD, Reshaping
from compressor.core.absent import follow_depth
from compressor.core.errors import CheckpointError
from compressor.core.reading import read_json
from compressor.core.roles import folded

if TYPE_CHECKING:
    from torch import nn

WEIGHTS, CONFIG = "model.safetensors", "config.json"
WIDTH_KEYS = ("intermediate_size", "d_ff", "ffn_dim", "n_inner", "hidden_dim", "encoder_ffn_dim", "decoder_ffn_dim")
HEAD_KEYS = {"self_attn.q_proj.weight": "num_attention_heads", "self_attn.k_proj.weight": "num_key_value_heads"}
"""Of attentions that know their heads by the size of their matrices."""


def write_reshaped(original: Checkpoint, module: nn.Module, folder: Path) -> None:
    """Weights, and the config or record from which `open_reshaped` builds the module, into a new folder.

    Raises:
        CheckpointError: A decoder whose layers differ in shape, which its graph cannot have.
    """
    from safetensors.torch import save_file

    reshaping, config = Reshaping.between(original.build(), module), None
    if original.config is not None:
        config = _following(original, module, reshaping)
        said = None if reshaping.absent else _beside_config(original, config, module)
        if said is not None and said.keeps_shapes:
            reshaping = said
        elif original.family == "decoder" and not reshaping.absent and _is_uniform(module):
            reshaping = replace(reshaping, config=original.config)  # its graph needs no transformers class
        else:
            config = original.config
    if original.family == "decoder" and config is original.config and not reshaping.keeps_shapes:
        raise CheckpointError(
            f"{original.path}: its layers would differ in heads, width or parts, which the config of a "
            f"{original.architecture} cannot say and the graph of decoders cannot have; write spread: group, so that "
            "all lose alike, or remove whole blocks"
        )
    tied = set(original.tied)
    weights = {name: tensor.detach().contiguous() for name, tensor in module.state_dict().items() if name not in tied}
    save_file(weights, folder / WEIGHTS)
    if config is not None:
        (folder / CONFIG).write_text(json.dumps(config))
    if not reshaping.is_empty:
        (folder / RECORD).write_text(reshaping.text())


def open_reshaped(original: Checkpoint, folder: Path) -> Checkpoint:
    """What `write_reshaped` wrote, as a checkpoint like any other."""
    source = open_source([folder / WEIGHTS], None, False)
    config, architecture, reshaping = copy.deepcopy(original.config), original.blueprint, None
    if (folder / CONFIG).is_file():
        config = read_json(folder / CONFIG)
    if (folder / RECORD).is_file():
        reshaping = Reshaping.read(folder / RECORD)
        architecture = reshaping.architecture(architecture)
    found = Checkpoint(folder / WEIGHTS, source, architecture, config=config, tokenizer_files=original.tokenizer_files)
    found.kind, found.reshaping = original.kind, None if reshaping is None or reshaping.is_empty else reshaping
    return found


def _is_uniform(module: nn.Module) -> bool:
    """Whether alike tensors of all blocks have the same shape."""
    shapes: dict[str, set[tuple[int, ...]]] = {}
    for name, tensor in module.state_dict().items():
        shapes.setdefault(folded(name), set()).add(tuple(tensor.shape))
    return all(len(found) == 1 for found in shapes.values())


def _beside_config(original: Checkpoint, config: dict[str, Any], module: nn.Module) -> Reshaping | None:
    """What the config leaves to say of the smaller network; None where its class cannot have these sizes."""
    from compressor.checkpoints.skeleton import construct

    try:
        built = construct(original.blueprint, config)
    except CheckpointError:
        return None
    if built.state_dict().keys() - module.state_dict().keys():
        return None
    return Reshaping.between(built, module, cut=False)


def _following(original: Checkpoint, module: nn.Module, reshaping: Reshaping) -> dict[str, Any]:
    """The config with what it can say of the smaller network."""
    config = original.config or {}
    found = copy.deepcopy(config)
    for path, kept in reshaping.lists.items():
        follow_depth(found, len(list(original.build().get_submodule(path).children())), kept)
    for values in reshaping.attributes.values():
        found.update({name: value for name, value in values.items() if name in found})
        if "num_heads" in values and "num_attention_heads" in found:
            found["num_attention_heads"] = values["num_heads"]
    size = {each for child in module.modules() if isinstance(each := getattr(child, "head_dim", None), int)}
    for name, key in HEAD_KEYS.items() if len(size) == 1 else ():
        counts = {new[0] // min(size) for tensor, (_, new) in reshaping.shapes.items() if tensor.endswith(name)}
        found.update({key: counts.pop()} if len(counts) == 1 and key in found else {})
    if len(size) == 1 and found.get("num_attention_heads") != config.get("num_attention_heads"):
        found["head_dim"] = size.pop()
    for old, new in reshaping.shapes.values():
        for before, now in zip(old, new, strict=True):
            keys = [key for key in WIDTH_KEYS if config.get(key) == before and now != before]
            found.update(dict.fromkeys(keys, now))
    return found
