"""report.html: one page on one artifact, complete in itself: pictures are inline SVG, nothing is fetched.

Here is what the page says, templates/page.html is how it looks. No path of the machine that it was made on is in it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from compressor.core.artifact import Artifact
from compressor.core.errors import UsageError
from compressor.core.files import write_text
from compressor.core.quantities import duration, short_duration, size
from compressor.report import facts
from compressor.report.charts import Axis, Bar, BarPlot, DotPlot, Legend, Point, bars, colour, dots, shortened
from compressor.report.search import Search, search_of
from compressor.report.tables import output_columns, quality_notes, sizes_columns

TEMPLATES = Path(__file__).parent / "templates"
MOST_ROWS = 12
TICK_CHARACTERS = 84
"""That fit side by side below a picture."""
_NUMBER = re.compile(r"^[a-z_]*?_(\d[\d_]*)$")


def write_page(directories: Sequence[Path], target: Path, title: str = "") -> None:
    """Writes the page of the first artifact; the others are beside it where size is held against quality.

    Raises:
        UsageError: There is another kind of file at `target`, which a page would destroy.
    """
    _refuse_other_than_page(target)
    artifacts = [Artifact.open(directory) for directory in directories]
    write_text(target, page(artifacts[0], artifacts[1:], title or facts.title_of(directories[0])))


def _refuse_other_than_page(target: Path) -> None:
    if target.is_symlink() or not target.is_file():  # a link is replaced itself
        return
    with target.open("rb") as file:
        begins = file.read(200).lstrip().lower()
    if begins and not begins.startswith((b"<!doctype html", b"<html")):
        raise UsageError(f"{target}: is there and is no page; give another file with -o, or remove it")


@functools.cache
def _environment() -> Environment:
    """Compiles the templates once."""
    return Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip


def page(artifact: Artifact, others: Sequence[Artifact], title: str) -> str:
    """The page as HTML."""
    report = artifact.report
    source, recipe = report.get("source") or {}, report.get("recipe") or {}
    tensors = facts.stored_tensors(artifact)
    made = f"{source.get('architecture', 'a network')} by {recipe.get('name', 'a recipe')}"
    template = _environment().get_template("page.html")
    return template.render(
        title=title,
        what="; ".join((made, *facts.drawbacks(report))),
        description=recipe.get("description", ""),
        tiles=_tiles(report),
        gates=_gates(report),
        layers=_layers(tensors),
        binary=_binary(report),
        errors=_errors(tensors),
        outputs=_outputs(report),
        sizes=sizes_columns(report),
        against_quality=_against_quality(artifact, others, title),
        searches=_searches(report),
        stages=_stages(report),
        kinds=_kinds(tensors),
        provenance=_provenance(report),
        recipe=yaml.safe_dump(_named(recipe), sort_keys=False, allow_unicode=True),
    )


@dataclass(frozen=True)
class Tile:
    """A figure in large letters, and what it is of."""

    value: str
    text: str


def _tiles(report: dict[str, Any]) -> list[Tile]:
    sizes, speed = report.get("size") or {}, report.get("speed") or {}
    before, after = sizes.get("original_bytes"), sizes.get("bytes")
    tiles = []
    if before and after:
        tiles.append(Tile(size(after), f"every file; {before / after:.1f} times smaller than {size(before)}"))
    loss = facts.loss_of(report)
    if loss is not None:
        tiles.append(Tile(f"{loss.value:.2%}", loss.what))
    original = report.get("original_speed") or {}
    if speed.get("decode_tokens_per_second"):
        beside = original.get("decode_tokens_per_second")
        tiles.append(Tile(f"{speed['decode_tokens_per_second']:.3g} tokens/s",
                          f"the original {beside:.3g}" if beside else "in onnxruntime"))  # fmt: skip
    elif speed.get("latency_seconds"):
        beside = original.get("latency_seconds")
        tiles.append(Tile(f"{1e3 * speed['latency_seconds']:.3g} ms", f"an input; the original {1e3 * beside:.3g} ms" if
                          beside else "an input, in onnxruntime"))  # fmt: skip
    searched = facts.searched_speed(report)
    if searched is not None:
        tiles.append(Tile(short_duration(searched.latency), f"{searched.what}; the original "
                          f"{short_duration(searched.original)}: {searched.sought}"))  # fmt: skip
    peak = (speed.get("memory") or {}).get("peak_private")
    if peak:
        before = (original.get("memory") or {}).get("peak_private")
        what = f"memory when running; the original {size(before)}" if before else "memory running"
        tiles.append(Tile(size(peak), what))
    loading = (speed.get("memory") or {}).get("loading") or {}
    if loading.get("after") and loading.get("peak"):
        tiles.append(Tile(size(loading["after"]), f"memory when loaded; loading takes {size(loading['peak'])}"))
    running = (speed.get("memory") or {}).get("running") or {}
    if running.get("peak"):
        text = (
            f", {size(running['per_thousand_tokens'])} for 1,000 tokens" if running.get("per_thousand_tokens") else ""
        )
        tiles.append(Tile(size(running["peak"]), f"memory, loading and running{text}"))
    if speed.get("measured") is False:
        tiles.append(Tile("not measured", "speed and memory, as the recipe asks"))
    return tiles


@dataclass(frozen=True)
class GatesKept:
    """The limits that were asked for, as a text; which of them failed, and (tensors, by, share of the loss)."""

    limits: str
    failures: tuple[str, ...]
    blame: tuple[tuple[str, str, str], ...]


def _gates(report: dict[str, Any]) -> GatesKept:
    gates = report.get("gates") or {}
    limits = {key: value for key, value in ((report.get("recipe") or {}).get("gates") or {}).items() if value}
    asked = ", ".join(f"{key} {value:g}" for key, value in limits.items())
    if gates.get("passed", True):
        return GatesKept(asked, (), ())
    blame = ((each["tensors"], each["by"], f"{each['share']:.1%}") for each in gates.get("blame", []))
    return GatesKept(asked, tuple(gates.get("failures", [])), tuple(blame))


@dataclass(frozen=True)
class Outputs:
    """What was measured of each output, and what is to be said of it."""

    heads: tuple[str, ...]
    rows: list[tuple[str, ...]]
    notes: list[str]


def _outputs(report: dict[str, Any]) -> Outputs | None:
    (heads, rows), notes = output_columns(report.get("quality") or {}), quality_notes(report)
    return Outputs(heads, rows, notes) if rows or notes else None


def _binary(report: dict[str, Any]) -> str:
    """What layers of one bit take, and what they run as."""
    found = report.get("binary")
    if not found:
        return ""
    sizes = f"{size(found['bytes'])} on disk, {size(found['float_bytes'])} in float32"
    runs = ", ".join(f"{n} as {kind}" for kind, n in (found.get("runs_as") or {}).items())
    return f"{found['layers']} layers are binary, {sizes}{'; ' if runs else ''}{runs}."


@dataclass(frozen=True)
class Layers:
    """Bytes of every layer, by how its tensors are stored."""

    legend: Legend
    plot: BarPlot


def _layers(tensors: Sequence[facts.StoredTensor]) -> Layers | None:
    if not tensors:
        return None
    total: dict[str, int] = {}
    for tensor in tensors:
        total[tensor.encoding] = total.get(tensor.encoding, 0) + tensor.bytes
    order = sorted(total, key=lambda label: -total[label])
    colours = {label: colour(i) for i, label in enumerate(order)}
    rows = []
    for layer in facts.layers_of(tensors):
        found = layer.bytes_by_encoding()
        parts = tuple((found[label], colours[label], f"{layer.name}: {size(found[label])} as {label}") for label in
                      order if label in found)  # fmt: skip
        rows.append(Bar(layer.name, parts, layer.before, size(sum(found.values()))))
    entries = [(colours[label], f"{label}, {size(total[label])}") for label in order[:8]]
    return Layers([("before", "the original"), *entries], bars(rows))


@dataclass(frozen=True)
class Errors:
    """The relative error of every encoded tensor, and the name and error of the worst."""

    legend: Legend
    plot: DotPlot
    worst: str
    largest: float


def _errors(tensors: Sequence[facts.StoredTensor]) -> Errors | None:
    known = [tensor for tensor in tensors if tensor.error is not None and not tensor.is_dense]
    if not known:
        return None
    layers = list(dict.fromkeys(tensor.layer for tensor in known))
    sums: dict[str, int] = {}
    for tensor in known:
        sums[tensor.kind] = sums.get(tensor.kind, 0) + tensor.bytes
    kinds = sorted(sums, key=lambda kind: -sums[kind])
    by_layer = len(kinds) > 2 * len(layers) or len(kinds) > 12  # a network without repeated blocks: no kinds to tell
    colours = {kind: colour(0 if by_layer else i) for i, kind in enumerate(kinds)}
    spread = 0.0 if by_layer or len(kinds) < 2 else 0.6 / (len(kinds) - 1)
    points = [
        Point(layers.index(t.layer) + spread * kinds.index(t.kind) - 0.3 * bool(spread), t.error, colours[t.kind],
              title=f"{t.name}: {t.error:.4f}, {t.encoding}")
        for t in known if t.error is not None
    ]  # fmt: skip
    every = max(1, -(-len(layers) // 16))
    shown = [(i, _NUMBER.sub(r"\1", layer.rpartition(".")[2])) for i, layer in enumerate(layers)]
    if not by_layer:  # beside numbers the names of tables are wide
        numbered = [(i, text) for i, text in shown if text[:1].isdigit()]
        shown = numbered if 2 * len(numbered) > len(shown) else shown
    if len(layers) > 8 and not shown[0][1][:1].isdigit():
        shown = [(i, str(i + 1)) for i, _ in shown]
    room = TICK_CHARACTERS // max(1, min(len(layers), 16))
    ticks = [(float(i), str(i + 1) if by_layer else shortened(text, room)) for i, text in shown[::every]]
    plot = dots(points, Axis("layer, in the order of the file", str), Axis("‖W − Ŵ‖ / ‖W‖", "{:g}".format, zero=True),
                ticks)  # fmt: skip
    names = [] if by_layer else [(colours[kind], kind) for kind in kinds[:7]]
    names += [("c7", "others")] if not by_layer and len(kinds) > 7 else []
    worst = max(known, key=lambda tensor: tensor.error or 0)
    return Errors(names, plot, worst.name, worst.error or 0.0)


def _against_quality(artifact: Artifact, others: Sequence[Artifact], title: str) -> DotPlot | None:
    loss = facts.loss_of(artifact.report)
    sizes = artifact.report.get("size") or {}
    if loss is None or not sizes.get("original_bytes"):
        return None
    points = [Point(sizes["original_bytes"] / 1e6, 0.0, "c7", "the original")]
    for other in others:
        found, n = facts.loss_of(other.report), (other.report.get("size") or {}).get("bytes")
        if found is not None and n and found.what == loss.what:
            points.append(Point(n / 1e6, 100 * found.value, "c1", facts.title_of(other.directory)))
    points.append(Point(sizes["bytes"] / 1e6, 100 * loss.value, "c0", title))
    return dots(points, Axis("MB, every file", "{:g}".format, logarithmic=True), Axis(loss.what, "{:,.6g} %".format))


def _searches(report: dict[str, Any]) -> list[Search]:
    return [found for found in map(search_of, report.get("structure") or []) if found is not None]


@dataclass(frozen=True)
class Stages:
    """Time of each stage, and the memory of those that raised the process's peak."""

    plot: BarPlot
    memory: BarPlot | None
    legend: Legend = (("c0", "CPU time"), ("before", "on the clock"))
    memory_legend: Legend = (("c2", "largest resident memory, where a stage raised it"),)


def _stages(report: dict[str, Any]) -> Stages | None:
    stages = {name: spent for name, spent in (report.get("cost") or {}).items() if spent.get("seconds", 0) >= 0.01}
    if not stages:
        return None
    rows = [
        Bar(name, ((spent["cpu_seconds"], "c0", f"{name}: {spent['cpu_seconds']:.1f} CPU-seconds"),), spent["seconds"],
            duration(spent["seconds"]) if spent["seconds"] >= 10 else f"{spent['seconds']:.1f} s")
        for name, spent in stages.items()
    ]  # fmt: skip
    peaks = {name: spent["peak_memory"] for name, spent in stages.items() if spent.get("peak_memory")}
    highest, rising = 0, {}
    for name, peak in peaks.items():
        if peak > 1.01 * highest:  # later stages that take less do not show in a process's peak
            highest = rising[name] = peak
    memory = [Bar(name, ((peak, "c2", f"{name}: {size(peak)}"),), 0, size(peak)) for name, peak in rising.items()]
    return Stages(bars(rows), bars(memory) if memory else None)


@dataclass(frozen=True)
class Kinds:
    """A row of cells per kind of tensor, and how many kinds are not shown."""

    rows: list[tuple[str, ...]]
    left_out: int


def _kinds(tensors: Sequence[facts.StoredTensor]) -> Kinds | None:
    """Alike tensors of all layers in one row, the heaviest first."""
    groups: dict[tuple[str, str], list[facts.StoredTensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.kind, tensor.encoding), []).append(tensor)
    ordered = sorted(groups.items(), key=lambda item: -sum(t.bytes for t in item[1]))
    rows = []
    for (kind, encoding), members in ordered[:MOST_ROWS]:
        known = [t.error for t in members if t.error is not None and not t.is_dense]
        mean = f"{sum(known) / len(known):.3f}" if known else ""
        shapes = {"×".join(map(str, t.shape)) for t in members}
        shape = shapes.pop() if len(shapes) == 1 else ""
        rows.append((kind, str(len(members)), shape, encoding, size(sum(t.bytes for t in members)), mean))
    return Kinds(rows, max(0, len(ordered) - MOST_ROWS)) if rows else None


def _provenance(report: dict[str, Any]) -> list[tuple[str, str]]:
    source, data, versions = (report.get(key) or {} for key in ("source", "data", "versions"))
    return [
        ("original", f"{_named(source.get('path', ''))}, SHA-256 {source.get('sha256', 'unknown')}"),
        ("calibrated on", str(_named(data.get("calibration") or "nothing"))),
        ("evaluated on", str(_named(data.get("evaluation") or "nothing"))),
        ("seed", str(report.get("seed", ""))),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
        ("least onnxruntime", str(report.get("least_onnxruntime") or "")),
    ]


def _named(value: Any) -> Any:
    """The same with the last name alone in place of each absolute path: where a file lay is nobody's business."""
    if isinstance(value, dict):
        return {key: _named(each) for key, each in value.items()}
    if isinstance(value, str):
        for kind in (PurePosixPath, PureWindowsPath):
            if kind(value).is_absolute():
                return kind(value).name
        return value
    return [_named(each) for each in value] if isinstance(value, Iterable) else value
