"""Modules for weights that are shipped without one, for `--arch scripts.networks:digit_cnn`."""

from __future__ import annotations

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
