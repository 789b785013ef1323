"""Tables for people: a plan, the recipes, what is inside of a file, the outcome of a run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions
from rich.measure import Measurement
from rich.table import Table

from compressor.core.artifact import FRONT
from compressor.core.quantities import duration, short_duration, size
from compressor.core.roles import folded
from compressor.core.terminal import make_console
from compressor.plan.plan import InUse, Plan
from compressor.plan.recipe import SECTIONS, Recipe
from compressor.report.facts import drawbacks, searched_speed


def table(*columns: str, numbers: Iterable[str] = ()) -> Table:
    """An empty table; the columns of `numbers` are aligned at the right."""
    numbers = set(numbers)
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        right = column in numbers
        made.add_column(column, justify="right" if right else "left", no_wrap=right, overflow="fold")
    return made


def show(*parts: Any) -> None:
    """Prints to stdout: at the width of the terminal, or whole where the output is a file."""
    console = make_console()
    if not console.is_terminal:
        console = make_console(width=160)
    for part in parts:
        console.print(part)


def plan_tables(plan: Plan) -> list[Any]:
    """The plan, alike tensors of all blocks in one row."""
    rows: dict[tuple, list[int]] = {}
    for tensor in plan.tensors:
        how = tensor.spec.label + (f" ({tensor.reason})" if tensor.reason else "")
        row = rows.setdefault((folded(tensor.name), tensor.shape, tensor.by, how), [0, 0, 0])
        row[0] += 1
        row[1] += tensor.bytes_before
        row[2] += tensor.bytes_after
    tensors = table("tensor", "n", "shape", "before", "after", "by", "stored as", numbers=["n", "before", "after"])
    for (name, shape, by, how), (count, before, after) in rows.items():
        tensors.add_row(name, str(count), "×".join(map(str, shape)), size(before), size(after), by, how)
    files = table("file", "bytes", numbers=["bytes"])
    for name, n_bytes in plan.files.items():
        files.add_row(name, size(n_bytes))
    ties = [f"{alias} is {name}, stored once" for alias, name in plan.tied.items()]
    ratio = plan.bytes_before / max(plan.bytes_after, 1)
    total = (
        f"{plan.model} ({plan.architecture}) with {plan.recipe}: {size(plan.bytes_before)} → "
        f"{size(plan.bytes_after)}, {ratio:.1f} times smaller, every file counted\n"
        f"peak memory about {size(plan.peak_memory)} · about {duration(plan.cpu_seconds)} of CPU time before export "
        f"and evaluation · needs {', '.join(plan.needs) or 'nothing but the model'}"
    )
    return [tensors, files, *ties, *plan.notes, total, *in_use_lines(plan.in_use)]


def in_use_lines(in_use: InUse | None) -> list[str]:
    """What an artifact will take in onnxruntime, where that is known."""
    if in_use is None:
        return []
    text, per = in_use.per_thousand_tokens, ""
    if in_use.running is not None:
        what = "reading a piece of text" if text else "one example"
        per = f", {size(in_use.running)} with {what}" + (f", {size(text)} more for 1,000 tokens" if text else "")
    return [f"in onnxruntime about {size(in_use.loading)} while it loads, {size(in_use.loaded)} when loaded{per}"]


def reach_line(smallest: int, largest: int, target: int | None) -> str:
    """What widths per tensor allow, and whether a target lies there."""
    verdict = "" if target is None else f"; {size(target)} can be reached"
    return f"with a width for each tensor: {size(smallest)} to {size(largest)}, about{verdict}"


def recipes_table(recipes: Sequence[Recipe]) -> Table:
    """All recipes, one row each."""
    made = table("recipe", "what it does", "needs")
    for recipe in recipes:
        made.add_row(recipe.name, recipe.description, recipe.needs)
    return made


def recipe_tables(recipe: Recipe, path: str) -> list[Any]:
    """One recipe, explained: its passes with every setting, its sections."""
    made = table("section", "setting", "value")
    for number, step in enumerate(recipe.passes, start=1):
        settings = step.settings.model_dump() | {"select": " ".join(step.select), "skip": " ".join(step.skip)}
        for i, (key, value) in enumerate(settings.items()):
            made.add_row(f"step {number}: {step.name}" if i == 0 else "", key, str(value))
    for section in SECTIONS:
        values = getattr(recipe, section).model_dump()
        for i, (key, value) in enumerate(values.items()):
            made.add_row(section if i == 0 else "", key, "" if value is None else str(value))
    papers = [f"{step.name}: {step.settings.paper}" for step in recipe.passes]
    return [f"{recipe.name}: {recipe.description}", f"Needs {recipe.needs}", made, *papers, f"File: {path}"]


_MEASURES = (
    ("perplexity", "quality", "original_perplexity", "perplexity"),
    ("accuracy", "quality", "original_accuracy", "accuracy"),
    ("top-1 agreement", "quality", None, "top1_agreement"),
    ("KL divergence", "quality", None, "kl_divergence"),
    ("cosine", "quality", None, "cosine"),
    ("relative error", "quality", None, "relative_error"),
    ("load", "speed", "load_seconds", "load_seconds"),
    ("latency", "speed", "latency_seconds", "latency_seconds"),
    ("decoding, tokens/s", "speed", "decode_tokens_per_second", "decode_tokens_per_second"),
    ("prefill, tokens/s", "speed", "prefill_tokens_per_second", "prefill_tokens_per_second"),
)


def run_tables(report: dict[str, Any], directory: str) -> list[Any]:
    """The outcome of a run, before and after, first of all what got worse; all of it is in compression.json."""
    made = table("", "before", "after", numbers=["before", "after"])
    sizes, worst = report.get("size") or {}, (report.get("quality") or {}).get("worst") or {}
    if sizes:
        before = sizes.get("original_bytes")
        made.add_row("size, every file", "" if before is None else size(before), size(sizes["bytes"]))
    for label, section, before, after in _MEASURES:
        found = report.get(section) or {}
        if found.get(after) is not None:
            beside = (report.get("original_speed") or {}) if section == "speed" else found
            original = beside.get(before) if before else None
            label += f" of {worst[after]}" if section == "quality" and after in worst else ""
            told = short_duration if after.endswith("_seconds") else "{:.4g}".format
            made.add_row(label, "" if original is None else told(original), told(found[after]))
    searched = searched_speed(report)
    if searched is not None:
        made.add_row(f"latency, {searched.what}", short_duration(searched.original), short_duration(searched.latency))
    binary = report.get("binary") or {}
    if binary:
        made.add_row(f"{binary['layers']} binary layers", size(binary["float_bytes"]), size(binary["bytes"]))
    allocation = report.get("allocation") or {}
    if allocation.get("target_size"):
        made.add_row("size, target", "", size(allocation["target_size"]))
    if allocation:
        made.add_row(f"loss of {allocation['kind']}, predicted", "", f"{allocation['predicted_loss']:.2%}")
    if allocation.get("loss") is not None:
        made.add_row(f"loss of {allocation['kind']}, measured", "", f"{allocation['loss']:.2%}")
    peaks = [((report.get(key) or {}).get("memory") or {}).get("peak_private") for key in ("original_speed", "speed")]
    if peaks[1]:
        made.add_row("memory in use, peak", size(peaks[0]) if peaks[0] else "", size(peaks[1]))
    loads = [((report.get(key) or {}).get("memory") or {}).get("loading") or {} for key in ("original_speed", "speed")]
    for label, key in (("memory that loading takes", "peak"), ("memory when loaded", "after")):
        before, after = (found.get(key) for found in loads)
        if after:
            made.add_row(label, size(before) if before else "", size(after))
    running = [
        ((report.get(key) or {}).get("memory") or {}).get("running") or {} for key in ("original_speed", "speed")
    ]
    for label, key in (("memory, loading and running", "peak"), ("memory of 1,000 tokens", "per_thousand_tokens")):
        before, after = (found.get(key) for found in running)
        if after:
            made.add_row(label, size(before) if before else "", size(after))
    stages = report.get("cost") or {}
    spent = ", ".join(f"{name} {duration(stage['cpu_seconds'])}" for name, stage in stages.items())
    notes = [f"binary layers run as: {', '.join(f'{kind} ({n})' for kind, n in binary['runs_as'].items())}"] if (
        binary.get("runs_as")) else []  # fmt: skip
    notes += [f"searched with {searched.what}: {searched.sought}, in {FRONT}"] if searched is not None else []
    parts: list[Any] = [*drawbacks(report), made, *quality_tables(report), *sizes_tables(report), *notes]
    return [*parts, *([f"CPU time: {spent}"] if spent else []), f"Written to {directory}"]


def sizes_tables(report: dict[str, Any]) -> list[Any]:
    """`sizes_columns` as a table."""
    heads, rows = sizes_columns(report)
    found = table(*heads, numbers=list(heads[1:]))
    for row in rows:
        found.add_row(*row)
    return [found] if rows else []


def sizes_columns(report: dict[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """A row for each network that the artifact holds: what it takes beside the file of all, how good and fast it is,
    and, where a gate was missed, how many it misses."""
    sizes: dict[str, dict[str, Any]] = report.get("sizes") or {}
    measures = [
        (label, section, key, short_duration if key.endswith("_seconds") else "{:.4g}".format)
        for label, section, _, key in _MEASURES
        if any((entry.get(section) or {}).get(key) is not None for entry in sizes.values())
    ]
    missed = {name: len(found) for name, found in ((report.get("gates") or {}).get("sizes") or {}).items()}
    heads = ("--size", "parameters", "of its own", *(label for label, *_ in measures))
    rows = list[tuple[str, ...]]()
    for name, entry in sizes.items():
        stated = entry.get("bytes")
        cells = [f"{entry['facts']['parameters']:,}", size(stated["graph"] + stated["own"]) if stated else ""]
        for _, section, key, told in measures:
            value = (entry.get(section) or {}).get(key)
            cells.append("" if value is None else told(value))
        rows.append((name, *cells, *([f"{missed[name]}" if name in missed else ""] if missed else [])))
    return (*heads, *(["gates missed"] if missed else [])), rows


HARDLY = "agreement could hardly fail"
OUTPUT_COLUMNS = ("output", "of", "agreement", "KL", "cosine", "relative error", "R²", "compared")


def quality_tables(report: dict[str, Any]) -> list[Any]:
    """All figures of every output, and what is to be said of them."""
    heads, rows = output_columns(report.get("quality") or {})
    return ([_OutputsTable(heads, rows)] if rows else []) + quality_notes(report)


@dataclass(frozen=True)
class _OutputsTable:
    """A row for each output: a column for each figure, or where the console is too narrow for them, all in one cell."""

    heads: tuple[str, ...]
    rows: list[tuple[str, ...]]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterable[Table]:
        wide = self._wide()
        fits = Measurement.get(console, options.update(width=_ANY_WIDTH), wide).minimum <= options.max_width
        yield wide if fits else self._narrow()

    def _wide(self) -> Table:
        made = table()
        for i, (head, cells) in enumerate(zip(self.heads, zip(*self.rows, strict=True), strict=False)):
            least = max(map(len, cells)) if i else min(10, max(map(len, cells)))  # figures stay whole, the rest wraps
            made.add_column(head, justify="right" if i > 1 else "left", min_width=least, overflow="fold")
        for row in self.rows:
            made.add_row(*row)
        return made

    def _narrow(self) -> Table:
        made = table(*self.heads[:2], "figures")
        for name, kind, *figures in self.rows:
            told = (f"{head} {figure}" for head, figure in zip(self.heads[2:], figures, strict=True) if figure)
            made.add_row(name, kind, "\n".join(told))
        return made


_ANY_WIDTH = 1000


def output_columns(quality: dict[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The columns that some output has a figure in, and the rows."""
    rows = output_rows(quality)
    kept = [i for i in range(len(OUTPUT_COLUMNS)) if any(row[i] for row in rows)]
    return tuple(OUTPUT_COLUMNS[i] for i in kept), [tuple(row[i] for i in kept) for row in rows]


def output_rows(quality: dict[str, Any]) -> list[tuple[str, ...]]:
    """What was measured of each output, in the order of `OUTPUT_COLUMNS`; empty where its kind has no such figure, and
    in brackets where it could hardly be another."""
    figures = ("agreement", "kl_divergence", "cosine", "relative_error", "r_squared")

    def written(each: dict[str, Any], key: str) -> str:
        if each.get(key) is None:
            return ""
        told = f"{each[key]:.4g}"
        return f"({told})" if key == "agreement" and any(HARDLY in note for note in each.get("notes", [])) else told

    return [
        (name, each["kind"], *(written(each, key) for key in figures),
         str(each.get("n_compared", each["n_examples"])))
        for name, each in (quality.get("outputs") or {}).items()
    ]  # fmt: skip


def quality_notes(report: dict[str, Any]) -> list[str]:
    """Which figures could hardly fail, where an artifact is of no use, and what could not be measured."""
    quality, speed = report.get("quality") or {}, report.get("speed") or {}
    outputs = quality.get("outputs") or {}
    notes = [f"{name}: {note}" for name, each in outputs.items() for note in each.get("notes", [])]
    notes += [f"the labels {quality['labels']}"] if quality.get("labels") else []
    notes += (report.get("gates") or {}).get("doubts") or []
    if speed.get("measured") is False:
        notes.append("speed and memory were not measured: evaluation.speed is false")
    for what, found in (("artifact", speed), ("original", report.get("original_speed") or {})):
        if found.get("failure"):
            notes.append(f"the {what}'s speed could not be measured: {found['failure']}")
    return notes


def checks_table(checks: Sequence[Any]) -> Table:
    """What was verified, and what was found."""
    made = table("check", "", "found")
    for check in checks:
        made.add_row(check.name, {True: "holds", False: "FAILED", None: "unknown"}[check.passed], check.found)
    return made


def difference_tables(differences: Sequence[Any]) -> list[Any]:
    """Tensors that differ, and a line on all of them."""
    made = table("tensor", "A", "B", "bytes of A", "bytes of B", "error", numbers=["bytes of A", "bytes of B", "error"])
    for each in differences:
        if not each.same:
            sizes = [size(n) if n is not None else "" for n in each.bytes]
            labels = [label or "is not there" for label in each.encodings]
            made.add_row(each.name, *labels, *sizes, "" if each.error is None else f"{each.error:.4f}")
    n_same = sum(each.same for each in differences)
    totals = [size(sum(each.bytes[i] or 0 for each in differences)) for i in (0, 1)]
    line = f"{n_same} of {len(differences)} tensors are the same; {totals[0]} against {totals[1]} of weights"
    return [line] if n_same == len(differences) else [made, line]


def inspection_tables(found: dict[str, Any]) -> list[Any]:
    """A checkpoint or an artifact: its tensors, alike ones of all blocks in one row, then everything else."""
    rows: dict[tuple, list[int]] = {}
    for tensor in found.get("tensors", []):
        shape = "×".join(map(str, tensor["shape"]))
        row = rows.setdefault((folded(tensor["name"]), shape, tensor["encoding"]), [0, 0])
        row[0] += 1
        row[1] += tensor["bytes"]
    tensors = table("tensor", "n", "shape", "bytes", "stored as", numbers=["n", "bytes"])
    for (name, shape, encoding), (count, n_bytes) in rows.items():
        tensors.add_row(name, str(count), shape, size(n_bytes), encoding)
    if not isinstance(found.get("report"), dict):
        return [tensors, fields_table({key: value for key, value in found.items() if key != "tensors"})]
    return [tensors, *_artifact_tables(found)]


def _artifact_tables(found: dict[str, Any]) -> list[Any]:
    """What a person asks of an artifact: what it was made of and how, its files, what it is worth."""
    report, files = found["report"], table("file", "bytes", numbers=["bytes"])
    for name, n_bytes in sorted(found["files_bytes"].items(), key=lambda each: -each[1]):
        files.add_row(name, size(n_bytes))
    source, recipe, gates = (report.get(key) or {} for key in ("source", "recipe", "gates"))
    failures = [f"gate missed: {failure}" for failure in gates.get("failures") or ()]
    head = fields_table({
        "made of": f"{source.get('architecture', '')}, {source.get('path', '')}",
        "by": f"recipe {recipe.get('name', '')}, compressor {report.get('compressor', '')}",
    })  # fmt: skip
    stored = table("stored as", "bytes", numbers=["bytes"])
    for label, n_bytes in found["bytes_by_encoding"].items():
        stored.add_row(label, size(n_bytes))
    return [stored, files, head, *failures, *run_tables(report, found["path"])[:-1],
            "everything that was recorded: compression.json there, or --json"]  # fmt: skip


def fields_table(content: dict[str, Any], prefix: str = "") -> Table:
    """A nested dictionary as two columns; lists are counted, not shown."""
    made = table("", "")
    made.show_header = False
    for key, value in _flat(content, prefix):
        made.add_row(key, value)
    return made


def _flat(content: dict[str, Any], prefix: str) -> Iterable[tuple[str, str]]:
    for key, value in content.items():
        name = f"{prefix}{key}".replace("_", " ")
        if isinstance(value, dict):
            yield from _flat(value, f"{name} ")
        elif value is not None and not (isinstance(value, list) and value and isinstance(value[0], dict)):
            yield name, _value(name, value)


def _value(key: str, value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    counts = not isinstance(value, bool) and not key.endswith("n tokens")
    if isinstance(value, int) and counts and ("bytes" in key or "memory" in key):
        return size(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)
