"""What processes that train together send one another: the largest entries of their gradients, the rest later.

The mathematics is in `ops/gradient_compression.py`. Tensors of one dimension (norms, biases) are sent whole and have
plain momentum: they are few, and their entries matter. What acts on all processes alike and need not be sent, weight
decay, has a momentum of its own.

Not a hook of `DistributedDataParallel`: what that sends beside gradients, running statistics and which parameters were
used, is more than a thousandth of a network, and with so little to send there is nothing to hide behind the backward
pass. A step takes two direct exchanges of all with all: each process adds up its part of the vectors, then sends that
together with its entries of the matrices.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

from compressor.core.errors import UsageError
from compressor.core.files import whole
from compressor.core.training import Training
from compressor.ops.gradient_compression import (
    averaged,
    bytes_sent,
    clip_share,
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
    """What one process has not sent yet, and how it sends of it.

    matrices, vectors   the parameters by name: those of two dimensions and more, and the others
    waiting     of each matrix, v: what was not sent
    momentum    of each parameter, u
    decay       of each parameter for which anything came, the momentum of weight decay; the same in all processes
    """

    def __init__(self, module: nn.Module, settings: Training) -> None:
        self.settings = settings.compression
        self.factor = float(settings.options.get("momentum", 0.0))
        self.nesterov = bool(settings.options.get("nesterov", False))
        self.decays = float(settings.options.get("weight_decay", 0.0))
        self.module, parameters = module, dict(module.named_parameters())
        self.matrices = {name: parameter for name, parameter in parameters.items() if parameter.dim() > 1}
        self.vectors = {name: parameter for name, parameter in parameters.items() if parameter.dim() <= 1}
        self.waiting = {name: torch.zeros(parameter.numel()) for name, parameter in self.matrices.items()}
        self.momentum = {name: torch.zeros(parameter.numel()) for name, parameter in parameters.items()}
        self.decay: dict[str, Tensor] = {}
        self.share = self.settings.share

    def begin(self, epoch: int) -> None:
        """Takes the share of an epoch, from 0."""
        self.share = warmup_share(epoch, self.settings.warmup, self.settings.share)

    @property
    def bytes_sent(self) -> int:
        """That this process has for the others in a step."""
        shapes = [parameter.shape for parameter in (*self.matrices.values(), *self.vectors.values())]
        return bytes_sent(shapes, self.share)

    def align(self) -> None:
        """Gives all processes the network of the first."""
        for tensor in self.module.state_dict().values():
            distributed.broadcast(tensor, 0)

    def exchange(self, asks: bool) -> bool:
        """Puts in place of each gradient the step that all processes take; whether the first of them `asks`."""
        gradients = self._gradients()
        part = self._summed_part(gradients)
        messages = [self._chosen(name, gradients[name]) for name in self.matrices]
        sizes, counts = [len(gradients[name]) for name in self.matrices], [len(index) for index, _ in messages]
        own = torch.cat([part.view(torch.uint8), packed(messages, sizes), torch.tensor([asks], dtype=torch.uint8)])
        received = _to_all(own.repeat(n_processes())).view(n_processes(), -1)
        n = 4 * len(part)
        steps = self._vector_steps(received[:, :n].contiguous().view(torch.float32).flatten())
        each = zip(*(unpacked(message[n:-1].clone(), counts, sizes) for message in received), strict=True)
        for name, of_all in zip(self.matrices, each, strict=True):
            steps[name] = averaged(of_all, len(gradients[name]))
        for name, parameter in (self.matrices | self.vectors).items():
            parameter.grad = self._with_decay(name, parameter, steps[name]).view_as(parameter)
        return bool(received[0, -1])

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

    def _gradients(self) -> dict[str, Tensor]:
        """Of this process, flat; zeros where a forward has left a parameter out."""
        found = {}
        for name, parameter in (self.matrices | self.vectors).items():
            gradient = parameter.grad
            found[name] = torch.zeros(parameter.numel()) if gradient is None else gradient.detach().flatten()
        if self.settings.clip is not None:
            share = clip_share(found.values(), local_limit(self.settings.clip, n_processes()))
            found = {name: gradient * share for name, gradient in found.items()}
        return found

    def _summed_part(self, gradients: dict[str, Tensor]) -> Tensor:
        """The mean over processes of this one's part of the vectors, all of them in a row; (entries,)."""
        flat = torch.cat([gradients[name] for name in self.vectors]) if self.vectors else torch.zeros(0)
        padded = nn.functional.pad(flat, (0, -len(flat) % n_processes()))
        return _to_all(padded).view(n_processes(), -1).mean(0)

    def _vector_steps(self, means: Tensor) -> dict[str, Tensor]:
        """The steps of vectors, with momentum, from the mean of their gradients in a row."""
        steps, begun = {}, 0
        for name, parameter in self.vectors.items():
            mean = means[begun : begun + parameter.numel()]
            begun += parameter.numel()
            self.momentum[name], steps[name] = self._stepped(mean, self.momentum[name])
        return steps

    def _chosen(self, name: str, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """What this process sends of a gradient, which is gone from what waits."""
        u, v = compensate(gradient, self.momentum[name], self.waiting[name], self.factor, self.nesterov)
        index, values = select(v, n_sent(len(v), self.share))
        self.waiting[name] = sent(v, index)
        self.momentum[name] = sent(u, index) if masks(self.settings.masking, self.share) else u
        return index, values

    def _with_decay(self, name: str, parameter: Tensor, step: Tensor) -> Tensor:
        """A step with what weight decay adds to it; not before anything came for the parameter, as torch has it."""
        if not self.decays or not (name in self.decay or bool(step.any())):
            return step
        wanted = self.decays * parameter.detach().flatten()
        self.decay[name], more = self._stepped(wanted, self.decay.get(name, torch.zeros_like(wanted)))
        return step + more

    def _stepped(self, gradient: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """(momentum, step) of plain SGD."""
        return compensate(gradient, u, torch.zeros_like(gradient), self.factor, self.nesterov)


def _to_all(parts: Tensor) -> Tensor:
    """As many equal parts as there are processes, one for each; returns those for this one, in the processes' order."""
    received = torch.empty_like(parts)
    distributed.all_to_all_single(received, parts)
    return received
