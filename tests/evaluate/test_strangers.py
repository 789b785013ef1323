"""Networks of many kinds through the command: each output is judged by what it is, and one that is damaged is found."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import transformers
from torch import nn

from compressor.cli.commands import main
from compressor.core.artifact import Artifact
from compressor.evaluate.again import Given, recipe_of
from compressor.evaluate.judge import evaluate
from compressor.run.gates import lost_quality
from tests import pico

RECIPE = """
passes: [{pass: affine, method: gptq, bits: 8, group: 16}]
calibration: {tokens: 128, window: 32, samples: 24}
embeddings: {bits: 8, group: 16}
evaluation: {samples: 40, speed: false}
gates: {max_loss: 20%}
"""


class Heads(nn.Module):
    """Vectors (batch, 70): a body, and what each subclass makes of it."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.body = nn.Linear(70, 90)
        self.heads = nn.ModuleList(nn.Linear(90, size) for size in sizes)

    def answers(self, x: torch.Tensor) -> list[torch.Tensor]:
        hidden = torch.tanh(self.body(x))
        return [head(hidden) for head in self.heads]


class Twofold(Heads):
    """Five classes, and a vector, in a dict."""

    def __init__(self) -> None:
        super().__init__(5, 24)

    def forward(self, x):
        logits, embedding = self.answers(x)
        return {"logits": logits, "embedding": embedding}


class Alarm(Heads):
    """How likely it is, in (0, 1)."""

    def __init__(self) -> None:
        super().__init__(1)

    def forward(self, x):
        return torch.sigmoid(self.answers(x)[0])


class Detector(Heads):
    """Six boxes, and of each how likely it shows each of four things, which do not exclude one another."""

    def __init__(self) -> None:
        super().__init__(24, 24)

    def forward(self, x):
        boxes, scores = self.answers(x)
        return {"boxes": boxes.reshape(-1, 6, 4).sigmoid() * 100, "scores": scores.reshape(-1, 6, 4).sigmoid()}


@dataclass(frozen=True)
class Stranger:
    """make      writes the network into a folder; returns arguments of the command
    kinds     of its outputs, in order
    damaged   the output that is damaged: the second where there are two
    measure   what the gate says of it
    """

    make: Callable[[Path], list[str]]
    kinds: dict[str, str]
    damaged: str
    measure: str


def bert(head: str, **settings: object) -> Callable[[Path], list[str]]:
    """One of transformers' classes, and texts."""

    def make(folder: Path) -> list[str]:
        config = transformers.BertConfig(
            vocab_size=pico.VOCABULARY, hidden_size=48, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=3, max_position_embeddings=64, **settings,
        )  # fmt: skip
        pico.saved(config, getattr(transformers, f"BertFor{head}"), folder / "network")
        for i, name in enumerate(("data", "eval")):
            (folder / f"{name}.txt").write_text(pico.text(1 + i, n_words=400))
        return [f"{folder}/network", "--data", f"{folder}/data.txt", "--eval", f"{folder}/eval.txt"]

    return make


def module(kind: type[nn.Module]) -> Callable[[Path], list[str]]:
    """A module of this file, and vectors."""

    def make(folder: Path) -> list[str]:
        pico.write_state_dict(kind, folder / "weights.pt")
        np.savez(folder / "data.npz", x=np.random.default_rng(0).standard_normal((200, 70)).astype(np.float32))
        return [f"{folder}/weights.pt", "--data", f"{folder}/data.npz", "--arch", f"{__name__}:{kind.__name__}"]

    return make


CLASSIFIER = "SequenceClassification"
STRANGERS = {
    "three classes": Stranger(bert(CLASSIFIER, num_labels=3), {"logits": "classes"}, "logits", "top-1 agreement"),
    "a regression": Stranger(
        bert(CLASSIFIER, num_labels=1, problem_type="regression"), {"logits": "values"}, "logits", "relative error"
    ),
    "one logit": Stranger(bert(CLASSIFIER, num_labels=1), {"logits": "scores"}, "logits", "relative error"),
    "token classes": Stranger(
        bert("TokenClassification", num_labels=5), {"logits": "tokens"}, "logits", "top-1 agreement"
    ),
    "spans": Stranger(
        bert("QuestionAnswering"), {"start_logits": "positions", "end_logits": "positions"}, "end_logits",
        "top-1 agreement of 'end_logits'",
    ),
    "two in a dict": Stranger(
        module(Twofold), {"logits": "classes", "embedding": "vectors"}, "embedding", "cosine of 'embedding'"
    ),
    "a sigmoid": Stranger(module(Alarm), {"output": "scores"}, "output", "relative error"),
    "boxes and scores": Stranger(
        module(Detector), {"boxes": "values", "scores": "scores"}, "scores", "relative error of 'scores'"
    ),
}  # fmt: skip


@pytest.fixture(params=STRANGERS, scope="module")
def compressed(request, tmp_path_factory) -> tuple[Stranger, Given, Path]:
    """A stranger, the code that builds it, and the artifact that the command made of it."""
    stranger, folder = STRANGERS[request.param], tmp_path_factory.mktemp("stranger")
    (folder / "recipe.yaml").write_text(RECIPE)
    words = stranger.make(folder)
    with pytest.raises(SystemExit) as ended:
        main([*words, "-r", f"{folder}/recipe.yaml", "-o", f"{folder}/out"])
    assert ended.value.code == 0
    return stranger, Given(arch=words[-1] if "--arch" in words else None), folder / "out"


def test_every_output_is_judged_by_what_it_is(compressed):
    stranger, _, artifact = compressed
    report = Artifact.open(artifact).report
    outputs, proved = report["quality"]["outputs"], report["proof"]["exact"]
    assert {name: found["kind"] for name, found in outputs.items()} == stranger.kinds
    assert all(0 < found["relative_error"] < 0.2 for found in outputs.values())
    assert set(proved.get("outputs", [proved["output"]])) == set(stranger.kinds)


def test_an_output_that_is_damaged_misses_its_gate(compressed, tmp_path):
    stranger, given, artifact = compressed
    gates = recipe_of(Artifact.open(artifact)).gates
    assert lost_quality(gates, evaluate(artifact, given)) == []
    shutil.copytree(artifact, tmp_path / "damaged")
    negate(tmp_path / "damaged" / "model.onnx", stranger.damaged)
    missed = lost_quality(gates, evaluate(tmp_path / "damaged", given))
    assert [each for each in missed if each.startswith(f"{stranger.measure} is ")]


def negate(path: Path, name: str) -> None:
    """Gives an output of a graph with the other sign; the weights beside it stay as they are."""
    graph = onnx.load(path, load_external_data=False)
    for node in graph.graph.node:
        for names in (node.input, node.output):
            names[:] = [f"{name}.right" if each == name else each for each in names]
    graph.graph.node.append(onnx.helper.make_node("Neg", [f"{name}.right"], [name]))
    onnx.save(graph, path)
