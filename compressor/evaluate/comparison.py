"""Every output of an artifact beside the original's, each by what it is; the worst of them is what counts.

Over all examples, where a is the artifact's and b the original's:

    relative error   ‖a − b‖ / ‖b‖; the largest and the mean |a − b| are told over the largest |b|
    agreement        share of rows whose largest entry is the same, or of scores on the same side of their threshold
    KL               mean Σ p · (log p − log q) of the original p and the artifact q, in nats
    R²               1 − Σ (a − b)² / Σ (b − b̄)², b̄ the mean over examples of each number: of values
    cosine           mean over examples: of texts that of the mean of their tokens' vectors, else the mean of the
                     cosines of an example's vectors
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from compressor.core.errors import DataError, VerificationError
from compressor.core.memory import SLACK, Slack
from compressor.core.output_kinds import OutputKind, kind_of, real_tokens
from compressor.evaluate.language import log_softmax
from compressor.evaluate.session import ModuleSession

_LITTLE = 0.05
"""Of a value's size: where the original's values differ by less, their relative error says little."""
_SAME = 0.98
"""Of the scores above a threshold: where fewer are the same, that is said, since among many below they count little."""
_AT_ONCE = 2**20
"""Values whose errors and divergences are added up at a time: several arrays of twice the width are made of them."""
_SMALLEST = 1e-12
_LEAST = -700.0
"""Logarithm of what counts as no probability."""
_IGNORED = -100
"""The class that transformers' losses leave out."""


@dataclass
class Tally:
    """Sums over what was compared of one output."""

    kind: OutputKind
    n_examples: int = 0
    n_values: int = 0
    difference: float = 0.0
    squared_difference: float = 0.0
    largest_difference: float = 0.0
    total: float = 0.0
    squared: float = 0.0
    largest: float = 0.0
    n_rows: int = 0
    agreeing: int = 0
    divergence: float = 0.0
    chosen: Counter[int] = field(default_factory=Counter)
    cosines: list[np.ndarray] = field(default_factory=list)
    above: int = 0
    above_both: int = 0
    labelled: int = 0
    right: int = 0
    original_right: int = 0
    sums: np.ndarray | None = None

    def add(self, a: np.ndarray, b: np.ndarray, real: np.ndarray | None, labels: np.ndarray | None) -> None:
        """One batch: the artifact's and the original's (examples, …), which tokens are real, labels where they fit."""
        kind = self.kind
        a, b = np.asarray(a), np.asarray(b)
        self.n_examples += len(b) if b.ndim else 1
        if kind.label == "vectors":
            self.cosines.append(_cosines(a, b, kind.axis, real if kind.masked else None))
        elif kind.label == "positions":
            for row in range(len(b)):
                seen = real[row] if kind.masked and real is not None else slice(None)
                self._add_classes(a[row][seen][None], b[row][seen][None], None)
        elif kind.label in ("classes", "tokens"):
            a, b = np.moveaxis(a, kind.axis, -1), np.moveaxis(b, kind.axis, -1)
            fits = labels is not None and labels.shape == b.shape[:-1]
            labels = labels if fits else None
            if real is None or not kind.masked:
                rows = [each.reshape(-1, each.shape[-1]) for each in (a, b)]
                self._add_classes(rows[0], rows[1], None if labels is None else labels.reshape(-1))
            else:
                a, b = a[real], b[real]
                self._add_classes(a, b, None if labels is None else labels[real])
        if kind.masked and real is not None and b.shape[:2] == real.shape:
            a, b = a[real], b[real]
        if kind.label in ("scores", "numbers"):
            self._add_sides(a, b, labels)
        self._add_errors(a, b)

    def _add_errors(self, a: np.ndarray, b: np.ndarray) -> None:
        if b.size > _AT_ONCE and len(b) > 1:
            rows = max(1, len(b) * _AT_ONCE // b.size)
            for start in range(0, len(b), rows):
                self._add_errors(a[start : start + rows], b[start : start + rows])
            return
        finite = np.isfinite(b)
        b = np.where(finite, b, 0).astype(np.float64)
        difference = np.abs(np.where(finite, a, 0).astype(np.float64) - b)
        self.n_values += b.size
        self.difference += float(difference.sum())
        self.squared_difference += float((difference**2).sum())
        self.total += float(b.sum())
        self.squared += float((b**2).sum())
        if self.kind.label == "values" and b.ndim and len(b):
            sums = b.sum(0)
            self.sums = sums if self.sums is None else self.sums + sums if self.sums.shape == sums.shape else None
        if b.size:
            self.largest_difference = max(self.largest_difference, float(difference.max()))
            self.largest = max(self.largest, float(np.abs(b).max()))

    def _add_classes(self, a: np.ndarray, b: np.ndarray, labels: np.ndarray | None) -> None:
        """Rows (n, classes)."""
        n_rows = max(1, _AT_ONCE // max(1, b.shape[-1]))
        for start in range(0, len(b), n_rows):
            rows = slice(start, start + n_rows)
            classes, originals = a[rows].argmax(-1), b[rows].argmax(-1)
            self.n_rows += len(originals)
            self.agreeing += int((classes == originals).sum())
            self.chosen.update(originals.tolist())
            log_q, log_p = (_logarithms(each[rows], self.kind.probabilities) for each in (a, b))
            self.divergence += divergence(log_p, log_q)
            if labels is not None:
                known = labels[rows] != _IGNORED
                self.labelled += int(known.sum())
                self.right += int((classes == labels[rows])[known].sum())
                self.original_right += int((originals == labels[rows])[known].sum())

    def _add_sides(self, a: np.ndarray, b: np.ndarray, labels: np.ndarray | None) -> None:
        if self.kind.label == "scores":
            assert self.kind.threshold is not None
            a, b = a > self.kind.threshold, b > self.kind.threshold
            self.chosen.update({1: int(b.sum()), 0: int((~b).sum())})
            self.above += int(a.sum() + b.sum())
            self.above_both += int((a & b).sum())
        self.n_rows += b.size
        self.agreeing += int((a == b).sum())
        if labels is not None and labels.size == b.size and self.kind.label == "scores":
            given = labels.reshape(b.shape) > 0
            self.labelled += b.size
            self.right += int((a == given).sum())
            self.original_right += int((b == given).sum())

    def found(self) -> dict[str, Any]:
        """What compression.json holds of the output; figures that its kind does not have are left out."""
        label, rms = self.kind.label, (self.squared / max(1, self.n_values)) ** 0.5
        found: dict[str, Any] = {"kind": label, "n_examples": self.n_examples}
        if self.n_rows:
            found |= {"agreement": self.agreeing / self.n_rows, "n_compared": self.n_rows}
        if self.kind.threshold is not None:
            found["threshold"] = self.kind.threshold
        if self.above:
            found |= {"n_above": self.above / 2, "same_above": 2 * self.above_both / self.above}
        if label in ("classes", "tokens", "positions"):
            found["kl_divergence"] = max(0.0, self.divergence / max(1, self.n_rows))
        if self.labelled:
            found |= {"accuracy": self.right / self.labelled, "original_accuracy": self.original_right / self.labelled}
        if self.cosines:
            every = np.concatenate(self.cosines)
            found |= {"cosine": float(every.mean()), "least_cosine": float(every.min())}
        largest, n = self.largest or 1.0, max(1, self.n_values)
        error = (self.squared_difference / n) ** 0.5
        found |= {
            "relative_error": error / (rms or 1.0),
            "max_relative_error": self.largest_difference / largest,
            "mean_relative_error": self.difference / n / largest,
        }
        spread = 0.0 if self.sums is None else self.squared - float((self.sums**2).sum()) / self.n_examples
        if self.n_examples > 1 and spread > 1e-9 * self.squared:
            found["r_squared"] = 1 - self.squared_difference / spread
        notes = self._notes(found, rms, error)
        return found | ({"notes": notes} if notes else {})

    def _notes(self, found: Mapping[str, Any], rms: float, error: float) -> list[str]:
        """Where a figure could hardly fail, and where the artifact is of no use."""
        notes = []
        commonest = max(self.chosen.values(), default=0) / max(1, self.n_rows)
        what = "class" if self.kind.threshold is None else "side of the threshold"
        if found.get("same_above", 1) < _SAME:
            notes.append(f"of the scores above the threshold {found['same_above']:.1%} are the same ones")
        if self.chosen and sum(n > 0 for n in self.chosen.values()) == 1:
            notes.append(f"the original gives the same {what} all {self.n_rows} times: agreement could hardly fail")
        elif self.chosen and found["agreement"] < min(1.0, commonest):
            notes.append(f"agrees less often than always the commonest {what} would, {commonest:.3f}")
        if self.kind.label in ("values", "scores"):
            mean = self.total / max(1, self.n_values)
            spread = max(0.0, self.squared / max(1, self.n_values) - mean**2) ** 0.5
            if self.n_values > 1 and spread < _LITTLE * rms:
                share = f"; beside that the error is {error / spread:.2g}" if spread > 1e-6 * rms else ""
                notes.append(f"the original's values differ by {spread / (rms or 1):.1%} of their size only{share}")
            if found["relative_error"] >= 1:
                notes.append("is no nearer to the original than zeros would be")
        return notes


def evaluate_outputs(
    session: ModuleSession, originals: Iterable[Mapping[str, np.ndarray]], batches: Iterable[Mapping[str, np.ndarray]],
    labels: np.ndarray | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Compares every output with the original's, which come by name in the order of the batches.

    Args:
        labels: Classes, (examples, …), of the outputs that they fit.

    Returns:
        `outputs`: figures by name; beside it each figure's worst over all outputs, and in `worst` of which output it
        is, where there are several.

    Raises:
        DataError: There are no batches, or fewer of one than of the other.
        VerificationError: Outputs or shapes differ, or values are not finite.
    """
    tallies: dict[str, Tally] = {}
    before, slack = 0, Slack(SLACK)
    try:
        for batch, original in zip(batches, originals, strict=True):
            slack.give_back()
            found = paired(session.run(dict(batch)), original)
            real = real_tokens(batch)
            n = len(next(iter(batch.values())))
            given = None if labels is None else labels[before : before + n]
            before += n
            for name, (a, b) in found.items():
                if a.shape != b.shape:
                    raise VerificationError(f"{name}: has shape {a.shape}; the original's is {b.shape}")
                refuse_not_finite(name, a, b)
                if name not in tallies:
                    tallies[name] = Tally(kind_of(name, b, batch, session.config, given))
                tallies[name].add(a, b, real, given)
    except ValueError as error:
        if "zip()" not in str(error):
            raise
        raise DataError(f"the original: gives another number of batches than the data; {error}") from error
    if not tallies:
        raise DataError("evaluation data: hold nothing to compare outputs on; give at least one example")
    found = summary({name: tally.found() for name, tally in tallies.items()})
    if labels is not None and not any(tally.labelled for tally in tallies.values()):
        found["labels"] = f"of shape {labels.shape} fit no output: no accuracy is told"
    return found


def refuse_not_finite(name: str, a: np.ndarray, b: np.ndarray) -> None:
    """NaN and infinite values are those that the original has as well (masked logits), at the same places."""
    if a.dtype.kind in "fc":
        bad = int((~np.isfinite(a) & np.isfinite(b)).sum())
        if bad:
            raise VerificationError(
                f"{name}: {bad} of the artifact's values are NaN or infinite, the original's are not"
            )


def paired(
    artifact: Mapping[str, np.ndarray], original: Mapping[str, np.ndarray]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Outputs of the same name; in order where none is, as exporters rename them.

    Raises:
        VerificationError: One has outputs that the other lacks.
    """
    if set(artifact) == set(original):
        return {name: (artifact[name], original[name]) for name in original}
    if len(artifact) != len(original):
        raise VerificationError(
            f"outputs: the artifact has {', '.join(artifact)}; the original has {', '.join(original)}; "
            "expected the same"
        )
    pairs = zip(artifact.items(), original.values(), strict=True)
    return {name: (a, b) for (name, a), b in pairs}


_WORST = {
    "agreement": ("top1_agreement", min), "kl_divergence": ("kl_divergence", max), "cosine": ("cosine", min),
    "least_cosine": ("least_cosine", min), "max_relative_error": ("max_relative_error", max),
    "mean_relative_error": ("mean_relative_error", max),
}  # fmt: skip


def summary(outputs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Figures by output, and of each the worst."""
    found: dict[str, Any] = {"n_examples": max(each["n_examples"] for each in outputs.values())}
    worst: dict[str, str] = {}

    def note(key: str, figure: str, chosen: Any, among: Iterable[str]) -> None:
        values = {name: outputs[name][figure] for name in among if figure in outputs[name]}
        if values:
            worst[key] = chosen(values, key=values.__getitem__)
            found[key] = values[worst[key]]

    for figure, (key, chosen) in _WORST.items():
        note(key, figure, chosen, outputs)
    note("relative_error", "relative_error", max, [n for n, o in outputs.items() if o["kind"] in ("values", "scores")])
    drops = {name: each["original_accuracy"] - each["accuracy"] for name, each in outputs.items() if "accuracy" in each}
    if drops:
        worst["accuracy"] = max(drops, key=drops.__getitem__)
        found |= {key: outputs[worst["accuracy"]][key] for key in ("accuracy", "original_accuracy")}
    return found | {"outputs": outputs} | ({"worst": worst} if len(outputs) > 1 else {})


def divergence(log_p: np.ndarray, log_q: np.ndarray) -> float:
    """Σ p · (log p − log q) over all rows; entries without probability count nothing."""
    log_p, log_q = np.maximum(log_p, _LEAST), np.maximum(log_q, _LEAST)
    return float((np.exp(log_p) * (log_p - log_q)).sum())


def _logarithms(rows: np.ndarray, probabilities: bool) -> np.ndarray:
    return np.log(np.maximum(rows.astype(np.float64), _SMALLEST)) if probabilities else log_softmax(rows)


def _cosines(a: np.ndarray, b: np.ndarray, axis: int, real: np.ndarray | None) -> np.ndarray:
    """One per example (examples,)."""
    a, b = (np.moveaxis(each, axis, -1).astype(np.float64) for each in (a, b))
    if real is not None:
        return cosine(masked_mean(a, real), masked_mean(b, real))
    return cosine(a, b).reshape(len(b), -1).mean(1)


def masked_mean(hidden: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Means of hidden (batch, n, width) over the positions where mask (batch, n) is 1: float64 (batch, width)."""
    weight = mask.astype(np.float64)[..., None]
    return (hidden * weight).sum(axis=1) / np.maximum(weight.sum(axis=1), 1)


def cosine(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Cosines of rows; 0 where a row is zero."""
    length = np.linalg.norm(first, axis=-1) * np.linalg.norm(second, axis=-1)
    return (first * second).sum(axis=-1) / np.where(length > 0, length, np.inf)
