"""Vector quantisation: nearest codewords, exactly, by faiss, and weighted k-means.

Lloyd, "Least squares quantization in PCM" (1982); weights on the points as in SqueezeLLM (arXiv 2306.07629).
"""

from __future__ import annotations

import faiss
import torch
from torch import Tensor

faiss.cvar.distance_compute_blas_threshold = 0  # its kernel that keeps no distances, however few points there are


def nearest(points: Tensor, codewords: Tensor) -> Tensor:
    """Index (n,) of the codeword (K, dim) nearest to each point (n, dim): argmin_k ‖x − C_k‖².

    Raises:
        ValueError: A point is not finite.
    """
    if not len(points):
        return torch.empty(0, dtype=torch.long, device=points.device)
    threads = torch.get_num_threads()
    faiss.omp_set_num_threads(1)  # calls are many and short: on a busy machine threads would wait for one another
    try:
        _, index = faiss.knn(points.contiguous().cpu().numpy(), codewords.contiguous().cpu().numpy(), 1)
    finally:
        faiss.omp_set_num_threads(threads)  # which are torch's as well
    found = torch.from_numpy(index[:, 0])
    if int(found.min()) < 0:
        raise ValueError("points without a nearest codeword: they are not finite")
    return found.to(points.device)


def nearest_within(points: Tensor, kept: Tensor, codewords: Tensor, supports: Tensor) -> Tensor:
    """As `nearest`, among the codewords whose support lies in `kept`: supports (K, dim) and kept (n, dim), bool.

    A codeword of empty support must be there. Distances may be in another basis than the supports.
    """
    places = 2 ** torch.arange(kept.shape[1], device=kept.device)
    pattern = (kept * places).sum(1)
    found = torch.empty_like(pattern)
    for value in pattern.unique().tolist():
        rows = (pattern == value).nonzero().flatten()
        words = (~(supports & ~kept[rows[0]]).any(1)).nonzero().flatten()
        found[rows] = words[nearest(points[rows], codewords[words])]
    return found


def kmeans(points: Tensor, weights: Tensor, codewords: Tensor, iterations: int) -> Tensor:
    """Codewords (K, dim) after `iterations` of Lloyd on Σ_i weight_i·‖x_i − C_{k(i)}‖²; an empty codeword stays."""
    for _ in range(iterations):
        codewords = _means(points, weights, codewords, nearest(points, codewords))
    return codewords


def sparse_kmeans(
    points: Tensor, kept: Tensor, weights: Tensor, size: int, iterations: int, generator: torch.Generator
) -> Tensor:
    """Codewords (size, dim) for points that are zero where not `kept`, bool (n, dim); each with a support of its own.

    Lloyd from points drawn at random, so that each support gets codewords by its frequency; the first is zero, for
    all points of which nothing is kept.
    """
    alive = kept.any(1).nonzero().flatten()
    alive = alive if len(alive) else torch.arange(len(points), device=points.device)
    drawn = alive[torch.randperm(len(alive), generator=generator)[:size].to(alive.device)]
    drawn = drawn.repeat(-(-size // len(drawn)))[:size]
    codewords, supports = points[drawn].clone(), kept[drawn].clone()
    codewords[0], supports[0] = 0.0, False
    for _ in range(iterations):
        index = nearest_within(points, kept, codewords, supports)
        codewords = _means(points, weights, codewords, index) * supports
    return codewords


def _means(points: Tensor, weights: Tensor, codewords: Tensor, index: Tensor) -> Tensor:
    """Weighted means of the points of each codeword; where it has none it stays."""
    mass = torch.zeros(len(codewords), device=codewords.device).index_add_(0, index, weights).unsqueeze(1)
    total = torch.zeros_like(codewords).index_add_(0, index, points * weights.unsqueeze(1))
    return torch.where(mass > 0, total / mass.clamp_min(torch.finfo(torch.float32).tiny), codewords)


def gaussian_codebook(size: int, dim: int, generator: torch.Generator, iterations: int = 12) -> Tensor:
    """Codewords (size, dim) for a unit Gaussian: where the k-means of any matrix of trained weights starts well."""
    points = torch.randn(max(60_000, 40 * size), dim, generator=generator)
    return kmeans(points, torch.ones(len(points)), points[:size].clone(), iterations)


def balanced_clusters(features: Tensor, n_clusters: int, iterations: int = 8) -> tuple[Tensor, tuple[int, ...]]:
    """Groups rows (n, f) into clusters of equal size (±1); returns the row order and the size of each cluster.

    Balanced k-means in one dimension at a time would lose shape, so rows are placed greedily: in order of how much
    they gain from their best free cluster over the next. Rows of a cluster are contiguous and ascending in the order.
    """
    n = len(features)
    sizes = torch.full((n_clusters,), n // n_clusters)
    sizes[: n % n_clusters] += 1
    spread = features.sum(1).argsort(stable=True)
    starts = torch.cat((torch.zeros(1, dtype=torch.long), sizes.cumsum(0)))
    label = torch.empty(n, dtype=torch.long)
    for k in range(n_clusters):
        label[spread[starts[k] : starts[k + 1]]] = k
    for _ in range(iterations):
        centres = torch.stack([features[label == k].mean(0) for k in range(n_clusters)])
        distance = torch.cdist(features, centres)
        placed = _place(distance, sizes)
        if torch.equal(placed, label):
            break
        label = placed
    order = torch.cat([(label == k).nonzero().flatten() for k in range(n_clusters)])
    return order, tuple(int(size) for size in sizes)


def _place(distance: Tensor, sizes: Tensor) -> Tensor:
    """Fills clusters of the given sizes, rows with the most to lose first."""
    label = torch.full((len(distance),), -1)
    left = sizes.clone()
    distance = distance.clone()
    while bool((label < 0).any()):
        open_rows = (label < 0).nonzero().flatten()
        two = distance[open_rows].topk(min(2, distance.shape[1]), largest=False)
        loss = (two.values[:, -1] - two.values[:, 0]).nan_to_num(posinf=torch.finfo(torch.float32).max)
        wanted = two.indices[:, 0]
        for k in range(len(sizes)):
            rows = open_rows[wanted == k]
            keen = loss[wanted == k].argsort(descending=True, stable=True)[: int(left[k])]
            label[rows[keen]] = k
            left[k] -= len(keen)
            if left[k] == 0:
                distance[:, k] = torch.inf
    return label
