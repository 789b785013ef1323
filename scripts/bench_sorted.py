#!/usr/bin/env python
"""Many sizes of one training: ResNet-20 in 16 widths and 10 depths, and the sizes of recipes in one artifact.

    scripts/fetch_material fashion minilm smollm2
    scripts/bench_sorted.py cnn [--images 20000] [--pool 2] [--epochs 4] [--start 3] [--test 10000] [--alone]
    scripts/bench_sorted.py minilm

Each part by itself, results together in docs/measured/sorted.json. `cnn` trains the network alone for `start` epochs,
then all 160 sizes together for `epochs`, and draws docs/measured/sorted.svg: what each size of this training keeps of
the accuracy of the largest. With --alone eight of the sizes are then trained from random weights, without the others,
each for as much CPU time as all together took with their start. One seed; images are averaged over squares of `--pool`
pixels; accuracy is of torch, on the first `test` images of the test set; CPU-seconds are the process's.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from typing import Any

import torch
from bench_once import TRAINING, pooled
from material import model_dir
from measured import cached, markdown, read_results, write_picture, write_results
from networks import resnet20

from compressor.core.batch import Examples
from compressor.core.options import RunOptions
from compressor.core.structure import Subject
from compressor.learning.nested import fitting
from compressor.learning.trainer import called
from compressor.passes.settings.hesso import HessoSettings
from compressor.passes.settings.sortednet import SortednetSettings
from compressor.passes.sortednet import Sortednet
from compressor.run.pipeline import run
from compressor.structure.stage import GraphSurgeon

N_WIDTHS, N_BLOCKS = 16, 9
ENOUGH = 0.96
"""Of the largest one's accuracy: what the paper's abstract says of all 160."""
ALONE = ((16, 9), (16, 7), (12, 9), (12, 7), (8, 9), (8, 6), (4, 9), (4, 6))
"""Of sixteenths of the width and ninths of the depth: what is trained without the others as well."""
TRIED = 2560
"""Images of a trial that tells how long an epoch takes."""


def all_sizes(arguments: argparse.Namespace) -> SortednetSettings:
    """16 widths × 10 depths, which share everything but the statistics of their norms."""
    return SortednetSettings(
        widths=tuple(n / N_WIDTHS for n in range(1, N_WIDTHS + 1)),
        depths=tuple(n / N_BLOCKS for n in range(N_BLOCKS + 1)), multiple=1, vectors="shared", loss="both",
        epochs=arguments.epochs, batch=256, draws=4, optimizer="SGD", rate=0.05, options=TRAINING["options"],
    )  # fmt: skip


def cnn(arguments: argparse.Namespace) -> dict[str, Any]:
    """What each of 160 sizes of ResNet-20 keeps, after one training of all of them."""
    images, labels = (torch.from_numpy(each) for each in pooled("train", arguments.images, arguments.pool))
    test, wanted = (torch.from_numpy(each) for each in pooled("t10k", arguments.test, arguments.pool))
    examples, clock = Examples({"": images}, labels), time.process_time
    torch.manual_seed(0)
    network, began = resnet20(), clock()
    first = HessoSettings(epochs=arguments.start, **TRAINING)
    fitting(network, examples, first, 0, None, lambda *_: None).train()
    started = clock() - began

    @torch.no_grad()
    def accuracy(module: torch.nn.Module) -> float:
        found = torch.cat([called(module, {"": part}).argmax(1) for part in test.split(250)])
        return round(float((found == wanted).double().mean()), 4)

    original, began = accuracy(network), clock()
    print(f"start: {original:.1%} in {started:.0f} CPU-seconds", flush=True)
    batches = [{"": part} for part in images[:512].split(128)]
    method = Sortednet(**all_sizes(arguments).model_dump())
    subject = Subject(
        network, batches, list(labels[:512].split(128)), GraphSurgeon({"": images[:2]}, called), torch.Generator(),
        lambda _: True, lambda *_: None,
        lambda settings, teacher=None, other=None: fitting(
            other or network, examples, settings, 0, None, lambda *_: None, teacher),
    )  # fmt: skip
    outcome = method.restructure(subject)
    together = clock() - began
    print(f"all sizes: {together:.0f} CPU-seconds; {outcome.report['training']}", flush=True)
    largest = accuracy(outcome.module)
    found = {size.name: accuracy(size.module) for size in outcome.sizes} | {method.largest_name: largest}
    table = [[found[method.names[method.pairs.index((w, d))]] for w in method.widths] for d in method.depths]
    kept = [each / largest for row in table for each in row]
    alone: dict[str, dict[str, float]] = {}
    modules = {size.name: size.module for size in outcome.sizes} | {method.largest_name: outcome.module}
    for w, d in ALONE if arguments.alone else ():
        name = method.names[method.pairs.index((w / N_WIDTHS, d / N_BLOCKS))]
        module, epochs, spent = trained_alone(modules[name], examples, started + together)
        alone[f"{w}/16, {d} of 9"] = {
            "together": found[name], "alone": accuracy(module), "epochs": epochs, "cpu_seconds": round(spent),
        }  # fmt: skip
        print(f"{w}/16, {d} of 9", alone[f"{w}/16, {d} of 9"], flush=True)
    return {
        "images": arguments.images, "side": images.shape[-1], "test": arguments.test, "alone": alone,
        "start_epochs": arguments.start, "epochs": arguments.epochs,
        "original": original, "largest": largest, "accuracy": table, "n_enough": sum(each >= ENOUGH for each in kept),
        "least": round(min(kept), 4), "start_cpu_seconds": round(started), "cpu_seconds": round(together),
        "parameters": {each["size"]: each["parameters"] for each in outcome.report["sizes"]},
    }  # fmt: skip


def trained_alone(module: torch.nn.Module, examples: Examples, seconds: float) -> tuple[torch.nn.Module, int, float]:
    """A network like this one from random weights, after about so much CPU time; its epochs and what they took."""
    torch.manual_seed(0)
    module = copy.deepcopy(module)
    for part in module.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    few, trial = examples.part(torch.arange(TRIED)), copy.deepcopy(module)
    began = time.process_time()
    fitting(trial, few, HessoSettings(epochs=1, **TRAINING), 0, None, lambda *_: None).train()
    epochs = max(1, round(seconds * TRIED / len(examples) / (time.process_time() - began)))
    began = time.process_time()
    fitting(module, examples, HessoSettings(epochs=epochs, **TRAINING), 0, None, lambda *_: None).train()
    return module, epochs, time.process_time() - began


def picture(found: dict[str, Any]) -> str:
    """SVG: a cell per size, darker the more it keeps of the largest one's accuracy; those below 96 % have a mark."""
    side, x0, y0 = 34, 70, 50
    table, largest = found["accuracy"], found["largest"]
    parts = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 440" font-family="sans-serif" font-size="10">']
    parts.append(f'<text x="{x0}" y="24" font-size="13">ResNet-20, one training: accuracy in % by width (across) and '
                 f"branches (down); {found['n_enough']} of 160 keep 96 %</text>")  # fmt: skip
    for row, line in enumerate(table):
        y = y0 + side * (N_BLOCKS - row)
        parts.append(f'<text x="{x0 - 8}" y="{y + 21}" text-anchor="end">{row} of 9</text>')
        for column, value in enumerate(line):
            x, share = x0 + side * column, value / largest
            depth = max(0.0, min(1.0, (share - 0.8) / 0.2))
            colour = "#{:02x}{:02x}{:02x}".format(
                *(round(a + (b - a) * depth) for a, b in zip((245, 245, 245), (27, 108, 168), strict=True))
            )
            ink, mark = ("#fff" if depth > 0.6 else "#222"), "" if share >= ENOUGH else ' stroke="#c44e52"'
            parts.append(
                f'<rect x="{x + 1}" y="{y + 1}" width="{side - 2}" height="{side - 2}" fill="{colour}"{mark}/>'
            )
            parts.append(
                f'<text x="{x + side / 2}" y="{y + 21}" text-anchor="middle" fill="{ink}">{100 * value:.1f}</text>'
            )
    for column in range(N_WIDTHS):
        x = x0 + side * column + side / 2
        parts.append(f'<text x="{x}" y="{y0 + side * (N_BLOCKS + 1) + 14}" text-anchor="middle">{column + 1}/16</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def minilm(arguments: argparse.Namespace) -> dict[str, Any]:
    """The twelve sizes of encoder-sorted: cosine of each, and bytes beside the largest alone."""
    return recipe_sizes("minilm", "encoder-sorted", arguments)


def smollm2(arguments: argparse.Namespace) -> dict[str, Any]:
    """The six sizes of llm-sorted: perplexity of each."""
    return recipe_sizes("smollm2", "llm-sorted", arguments)


def recipe_sizes(model: str, recipe: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """What compression.json says of an artifact's sizes, and what all of them take beside the largest alone."""
    began, target = time.process_time(), cached("sorted") / model
    artifact = run(RunOptions(model=str(model_dir(model)), recipe=recipe, output=target, force=True,
                              sets=tuple(arguments.set or ())))  # fmt: skip
    report, files = artifact.report, artifact.report["size"]["files"]
    graphs = {name: n for name, n in files.items() if name.startswith("model-")}
    own = sum(entry["bytes"]["own"] for entry in report["sizes"].values() if "bytes" in entry)
    extra = sum(graphs.values()) + own + files["sizes.json"]
    whole = report["size"]["bytes"]
    return {
        "sizes": report["sizes"], "bytes": whole, "graphs": sum(graphs.values()), "own": own,
        "record": files["sizes.json"], "ratio": round(whole / (whole - extra), 4), "sets": list(arguments.set or ()),
        "cpu_seconds": round(time.process_time() - began),
    }  # fmt: skip


def sorted_table(results: dict[str, Any]) -> str:
    """What each part found."""
    text = []
    for found in results.get("cnn", {}).values():
        text.append(
            f"ResNet-20 of width 16 on {found['images']:,} images of Fashion-MNIST, {found['side']}×{found['side']}, "
            f"one seed: {found['start_epochs']} epochs alone ({found['start_cpu_seconds']} CPU-seconds, "
            f"{found['original']:.1%}), then {found['epochs']} epochs of all sizes together, with sorting and "
            f"statistics {found['cpu_seconds']} CPU-seconds. The largest then has {found['largest']:.1%} on "
            f"{found['test']:,} test images; {found['n_enough']} of 160 sizes keep 96 % of that, the worst one "
            f"{found['least']:.1%}. "
            "Those without branches are one network."
        )
        if found.get("alone"):
            rows = [[name, f"{each['together']:.2%}", f"{each['alone']:.2%}", each["epochs"], each["cpu_seconds"]]
                    for name, each in found["alone"].items()]  # fmt: skip
            text.append(
                "Some of them trained from random weights, each for as much CPU time as all 160 together:\n\n"
                + markdown(["width, branches", "together", "alone", "epochs alone", "CPU-seconds alone"], rows)
            )
    for name, title in (("minilm", "MiniLM, encoder-sorted"), ("smollm2", "SmolLM2-135M, llm-sorted")):
        if found := results.get(name):
            keys = [key for key in ("cosine", "perplexity", "top1_agreement")
                    if any(key in (entry.get("quality") or {}) for entry in found["sizes"].values())]  # fmt: skip
            rows = []
            for size, entry in found["sizes"].items():
                quality, speed, stated = entry.get("quality") or {}, entry.get("speed") or {}, entry.get("bytes")
                pace = f"{1000 * speed['latency_seconds']:.1f} ms" if "latency_seconds" in speed else (
                    f"{speed['decode_tokens_per_second']:.0f} tokens/s" if speed else None)  # fmt: skip
                rows.append([size, entry["facts"]["blocks"], f"{entry['facts']['parameters']:,}",
                             *[None if quality.get(key) is None else f"{quality[key]:.4g}" for key in keys], pace,
                             None if stated is None else f"{stated['own'] + stated['graph']:,}"])  # fmt: skip
            columns = ["size", "blocks", "parameters", *(key.replace("_", " ") for key in keys), "speed",
                       "bytes of its own"]  # fmt: skip
            text.append(
                f"{title}: {found['bytes']:,} bytes, {found['ratio']:.3f} times what the largest takes alone; graphs "
                f"{found['graphs']:,}, norms and biases {found['own']:,}, sizes.json {found['record']:,}; "
                f"{found['cpu_seconds']} CPU-seconds.\n\n" + markdown(columns, rows)
            )
    return "\n\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=("cnn", "minilm", "smollm2"))
    parser.add_argument("--images", type=int, default=20000)
    parser.add_argument("--pool", type=int, default=1, choices=[1, 2, 4])
    parser.add_argument("--test", type=int, default=10000)
    parser.add_argument("--alone", action="store_true", help="eight of the sizes without the others as well")
    parser.add_argument("--start", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--set", action="append")
    arguments = parser.parse_args()
    for part in arguments.parts:
        found = {"cnn": cnn, "minilm": minilm, "smollm2": smollm2}[part](arguments)
        results = read_results("sorted")
        if part == "cnn":
            key = f"{arguments.images} images, {arguments.epochs} epochs"
            results[part] = results.get(part, {}) | {key: found}
            write_picture("sorted", picture(found))
        else:
            results[part] = found
        write_results("sorted", results)
    print(sorted_table(json.loads(json.dumps(read_results("sorted")))))


if __name__ == "__main__":
    main()
