"""The main job on pico models: the artifact and its report, the same bytes again, interruptions, gates, refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import compressor
from compressor.core.artifact import Artifact
from compressor.core.errors import CheckpointError, DataError, GateFailed, UsageError
from compressor.core.options import RunOptions
from compressor.core.tensors import EncodedTensors
from compressor.evaluate import original
from compressor.evaluate.session import open_session
from compressor.report.tables import run_tables
from compressor.run.pipeline import run
from tests import pico
from tests.core.interrupting import Interrupting

LLM = """
passes: [{pass: jlcm, width: 4, dim: 2, group: 16}, {pass: affine, method: gptq, bits: 4, group: 16, select: '*down*'}]
calibration: {tokens: 256, window: 32}
embeddings: {bits: 4, group: 16}
evaluation: {tokens: 96, window: 32, speed: false}
"""
NETWORK = """
passes: [{pass: affine, method: gptq, bits: 4, group: 16}]
calibration: {samples: 24}
evaluation: {samples: 12, speed: false}
"""


@pytest.fixture(autouse=True)
def folder(texts):
    """A working directory with recipes and texts."""
    (texts / "recipe.yaml").write_text(LLM)
    (texts / "network.yaml").write_text(NETWORK)
    return texts


def options(model: Path, output: str = "out", **changes) -> RunOptions:
    known = {"recipe": "recipe.yaml", "data": "calibration.txt", "eval": "evaluation.txt"}
    return RunOptions(model=str(model), output=Path(output), **(known | changes))


def of_network(kind: str, folder: Path) -> dict:
    """Options for a module from a state dict, with arrays; labels are the network's own."""
    module = pico.write_state_dict(getattr(pico, kind), folder / "weights.pt")
    shape = {"ResNet": (40, 3, 12, 12), "Tied": (40, 70)}[kind]
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    with torch.no_grad():
        labels = module(torch.from_numpy(x)).argmax(1).numpy()
    np.savez(folder / "data.npz", x=x, labels=labels)
    return {"arch": f"tests.pico:{kind}", "data": "data.npz", "eval": None, "recipe": "network.yaml"}


def shipped(directory: str) -> dict[str, bytes]:
    """The files that have to be the same again."""
    files = {file.name: file.read_bytes() for file in sorted(Path(directory).iterdir())}
    assert {"model.onnx", "model.safetensors", "compression.json"} <= files.keys()
    return {
        name: content for name, content in files.items() if name not in ("compression.json", "report.html", "README.md")
    }


def weights(asked: RunOptions) -> bytes:
    """The packed weights that a run comes to, without a graph."""
    return (run(replace(asked, format="safetensors")).directory / "model.safetensors").read_bytes()


def check_report(artifact: Artifact) -> dict:
    """What compression.json says of sizes, hashes, and the proof, held against the files; returns it."""
    report = json.loads((artifact.directory / "compression.json").read_text())
    assert report == artifact.report
    described = ("compression.json", "report.html", "README.md")
    files = {file.name: file.stat().st_size for file in artifact.directory.iterdir() if file.name not in described}
    assert report["size"]["files"] == files
    assert report["size"]["bytes"] == sum(files.values())
    assert report["proof"]["exact"]["max_relative_error"] < 1e-3
    assert report["proof"]["exact"]["n_positions"] > 0
    assert set(report["sha256"]) == set(files)
    assert report["gates"] == {"passed": True, "failures": [], "doubts": [], "blame": []}
    assert "http" not in (artifact.directory / "report.html").read_text().replace("http-equiv", "")
    return report


def test_a_language_model_becomes_an_artifact(llama):
    artifact = run(options(llama))
    report = check_report(artifact)
    assert not Path("out.partial").exists()
    assert {"config.json", "tokenizer.json", "genai_config.json"} <= {
        file.name for file in artifact.directory.iterdir()
    }
    assert report["size"]["bytes"] < report["size"]["original_bytes"]
    assert report["recipe"]["passes"][0]["pass"] == "jlcm"
    assert report["source"]["sha256"]
    assert report["source"]["family"] == "decoder"
    assert report["data"]["calibration"] == "calibration.txt"
    assert report["data"]["overlap"] < 0.02
    assert "model.norm.weight" in report["skipped"]
    quality = report["quality"]
    assert quality["perplexity"] / quality["original_perplexity"] == pytest.approx(quality["ratio"])
    assert 0 < quality["kl_divergence"] < 1
    assert (quality["n_windows"], quality["tokens"]) == (3, 3 * 31)
    tensors = EncodedTensors([artifact.directory / "model.safetensors"])
    kinds = {name.split(".")[-2]: tensors.describe(name)["kind"] for name in tensors}
    assert (kinds["q_proj"], kinds["down_proj"], kinds["embed_tokens"], kinds["k_proj"]) == (
        "codebook", "affine", "affine", "dense",
    )  # fmt: skip
    assert tensors.tied == {"lm_head.weight": "model.embed_tokens.weight"}


@pytest.mark.parametrize("kind", ["ResNet", "Tied"])
def test_any_module_becomes_an_artifact(folder, kind):
    artifact = run(options(folder / "weights.pt", **of_network(kind, folder)))
    report = check_report(artifact)
    quality = report["quality"]
    assert quality["original_accuracy"] == 1.0
    assert quality["n_examples"] == 8
    assert 0 < quality["max_relative_error"] < 0.3
    x = np.load("data.npz")["x"]
    session = open_session(artifact.directory)
    module = pico.write_state_dict(getattr(pico, kind), folder / "again.pt")
    with torch.no_grad():
        expected = module(torch.from_numpy(x)).numpy()
    found = session.run({"x": x})[session.outputs[0]]
    assert np.abs(found - expected).max() < 0.3 * np.abs(expected).max()


@pytest.mark.parametrize("output", ["small", Path("small")])
def test_python_takes_a_network_in_memory_and_gives_one_back(folder, output):
    known = of_network("Tied", folder)
    module = pico.Tied().eval()
    artifact = compressor.compress(module, "network.yaml", output, data=known["data"], format="safetensors")
    assert artifact.directory == Path("small")
    again = compressor.load("small", arch=known["arch"]).state_dict()
    assert again.keys() == module.state_dict().keys()


def test_an_encoder_becomes_an_artifact(bert):
    Path("evaluation.txt").write_text(pico.text(2, n_words=250))
    artifact = run(options(bert, recipe="network.yaml", sets=("calibration.tokens=256", "calibration.window=32")))
    report = check_report(artifact)
    assert report["source"]["family"] == "encoder"
    logits = report["quality"]["outputs"]["logits"]
    assert logits["kind"] == "tokens" and 0.5 < logits["agreement"] == report["quality"]["top1_agreement"] < 1


@pytest.mark.parametrize("mode", ["standard", "compat"])
def test_other_modes_compute_the_same(llama, mode):
    report = check_report(run(options(llama, mode=mode)))
    assert report["mode"] == mode


def test_the_same_command_gives_the_same_bytes(llama):
    torch.manual_seed(1)
    run(options(llama, "first"))
    torch.manual_seed(2)
    run(options(llama, "second"))
    assert shipped("first") == shipped("second")


def test_another_seed_gives_other_bytes(llama):
    assert weights(options(llama, "first")) != weights(options(llama, "second", seed=1))


def test_a_network_of_one_block_gives_the_same_bytes(folder):
    settings = of_network("Tied", folder)
    for name in ("first", "second"):
        run(options(folder / "weights.pt", name, **settings))
    assert shipped("first") == shipped("second")


@pytest.fixture(scope="module")
def uninterrupted(llama):
    """What is shipped by a run with some settings, which is made once."""
    made: dict[tuple[str, ...], dict[str, bytes]] = {}

    def whole(sets: tuple[str, ...]) -> dict[str, bytes]:
        if sets not in made:
            run(options(llama, "whole", sets=sets))
            made[sets] = shipped("whole")
        return made[sets]

    return whole


DISTILLED = ("distill.steps=3", "distill.tokens=256", "calibration.tokens=512")
GENERATED = (*DISTILLED, "distill.generated=0.5", "calibration.generated=0.5")


@pytest.mark.parametrize(
    ("task", "n", "sets"),
    [("surveying", 4, ()), ("encoding", 1, ()), ("encoding", 3, ()), ("encoding", 3, ("jlcm.block_steps=3",)),
     ("encoding", 2, ("calibration.drift=0.5",)),
     ("evaluating", 2, ()), ("distilling", 2, DISTILLED), ("the original writes text", 1, GENERATED)],
)  # fmt: skip
def test_a_resumed_run_gives_the_bytes_of_an_uninterrupted_one(llama, uninterrupted, task, n, sets):
    interrupting = Interrupting(task, n)
    with pytest.raises(KeyboardInterrupt):
        run(options(llama, "parts", sets=sets, progress=interrupting))
    assert not Path("parts").exists()
    assert Path("parts.partial").is_dir()
    again = Interrupting()
    run(options(llama, "parts", sets=sets, resume=True, progress=again))
    assert shipped("parts") == uninterrupted(sets)
    assert ("surveying" in again.seen) == (task in ("surveying", "the original writes text"))
    assert not Path("parts.partial").exists()


def test_distillation_changes_the_artifact_and_is_reported(llama):
    plain = weights(options(llama, "plain", sets=DISTILLED[2:]))
    assert plain != weights(options(llama, "learned", sets=DISTILLED))
    assert [entry["step"] for entry in Artifact.open("learned").report["learning"]] == [3]


def test_text_that_the_original_writes_is_learned_from_in_both_places(llama):
    found = {
        weights(options(llama, name, sets=(*DISTILLED, *further)))
        for name, further in (("plain", ()), ("calibrated", GENERATED[4:]), ("distilled", GENERATED[3:4]))
    }
    assert len(found) == 3


def test_only_the_same_run_is_resumed(llama):
    with pytest.raises(UsageError, match=r"out.partial: no interrupted run to resume; leave --resume out"):
        run(options(llama, resume=True))
    with pytest.raises(KeyboardInterrupt):
        run(options(llama, progress=Interrupting("encoding", 2)))
    with pytest.raises(UsageError, match=r"out.partial: belongs to another run: seed is 0 there and 5 here; leave"):
        run(options(llama, resume=True, seed=5))
    run(options(llama, seed=5))
    assert check_report(Artifact.open("out"))["seed"] == 5


def test_a_failed_gate_keeps_the_artifact_under_another_name_and_says_where_the_loss_came_in(llama):
    run(options(llama))
    good = shipped("out")
    with pytest.raises(
        GateFailed,
        match=r"out: KL divergence is \S+, the gate is 1e-06; the loss came in .* by jlcm at .*; the artifact is kept "
        r"as out.failed",
    ):
        run(options(llama, force=True, sets=("gates.max_kl_divergence=1e-6", "gates.max_perplexity_ratio=50")))
    gates = Artifact.open("out.failed").report["gates"]
    assert gates["passed"] is False
    assert [failure.partition(" is ")[0] for failure in gates["failures"]] == ["KL divergence"]
    assert shipped("out.failed") == good == shipped("out")
    assert not Path("out.partial").exists()
    shares = [each["share"] for each in gates["blame"]]
    assert shares == sorted(shares, reverse=True)
    assert {each["by"] for each in gates["blame"]} >= {"jlcm", "affine", "embeddings"}
    run(options(llama, force=True))
    assert not Path("out.failed").exists()


def test_an_artifact_that_is_too_large_names_its_largest_tensors(llama):
    with pytest.raises(
        GateFailed, match=r"size in MB, every file, is \S+, the gate is 0.001; largest are model.\S+ with"
    ):
        run(options(llama, sets=("gates.max_size=1kB",)))
    assert Artifact.open("out.failed").report["gates"]["blame"] == []


def taught(directory: Path, text: str) -> Path:
    """The network of a directory, taught a text: of random weights, bits may as well lower the perplexity."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokens = torch.tensor(tokenizer(text)["input_ids"])
    windows = tokens[:4096].view(-1, 32)
    module = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    optimizer = torch.optim.Adam(module.parameters(), 3e-3)
    for _ in range(20):
        optimizer.zero_grad()
        module(input_ids=windows, labels=windows).loss.backward()
        optimizer.step()
    module.save_pretrained(directory)
    return directory


def test_a_loss_is_a_gate_in_the_measure_of_the_networks_kind(folder, bert):
    model = taught(pico.llama(folder / "taught"), pico.text(2))
    with pytest.raises(GateFailed, match="perplexity ratio is .*, the gate is 1.001"):
        run(options(model, sets=("gates.max_loss=0.1%", "gates.max_size=10MB")))
    with pytest.raises(GateFailed, match=r"top-1 agreement is \S+, the gate is 0.99999"):
        Path("evaluation.txt").write_text(pico.text(2, n_words=250))
        sets = ("calibration.tokens=256", "calibration.window=32", "gates.max_loss=0.001%")
        run(options(bert, "bert-out", recipe="network.yaml", sets=sets))


def test_what_stands_in_the_place_of_a_failed_artifact_is_kept(llama):
    Path("out.failed").mkdir()
    with pytest.raises(UsageError, match=r"out.failed: is in the way and not ours"):
        run(options(llama))


def test_a_gate_that_was_not_measured_has_failed(llama):
    with pytest.raises(GateFailed, match="top-1 agreement was not measured, the gate is 0.5"):
        run(options(llama, sets=("gates.min_agreement=0.5", "evaluation.tokens=0")))


def test_a_benchmark_that_fails_ends_no_run(llama, monkeypatch):
    def failing(directory, **_):
        raise CheckpointError(f"{directory}/model.onnx: could not be measured; it ran away")

    monkeypatch.setattr(original, "bench", failing)
    artifact = run(options(llama, sets=("evaluation.speed=true", "evaluation.tokens=0")))
    assert artifact.report["speed"] == {"failure": "model.onnx: could not be measured; it ran away"}
    page = (artifact.directory / "report.html").read_text()
    assert "speed could not be measured: model.onnx: could not be measured; it ran away" in page


def test_nan_in_the_weights_is_refused(folder):
    directory = pico.llama(folder / "broken")
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"'model.layers.1.mlp.up_proj.weight' holds 1 NaN or infinite values"):
        run(options(directory))
    assert not Path("out").exists()
    assert not Path("out.partial").exists()


def test_evaluation_data_that_was_calibrated_on_is_refused(llama):
    with pytest.raises(
        DataError, match=r"calibration.txt: overlaps the calibration data calibration.txt; 100.0% of it"
    ):
        run(options(llama, eval="calibration.txt"))
    assert not Path("out").exists()
    assert not Path("out.partial").exists()


def test_a_module_without_data_is_refused_before_work(folder):
    settings = of_network("Tied", folder) | {"data": None}
    with pytest.raises(DataError, match="only language models have built-in data; give --data"):
        run(options(folder / "weights.pt", **settings))
    assert not Path("out.partial").exists()


def test_kept_weights_that_round_to_zero_take_no_bytes(llama):
    """At three bits around the middle many do: the file is smaller than the plan says, and no weight is lost."""
    Path("recipe.yaml").write_text(
        "passes: [{pass: gblm, sparsity: 0.25}, {pass: affine, method: rtn, bits: 3, zero: middle}]\n"
        "calibration: {tokens: 256, window: 32, token_importance: false}\nevaluation: {tokens: 96, speed: false}\n"
    )
    artifact = run(options(llama, format="safetensors"))
    tensors = EncodedTensors([artifact.directory / "model.safetensors"])
    sparse = [name for name in tensors if tensors.describe(name)["kind"] == "sparse"]
    assert sparse
    for name in sparse:
        kept = int((tensors[name].decode() != 0).sum())
        assert 0 < kept < 0.75 * tensors[name].decode().numel()


def test_free_codewords_go_to_safetensors_only(llama):
    free = ("jlcm.grid=free",)
    with pytest.raises(
        UsageError, match=r"recipe: 'model.layers.0.\S+' cannot be written to ONNX: free codewords only"
    ):
        run(options(llama, sets=free))
    artifact = run(options(llama, sets=free, format="safetensors"))
    assert not (artifact.directory / "model.onnx").exists()
    file = artifact.directory / "model.safetensors"
    assert artifact.report["size"]["files"]["model.safetensors"] == file.stat().st_size
    assert artifact.report["proof"] is None
    tensors = EncodedTensors([artifact.directory / "model.safetensors"])
    assert tensors["model.layers.0.self_attn.q_proj.weight"].encoding.table.dtype == torch.float16


def test_what_is_no_artifact_is_not_replaced(llama):
    Path("out").mkdir()
    Path("out/thesis.tex").write_text("the only copy")
    with pytest.raises(UsageError, match="out: is not empty and no artifact of ours"):
        run(options(llama, force=True))
    assert Path("out/thesis.tex").read_text() == "the only copy"


def test_speed_is_measured_beside_the_originals(llama):
    report = check_report(run(options(llama, sets=("evaluation.speed=true",))))
    for speed in (report["speed"], report["original_speed"]):
        assert speed["load_seconds"] > 0
        assert speed["decode_tokens_per_second"] > 0


def test_speed_that_is_left_out_is_not_reported_as_measured(llama):
    artifact = run(options(llama))
    report = check_report(artifact)
    assert (report["speed"], report["original_speed"]) == ({"measured": False}, None)
    assert report["recipe"]["evaluation"]["speed"] is False
    assert "speed and memory were not measured: evaluation.speed is false" in run_tables(report, "out")
    assert "speed and memory, as the recipe asks" in (artifact.directory / "report.html").read_text()
