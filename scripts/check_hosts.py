#!/usr/bin/env python3
"""Lets an artifact write text in every host that people run: scripts/check_hosts.py ARTIFACT [--only HOST…].

The artifact of a language model, unmodified, in onnxruntime (Python), onnxruntime-genai, optimum's
ORTModelForCausalLM, onnxruntime-node, onnxruntime-web in Node, and in Chromium by the page of docs/examples/browser,
which uses transformers.js. Each takes the likeliest token each time, with one thread, and must write the same. Packages
are installed in the cache, apart from the project's own. Needs Node and Chromium. Writes docs/measured/hosts.json.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import http.server
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from material import cache
from measured import ROOT, markdown, number, read_results, write_results

HOSTS = ROOT / "scripts" / "hosts"
PAGE = ROOT / "docs" / "examples" / "browser" / "index.html"
PROMPT, TOKENS = "The United States of America is", 40
"""Of which no two likeliest tokens are near each other: kernels differ in last digits, and break ties."""
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
PYTHON_PACKAGES = {
    "genai": ("onnxruntime-genai==0.18.0",),
    "optimum": ("optimum-onnx==0.1.0", "optimum==2.1.0", "transformers==4.57.6", "huggingface-hub==0.36.2",
                "tokenizers==0.22.2"),
}  # fmt: skip
"""Beside the project's own onnxruntime and torch, which they run on; without what these packages would bring."""


class HostAbsentError(Exception):
    """A program or a package of a host that this machine has not and cannot get."""


@dataclass(frozen=True)
class Written:
    """What a host wrote, and what it took: seconds, and bytes of resident memory at most; None where not known."""

    text: str
    load_seconds: float
    decode_seconds: float
    peak: int | None = None


def npm_packages(name: str) -> Path:
    """The folder in the cache with the packages of scripts/hosts/`name`.package.json, installed once.

    Raises:
        HostAbsentError: There is no npm, or its registry cannot be reached.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise HostAbsentError("npm is not installed")
    folder = cache() / "hosts" / name
    folder.mkdir(parents=True, exist_ok=True)
    wanted, found = HOSTS / f"{name}.package.json", folder / "package.json"
    if found.is_file() and found.read_bytes() == wanted.read_bytes() and (folder / "node_modules").is_dir():
        return folder
    shutil.copyfile(wanted, found)
    done = subprocess.run(
        [npm, "install", "--ignore-scripts", "--no-audit", "--no-fund", "--no-package-lock"], cwd=folder,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        found.unlink()
        raise HostAbsentError(f"npm cannot install: {(done.stderr.strip().splitlines() or ['?'])[0]}")
    return folder


def browser() -> str:
    """Chromium's path.

    Raises:
        HostAbsentError: There is none.
    """
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        raise HostAbsentError("Chromium is not installed")
    return found


@contextlib.contextmanager
def served(artifact: Path, packages: Path) -> Iterator[str]:
    """The address of the page, with the artifact beside it and the packages where a content network has them."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def translate_path(self, path: str) -> str:
            parts = [part for part in unquote(urlsplit(path).path).split("/") if part not in ("", ".", "..")]
            if parts[:1] == ["npm"]:
                name, *rest = parts[1:]
                scoped = [name, rest.pop(0)] if name.startswith("@") else [name]
                scoped[-1] = scoped[-1].partition("@")[0]
                return str(packages.joinpath("node_modules", *scoped, *rest))
            return str(artifact.joinpath(*parts[1:])) if parts[:1] == ["model"] else str(PAGE)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/?cdn={quote('/npm/', safe='')}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def in_browser(artifact: Path, prompt: str, tokens: int) -> Written:
    """What the page of docs/examples/browser writes with the artifact in Chromium, by transformers.js.

    Raises:
        HostAbsentError: There is no Chromium, no Node, or no registry of its packages.
    """
    packages = npm_packages("browser")
    with served(artifact, packages) as url:
        words = [_node(), HOSTS / "browser.mjs", browser(), url, prompt, str(tokens)]
        found, _ = _run(words, {"HOSTS": str(packages)})
    return Written(found["text"], found["load_seconds"], found["decode_seconds"])


def _in_node(package: str, artifact: Path, prompt: str, tokens: int) -> Written:
    words = [_node(), HOSTS / "greedy.mjs", package]
    return _by_tokens(words, {"HOSTS": str(npm_packages("node"))}, artifact, prompt, tokens)


def _in_python(name: str, artifact: Path, prompt: str, tokens: int) -> Written:
    environment = {}
    if name in PYTHON_PACKAGES:
        environment["PYTHONPATH"] = str(_python_packages(name))
    return _by_tokens([sys.executable, HOSTS / f"{name}.py"], environment, artifact, prompt, tokens)


def _by_tokens(
    words: list[Any], environment: dict[str, str], artifact: Path, prompt: str, tokens: int
) -> Written:  # fmt: skip
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(artifact / "tokenizer.json"))
    ids = tokenizer.encode(prompt).ids
    found, peak = _run([*words, artifact.resolve(), json.dumps(ids), str(tokens)], environment)
    return Written(tokenizer.decode(found["tokens"]), found["load_seconds"], found["decode_seconds"], peak)


def _run(words: list[Any], environment: dict[str, str]) -> tuple[dict[str, Any], int]:
    """The JSON of a process's last line, and its peak of resident memory in bytes."""
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            list(map(str, words)), stdout=output, stderr=errors,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment},
        )  # fmt: skip
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        errors.seek(0)
        if process.returncode:
            raise RuntimeError(f"{words[1]}: ended by {process.returncode}\n{errors.read()[-3000:]}")
        return json.loads(output.read().splitlines()[-1]), 1024 * usage.ru_maxrss


def _node() -> str:
    found = shutil.which("node")
    if found is None:
        raise HostAbsentError("Node is not installed")
    return found


def _python_packages(name: str) -> Path:
    folder = cache() / "hosts" / name
    if not folder.is_dir():
        partial = folder.with_name(f"{name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        done = subprocess.run(
            [*pip, "--target", partial, *PYTHON_PACKAGES[name]], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise HostAbsentError(f"pip cannot install: {done.stderr.strip().splitlines()[-1]}")
        partial.rename(folder)
    return folder


WRITERS = {
    "onnxruntime": functools.partial(_in_python, "python"),
    "onnxruntime-genai": functools.partial(_in_python, "genai"),
    "optimum-onnx": functools.partial(_in_python, "optimum"),
    "onnxruntime-node": functools.partial(_in_node, "onnxruntime-node"),
    "onnxruntime-web in Node": functools.partial(_in_node, "onnxruntime-web"),
    "transformers.js in Chromium": in_browser,
}


def hosts_table(results: dict[str, Any]) -> str:
    """A row for each host: whether it wrote the same, and what it took."""
    rows = []
    for name, found in results["hosts"].items():
        if "absent" in found:
            rows.append([name, f"not tried: {found['absent']}", None, None, None])
            continue
        speed = (results["tokens"] - 1) / found["decode_seconds"]
        peak = found["peak"]
        rows.append([name, "yes" if found["same"] else "no", number(found["load_seconds"], 2), number(speed, 0),
                     peak and number(peak / 1e6, 0)])  # fmt: skip
    titles = ["host", "same text", "load, s", "tokens/s", "peak memory of the process, MB"]
    return f"{results['artifact']}, {results['tokens']} tokens, one thread:\n\n{markdown(titles, rows)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--only", nargs="+", choices=list(WRITERS), default=list(WRITERS))
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--no-record", action="store_true", help="leave docs/measured alone")
    arguments = parser.parse_args()
    report = json.loads((arguments.artifact / "compression.json").read_text(encoding="utf-8"))
    expected = WRITERS["onnxruntime"](arguments.artifact, arguments.prompt, arguments.tokens).text
    print(repr(expected))
    found: dict[str, dict[str, Any]] = {}
    for name in arguments.only:
        try:
            written = WRITERS[name](arguments.artifact, arguments.prompt, arguments.tokens)
        except HostAbsentError as error:
            found[name] = {"absent": str(error)}
        else:
            found[name] = {**vars(written), "same": written.text.strip() == expected.strip()}
        print(name, json.dumps(found[name]), flush=True)
    if not arguments.no_record:
        results = read_results("hosts")
        hosts = results.get("hosts", {}) | found
        what = f"{Path(report['source']['path']).name} by {report['recipe']['name']}"
        write_results("hosts", {"artifact": what, "tokens": arguments.tokens, "text": expected, "hosts": hosts})
    sys.exit(any(each.get("same") is False for each in found.values()))


if __name__ == "__main__":
    main()
