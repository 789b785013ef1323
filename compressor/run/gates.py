"""Gates: limits of loss, size and speed that an artifact has to keep, and a sentence for each that it does not."""

from __future__ import annotations

import math
from typing import Any

from compressor.core.report import Report
from compressor.plan.recipe import Gates
from compressor.widths.allocate import Target
from compressor.widths.losses import Kind

Limit = tuple[str, float | None, float | None, int]
"""What is limited, what was found, the gate, and 1 where less is better, −1 where more is."""


def promised(gates: Gates, target: Target) -> Gates:
    """The gates with every limit of the loss, whoever set it, in the measure of the network's kind: the strictest."""
    limits = [limit for limit in (target.loss, gates.max_loss) if limit is not None]
    if not limits:
        return gates
    loss = min(limits)
    if target.kind == "perplexity":
        return gates.model_copy(update={"max_perplexity_ratio": min(1 + loss, gates.max_perplexity_ratio or math.inf)})
    if target.kind == "accuracy" and target.labelled:
        drop = 1.0 if gates.max_accuracy_drop is None else gates.max_accuracy_drop
        return gates.model_copy(update={"max_accuracy_drop": min(loss, drop)})
    least = "min_cosine" if target.kind == "cosine" else "min_agreement"
    return gates.model_copy(update={least: max(1 - loss, getattr(gates, least) or 0.0)})


def measured_kind(quality: dict[str, Any] | None, kind: Kind) -> Kind:
    """The kind of loss that was measured: of a decoder whose graph gives no logits it is the cosine."""
    quality = quality or {}
    kinds: tuple[tuple[str, Kind], ...] = (
        ("ratio", "perplexity"),
        ("cosine", "cosine"),
        ("top1_agreement", "accuracy"),
    )
    for key, each in kinds:
        if quality.get(key) is not None:
            return each
    return kind


def came_true(kind: Kind, quality: dict[str, Any] | None) -> float | None:
    """The loss that was predicted, as it was measured on the evaluation data; None where it was not."""
    if not quality:
        return None
    if kind == "perplexity":
        return None if quality.get("ratio") is None else quality["ratio"] - 1
    if kind == "cosine":
        return 1 - quality["cosine"] if "cosine" in quality else None
    if quality.get("accuracy") is not None:
        return quality["original_accuracy"] - quality["accuracy"]
    return 1 - quality["top1_agreement"] if "top1_agreement" in quality else None


def speedup(report: Report) -> float | None:
    """How many times as fast as the original: tokens/s of decoding, else one over latency; None: not measured."""
    for key, power in (("decode_tokens_per_second", 1), ("latency_seconds", -1)):
        found, original = (getattr(speed, key, None) for speed in (report.speed, report.original_speed))
        if found and original:
            return (found / original) ** power
    return None


def lost_quality(gates: Gates, quality: dict[str, Any] | None) -> list[str]:
    """A sentence for each limit of quality that the artifact does not keep."""
    quality = quality or {}
    drop = None
    if quality.get("accuracy") is not None:
        drop = quality["original_accuracy"] - quality["accuracy"]
    return _broken(
        ("perplexity ratio", quality.get("ratio"), gates.max_perplexity_ratio, 1),
        ("KL divergence", quality.get("kl_divergence"), gates.max_kl_divergence, 1),
        ("top-1 agreement", quality.get("top1_agreement"), gates.min_agreement, -1),
        ("cosine", quality.get("cosine"), gates.min_cosine, -1),
        ("accuracy drop", drop, gates.max_accuracy_drop, 1),
    )


def lost_size_or_speed(gates: Gates, report: Report) -> list[str]:
    """A sentence for each limit of size and speed that the artifact does not keep."""
    size = None if report.size is None else report.size.bytes / 1e6
    megabytes = None if gates.max_size is None else gates.max_size / 1e6
    return _broken(
        ("size in MB, every file,", size, megabytes, 1),
        ("speed over the original's", speedup(report), gates.min_speedup, -1),
    )


def _broken(*limits: Limit) -> list[str]:
    failures = []
    for name, value, limit, sign in limits:
        if limit is not None and (value is None or not sign * value <= sign * limit):  # NaN keeps none
            found = "was not measured" if value is None else f"is {value:.4g}"
            failures.append(f"{name} {found}, the gate is {limit:g}")
    return failures
