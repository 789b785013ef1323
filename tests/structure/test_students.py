"""N2N in whole runs: searches in other processes and resumed ones find the same student, and artifacts compute it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import compressor
from compressor.core.errors import CheckpointError, DataError, PassError, RecipeError
from compressor.core.options import RunOptions
from compressor.core.students import Student
from compressor.passes.settings.n2n import N2nSettings
from compressor.plan.recipe_file import load_recipe
from compressor.report.search import search_of
from compressor.run.pipeline import run
from compressor.structure.students import pool
from compressor.structure.students.laboratory import JOURNAL
from compressor.structure.students.pool import Processes
from tests import pico
from tests.core.interrupting import Interrupting
from tests.learning import training_case

CNN = (
    "n2n.search_epochs=2", "n2n.shrink_epochs=2", "n2n.rollouts=3", "n2n.student_examples=48", "n2n.validation=32",
    "n2n.epochs=1", "n2n.jobs=1", "n2n.max_students=8", "calibration.samples=32", "evaluation.samples=32",
    "evaluation.speed=false",
)  # fmt: skip
LLM = (
    "n2n.remove=2", "n2n.search_epochs=3", "n2n.validation=128", "n2n.jobs=1", "calibration.tokens=256",
    "calibration.window=64", "evaluation.tokens=128", "evaluation.window=64", "evaluation.speed=false",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory, checkpoints) -> Path:
    folder = tmp_path_factory.mktemp("students")
    network = pico.write_state_dict(pico.ResNet, folder / "model.pt")
    for name, n in (("train", 96), ("test", 32)):
        images = np.random.default_rng(n).standard_normal((n, 3, 12, 12)).astype(np.float32)
        with torch.no_grad():
            labels = network(torch.from_numpy(images)).argmax(1).numpy()
        np.savez(folder / f"{name}.npz", image=images, labels=labels)
    (folder / "llama").symlink_to(checkpoints("llama", n_layers=5))
    (folder / "train.txt").write_text(pico.text(1, 1500))
    (folder / "test.txt").write_text(pico.text(2, 700))
    return folder


def cnn(folder: Path, output: str, *sets: str, **options):
    known = {"model": str(folder / "model.pt"), "recipe": "cnn-n2n", "data": str(folder / "train.npz"),
             "eval": str(folder / "test.npz"), "arch": "tests.pico:ResNet"}  # fmt: skip
    return run(RunOptions(output=folder / output, sets=(*CNN, *sets), **known, **options))


def llm(folder: Path, output: str, *sets: str, **options):
    known = {"model": str(folder / "llama"), "recipe": "llm-depth", "data": str(folder / "train.txt"),
             "eval": str(folder / "test.txt")}  # fmt: skip
    return run(RunOptions(output=folder / output, sets=(*LLM, *sets), **known, **options))


@pytest.fixture(scope="module")
def smaller_cnn(folder):
    return cnn(folder, "cnn", f"n2n.policy_out={folder / 'policy.safetensors'}")


def test_a_student_of_a_convolutional_network_is_shipped_and_loads(folder, smaller_cnn):
    (step,) = smaller_cnn.report["structure"]
    assert step["parameters"] < step["parameters_before"] == 29110
    assert smaller_cnn.report["proof"]["exact"]["max_relative_error"] < 1e-5
    search = step["search"]
    known = {trial["student"]: trial for trial in search["trials"] if trial["accuracy"] is not None}
    best = known[search["best"]]
    assert best["parameters"] == step["parameters"]
    assert best["reward"] == max(trial["reward"] for trial in known.values())
    loaded = compressor.load(smaller_cnn.directory, arch="tests.pico:ResNet")
    assert sum(parameter.numel() for parameter in loaded.parameters()) == step["parameters"]
    page = (smaller_cnn.directory / "report.html").read_text()
    assert "The search for a student" in page
    assert page.count("<circle") >= len(search["trials"])
    assert search_of({"search": None}) is None


def test_an_interrupted_search_goes_on_to_the_same_student(folder, smaller_cnn):
    with pytest.raises(KeyboardInterrupt):
        cnn(folder, "again", progress=Interrupting("n2n", 0.3), format="safetensors")
    journal = folder / "again.partial" / "work" / "structure-0-search" / JOURNAL
    asked = journal.read_text().splitlines()
    journal.write_text("\n".join([*asked[:-1], asked[-1][:9]]))  # killed in the middle of a line
    again = cnn(folder, "again", resume=True, format="safetensors")
    first, second = (each.report["structure"][0] for each in (smaller_cnn, again))
    assert first["search"]["trials"] == second["search"]["trials"]
    weights = [(each.directory / "model.safetensors").read_bytes() for each in (smaller_cnn, again)]
    assert weights[0] == weights[1]


def test_processes_judge_as_this_process_does(folder, smaller_cnn):
    beside = cnn(folder, "beside", "n2n.jobs=2", format="safetensors")
    first, second = (each.report["structure"][0]["search"] for each in (smaller_cnn, beside))
    assert first["trials"] == second["trials"]
    assert first["best"] == second["best"]


@pytest.mark.slow
def test_a_ray_cluster_judges_as_this_process_does(folder, smaller_cnn):
    ray = pytest.importorskip("ray")
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        beside = cnn(folder, "cluster", "n2n.engine=ray")
    finally:
        ray.shutdown()
    first, second = (each.report["structure"][0]["search"] for each in (smaller_cnn, beside))
    assert first["trials"] == second["trials"]
    assert first["best"] == second["best"]


def test_a_policy_is_carried_over(folder, smaller_cnn):
    taken = cnn(folder, "taken", f"n2n.policy_in={folder / 'policy.safetensors'}", format="safetensors")
    first, second = (each.report["structure"][0]["search"] for each in (smaller_cnn, taken))
    assert first["trials"] != second["trials"]
    with pytest.raises(RecipeError, match="policy_in nowhere is not there"):
        cnn(folder, "lost", "n2n.policy_in=nowhere")


@pytest.mark.parametrize("policy", ["influence", "greedy", "reinforce"])
def test_a_decoder_becomes_shallower_and_its_config_says_so(folder, policy):
    artifact = llm(folder, policy, f"n2n.policy={policy}")
    (step,) = artifact.report["structure"]
    config = json.loads((artifact.directory / "config.json").read_text())
    assert config["num_hidden_layers"] == 3
    assert len(config.get("layer_types") or "abc") == 3
    assert len(step["search"]["removed"]) == 2
    block = (step["parameters_before"] - step["parameters"]) / 2
    assert block == 80 * (5 * 16 + 2 * 16) + 5 * 16 * 80 + 3 * 80 * 108 + 2 * 80
    assert artifact.report["proof"]["exact"]["max_relative_error"] < 1e-3
    assert compressor.load(artifact.directory).config.num_hidden_layers == 3


def test_a_shallower_decoder_is_distilled_on_the_original(folder):
    healed = llm(
        folder, "healed", "n2n.policy=influence", "n2n.epochs=6", "n2n.rate=0.01", "n2n.batch=2", format="safetensors"
    )
    (step,) = healed.report["structure"]
    losses = [entry["loss"] for entry in step["training"]]
    assert losses[-1] < 0.8 * losses[0]


def test_parts_of_an_encoder_go_and_the_artifact_knows(bert, tmp_path):
    (tmp_path / "recipe.yaml").write_text(
        "passes: [{pass: n2n, units: part, remove: 1, search_epochs: 1, rollouts: 2, jobs: 1, validation: 64},"
        " {pass: affine, bits: 8}]\ncalibration: {tokens: 128, window: 32}\n"
        "evaluation: {tokens: 64, window: 32, speed: false}\n"
    )
    (tmp_path / "test.txt").write_text(pico.text(2, 250))
    texts = {"data": str(tmp_path / "train.txt"), "eval": str(tmp_path / "test.txt")}
    (tmp_path / "train.txt").write_text(pico.text(1, 400))
    artifact = run(RunOptions(model=str(bert), recipe=str(tmp_path / "recipe.yaml"), output=tmp_path / "out", **texts))
    (step,) = artifact.report["structure"]
    assert step["search"]["removed"][0].endswith(".attention")
    record = json.loads((artifact.directory / "structure.json").read_text())
    assert [kind for kind, _ in record["absent"].values()] == ["identity"]
    assert artifact.report["proof"]["exact"]["max_relative_error"] < 1e-3


def test_parts_of_a_decoder_are_refused(folder):
    with pytest.raises(
        CheckpointError,
        match="the graph of decoders cannot have; found units: part; write units: block",
    ):
        llm(folder, "parts", "n2n.units=part", "n2n.search_epochs=1", "n2n.remove=1")


def test_the_recipes_search_as_they_say():
    cnn, llm = (load_recipe(name).passes[0].settings for name in ("cnn-n2n", "llm-depth"))
    assert isinstance(cnn, N2nSettings)
    assert isinstance(llm, N2nSettings)
    assert (cnn.units, llm.units, llm.measure) == ("layer", "block", "perplexity")
    assert "training" in cnn.needs


def test_a_worker_that_dies_says_why(tmp_path):
    workers = Processes(torch.nn.Identity(), tmp_path, 1)  # which judges nothing
    with pytest.raises(PassError, match="a worker that judges students has ended: AttributeError: .*'evaluate'"):
        list(workers.evaluate([Student((1,))]))
    workers.close()


def test_neighbours_are_judged_by_one_worker():
    students = [Student((number,)) for number in range(7)]
    assert [len(chunk) for chunk in pool.neighbours(students, 3)] == [3, 3, 1]


def test_data_that_do_not_fit_are_refused(folder):
    subject = training_case.subject_of(training_case.residual(), data=training_case.examples(3))
    with pytest.raises(DataError, match="3 examples cannot be split"):
        subject.students(N2nSettings(jobs=1))
