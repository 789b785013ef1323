#!/usr/bin/env python
"""Fifty models in one batch, some of them broken; the same under Ray, a worker killed; two jobs at a time against one.

    scripts/fetch_material digits mobilenet minilm photos
    scripts/bench_batch.py [local] [ray] [throughput] [--repeats 3]

Real networks (a digit CNN as checkpoint and ONNX graph, MobileNetV2, MiniLM) and pico ones, by several recipes: 43
that are good, 5 broken in five different ways, 2 that miss a gate. Throughput is of 16 jobs with one thread each, with
--jobs 1 and --jobs 2 in turn; the best of each counts. Results go to docs/measured/batch.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from material import ROOT, model_dir
from measured import markdown, read_results, write_results

from compressor.core.machine import available_memory, cores

RECIPES = {
    "gptq4": "{pass: affine, method: gptq, bits: 4, group: 32}",
    "rtn8": "{pass: affine, bits: 8, group: row}",
    "codes2": "{pass: jlcm, width: 4, dim: 2, group: 32}",
}
REST = """
calibration: {samples: 64, tokens: 512, window: 32, token_importance: false}
embeddings: {bits: 4, group: 16}
evaluation: {samples: 64, tokens: 64, window: 32}
"""
GOOD, BROKEN, MISSED = 43, 5, 2
TEXTS = {"data": "calibration.txt", "eval": "evaluation.txt"}


class Code:
    """What nobody should run who reads a checkpoint."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path("executed"),))


def batch_table(results: dict[str, Any]) -> str:
    """What came of the batches, a row each."""
    titles = ["batch", "jobs", "good", "missed a gate", "unreadable", "exit status", "killed workers", "same bytes"]
    rows = [
        [title, sum(each["states"].values()), each["states"].get("done", 0), each["states"].get("a gate failed", 0),
         each["states"].get("unreadable input", 0), each["exit_status"], each.get("kills", 0),
         {None: None, True: "yes", False: "no"}[each.get("same_bytes")]]
        for key, title in (("local", "local, 2 jobs at a time"), ("ray", "Ray, two workers"))
        if (each := results.get(key))
    ]  # fmt: skip
    table = markdown(titles, rows)
    speed = results.get("throughput")
    if not speed:
        return table
    return (
        f"{table}\n\nThroughput of {speed['n_jobs']} jobs: {min(speed['seconds_1']):.0f} s with `--jobs 1`, "
        f"{min(speed['seconds_2']):.0f} s with `--jobs 2`, {speed['speedup']:.2f} times as fast on {speed['cores']} "
        f"cores; the same bytes: {'yes' if speed['same_bytes'] else 'no'}."
    )


def write_models(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The entries of a manifest that come to good, and those that do not."""
    from tests import pico
    from tests.onnx import graphs

    for name, step in RECIPES.items():
        (folder / f"{name}.yaml").write_text(f"passes: [{step}]\n{REST}")
    (folder / "calibration.txt").write_text(pico.text(1))
    (folder / "evaluation.txt").write_text(pico.text(2))
    images = np.random.default_rng(0)
    np.savez(folder / "digits.npz", x=images.normal(size=(96, 1, 28, 28)).astype(np.float32))
    np.savez(folder / "resnet.npz", x=images.normal(size=(96, 3, 16, 16)).astype(np.float32))
    np.savez(folder / "pixels.npz", pixels=graphs.images_data(96))
    np.savez(folder / "tokens.npz", input_ids=graphs.tokens_data(96))
    return [*_real(folder), *_pico(folder)], [*_missing(folder), *_broken(folder)]


def _recipes(*names: str) -> list[str]:
    return [f"{name}.yaml" if name in RECIPES else name for name in names]


def _real(folder: Path) -> Iterator[dict[str, Any]]:
    """Twelve jobs."""
    from bench_vision import crops

    digits = {"arch": "scripts.networks:digit_cnn", "data": "digits.npz"}
    yield {"path": str(model_dir("digits")), "name": "digits", **digits,
           "recipes": _recipes("gptq4", "rtn8", "codes2", "cnn-4bit", "cnn-int8")}  # fmt: skip
    from compressor.checkpoints import open_checkpoint

    module = open_checkpoint(model_dir("digits"), arch="scripts.networks:digit_cnn").build("cpu")
    free = torch.export.Dim.DYNAMIC
    torch.onnx.export(
        module, (torch.zeros(2, 1, 28, 28),), folder / "digits.onnx", dynamic_shapes=({0: free},), dynamo=True,
        external_data=False, verbose=False,
    )  # fmt: skip
    yield {"path": "digits.onnx", "name": "digits-onnx", "data": "digits.npz",
           "recipes": _recipes("gptq4", "codes2", "cnn-4bit", "cnn-int8")}  # fmt: skip
    photos = sorted(model_dir("photos").glob("imagenet_*"))
    np.savez(folder / "photos.npz", x=crops(photos, 12, 0))
    yield {"path": str(model_dir("mobilenet")), "name": "mobilenet", "data": "photos.npz",
           "recipes": _recipes("rtn8", "cnn-int8")}  # fmt: skip
    yield {"path": str(model_dir("minilm")), "name": "minilm", "recipes": _recipes("rtn8")}


def _pico(folder: Path) -> Iterator[dict[str, Any]]:
    """Thirty-one jobs."""
    from tests import pico
    from tests.onnx import graphs

    every = _recipes("gptq4", "rtn8", "codes2")
    for n_layers in (2, 3, 4, 5):
        name = f"llama{n_layers}"
        pico.llama(folder / name, n_layers=n_layers)
        yield {"path": name, "recipes": every, **TEXTS}
    for kind in (pico.gpt2, pico.bert, pico.albert):
        kind(folder / kind.__name__)
        yield {"path": kind.__name__, "recipes": every, **TEXTS}
    pico.write_state_dict(pico.ResNet, folder / "resnet.pt")
    yield {"path": "resnet.pt", "arch": "tests.pico:ResNet", "data": "resnet.npz", "recipes": [*every, "cnn-4bit"]}
    for make, data in ((graphs.tokens, "tokens.npz"), (graphs.images, "pixels.npz")):
        path = make(folder)
        yield {"path": path.name, "data": data, "recipes": every}


def _missing(folder: Path) -> Iterator[dict[str, Any]]:
    """Two that miss a gate: of size, of loss."""
    yield {"path": "llama2", "name": "too-large", "recipe": "rtn8.yaml", "gates": {"max_size": "10kB"}, **TEXTS}
    yield {"path": "llama3", "name": "too-bad", "recipe": "gptq4.yaml", "gates": {"max_loss": "0.001%"},
           "set": {"affine.bits": 2}, **TEXTS}  # fmt: skip


def _broken(folder: Path) -> Iterator[dict[str, Any]]:
    """Five, each in its own way: cut off, code in a pickle, NaN, without a config, quantised already."""
    from onnxruntime.quantization import quantize_dynamic
    from safetensors.torch import load_file, save_file

    for name in ("cut", "nan", "bare"):
        shutil.copytree(folder / "llama2", folder / name)
    weights = folder / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    tensors = load_file(folder / "nan" / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, folder / "nan" / "model.safetensors", {"format": "pt"})
    (folder / "bare" / "config.json").unlink()
    torch.save({"state_dict": {"w": torch.ones(2, 2)}, "x": Code()}, folder / "code.pt")
    quantize_dynamic(folder / "model.onnx", folder / "quantised.onnx")
    for name in ("cut", "nan", "bare"):
        yield {"path": name, "recipe": "rtn8.yaml", **TEXTS}
    yield {"path": "code.pt", "recipe": "rtn8.yaml", "arch": "tests.pico:ResNet", "data": "resnet.npz"}
    yield {"path": "quantised.onnx", "recipe": "rtn8.yaml", "data": "tokens.npz"}


def environment(folder: Path) -> dict[str, str]:
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "COMPRESSOR_HOME": str(folder / "home")}


def run_local(folder: Path, manifest: str, output: str, jobs: int) -> tuple[int, float]:
    """Exit status and seconds of `compress batch`."""
    words = ["batch", manifest, "-o", output, "--jobs", str(jobs)]
    began = time.monotonic()
    with (folder / f"{output}.log").open("w") as log:
        done = subprocess.run(
            [sys.executable, "-m", "compressor", *words], cwd=folder, env=environment(folder), stdout=log, stderr=log,
            check=False,
        )  # fmt: skip
    return done.returncode, time.monotonic() - began


def run_ray(folder: Path, manifest: str, output: str) -> tuple[int, int]:
    """Exit status of the same on a local Ray of two workers, one of which is killed; and how often one was."""
    import ray

    from compressor.batch.jobs import Batch, worst
    from compressor.batch.manifest import read_manifest
    from compressor.batch.summary import Board
    from compressor.runtime.workers import Budget, RayEngine

    os.environ.update(environment(folder))
    os.chdir(folder)
    jobs = read_manifest(Path(manifest))
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    kills: list[int] = []
    partials = {str((folder / output / f"{job.name}.partial" / ".lock").resolve()) for job in jobs}
    killer = threading.Thread(target=_kill_one, args=(partials, kills), daemon=True)
    killer.start()
    try:
        batch = Batch(jobs, Path(output), RayEngine("auto"), 2, Budget(available_memory()))
        outcomes = batch.run(Board(len(jobs), silent=True))
    finally:
        ray.shutdown()
    return worst(outcomes), len(kills)


def _kill_one(locks: set[str], kills: list[int]) -> None:
    """Ends the process that holds one of the locks, once, when some jobs are done."""
    began = time.monotonic()
    while not kills:
        time.sleep(0.05)
        if time.monotonic() - began < 20:
            continue
        for process in Path("/proc").glob("[0-9]*"):
            try:
                held = {os.readlink(each) for each in (process / "fd").iterdir()}
            except OSError:
                continue
            if held & locks and int(process.name) != os.getpid():
                os.kill(int(process.name), signal.SIGKILL)
                kills.append(int(process.name))
                break


def graphs(output: Path) -> dict[str, bytes]:
    """The bytes of every artifact, by path."""
    return {str(path.relative_to(output)): path.read_bytes() for path in sorted(output.glob("*/model.*"))}


def summary(output: Path) -> tuple[Counter, list[dict[str, Any]]]:
    lines = [json.loads(line) for line in (output / "summary.jsonl").read_text().splitlines()]
    return Counter(line["state"] for line in lines), lines


def checked(output: Path, status: int) -> dict[str, Any]:
    """What came of a batch; the program ends where it is not what should have."""
    states, lines = summary(output)
    wanted = {"done": GOOD, "a gate failed": MISSED, "unreadable input": BROKEN}
    artifacts = sum((output / line["job"]).is_dir() for line in lines)
    failed = sum((output / f"{line['job']}.failed").is_dir() for line in lines)
    if dict(states) != wanted or status != 3 or (artifacts, failed) != (GOOD, MISSED):
        for line in lines:
            print(line["state"], line["job"], line["message"][:200])
        sys.exit(f"{output}: {dict(states)}, {artifacts} artifacts, {failed} failed, status {status}; wanted {wanted}")
    messages = sorted(line["message"].partition(": ")[2][:90] for line in lines if line["status"] == 3)
    return {"states": dict(sorted(states.items())), "exit_status": status, "refusals": messages,
            "retried": sum(line["attempts"] > 1 for line in lines)}  # fmt: skip


def throughput(folder: Path, good: list[dict[str, Any]], repeats: int) -> dict[str, Any]:
    """Seconds of 16 jobs, one and two at a time, in turn."""
    small = [entry for entry in good if str(entry["path"]).startswith(("llama", "gpt2", "bert", "albert", "digits"))]
    short = [{key: value for key, value in entry.items() if key not in ("recipes", "name")} | {
        "recipe": recipe, "name": f"job{i}-{n}"} for n, entry in enumerate(small) for i, recipe in
        enumerate(entry["recipes"][:2])][:16]  # fmt: skip
    (folder / "short.yaml").write_text(yaml.safe_dump({"models": short, "set": {"evaluation.tokens": 0}}))
    seconds: dict[int, list[float]] = {1: [], 2: []}
    bytes_of: dict[int, dict[str, bytes]] = {}
    for _ in range(repeats):
        for jobs in (1, 2):
            shutil.rmtree(folder / f"jobs{jobs}", ignore_errors=True)
            status, spent = run_local(folder, "short.yaml", f"jobs{jobs}", jobs)
            if status:
                sys.exit(f"jobs{jobs}: status {status}; {(folder / f'jobs{jobs}.log').read_text()[-2000:]}")
            seconds[jobs].append(round(spent, 1))
            bytes_of[jobs] = graphs(folder / f"jobs{jobs}")
            print(f"--jobs {jobs}: {spent:.1f} s", flush=True)
    speedup = min(seconds[1]) / min(seconds[2])
    return {
        "n_jobs": len(short), "cores": cores(), "seconds_1": seconds[1], "seconds_2": seconds[2],
        "speedup": round(speedup, 3), "same_bytes": bytes_of[1] == bytes_of[2],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["local", "ray", "throughput"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="of the local batch")
    parser.add_argument("--folder", type=Path, help="to work in, and to keep")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = (options.folder or Path(scratch)).resolve()
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        good, bad = write_models(folder)
        (folder / "models.yaml").write_text(yaml.safe_dump({"models": [*good, *bad]}, sort_keys=False))
        if "local" in options.parts:
            status, spent = run_local(folder, "models.yaml", "local", options.jobs)
            found = checked(folder / "local", status) | {"seconds": round(spent, 1), "n_at_a_time": options.jobs}
            write_results("batch", read_results("batch") | {"local": found})
            print(found, flush=True)
        if "throughput" in options.parts:
            found = throughput(folder, good, options.repeats)
            write_results("batch", read_results("batch") | {"throughput": found})
            print(found, flush=True)
        if "ray" in options.parts:
            status, kills = run_ray(folder, "models.yaml", "ray")
            found = checked(folder / "ray", status) | {"kills": kills}
            if (folder / "local").is_dir():
                found["same_bytes"] = graphs(folder / "ray") == graphs(folder / "local")
            write_results("batch", read_results("batch") | {"ray": found})
            print(found, flush=True)
    if (folder / "executed").exists():
        sys.exit("code inside of a checkpoint was run")


if __name__ == "__main__":
    main()
