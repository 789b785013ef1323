"""Deep gradient compression: of a gradient only its largest entries are sent, the others wait and add up.

Lin, Han, Mao, Wang, Dally, "Deep Gradient Compression: Reducing the Communication Bandwidth for Distributed Training",
ICLR 2018, arXiv 1712.01887. Per process and tensor, with momentum m:

    u ← m·u + g        v ← v + u        the ⌈n·share⌉ largest |v| are sent, and cleared from v, and from u (masking)

What all have sent, averaged, is the step: the momentum is in it already. Nesterov, as the authors' code has it: u ←
m·(u + g), v ← v + u + g.

Masking keeps stale momentum from an entry that has just been sent. Of large shares it takes the momentum itself: at a
share of 1 nothing is left of it. So `late`, which is ours, masks shares up to 1 % only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

Masking = Literal["late", "paper", "never"]
LATE = 0.01
"""The largest share that is masked late."""
_NARROW = 1 << 16
"""Entries of a tensor whose index takes two bytes."""


def local_limit(limit: float, n_processes: int) -> float:
    """limit·N^(−½): of a gradient's norm in one process, where `limit` is that of the mean of N [section 3.2]."""
    return limit * n_processes**-0.5


def clip_share(gradients: Iterable[Tensor], limit: float) -> float:
    """What all of a network's gradients are multiplied with, so that their norm together is `limit` at most."""
    norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
    return limit / max(norm, limit)


def compensate(
    gradient: Tensor, u: Tensor, v: Tensor, momentum: float, nesterov: bool = False
) -> tuple[Tensor, Tensor]:
    """(u, v) after a gradient [eq. 7]: the momentum u, and what waits to be sent, v; all of one shape."""
    if nesterov:
        u = momentum * (u + gradient)
        return u, v + u + gradient
    u = momentum * u + gradient
    return u, v + u


def n_sent(n: int, share: float) -> int:
    """⌈n·share⌉, at least 1."""
    return max(1, math.ceil(n * share - 1e-9))


def select(v: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The `n` largest |v| of a flat tensor: their places, ascending, int64 (n,), and their values (n,)."""
    index = v.abs().topk(n, sorted=False).indices.sort().values
    return index, v[index]


def sent(tensor: Tensor, index: Tensor) -> Tensor:
    """A flat tensor once its entries at `index` were sent: they are zero."""
    return tensor.index_fill(0, index, 0.0)


def averaged(messages: Sequence[tuple[Tensor, Tensor]], n: int) -> Tensor:
    """The mean over processes (n,) of what each has sent as (index, values); what one has not sent it counts as 0."""
    total = torch.zeros(n)
    for index, values in messages:
        total.index_add_(0, index, values)
    return total / len(messages)


def masks(masking: Masking, share: float) -> bool:
    """Whether u is cleared where v was sent, at a share."""
    return masking == "paper" or (masking == "late" and share <= LATE)


def warmup_share(epoch: int, shares: Sequence[float], share: float) -> float:
    """The share in an epoch, from 0: the first ones have `shares`, all later ones `share`."""
    return shares[epoch] if epoch < len(shares) else share


def index_bytes(n: int) -> int:
    """Of each place in a tensor of `n` entries."""
    return 2 if n <= _NARROW else 4


def bytes_sent(shapes: Iterable[Sequence[int]], share: float) -> int:
    """Of one process's messages of a step, for tensors of these shapes; those of one dimension are sent whole."""
    total = 0
    for shape in shapes:
        n = math.prod(shape)
        total += 4 * n if len(shape) < 2 else n_sent(n, share) * (4 + index_bytes(n))
    return total


def packed(messages: Sequence[tuple[Tensor, Tensor]], sizes: Sequence[int]) -> Tensor:
    """One message (bytes,) uint8 of what is sent of several tensors of so many entries: values, then wide and narrow
    places, so that each begins at a multiple of its own size."""
    wide = [index.int() for (index, _), n in zip(messages, sizes, strict=True) if index_bytes(n) == 4]
    narrow = [index.short() for (index, _), n in zip(messages, sizes, strict=True) if index_bytes(n) == 2]
    parts = [values.float() for _, values in messages] + wide + narrow
    return torch.cat([part.view(torch.uint8) for part in parts])


def unpacked(message: Tensor, counts: Sequence[int], sizes: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """What `packed` was given: (index, values) of each tensor, of which `counts` entries were sent."""
    n = sum(counts)
    n_wide = sum(count for count, size in zip(counts, sizes, strict=True) if index_bytes(size) == 4)
    values = message[: 4 * n].view(torch.float32).split(list(counts))
    places = {
        4: message[4 * n : 4 * (n + n_wide)].view(torch.int32).long(),
        2: message[4 * (n + n_wide) :].view(torch.int16).long() & (_NARROW - 1),
    }
    found, begun = [], {4: 0, 2: 0}
    for count, size, part in zip(counts, sizes, values, strict=True):
        kind = index_bytes(size)
        found.append((places[kind][begun[kind] : begun[kind] + count], part))
        begun[kind] += count
    return found
