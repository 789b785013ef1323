"""Where a network's blocks lie while they are computed with: on the host, or on a GPU that was asked for.

`sweeps.network.Network` puts them there, with what reaches them; whatever is made of tensors is made where these lie.
What is written, what is searched by code compiled for the processor, and whatever is drawn is on the host: the same
numbers are drawn for any device. Here no torch is imported before a GPU is asked for.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from compressor.core.errors import UsageError

if TYPE_CHECKING:
    import torch
    from torch import nn

HOST = "cpu"
_KNOWN = re.compile(r"cpu|auto|cuda(:\d{1,3})?")


def refuse_device(asked: str) -> None:
    """Refuses what is no name of a device that blocks may lie on.

    Raises:
        UsageError: It is none.
    """
    if not _KNOWN.fullmatch(asked):
        raise UsageError(f"--device {asked}: no such device; give cpu, cuda, cuda:1 for the second GPU, or auto")


def device_of(asked: str, host_alone: str) -> str:
    """The device that is asked for as torch names it, `cpu` or `cuda:0`; auto is a GPU where a run can be on one.

    Args:
        host_alone: Why this run is on the host alone; empty where it can be on a GPU.

    Raises:
        UsageError: It cannot be on what was asked for, or torch sees no such GPU.
    """
    refuse_device(asked)
    if asked == HOST or (asked == "auto" and host_alone):
        return HOST
    if host_alone:
        raise UsageError(f"--device {asked}: {host_alone}; leave it out")
    import torch

    n = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not n and asked == "auto":
        return HOST
    if not n:
        raise UsageError(
            f"--device {asked}: torch of this environment sees no GPU; install the build of torch for it, or leave "
            "--device out"
        )
    number = int(asked.partition(":")[2] or 0)
    if number >= n:
        raise UsageError(f"--device {asked}: torch sees {n} GPU{'s' * (n > 1)}; the last one is cuda:{n - 1}")
    return f"cuda:{number}"


def product_of(device: str) -> str:
    """What computes there: a GPU by the name of its make, and `cpu`, whatever its make is."""
    if device == HOST:
        return HOST
    import torch

    return torch.cuda.get_device_name(device)


def fast_bfloat16(device: str | torch.device = HOST) -> bool:
    """Whether a device multiplies bfloat16 matrices in hardware, so that sweeps may compute in it."""
    import torch

    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    queries = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(bool(getattr(torch.cpu, query, lambda: False)()) for query in queries)


def put_buffers(module: nn.Module, device: str | torch.device) -> None:
    """Puts the buffers of a module that have values on a device; parameters come block by block."""
    for part in module.modules():
        for name, buffer in part._buffers.items():
            if buffer is not None and buffer.device.type != "meta":
                part._buffers[name] = buffer.to(device)


@contextlib.contextmanager
def repeatable(device: str) -> Iterator[None]:
    """Within it a GPU adds up in the same order each time, wherever torch has an algorithm that does; of others torch
    warns. The host does so by itself."""
    if device == HOST:
        yield
        return
    import torch

    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read by cuBLAS when it is first used
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
