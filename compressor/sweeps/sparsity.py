"""How much each matrix loses, where a pass allocates its sparsity by importance: known before anything is encoded."""

from __future__ import annotations

from pathlib import Path

import torch

from compressor.core.passes import PruningSettings
from compressor.graph.blocks import layers, matrix_of
from compressor.passes.registry import load_pass
from compressor.plan.plan import Plan
from compressor.sweeps.gradients import load_gradients
from compressor.sweeps.network import Network


@torch.no_grad()
def allocated_shares(network: Network, plan: Plan, folder: Path) -> dict[str, float]:
    """The share to drop per tensor name, from its weights and the gradients that `folder` holds; block by block."""
    wanted = {tensor.name: tensor.prune for tensor in plan.tensors if tensor.prune and tensor.prune.allocates}
    outliers: dict[PruningSettings, dict[str, float]] = {settings: {} for settings in wanted.values()}
    shapes: dict[str, tuple[int, int]] = {}
    for block in network.blocks if wanted else []:
        found = layers(network.block(block), f"{block}." if block else "")
        names = [name for name in found if name in wanted]
        gradients = load_gradients(folder, block, network.device) if names else {}
        with network.loaded(names):
            for name in names:
                weight = matrix_of(found[name])
                shapes[name] = (weight.shape[0], weight.shape[1])
                outliers[wanted[name]][name] = load_pass(wanted[name]).outliers(weight, gradients[name])
    shares: dict[str, float] = {}
    for settings, found in outliers.items():
        shares |= load_pass(settings).allocate(found, shapes)
    return shares
