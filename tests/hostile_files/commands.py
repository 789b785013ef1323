"""Command lines that read a file which somebody else wrote: every command that reads a model, a recipe or an artifact.

Used by scripts/fuzz.py, in forked processes and as processes of their own.
"""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests import pico
from tests.hostile_files.readers import READERS, Reader
from tests.onnx import graphs

RECIPE = """passes: [{pass: affine, method: rtn, bits: 4, group: 16}]
calibration: {tokens: 256, window: 32}
embeddings: {bits: 4, group: 16}
evaluation: {tokens: 128, window: 32}
"""


@dataclass(frozen=True)
class Command:
    """A command line in which FILE and FOLDER stand for the file that is wrong and the folder that it lies in.

    `format` is that of the file; `slow` says that it takes longer than a tenth of a second, however wrong the file is.
    """

    format: str
    write: Callable[[Path], Path]
    line: str
    slow: bool = False

    def arguments(self, file: Path) -> list[str]:
        places = {"FILE": str(file), "FOLDER": str(file.parent)}
        return [places.get(word, word.replace("FOLDER", str(file.parent))) for word in self.line.split()]

    @property
    def reader(self) -> Reader:
        return Reader(self.write, lambda path: None, self.format)


def _model(name: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / "q.yaml").write_text(RECIPE)
        return pico.llama(folder / "model", n_layers=1) / name

    return write


def _beside_a_recipe(write: Callable[[Path], Path]) -> Callable[[Path], Path]:
    def written(folder: Path) -> Path:
        (folder / "q.yaml").write_text(RECIPE)
        return write(folder)

    return written


def _state(folder: Path) -> Path:
    pico.write_state_dict(pico.Tied, folder / "tied.pt")
    return folder / "tied.pt"


def _recipe(folder: Path) -> Path:
    pico.llama(folder / "model", n_layers=1)
    (folder / "q.yaml").write_text(RECIPE)
    return folder / "q.yaml"


def _manifest(folder: Path) -> Path:
    _recipe(folder)
    (folder / "many.yaml").write_text(
        f"recipe: {folder}/q.yaml\nset: {{evaluation.tokens: 0}}\nmodels:\n  - {{path: {folder}/model, name: one}}\n"
    )
    return folder / "many.yaml"


@functools.cache
def made_artifact() -> Path:
    """A small artifact of a language model, beside its original and its data: made once, to be copied."""
    from compressor.core.options import RunOptions
    from compressor.run.pipeline import run

    folder = Path(tempfile.mkdtemp(prefix="compressor-fuzz-", dir=os.environ.get("COMPRESSOR_HOME")))
    (folder / "q.yaml").write_text(RECIPE)
    (folder / "calibration.txt").write_text(pico.text(1))
    (folder / "evaluation.txt").write_text(pico.text(2))
    source = pico.llama(folder / "model", n_layers=1)
    texts = {"data": str(folder / "calibration.txt"), "eval": str(folder / "evaluation.txt")}
    run(RunOptions(str(source), str(folder / "q.yaml"), folder / "artifact", **texts))
    return folder / "artifact"


def _artifact(name: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        shutil.copytree(made_artifact(), folder / "artifact")
        shutil.copytree(made_artifact(), folder / "other")
        return folder / "artifact" / name

    return write


DRY = "--dry-run --format safetensors"
_WEIGHTS, _REPORT, _GRAPH, _CONFIG = "model.safetensors", "compression.json", "model.onnx", "config.json"
COMMANDS = {
    "inspect zip": Command("zip", _state, "inspect FILE"),
    "run zip": Command("zip", _beside_a_recipe(_state), f"run FILE --arch tests.pico:Tied -r FOLDER/q.yaml {DRY}"),
    "inspect torchscript": Command("zip", READERS["torchscript"].write, "inspect FILE --arch tests.pico:Tied"),
    "inspect safetensors": Command("safetensors", _model(_WEIGHTS), "inspect FOLDER"),
    "run safetensors": Command("safetensors", _model(_WEIGHTS), f"run FOLDER -r FOLDER/../q.yaml {DRY}"),
    "inspect config": Command("json", _model(_CONFIG), "inspect FOLDER"),
    "run config": Command("json", _model(_CONFIG), f"run FOLDER -r FOLDER/../q.yaml {DRY}"),
    "run tokenizer": Command("json", _model("tokenizer.json"), f"run FOLDER -r FOLDER/../q.yaml {DRY}"),
    "inspect index": Command("json", READERS["index"].write, "inspect FILE"),
    "inspect gguf": Command("gguf", READERS["gguf"].write, "inspect FILE"),
    "run gguf": Command("gguf", _beside_a_recipe(READERS["gguf"].write), f"run FILE -r FOLDER/q.yaml {DRY}"),
    "inspect onnx": Command("onnx", graphs.tokens, "inspect FILE"),
    "run onnx": Command("onnx", _beside_a_recipe(graphs.tokens), f"run FILE -r FOLDER/q.yaml {DRY}"),
    "recipes": Command("yaml", _recipe, "recipes FILE"),
    "run recipe": Command("yaml", _recipe, f"run FOLDER/model -r FILE {DRY}"),
    "batch manifest": Command("yaml", _manifest, "batch FILE -o FOLDER/out --force -j 1 --timeout 60s", slow=True),
    "inspect report": Command("json", _artifact(_REPORT), "inspect FOLDER"),
    "verify report": Command("json", _artifact(_REPORT), "verify FOLDER --quick", slow=True),
    "report": Command("json", _artifact(_REPORT), "report FOLDER FOLDER/../other -o FOLDER/../page.html"),
    "diff report": Command("json", _artifact(_REPORT), "diff FOLDER FOLDER/../other"),
    "eval report": Command("json", _artifact(_REPORT), "eval FOLDER", slow=True),
    "eval config": Command("json", _artifact(_CONFIG), "eval FOLDER", slow=True),
    "generate tokenizer": Command("json", _artifact("tokenizer.json"), "generate FOLDER a -n 2", slow=True),
    "generate config": Command("json", _artifact(_CONFIG), "generate FOLDER a -n 2", slow=True),
    "inspect weights": Command("safetensors", _artifact(_WEIGHTS), "inspect FOLDER"),
    "diff weights": Command("safetensors", _artifact(_WEIGHTS), "diff FOLDER FOLDER/../other"),
    "report weights": Command("safetensors", _artifact(_WEIGHTS), "report FOLDER -o FOLDER/../page.html"),
    "verify weights": Command("safetensors", _artifact(_WEIGHTS), "verify FOLDER", slow=True),
    "generate weights": Command("safetensors", _artifact(_WEIGHTS), "generate FOLDER a -n 2", slow=True),
    "verify graph": Command("onnx", _artifact(_GRAPH), "verify FOLDER --quick", slow=True),
    "eval graph": Command("onnx", _artifact(_GRAPH), "eval FOLDER", slow=True),
    "generate graph": Command("onnx", _artifact(_GRAPH), "generate FOLDER a -n 2", slow=True),
    "bench graph": Command("onnx", _artifact(_GRAPH), "bench FOLDER --threads 1", slow=True),
}
