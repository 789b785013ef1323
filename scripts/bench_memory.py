#!/usr/bin/env python
"""Peak memory of compressing a random Llama of 1.1 B parameters, and its size as predicted and as written.

    scripts/fetch_material smollm2          for its tokenizer
    scripts/bench_memory.py [--recipe llm-2bit-fast] [--threads 2] [--layers 22]
    scripts/bench_memory.py --pairs [NAME…]     planned and taken, of small runs that differ in kind

Width 2048, 22 layers, 32 heads of which 4 for keys and values, intermediate 5632, vocabulary 32,000, bfloat16
safetensors in two shards, written tensor by tensor into the cache. With fewer --layers, which show the same peak sooner
where it is of one block, nothing is recorded. The run is `compress` in a process of its own,
sampled every 50 ms: anonymous memory and dirty pages, which only that process can give back, and clean pages of mapped
files, which the system takes back when it needs them, stated apart; files' pages every second. The processes that open
the artifact in onnxruntime count for themselves: the largest is stated. Nothing can be said of random weights' quality,
so evaluation is off; the proof is not. Linux only.

The pairs are of a recipe and a source each, a minute or two of one thread: see PAIRS, which says what of models and
data scripts/fetch_material and scripts/bench_strangers.py have to have brought. A network that is cut has as many of
its first blocks. What they take goes to docs/measured/memory.json under "pairs".
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from material import model_dir
from measured import cached, markdown, read_results, write_results
from safetensors import safe_open
from safetensors.torch import save_file
from strangers import fetch, files_of

from compressor.checkpoints import open_checkpoint
from compressor.core.machine import private_memory
from compressor.evaluate import bench
from compressor.plan.planning import make_plan
from compressor.plan.recipe_file import load_recipe

WIDTH, LAYERS, HEADS, KV_HEADS, INNER, VOCABULARY = 2048, 22, 32, 4, 5632, 32_000
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": WIDTH,
    "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "intermediate_size": INNER,
    "vocab_size": VOCABULARY, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "dtype": "bfloat16",
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
}  # fmt: skip
SETS = ("evaluation.tokens=0",)
SAMPLED_EVERY = 0.05
CLOSELY_EVERY = 20
"""Samples from one of all pages to the next."""
ROW = "pairs"
"""In the results, beside the recipes that were measured on all blocks."""


@dataclass(frozen=True)
class Pair:
    """A run whose memory is planned and measured.

    what      the source, in a few words
    source    gives its path
    options   of `compress`, besides the recipe
    """

    what: str
    source: Callable[[], Path]
    recipe: str
    options: Callable[[], list[str]] = list


def cut(n: int) -> Path:
    """SmolLM2's first blocks; written at the first call."""
    source, target = model_dir("smollm2"), cached("memory") / f"smollm2-{n}"
    if target.is_dir():
        return target
    partial = target.with_name("partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    with safe_open(source / "model.safetensors", "pt") as file:
        names = list(file.keys())
        kept = [name for name in names if ".layers." not in name or int(name.split(".")[2]) < n]
        save_file({name: file.get_tensor(name) for name in kept}, partial / "model.safetensors")
    config = json.loads((source / "config.json").read_text(encoding="utf-8")) | {"num_hidden_layers": n}
    (partial / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / name, partial / name)
    partial.rename(target)
    return target


def images() -> list[str]:
    """Random pictures of 224 by 224: nothing of memory depends on what is on them."""
    path = cached("memory") / "images.npz"
    if not path.is_file():
        values = np.random.default_rng(0).normal(size=(256, 3, 224, 224)).astype(np.float32)
        np.savez(path, x=values)
    return ["--data", str(path)]


def example_data(name: str) -> Callable[[], list[str]]:
    """Of a stranger's graph."""
    return lambda: ["--data", str(files_of(name)["calibration"]), "--eval", str(files_of(name)["evaluation"])]


def with_sets(*sets: str) -> Callable[[], list[str]]:
    return lambda: [part for each in (*SETS, *sets) for part in ("--set", each)]


PAIRS = {
    "smollm2-4bit": Pair("SmolLM2, 6 blocks", lambda: cut(6), "llm-4bit", with_sets()),
    "smollm2-2bit-fast": Pair("SmolLM2, 3 blocks", lambda: cut(3), "llm-2bit-fast", with_sets()),
    "smollm2-2bit": Pair(
        "SmolLM2, 3 blocks, 2 steps", lambda: cut(3), "llm-2bit",
        with_sets("distill.steps=2", "distill.tokens=8192", "calibration.tokens=8192"),
    ),
    "smollm2-sparse50": Pair(
        "SmolLM2, 3 blocks", lambda: cut(3), "llm-sparse50", with_sets("calibration.tokens=8192")
    ),
    "smollm2-width": Pair("SmolLM2, 3 blocks", lambda: cut(3), "llm-width", with_sets("calibration.tokens=4096")),
    "llama-4bit": Pair("Llama of width 2048, bfloat16, 2 blocks", lambda: make_model(2), "llm-4bit", with_sets()),
    "llama-2bit-fast": Pair(
        "Llama of width 2048, bfloat16, 2 blocks", lambda: make_model(2), "llm-2bit-fast", with_sets()
    ),
    "minilm-4bit": Pair("MiniLM", lambda: model_dir("minilm"), "encoder-4bit"),
    "mobilenet-int8": Pair("MobileNetV2", lambda: model_dir("mobilenet"), "cnn-int8", images),
    "mobilenet-4bit": Pair("MobileNetV2", lambda: model_dir("mobilenet"), "cnn-4bit", images),
    "mobilenet-explain": Pair(
        "MobileNetV2", lambda: model_dir("mobilenet"), "cnn-explain",
        lambda: [*images(), "--set", "calibration.samples=32", "--set", "lrp.step=0.15"],
    ),
    "nsfw-int8": Pair("ResNet-50, ONNX", lambda: fetch("nsfw"), "cnn-int8", example_data("nsfw")),
    "ocr-find-4bit": Pair("PP-OCRv4, ONNX", lambda: fetch("ocr-find"), "cnn-4bit", example_data("ocr-find")),
}  # fmt: skip


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Every tensor, in the order of the files."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, WIDTH)}
    kv = WIDTH // HEADS * KV_HEADS
    for i in range(layers):
        block = {
            "self_attn.q_proj": (WIDTH, WIDTH), "self_attn.k_proj": (kv, WIDTH), "self_attn.v_proj": (kv, WIDTH),
            "self_attn.o_proj": (WIDTH, WIDTH), "mlp.gate_proj": (INNER, WIDTH), "mlp.up_proj": (INNER, WIDTH),
            "mlp.down_proj": (WIDTH, INNER), "input_layernorm": (WIDTH,), "post_attention_layernorm": (WIDTH,),
        }  # fmt: skip
        found |= {f"model.layers.{i}.{name}.weight": shape for name, shape in block.items()}
    return found | {"model.norm.weight": (WIDTH,), "lm_head.weight": (VOCABULARY, WIDTH)}


def make_model(layers: int) -> Path:
    """The model's directory; written at the first call, one tensor in memory at a time."""
    target = cached("memory") / f"random-llama-{layers}"
    if target.is_dir():
        return target
    partial = target.with_name("partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    every = list(shapes(layers).items())
    shards = every[: len(every) // 2], every[len(every) // 2 :]
    generator = torch.Generator().manual_seed(0)
    names = {}
    for number, shard in enumerate(shards, start=1):
        file = partial / f"model-{number:05}-of-00002.safetensors"
        write_shard(file, dict(shard), generator)
        names |= {name: file.name for name, _ in shard}
    (partial / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    (partial / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}, indent=1))
    write_tokenizer(model_dir("smollm2"), partial)
    partial.rename(target)
    return target


def write_shard(file: Path, tensors: dict[str, tuple[int, ...]], generator: torch.Generator) -> None:
    """Gaussian weights of deviation 0.02, norms of one."""
    header, position = {}, 0
    for name, shape in tensors.items():
        n_bytes = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, position + n_bytes]}
        position += n_bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for shape in tensors.values():
            values = torch.ones(shape) if len(shape) == 1 else 0.02 * torch.randn(shape, generator=generator)
            stream.write(values.bfloat16().view(torch.uint8).numpy().tobytes())


def write_tokenizer(source: Path, target: Path) -> None:
    """SmolLM2's tokenizer cut to the vocabulary. Merges stand in the order of their tokens: a prefix is whole."""
    content = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    model = content["model"]
    model["vocab"] = {token: index for token, index in model["vocab"].items() if index < VOCABULARY}
    pairs = [merge if isinstance(merge, list) else merge.split(" ") for merge in model["merges"]]
    model["merges"] = [
        merge for merge, pair in zip(model["merges"], pairs, strict=True) if "".join(pair) in model["vocab"]
    ]  # fmt: skip
    (target / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    shutil.copyfile(source / "tokenizer_config.json", target / "tokenizer_config.json")


def memory(pid: int, closely: bool) -> dict[str, int]:
    """Bytes of a process now: anonymous and dirty pages, clean pages of its files. Looked at `closely`, which costs the
    kernel a walk over all pages; else of anonymous pages alone."""
    if not closely:
        return {"own": (found := private_memory(pid) or 0), "anonymous": found, "mapped": 0}
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    except OSError:  # it has ended
        return {"own": 0, "anonymous": 0, "mapped": 0}
    kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.endswith(" kB")}
    anonymous = kilobytes["Anonymous"]
    dirty = max(0, kilobytes["Private_Dirty"] + kilobytes["Shared_Dirty"] - anonymous)
    own = anonymous + dirty
    found = {"own": own, "anonymous": anonymous, "mapped": max(0, kilobytes["Rss"] - own)}
    return {name: 1024 * size for name, size in found.items()}


def children(pid: int) -> Iterator[int]:
    """Processes that `pid` has started."""
    for tasks in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            yield from map(int, tasks.read_text().split())
        except OSError:  # a thread that has ended
            continue


def watch(command: list[str], environment: dict[str, str], expected: tuple[int, ...] = (0,)) -> dict[str, Any]:
    """Runs a command, which ends as `expected`; peaks in bytes, of the process that does its work, which is its child,
    and of the largest that this one starts for onnxruntime."""
    began, spent = time.monotonic(), _cpu_seconds()
    process = subprocess.Popen(command, env=environment)
    peaks = {"own": 0, "anonymous": 0, "mapped": 0, "child": 0}
    for number in itertools.count():
        if process.poll() is not None:
            break
        for worker in children(process.pid):
            found = memory(worker, number % CLOSELY_EVERY == 0)
            peaks = {name: max(peak, found.get(name, 0)) for name, peak in peaks.items()}
            for child in children(worker):
                peaks["child"] = max(peaks["child"], memory(child, False)["own"])
        time.sleep(SAMPLED_EVERY)
    if process.returncode not in expected:
        sys.exit(f"bench_memory: `{' '.join(command)}` ended with status {process.returncode}")
    return {**peaks, "seconds": round(time.monotonic() - began, 1), "cpu_seconds": round(_cpu_seconds() - spent)}


def _cpu_seconds() -> float:
    """Of processes that have ended, with theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def memory_table(results: dict[str, Any]) -> str:
    """A row per recipe."""
    rows = [
        [f"`{name}`", *(f"{entry[key] / 1e9:.2f} GB" for key in ("own", "planned_memory", "mapped", "child")),
         f"{entry['bytes'] / 1e6:.1f} MB", f"{entry['planned_bytes'] / 1e6:.1f} MB",
         f"{entry['cpu_seconds'] / 60:.0f} min" if "cpu_seconds" in entry else None]
        for name, entry in results.items()
        if name != ROW
    ]  # fmt: skip
    memories = ("anonymous and dirty", "planned", "mapped files", "onnxruntime's process")
    return markdown(["recipe", *memories, "size", "planned", "CPU time"], rows)


def runs_table(results: dict[str, Any]) -> str:
    """A row per pair of a recipe and a source."""
    rows = [
        [PAIRS[name].what, f"`{PAIRS[name].recipe}`", f"{entry['planned_memory'] / 1e9:.2f} GB",
         f"{entry['own'] / 1e9:.2f} GB", f"{entry['planned_memory'] / entry['own'] - 1:+.0%}"]
        for name, entry in results.get(ROW, {}).items()
    ]  # fmt: skip
    return markdown(["source", "recipe", "planned", "anonymous and dirty", "difference"], rows)


def measure_pairs(names: list[str], only_plan: bool) -> None:
    """Plans and runs each of the pairs, on one thread, and records it."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for name in names or PAIRS:
        pair, target = PAIRS[name], cached("memory") / f"pair-{name}"
        command = [sys.executable, "-m", "compressor", str(pair.source()), "--recipe", pair.recipe, "-o", str(target)]
        command += ["--set", "evaluation.speed=false", *pair.options()]
        plan = subprocess.run(
            [*command, "--dry-run", "--json"], env=environment, capture_output=True, text=True, check=True
        )
        found = {} if only_plan else watch([*command, "--force"], environment, (0, 1))
        results = read_results("memory")
        known = results.setdefault(ROW, {})
        known[name] = known.get(name, {}) | found | {"planned_memory": json.loads(plan.stdout)["peak_memory"]}
        results[ROW] = {each: known[each] for each in PAIRS if each in known}
        write_results("memory", results)
        print(runs_table({ROW: {name: known[name]}}).splitlines()[-1], flush=True)
        for each in (target, target.with_name(f"{target.name}.failed")):
            shutil.rmtree(each, ignore_errors=True)
    if not names or only_plan:
        refresh_pages()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="llm-2bit-fast")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--plan", action="store_true", help="only the plan's figures again, of what has been measured")
    parser.add_argument("--set", action="append", default=[], dest="sets")
    parser.add_argument("--pairs", nargs="*", metavar="NAME", choices=PAIRS, help=f"of {', '.join(PAIRS)}; all")
    arguments = parser.parse_args()
    if arguments.pairs is not None:
        return measure_pairs(arguments.pairs, arguments.plan)
    source, sets = make_model(arguments.layers), [*SETS, *arguments.sets]
    target = cached("memory") / arguments.recipe
    plan = make_plan(open_checkpoint(source), load_recipe(arguments.recipe, sets))
    planned = {"planned_memory": plan.peak_memory, "planned_bytes": plan.bytes_after}
    if arguments.plan:
        return record(arguments.recipe, read_results("memory")[arguments.recipe] | planned)
    command = [sys.executable, "-m", "compressor", str(source), "--recipe", arguments.recipe, "-o", str(target)]
    command += ["--force", *(part for setting in sets for part in ("--set", setting))]
    found = watch(command, {**os.environ, "OMP_NUM_THREADS": str(arguments.threads)})
    written = bench.size(target)["bytes"]
    shutil.rmtree(target)
    entry = {**found, "bytes": written, **planned}
    print(memory_table({arguments.recipe: entry}))
    if arguments.layers == LAYERS:
        record(arguments.recipe, entry)


def record(recipe: str, entry: dict[str, Any]) -> None:
    """Into docs/measured, and from there into the pages."""
    write_results("memory", read_results("memory") | {recipe: entry})
    refresh_pages()


def refresh_pages() -> None:
    import make_tables

    make_tables.main()


if __name__ == "__main__":
    main()
