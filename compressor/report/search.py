"""A search for a student, in two pictures: what students earned as the policy learned, and size against accuracy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from compressor.report.charts import Axis, DotPlot, Legend, Point, dots

MOST_POINTS = 600
STAGES = {"removal": "c0", "greedy": "c0", "influence": "c0", "shrinkage": "c2"}


@dataclass(frozen=True)
class Search:
    """`sizes` is None where no student was judged."""

    legend: Legend
    rewards: DotPlot
    sizes: DotPlot | None
    text: str


def search_of(step: dict[str, Any]) -> Search | None:
    """Of a structure step's report; None where it did not search."""
    found = step.get("search")
    if not found or not found.get("trials"):
        return None
    trials = found["trials"][-MOST_POINTS:]
    gone = ", ".join(found["removed"]) or "nothing"
    shrunk = ", ".join(f"{name} {what} × {share:g}" for name, what, share in found["shrunk"])
    teacher = found["teacher"]
    text = (
        f"{found['policy']}: {found['n_judged']} students were judged by {found['measure']} on {found['validation']}, "
        f"which no figure above is of. The best is without {gone}{'; ' + shrunk if shrunk else ''}: "
        f"{step['parameters']:,} of {teacher['parameters']:,} parameters."
    )
    entries = [("c0", "a student"), ("c1", "mean of an epoch")]
    entries += [("c2", "a student whose layers shrink")] if any(t["stage"] == "shrinkage" for t in trials) else []
    return Search(entries, _rewards(trials), _sizes(found, trials), text)


def _epochs(trials: list[dict[str, Any]]) -> list[int]:
    """The number of each trial's epoch, the stages one after the other."""
    order = list(dict.fromkeys((trial["stage"], trial["epoch"]) for trial in trials))
    return [order.index((trial["stage"], trial["epoch"])) + 1 for trial in trials]


def _rewards(trials: list[dict[str, Any]]) -> DotPlot:
    numbers = _epochs(trials)
    points = [
        Point(number, trial["reward"], STAGES.get(trial["stage"], "c7"),
              title=f"{trial['stage']}, epoch {trial['epoch'] + 1}: {trial['reward']:.4f}")
        for number, trial in zip(numbers, trials, strict=True)
    ]  # fmt: skip
    means = {number: [t["reward"] for n, t in zip(numbers, trials, strict=True) if n == number] for number in numbers}
    points += [
        Point(n, sum(each) / len(each), "c1", title=f"mean {sum(each) / len(each):.4f}") for n, each in means.items()
    ]
    return dots(points, Axis("epoch of rollouts", "{:g}".format), Axis("reward", "{:g}".format))


def _sizes(found: dict[str, Any], trials: list[dict[str, Any]]) -> DotPlot | None:
    seen: dict[str, dict[str, Any]] = {t["student"]: t for t in trials if t["accuracy"] is not None}
    if not seen:
        return None
    best = found["best"]
    points = [Point(found["teacher"]["parameters"] / 1e6, 1.0, "c7", "the teacher")]
    for key, trial in sorted(seen.items(), key=lambda item: item[0] == best):
        kind, label = ("c1", "the best") if key == best else ("c0", "")
        title = f"{trial['parameters']:,} parameters, {trial['accuracy']:.4f} of the teacher's"
        points.append(Point(trial["parameters"] / 1e6, trial["accuracy"], kind, label, title))
    what = "accuracy" if found["measure"] == "accuracy" else "1 / perplexity"
    return dots(points, Axis("million parameters", "{:g}".format), Axis(f"{what}, of the teacher's", "{:g}".format))
