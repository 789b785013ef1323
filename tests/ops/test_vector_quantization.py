"""Nearest codewords, k-means and balanced clusters against loops in float64."""

from __future__ import annotations

import pytest
import torch

from compressor.ops.vector_quantization import balanced_clusters, gaussian_codebook, kmeans, nearest


def gaussian(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def naive_nearest(points: torch.Tensor, codewords: torch.Tensor) -> list[int]:
    found = []
    for point in points.double():
        distances = [float(((point - codeword) ** 2).sum()) for codeword in codewords.double()]
        found.append(distances.index(min(distances)))
    return found


@pytest.mark.parametrize(("n", "size", "dim"), [(50, 7, 1), (41, 16, 4), (33, 5, 3), (1, 3, 2), (3000, 9, 4)])
def test_nearest_is_the_least_distance(n, size, dim):
    points, codewords = gaussian(n, dim), gaussian(size, dim, 1)
    assert nearest(points, codewords).tolist() == naive_nearest(points, codewords)


def test_nothing_has_no_nearest_codeword_and_neither_has_nan():
    codewords = gaussian(4, 2)
    assert nearest(torch.empty(0, 2), codewords).shape == (0,)
    with pytest.raises(ValueError, match="not finite"):
        nearest(torch.tensor([[0.0, 1.0], [float("nan"), 0.0]]), codewords)


def test_the_lowest_of_equal_codewords_is_taken():
    codewords = torch.tensor([[3.0], [1.0], [1.0], [-1.0]])
    assert nearest(torch.tensor([[1.2], [0.0]]), codewords).tolist() == [1, 1]


def test_kmeans_is_weighted_lloyd():
    points, weights, first = (
        gaussian(60, 3),
        torch.rand(60, generator=torch.Generator().manual_seed(2)),
        gaussian(6, 3, 1),
    )
    first[4] = 50.0  # nearest to nothing
    expected = first.double().clone()
    for _ in range(3):
        index = naive_nearest(points, expected)
        for k in range(6):
            mine = [i for i in range(60) if index[i] == k]
            if mine:
                total = sum(weights[i].double() * points[i].double() for i in mine)
                expected[k] = total / sum(weights[i].double() for i in mine)
    found = kmeans(points, weights, first, 3)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[4], first[4], rtol=0, atol=0)


def test_no_iteration_gives_the_codewords_back():
    first = gaussian(6, 3, 1)
    torch.testing.assert_close(kmeans(gaussian(60, 3), torch.ones(60), first, 0), first, rtol=0, atol=0)


def test_a_gaussian_codebook_is_the_generators():
    books = []
    for seed in (3, 4):
        torch.manual_seed(seed)
        books.append(gaussian_codebook(4, 1, torch.Generator().manual_seed(1), iterations=30))
    torch.testing.assert_close(books[0], books[1], rtol=0, atol=0)
    # Lloyd and Max: the best four levels for a unit Gaussian.
    torch.testing.assert_close(
        books[0].flatten().sort().values, torch.tensor([-1.51, -0.4528, 0.4528, 1.51]), rtol=0, atol=0.05
    )


@pytest.mark.parametrize(("n", "k"), [(23, 5), (12, 12), (20, 4), (7, 2)])
def test_clusters_are_of_equal_size_and_their_rows_ascend(n, k):
    order, sizes = balanced_clusters(gaussian(n, 6), k)
    assert sorted(order.tolist()) == list(range(n))
    assert sum(sizes) == n
    assert max(sizes) - min(sizes) <= 1
    for rows in order.split(sizes):
        assert rows.tolist() == sorted(rows.tolist())


def test_rows_that_are_alike_come_together():
    kinds = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2])
    order, sizes = balanced_clusters(gaussian(12, 4) * 0.1 + 3.0 * torch.eye(4)[kinds], 3)
    assert [len(set(kinds[rows].tolist())) for rows in order.split(sizes)] == [1, 1, 1]
