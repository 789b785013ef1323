"""What an artifact, a recipe or a manifest names is data: code runs only where the user has named it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import compressor
import compressor.evaluate.bench
from compressor.batch.manifest import Job
from compressor.core.errors import CheckpointError, RecipeError
from compressor.core.options import RunOptions
from compressor.plan.recipe_file import reaches_of, refuse_reaching
from compressor.run.pipeline import run
from tests import pico


def names_arch(report: dict) -> None:
    report["source"]["arch"] = "evil:build"


def names_data(report: dict) -> None:
    report["data"]["arguments"] = {"data": "evil:run", "eval": "evil:run"}


def names_calibration(report: dict) -> None:
    report["data"]["arguments"] = {"data": "evil:run", "eval": None}


def names_exit(report: dict) -> None:
    report["data"]["arguments"]["eval"] = "sys:exit"


def names_original(report: dict) -> None:
    report["source"]["path"] = "evil:build"


def names_pass(report: dict) -> None:
    report["recipe"]["passes"] = [{"pass": "evil"}]


def names_policy(report: dict) -> None:
    report["recipe"]["passes"] = [{"pass": "n2n", "policy_out": "written", "engine": "ray", "address": "evil:6379"}]


NAMED = (names_arch, names_data, names_calibration, names_exit, names_original, names_pass, names_policy)


@pytest.mark.parametrize("change", NAMED)
@pytest.mark.parametrize("artifact", ["text", "images"])
def test_no_command_runs_what_an_artifact_names(command, sent, evil, monkeypatch, artifact, change):
    monkeypatch.setattr(compressor.evaluate.bench, "bench", lambda *args, **more: {})  # a process; see test_processes
    sent(artifact, change)
    statuses = {
        words: command(f"{words} {artifact}").status
        for words in ("verify", "verify --quick", "eval", "inspect", "report", "bench", f"diff {artifact}")
    }
    if artifact == "text":
        statuses["generate"] = command("generate", "text", "the river", "-n", "2").status
    assert evil.read() == []
    assert set(statuses.values()) <= {0, 3, 5}
    assert not Path("written").exists()
    if change in (names_data, names_calibration) and artifact == "text":
        said = command("eval text")
        assert (said.status, "is code, which compression.json names" in said.err) == (3, True)


def test_loading_runs_nothing_that_an_artifact_names(sent, evil):
    directory = sent("images", names_arch)
    with pytest.raises(
        CheckpointError, match="'evil:build', which the artifact names; what an artifact names is not run"
    ):
        compressor.load(directory)
    assert evil.read() == []
    assert isinstance(compressor.load(directory, arch="tests.pico:ResNet"), pico.ResNet)


def test_the_files_beside_the_report_name_nothing_either(sent, evil):
    """config.json and structure.json."""
    directory = sent("text", names_arch)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"architectures": ["evil:build"]}))
    with pytest.raises(CheckpointError, match="names architecture 'evil:build'"):
        compressor.load(directory)
    (directory / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "evil.run"}}))
    compressor.load(directory)
    for attributes in (
        {"": {"forward": 3}}, {"model": {"__class__": 3}}, {"nowhere": {"x": 3}}, {"model": {"config": [3]}},
    ):  # fmt: skip
        (directory / "structure.json").write_text(json.dumps({"shapes": {}, "attributes": attributes}))
        with pytest.raises(CheckpointError, match="does not fit the architecture"):
            compressor.load(directory)
    assert evil.read() == []


def test_what_the_user_names_is_run(command, sent, evil, monkeypatch):
    sent("images", names_arch)
    said = command("verify images --arch tests.pico:ResNet --json")
    assert said.status == 0
    assert {check["name"]: check["passed"] for check in json.loads(said.out)}["quality"] is True
    assert command("eval images --arch evil:build --data evil:run").status == 0
    assert {"imported", "called"} == set(evil.read())
    assert sys.path[0] != str(Path.cwd())


def test_without_the_network_verify_holds_the_weights_against_the_originals(command, sent):
    sent("images")
    said = command("verify images --json")
    checks = {check["name"]: (check["passed"], check["found"]) for check in json.loads(said.out)}
    assert said.status == 0
    assert checks["weights"][0] is True
    assert checks["quality"][0] is None
    assert "give --arch tests.pico:ResNet if you trust it" in checks["quality"][1]


def test_files_that_an_artifact_names_are_told(command, sent, made):
    sent("text")
    assert f"read as text/compression.json names it: {made / 'evaluation.txt'}" in command("eval text").err


@pytest.mark.parametrize("named", ["/dev/zero", "/dev/stdin", "/proc/self/environ:x", "/nowhere"])
def test_paths_that_an_artifact_names_are_files_or_nothing(command, sent, named):
    def change(report: dict) -> None:
        report["data"]["arguments"] = {"data": None, "eval": named}

    sent("text", change)
    assert command("eval text").status == 3
    assert command("verify text").status in (0, 5)


@pytest.mark.parametrize("option", ["--data", "--eval", "--arch"])
def test_code_of_the_users_that_ends_the_process_is_an_error(command, here, made, option):
    known = {"--arch": "tests.pico:ResNet", "--data": str(made / "images.npz")} | {option: "sys:exit"}
    words = [word for pair in known.items() for word in pair]
    said = command("run", str(made / "cnn.pt"), "-r", str(made / "network.yaml"), "-o", "x", *words)
    assert said.status == 3
    assert "sys:exit: the call failed; SystemExit" in said.err


MANIFEST = "recipe: r.yaml\nformat: safetensors\nmodels: [net.pt]\n"


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("arch: evil:build", "arch evil:build"), ("data: evil:run", "data evil:run"),
        ("eval: evil:run", "eval evil:run"),
        ("trust_pickle: true", "trust_pickle"), ("set: {n2n.engine: ray}", "n2n.engine ray"),
        ("set: {n2n.address: 'evil:6379'}", "n2n.address evil:6379"),
    ],
)  # fmt: skip
def test_a_manifest_that_names_code_needs_the_users_word(command, evil, here, monkeypatch, line, named):
    (here / "r.yaml").write_text("passes: [{pass: n2n, units: block, policy: random, remove: 1}]\n")
    (here / "m.yaml").write_text(MANIFEST + line + "\n")
    pico.write_state_dict(pico.Tied, here / "net.pt")
    said = command("batch m.yaml")
    assert said.status == 2
    assert f"leads out of this process: {named}; nothing was run; give --trust-recipe" in said.err
    assert evil.read() == []
    from compressor.cli.commands import _batch_jobs

    (job,) = _batch_jobs(["m.yaml"], {}, [], True)
    assert "--trust-recipe" in job.command(Path("x"))


def test_no_manifest_names_a_file_to_be_written(command, here):
    (here / "r.yaml").write_text("passes: [{pass: n2n, units: block, policy: random, remove: 1}]\n")
    (here / "m.yaml").write_text(MANIFEST + "set: {n2n.policy_out: precious}\n")
    pico.write_state_dict(pico.Tied, here / "net.pt")
    assert "names a file to be written, which no manifest says" in command("batch m.yaml --trust-recipe").err


def test_a_model_whose_name_is_an_option_is_a_model():
    assert Job("x", "--trust-pickle", "r").command(Path("o"))[:2] == ["run", "./--trust-pickle"]


STEP = "passes: [{pass: n2n, units: block, policy: random, remove: 1, %s}]\n"


@pytest.mark.parametrize("setting", ["engine: ray", "address: 'evil:6379'"])
def test_a_recipe_that_leads_out_needs_the_users_word(command, here, made, setting):
    (here / "r.yaml").write_text(STEP % setting)
    (here / "importing.yaml").write_text("imports: r.yaml\n")
    for recipe in ("r.yaml", "importing.yaml"):
        with pytest.raises(RecipeError, match="leads out of this process; nothing was run; give --trust-recipe"):
            run(RunOptions(str(made / "cnn.pt"), recipe, Path("x")))
        assert command("run", str(made / "cnn.pt"), "-r", recipe, "--dry-run").status == 2
        refuse_reaching(recipe, trusted=True)
    assert reaches_of("llm-depth") == []
    assert not Path("x.partial").exists()


def test_a_recipe_names_no_file_to_be_written(command, here, made):
    (here / "r.yaml").write_text(STEP % "policy_out: precious")
    said = command("run", str(made / "cnn.pt"), "-r", "r.yaml", "-o", "x", "--trust-recipe")
    assert said.status == 2
    assert "policy_out names a file to be written, which no recipe says; give --policy FILE" in said.err


@pytest.mark.parametrize("content", [b"the only copy", b"", b'\x08\0\0\0\0\0\0\0{"a": 1}', None])
def test_policies_are_not_written_over_other_files(command, here, made, content):
    (here / "r.yaml").write_text(STEP % "jobs: 1")
    target = here / "precious"
    if content is None:
        save_file({"model.weight": torch.ones(2)}, target)
    else:
        target.write_bytes(content)
    before = target.read_bytes()
    said = command("run", str(made / "cnn.pt"), "-r", "r.yaml", "-o", "x", "--policy", "precious")
    assert said.status == 2
    assert "precious: is there and holds no policies" in said.err
    assert target.read_bytes() == before
