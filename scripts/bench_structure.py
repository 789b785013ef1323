#!/usr/bin/env python
"""Networks made smaller without training: cnn-explain, encoder-heads, llm-width, and LRP beside other criteria.

    scripts/fetch_material mobilenet photos minilm smollm2 fashion
    scripts/bench_once.py                     trains the ResNet-20 that `curves` prunes
    scripts/bench_structure.py mobilenet|minilm|width|curves …

Each part by itself, results together in docs/measured/structure.json. Accuracy and agreement are of networks that were
cut for good. `curves` counts shares of the channels, draws docs/measured/structure.svg, and takes areas by trapezoids.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_once import fashion
from bench_vision import agreement, crops, logits
from material import model_dir
from measured import cached, markdown, read_results, write_picture, write_results
from networks import resnet20

from compressor.checkpoints import open_checkpoint
from compressor.core.options import RunOptions
from compressor.core.structure import Subject
from compressor.evaluate.original import export_original
from compressor.evaluate.session import open_session
from compressor.learning.trainer import called
from compressor.passes.registry import load_pass
from compressor.passes.settings.lrp import LrpSettings
from compressor.run.pipeline import run
from compressor.structure.stage import GraphSurgeon, measure_norms

SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
VARIANTS: dict[str, dict[str, Any]] = {
    "lrp, z⁺": {}, "lrp, ε": {"conv_rule": "epsilon"}, "taylor": {"criterion": "taylor"},
    "gradient": {"criterion": "gradient"}, "magnitude": {"criterion": "magnitude"},
}  # fmt: skip


def compressed(model: Path, recipe: str, name: str, **options: Any) -> tuple[Path, dict[str, Any]]:
    """The artifact, and what compression.json says of it."""
    target = cached("structure") / name
    began = time.process_time()
    artifact = run(RunOptions(model=str(model), recipe=recipe, output=target, force=True, **options))
    step = artifact.report["structure"][0]
    found = {
        "parameters_before": step["parameters_before"], "parameters": step["parameters"],
        "bytes": artifact.report["size"]["bytes"], "original_bytes": artifact.report["size"]["original_bytes"],
        "exact": artifact.report["proof"]["exact"]["max_relative_error"],
        "cpu_seconds": round(time.process_time() - began, 1),
    }  # fmt: skip
    return target, found | {"quality": artifact.report["quality"]} | step.get("search", {})


def mobilenet(arguments: argparse.Namespace) -> dict[str, Any]:
    """30 % of the parameters by cnn-explain: crops of ten photos to choose by, of the ten others to agree on."""
    photos, folder = sorted(model_dir("photos").glob("imagenet_*.jpg")), cached("structure")
    data, other = folder / "crops.npz", crops(photos[1::2], arguments.crops, 3)
    np.savez(data, image=crops(photos[::2], arguments.samples, 0))
    sets = ("evaluation.tokens=0", f"calibration.samples={arguments.samples}", f"lrp.step={arguments.step}")
    original = folder / "mobilenet-original"
    original.mkdir(exist_ok=True)
    export_original(open_checkpoint(model_dir("mobilenet")), original, [{"": torch.zeros(1, 3, 224, 224)}])
    wanted = logits(open_session(original), other)
    made: dict[int, dict[str, Any]] = {}
    for trials in (0, arguments.trials):
        target, found = compressed(
            model_dir("mobilenet"), "cnn-explain", "mobilenet", data=str(data), sets=(*sets, f"lrp.trials={trials}")
        )
        made[trials] = found | {"agreement": agreement(logits(open_session(target), other), wanted)}
        print(trials, made[trials], flush=True)
    return made[0] | {"samples": arguments.samples, "step": arguments.step, "trials": arguments.trials,
                      "searched": made[arguments.trials]}  # fmt: skip


def minilm(arguments: argparse.Namespace) -> dict[str, Any]:
    """A quarter of heads and neurons by encoder-heads, with and without its distillation; addresses of later years."""
    parts = {"removed": ("lrp.epochs=0",), "distilled": (f"lrp.epochs={arguments.epochs}",)}
    found = {}
    for name, sets in parts.items():
        found[name] = compressed(model_dir("minilm"), "encoder-heads", f"minilm-{name}", sets=sets)[1]
    return found | {"epochs": arguments.epochs}


WIDTHS: dict[str, tuple[str, ...]] = {
    "llm-width": (), "without the mean of what went": ("lrp.compensate=none",),
    "by magnitude": ("lrp.criterion=magnitude",),
}  # fmt: skip


def width(_: argparse.Namespace) -> dict[str, Any]:
    """A tenth of SmolLM2's heads and neurons, as the recipe does it and in two other ways; addresses of later years."""
    found = {}
    for number, (name, sets) in enumerate(WIDTHS.items()):
        found[name] = compressed(model_dir("smollm2"), "llm-width", f"width-{number}", sets=sets)[1]
    return found


def curves(arguments: argparse.Namespace) -> dict[str, Any]:
    """Accuracy after each share of the channels, by criterion; 100 reference images, ten of a class."""
    images, labels = fashion("train", 2000)
    chosen = np.concatenate([np.flatnonzero(labels == kind)[:10] for kind in range(10)])
    batch = [{"": torch.from_numpy(images[part])} for part in np.split(chosen, 5)]
    classes = [torch.from_numpy(labels[part]) for part in np.split(chosen, 5)]
    test, wanted = (torch.from_numpy(each) for each in fashion("t10k", arguments.images))
    whole = resnet20().eval()
    whole.load_state_dict(torch.load(arguments.weights, weights_only=True))

    @torch.no_grad()
    def accuracy(module: torch.nn.Module) -> float:
        found = torch.cat([called(module, {"": part}).argmax(1) for part in test.split(100)])
        return round(float((found == wanted).double().mean()), 4)

    found: dict[str, Any] = {"images": len(test), "reference": len(chosen), "dense": accuracy(whole), "shares": SHARES}
    found |= {"accuracy": {}, "measured_norms": {}, "area": {}, "area_measured_norms": {}}
    for name, settings in VARIANTS.items():
        lines: tuple[list[float], list[float]] = ([], [])
        for share in SHARES:
            surgeon = GraphSurgeon({"": test[:2]}, called)
            subject = Subject(copy.deepcopy(whole), batch, classes, surgeon, torch.Generator(), lambda _: True,
                              lambda *_: None, lambda *_: None)  # type: ignore[arg-type]  # fmt: skip
            method: Any = load_pass(LrpSettings(fraction=share, of="units", step=arguments.curve_step, **settings))
            module = method.restructure(subject).module
            lines[0].append(accuracy(module))
            measure_norms(module, batch)
            lines[1].append(accuracy(module))
        for line, key, area in zip(lines, ("accuracy", "measured_norms"), ("area", "area_measured_norms"), strict=True):
            found[key][name] = line
            found[area][name] = round(float(np.trapezoid(line, SHARES) / (SHARES[-1] - SHARES[0])), 4)
        print(name, lines, flush=True)
    return found


def picture(found: dict[str, Any]) -> str:
    """SVG: accuracy against the share of channels, statistics of norms as they were (left) and measured (right)."""
    colours = ("#1b6ca8", "#7fb3d9", "#c44e52", "#8c8c8c", "#dd8452")
    parts = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 320" font-family="sans-serif" font-size="12">']
    titles = {"accuracy": "norms as they were", "measured_norms": "norms measured anew"}
    for side, (key, title) in enumerate(titles.items()):
        x0, y0, wide, high = 50 + side * 350, 280, 280, 230
        parts.append(f'<text x="{x0}" y="30">{title}: accuracy by share of channels removed</text>')
        parts.append(f'<path d="M{x0} {y0 - high}V{y0}H{x0 + wide}" fill="none" stroke="#444"/>')
        for share in SHARES:
            parts.append(
                f'<text x="{x0 + wide * share / 0.6:.0f}" y="{y0 + 16}" text-anchor="middle">{share:.0%}</text>'
            )
        for level in (0, 0.5, 1):
            parts.append(f'<text x="{x0 - 6}" y="{y0 - high * level + 4:.0f}" text-anchor="end">{level:.0%}</text>')
        for number, (name, line) in enumerate(found[key].items()):
            points = zip((0, *SHARES), (found["dense"], *line), strict=True)
            path = " ".join(f"{x0 + wide * x / 0.6:.1f},{y0 - high * y:.1f}" for x, y in points)
            parts.append(f'<polyline points="{path}" fill="none" stroke="{colours[number]}" stroke-width="2"/>')
            if side:
                parts.append(f'<text x="{x0 + 200}" y="{60 + 15 * number}" fill="{colours[number]}">{name}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def structure_table(results: dict[str, Any]) -> str:
    """What each part found."""
    text = []
    if found := results.get("mobilenet"):
        agreed = found["agreement"]
        text.append(
            f"MobileNetV2, cnn-explain in steps of {found['step']:g} on {found['samples']} crops of ten photos: "
            f"{found['parameters_before']:,} → {found['parameters']:,} parameters, {found['original_bytes']:,} → "
            f"{found['bytes']:,} bytes. On {agreed['n']} crops of ten other photos {agreed['top1']:.1%} top-1 "
            f"agreement with the original, cosine of logits {agreed['cosine']:.3f}."
        )
        if found.get("searched"):
            better = found["searched"]
            rules = ", ".join(f"{place} {rule}" for place, rule in better["rules"].items())
            text.append(
                f"With {found['trials']} trials of a search for rules ({rules}; area {better['area']:.3f}, as written "
                f"{better['area_as_written']:.3f}): {better['agreement']['top1']:.1%}, cosine "
                f"{better['agreement']['cosine']:.3f}; {better['cpu_seconds']:.0f} CPU-seconds instead of "
                f"{found['cpu_seconds']:.0f}."
            )
    if found := results.get("minilm"):
        before, after = found["removed"], found["distilled"]
        text.append(
            f"MiniLM, encoder-heads: {before['parameters_before']:,} → {before['parameters']:,} parameters; cosine of "
            f"sentence embeddings {before['quality']['cosine']:.4f}, after {found['epochs']} epochs of distillation "
            f"{after['quality']['cosine']:.4f} ({before['quality']['n_examples']} sentences of later addresses)."
        )
    if found := results.get("width"):
        first, rows = next(iter(found.values())), []
        for name, entry in found.items():
            quality = entry["quality"]
            rows.append([name, f"{entry['parameters']:,}", f"{quality['perplexity']:.1f}",
                         f"{quality['top1_agreement']:.1%}", f"{entry['cpu_seconds']:.0f}"])  # fmt: skip
        text.append(
            f"SmolLM2-135M, llm-width: {first['parameters_before']:,} parameters, perplexity "
            f"{first['quality']['original_perplexity']:.1f} on addresses that nothing was calibrated on.\n\n"
            + markdown(["", "parameters", "perplexity", "the original's next token", "CPU-seconds"], rows)
        )
    if found := results.get("curves"):
        for key, area, title in (
            ("accuracy", "area", "norms as they were"),
            ("measured_norms", "area_measured_norms", "norms measured on the reference images"),
        ):
            rows = [[name, *[f"{100 * each:.1f}" for each in line], f"{found[area][name]:.3f}"]
                    for name, line in found[key].items()]  # fmt: skip
            table = markdown([f"channels removed; {title}", *[f"{each:.0%}" for each in SHARES], "area"], rows)
            text.append(table)
        text.append(
            f"ResNet-20 on Fashion-MNIST, {found['dense']:.1%} dense; accuracy in % on {found['images']:,} test "
            f"images, {found['reference']} reference images, no fine-tuning."
        )
    return "\n\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=("mobilenet", "minilm", "width", "curves"))
    parser.add_argument("--crops", type=int, default=200)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--step", type=float, default=0.05)
    parser.add_argument("--curve-step", type=float, default=0.05)
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--images", type=int, default=10000)
    parser.add_argument("--weights", type=Path)
    arguments = parser.parse_args()
    if "curves" in arguments.parts and not (arguments.weights and arguments.weights.is_file()):
        parser.error("curves: give the state dict of a trained ResNet-20 with --weights; bench_once.py leaves dense.pt")
    for part in arguments.parts:
        found = {"mobilenet": mobilenet, "minilm": minilm, "width": width, "curves": curves}[part](arguments)
        results = read_results("structure") | {part: found}
        write_results("structure", results)
        if part == "curves":
            write_picture("structure", picture(found))
    print(structure_table(json.loads(json.dumps(read_results("structure")))))


if __name__ == "__main__":
    main()
