"""report.html: one page on one artifact, complete in itself: pictures are inline SVG, nothing is fetched."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import yaml

from compressor.core.artifact import Artifact
from compressor.core.quantities import duration, size
from compressor.report import facts
from compressor.report.charts import Axis, Bar, Point, bars, colour, dots, legend, shortened
from compressor.report.search import search_section
from compressor.report.tables import OUTPUT_COLUMNS, output_rows, unmeasured

STYLE = Path(__file__).parent / "style.css"
MOST_ROWS = 12
TICK_CHARACTERS = 84
"""That fit side by side below a picture."""
_NUMBER = re.compile(r"^[a-z_]*?_(\d[\d_]*)$")


def write_page(directories: Sequence[Path], target: Path, title: str = "") -> None:
    """Writes the page of the first artifact; the others are beside it where size is held against quality."""
    artifacts = [Artifact.open(directory) for directory in directories]
    target.write_text(page(artifacts[0], artifacts[1:], title or facts.title_of(directories[0])), encoding="utf-8")


def page(artifact: Artifact, others: Sequence[Artifact], title: str) -> str:
    """The page as HTML."""
    report = artifact.report
    tensors = facts.stored_tensors(artifact)
    parts = [
        _head(report, title),
        _tiles(report),
        _gates(report),
        _bytes(tensors),
        _binary(report),
        _errors(tensors),
        _outputs(report),
        _against_quality(artifact, others, title),
        *map(search_section, report.get("structure") or []),
        _stages(report),
        _kinds(tensors),
        _provenance(report),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title>\n<style>\n{STYLE.read_text(encoding='utf-8')}</style></head>\n<body>\n"
        + "\n".join(filter(None, parts))
        + "\n</body></html>\n"
    )


def _head(report: dict[str, Any], title: str) -> str:
    source, recipe = report.get("source") or {}, report.get("recipe") or {}
    what = f"{source.get('architecture', 'a network')} by {recipe.get('name', 'a recipe')}"
    return f'<h1>{escape(title)}</h1>\n<p class="soft">{escape(what)}. {escape(recipe.get("description", ""))}</p>'


def _tiles(report: dict[str, Any]) -> str:
    sizes, speed = report.get("size") or {}, report.get("speed") or {}
    before, after = sizes.get("original_bytes"), sizes.get("bytes")
    tiles = []
    if before and after:
        tiles.append((size(after), f"every file; {before / after:.1f} times smaller than {size(before)}"))
    loss = facts.loss_of(report)
    if loss is not None:
        tiles.append((f"{loss.value:.2%}", loss.what))
    original = report.get("original_speed") or {}
    if speed.get("decode_tokens_per_second"):
        beside = original.get("decode_tokens_per_second")
        tiles.append((f"{speed['decode_tokens_per_second']:.3g} tokens/s", f"the original {beside:.3g}" if beside else
                      "in onnxruntime"))  # fmt: skip
    elif speed.get("latency_seconds"):
        beside = original.get("latency_seconds")
        tiles.append((f"{1e3 * speed['latency_seconds']:.3g} ms", f"an input; the original {1e3 * beside:.3g} ms" if
                      beside else "an input, in onnxruntime"))  # fmt: skip
    peak = (speed.get("memory") or {}).get("peak_private")
    if peak:
        before = (original.get("memory") or {}).get("peak_private")
        tiles.append((size(peak), f"memory when running; the original {size(before)}" if before else "memory running"))
    cells = [f'<div class="tile"><b>{escape(value)}</b>{escape(text)}</div>' for value, text in tiles]
    return f'<div class="tiles">{"".join(cells)}</div>'


def _gates(report: dict[str, Any]) -> str:
    gates = report.get("gates") or {}
    limits = {key: value for key, value in ((report.get("recipe") or {}).get("gates") or {}).items() if value}
    if gates.get("passed", True):
        asked = ", ".join(f"{key} {value:g}" for key, value in limits.items())
        return f'<p class="good">Every gate is kept: {escape(asked)}.</p>' if asked else ""
    failures = "".join(f"<li>{escape(text)}</li>" for text in gates.get("failures", []))
    rows = [(each["tensors"], each["by"], f"{each['share']:.1%}") for each in gates.get("blame", [])]
    table = _table(("tensors", "by", "of the loss goes without"), rows, numbers=(2,)) if rows else ""
    return f'<p class="bad"><b>A gate failed.</b></p><ul class="bad">{failures}</ul>{table}'


def _outputs(report: dict[str, Any]) -> str:
    """Every output by what it is, notes on figures, and benchmarks that failed."""
    quality = report.get("quality") or {}
    outputs = quality.get("outputs") or {}
    notes = [f"{name}: {note}" for name, each in outputs.items() for note in each.get("notes", [])]
    notes += [f"The labels {quality['labels']}"] if quality.get("labels") else []
    notes += [f"{name} could not be measured: {text}" for name, text in unmeasured(report)]
    table = (
        _table(OUTPUT_COLUMNS, output_rows(quality), numbers=tuple(range(2, len(OUTPUT_COLUMNS)))) if outputs else ""
    )
    said = "".join(f"<li>{escape(note)}</li>" for note in notes)
    parts = ["<h2>Quality of each output</h2>\n" if outputs else "", table, f"<ul>{said}</ul>" if said else ""]
    return "".join(parts)


def _binary(report: dict[str, Any]) -> str:
    """What layers of one bit take, and what they run as."""
    found = report.get("binary")
    if not found:
        return ""
    sizes = f"{size(found['bytes'])} on disk, {size(found['float_bytes'])} in float32"
    runs = ", ".join(f"{n} as {kind}" for kind, n in (found.get("runs_as") or {}).items())
    return f"<p>{found['layers']} layers are binary, {escape(sizes)}{'; ' if runs else ''}{escape(runs)}.</p>"


def _bytes(tensors: Sequence[facts.StoredTensor]) -> str:
    if not tensors:
        return ""
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
    return "<h2>Bytes per layer</h2>\n" + legend([("before", "the original"), *entries]) + bars(rows)


def _errors(tensors: Sequence[facts.StoredTensor]) -> str:
    known = [tensor for tensor in tensors if tensor.error is not None and not tensor.is_dense]
    if not known:
        return ""
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
        shown = [(i, text) for i, text in shown if text[:1].isdigit()] or shown
    if len(layers) > 8 and not shown[0][1][:1].isdigit():
        shown = [(i, str(i + 1)) for i, _ in shown]
    room = TICK_CHARACTERS // max(1, min(len(layers), 16))
    ticks = [(float(i), str(i + 1) if by_layer else shortened(text, room)) for i, text in shown[::every]]
    plot = dots(points, Axis("layer, in the order of the file", str), Axis("‖W − Ŵ‖ / ‖W‖", "{:g}".format, zero=True),
                ticks)  # fmt: skip
    names = [] if by_layer else [(colours[kind], kind) for kind in kinds[:7]]
    names += [("c7", "others")] if not by_layer and len(kinds) > 7 else []
    worst = max(known, key=lambda tensor: tensor.error or 0)
    return (
        f"<h2>Error per layer</h2>\n{legend(names)}{plot}"
        f'<p class="soft">Relative error of each tensor that is encoded; the largest is '
        f"{escape(worst.name)} with {worst.error:.3f}. How much an error matters differs from tensor to tensor: the "
        "loss above is what all of them do together.</p>"
    )


def _against_quality(artifact: Artifact, others: Sequence[Artifact], title: str) -> str:
    loss = facts.loss_of(artifact.report)
    sizes = artifact.report.get("size") or {}
    if loss is None or not sizes.get("original_bytes"):
        return ""
    points = [Point(sizes["original_bytes"] / 1e6, 0.0, "c7", "the original")]
    for other in others:
        found, n = facts.loss_of(other.report), (other.report.get("size") or {}).get("bytes")
        if found is not None and n and found.what == loss.what:
            points.append(Point(n / 1e6, 100 * found.value, "c1", facts.title_of(other.directory)))
    points.append(Point(sizes["bytes"] / 1e6, 100 * loss.value, "c0", title))
    plot = dots(points, Axis("MB, every file", "{:g}".format, logarithmic=True), Axis(loss.what, "{:,.6g} %".format))
    return f"<h2>Size against quality</h2>\n{plot}"


def _stages(report: dict[str, Any]) -> str:
    stages = {name: spent for name, spent in (report.get("cost") or {}).items() if spent.get("seconds", 0) >= 0.01}
    if not stages:
        return ""
    rows = [
        Bar(name, ((spent["cpu_seconds"], "c0", f"{name}: {spent['cpu_seconds']:.1f} CPU-seconds"),), spent["seconds"],
            duration(spent["seconds"]) if spent["seconds"] >= 10 else f"{spent['seconds']:.1f} s")
        for name, spent in stages.items()
    ]  # fmt: skip
    peaks = {name: spent["peak_memory"] for name, spent in stages.items() if spent.get("peak_memory")}
    parts = [
        "<h2>Where time and memory went</h2>",
        legend([("c0", "CPU time"), ("before", "on the clock")]),
        bars(rows),
    ]
    if peaks:
        highest, rising = 0, {}
        for name, peak in peaks.items():
            if peak > 1.01 * highest:  # later stages that take less do not show in a process's peak
                highest = rising[name] = peak
        memory = [Bar(name, ((peak, "c2", f"{name}: {size(peak)}"),), 0, size(peak)) for name, peak in rising.items()]
        parts += [legend([("c2", "largest resident memory, where a stage raised it")]), bars(memory)]
    return "\n".join(parts)


def _kinds(tensors: Sequence[facts.StoredTensor]) -> str:
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
    heads = ("tensors", "n", "shape", "stored as", "bytes in all", "mean error")
    rest = (
        f'<p class="soft">{len(ordered) - MOST_ROWS} lighter kinds are left out.</p>'
        if len(ordered) > MOST_ROWS
        else ""
    )
    return f"<h2>Heaviest kinds of tensors</h2>\n{_table(heads, rows, numbers=(1, 4, 5))}{rest}" if rows else ""


def _provenance(report: dict[str, Any]) -> str:
    source, data, versions = (report.get(key) or {} for key in ("source", "data", "versions"))
    rows = [
        ("original", f"{source.get('path', '')}, SHA-256 {source.get('sha256', 'unknown')}"),
        ("calibrated on", str(data.get("calibration") or "nothing")),
        ("evaluated on", str(data.get("evaluation") or "nothing")),
        ("seed", str(report.get("seed", ""))),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
        ("least onnxruntime", str(report.get("least_onnxruntime") or "")),
    ]
    recipe = yaml.safe_dump(report.get("recipe") or {}, sort_keys=False, allow_unicode=True)
    return (
        f"<h2>Where it comes from</h2>\n{_table((), rows)}<details><summary>The recipe, every setting</summary>"
        f"<pre>{escape(recipe)}</pre></details>"
    )


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    def cells(tag: str, values: Sequence[str]) -> str:
        marks = (' class="n"' if i in numbers else "" for i in range(len(values)))
        return "".join(f"<{tag}{mark}>{escape(value)}</{tag}>" for mark, value in zip(marks, values, strict=True))

    head = f"<tr>{cells('th', heads)}</tr>" if heads else ""
    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    wide = ' class="wide"' if heads else ""
    return f'<div class="scroll"><table{wide}>{head}{body}</table></div>'
