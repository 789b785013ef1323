"""Deep gradient compression, held against values worked by hand and against a slow loop."""

from __future__ import annotations

import math

import pytest
import torch

from compressor.ops.gradient_compression import (
    averaged,
    bytes_sent,
    clip_share,
    compensate,
    local_limit,
    masks,
    n_sent,
    packed,
    places_bytes,
    select,
    sent,
    unpacked,
    warmup_share,
)


def test_what_is_not_sent_gathers_momentum_as_worked_by_hand():
    u = v = torch.zeros(3)
    u, v = compensate(torch.tensor([1.0, 0.1, -0.5]), u, v, 0.9)
    index, values = select(v, 1)
    assert (index.tolist(), values.tolist()) == ([0], [1.0])
    u, v = sent(u, index), sent(v, index)
    torch.testing.assert_close(u, torch.tensor([0.0, 0.1, -0.5]))
    torch.testing.assert_close(v, torch.tensor([0.0, 0.1, -0.5]))
    u, v = compensate(torch.tensor([0.0, 0.2, -0.5]), u, v, 0.9)
    torch.testing.assert_close(u, torch.tensor([0.0, 0.29, -0.95]))
    torch.testing.assert_close(v, torch.tensor([0.0, 0.39, -1.45]))


@pytest.mark.parametrize("nesterov", [False, True])
def test_all_that_is_sent_sums_up_to_the_steps_of_sgd(nesterov):
    """Without masking nothing is lost: what was sent and what waits are together SGD with momentum."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(40, dtype=torch.float64))
    optimizer = torch.optim.SGD([weight], lr=1.0, momentum=0.9, nesterov=nesterov)
    u, v, total = (torch.zeros(40, dtype=torch.float64) for _ in range(3))
    for _ in range(30):
        gradient = torch.randn(40, generator=generator, dtype=torch.float64)
        weight.grad = gradient
        optimizer.step()
        u, v = compensate(gradient, u, v, 0.9, nesterov)
        index, values = select(v, 4)
        total[index] += values
        v = sent(v, index)
    torch.testing.assert_close(total + v, -weight.detach())


def test_the_mean_over_processes_counts_what_was_not_sent_as_nothing():
    messages = [(torch.tensor([0, 2]), torch.tensor([4.0, 2.0])), (torch.tensor([2, 3]), torch.tensor([2.0, -6.0]))]
    assert averaged(messages, 5).tolist() == [2.0, 0.0, 2.0, -3.0, 0.0]


def test_each_process_clips_its_part_of_the_limit():
    assert local_limit(1.0, 4) == 0.5
    assert clip_share([torch.tensor([3.0]), torch.tensor([0.0, 4.0])], 0.5) == pytest.approx(0.1)
    assert clip_share([torch.tensor([0.3, 0.0])], 0.5) == 1


def test_late_masking_spares_the_momentum_of_large_shares():
    assert [masks("late", share) for share in (0.25, 0.01, 0.001)] == [False, True, True]
    assert masks("paper", 0.25)
    assert not masks("never", 0.001)


def test_the_first_epochs_have_shares_of_their_own():
    assert [warmup_share(epoch, [0.25, 0.0625], 0.001) for epoch in range(4)] == [0.25, 0.0625, 0.001, 0.001]


@pytest.mark.parametrize(("n", "share", "count"), [(1000, 0.001, 1), (1001, 0.001, 2), (3, 0.001, 1), (10, 0.3, 3)])
def test_as_many_as_the_share_rounded_up_are_sent(n, share, count):
    assert n_sent(n, share) == count


@pytest.mark.parametrize("share", [0.0005, 0.25, 1.0])
def test_a_message_holds_what_was_sent_in_as_many_bytes_as_are_counted(share):
    """Of large and small tensors, at their first and last entries as well."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(300, 7), (256, 256), (65537, 1), (3, 5), (400, 200), (1, 1)]
    sizes = [math.prod(shape) for shape in shapes]
    tensors = [torch.randn(n, generator=generator) for n in sizes]
    for number, tensor in enumerate(tensors):
        tensor[-(number % 2)] = 9.0
    messages = [select(tensor, n_sent(n, share)) for tensor, n in zip(tensors, sizes, strict=True)]
    message = packed(messages, sizes)
    assert len(message) == bytes_sent(shapes, share)
    assert bytes_sent([*shapes, (64,)], share) == len(message) + 256
    found = unpacked(message, [len(index) for index, _ in messages], sizes)
    for (index, values), (place, value) in zip(messages, found, strict=True):
        assert torch.equal(index, place)
        assert torch.equal(values, value)


def test_places_are_written_as_worked_by_hand():
    """Of 3 places among 16, two bits as they are, the lowest first; then a one for each behind a zero for each four."""
    messages = [(torch.tensor([1, 6]), torch.tensor([1.0, 2.0])), (torch.tensor([7]), torch.tensor([3.0]))]
    written = packed(messages, [8, 8])[12:]
    assert "".join(f"{byte:08b}" for byte in written.tolist()) == "1001111010010000"
    assert places_bytes(16, 3) == 2


def test_a_place_of_a_thousand_takes_twelve_bits():
    assert 8 * places_bytes(1_000_000, 1000) / 1000 == pytest.approx(12.0, abs=0.05)


def test_nothing_is_sent_of_no_matrices():
    assert unpacked(packed([], []), [], []) == []
    assert bytes_sent([(5,)], 0.001) == 20
