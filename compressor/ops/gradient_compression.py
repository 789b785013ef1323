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
from itertools import accumulate
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Masking = Literal["late", "paper", "never"]
LATE = 0.01
"""The largest share that is masked late."""


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


def places_bytes(n: int, count: int) -> int:
    """Of `count` ascending places among `n`, as `packed` writes them."""
    low = _low_bits(n, count)
    return -(-(count * (low + 1) + ((n - 1) >> low)) // 8)


def bytes_sent(shapes: Iterable[Sequence[int]], share: float) -> int:
    """Of one process's messages of a step, for tensors of these shapes; those of one dimension are sent whole."""
    sizes = [(math.prod(shape), len(shape) < 2) for shape in shapes]
    matrices = [n for n, whole in sizes if not whole]
    count = sum(n_sent(n, share) for n in matrices)
    dense = 4 * sum(n for n, whole in sizes if whole)
    return dense + (4 * count + places_bytes(sum(matrices), count) if matrices else 0)


def packed(messages: Sequence[tuple[Tensor, Tensor]], sizes: Sequence[int]) -> Tensor:
    """One message (bytes,) uint8 of what is sent of several tensors of so many entries: all values, then all places.

    Places of a tensor behind another count on from its end, so that all of them ascend, and are Elias-Fano coded: the
    lower ⌊log₂(entries/places)⌋ bits of each, then of each how much its upper bits grow, in unary.
    """
    if not messages:
        return torch.zeros(0, dtype=torch.uint8)
    places = torch.cat([index + begun for (index, _), begun in zip(messages, _begins(sizes), strict=True)])
    low = _low_bits(sum(sizes), len(places))
    upper = torch.zeros(len(places) + ((sum(sizes) - 1) >> low), dtype=torch.uint8)
    upper[(places >> low) + torch.arange(len(places))] = 1
    lower = torch.empty(len(places), low, dtype=torch.uint8)
    for bit in range(low):
        lower[:, bit] = (places >> bit) & 1
    bits = torch.cat([lower.flatten(), upper])
    values = torch.cat([values.float() for _, values in messages])
    return torch.cat([values.view(torch.uint8), torch.from_numpy(np.packbits(bits.numpy()))])


def unpacked(message: Tensor, counts: Sequence[int], sizes: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """What `packed` was given: (index, values) of each tensor, of which `counts` entries were sent."""
    n = sum(counts)
    if not n:
        return []
    values, low = message[: 4 * n].view(torch.float32), _low_bits(sum(sizes), n)
    bits = torch.from_numpy(np.unpackbits(message[4 * n :].numpy()))
    places = (bits[n * low :].nonzero().flatten() - torch.arange(n)) << low
    for bit in range(low):
        places += bits[bit : n * low : low].long() << bit
    of_each = zip(places.split(list(counts)), _begins(sizes), values.split(list(counts)), strict=True)
    return [(place - begun, part) for place, begun, part in of_each]


def _low_bits(n: int, count: int) -> int:
    """⌊log₂(n/count)⌋: of each place, those that are written as they are."""
    return max(0, (n // max(1, count)).bit_length() - 1)


def _begins(sizes: Sequence[int]) -> list[int]:
    """Where each tensor begins, one behind the other."""
    return [0, *accumulate(sizes)][:-1]
