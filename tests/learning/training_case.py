"""Small networks, and subjects around them, for the tests of passes that train."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from compressor.core.batch import Examples
from compressor.core.encoding import Layout
from compressor.core.structure import Layer, Outcome, Subject
from compressor.core.training import Training
from compressor.graph.blocks import layers
from compressor.graph.places import layer_places
from compressor.learning.nested import fitting
from compressor.learning.trainer import Fitting
from compressor.passes.settings.n2n import N2nSettings
from compressor.passes.settings.training import TrainingSettings
from compressor.structure.stage import GraphSurgeon
from compressor.structure.students.laboratory import Laboratory
from compressor.structure.students.making import students_of

N_CLASSES = 5


def images(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, 3, 6, 5, generator=torch.Generator().manual_seed(seed))


EXAMPLE = images(4, 9)


def classes(inputs: Tensor) -> Tensor:
    """Labels that a small network can learn: which of a few directions the mean pixel leans to."""
    directions = torch.randn(3, N_CLASSES, generator=torch.Generator().manual_seed(1))
    return (inputs.mean((2, 3)) @ directions).argmax(1)


class Residual(nn.Module):
    """A stem, a residual block and a head: the residual sum is one group, the block's middle another."""

    def __init__(self, norms: bool = True) -> None:
        super().__init__()

        def norm() -> nn.Module:
            return nn.BatchNorm2d(16) if norms else nn.Identity()

        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), norm(), nn.ReLU())
        self.block = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), norm(), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1))
        self.head = nn.Linear(16, N_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(torch.relu(x + self.block(x)).mean((2, 3)))


def residual(seed: int = 0, norms: bool = True) -> nn.Module:
    torch.manual_seed(seed)
    return Residual(norms).eval()


def with_pooler(module: nn.Module) -> nn.Module:
    """The module with a layer that its forward leaves out."""
    torch.manual_seed(1)
    module.pooler = nn.Linear(3, 2)
    return module


def one_channel_matters() -> nn.Module:
    """Twelve channels: the first has small weights, and all of the output is made of it; nothing reads the others."""
    torch.manual_seed(5)
    module = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 2, 1))
    with torch.no_grad():
        module[0].weight[0] *= 0.3
        module[0].bias.fill_(0.1)
        module[2].weight[:, 1:] *= 1e-3
        module[2].weight[:, :1] = torch.tensor([[4.0], [-3.0]]).view(2, 1, 1, 1)
    return module.eval()


def examples(n: int = 64) -> Examples:
    inputs = images(n)
    return Examples({"": inputs}, classes(inputs))


def subject_of(
    module: nn.Module,
    settings: TrainingSettings | None = None,
    data: Examples | None = None,
    folder: Path | None = None,
) -> Subject:
    """A subject whose trainer learns from `data`, or from `examples`; without settings it has none."""
    batch = {"": EXAMPLE}
    surgeon = GraphSurgeon(batch, lambda module, batch: module(batch[""]))

    def trainer(
        settings: Training, teacher: nn.Module | None = None, other: nn.Module | None = None, *,
        name: str = "", share: float = 1.0,
    ) -> Fitting:  # fmt: skip
        kept = folder and folder.with_name(f"{folder.name}{name and f'-{name}'}")
        return fitting(other or module, data or examples(), settings, 3, kept, lambda share, note: None, teacher)

    def found() -> list[Layer]:
        modules, places = layers(module), layer_places(module, batch)
        return [
            Layer(name, modules[name], Layout(tuple(modules[name].weight.shape)), why) for name, why in places.items()
        ]

    def students(settings: N2nSettings) -> Laboratory:
        return students_of(
            module, [batch], None, settings, lambda: data or examples(), 3, folder, lambda share, note: None
        )

    return Subject(
        module, [batch], None, surgeon, torch.Generator(), lambda name: True, lambda share, note: None, trainer, found,
        students,
    )  # fmt: skip


def trained(method: TrainingSettings, module: nn.Module | None = None) -> tuple[Subject, Outcome]:
    """The subject, its units masked, and what the pass made of it."""
    subject = subject_of(module or residual(), method)
    return subject, method.restructure(subject)
