"""What is worse than the original is said first, and noise is not said; tables keep their figures in any terminal."""

from __future__ import annotations

import pytest
from rich.console import Console

from compressor.report.facts import drawbacks
from compressor.report.tables import quality_tables, run_tables


def report(before: int = 100, after: int = 50, seconds: tuple[float, float] = (1.0, 1.0), error: float = 0.0):
    speeds = [{"latency_seconds": each, "latency_error": error} for each in seconds]
    return {
        "size": {"original_bytes": before, "bytes": after}, "original_speed": speeds[0], "speed": speeds[1],
    }  # fmt: skip


@pytest.mark.parametrize(("found", "said"), [
    (report(), []),
    (report(seconds=(1.0, 1.03)), []),
    (report(seconds=(1.0, 1.25)), ["slower than its original: 0.80 × its speed"]),
    (report(seconds=(1.0, 1.25), error=0.05), []),
    (report(after=2_000_000, before=1_000_000), ["larger than its original: 2.0 MB, not 1.0 MB"]),
    ({"speed": {"decode_tokens_per_second": 5.0}, "original_speed": {"decode_tokens_per_second": 10.0}},
     ["slower than its original: 0.50 × its tokens per second"]),
    ({"speed": {"measured": False}}, []),
])  # fmt: skip
def test_what_got_worse_is_named(found, said):
    assert drawbacks(found) == said


def test_it_is_the_first_line_of_a_run():
    first = run_tables(report(seconds=(1.0, 2.0)), "out")[0]
    assert first == "slower than its original: 0.50 × its speed"


@pytest.mark.parametrize("width", [40, 60, 80, 160])
def test_the_table_of_outputs_keeps_every_figure_however_narrow_the_terminal(width):
    outputs = {
        "boxes": {"kind": "values", "n_examples": 48, "relative_error": 0.0123, "r_squared": 0.9876},
        "scores": {"kind": "classes", "n_examples": 48, "n_compared": 1920, "agreement": 0.9731,
                   "kl_divergence": 0.00456, "relative_error": 0.0789, "notes": ["of few"]},
    }  # fmt: skip
    console = Console(width=width)
    with console.capture() as printed:
        for part in quality_tables({"quality": {"outputs": outputs}, "gates": {"doubts": ["one of 48"]}}):
            console.print(part)
    lines = printed.get().splitlines()
    assert max(map(len, lines)) <= width
    words = " ".join(lines).split()
    for figure in ("0.0123", "0.9876", "48", "1920", "0.9731", "0.00456", "0.0789", "compared", "R²", "KL"):
        assert figure in words
    assert lines[-2:] == ["scores: of few", "one of 48"]
