"""The examples of docs/examples, run as a reader would run them, on small networks."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from compressor.batch.manifest import read_manifest
from compressor.core.options import RunOptions
from compressor.core.tensors import EncodedTensors
from compressor.run.pipeline import run
from tests import pico

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "docs" / "examples"
QUICK = "calibration: {tokens: 1024, window: 64}\nevaluation: {tokens: 0}\n"


def example(*command: str | Path, text: str | None = None, **changes: str) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own, with the interpreter's folder first on the path."""
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), **changes}
    return subprocess.run(
        [str(part) for part in command], input=text, capture_output=True, text=True, env=environment, check=False
    )


def test_a_network_of_ones_own_gets_weights_of_8_bits_and_keeps_its_accuracy(tmp_path):
    done = example(sys.executable, EXAMPLES / "own_module.py", tmp_path)
    assert done.returncode == 0, done.stderr
    before, after = (int(n.replace(",", "")) for n in re.search(r"bytes: (\S+) -> (\S+)", done.stdout).groups())
    assert after < before / 2
    right, kept = map(int, re.search(r"right of 512: (\d+) -> (\d+)", done.stdout).groups())
    assert right > 460
    assert abs(right - kept) <= 10
    assert "INFO:compressor:export: " in done.stderr
    tensors = EncodedTensors([tmp_path / "small" / "model.safetensors"])
    assert [name for name in tensors if tensors.describe(name).get("bits") == 8]


@pytest.fixture(scope="module")
def talker(tmp_path_factory) -> Path:
    """The artifact of a pico language model by llm-2bit-fast."""
    folder = tmp_path_factory.mktemp("talker")
    (folder / "quick.yaml").write_text(f"name: quick\nimports: [llm-2bit-fast]\n{QUICK}")
    model = pico.llama(folder / "llama")
    (model / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return run(RunOptions(str(model), str(folder / "quick.yaml"), folder / "small")).directory


WITHOUT = "import sys; sys.modules.update(dict.fromkeys(['compressor', 'torch', 'transformers'])); "


def test_the_chat_needs_neither_torch_nor_compressor_and_remembers_the_conversation(talker):
    script = str(EXAMPLES / "chat.py")
    code = f"{WITHOUT}import runpy; sys.argv[0] = {script!r}; runpy.run_path(sys.argv[0], run_name='__main__')"

    def chat(*lines: str) -> list[str]:
        options = (talker, "--tokens", "12", "--temperature", "0")
        done = example(sys.executable, "-c", code, *options, text="".join(f"{line}\n" for line in lines))
        assert done.returncode == 0, done.stderr
        return done.stdout.split("\n> ")

    both = chat("the river", "old stone bridge")
    assert len(both) == 3 and all(text.strip(" >\n") for text in both[:2])
    assert chat("the river")[0] == both[0]
    assert chat("old stone bridge")[0] != both[1]  # which had the first question before it


def test_the_page_writes_in_a_browser_what_onnxruntime_writes(talker):
    """transformers.js in Chromium, the page and the artifact as they are; packages come from npm's registry."""
    done = example(
        sys.executable, ROOT / "scripts" / "check_hosts.py", talker, "--only", "transformers.js in Chromium",
        "--prompt", "the old stone bridge", "--tokens", "16", "--no-record",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1].partition("Chromium ")[2])
    if "absent" in found:
        pytest.skip(found["absent"])
    assert found["same"] and found["text"].strip()


def test_the_cache_of_the_chat_gives_what_the_whole_text_gives_at_once(talker, monkeypatch):
    """Tokens one by one, with the cache carried by hand, against the same tokens in one run of the graph."""
    import numpy as np

    monkeypatch.syspath_prepend(str(EXAMPLES))
    import chat

    tokens = [3, 140, 7, 200, 31, 8, 99]
    one_by_one, at_once = chat.Decoder(talker), chat.Decoder(talker)
    found = [one_by_one.read([token]) for token in tokens]
    assert one_by_one.n_seen == len(tokens)
    np.testing.assert_allclose(found[-1], at_once.read(tokens), atol=0.05 * np.abs(found[-1]).max())
    alone = chat.Decoder(talker).read(tokens[-1:])
    assert np.abs(alone - found[-1]).max() > 0.05 * np.abs(found[-1]).max()


def test_the_manifest_is_read_and_its_recipes_and_gates_are_known(tmp_path):
    (tmp_path / "models" / "chat").mkdir(parents=True)
    for name in ("models/photos.pth", "data/photos.npz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "models.yaml").write_text((EXAMPLES / "models.yaml").read_text())
    assert [job.name for job in read_manifest(tmp_path / "models.yaml")] == [
        "chat-llm-4bit", "chat-llm-2bit-fast", "photos-cnn-int8",
    ]  # fmt: skip


def test_a_batch_in_ci_ends_with_its_worst_status_and_checks_what_it_kept(tmp_path):
    pico.llama(tmp_path / "models" / "chat")
    (tmp_path / "quick.yaml").write_text(f"name: quick\nimports: [llm-4bit]\n{QUICK}")
    manifest = yaml.safe_load((EXAMPLES / "models.yaml").read_text())
    chat = manifest["models"][0] | {"recipes": ["quick.yaml"]}
    small = chat | {"name": "small", "gates": {"max_size": "1kB"}}
    (tmp_path / "models.yaml").write_text(yaml.safe_dump(manifest | {"gates": {}, "models": [chat, small]}))

    done = example(EXAMPLES / "batch_in_ci.sh", tmp_path / "models.yaml", tmp_path / "artifacts")
    assert done.returncode == 1, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "artifacts" / "summary.jsonl").read_text().splitlines()]
    assert {line["job"]: line["status"] for line in lines} == {"chat-quick": 0, "small-quick": 1}
    assert (tmp_path / "artifacts" / "small-quick.failed" / "report.html").is_file()
    assert "holds" in done.stdout  # what is asked of each artifact that passed, and of none that failed
    assert "fails" not in done.stdout

    weights = tmp_path / "artifacts" / "chat-quick" / "model.safetensors"
    (tmp_path / "models.yaml").write_text(yaml.safe_dump(manifest | {"gates": {}, "models": [chat]}))
    again = example(EXAMPLES / "batch_in_ci.sh", tmp_path / "models.yaml", tmp_path / "artifacts")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "1 kept." in again.stdout
    assert weights.stat().st_mtime < (tmp_path / "models.yaml").stat().st_mtime
