"""A search for a student, in two pictures: what students earned as the policy learned, and size against accuracy."""

from __future__ import annotations

from html import escape
from typing import Any

from compressor.report.charts import Axis, Point, dots, legend

MOST_POINTS = 600
STAGES = {"removal": "c0", "greedy": "c0", "influence": "c0", "shrinkage": "c2"}


def search_section(step: dict[str, Any]) -> str:
    """Of a structure step's report; nothing where it did not search."""
    found = step.get("search")
    if not found or not found.get("trials"):
        return ""
    trials = found["trials"][-MOST_POINTS:]
    gone = ", ".join(found["removed"]) or "nothing"
    shrunk = ", ".join(f"{name} {what} × {share:g}" for name, what, share in found["shrunk"])
    teacher = found["teacher"]
    text = (
        f"{found['policy']}: {found['n_judged']} students were judged by {found['measure']} on {found['validation']}, "
        f"which no figure above is of. The best is without {gone}{'; ' + shrunk if shrunk else ''}: "
        f"{step['parameters']:,} of {teacher['parameters']:,} parameters."
    )
    return (
        f"<h2>The search for a student</h2>\n{_rewards(found, trials)}{_sizes(found, trials)}"
        f'<p class="soft">{escape(text)}</p>'
    )


def _epochs(trials: list[dict[str, Any]]) -> list[int]:
    """The number of each trial's epoch, the stages one after the other."""
    order = list(dict.fromkeys((trial["stage"], trial["epoch"]) for trial in trials))
    return [order.index((trial["stage"], trial["epoch"])) + 1 for trial in trials]


def _rewards(found: dict[str, Any], trials: list[dict[str, Any]]) -> str:
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
    entries = [("c0", "a student"), ("c1", "mean of an epoch")]
    entries += [("c2", "a student whose layers shrink")] if any(t["stage"] == "shrinkage" for t in trials) else []
    return legend(entries) + dots(points, Axis("epoch of rollouts", "{:g}".format), Axis("reward", "{:g}".format))


def _sizes(found: dict[str, Any], trials: list[dict[str, Any]]) -> str:
    seen: dict[str, dict[str, Any]] = {t["student"]: t for t in trials if t["accuracy"] is not None}
    if not seen:
        return ""
    best = found["best"]
    points = [Point(found["teacher"]["parameters"] / 1e6, 1.0, "c7", "the teacher")]
    for key, trial in sorted(seen.items(), key=lambda item: item[0] == best):
        kind, label = ("c1", "the best") if key == best else ("c0", "")
        title = f"{trial['parameters']:,} parameters, {trial['accuracy']:.4f} of the teacher's"
        points.append(Point(trial["parameters"] / 1e6, trial["accuracy"], kind, label, title))
    what = "accuracy" if found["measure"] == "accuracy" else "1 / perplexity"
    return dots(points, Axis("million parameters", "{:g}".format), Axis(f"{what}, of the teacher's", "{:g}".format))
