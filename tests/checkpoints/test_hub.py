"""Models by their names on a hub: a server on this machine plays it, and nothing else is asked."""

from __future__ import annotations

import json
import shutil
import threading
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from compressor.checkpoints import hub, open_checkpoint
from compressor.core.errors import CheckpointError
from compressor.core.model_names import hub_name
from compressor.core.options import RunOptions
from tests import pico

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Serves the files of `folder` as the model pico/llama-0.1B, and notes what was asked for."""

    def __init__(self, folder: Path) -> None:
        self.asked: list[str] = []
        self.described: bytes | None = None
        self.damaged = False
        asked, hub = self.asked, self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                asked.append(path)
                files = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
                if path.startswith("/api/") and hub.described is not None:
                    return self.answer(200, hub.described, {"Content-Type": "application/json"})
                if path.startswith("/api/models/pico/llama-0.1B"):
                    if path.rpartition("/")[2] == "none":
                        return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
                    listed = [{"rfilename": name} for name in files]
                    found = {"id": "pico/llama-0.1B", "sha": COMMIT, "siblings": listed}
                    if "/tree/" in path:
                        found = [self.entry(name) for name in files]
                    return self.answer(200, json.dumps(found).encode(), {"Content-Type": "application/json"})
                prefix = f"/pico/llama-0.1B/resolve/{COMMIT}/"
                if path.startswith(prefix) and path.removeprefix(prefix) in files:
                    content = (folder / path.removeprefix(prefix)).read_bytes()
                    headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{sha256(content).hexdigest()}"'}
                    return self.answer(200, bytes(len(content)) if hub.damaged else content, headers)
                return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

            def entry(self, name: str) -> dict[str, object]:
                content = (folder / name).read_bytes()
                return {"type": "file", "path": name, "size": len(content), "oid": sha256(content).hexdigest()[:40]}

            def answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(content))}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(content)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def served(tmp_path, monkeypatch):
    folder = pico.llama(tmp_path / "model")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    (folder / "modeling_llama.py").write_text("raise SystemExit\n")
    (folder / "onnx").mkdir()
    shutil.copyfile(folder / "model.safetensors", folder / "onnx" / "model.safetensors")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    hub._fetched.cache_clear()
    found = Hub(folder)
    monkeypatch.setenv("HF_ENDPOINT", found.url)
    yield found
    found.close()
    hub._fetched.cache_clear()


def test_a_model_is_fetched_by_its_name_of_one_commit_and_without_code(served, tmp_path):
    checkpoint = open_checkpoint("pico/llama-0.1B@main")
    fetched = sorted(path.name for path in checkpoint.path.rglob("*"))
    assert fetched == ["README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]
    assert hub.revision_of(checkpoint.path) == COMMIT
    assert checkpoint.describe()["card"] == {"license": "mit", "base_model": "pico/llama-0.1B"}
    assert checkpoint.digest() == open_checkpoint(tmp_path / "model").digest()
    assert not any(name.endswith(".py") for name in served.asked)


def test_what_was_fetched_serves_without_a_network(served, monkeypatch):
    first = open_checkpoint("pico/llama-0.1B")
    served.close()
    hub._fetched.cache_clear()
    assert open_checkpoint("pico/llama-0.1B").path == first.path


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("pico/llama-0.1B@none", "no such revision on http://127.*org/name"),
        ("pico/none", "no such path, and no such model on http://127.*org/name"),
    ],
)
def test_what_the_hub_does_not_have_is_refused_by_name(served, model, said):
    with pytest.raises(CheckpointError, match=said):
        open_checkpoint(model)


def test_without_a_network_it_says_what_to_do(served):
    served.close()
    with pytest.raises(CheckpointError, match="cannot be reached .*write `hf download pico/llama-0.1B`, and give the"):
        open_checkpoint("pico/llama-0.1B")


def test_a_model_without_safetensors_is_refused_with_what_it_has(served, tmp_path):
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="has no model.safetensors on .*pytorch_model.bin; fetch what you trust"):
        open_checkpoint("pico/llama-0.1B")


@pytest.mark.parametrize(
    "described", [b"<html>log in</html>", b"null", b"[1, 2]", b"{}", b'{"id": "pico/llama-0.1B", "sha": "../../x"}']
)
def test_what_answers_otherwise_than_a_hub_is_refused(served, described):
    served.described = described
    with pytest.raises(CheckpointError, match=r"no answer of a hub|is no hub"):
        open_checkpoint("pico/llama-0.1B")


def test_weights_that_are_not_what_the_hub_says_are_refused_and_fetched_again(served, tmp_path):
    served.damaged = True
    with pytest.raises(
        CheckpointError, match="model.safetensors.* came with another SHA-256 than the hub says; fetch it again"
    ):
        open_checkpoint("pico/llama-0.1B")
    served.damaged = False
    assert open_checkpoint("pico/llama-0.1B").digest() == open_checkpoint(tmp_path / "model").digest()


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("org/SmolLM2-1.7B", "SmolLM2-1.7B"), ("org/net@v1.0", "net"), ("models/net.safetensors", None),
        ("org/net@refs/pr/1", "net"), ("org/net@../../x", None), ("org/net@a/../b", None), ("org/net@a//b", None),
        ("org/net@/a", None), ("org/net.", None), ("org--a/net", None), ("org/a..b", None), ("org/net.git", None),
        ("net", None), ("./org/net", None), ("a/b/c", None), ("/org/net", None), ("there/net", None),
    ],
)  # fmt: skip
def test_a_name_on_a_hub_is_one_slash_between_words_where_no_path_is(tmp_path, monkeypatch, model, name):
    (tmp_path / "there" / "net").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub_name(model) == name
    if name:
        assert str(RunOptions(model=model, recipe="llm-4bit").directory) == f"{name}-llm-4bit"
