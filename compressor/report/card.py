"""README.md of an artifact: the model card that a hub shows, with what was measured and how to run it.

Whoever publishes an artifact may write on in it: it is not of what `verify` holds against compression.json.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from compressor.core.artifact import CARD, REPORT, Artifact
from compressor.core.files import write_text
from compressor.core.quantities import size
from compressor.report.facts import drawbacks, loss_of, searched_speed

TASKS = {
    "ForCausalLM": "text-generation", "LMHeadModel": "text-generation",
    "ForConditionalGeneration": "text2text-generation", "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification", "ForQuestionAnswering": "question-answering",
    "ForMaskedLM": "fill-mask", "ForImageClassification": "image-classification",
    "ForObjectDetection": "object-detection", "ForSemanticSegmentation": "image-segmentation",
    "ForAudioClassification": "audio-classification", "ForCTC": "automatic-speech-recognition",
}  # fmt: skip
"""The hub's names of tasks, by how transformers' classes end."""
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>()#+!|~&$-])")


def write_card(directory: Path, title: str) -> None:
    """Writes the card of the artifact in `directory`."""
    write_text(directory / CARD, card(Artifact.open(directory).report, title))


def card(report: dict[str, Any], title: str) -> str:
    """The card as Markdown, with the hub's metadata at its head."""
    source, recipe = report.get("source") or {}, report.get("recipe") or {}
    architecture = str(source.get("architecture", "a network"))
    said = f"{_plain(architecture)} made small by compressor's recipe `{_code(recipe.get('name', ''))}`. "
    said += _plain(recipe.get("description", ""))
    rows = [f"| {' | '.join(row)} |" for row in (("", "original", "this"), (":--", "--:", "--:"), *_figures(report))]
    worse = [f"**{_plain(each[0].upper() + each[1:])}.**\n" for each in drawbacks(report)]
    head = yaml.safe_dump(_metadata(report), sort_keys=False, allow_unicode=True)
    return "\n".join([
        f"---\n{head}---\n", f"# {_plain(title)}\n", f"{said}\n", *worse, *rows, "", _how_to_run(report),
        f"All that was done and measured, with hashes, is in `{REPORT}`; `report.html` shows it in pictures.",
    ]) + "\n"  # fmt: skip


def _metadata(report: dict[str, Any]) -> dict[str, Any]:
    source = report.get("source") or {}
    stated = source.get("card") or {}
    found: dict[str, Any] = {key: stated[key] for key in sorted(stated) if key != "base_model"}
    if "base_model" in stated:
        found |= {"base_model": stated["base_model"], "base_model_relation": "quantized"}
    task = next((task for end, task in TASKS.items() if str(source.get("architecture")).endswith(end)), None)
    if task:
        found["pipeline_tag"] = task
    graph = "model.onnx" in ((report.get("size") or {}).get("files") or {})
    return found | {"tags": ["compressor", "quantized", *(["onnx", "onnxruntime"] if graph else [])]}


def _figures(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    sizes, quality = report.get("size") or {}, report.get("quality") or {}
    rows = []
    if sizes:
        before, after = sizes.get("original_bytes"), sizes.get("bytes", 0)
        rows.append(("size, every file", "" if before is None else size(before), size(after)))
    for key, name in (("perplexity", "perplexity"), ("accuracy", "accuracy")):
        if quality.get(key) is not None and quality.get(f"original_{key}") is not None:
            rows.append((name, f"{quality[f'original_{key}']:.4g}", f"{quality[key]:.4g}"))
    loss = loss_of(report)
    if loss is not None:
        rows.append((_plain(loss.what), "", f"{loss.value:.2%}"))
    speeds = [report.get(key) or {} for key in ("original_speed", "speed")]
    for key, name in (("decode_tokens_per_second", "tokens/s"), ("latency_seconds", "latency, s"),
                      ("load_seconds", "load, s")):  # fmt: skip
        if speeds[1].get(key):
            rows.append((name, *(f"{speed[key]:.3g}" if speed.get(key) else "" for speed in speeds)))
    searched = searched_speed(report)
    if searched is not None:
        rows.append((f"latency, {searched.what}, s", f"{searched.original:.3g}", f"{searched.latency:.3g}"))
    peaks = [(speed.get("memory") or {}).get("peak_private") for speed in speeds]
    if peaks[1]:
        rows.append(("memory in use, peak", *(size(peak) if peak else "" for peak in peaks)))
    return rows


def _how_to_run(report: dict[str, Any]) -> str:
    files, least = (report.get("size") or {}).get("files") or {}, report.get("least_onnxruntime")
    if "model.onnx" not in files:
        return (
            '```python\nimport compressor\n\nmodule = compressor.load("DIRECTORY")  # an ordinary torch module\n```\n'
        )
    which = f"onnxruntime {least} or newer" if least else "onnxruntime"
    lines = [
        f"Runs in {which}, unmodified; `model.onnx` and `model.safetensors` belong together:\n", "```python",
        "import onnxruntime", "", 'session = onnxruntime.InferenceSession("model.onnx")', "```\n",
    ]  # fmt: skip
    if "genai_config.json" in files:
        lines.append("The directory is one of onnxruntime-genai's, of optimum's `ORTModelForCausalLM`, and of "
                     "transformers.js too.\n")  # fmt: skip
    return "\n".join(lines)


def _plain(text: object) -> str:
    """Text in which nothing is markup, on one line."""
    return _SPECIAL.sub(r"\\\1", " ".join(str(text).split()))


def _code(text: object) -> str:
    return " ".join(str(text).replace("`", "'").split())
