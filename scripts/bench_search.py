#!/usr/bin/env python
"""A search for networks, replayed: how many evaluations it takes to the front of a space of which everything is known.

    scripts/fetch_material fashion
    scripts/bench_search.py tabulate [--images 20000] [--start 2] [--epochs 4]
    scripts/bench_search.py replay [--seeds 20]
    scripts/fetch_material mobilenet photos minilm
    scripts/bench_search.py mobilenet | minilm

`tabulate` trains one ResNet-20 of width 8 on Fashion-MNIST with smaller ones in it: in each of the three stages 1 to 3
blocks, and 4 widths of what is between a block's two convolutions, 1,728 networks. Of each it takes the accuracy on
2,000 images, of batch norms whose statistics are taken anew on 512 others, and the latency in onnxruntime of one image
on one thread, in blocks that alternate with the largest's. The table is docs/measured/search_table.json. `replay` looks
results up there; what it finds is docs/measured/search.json.

`mobilenet` is --target-latency on MobileNetV2 by cnn-int8, half way between the original's latency and that of the
artifact with all layers as int8; agreement is on 400 crops of photos that nothing was calibrated on. `minilm` is
--target-speedup 2 by encoder-sorted, whose training it shortens with --set; beside it what the sizes of one width and
depth that are as fast lose on the same sentences. Both on one thread.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnxruntime
import optuna
import torch
from bench_once import fashion
from bench_vision import crops
from material import model_dir
from measured import MEASURED, cached, markdown, number, read_results, write_results
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional

from compressor.checkpoints import open_checkpoint
from compressor.core.artifact import Artifact
from compressor.core.options import RunOptions
from compressor.core.progress import make_progress
from compressor.evaluate.bench import paired
from compressor.evaluate.original import original_graph
from compressor.ops import evolution
from compressor.ops.evolution import Genes
from compressor.ops.pareto import hypervolume, ranks
from compressor.ops.predictors import kendall
from compressor.run import search
from compressor.run.pipeline import run

STREAMS, N_WIDTHS, N_DEPTHS = (8, 16, 32), 4, 3
COUNTS = (N_DEPTHS, N_WIDTHS) * 3
"""Of each stage: how many blocks, and how wide they are."""
N_JUDGED, N_STATISTICS = 2000, 512
BLOCKS, RUNS = 5, 12
"""Of measuring: the least of so many medians of so many runs."""
LEVELS, FIRST, BATCH = (0.95, 0.99), 10, 5
"""Shares of the hypervolume; networks that the search begins with, and that it measures at a time."""
ASKED, ASKED_OF_TPE = 2000, 600
"""How often optuna's samplers are asked for a network, known or not; TPE takes a second for each hundred, and more and
more."""


class Whole(nn.Module):
    """The largest network, whose beginnings are the others."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8)
        self.stages, n_in = nn.ModuleList(), 8
        for stage, n in enumerate(STREAMS):
            blocks = nn.ModuleList()
            for _ in range(N_DEPTHS):
                stride = 2 if stage and n_in != n else 1
                block = nn.ModuleDict({
                    "conv1": nn.Conv2d(n_in, n, 3, stride, 1, bias=False), "bn1": nn.BatchNorm2d(n),
                    "conv2": nn.Conv2d(n, n, 3, 1, 1, bias=False), "bn2": nn.BatchNorm2d(n),
                })  # fmt: skip
                if n_in != n:
                    block["conv3"], block["bn3"] = nn.Conv2d(n_in, n, 1, stride, bias=False), nn.BatchNorm2d(n)
                blocks.append(block)
                n_in = n
            self.stages.append(blocks)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor, genes: Genes, n: int | None = None) -> Tensor:
        """Logits of one of the networks; statistics of norms are those of the first `n` images, or of all."""
        x = torch.relu(normed(self.stem(x), self.norm, n))
        for stage in range(3):
            x = self.stage(x, stage, *genes[2 * stage : 2 * stage + 2], n)
        return self.head(x.mean((2, 3)))

    def stage(self, x: Tensor, stage: int, depth: int, width: int, n: int | None = None) -> Tensor:
        kept = STREAMS[stage] * (width + 1) // N_WIDTHS
        for block in itertools.islice(self.stages[stage], depth + 1):
            y = torch.relu(normed(conv(x, block["conv1"], out=kept), block["bn1"], n))
            y = normed(conv(y, block["conv2"], into=kept), block["bn2"], n)
            x = torch.relu(y + (normed(block["conv3"](x), block["bn3"], n) if "conv3" in block else x))
        return x


def conv(x: Tensor, layer: nn.Module, out: int | None = None, into: int | None = None) -> Tensor:
    assert isinstance(layer, nn.Conv2d)
    return functional.conv2d(x, layer.weight[:out, :into], None, layer.stride, layer.padding)


def normed(x: Tensor, norm: nn.Module, n: int | None) -> Tensor:
    """By the mean and the variance of the first `n` images."""
    assert isinstance(norm, nn.BatchNorm2d)
    kept = x.shape[1]
    if n is None:
        return functional.batch_norm(x, None, None, norm.weight[:kept], norm.bias[:kept], True)
    variance, mean = torch.var_mean(x[:n], (0, 2, 3), correction=0)
    return functional.batch_norm(x, mean, variance, norm.weight[:kept], norm.bias[:kept])


def trained(arguments: argparse.Namespace) -> Whole:
    """The largest alone for `start` epochs, then four that are drawn in each step, for `epochs`."""
    images, labels = (torch.from_numpy(each) for each in fashion("train", arguments.images))
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    network, largest = Whole(), tuple(n - 1 for n in COUNTS)
    total = (arguments.start + arguments.epochs) * (len(images) // 128)
    optimizer = torch.optim.SGD(network.parameters(), 0.1, 0.9, weight_decay=5e-4, nesterov=True)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    for epoch in range(arguments.start + arguments.epochs):
        for rows in torch.randperm(len(images), generator=generator)[: len(images) // 128 * 128].split(128):
            drawn = [largest]
            if epoch >= arguments.start:
                drawn = [tuple(int(torch.randint(n, (1,), generator=generator)) for n in COUNTS) for _ in range(4)]
            optimizer.zero_grad()
            for part, genes in zip(rows.chunk(len(drawn)), drawn, strict=True):
                (functional.cross_entropy(network(images[part], genes), labels[part]) / len(drawn)).backward()
            optimizer.step()
            rates.step()
        print(f"epoch {epoch + 1}: {time.process_time():.0f} CPU-seconds", flush=True)
    return network.eval()


@torch.no_grad()
def accuracies(network: Whole) -> Iterator[tuple[Genes, float]]:
    """Of all networks; what several begin with is computed once."""
    known, judged = fashion("train", 60000)[0][-N_STATISTICS:], fashion("t10k", N_JUDGED)
    images, labels = torch.from_numpy(np.concatenate([known, judged[0]])), torch.from_numpy(judged[1])
    n, choices = N_STATISTICS, list(itertools.product(range(N_DEPTHS), range(N_WIDTHS)))
    start = torch.relu(normed(network.stem(images), network.norm, n))
    for first in choices:
        one = network.stage(start, 0, *first, n)
        for second in choices:
            two = network.stage(one, 1, *second, n)
            for third in choices:
                logits = network.head(network.stage(two, 2, *third, n).mean((2, 3)))
                yield (*first, *second, *third), float((logits[n:].argmax(1) == labels).double().mean())


class _Graph:
    """An ONNX graph of convolutions whose norms are folded; weights are random, since time is all it is for."""

    def __init__(self, channels: int, side: int) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.input = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, channels, side, side])
        self.random = np.random.default_rng(0)

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(kind, list(inputs), [f"v{len(self.nodes)}"], **attributes))
        return self.nodes[-1].output[0]

    def weight(self, *shape: int) -> str:
        name = f"w{len(self.weights)}"
        values = self.random.standard_normal(shape).astype(np.float32) / max(1, int(np.prod(shape[1:]))) ** 0.5
        self.weights.append(numpy_helper.from_array(values, name))
        return name

    def conv(self, x: str, n_in: int, n_out: int, kernel: int, stride: int) -> str:
        return self.op("Conv", x, self.weight(n_out, n_in, kernel, kernel), self.weight(n_out), strides=[stride] * 2,
                       pads=[kernel // 2] * 4, kernel_shape=[kernel] * 2)  # fmt: skip

    def block(self, x: str, stage: int, number: int, width: int) -> str:
        n = STREAMS[stage]
        n_in, kept = STREAMS[stage - 1] if stage and not number else n, n * (width + 1) // N_WIDTHS
        stride = 1 if n_in == n else 2
        y = self.op("Relu", self.conv(x, n_in, kept, 3, stride))
        y = self.conv(y, kept, n, 3, 1)
        return self.op("Relu", self.op("Add", y, x if n_in == n else self.conv(x, n_in, n, 1, stride)))

    def session(self, output: str) -> onnxruntime.InferenceSession:
        value = helper.make_tensor_value_info(output, TensorProto.FLOAT, None)
        graph = helper.make_graph(self.nodes, "network", [self.input], [value], self.weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        return onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])


def session_of(genes: Genes) -> onnxruntime.InferenceSession:
    graph = _Graph(1, 28)
    x = graph.op("Relu", graph.conv("x", 1, 8, 3, 1))
    for stage in range(3):
        depth, width = genes[2 * stage : 2 * stage + 2]
        for place in range(depth + 1):
            x = graph.block(x, stage, place, width)
    pooled = graph.op("Flatten", graph.op("GlobalAveragePool", x))
    return graph.session(graph.op("Gemm", pooled, graph.weight(32, 10), graph.weight(10)))


def block_session(stage: int, number: int, width: int) -> onnxruntime.InferenceSession:
    """A block alone."""
    first = stage > 0 and not number
    graph = _Graph(STREAMS[stage - 1] if first else STREAMS[stage], 28 // 2 ** (stage - first))
    return graph.session(graph.block("x", stage, number, width))


def timed(session: onnxruntime.InferenceSession, beside: onnxruntime.InferenceSession | None = None) -> list[float]:
    """Seconds of a session, and of the other, in blocks in turn: the least of the blocks' medians."""
    runs = []
    for each in (session, beside):
        if each is not None:
            entry = each.get_inputs()[0]
            feed = {entry.name: np.random.default_rng(0).standard_normal(entry.shape).astype(np.float32)}
            runs.append((lambda each=each, feed=feed: each.run(None, feed), []))
            runs[-1][0]()
    for _ in range(BLOCKS):
        for call, medians in runs:
            times = []
            for _ in range(RUNS):
                began = time.perf_counter()
                call()
                times.append(time.perf_counter() - began)
            medians.append(statistics.median(times))
    return [min(medians) for _, medians in runs]


def tabulate(arguments: argparse.Namespace) -> None:
    """Everything, once."""
    began = time.process_time()
    network = trained(arguments)
    learned = time.process_time() - began
    quality = dict(accuracies(network))
    print(f"accuracies: {time.process_time() - began:.0f} CPU-seconds", flush=True)
    largest = session_of(tuple(n - 1 for n in COUNTS))
    alone = {
        f"{stage} {number} {width}": timed(block_session(stage, number, width))[0]
        for stage in range(3) for number in range(2) for width in range(N_WIDTHS)
    }  # fmt: skip
    shares = [timed(session_of(genes), largest) for genes in quality]
    usual = statistics.median(other for _, other in shares)
    rows = [
        [*genes, round(1e6 * usual * own / other, 2), found]
        for (genes, found), (own, other) in zip(quality.items(), shares, strict=True)
    ]
    spread = statistics.quantiles([other for _, other in shares], n=20)
    table = {
        "images": arguments.images, "start_epochs": arguments.start, "epochs": arguments.epochs,
        "training_cpu_seconds": round(learned), "cpu_seconds": round(time.process_time() - began),
        "onnxruntime": onnxruntime.__version__, "largest_microseconds": [round(1e6 * each, 1) for each in
        (spread[0], usual, spread[-1])], "blocks": {key: round(1e6 * each, 2) for key, each in alone.items()},
    }  # fmt: skip
    lines = ",\n".join(json.dumps(row) for row in rows)
    (MEASURED / "search_table.json").write_text(json.dumps(table)[:-1] + f',\n"rows": [\n{lines}\n]}}\n')
    print(f"{len(rows)} networks in {table['cpu_seconds']} CPU-seconds", flush=True)


@dataclass
class Replay:
    """How much of the true hypervolume is reached, and after how many networks that were not evaluated before."""

    values: dict[Genes, tuple[float, float]]
    reference: tuple[float, float]
    whole: float
    seen: set[Genes] = field(default_factory=set)
    front: list[tuple[float, float]] = field(default_factory=list)
    reached: dict[float, int] = field(default_factory=dict)

    def __call__(self, genes: Genes) -> tuple[float, float]:
        value = self.values[genes]
        if genes not in self.seen:
            self.seen.add(genes)
            if not any(a <= value[0] and b <= value[1] for a, b in self.front):
                self.front = [each for each in self.front if not (value[0] <= each[0] and value[1] <= each[1])] + [
                    value
                ]
                share = hypervolume(self.front, self.reference) / self.whole
                for level in LEVELS:
                    if share >= level:
                        self.reached.setdefault(level, len(self.seen))
        return value

    @property
    def done(self) -> bool:
        return len(self.reached) == len(LEVELS) or len(self.seen) >= len(self.values)


def by_predictors(replay: Replay, seed: int, prior: Callable[[Genes], float] | None) -> None:
    learning = evolution.Search(evolution.Space(COUNTS, prior=prior), seed)
    learning.tell({genes: replay(genes) for genes in learning.first(FIRST)})
    while not replay.done:
        learning.tell({genes: replay(genes) for genes in learning.ask(BATCH)})


def at_random(replay: Replay, seed: int) -> None:
    generator, names = np.random.default_rng(seed), list(replay.values)
    for at in generator.permutation(len(names)):
        replay(names[at])
        if replay.done:
            return


def by_sampler(replay: Replay, sampler: optuna.samplers.BaseSampler, most: int = ASKED) -> None:
    """Networks that it asks for again cost nothing."""
    choices = {str(i): optuna.distributions.IntDistribution(0, n - 1) for i, n in enumerate(COUNTS)}
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
    for _ in range(most):
        trial = study.ask(choices)
        study.tell(trial, replay(tuple(trial.params[str(i)] for i in range(len(COUNTS)))))
        if replay.done:
            return


def replayed(arguments: argparse.Namespace) -> dict[str, Any]:
    """Evaluations of each method and seed until each share of the hypervolume; None where it was not reached."""
    table = json.loads((MEASURED / "search_table.json").read_text())
    values = {tuple(row[:6]): (row[6], 1 - row[7]) for row in table["rows"]}
    reference = tuple(max(each[i] for each in values.values()) for i in (0, 1))
    front = [value for value, rank in zip(values.values(), ranks(list(values.values())), strict=True) if not rank]
    whole, alone = hypervolume(front, reference), table["blocks"]

    def prior(genes: Genes) -> float:
        return sum(
            alone[f"{stage} 0 {genes[2 * stage + 1]}"] + genes[2 * stage] * alone[f"{stage} 1 {genes[2 * stage + 1]}"]
            for stage in range(3)
        )

    nsga, tpe = optuna.samplers.NSGAIISampler, optuna.samplers.TPESampler
    methods: dict[str, Callable[[Replay, int], None]] = {
        "predictors, table as prior": lambda replay, seed: by_predictors(replay, seed, prior),
        "NSGA-II, population 50": lambda replay, seed: by_sampler(replay, nsga(population_size=50, seed=seed)),
        "NSGA-II, population 20": lambda replay, seed: by_sampler(replay, nsga(population_size=20, seed=seed)),
        "random": at_random,
        "TPE": lambda replay, seed: by_sampler(replay, tpe(seed=seed), ASKED_OF_TPE),
        "predictors alone": lambda replay, seed: by_predictors(replay, seed, None),
    }  # fmt: skip
    times, priors = [value[0] for value in values.values()], [prior(genes) for genes in values]
    found: dict[str, Any] = {
        "networks": len(values), "front": len(front), "levels": list(LEVELS), "first": FIRST, "batch": BATCH,
        "methods": {}, "tau_of_table": round(kendall(times, priors), 3),
        **{key: table[key] for key in ("training_cpu_seconds", "cpu_seconds", "images", "largest_microseconds")},
        "accuracy": [round(1 - f(loss for _, loss in values.values()), 4) for f in (max, min)],
    }  # fmt: skip
    known = read_results("search").get("replay", {}).get("methods", {})
    for name, method in methods.items():
        if not arguments.again and len(known.get(name, {}).get("evaluations", ())) == arguments.seeds:
            found["methods"][name] = known[name]
            continue
        began = time.process_time()
        runs = []
        for seed in range(arguments.seeds):
            replay = Replay(values, reference, whole)
            method(replay, seed)
            runs.append([replay.reached.get(level) for level in LEVELS])
        found["methods"][name] = {"evaluations": runs, "cpu_seconds": round(time.process_time() - began)}
        write_results("search", read_results("search") | {"replay": found})
        print(name, [_middle([run[at] for run in runs]) for at in range(len(LEVELS))], flush=True)
    return found


def _middle(counts: Sequence[int | None]) -> float:
    """The median; what was not reached is beyond everything."""
    return statistics.median(math.inf if each is None else each for each in counts)


def search_table(results: dict[str, Any]) -> str:
    """The median evaluations of each method, and how many seeds did not get there."""
    results = results["replay"]
    ours = next(iter(results["methods"].values()))["evaluations"]
    rows = []
    for name, found in results["methods"].items():
        row: list[object] = [name]
        for at in range(len(results["levels"])):
            counts = [run[at] for run in found["evaluations"]]
            missed = sum(each is None for each in counts)
            middle, own = _middle(counts), _middle([run[at] for run in ours])
            shown = "–" if math.isinf(middle) else f"{middle:g}"
            reached = [each for each in counts if each is not None]
            notes = [f"{min(reached)}–{max(reached)}"] if reached else []
            notes += [f"{missed} never"] if missed else []
            row += [f"{shown} ({', '.join(notes)})",
                    None if math.isinf(middle) else f"{own / middle:.2f}"]  # fmt: skip
        rows.append(row)
    columns = ["method"]
    for level in results["levels"]:
        columns += [f"to {100 * level:.0f} %", "ours over it"]
    return (
        f"Evaluations until a share of the true hypervolume of {results['networks']:,} networks, whose front has "
        f"{results['front']}: the median of {len(ours)} seeds, and their range. Accuracy of the networks is "
        f"{results['accuracy'][0]:.1%} to {results['accuracy'][1]:.1%}; Kendall's τ of the table of blocks and "
        f"measured latency {results['tau_of_table']:.3f}. The table took {number(results['cpu_seconds'])} CPU-seconds, "
        f"of which training {results['training_cpu_seconds']}. NSGA-II is asked for {ASKED:,} networks and TPE for "
        f"{ASKED_OF_TPE}; what they ask for again counts once, and most is: NSGA-II comes upon about 500 in all, TPE "
        "upon about 110.\n\n" + markdown(columns, rows)
    )


def mobilenet(arguments: argparse.Namespace) -> dict[str, Any]:
    """The original, all layers as int8, and what the search chose, on the same crops."""
    model, photos, folder = model_dir("mobilenet"), sorted(model_dir("photos").glob("imagenet_*.jpg")), cached("search")
    for name, files, n, seed in (("data", photos[::2], 256, 0), ("eval", photos[1::2], 400, 3)):
        if not (folder / f"{name}.npz").exists():
            np.savez(folder / f"{name}.npz", image=crops(files, n, seed))
    common: dict[str, Any] = {
        "model": str(model), "recipe": "cnn-int8", "data": str(folder / "data.npz"),
        "eval": str(folder / "eval.npz"), "force": True, "progress": make_progress(),
    }  # fmt: skip
    gates = ("gates.promised_loss=99%", "gates.promised_size=5", "gates.promised_speed=0.1")
    if not (folder / "all-int8").exists():
        run(RunOptions(**common, output=folder / "all-int8", sets=("evaluation.speed=false", *gates)))
    whole = Artifact.open(folder / "all-int8")
    shapes = {"image": [1, 3, 224, 224]}
    with original_graph(open_checkpoint(model), folder, [{"": torch.zeros(2, 3, 224, 224)}]) as original:
        assert original is not None
        ends = paired(whole.directory, original, 1, shapes=shapes, blocks=10)
    if ends.latency > 0.95 * ends.original:
        raise SystemExit(
            f"all layers as int8 take {ends.latency / ends.original:.2f} of the floats' time on this processor"
        )
    target = (ends.latency + ends.original) / 2
    began = time.process_time()
    found = run(
        RunOptions(
            **common,
            output=folder / "mobilenet",
            target_latency=target,
            threads=1,
            sets=("evaluation.speed=false", *gates),
        )
    )
    return {
        "target": target, "all_int8": ends.latency, "original": ends.original,
        "all_int8_quality": kept(whole.report["quality"]), "quality": kept(found.report["quality"]),
        "search": found.report["search"], "cpu_seconds": round(time.process_time() - began), "most": arguments.most,
        "bytes": found.report["size"]["bytes"], "all_int8_bytes": whole.report["size"]["bytes"],
    }  # fmt: skip


def minilm(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the search chose, and every network that it measured which has one width."""
    folder, began = cached("search"), time.process_time()
    found = run(RunOptions(
        model=str(model_dir("minilm")), recipe="encoder-sorted", output=folder / "minilm", force=True,
        progress=make_progress(), target_speedup=2.0, threads=1,
        sets=("evaluation.speed=false", *(arguments.set or ())),
    ))  # fmt: skip
    networks = json.loads((found.directory / "front.json").read_text())["networks"]
    uniform = [each for each in networks if _is_uniform(each["genes"], networks)]
    return {
        "search": found.report["search"], "quality": kept(found.report["quality"]), "sets": list(arguments.set or ()),
        "uniform": uniform, "chosen": next(each for each in networks if each["chosen"]),
        "cpu_seconds": round(time.process_time() - began),
    }  # fmt: skip


def _is_uniform(genes: list[int], networks: list[dict[str, Any]]) -> bool:
    """Whether a network is of one width. Of blocks that are not there all networks of a depth have 0."""
    same_depth = [each["genes"] for each in networks if each["genes"][0] == genes[0]]
    alive = [at for at in range(1, len(genes)) if any(other[at] for other in same_depth)]
    return len({genes[at] for at in alive}) <= 1


def kept(quality: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in quality.items() if isinstance(value, (int, float))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("tabulate", "replay", "mobilenet", "minilm"))
    parser.add_argument("--again", action="store_true", help="replay what was replayed before, too")
    parser.add_argument("--set", action="append")
    parser.add_argument("--most", type=int, help="networks that a search measures, fewer than it does by itself")
    parser.add_argument("--images", type=int, default=20000)
    parser.add_argument("--start", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=20)
    arguments = parser.parse_args()
    if arguments.most:
        search.MOST = arguments.most
    if arguments.part == "tabulate":
        tabulate(arguments)
    elif arguments.part != "replay":
        result = {"mobilenet": mobilenet, "minilm": minilm}[arguments.part](arguments)
        write_results("search", read_results("search") | {arguments.part: result})
        print(result)
    else:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        print(search_table({"replay": replayed(arguments)}))


if __name__ == "__main__":
    main()
