#!/usr/bin/env python
"""Compressed gradients against dense ones: bytes on the loopback device, accuracy, and what each part is worth.

    scripts/fetch_material fashion
    unshare -rn sh -c 'ip link set lo up && scripts/bench_traffic.py [--images 10000] [--epochs 10] [--seeds 1]
                       [--processes 2] [--only NAME …] [--minutes 60]'

He et al.'s ResNet-20 of width 16 on Fashion-MNIST, from random weights, in processes of one thread over gloo. Images
are averaged over squares of `--pool` pixels first. Bytes are what /proc/net/dev counts for the loopback device, headers
and acknowledgements with it, and every other process's traffic as well: `unshare -rn` gives the benchmark a device of
its own. A seed is the weights' and the order of the batches. Accuracy is of torch on the whole test set. `killed` ends
two processes with SIGKILL in the middle of a training, and starts it again. What is finished stays in the cache.
Results go to docs/measured/traffic.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from bench_once import pooled
from measured import cached, markdown, number, read_results, write_results
from networks import resnet20
from torch import nn

from compressor.core.batch import Examples
from compressor.learning import trainer
from compressor.learning.trainer import Fitting
from compressor.passes.settings.lrp import LrpSettings
from compressor.runtime.torchrun import process_group, rank, wait

TRAINING: dict[str, Any] = {
    "batch": 32, "loss": "labels", "optimizer": "SGD", "rate": 0.1,
    "options": {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4},
}  # fmt: skip
PAPER = [0.25, 0.0625, 0.015625, 0.004]
"""The paper's warm-up, an epoch each."""
VARIANTS: dict[str, dict[str, Any]] = {
    "dense": {},
    "compressed": {"compression": {}},
    "warm-up": {"compression": {"warmup": PAPER}},
    "warm-up, masking paper": {"compression": {"warmup": PAPER, "masking": "paper"}},
    "masking never": {"compression": {"masking": "never"}},
    "clip 1": {"compression": {"clip": 1.0}},
    "no momentum, rate × 10": {"compression": {}, "rate": 1.0, "options": {"weight_decay": 5e-4}},
}
"""Rows of the table; all but the first compress."""


def settings_of(name: str, epochs: int) -> LrpSettings:
    """Of a training; the pass does not matter, only that it trains."""
    chosen = VARIANTS[name]
    gradients = {"gradients": "compressed"} if "compression" in chosen else {}
    return LrpSettings(**{"epochs": epochs, **TRAINING, **chosen, **gradients})


def loopback() -> int:
    """Bytes that the loopback device has sent."""
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split()[9])


def accuracy(module: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """The share of images whose class is right."""
    with torch.no_grad():
        found = torch.cat([module(part).argmax(1) for part in images.split(500)])
    return round(float((found == labels).float().mean()), 4)


def work(name: str, images: int, pool: int, epochs: int, seed: int, target: Path, saves: float) -> None:
    """One of the processes of a training; the first writes what it came to."""
    trainer.SECONDS_BETWEEN_SAVES = saves
    torch.set_num_threads(1)
    data, labels = (torch.from_numpy(each) for each in pooled("train", images, pool))
    torch.manual_seed(seed)
    module, marks = resnet20(), []
    with process_group():
        loop = Fitting(module, Examples({"": data}, labels), settings_of(name, epochs), seed,
                       target.with_suffix(".training"), lambda share, note: None)  # fmt: skip
        epoch = loop._epoch

        def marked(step: int, loss: float, follower: None) -> dict[str, float]:
            wait()
            marks.append(loopback())
            return epoch(step, loss, follower)

        loop._epoch = marked
        wait()
        marks.append(loopback())
        began = time.process_time()
        log = loop.train()
        if rank():
            return
        test = [torch.from_numpy(each) for each in pooled("t10k", None, pool)]
        found = {
            "accuracy": accuracy(module, *test), "losses": [entry["loss"] for entry in log],
            "bytes": [b - a for a, b in pairwise(marks)], "steps": loop.steps_per_epoch,
            "cpu_seconds": round(time.process_time() - began, 1),
            "weights": hashlib.sha256(b"".join(t.numpy().tobytes() for t in module.state_dict().values())).hexdigest(),
        }  # fmt: skip
        target.write_text(json.dumps(found))


def started(processes: int, arguments: list[str]) -> list[subprocess.Popen]:
    """The processes of a training, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = os.environ | {
        "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    command = [sys.executable, __file__, "--work", *arguments]
    return [subprocess.Popen(command, env=shared | {"RANK": str(number)}) for number in range(processes)]


def ended(running: list[subprocess.Popen]) -> None:
    """Waits for them all.

    Raises:
        SystemExit: One failed.
    """
    if any(process.wait() for process in running):
        raise SystemExit("a training failed")


def trained(name: str, processes: int, target: Path, arguments: list[str]) -> dict[str, Any]:
    """What a training came to, done once."""
    if not target.is_file():
        ended(started(processes, [name, *arguments, str(target)]))
    return json.loads(target.read_text())


def killed(folder: Path) -> dict[str, Any]:
    """Two epochs of 2,000 images at once, and killed on the way and begun again."""
    arguments = ["2000", "2", "2", "0"]
    whole = trained("compressed", 2, folder / "whole.json", arguments)
    target = folder / "killed.json"
    if not target.is_file():
        running = started(2, ["compressed", *arguments, str(target), "--saves", "0"])
        while not (target.with_suffix(".training") / trainer.STATE).is_file():
            time.sleep(0.05)
        time.sleep(1.0)
        for process in running:
            process.send_signal(signal.SIGKILL)
        for process in running:
            process.wait()
        ended(started(2, ["compressed", *arguments, str(target)]))
    again = json.loads(target.read_text())
    return {"same weights": again["weights"] == whole["weights"], "same losses": again["losses"] == whole["losses"]}


def traffic_table(results: dict[str, Any]) -> str:
    """A row per variant and number of processes."""
    rows: list[list[object]] = []
    for name, entries in results["trainings"].items():
        dense = results["trainings"][f"dense, {name.rpartition(', ')[2]}"][0]
        first = entries[0]
        accuracies = [100 * entry["accuracy"] for entry in entries]
        per_step, reference = first["bytes"][-1] / first["steps"], dense["bytes"][-1] / dense["steps"]
        rows.append([
            name, " ".join(f"{each:.2f}" for each in accuracies), number(statistics.mean(accuracies), 2),
            number(statistics.mean(entry["losses"][-1] for entry in entries), 3), f"{per_step / 1e3:,.1f}",
            f"{reference / per_step:,.1f}", f"{sum(dense['bytes']) / sum(first['bytes']):,.1f}",
            number(statistics.median(entry["cpu_seconds"] for entry in entries), 0),
        ])  # fmt: skip
    titles = ["gradients, processes", "accuracy, seeds", "mean %", "training loss, last epoch", "KB a step, last epoch",
              "fewer than dense", "fewer in all", "CPU-seconds of one process"]  # fmt: skip
    head = (
        f"ResNet-20 of width 16 from random weights, {results['images']:,} images of {results['side']}×"
        f"{results['side']}, {results['epochs']} epochs ({results['steps']:,} steps of {TRAINING['batch']}); bytes on "
        "the loopback device, of all processes together.\n\n"
    )
    ending = "" if "killed" not in results else "\n\nKilled and begun again: " + ", ".join(
        f"{what}: {'yes' if held else 'no'}" for what, held in results["killed"].items()
    ) + "."  # fmt: skip
    return head + markdown(titles, rows) + ending


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--pool", type=int, default=2, choices=[1, 2, 4])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--only", nargs="*", choices=[*VARIANTS, "killed"], help="the others as far as they are there")
    parser.add_argument("--minutes", type=float, default=1e9, help="after which no further training is begun")
    parser.add_argument("--work", nargs=6, help=argparse.SUPPRESS)
    parser.add_argument("--saves", type=float, default=trainer.SECONDS_BETWEEN_SAVES, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.work:
        name, *sizes, target = asked.work
        work(name, *(int(size) for size in sizes), Path(target), asked.saves)
        return
    began = time.monotonic()
    folder = cached(f"traffic/{asked.images}-{asked.pool}-{asked.epochs}")
    results = read_results("traffic")
    trainings: dict[str, list[dict[str, Any]]] = results.get("trainings", {})
    for seed in range(asked.seeds):
        for name in VARIANTS:
            target = folder / f"{name}-{asked.processes}-{seed}.json".replace(" ", "-").replace(",", "")
            wanted = asked.only is None or name in asked.only
            if not target.is_file() and (not wanted or time.monotonic() - began > 60 * asked.minutes):
                continue
            sizes = [asked.images, asked.pool, asked.epochs, seed]
            found = trained(name, asked.processes, target, [str(size) for size in sizes])
            row = trainings.setdefault(f"{name}, {asked.processes}", [])
            row[seed : seed + 1] = [found]
            print(name, seed, found["accuracy"], found["bytes"][-1] / found["steps"], found["cpu_seconds"], flush=True)
    results |= {
        "images": asked.images, "side": 28 // asked.pool, "epochs": asked.epochs, **TRAINING,
        "steps": asked.images // TRAINING["batch"] * asked.epochs, "trainings": trainings,
    }  # fmt: skip
    if asked.only is None or "killed" in asked.only:
        results["killed"] = killed(cached("traffic/killed"))
        print(results["killed"], flush=True)
    write_results("traffic", results)
    print(traffic_table(results))


if __name__ == "__main__":
    main()
