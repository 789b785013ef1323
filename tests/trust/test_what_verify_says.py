"""`verify` says what it checked, notices what was changed with its hashes, and fails where it could check nothing."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from compressor.core.artifact import Artifact, damaged_files, refuse_target
from compressor.core.errors import CheckpointError, UsageError
from compressor.core.options import RunOptions
from compressor.evaluate.again import Given
from compressor.evaluate.verification import failures, verify
from compressor.run.pipeline import run
from tests import pico

NOTHING = "verified: only that the artifact agrees with itself"


def found(directory: Path, **given: str) -> dict[str, tuple[bool | None, str]]:
    return {check.name: (check.passed, check.found) for check in verify(directory, True, Given(**given))}


def with_other_weights(report: dict) -> None:
    """Weights that somebody has changed, and every hash and size with them."""
    content = bytearray(Path("text/model.safetensors").read_bytes())
    content[-5000:] = bytes(5000)
    Path("text/model.safetensors").write_bytes(content)
    report["sha256"]["model.safetensors"] = hashlib.sha256(content).hexdigest()


def without(*keys: str):
    def change(report: dict) -> None:
        with_other_weights(report)
        for key in keys:
            report.pop(key, None)

    return change


def without_evaluation(report: dict) -> None:
    without("quality")(report)
    report["recipe"]["evaluation"]["tokens"] = 0
    report["data"]["evaluation"] = None


def nor_errors(report: dict) -> None:
    without_evaluation(report)
    report.pop("errors")


def elsewhere(report: dict) -> None:
    with_other_weights(report)
    report["source"]["path"] = "/nowhere"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_other_weights, "weights: .* is .* from the original's, was"),
        (without("errors"), "quality: perplexity is .*, was"),
        (without("quality"), "weights: .*; quality: compression.json holds none, though its recipe and its data say"),
        (without("quality", "errors"), "quality: compression.json holds none, though its recipe"),
        (without_evaluation, "weights: "),
        (nor_errors, NOTHING),
        (elsewhere, NOTHING),
    ],
)
def test_weights_that_were_changed_with_their_hashes_are_noticed(sent, change, message):
    import re

    assert re.search(message, failures(verify(sent("text", change))))


def test_where_nothing_can_be_compared_nothing_was_verified(command, sent):
    def change(report: dict) -> None:
        report["source"]["path"] = "/nowhere"

    sent("text", change)
    said = command("verify text --json")
    checks = {check["name"]: check["passed"] for check in json.loads(said.out)}
    assert said.status == 5
    assert (checks["original"], checks["weights"], checks["quality"], checks["verified"]) == (None, None, None, False)
    assert command("verify text --quick").status == 0


def test_an_original_that_has_moved_is_given(command, sent, llama, checkpoints, here):
    def change(report: dict) -> None:
        report["source"]["path"] = "/nowhere"

    sent("text", change)
    moved = Path(shutil.copytree(checkpoints("llama", n_layers=2), here / "moved"))
    assert command("verify text --original moved").status == 0
    assert command("eval text --original moved").status == 0
    assert "is not what it was compressed from" in command("verify", "text", "--original", str(llama)).err
    weights = load_file(moved / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, moved / "model.safetensors", {"format": "pt"})
    assert "original: moved is not what it was compressed from" in command("verify text --original moved").err


def test_data_that_are_others_now_are_no_reason_to_doubt_the_artifact(sent, made, here):
    def change(report: dict) -> None:
        report["data"]["arguments"]["eval"] = str(here / "evaluation.txt")

    (here / "evaluation.txt").write_text(pico.text(9, 400))
    checks = found(sent("text", change))
    assert checks["quality"] == (None, "not measured again: the data are not those that it was evaluated on")
    assert checks["verified"][0] is True
    assert found(here / "text", evaluation=str(made / "evaluation.txt"))["quality"][0] is True


FIGURES = {
    "size": lambda report: report["size"].update(bytes=1000),
    "a file's size": lambda report: report["size"]["files"].update({"model.onnx": 5}),
    "the ratio": lambda report: report["quality"].update(ratio=1.0),
    "the verdict": lambda report: report["gates"].update(failures=["perplexity ratio is 3, the gate is 2"]),
}


@pytest.mark.parametrize("kind", FIGURES)
def test_figures_that_do_not_fit_the_files_or_each_other_are_noticed(sent, kind):
    assert "figures: " in failures(verify(sent("text", FIGURES[kind])))


@pytest.mark.parametrize("place", [("speed",), ("cost", "export", "seconds"), ("size", "original_bytes"), ("seed",)])
def test_any_figure_that_was_changed_alone_is_noticed(sent, place):
    directory = sent("text")
    report = json.loads((directory / "compression.json").read_text())
    inner = report
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = {"decode_tokens_per_second": 99999.0} if place == ("speed",) else 7
    (directory / "compression.json").write_text(json.dumps(report))
    assert failures(verify(directory)).startswith("hashes: compression.json has changed")
    assert damaged_files(Artifact.open(directory)) == ["compression.json has changed"]


def test_the_page_is_covered_and_made_again_and_may_be_left_out(command, sent):
    directory = sent("text")
    page = directory / "report.html"
    page.write_text(page.read_text().replace("</body>", "<script>alert(1)</script></body>"))
    assert "hashes: report.html has changed" in command("verify text --quick").err
    assert command("report text").status == 0
    assert command("verify text --quick").status == 0
    page.unlink()
    assert command("verify text --quick").status == 0


def test_a_page_is_not_made_over_a_report_that_was_changed(command, sent):
    directory = sent("text")
    text = (directory / "compression.json").read_text().replace('"seed": 0', '"seed": 1')
    (directory / "compression.json").write_text(text)
    before = (directory / "report.html").read_bytes()
    assert command("report text").status == 3
    assert (directory / "report.html").read_bytes() == before
    assert command("report text -o elsewhere.html").status == 0
    with pytest.raises(CheckpointError, match="nowhere: is no artifact"):
        Artifact.open("nowhere")


def test_force_replaces_an_artifact_and_nothing_else(made, sent):
    directory = sent("images")
    (directory / "thesis.tex").write_text("the only copy")
    with pytest.raises(UsageError, match="images: holds thesis.tex, which is not of the artifact and would be lost"):
        run(RunOptions(str(made / "cnn.pt"), str(made / "network.yaml"), directory, data=str(made / "images.npz"),
                       arch="tests.pico:ResNet", force=True))  # fmt: skip
    assert (directory / "thesis.tex").read_text() == "the only copy"
    (directory / "thesis.tex").unlink()
    (directory / "compression.json").write_text("damaged")
    refuse_target(directory, force=True)
