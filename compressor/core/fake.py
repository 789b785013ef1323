"""Forwards of which shapes count: nothing is computed, and weights without memory serve."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv


@contextmanager
def shapes_alone() -> Iterator[None]:
    """Within it tensors have shapes and no values; of values that a forward asks for torch makes symbols, or raises."""
    with FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()), torch.no_grad():
        yield
