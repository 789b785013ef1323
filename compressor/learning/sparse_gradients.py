"""What processes that train together send one another: the largest entries of their gradients, the rest later.

The mathematics is in `ops/gradient_compression.py`. Here it is a communication hook of `DistributedDataParallel`, with
its state per parameter, since buckets are made anew after the first step. Tensors of one dimension (norms, biases) are
sent whole and have plain momentum: they are few, and their entries matter. What acts on all processes alike and need
not be sent, weight decay, has a momentum of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from compressor.core.errors import UsageError
from compressor.core.files import whole
from compressor.core.training import Training
from compressor.ops.gradient_compression import (
    averaged,
    bytes_sent,
    clipped,
    compensate,
    local_limit,
    masks,
    n_sent,
    packed,
    select,
    sent,
    unpacked,
    warmup_share,
)
from compressor.runtime.torchrun import n_processes, rank

_FILE = "gradients-{step}-{rank}.pt"


class SparseGradients:
    """What one process has not sent yet, and the hook that sends of it.

    waiting   by parameter, v: what was not sent
    momentum  by parameter, u
    decay     by parameter, the momentum of weight decay, the same in all processes
    """

    def __init__(self, module: nn.Module, settings: Training) -> None:
        self.settings = settings.compression
        self.factor = float(settings.options.get("momentum", 0.0))
        self.nesterov = bool(settings.options.get("nesterov", False))
        self.decays = float(settings.options.get("weight_decay", 0.0))
        self.parameters = dict(module.named_parameters())
        self.names = {id(parameter): name for name, parameter in self.parameters.items()}
        self.momentum = {name: torch.zeros(parameter.numel()) for name, parameter in self.parameters.items()}
        self.waiting = {n: torch.zeros(p.numel()) for n, p in self.parameters.items() if p.dim() > 1}
        self.decay = {n: torch.zeros_like(u) for n, u in self.momentum.items()} if self.decays else {}
        self.share = self.settings.share

    def attach(self, parallel: DistributedDataParallel) -> None:
        """Sends gradients of a module so from now on."""
        parallel.register_comm_hook(None, lambda _, bucket: self._reduce(bucket))

    def begin(self, epoch: int) -> None:
        """Takes the share of an epoch, from 0."""
        self.share = warmup_share(epoch, self.settings.warmup, self.settings.share)

    @property
    def bytes_sent(self) -> int:
        """That this process hands over in a step."""
        return bytes_sent([parameter.shape for parameter in self.parameters.values()], self.share)

    def save(self, folder: Path, step: int) -> None:
        """This process's part of a training's state; those of an earlier step stay."""
        folder.mkdir(parents=True, exist_ok=True)
        state = {"momentum": self.momentum, "waiting": self.waiting, "decay": self.decay, "processes": n_processes()}
        with whole(folder / _FILE.format(step=step, rank=rank())) as partial:
            torch.save(state, partial)

    def restore(self, folder: Path, step: int) -> None:
        """Goes on where all processes have saved at a `step`.

        Raises:
            UsageError: They were not as many as now.
        """
        file = folder / _FILE.format(step=step, rank=rank())
        state: dict[str, Any] = torch.load(file, weights_only=True) if file.is_file() else {}
        if state.get("processes") != n_processes():
            found = len(list(folder.glob(_FILE.format(step=step, rank="*"))))
            raise UsageError(
                f"{folder}: was left by a training of {found} processes, each of which has gradients that it did not "
                f"send yet, and these are {n_processes()}; start {found} with torchrun, or begin anew without --resume"
            )
        self.momentum, self.waiting, self.decay = state["momentum"], state["waiting"], state["decay"]

    def forget(self, folder: Path, step: int) -> None:
        """Removes the parts of other steps than this, of all processes."""
        for file in folder.glob(_FILE.format(step="*", rank="*")):
            if not file.name.startswith(_FILE.format(step=step, rank="").removesuffix(".pt")):
                file.unlink()

    def _reduce(self, bucket: distributed.GradBucket) -> torch.futures.Future[Tensor]:
        """Puts into a bucket the step that all processes take, as soon as all have sent theirs."""
        parts = {self.names[id(p)]: g for p, g in zip(bucket.parameters(), bucket.gradients(), strict=True)}
        begun = [
            send(chosen)
            for send, chosen in (
                (self._sparse, {name: part for name, part in parts.items() if name in self.waiting}),
                (self._whole, {name: part for name, part in parts.items() if name not in self.waiting}),
            )
            if chosen
        ]

        def finished(_done: object) -> Tensor:
            for _, finish in begun:
                finish()
            for name, gradient in parts.items():
                self._add_decay(name, gradient)
            return bucket.buffer()

        return torch.futures.collect_all([future for future, _ in begun]).then(finished)

    def _sparse(self, gradients: dict[str, Tensor]) -> tuple[torch.futures.Future, Callable[[], None]]:
        """Sends the largest of matrices: when it will have come, and what is to be done then."""
        messages = [self._chosen(name, gradient) for name, gradient in gradients.items()]
        sizes = [gradient.numel() for gradient in gradients.values()]
        counts = [len(index) for index, _ in messages]
        message = packed(messages, sizes)
        received = [torch.empty_like(message) for _ in range(n_processes())]
        work = distributed.all_gather(received, message, async_op=True)
        assert work is not None

        def finish() -> None:
            each = zip(*(unpacked(message, counts, sizes) for message in received), strict=True)
            for gradient, of_all in zip(gradients.values(), each, strict=True):
                gradient.copy_(averaged(of_all, gradient.numel()).view_as(gradient))

        return work.get_future(), finish

    def _chosen(self, name: str, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """What this process sends of a gradient, which is gone from what waits."""
        flat = self._limited(gradient)
        u, v = compensate(flat, self.momentum[name], self.waiting[name], self.factor, self.nesterov)
        index, values = select(v, n_sent(v.numel(), self.share))
        self.waiting[name] = sent(v, index)
        self.momentum[name] = sent(u, index) if masks(self.settings.masking, self.share) else u
        return index, values

    def _whole(self, gradients: dict[str, Tensor]) -> tuple[torch.futures.Future, Callable[[], None]]:
        """Sends vectors whole: when the sum will have come, and what is to be done then."""
        flat = torch.cat([self._limited(gradient) for gradient in gradients.values()])
        work = distributed.all_reduce(flat, async_op=True)
        assert work is not None

        def finish() -> None:
            means = (flat / n_processes()).split([gradient.numel() for gradient in gradients.values()])
            for (name, gradient), mean in zip(gradients.items(), means, strict=True):
                nothing = torch.zeros_like(mean)
                self.momentum[name], step = compensate(mean, self.momentum[name], nothing, self.factor, self.nesterov)
                gradient.copy_(step.view_as(gradient))

        return work.get_future(), finish

    def _limited(self, gradient: Tensor) -> Tensor:
        flat = gradient.detach().flatten()
        clip = self.settings.clip
        return flat if clip is None else clipped(flat, local_limit(clip, n_processes()))

    def _add_decay(self, name: str, gradient: Tensor) -> None:
        """What weight decay adds to a step."""
        if not self.decays:
            return
        wanted = self.decays * self.parameters[name].detach().flatten()
        nothing = torch.zeros_like(wanted)
        self.decay[name], step = compensate(wanted, self.decay[name], nothing, self.factor, self.nesterov)
        gradient.add_(step.view_as(gradient))
