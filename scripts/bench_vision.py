#!/usr/bin/env python
"""MobileNetV2 by the recipe cnn-int8: bytes, agreement with the original, and speed beside it in the same run.

    scripts/fetch_material mobilenet photos
    pip install pillow
    scripts/bench_vision.py [--crops 400] [--repeats 60]
    scripts/bench_vision.py --sums          on a processor without VNNI: what its saturating sums cost

Calibrated on random crops of ten ImageNet photos. Agreement is with the original's predictions, and needs no labels: on
crops of the ten other photos; on the twenty photos whole, with their labels; on forty CIFAR pictures, enlarged, which
are nothing like what was calibrated on. Speed is of one image in onnxruntime, original and artifact in turn, medians.
Results go to docs/measured/vision.json.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from material import model_dir
from measured import cached, interleaved, markdown, number, read_results, write_results

from compressor.checkpoints import open_checkpoint
from compressor.core.options import RunOptions
from compressor.data.images import MEAN, STD, Preprocessing, _pixels
from compressor.evaluate.bench import size
from compressor.evaluate.language import log_softmax
from compressor.evaluate.original import export_original
from compressor.evaluate.session import ModuleSession, open_session
from compressor.run.pipeline import run

RECIPE, N_CALIBRATION, SIDE = "cnn-int8", 256, 224


def normalised(pixels: np.ndarray) -> np.ndarray:
    return ((pixels.astype(np.float32) / 255 - MEAN) / STD).transpose(2, 0, 1)


def crops(files: list[Path], n: int, seed: int) -> np.ndarray:
    """Random squares of half to all of a photo's short side, half of them mirrored: float32 (n, 3, 224, 224)."""
    from PIL import Image

    generator, found = np.random.default_rng(seed), []
    for i in range(n):
        with Image.open(files[i % len(files)]) as photo:
            side = min(photo.size) * generator.uniform(0.5, 1)
            x, y = (generator.uniform(0, length - side) for length in photo.size)
            box = (x, y, x + side, y + side)
            image = photo.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR, box=box)
        pixels = np.asarray(image)
        found.append(normalised(pixels[:, ::-1] if generator.random() < 0.5 else pixels))
    return np.stack(found)


def enlarged(files: list[Path]) -> np.ndarray:
    from PIL import Image

    images = [Image.open(file).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR) for file in files]
    return np.stack([normalised(np.asarray(image)) for image in images])


def logits(session: ModuleSession, images: np.ndarray) -> np.ndarray:
    name = session.outputs[0]
    return np.concatenate([session.run({"input": images[i : i + 1]}, [name])[name] for i in range(len(images))])


def agreement(found: np.ndarray, original: np.ndarray) -> dict[str, Any]:
    """Of the largest logit, of the centred logits by cosine, and the KL divergence of the predictions in nats."""
    a, b = (each.astype(np.float64) - each.mean(1, keepdims=True) for each in (found, original))
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    divergence = [(np.exp(log_softmax(q)) * (log_softmax(q) - log_softmax(p))).sum() for p, q in zip(a, b, strict=True)]
    return {
        "n": len(a), "top1": round(float((a.argmax(1) == b.argmax(1)).mean()), 4),
        "cosine": round(float(cosine.mean()), 4), "kl_divergence": round(float(np.mean(divergence)), 4),
    }  # fmt: skip


def latencies(directories: dict[str, Path], image: np.ndarray, threads: int, repeats: int) -> dict[str, float]:
    """Median milliseconds of each, and of the ratio of neighbouring runs."""
    seconds = interleaved(directories, {"input": image}, threads, repeats)
    ratios = [a / b for a, b in zip(seconds["original"], seconds[RECIPE], strict=True)]
    medians = {f"{name}_ms": round(1e3 * statistics.median(times), 2) for name, times in seconds.items()}
    return medians | {"times_faster": round(statistics.median(ratios), 2)}


def vision_table(results: dict[str, Any]) -> str:
    """Original and artifact, side by side."""
    speed, agreed, name = results["speed"], results["agreement"], results["recipe"]
    rows: list[list[object]] = [
        ["bytes, every file", f"{results['original_bytes']:,}", f"{results['bytes']:,}"],
        ["right on 20 ImageNet photos", results["photos_top1"]["original"], results["photos_top1"][name]],
    ]
    for kind, found in agreed.items():
        cell = f"{100 * found['top1']:.1f} %, {found['cosine']:.4f}, {found['kl_divergence']:.3f}"
        rows.append([f"top-1 agreement, cosine, KL: {found['n']} {kind}", None, cell])
    for threads, found in speed.items():
        times = f"{number(found[f'{name}_ms'], 2)} ms, {found['times_faster']:.2f} × as fast"
        rows.append([f"one image, threads: {threads[-1]}", f"{number(found['original_ms'], 2)} ms", times])
    return markdown(["MobileNetV2, 224 px", "original, float32", name], rows)


def has_vnni() -> bool:
    """Whether the processor adds products of bytes in 32 bits, as far as Linux tells."""
    return "vnni" in Path("/proc/cpuinfo").read_text(encoding="utf-8")


def saturating_sums(target: Path, original: Path, images: np.ndarray) -> dict[str, Any]:
    """The artifact beside the original, with the kernel's own sums of int8 products and with exact ones."""
    found: dict[str, Any] = {"vnni": has_vnni()}
    wanted = logits(open_session(original), images)
    for name, precise in (("own", "0"), ("exact", "1")):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.add_session_config_entry("session.x64quantprecision", precise)
        session = onnxruntime.InferenceSession(target / "model.onnx", options)
        fed = session.get_inputs()[0].name
        began = time.perf_counter()
        outputs = np.concatenate([session.run(None, {fed: image[None]})[0] for image in images])
        seconds = (time.perf_counter() - began) / len(images)
        found[name] = agreement(outputs, wanted) | {"ms": round(1e3 * seconds, 2)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--crops", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--sums", action="store_true")
    arguments = parser.parse_args()
    model, photos = model_dir("mobilenet"), sorted(model_dir("photos").glob("imagenet_*.jpg"))
    folder = cached("vision")
    data = folder / "calibration.npz"
    np.savez(data, image=crops(photos[::2], N_CALIBRATION, 0))
    target = folder / RECIPE
    began = time.process_time()
    run(RunOptions(model=str(model), recipe=RECIPE, data=str(data), output=target, force=True,
                   sets=("evaluation.tokens=0",)))  # fmt: skip
    seconds = time.process_time() - began
    sets = {
        "crops of other photos": crops(photos[1::2], arguments.crops, 3),
        "photos": np.stack([_pixels(file, Preprocessing()) for file in photos]),
        "CIFAR, enlarged": enlarged(sorted(model_dir("photos").glob("cifar10*_*.png"))),
    }
    labels = np.array([int(file.stem.split("_")[2]) for file in photos])
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        original = Path(scratch)
        export_original(open_checkpoint(model), original, [{"": torch.zeros(1, 3, SIDE, SIDE)}])
        if arguments.sums:
            found = saturating_sums(target, original, sets["crops of other photos"])
            write_results("vision", read_results("vision") | {"sums": found})
            print(found)
            return
        directories = {"original": original, RECIPE: target}
        outputs = {
            kind: [logits(open_session(path), images) for path in directories.values()] for kind, images in sets.items()
        }
        speed = {
            f"threads_{n}": latencies(directories, sets["photos"][:1], n, arguments.repeats) for n in (1, 2)
        }  # fmt: skip
    whole = outputs["photos"]
    results = {
        "model": "MobileNetV2, torchvision's weights, 224 px", "recipe": RECIPE, "onnxruntime": onnxruntime.__version__,
        "original_bytes": model.stat().st_size, **size(target), "cpu_seconds": round(seconds, 1),
        "agreement": {kind: agreement(found, wanted) for kind, (wanted, found) in outputs.items()},
        "photos_top1": {"original": int((whole[0].argmax(1) == labels).sum()),
                        RECIPE: int((whole[1].argmax(1) == labels).sum()), "n": len(labels)},
        "speed": speed,
    }  # fmt: skip
    write_results("vision", read_results("vision") | results)
    print(results)
    shutil.copy2(target / "compression.json", folder / "compression.json")


if __name__ == "__main__":
    main()
