"""Modules of networks whose weights stand alone, for `--arch scripts.networks:digit_cnn`."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn


class DigitCNN(nn.Module):
    """Three convolutions and two linears for images (batch, 1, 28, 28) of digits; logits (batch, 10).

    The network of digit-recognizer-py, with its state dict's names.
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for n_in, n_out in ((1, 32), (32, 64), (64, 128)):
            layers += [nn.Conv2d(n_in, n_out, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        self.conv_layers = nn.Sequential(*layers)
        self.fc_layers = nn.Sequential(nn.Linear(128 * 3 * 3, 256), nn.ReLU(), nn.Linear(256, 10))

    def forward(self, x):
        return self.fc_layers(self.conv_layers(x).flatten(1))


def digit_cnn() -> nn.Module:
    return DigitCNN()


class _Block(nn.Module):
    """Two convolutions and a shortcut, projected where the shape changes."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False), nn.BatchNorm2d(n_out)
        self.conv2, self.bn2 = nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False), nn.BatchNorm2d(n_out)
        self.shortcut = nn.Identity()
        if stride > 1 or n_in != n_out:
            self.shortcut = nn.Sequential(nn.Conv2d(n_in, n_out, 1, stride, bias=False), nn.BatchNorm2d(n_out))

    def forward(self, x):
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + self.shortcut(x))


class _SignedBlock(_Block):
    """The same with each Relu before its batch norm and none after the sum: what convolutions read has both signs."""

    def forward(self, x):
        y = self.bn1(torch.relu(self.conv1(x)))
        return self.bn2(torch.relu(self.conv2(y))) + self.shortcut(x)


class ResNet20(nn.Module):
    """Grey images (batch, 1, 28, 28) to ten logits: He et al.'s ResNet-20 for small images, arXiv 1512.03385.

    With `signed`, that of ReSTE's authors (arXiv 2308.06689), of the same parameters. `width` is of the first stage.
    """

    def __init__(self, signed: bool = False, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width))
        if not signed:
            self.stem.append(nn.ReLU())
        widths = [width, *(times * width for times in (1, 2, 4) for _ in range(3))]
        block = _SignedBlock if signed else _Block
        blocks = [block(a, b, 2 if a != b else 1) for a, b in pairwise(widths)]
        self.blocks, self.head = nn.Sequential(*blocks), nn.Linear(4 * width, 10)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def resnet20() -> nn.Module:
    return ResNet20()


def resnet20_8() -> nn.Module:
    return ResNet20(width=8)


def resnet20_signed() -> nn.Module:
    return ResNet20(signed=True)


class ResNet18(nn.Module):
    """Grey images (batch, 1, 28, 28) to ten logits: four stages of two blocks, as ResNet-18; a stem of stride 2."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        widths = [width, *(width * 2**stage for stage in range(4) for _ in range(2))]
        blocks = [_Block(a, b, 2 if a != b else 1) for a, b in pairwise(widths)]
        self.blocks, self.head = nn.Sequential(*blocks), nn.Linear(8 * width, 10)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def resnet18_16() -> nn.Module:
    return ResNet18(16)


def resnet18_8() -> nn.Module:
    return ResNet18(8)
