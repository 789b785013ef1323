#!/usr/bin/env python
"""Fills the tables of README.md and docs/ from docs/measured/*.json and the recipes, between their marks.

    scripts/make_tables.py

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; what is there is replaced. The benchmarks run this
when they are done, and a test checks that the pages are current.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench_abroad import abroad_table
from bench_authors import authors_table
from bench_batch import batch_table
from bench_binary import binary_table
from bench_encoders import encoders_table
from bench_gradients import gradients_table
from bench_layers import layers_table
from bench_loading import in_use_table, loading_table
from bench_memory import memory_table, runs_table
from bench_metaprune import metaprune_table
from bench_mixed import mixed_table
from bench_n2n import n2n_table
from bench_once import once_table
from bench_onnx import onnx_table
from bench_products import products_table
from bench_pruning import pruning_table
from bench_quality import baselines_table, best_baselines, kinds_table, quality_table, steps_table
from bench_rounding import rounding_table
from bench_search import search_table
from bench_sorted import sorted_table
from bench_speed import prompt_table, speed_table
from bench_strangers import strangers_table
from bench_structure import structure_table
from bench_tables import tables_table
from bench_traffic import traffic_table
from bench_vision import vision_table
from bench_zeros import zeros_table
from check_crashes import crashes_table
from check_hosts import hosts_table
from check_kills import kills_table
from check_memory import shortage_table
from check_same_bytes import same_bytes_table
from families import families_table
from fuzz import fuzz_table
from measured import ROOT, markdown, number, read_results

from compressor.plan.recipe_file import load_recipe, shipped_recipes

PAGES = (
    "README.md", "docs/passes/jlcm.md", "docs/passes/trellis.md",
    "docs/passes/affine.md", "docs/passes/gblm.md", "docs/passes/rounding.md",
    "docs/passes/hesso.md", "docs/passes/lrp.md", "docs/passes/oto.md", "docs/passes/reste.md", "docs/passes/n2n.md",
    "docs/passes/sortednet.md", "docs/passes/metaprune.md",
    "docs/runtime.md", "docs/design.md", "docs/ci.md", "docs/onnx.md", "docs/mixed-precision.md",
    "docs/families.md", "docs/compressed-gradients.md", "docs/search.md",
)  # fmt: skip
MARK = re.compile(r"(<!-- table: ([a-z]+) -->\n).*?(<!-- end -->)", re.DOTALL)
COMMANDS = {
    "quality": "scripts/bench_quality.py artifacts DIR…", "kinds": "scripts/bench_quality.py artifacts DIR…",
    "baselines": "scripts/bench_quality.py baselines",
    "steps": "scripts/bench_quality.py steps", "speed": "scripts/bench_speed.py",
    "abroad": "scripts/bench_abroad.py",
    "authors": "scripts/bench_authors.py", "encoders": "scripts/bench_encoders.py",
    "memory": "scripts/bench_memory.py", "loading": "scripts/bench_loading.py", "vision": "scripts/bench_vision.py",
    "in_use": "scripts/bench_loading.py --planned", "strangers": "scripts/bench_strangers.py",
    "runs": "scripts/bench_memory.py --pairs",
    "products": "scripts/bench_products.py",
    "pruning": "scripts/bench_pruning.py", "gradients": "scripts/bench_gradients.py",
    "rounding": "scripts/bench_rounding.py", "layers": "scripts/bench_layers.py",
    "zeros": "scripts/bench_zeros.py", "tables": "scripts/bench_tables.py",
    "once": "scripts/bench_once.py", "binary": "scripts/bench_binary.py",
    "n2n": "scripts/bench_n2n.py", "traffic": "scripts/bench_traffic.py",
    "structure": "scripts/bench_structure.py", "sorted": "scripts/bench_sorted.py", "search": "scripts/bench_search.py",
    "mixed": "scripts/bench_mixed.py", "metaprune": "scripts/bench_metaprune.py",
    "fuzz": "scripts/fuzz.py", "families": "scripts/families.py",
    "batch": "scripts/bench_batch.py", "hosts": "scripts/check_hosts.py DIR",
    "crashes": "scripts/check_crashes.py", "shortage": "scripts/check_memory.py",
    "same_bytes": "scripts/check_same_bytes.py",
    "kills": "scripts/check_kills.py --disks", "onnx": "scripts/bench_onnx.py",
}  # fmt: skip
QUOTED = (("Q4_K_M", 105.5, 35.0), ("Q3_K_M", 93.5, 36.7), ("Q2_K", 88.2, 39.7), ("IQ2_XXS", 83.8, 56.8))
"""Whole files of llama.cpp with importance matrix, this very model and text; quoted, not measured by our scripts."""


def measured_table(name: str, make: Callable[[dict[str, Any]], str]) -> str:
    """What `make` says of docs/measured/`name`.json, or that it has not been measured."""
    results = read_results(name)
    found = make(results) if results else "Not measured yet."
    return f"{found}\n\nBy `{COMMANDS[name]}`."


def recipes_table(_: dict[str, Any] | None = None) -> str:
    """Every shipped recipe, and what it needs."""
    recipes = [load_recipe(name) for name in shipped_recipes()]
    return markdown(["recipe", "for", "needs"], [[f"`{r.name}`", r.description, r.needs] for r in recipes]).replace(
        "--:", ":--"
    )


def comparison_table() -> str:
    """Whole files, Moby Dick: ours, the best of each baseline, and llama.cpp's as quoted; largest first."""
    rows: list[tuple[float, list[object]]] = [
        (megabytes, [f"llama.cpp {name}, importance matrix (quoted)", number(megabytes), number(perplexity), None])
        for name, megabytes, perplexity in QUOTED
    ]
    quality = read_results("quality")
    for name, entry in quality.get("others", {}).items():
        rows.append((entry["megabytes"], _row(name, entry)))
    if quality:
        figures = quality["original"]["perplexity"]
        rows.append((538.1, ["original, float32", "538.1", number(figures["moby_8"]), number(figures["sotu_8"])]))
    for name, entry in quality.get("artifacts", {}).items():
        rows.append((entry["megabytes"], _row(f"**compressor `{name}`**", entry)))
    for entry in best_baselines(read_results("baselines")):
        title = f"{entry['method'].upper()}, {entry['bits']} bits, groups of {entry['group']}"
        rows.append((entry["megabytes"], _row(title, entry)))
    rows.sort(key=lambda row: -row[0])
    titles = ["method", "MB, all files", "Moby Dick", "State of the Union"]
    return markdown(titles, [cells for _, cells in rows])


def _row(title: str, entry: dict[str, Any]) -> list[object]:
    figures = entry["perplexity"]
    return [title, number(entry["megabytes"]), number(figures["moby_8"]), number(figures["sotu_8"])]


TABLES: dict[str, Callable[[], str]] = {
    "recipes": recipes_table,
    "comparison": comparison_table,
    "quality": lambda: measured_table("quality", quality_table),
    "kinds": lambda: measured_table("quality", kinds_table),
    "abroad": lambda: measured_table("abroad", abroad_table),
    "baselines": lambda: measured_table("baselines", baselines_table),
    "steps": lambda: measured_table("steps", steps_table),
    "layers": lambda: measured_table("layers", layers_table),
    "speed": lambda: measured_table("speed", speed_table),
    "encoders": lambda: measured_table("encoders", encoders_table),
    "authors": lambda: measured_table("authors", authors_table),
    "prompt": lambda: measured_table("speed", prompt_table),
    "memory": lambda: measured_table("memory", memory_table),
    "runs": lambda: f"{runs_table(read_results('memory'))}\n\nBy `{COMMANDS['runs']}`.",
    "loading": lambda: measured_table("loading", loading_table),
    "inuse": lambda: measured_table("in_use", in_use_table),
    "products": lambda: measured_table("products", products_table),
    "pruning": lambda: measured_table("pruning", pruning_table),
    "gradients": lambda: measured_table("gradients", gradients_table),
    "strangers": lambda: measured_table("strangers", strangers_table),
    "vision": lambda: measured_table("vision", vision_table),
    "rounding": lambda: measured_table("rounding", rounding_table),
    "zeros": lambda: measured_table("zeros", zeros_table),
    "tables": lambda: measured_table("tables", tables_table),
    "once": lambda: measured_table("once", once_table),
    "binary": lambda: measured_table("binary", binary_table),
    "search": lambda: measured_table("n2n", n2n_table),
    "traffic": lambda: measured_table("traffic", traffic_table),
    "metaprune": lambda: measured_table("metaprune", metaprune_table),
    "structure": lambda: measured_table("structure", structure_table),
    "sorted": lambda: measured_table("sorted", sorted_table),
    "fastest": lambda: measured_table("search", search_table),
    "families": lambda: measured_table("families", families_table),
    "hosts": lambda: measured_table("hosts", hosts_table),
    "fuzz": lambda: measured_table("fuzz", fuzz_table),
    "kills": lambda: measured_table("kills", kills_table),
    "crashes": lambda: measured_table("crashes", crashes_table),
    "shortage": lambda: measured_table("shortage", shortage_table),
    "elsewhere": lambda: measured_table("same_bytes", same_bytes_table),
    "batch": lambda: measured_table("batch", batch_table),
    "onnx": lambda: measured_table("onnx", onnx_table),
    "mixed": lambda: measured_table("mixed", mixed_table),
}


def filled(page: str) -> str:
    """A page's text with every table as it should be."""
    return MARK.sub(lambda match: f"{match[1]}\n{TABLES[match[2]]()}\n\n{match[3]}", page)


def main() -> None:
    for name in PAGES:
        path = Path(ROOT / name)
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
