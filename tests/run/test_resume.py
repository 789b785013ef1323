"""--resume goes on with the very same run only, and says what of another differs; a batch knows runs by the same."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from compressor.batch.fingerprint import fingerprint, options_of
from compressor.batch.manifest import Job, read_manifest
from compressor.core.errors import UsageError
from compressor.core.options import RunOptions
from compressor.run.identity import identity_of
from compressor.run.pipeline import run
from compressor.run.workplace import NOTE, WORK
from tests import pico
from tests.core.interrupting import Interrupting

SETS = (
    "calibration.tokens=64", "calibration.window=32", "evaluation.tokens=0", "evaluation.window=32",
    "evaluation.speed=false", "trellis.width=4", "trellis.window=8", "trellis.group=16", "distill.steps=0",
    "embeddings.group=16", "calibration.generated=0",
)  # fmt: skip


@pytest.fixture(scope="module")
def begun(llama, tmp_path_factory):
    """A run that was interrupted, in a folder of its own: its options."""
    folder = tmp_path_factory.mktemp("begun")
    shutil.copytree(llama, folder / "llama")
    for seed, name in enumerate(("calibration", "evaluation")):
        (folder / f"{name}.txt").write_text(pico.text(seed + 1))
    texts = {"data": str(folder / "calibration.txt"), "eval": str(folder / "evaluation.txt")}
    options = RunOptions(str(folder / "llama"), "llm-2bit", folder / "out", sets=SETS, **texts)
    with pytest.raises(KeyboardInterrupt):
        run(replace(options, progress=Interrupting("encoding", 2)))
    return options


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"mode": "compat"}, "mode is default there and compat here"),
        ({"format": "safetensors"}, "format is onnx there and safetensors here"),
        ({"seed": 4}, "seed is 0 there and 4 here"),
        ({"max_loss": 0.05}, "targets.loss is none there and 0.05 here"),
        ({"target_size": 200_000}, "targets.size is none there and 200000 here"),
        ({"sets": (*SETS, "trellis.width=5")}, "recipe.passes.0.width is 4 there and 5 here"),
        ({"sets": (*SETS, "gates.max_loss=5%")}, "recipe.gates.max_loss is none there and 0.05 here"),
    ],
    ids=str,
)
def test_a_run_with_other_options_is_not_resumed(begun, change, expected):
    with pytest.raises(UsageError) as caught:
        run(replace(begun, resume=True, **change))
    assert str(caught.value) == (
        f"{begun.directory}.partial: belongs to another run: {expected}; leave --resume out, or ask for the same"
    )


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("calibration.txt", "data.calibration is "), ("evaluation.txt", "data.evaluation is "),
        ("llama/config.json", "model.config.json is "), ("llama/tokenizer.json", "model.tokenizer.json is "),
    ],
)  # fmt: skip
def test_a_run_on_other_files_is_not_resumed(begun, file, expected):
    path = begun.directory.parent / file
    before = path.read_text()
    path.write_text(before.replace("the old", "the new") + "\n" if path.suffix == ".txt" else before + "\n")
    try:
        with pytest.raises(UsageError) as caught:
            run(replace(begun, resume=True))
    finally:
        path.write_text(before)
    message = str(caught.value)
    assert f"belongs to another run: {expected}" in message
    assert message.count("there and") == 1


def test_a_run_with_other_threads_is_not_resumed(begun):
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        with pytest.raises(UsageError, match=f"threads is {threads} there and {threads + 1} here"):
            run(replace(begun, resume=True))
    finally:
        torch.set_num_threads(threads)


def test_what_cannot_be_read_is_of_another_version(begun):
    note = Path(f"{begun.directory}.partial") / WORK / NOTE
    before = note.read_text()
    note.write_text(json.dumps({"recipe": {}, "seed": 0}))
    try:
        with pytest.raises(UsageError, match="was begun by another version of compressor, or is damaged; leave"):
            run(replace(begun, resume=True))
    finally:
        note.write_text(before)


def test_the_same_run_is_resumed_and_its_identity_is_in_the_report(begun, tmp_path):
    shutil.copytree(f"{begun.directory}.partial", tmp_path / "out.partial")
    report = run(replace(begun, resume=True, output=tmp_path / "out")).report
    identity = report["identity"]
    assert identity["model"]["weights"] == report["source"]["sha256"]
    assert identity["data"] == report["data"]["sha256"]
    assert {key: identity[key] for key in ("seed", "mode")} == {key: report[key] for key in ("seed", "mode")}
    assert identity["recipe"] == report["recipe"]
    assert identity["versions"].items() <= report["versions"].items()


WORDS = [
    (), ("--compat",), ("--standard",), ("--format", "safetensors"), ("--seed", "3"), ("--target-size", "60kB"),
    ("--max-loss", "5%"), ("--set", "trellis.width=6"), ("--target-flops", "50%"), ("--trust-pickle", "--seed", "4"),
]  # fmt: skip


def test_a_batch_tells_jobs_apart_by_all_that_tells_runs_apart(begun):
    jobs = [Job("a", begun.model, "llm-2bit", words, ()) for words in WORDS]
    assert len({fingerprint(job) for job in jobs}) == len(jobs)
    assert fingerprint(Job("b", begun.model, "llm-2bit", ())) == fingerprint(jobs[0])


def test_a_batch_knows_other_data_and_another_tokenizer(begun, here):
    shutil.copytree(begun.model, here / "llama")
    (here / "data.txt").write_text("one")
    job = Job("a", "llama", "llm-2bit", ("--data", "data.txt"), ("data.txt",))
    keys = [fingerprint(job)]
    (here / "data.txt").write_text("two")
    keys.append(fingerprint(job))
    (here / "llama" / "tokenizer.json").write_text("{}")
    keys.append(fingerprint(job))
    assert len(set(keys)) == 3


def test_a_job_asks_for_what_its_manifest_says(here, llama):
    (here / "batch.yaml").write_text(
        f"recipe: llm-2bit\nmode: compat\nformat: safetensors\nseed: 7\ntarget_size: 60kB\nmax_loss: 5%\n"
        f"set: {{trellis.width: 5}}\nmodels: [{llama}]\n"
    )
    (job,) = read_manifest(here / "batch.yaml")
    asked = options_of(job)
    assert (asked.mode, asked.format, asked.seed, asked.target_size, asked.max_loss) == (
        "compat", "safetensors", 7, 60_000, 0.05,
    )  # fmt: skip
    assert asked.sets == ("trellis.width=5",)


def test_a_policy_to_start_from_is_part_of_the_run(begun, here):
    from compressor.plan.recipe_file import load_recipe

    (here / "policy.safetensors").write_bytes(b"first")
    recipe = load_recipe("llm-depth", ["n2n.policy_in=policy.safetensors"])
    before = identity_of(begun, recipe, {}, 1)
    (here / "policy.safetensors").write_bytes(b"second")
    assert identity_of(begun, recipe, {}, 1).difference(before).startswith("data.file policy.safetensors is ")
