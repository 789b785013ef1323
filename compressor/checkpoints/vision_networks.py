"""torchvision's ResNet and MobileNetV2 as modules, with its state-dict names. See `vision` for the papers."""

from __future__ import annotations

import torch
from torch import nn


def conv(n_in: int, n_out: int, size: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """A convolution without bias, padded to keep the image's size."""
    return nn.Conv2d(n_in, n_out, size, stride, padding=size // 2, groups=groups, bias=False)


class Residual(nn.Module):
    """ResNet's block: two 3x3 convolutions, or 1x1, 3x3, 1x1 with four times the outputs."""

    def __init__(self, n_in: int, width: int, stride: int, bottleneck: bool):
        super().__init__()
        self.bottleneck = bottleneck
        n_out = 4 * width if bottleneck else width
        self.conv1 = conv(n_in, width, 1) if bottleneck else conv(n_in, width, 3, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv(width, width, 3, stride if bottleneck else 1)
        self.bn2 = nn.BatchNorm2d(width)
        if bottleneck:
            self.conv3 = conv(width, n_out, 1)
            self.bn3 = nn.BatchNorm2d(n_out)
        self.relu = nn.ReLU(inplace=True)
        changes = stride != 1 or n_in != n_out
        self.downsample = nn.Sequential(conv(n_in, n_out, 1, stride), nn.BatchNorm2d(n_out)) if changes else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        if self.bottleneck:
            y = self.bn3(self.conv3(self.relu(y)))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """ResNet-18 to 152, by the number of blocks in each of the four stages."""

    def __init__(self, stages: list[int], bottleneck: bool, channels: int = 3, n_classes: int = 1000):
        super().__init__()
        self.conv1 = conv(channels, 64, 7, 2)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        n_in, made = 64, list[nn.Sequential]()
        for index, n_blocks in enumerate(stages):
            width, blocks = 64 << index, []
            for block in range(n_blocks):
                stride = 2 if index and block == 0 else 1
                blocks.append(Residual(n_in, width, stride, bottleneck))
                n_in = 4 * width if bottleneck else width
            made.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = made
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(n_in, n_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x).flatten(1))


class ConvNormActivation(nn.Sequential):
    """Convolution, batch norm, ReLU6."""

    def __init__(self, n_in: int, n_out: int, size: int, stride: int = 1, groups: int = 1):
        super().__init__(conv(n_in, n_out, size, stride, groups), nn.BatchNorm2d(n_out), nn.ReLU6(inplace=True))


class InvertedResidual(nn.Module):
    """Expand, filter each channel, project; added to the input where the shapes agree."""

    def __init__(self, n_in: int, hidden: int, n_out: int, stride: int, expands: bool):
        super().__init__()
        layers: list[nn.Module] = [ConvNormActivation(n_in, hidden, 1)] if expands else []
        layers += [ConvNormActivation(hidden, hidden, 3, stride, hidden), conv(hidden, n_out, 1)]
        self.conv = nn.Sequential(*layers, nn.BatchNorm2d(n_out))
        self.adds = stride == 1 and n_in == n_out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x) if self.adds else self.conv(x)


class MobileNetV2(nn.Module):
    """MobileNetV2 of any width; `blocks` lists (hidden channels, outputs, stride, whether it expands)."""

    def __init__(
        self, channels: int, stem: int, blocks: list[tuple[int, int, int, bool]], last: int, n_classes: int = 1000
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [ConvNormActivation(channels, stem, 3, 2)]
        n_in = stem
        for hidden, n_out, stride, expands in blocks:
            layers.append(InvertedResidual(n_in, hidden, n_out, stride, expands))
            n_in = n_out
        self.features = nn.Sequential(*layers, ConvNormActivation(n_in, last, 1))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(last, n_classes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x).mean((2, 3)))
