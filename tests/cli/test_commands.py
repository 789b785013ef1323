"""The command: statuses, one-line errors, what goes to the pipeline, and that help stays quick and documented."""

from __future__ import annotations

import errno
import importlib
import importlib.util
import json
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from compressor.cli import commands as cli
from compressor.core.artifact import Artifact, failed_directory
from compressor.core.errors import CheckpointError, DataError, ExportError, GateFailed, RecipeError, ResourceError
from compressor.core.options import RunOptions

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def folder(here):
    save_file({f"layers.{i}.up.weight": torch.ones(96, 64) for i in (0, 1)}, here / "net.safetensors")
    return here


@pytest.fixture
def pipeline(monkeypatch):
    """A pipeline that notes its options, and does as `outcome` says."""
    module = types.ModuleType("compressor.run.pipeline")
    module.asked = []
    module.outcome = lambda options: Artifact(options.directory, {"status": "done"})

    def run(options):
        module.asked.append(options)
        return module.outcome(options)

    module.run = run
    monkeypatch.setitem(sys.modules, "compressor.run.pipeline", module)
    return module


def raising(error):
    def outcome(options):
        raise error

    return outcome


def test_help_of_every_command_is_the_page_in_docs():
    spec = importlib.util.spec_from_file_location("make_cli_docs", ROOT / "scripts" / "make_cli_docs.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    assert (ROOT / "docs" / "cli.md").read_text(encoding="utf-8") == made.page(), "run scripts/make_cli_docs.py"


@pytest.mark.parametrize("command", ["--help", "recipes", "MODEL -r llm-2bit --dry-run"])
def test_nothing_heavy_is_imported_for(command, llama):
    command = command.replace("MODEL", str(llama))
    code = (
        f"import sys\nfrom compressor.cli.commands import main\n"
        f"try:\n    main({command.split()!r})\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'transformers', 'onnx', 'onnxruntime', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_module_runs_as_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "compressor", "--help"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.startswith("Usage: compress ")


@pytest.mark.parametrize(
    "args",
    [
        ["net.safetensors", "--recipe", "llm-2bit", "--seed", "3"],
        ["run", "net.safetensors", "--recipe", "llm-2bit", "--seed", "3"],
        ["--recipe", "llm-2bit", "--seed", "3", "net.safetensors"],
    ],
)
def test_a_model_as_the_first_word_is_run(pipeline, args, command):
    assert command(*args).status == 0
    (options,) = pipeline.asked
    assert (options.model, options.recipe, options.seed, options.mode) == ("net.safetensors", "llm-2bit", 3, "default")
    assert options.directory == Path("net-llm-2bit")


def test_options_reach_the_pipeline(pipeline, command):
    args = "net.safetensors -r llm-2bit -o out --data d.txt --eval e.txt --arch a:b --trust-pickle --format safetensors"
    args += " --set trellis.width=4 --set calibration.tokens=64 --compat --resume --force"
    assert command(args).status == 0
    (options,) = pipeline.asked
    assert (options.output, options.data, options.eval, options.arch) == (Path("out"), "d.txt", "e.txt", "a:b")
    assert (options.trust_pickle, options.format, options.mode) == (True, "safetensors", "compat")
    assert (options.sets, options.resume, options.force) == (("trellis.width=4", "calibration.tokens=64"), True, True)


@pytest.mark.parametrize(
    ("args", "expected", "message"),
    [
        ("net.safetensors", 2, "no recipe; write --recipe NAME. Known: cnn-4bit, cnn-binary, cnn-explain"),
        ("net.safetensors -r llm2bit", 2, "no recipe named 'llm2bit'. Did you mean 'llm-2bit'?"),
        ("net.safetensors -r llm-2bit --set trellis.widht=3", 2, "no setting 'widht'. Did you mean 'width'?"),
        ("net.safetensors -r llm-2bit --standard --compat", 2, "--standard and --compat exclude each other"),
        ("net.safetensors -r llm-2bit --fromat onnx", 2, "--format"),
        ("recpies", 2, "no such model, and no such command. Did you mean 'recipes'?"),
        ("net.safetensors -r llm-2bit -o net.safetensors", 2, "net.safetensors: is a file; give a directory with -o"),
        ("net.safetensors -r llm-2bit -o .", 2, ".: is the folder that you are in; give another directory with -o"),
        ("nowhere.safetensors -r llm-2bit --dry-run", 3, "nowhere.safetensors: does not exist"),
        ("inspect nowhere", 3, "nowhere: does not exist"),
        ("generate . hello", 3, "has no tokenizer.json"),
    ],
)
def test_mistakes_are_one_line_on_stderr(pipeline, command, args, expected, message):
    said = command(args)
    assert (said.status, said.out) == (expected, "")
    assert said.err.startswith("Error: ")
    assert said.err.count("\n") == 1
    assert message in said.err
    assert pipeline.asked == []


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (GateFailed("worse"), 1), (RecipeError("recipe"), 2), (CheckpointError("file"), 3), (DataError("data"), 3),
        (ResourceError("disk"), 4), (MemoryError(), 4), (OSError(errno.ENOSPC, "No space left on device", "x"), 4),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), 4),
        (ExportError("graph"), 5), (ValueError("a\nb"), 5), (KeyboardInterrupt(), 130),
    ],
)  # fmt: skip
def test_exit_statuses(pipeline, command, error, expected):
    pipeline.outcome = raising(error)
    said = command("net.safetensors -r llm-2bit")
    assert said.status == expected
    assert said.err.count("\n") == 1
    assert ("--resume" in said.err) == isinstance(error, OSError)


def test_gates_on_the_line_are_settings_of_the_recipe(pipeline, command):
    args = "net.safetensors -r llm-2bit --max-size 60kB --max-memory 2MB --min-speedup 1.5 --min-agreement 0.9"
    assert command(args).status == 0
    (options,) = pipeline.asked
    assert options.sets == (
        "gates.max_size=60000", "gates.max_memory=2000000", "gates.min_speedup=1.5", "gates.min_agreement=0.9",
    )  # fmt: skip
    assert command("net.safetensors -r llm-2bit --max-size lots").status == 2


def test_a_policy_is_started_from_where_it_is_and_saved_there(pipeline, folder, command):
    args = ["net.safetensors", "-r", "llm-depth", "--policy", "policy.safetensors"]
    assert command(*args).status == 0
    save_file({"removal.own": torch.zeros(1)}, "policy.safetensors")
    assert command(*args).status == 0
    new, old = (options.sets for options in pipeline.asked)
    assert new == ("n2n.policy_out=policy.safetensors",)
    assert old == ("n2n.policy_in=policy.safetensors", *new)
    assert command("net.safetensors -r llm-2bit --policy p").status == 2  # has no n2n


def test_debug_shows_the_traceback_and_keeps_the_status(pipeline, command):
    pipeline.outcome = raising(CheckpointError("file"))
    said = command("net.safetensors -r llm-2bit --debug")
    assert said.status == 3
    assert "Traceback (most recent call last)" in said.err


def test_a_failed_gate_prints_the_report_first(pipeline, folder, command):
    report = {"size": {"bytes": 10, "original_bytes": 20}}

    def outcome(options):
        failed_directory(options.directory).mkdir()
        (failed_directory(options.directory) / "compression.json").write_text(json.dumps(report))
        raise GateFailed("perplexity ratio is 3.1, the gate is 2")

    pipeline.outcome = outcome
    said = command("net.safetensors -r llm-2bit --json")
    assert said.status == 1
    assert json.loads(said.out) == report
    assert "perplexity ratio is 3.1" in said.err


def test_an_artifact_is_replaced_only_by_force(pipeline, folder, command):
    (folder / "net-llm-2bit").mkdir()
    (folder / "net-llm-2bit" / "compression.json").write_text("{}")
    said = command("net.safetensors -r llm-2bit")
    assert said.status == 2
    assert "replace it with --force" in said.err
    assert command("net.safetensors -r llm-2bit --force").status == 0


def test_an_empty_target_is_used(pipeline, folder, command):
    (folder / "out").mkdir()
    assert command("net.safetensors -r llm-2bit -o out").status == 0


def test_a_dry_run_prints_the_plan_and_writes_nothing(pipeline, folder, llama, command):
    before = sorted(folder.iterdir())
    plan = json.loads(command(f"{llama} -r llm-2bit --dry-run --json").out)
    assert {tensor["by"] for tensor in plan["tensors"]} == {"trellis", "embeddings", None}
    assert plan["bytes_after"] == sum(plan["files"].values())
    assert "layers.*.mlp.up_proj.weight" in command(f"{llama} -r llm-2bit --dry-run").out
    assert sorted(folder.iterdir()) == before
    assert pipeline.asked == []


def test_recipes_are_listed_and_explained(command):
    assert "llm-2bit-fast" in command("recipes").out
    assert "step 1: trellis" in command("recipes llm-2bit").out
    assert json.loads(command("recipes llm-2bit --json").out)["name"] == "llm-2bit"


def test_inspect_shows_a_checkpoint(command):
    found = json.loads(command("inspect net.safetensors --json").out)
    assert found["bytes_by_role"] == {"linear": 2 * 96 * 64 * 4}
    assert "layers.*.up.weight" in command("inspect net.safetensors").out


def test_inspect_shows_an_artifact(folder, command):
    from compressor.core.tensors import EncodedTensor, write_tensors

    (folder / "art").mkdir()
    (folder / "art" / "compression.json").write_text('{"recipe": {"name": "llm-2bit"}}')
    write_tensors(folder / "art" / "model.safetensors", {"w": EncodedTensor.dense(torch.ones(3, 5))})
    found = json.loads(command("inspect art --json").out)
    assert found["kind"] == "artifact"
    assert found["bytes_by_encoding"] == {"dense": 60}
    assert found["report"] == {"recipe": {"name": "llm-2bit"}}


def test_the_default_directory_is_named_by_model_and_recipe():
    assert RunOptions("a/b.v2.pt", "x/mine.yaml").directory == Path("b.v2-mine")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_waits_for_an_import_that_would_swallow_it(folder, monkeypatch, number):
    """Some libraries try imports of their own with a bare except."""
    (folder / "swallowing.py").write_text(
        "import time\nlost = False\ntry:\n    time.sleep(0.5)\nexcept BaseException:\n    lost = True\n"
    )
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "swallowing", raising=False)  # of the other signal's test
    before = signal.signal(number, cli.interrupt)
    try:
        threading.Timer(0.1, signal.raise_signal, [number]).start()
        with pytest.raises(KeyboardInterrupt):
            module = importlib.import_module("swallowing")
            for _ in range(100):  # a signal that a thread raises ends no longer sleep
                time.sleep(0.05)
    finally:
        signal.signal(number, before)
    assert not module.lost
