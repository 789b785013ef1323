"""Exported programs (.pt2): `torch.export.load` unpickles, so only with trust."""

from __future__ import annotations

from pathlib import Path

import torch

from compressor.checkpoints.archive import opened_archive, records
from compressor.checkpoints.source import refuse_empty
from compressor.checkpoints.state_dict import StateDictSource, find_shared, find_state_dict
from compressor.checkpoints.state_dict import _info as tensor_info
from compressor.core.errors import CheckpointError


def open_exported(path: Path, *, trust_pickle: bool) -> StateDictSource:
    """The state dict of an exported program, and its graph module as the network."""
    refuse_empty(path)
    if not trust_pickle:
        raise CheckpointError(
            f"{path}: is an exported program, and reading it executes code inside of the file; nothing was "
            "run; give --trust-pickle if you trust whoever made it, or save the state dict alone and give "
            "--arch"
        )
    try:
        with opened_archive(path) as archive, path.open("rb") as file:
            records(path, archive, file)  # its directory, before anything is unpacked
        program = torch.export.load(path)
        module = program.module()
    except CheckpointError:
        raise
    except Exception as error:  # what a damaged file makes torch's reader and its unpickler do is without bounds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path}: is not a readable exported program; {reason}; export it again") from error
    tensors = find_state_dict(path, dict(program.state_dict))
    infos = {name: tensor_info(path, name, tensor) for name, tensor in tensors.items()}
    homes = dict.fromkeys(tensors, path)
    shared = find_shared(tensors, homes)
    return StateDictSource("pt2", [path], infos, shared, module, homes=homes, loaded=tensors)
