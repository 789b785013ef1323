"""Sizes and shares as people write them."""

from __future__ import annotations

import pytest

from compressor.core.errors import UsageError
from compressor.core.quantities import parse_share, parse_size


@pytest.mark.parametrize(("text", "expected"), [
    ("60MB", 60_000_000), ("60 MB", 60_000_000), ("1.5GB", 1_500_000_000), ("60MiB", 60 * 2**20), ("512k", 512_000),
    ("123456", 123_456), ("900 kB", 900_000), ("2b", 2),
])  # fmt: skip
def test_sizes(text, expected):
    assert parse_size(text, "--target-size") == expected


@pytest.mark.parametrize(("text", "expected"), [("5%", 0.05), (".05", 0.05), ("0.05", 0.05), ("0.5 %", 0.005)])
def test_shares(text, expected):
    assert parse_share(text, "--max-loss") == pytest.approx(expected)


@pytest.mark.parametrize("text", ["", "MB", "60 parsecs", "-5MB", "0", "1e6"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(UsageError, match="--target-size: '.*' is no size; write 60MB"):
        parse_size(text, "--target-size")


@pytest.mark.parametrize("text", ["", "five", "100%", "1", "-5%", "0", "5%%"])
def test_what_is_no_share_is_refused(text):
    with pytest.raises(UsageError, match="--max-loss: '.*' is no share"):
        parse_share(text, "--max-loss")
