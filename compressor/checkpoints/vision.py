"""Image networks that keys and shapes determine: torchvision's ResNet and MobileNetV2, key for key.

ResNet: K. He, X. Zhang, S. Ren, J. Sun, "Deep residual learning for image recognition", CVPR 2016,
https://arxiv.org/abs/1512.03385. MobileNetV2: M. Sandler, A. Howard, M. Zhu, A. Zhmoginov, L.-C. Chen,
"MobileNetV2: inverted residuals and linear bottlenecks", CVPR 2018, https://arxiv.org/abs/1801.04381.
torchvision itself is not needed. Strides are not in the weights; they are the papers', as in torchvision.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compressor.checkpoints.source import TensorInfo

if TYPE_CHECKING:
    from torch import nn

MOBILENET_STRIDES = (1, 2, 1, 2, 1, 1, 2, 1, 1, 1, 1, 1, 1, 2, 1, 1, 1)


@dataclass(frozen=True)
class KnownNetwork:
    """A recognised network and how to build it."""

    name: str
    build: Callable[[], nn.Module]


def recognise(tensors: Mapping[str, TensorInfo]) -> KnownNetwork | None:
    """The network that these names and shapes determine, if any; imports no torch."""
    shapes = {name: info.shape for name, info in tensors.items()}
    if {"conv1.weight", "bn1.running_var", "layer1.0.conv2.weight", "fc.weight"} <= set(shapes):
        return _resnet(shapes)
    if {"features.0.0.weight", "features.1.conv.0.0.weight", "classifier.1.weight"} <= set(shapes):
        return _mobilenet(shapes)
    return None


def _networks() -> Any:
    return importlib.import_module("compressor.checkpoints.vision_networks")


def _resnet(shapes: Mapping[str, tuple[int, ...]]) -> KnownNetwork | None:
    stages = []
    for stage in range(1, 5):
        found = [re.match(rf"layer{stage}\.(\d+)\.conv1\.weight", name) for name in shapes]
        stages.append(1 + max((int(match[1]) for match in found if match), default=-1))
    stem, head = shapes["conv1.weight"], shapes["fc.weight"]
    if 0 in stages or len(stem) != 4 or stem[2] != 7:
        return None  # a variant for small images: its strides are not known
    bottleneck = "layer1.0.conv3.weight" in shapes
    middle = shapes["layer1.0.conv2.weight"]
    if middle[0] != 64 or middle[1] != 64:
        return None  # wide or grouped: not the paper's
    depth = 2 + sum(stages) * (3 if bottleneck else 2)
    settings = {"stages": stages, "bottleneck": bottleneck, "channels": stem[1], "n_classes": head[0]}
    return KnownNetwork(f"resnet{depth}", lambda: _networks().ResNet(**settings))


def _mobilenet(shapes: Mapping[str, tuple[int, ...]]) -> KnownNetwork | None:
    blocks = []
    for index in range(1, 1 + len(MOBILENET_STRIDES)):
        plain = shapes.get(f"features.{index}.conv.1.weight", ())
        project = plain if len(plain) == 4 else shapes.get(f"features.{index}.conv.2.weight", ())
        expand = shapes[f"features.{index}.conv.0.0.weight"] if len(project) == 4 else ()
        if not expand:
            return None
        blocks.append((expand[0], project[0], MOBILENET_STRIDES[index - 1], len(plain) != 4))
    last = shapes.get("features.18.0.weight", ())
    if len(last) != 4:
        return None
    stem, head = shapes["features.0.0.weight"], shapes["classifier.1.weight"]
    settings = {"channels": stem[1], "stem": stem[0], "blocks": blocks, "last": last[0], "n_classes": head[0]}
    return KnownNetwork("mobilenet_v2", lambda: _networks().MobileNetV2(**settings))
