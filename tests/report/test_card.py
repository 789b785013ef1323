"""README.md of an artifact: the hub's metadata at its head, and what was measured."""

from __future__ import annotations

import pytest
import yaml

from compressor.checkpoints.card import card_of
from compressor.core.artifact import refuse_target
from compressor.core.errors import UsageError
from compressor.core.options import RunOptions
from compressor.evaluate.verification import failures, verify
from compressor.report.card import card
from compressor.run.pipeline import run
from tests import pico

RECIPE = "passes: [{pass: affine, method: rtn, bits: 4, group: 16}]\nevaluation: {tokens: 0, speed: false}\n"


def metadata(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("card")
    model = pico.llama(folder / "models--acme--tiny" / "snapshots" / "1")
    (model / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: 'en'\ntags: [a]\n---\n# Tiny\nlicense: mit\n")
    (folder / "r.yaml").write_text(RECIPE)
    return run(RunOptions(str(model), str(folder / "r.yaml"), folder / "small")).directory


def test_the_card_names_the_licence_the_original_and_the_task(artifact):
    found = metadata((artifact / "README.md").read_text())
    assert found == {
        "language": "en", "license": "apache-2.0", "base_model": "acme/tiny", "base_model_relation": "quantized",
        "pipeline_tag": "text-generation", "tags": ["compressor", "quantized", "onnx", "onnxruntime"],
    }  # fmt: skip


def test_whoever_publishes_may_write_on_in_it_and_force_does_not_destroy_that(artifact):
    refuse_target(artifact, force=True)
    written = (artifact / "README.md").read_text()
    (artifact / "README.md").write_text(f"{written}\nTrained by me.\n")
    assert not failures(verify(artifact, measure=False))
    with pytest.raises(UsageError, match=r"holds README.md, which is not of the artifact and would be lost"):
        refuse_target(artifact, force=True)
    (artifact / "README.md").write_text(written)


def test_a_page_that_is_made_again_does_not_make_a_card_ours_that_was_written_on(artifact, command):
    card, report = artifact / "README.md", artifact / "compression.json"
    before = {path: path.read_bytes() for path in (card, report, artifact / "report.html")}
    card.write_text("My own words.\n")
    assert command("report", str(artifact)).status == 0
    with pytest.raises(UsageError, match=r"holds README.md"):
        refuse_target(artifact, force=True)
    for path, content in before.items():
        path.write_bytes(content)


def test_names_are_no_markup():
    report = {"source": {"architecture": "<b>*x*</b>"}, "recipe": {"name": "a`b", "description": "![x](http://y)\n# z"}}
    found = card(report, "[t](u)\n---\nlicense: mit")
    assert found.count("---\n") == 2
    assert "\n# \\[t\\]\\(u\\) \\-\\-\\- license: mit\n" in found
    assert "<b>" not in found and "![" not in found and "`a'b`" in found


@pytest.mark.parametrize("text", [
    "", "# no head\nlicense: mit\n", "---\nlicense: mit\n", "---\nlicense: [mit]\nlanguage: &a x\n---\n",
    "---\nlicense: mit # free\n---\n", "---\n" + "a: b\n" * 20_000 + "license: mit\n---\n",
])  # fmt: skip
def test_of_a_strangers_card_only_plain_words_are_taken(tmp_path, text):
    (tmp_path / "README.md").write_text(text)
    assert card_of(tmp_path, {"_name_or_path": "/home/me/model"}) == {}
