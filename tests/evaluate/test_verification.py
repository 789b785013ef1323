"""verify, diff and report on a real artifact: what holds, what does not, and that each says which."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest

from compressor.core.artifact import Artifact
from compressor.core.options import RunOptions
from compressor.core.roles import folded
from compressor.evaluate.again import Given
from compressor.evaluate.judge import evaluate
from compressor.evaluate.verification import failures, verify
from compressor.report.difference import compare
from compressor.report.facts import StoredTensor, siblings, stored_tensors
from compressor.report.page import write_page
from compressor.run.pipeline import run
from tests import pico

RECIPE = """
passes: [{pass: affine, method: rtn, bits: 4, group: 16}]
calibration: {tokens: 256, window: 32}
embeddings: {bits: 4, group: 16}
evaluation: {tokens: 96, window: 32, speed: false}
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory, llama):
    """Two artifacts of one pico Llama, which differ in the bits of one layer."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "r.yaml").write_text(RECIPE)
    (folder / "calibration.txt").write_text(pico.text(1))
    (folder / "evaluation.txt").write_text(pico.text(2))
    known = {"data": str(folder / "calibration.txt"), "eval": str(folder / "evaluation.txt")}
    for name, sets in (("four", ()), ("eight", ("affine.bits=8",))):
        options = RunOptions(str(llama), str(folder / "r.yaml"), folder / name, sets=sets, **known)
        run(options)
    return folder


@pytest.fixture
def four(made, tmp_path):
    shutil.copytree(made / "four", tmp_path / "four")
    return tmp_path / "four"


def test_a_good_artifact_holds_in_every_respect(four):
    checks = verify(four)
    assert [(check.name, check.passed) for check in checks] == [
        ("hashes", True), ("files", True), ("figures", True), ("provenance", True), ("original", True), ("opens", True),
        ("weights", True), ("quality", True), ("verified", True),
    ]  # fmt: skip
    assert failures(checks) == ""
    assert "perplexity" in checks[-2].found
    assert checks[-1].found.startswith("weights and quality, against the original; read as compression.json names them")


def test_an_artifact_is_measured_on_as_many_tokens_as_one_likes(four):
    assert evaluate(four)["n_windows"] == 3
    assert evaluate(four, Given(tokens=160))["n_windows"] == 5


def changed(four: Path, name: str, value) -> None:
    report = json.loads((four / "compression.json").read_text())
    report[name] = value
    report.pop("seal", None)  # as of an artifact of before there were seals
    (four / "compression.json").write_text(json.dumps(report))


def flip(four: Path) -> None:
    content = bytearray((four / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (four / "model.safetensors").write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip, "hashes: model.safetensors has changed"),
        (lambda four: (four / "tokenizer.json").unlink(), "hashes: tokenizer.json is gone"),
        (lambda four: (four / "extra.bin").write_text("x"), "files: not of the artifact: extra.bin"),
        (lambda four: changed(four, "recipe", {"passes": [{"pass": "none"}]}), "provenance: .* no pass named 'none'"),
        (
            lambda four: changed(four, "sha256", {"../../etc/passwd": "0"}),
            "passwd is no file of the artifact",
        ),
        (lambda four: changed(four, "sha256", {}), "compression.json holds no hashes"),
        (
            lambda four: (four / "model.onnx").write_bytes(b"\x08\x08garbage"),
            "hashes: model.onnx has changed; figures: .*; opens: ",
        ),
    ],
)
def test_what_does_not_hold_is_named(four, damage, message):
    damage(four)
    assert re.search(message, failures(verify(four)))


def test_quality_that_is_not_what_was_recorded_is_found(four):
    quality = Artifact.open(four).report["quality"]
    wrong = quality["perplexity"] * 0.9
    changed(four, "quality", quality | {"perplexity": wrong, "ratio": wrong / quality["original_perplexity"]})
    assert re.fullmatch(r"quality: perplexity is \S+, was \S+", failures(verify(four)))
    assert failures(verify(four, measure=False)) == ""


def test_artifacts_are_compared_tensor_by_tensor(made):
    found = {each.name: each for each in compare(made / "four", made / "eight")}
    layer, norm = found["model.layers.1.mlp.up_proj.weight"], found["model.norm.weight"]
    assert layer.encodings == ("affine bits 4 group 16", "affine bits 8 group 16")
    assert layer.bytes[0] < layer.bytes[1]
    assert 0.02 < layer.error < 0.2
    assert not layer.same
    assert norm.same
    assert all(each.same for each in compare(made / "four", made / "four"))


def test_the_page_shows_every_layer_and_its_pictures_are_whole(made, tmp_path):
    artifact = Artifact.open(made / "four")
    assert [other.directory.name for other in siblings(artifact)] == ["eight"]
    write_page([made / "four", made / "eight"], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    pictures = [ElementTree.fromstring(text) for text in re.findall(r"<svg class=.*?</svg>", page, re.DOTALL)]
    texts = {"".join(text.itertext()) for picture in pictures for text in picture.iter("text")}
    assert {f"model.layers.{i}" for i in range(3)} | {"eight", "four", "the original", "encoding"} <= texts
    errors = [tensor for tensor in stored_tensors(artifact) if tensor.error is not None]
    circles = [circle for picture in pictures for circle in picture.iter("circle")]
    assert len(circles) == len(errors) + 3
    for circle in circles:
        assert 0 <= float(circle.get("cx")) <= 760
        assert 0 <= float(circle.get("cy")) <= 260
    assert not re.search(r"""https?://|url\(|@import|<(script|link|img|iframe)|\s(src|href)=""", page)


def test_where_files_lay_on_the_machine_is_not_in_the_page(made, four, tmp_path):
    assert "calibrated on" in (made / "four" / "report.html").read_text(encoding="utf-8")
    recipe = Artifact.open(four).report["recipe"] | {"policy_in": "/srv/secret/policy.pt", "other": ["C:\\secret\\x"]}
    changed(four, "recipe", recipe)
    changed(four, "data", {"calibration": "/srv/secret/my text.txt (first part)", "evaluation": "own/text.txt"})
    write_page([four], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "secret" not in page
    assert str(tmp_path.parent) not in page
    for name in ("policy.pt", "my text.txt (first part)", "own/text.txt"):
        assert name in page


def test_names_in_the_page_are_escaped(four, tmp_path):
    changed(four, "source", {"architecture": "<script>alert(1)</script>", "path": "&"})
    write_page([four], tmp_path / "page.html", title="<i>")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; by" in page
    assert "<i>" not in page


def test_layers_of_graphs_are_joined_by_their_numbers():
    """`layer_0` of an ONNX graph is a block as `layer.0` is; a layer that only has a number in its name is none."""
    names = ("encoder.layer_0.query.weight", "encoder.layer_11.query.weight", "fc_2.weight", "model.layers.3.up.weight")
    found = [StoredTensor(name, (4, 4), "dense", 64, 64.0, None) for name in names]
    assert [tensor.layer for tensor in found] == ["encoder.layer_0", "encoder.layer_11", "fc_2", "model.layers.3"]
    assert [tensor.kind for tensor in found] == ["query", "query", "fc_2", "up"]
    assert [folded(name) for name in names] == [
        "encoder.layer_*.query.weight", "encoder.layer_*.query.weight", "fc_2.weight", "model.layers.*.up.weight",
    ]  # fmt: skip
