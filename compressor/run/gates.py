"""Gates: limits of loss, size and speed that an artifact has to keep, and a sentence for each that it does not."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from compressor.core.report import Report, Speed
from compressor.plan.recipe import Gates
from compressor.widths.allocate import Target
from compressor.widths.losses import Kind

Limit = tuple[str, float | None, float | None, int]
"""What is limited, what was found, the gate, and 1 where less is better, −1 where more is."""
_KINDS: tuple[tuple[str, Kind], ...] = (
    ("cosine", "cosine"),
    ("top1_agreement", "accuracy"),
    ("relative_error", "error"),
)


def promised(gates: Gates, target: Target, quality: Mapping[str, Any] | None = None) -> Gates:
    """The gates with every limit of the loss, whoever set it, in the measures of the network's outputs: the strictest.

    Args:
        quality: What was measured, which tells the kinds of outputs; without it the target's kind counts.
    """
    limits = [limit for limit in (target.loss, gates.max_loss) if limit is not None]
    if not limits:
        return gates
    loss = min(limits)
    for kind in measured_kinds(quality) or (target.kind,):
        gates = gates.model_copy(update=_limit(gates, kind, loss, target.labelled))
    return gates


def _limit(gates: Gates, kind: Kind, loss: float, labelled: bool) -> dict[str, float]:
    """The gate of a kind of loss, not looser than it is."""
    if kind == "perplexity":
        return {"max_perplexity_ratio": min(1 + loss, gates.max_perplexity_ratio or math.inf)}
    if kind == "error":
        return {"max_error": min(loss, gates.max_error or math.inf)}
    if kind == "accuracy" and labelled:
        return {"max_accuracy_drop": min(loss, 1.0 if gates.max_accuracy_drop is None else gates.max_accuracy_drop)}
    least = "min_cosine" if kind == "cosine" else "min_agreement"
    return {least: max(1 - loss, getattr(gates, least) or 0.0)}


def measured_kinds(quality: Mapping[str, Any] | None) -> tuple[Kind, ...]:
    """The kinds of loss that were measured: of a language model its perplexity alone, but not where outputs are
    compared beside it."""
    quality = quality or {}
    if quality.get("ratio") is not None and not quality.get("outputs"):
        return ("perplexity",)
    return tuple(kind for key, kind in _KINDS if quality.get(key) is not None)


def measured_kind(quality: Mapping[str, Any] | None, kind: Kind) -> Kind:
    """The kind of loss that was measured, where there are several the first."""
    found = measured_kinds(quality)
    return found[0] if found else kind


def came_true(kind: Kind, quality: Mapping[str, Any] | None) -> float | None:
    """The loss that was predicted, as it was measured on the evaluation data; None where it was not."""
    quality = quality or {}
    if kind == "perplexity":
        return None if quality.get("ratio") is None else quality["ratio"] - 1
    if kind == "cosine":
        return None if quality.get("cosine") is None else 1 - quality["cosine"]
    if kind == "error":
        return quality.get("relative_error")
    if quality.get("accuracy") is not None:
        return quality["original_accuracy"] - quality["accuracy"]
    return None if quality.get("top1_agreement") is None else 1 - quality["top1_agreement"]


def speedup(report: Report) -> float | None:
    """How many times as fast as the original: tokens/s of decoding, else one over latency; None: not measured."""
    for key, power in (("decode_tokens_per_second", 1), ("latency_seconds", -1)):
        found, original = (getattr(speed, key, None) for speed in (report.speed, report.original_speed))
        if found and original:
            return (found / original) ** power
    return None


def lost_quality(gates: Gates, quality: Mapping[str, Any] | None) -> list[str]:
    """A sentence for each limit of quality that the artifact does not keep, on the output that is the worst by it."""
    quality = quality or {}
    worst = quality.get("worst") or {}
    drop = None
    if quality.get("accuracy") is not None:
        drop = quality["original_accuracy"] - quality["accuracy"]

    def named(measure: str, key: str) -> str:
        return f"{measure} of '{worst[key]}'" if key in worst else measure

    return _broken(
        ("perplexity ratio", quality.get("ratio"), gates.max_perplexity_ratio, 1),
        (named("KL divergence", "kl_divergence"), quality.get("kl_divergence"), gates.max_kl_divergence, 1),
        (named("top-1 agreement", "top1_agreement"), quality.get("top1_agreement"), gates.min_agreement, -1),
        (named("cosine", "cosine"), quality.get("cosine"), gates.min_cosine, -1),
        (named("accuracy drop", "accuracy"), drop, gates.max_accuracy_drop, 1),
        (named("relative error", "relative_error"), quality.get("relative_error"), gates.max_error, 1),
    )


_CHANCE, _MANY = 0.05, 1000
"""How seldom chance makes what is taken for a loss; and so many examples that it is not asked about."""


@dataclass(frozen=True)
class Loss:
    """A loss from 0 to 1, in which measure, and where it is a share, of how many: each is `1 / n` of it."""

    value: float
    measure: str
    n: float | None = None

    def exceeds(self, limit: float) -> bool:
        """NaN exceeds every limit; what is equal to it but for rounding exceeds none."""
        return not self.value <= limit + 1e-9

    def may_be_chance(self, limit: float) -> bool:
        """Whether so many of so few come out otherwise once in twenty times, or more often, where the true share is the
        limit."""
        if self.n is None or not math.isfinite(self.value) or self.n > _MANY or not 0 < limit < 1:
            return False
        n, found = round(self.n), round(self.value * self.n)
        below = sum(math.comb(n, k) * limit**k * (1 - limit) ** (n - k) for k in range(found))
        return 1 - below >= _CHANCE


def losses(quality: Mapping[str, Any] | None) -> dict[str, list[Loss]]:
    """What each output lost, in the measures that fit what it is; of a language model its perplexity.

    Of scores it counts whether those above the threshold are the same, and by how much all of them differ, as a share
    of the largest: their relative error says little where most are near zero.
    """
    quality = quality or {}
    outputs = quality.get("outputs") or {}
    if quality.get("ratio") is not None and not outputs:
        return {"perplexity": [Loss(quality["ratio"] - 1, "rise of perplexity")]}
    return {name: _of_output(each) for name, each in outputs.items()}


def _of_output(found: Mapping[str, Any]) -> list[Loss]:
    kind, n = found.get("kind"), found.get("n_compared")
    if found.get("accuracy") is not None:
        return [Loss(found["original_accuracy"] - found["accuracy"], "accuracy", n)]
    if kind == "vectors":
        return [Loss(1 - found["cosine"], "1 − cosine")]
    if kind == "values":
        return [Loss(found["relative_error"], "relative error")]
    given = [Loss(1 - found["agreement"], "share of changed predictions", n)]
    if kind == "scores":
        given.append(Loss(found["mean_relative_error"], "mean difference of scores"))
        if found.get("same_above") is not None:
            given.append(Loss(1 - found["same_above"], "share of other ones above the threshold", found["n_above"]))
    return given


def broken_promises(
    gates: Gates, target: Target, quality: Mapping[str, Any] | None, report: Report
) -> tuple[list[str], list[str], list[str]]:  # fmt: skip
    """What the artifact does not keep of what the recipe promises by itself: sentences on quality, on size and speed,
    and on what so few data leave open.

    Of few examples one or two that come out otherwise are more than a small promised loss and tell nothing: they fail
    no artifact, and are said.
    """
    worse, open_questions = list[str](), list[str]()
    limit = gates.promised_loss
    if limit is not None and not gates.limits_quality and target.loss is None and target.size is None:
        for name, given in losses(quality).items():
            beyond = [loss for loss in given if loss.exceeds(limit)]
            sure = [loss for loss in beyond if not loss.may_be_chance(limit)]
            for loss in (sure or beyond)[:1]:
                told = f"{loss.measure} of '{name}' is {loss.value:.2%}"
                if sure:
                    worse.append(f"{told}, the recipe promises {limit:.2%} at most")
                else:
                    open_questions.append(
                        f"{told}, {loss.value * (loss.n or 0):.0f} of {loss.n:.0f}: too few to tell whether it is the "
                        f"{limit:.2%} that the recipe promises; give more to judge on"
                    )
    other = list[str]()
    if gates.promised_size is not None and report.size is not None and report.size.original_bytes:
        share = report.size.bytes / report.size.original_bytes
        if share > gates.promised_size:
            other.append(
                f"size over the original's is {share:.4g}, the recipe promises {gates.promised_size:g} at most"
            )
    speed = surely_at_most(report)
    promised = gates.promised_speed if gates.min_speedup is None else None
    if promised is not None and speed is not None and speed < promised:
        other.append(f"speed over the original's is {speed:.4g}, the recipe promises {promised:g}")
    return worse, other, open_questions


def lost_by_sizes(
    gates: Gates, recipe: Gates, target: Target, judged: Mapping[str, Mapping[str, Any] | None], report: Report
) -> tuple[dict[str, list[str]], list[str]]:  # fmt: skip
    """Of an artifact of several networks what each smaller one does not keep of the limits of quality and speed,
    and what few data leave open; bytes and memory are of the artifact.

    Args:
        gates: With the limits of the loss in the outputs' measures, as `promised` gives them.
        judged: What was measured of each.
    """
    limits = gates.model_copy(update={"max_size": None, "max_memory": None})
    own = recipe.model_copy(update={"promised_size": None})
    missed, doubts = dict[str, list[str]](), list[str]()
    for name, quality in judged.items():
        alone = report.model_copy(update={"speed": _speed_of(name, report), "size": None})
        worse, other, open_questions = broken_promises(own, target, quality, alone)
        worse += lost_quality(limits, quality) if quality is not None else []
        other += lost_size_or_speed(limits, alone) if speedup(report) is not None else []
        missed[name] = worse + other
        doubts += [f"size {name}: {doubt}" for doubt in open_questions]
    return missed, doubts


def _speed_of(size: str, report: Report) -> Speed | None:
    """What a size would have come to beside the original: it was timed in turn with the largest, which was."""
    sizes = report.sizes or {}
    own, largest = (sizes[name].get("speed") or {} for name in (size, list(sizes)[-1]))
    found = {}
    for key in ("decode_tokens_per_second", "latency_seconds"):
        whole = getattr(report.speed, key, None)
        if whole and own.get(key) and largest.get(key):
            found[key] = whole * own[key] / largest[key]
    return Speed(**found, latency_error=own.get("latency_error")) if found else None


def surely_at_most(report: Report) -> float | None:
    """How many times as fast as the original the artifact is at the most: beyond three errors of latencies, and in the
    processor's time, where a machine that others use tells less. None: not measured."""
    found, speed, original = speedup(report), report.speed, report.original_speed
    if found is None or speed is None or original is None or speed.decode_tokens_per_second:
        return found
    found *= 1 + 3 * ((speed.latency_error or 0.0) + (original.latency_error or 0.0))
    if speed.processor_seconds and original.processor_seconds:
        found = max(found, original.processor_seconds / speed.processor_seconds)
    return found


def missed_target(report: Report) -> list[str]:
    """A sentence where what was searched is not fast enough, beyond what its pairs are apart; with the fastest."""
    found = report.search
    if found is None or found.latency is None or found.original is None or found.fastest is None:
        return []
    beyond = 1 + (found.spread or 0.0)
    if found.target_speedup is not None:
        speedup = found.original / found.latency
        if speedup * beyond >= found.target_speedup:
            return []
        return [
            f"speed over the original's is {speedup:.3g}, the target is {found.target_speedup:g}; the fastest of "
            f"{found.n_measured} networks came to {1 / found.fastest:.3g}"
        ]
    assert found.target_latency is not None
    if found.latency <= beyond * found.target_latency:
        return []
    return [
        f"latency is {1e3 * found.latency:.3g} ms, the target is {1e3 * found.target_latency:g} ms; the fastest of "
        f"{found.n_measured} networks took {1e3 * found.fastest:.3g} ms"
    ]


def most_memory(report: Report) -> int | None:
    """Bytes that loading and running took, whichever took more; None: not measured."""
    memory = None if report.speed is None else report.speed.memory
    peaks = [] if memory is None else [memory.loading.get("peak"), memory.running.get("peak")]
    return max((peak for peak in peaks if peak is not None), default=None)


def lost_size_or_speed(gates: Gates, report: Report) -> list[str]:
    """A sentence for each limit of size, memory and speed that the artifact does not keep."""
    size, memory = None if report.size is None else report.size.bytes / 1e6, most_memory(report)
    megabytes = None if gates.max_size is None else gates.max_size / 1e6
    return _broken(
        ("size in MB, every file,", size, megabytes, 1),
        ("memory in MB, loading and running,", memory and memory / 1e6, gates.max_memory and gates.max_memory / 1e6, 1),
        ("speed over the original's", speedup(report), gates.min_speedup, -1),
    )


def _broken(*limits: Limit) -> list[str]:
    failures = []
    for name, value, limit, sign in limits:
        if limit is not None and (value is None or not sign * value <= sign * limit):  # NaN keeps none
            found = "was not measured" if value is None else f"is {value:.4g}"
            failures.append(f"{name} {found}, the gate is {limit:g}")
    return failures
