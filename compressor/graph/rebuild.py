"""Builds a student of a convolutional network: layers absent, channels fewer, kernels smaller, all else the teacher's.

Channels are followed from step to step as the teacher's numbers of them, so that what reads them keeps the right
columns. The last convolution of a residual block has as many as its shortcut. What does not fit is made anew, and a
forward of an example says whether the student can be at all.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from compressor.core.absent import Absent, replace
from compressor.core.students import Student
from compressor.graph.attributes import resize
from compressor.graph.blocks import weight_of
from compressor.graph.chain import Chain, Step
from compressor.graph.tracing import Example, split_example

LEAST_OUTPUTS = 10


class InvalidStudent(Exception):
    """Its shapes do not fit, or nothing is left of what a layer looks at."""


def shrunk_outputs(outputs: int, share: float) -> int:
    """max(10, ⌊v·m⌋), and never more than it was."""
    return min(outputs, max(LEAST_OUTPUTS, int(outputs * share + 1e-9)))


def shrunk_kernel(kernel: int, share: float) -> int:
    """max(1, ⌊v·m⌋)."""
    return max(1, int(kernel * share + 1e-9))


@torch.no_grad()
def build_student(
    teacher: nn.Module, chain: Chain, student: Student, example: Example, fresh: bool, generator: torch.Generator
) -> nn.Module:
    """The student in eval mode; the teacher is left as it is.

    Args:
        fresh: All of its weights are drawn; otherwise those that shapes do not allow to be the teacher's.

    Raises:
        InvalidStudent: There is no such network.
    """
    return _Building(teacher, chain, student, fresh, generator).run(example)


class _Building:
    """One student; `channels[i]` are the teacher's numbers of the channels that come out of step i."""

    def __init__(
        self, teacher: nn.Module, chain: Chain, student: Student, fresh: bool, generator: torch.Generator
    ) -> None:
        self.module = copy.deepcopy(teacher)
        self.chain, self.student, self.fresh, self.generator = chain, student, fresh, generator
        self.shares = {(number, name): share for number, name, share in student.shrunk}
        self.places = [i for i, s in enumerate(chain.steps) if s.module and s.kind in ("conv", "linear", "pool")]
        self.number = {place: i for i, place in enumerate(self.places)}
        self.channels: dict[int, Tensor] = {}
        self.removed_norms = {chain.norms[i] for i in student.removed if i in chain.norms}
        self.follows = self._followers()

    def run(self, example: Example) -> nn.Module:
        self._take_out()
        for place in range(len(self.chain.steps)):
            self._of(place)
        for place, step in enumerate(self.chain.steps):
            self._shape(place, step)
        self._smaller_kernels()
        self._adapt_linears(example)
        if self.fresh:
            for child in self.module.modules():
                _draw(child, self.generator)
        return self.module.eval()

    def _followers(self) -> dict[int, int]:
        """Step of the last layer that a block has left -> the step whose channels it has to have."""
        found = {}
        for block in self.chain.blocks:
            left = [i for i in block.layers if i not in self.student.removed and self.chain.layers[i].kind == "conv"]
            if left:
                found[self.places[left[-1]]] = block.shortcut
        return found

    def _take_out(self) -> None:
        """Layers and their norms pass on; the last one of a block of which nothing is left adds nothing."""
        emptied = {
            block.layers[-1] for block in self.chain.blocks if set(block.layers) <= set(self.student.removed)
        }  # fmt: skip
        for number in self.student.removed:
            layer = self.chain.layers[number]
            replace(self.module, layer.name, Absent("nothing" if number in emptied else "identity"))
        for name in self.removed_norms:
            replace(self.module, name, Absent("identity"))

    def _of(self, place: int) -> Tensor:
        """The channels of a step, by those that it depends on."""
        if place not in self.channels:
            self.channels[place] = self._found(place)
        return self.channels[place]

    def _found(self, place: int) -> Tensor:
        step = self.chain.steps[place]
        if step.kind in ("conv", "linear") and not self._is_gone(place):
            return self._own(place, step)
        if step.kind == "cat":
            offsets = [0]
            for each in step.inputs:
                offsets.append(offsets[-1] + (self.chain.steps[each].channels if each >= 0 else 0))
            return torch.cat([self._of(i) + offset for i, offset in zip(step.inputs, offsets, strict=False) if i >= 0])
        feeds = [i for i in step.inputs if i >= 0]
        if step.kind == "add" and len(feeds) == 2:
            emptied = next((b for b in self.chain.blocks if b.shortcut in feeds and self._is_empty(b)), None)
            return self._of(emptied.shortcut if emptied else feeds[0])
        same = [i for i in feeds if self.chain.steps[i].channels == step.channels]
        if not feeds:
            return torch.arange(step.channels)
        return self._of((same or feeds)[0])

    def _is_gone(self, place: int) -> bool:
        return self.number.get(place) in self.student.removed

    def _is_empty(self, block: Any) -> bool:
        return set(block.layers) <= set(self.student.removed)

    def _own(self, place: int, step: Step) -> Tensor:
        """The outputs of a layer: those of the shortcut that it is added to, or the largest of its own."""
        module = self.module.get_submodule(step.module)
        if getattr(module, "groups", 1) > 1:
            return self._of(step.inputs[0])
        if place in self.follows and self.follows[place] >= 0:
            return self._of(self.follows[place])
        n = shrunk_outputs(step.channels, self.shares.get((self.number[place], "outputs"), 1.0))
        sizes = weight_of(module).detach().flatten(1).abs().sum(1)
        return sizes.argsort(descending=True, stable=True)[:n].sort().values

    def _shape(self, place: int, step: Step) -> None:
        """Rows and columns of the weights that a step reads."""
        if not step.module or step.kind not in ("conv", "linear", "norm") or self._is_gone(place):
            return
        if step.module in self.removed_norms:
            return
        module: Any = self.module.get_submodule(step.module)
        rows = self._of(place)
        if step.kind == "norm":
            if isinstance(module, Absent):
                return
            _take(module, ("weight", "bias", "running_mean", "running_var"), rows, step.channels, self._anew)
        else:
            _take(module, ("weight", "bias"), rows, module.weight.shape[0], self._anew)
            before = step.inputs[0] if step.inputs else -1
            if step.kind == "conv" and before >= 0 and module.groups == 1:
                columns = self._of(before)
                module.weight = _columns(module.weight, columns, self._anew)
        resize(module)

    def _smaller_kernels(self) -> None:
        """The middle of each kernel, and less padding."""
        for (number, name), share in sorted(self.shares.items()):
            module: Any = self.module.get_submodule(self.chain.layers[number].name)
            if name == "kernel":
                sizes = tuple(shrunk_kernel(size, share) for size in module.kernel_size)
                weight = module.weight.detach()
                for dim, (old, new) in enumerate(zip(module.kernel_size, sizes, strict=True), start=2):
                    weight = weight.narrow(dim, (old - new) // 2, new)
                module.weight, module.kernel_size = nn.Parameter(weight.clone()), sizes
            elif name == "padding" and not isinstance(module.padding, str):
                module.padding = tuple(int(size * share + 1e-9) for size in module.padding)
                module._reversed_padding_repeated_twice = [p for p in reversed(module.padding) for _ in range(2)]

    def _adapt_linears(self, example: Example) -> None:
        """A forward, in which each linear takes as many inputs as come.

        Raises:
            InvalidStudent: It does not run.
        """
        handles = [
            self.module.get_submodule(step.module).register_forward_pre_hook(self._hook(step))
            for step in self.chain.steps
            if step.kind == "linear"
        ]
        args, kwargs = split_example(example)
        try:
            self.module.eval()
            output = self.module(*args, **kwargs)
        except (RuntimeError, ValueError, IndexError, ZeroDivisionError) as error:  # what shapes that do not fit raise
            raise InvalidStudent(str(error).splitlines()[0]) from error
        finally:
            for handle in handles:
                handle.remove()
        if isinstance(output, Tensor) and not output.numel():
            raise InvalidStudent("nothing is left of the feature map")

    def _hook(self, step: Step) -> Any:
        def adapt(module: Any, inputs: tuple) -> None:
            n = inputs[0].shape[-1]
            if n == module.in_features:
                return
            if not n:
                raise InvalidStudent("nothing is left of the feature map")
            before = step.inputs[0]
            channels, whole = self._of(before), self._source_channels(before)
            area = module.in_features // max(1, whole)
            if whole and n == len(channels) * area and int(channels.max()) < whole:
                columns = (channels[:, None] * area + torch.arange(area)).flatten()
            else:
                columns = torch.full((n,), module.in_features)  # beyond: made anew
            module.weight = _columns(module.weight, columns, self._anew)
            resize(module)

        return adapt

    def _source_channels(self, place: int) -> int:
        """Of the teacher's feature map that a vector was made of."""
        while place >= 0:
            step = self.chain.steps[place]
            if step.kind in ("conv", "norm", "add", "cat", "linear"):
                return step.channels
            place = step.inputs[0] if step.inputs else -1
        return 0

    def _anew(self, shape: tuple[int, ...]) -> Tensor:
        """Weights for a layer of that shape: He's, of its inputs."""
        inputs = max(1, torch.Size(shape[1:]).numel())
        return torch.randn(shape, generator=self.generator) * (2 / inputs) ** 0.5


def _take(module: Any, names: tuple[str, ...], rows: Tensor, whole: int, anew: Any) -> None:
    """Keeps these rows of a module's tensors; where they are not its own, as many new ones."""
    for name in names:
        tensor = getattr(module, name, None)
        if tensor is None or (len(rows) == len(tensor) and bool((rows == torch.arange(len(tensor))).all())):
            continue
        if int(rows.max()) < min(whole, len(tensor)):
            values = tensor.detach()[rows].clone()
        elif tensor.dim() > 1:
            values = anew((len(rows), *tensor.shape[1:]))
        else:
            values = torch.full((len(rows),), float(name in ("weight", "running_var")))
        setattr(module, name, nn.Parameter(values) if isinstance(tensor, nn.Parameter) else values)


def _columns(weight: Tensor, columns: Tensor, anew: Any) -> nn.Parameter:
    """Keeps these columns of a weight; where they are not its own, makes it anew."""
    if int(columns.max()) < weight.shape[1]:
        return nn.Parameter(weight.detach()[:, columns].clone())
    return nn.Parameter(anew((weight.shape[0], len(columns), *weight.shape[2:])))


def _draw(module: Any, generator: torch.Generator) -> None:
    """He's weights for convolutions and linears, zero biases, norms as they begin."""
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)):
        inputs = module.weight[0].numel()
        module.weight.copy_(torch.randn(module.weight.shape, generator=generator) * (2 / inputs) ** 0.5)
        if module.bias is not None:
            module.bias.zero_()
    elif isinstance(module, nn.modules.batchnorm._BatchNorm):
        module.reset_running_stats()
        if module.weight is not None:
            module.weight.fill_(1)
            module.bias.zero_()
