"""Blocks on the original's inputs: by definition, independent of one another, the same bytes whoever makes them."""

from __future__ import annotations

import hashlib
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from compressor.checkpoints import open_checkpoint
from compressor.checkpoints.again import Opening
from compressor.core.contract import Statistics
from compressor.core.errors import CheckpointError, RecipeError, UsageError
from compressor.core.options import RunOptions
from compressor.core.tensors import EncodedTensors, named_tensors
from compressor.core.work import Work
from compressor.graph.blocks import matrix_of
from compressor.passes.affine import Affine
from compressor.plan.planning import make_plan
from compressor.plan.recipe_file import load_recipe
from compressor.run.pipeline import run
from compressor.run.prepare import prepare
from compressor.runtime.pool import Processes
from compressor.sweeps.chain import Choice
from compressor.sweeps.encode import Apart, encode_network
from compressor.sweeps.network import Network
from compressor.sweeps.side_by_side import Workers
from compressor.sweeps.survey import Survey
from tests import pico
from tests.conftest import Checkpoints
from tests.core.interrupting import Interrupting
from tests.sweeps.test_encode import Mixed

RECIPE = """
passes: [{{pass: affine, method: gptq, bits: 2, group: 16, zero: learned}}]
embeddings: {{bits: 4, group: 16}}
calibration: {{inputs: {inputs}, token_importance: false, correct_means: {means}, tokens: 64, window: 32}}
evaluation: {{tokens: 0, speed: false}}
"""


def recipe_in(folder: Path, inputs: str = "original", means: bool = False) -> Path:
    (folder / "recipe.yaml").write_text(RECIPE.format(inputs=inputs, means=str(means).lower()))
    return folder / "recipe.yaml"


def encoded(
    folder: Path, source: Path, inputs: str = "original", workers: Workers | None = None, done: list[str] | None = None
) -> EncodedTensors:  # fmt: skip
    """The tensors of a network, whose blocks' files lie in `folder`."""
    folder.mkdir(exist_ok=True)
    checkpoint, recipe = open_checkpoint(source), load_recipe(recipe_in(folder, inputs))
    network, plan, work = Network(checkpoint, fast=False), make_plan(checkpoint, recipe), Work(folder, 0)
    note = (lambda name: None) if done is None else done.append
    return encode_network(network, pico.token_batches(), recipe, plan, Survey(), work, note, workers)[0]


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.glob("*.safetensors"))}


@torch.no_grad()
def test_a_layer_is_encoded_on_what_reaches_it_in_the_original(tmp_path: Path, llama: Path):
    found = encoded(tmp_path / "original", llama)
    module = transformers.AutoModelForCausalLM.from_pretrained(llama)
    method = Affine(method="gptq", bits=2, group=16, zero="learned")
    for name in (f"model.layers.{i}.{layer}" for i in range(3) for layer in ("self_attn.o_proj", "mlp.down_proj")):
        layer, rows = module.get_submodule(name), []
        with layer.register_forward_pre_hook(lambda _, args, rows=rows: rows.append(args[0].flatten(0, -2).double())):
            for batch in pico.token_batches():
                module(**batch)
        inputs, matrix = torch.cat(rows), matrix_of(layer).float()
        moment = (inputs.T @ inputs / len(inputs)).float()
        wanted = method.encode(matrix, Statistics(moment), torch.Generator()).decode()
        # 2 bits: where a value lies between two of the grid, the last bits of a sum decide
        same = (found[f"{name}.weight"].decode() - wanted).abs() < 1e-4
        assert same.float().mean() > 0.98, name


def test_a_block_does_not_depend_on_those_before_it(tmp_path: Path, llama: Path):
    """Another first block is another network, whose third block is given something else; that one's own encoding is
    not. So: a file that is there already, of whatever content, changes no other."""
    encoded(tmp_path / "whole", llama)
    whole = digests(tmp_path / "whole")
    for inputs, same in (("original", True), ("prefix", False)):
        folder = tmp_path / inputs
        encoded(folder, llama, inputs)
        first, last = folder / "model.layers.0.safetensors", folder / "model.layers.2.safetensors"
        expected = digests(folder)[last.name]
        coarse = tmp_path / f"coarse-{inputs}"
        coarse.mkdir()
        (coarse / "recipe.yaml").write_text(RECIPE.format(inputs=inputs, means="false").replace("bits: 2", "bits: 4"))
        checkpoint, recipe = open_checkpoint(llama), load_recipe(coarse / "recipe.yaml")
        encode_network(
            Network(checkpoint, fast=False), pico.token_batches(), recipe, make_plan(checkpoint, recipe), Survey(),
            Work(coarse, 0), lambda name: None,
        )  # fmt: skip
        first.write_bytes((coarse / first.name).read_bytes())
        last.unlink()
        encoded(folder, llama, inputs)
        assert (digests(folder)[last.name] == expected) is same
        if same:
            assert expected == whole[last.name]
        else:
            assert expected != whole[last.name]


@torch.no_grad()
def test_a_block_computes_as_before_once_it_is_encoded(tmp_path: Path, checkpoints: Checkpoints):
    checkpoint = open_checkpoint(checkpoints("bert"))
    recipe = load_recipe(recipe_in(tmp_path, means=True))
    network, plan, work = Network(checkpoint, fast=False), make_plan(checkpoint, recipe), Work(tmp_path, 0)
    sweep = network.sweep(pico.token_batches())
    name, block, reached = next(sweep)
    before = {each: tensor.clone() for each, tensor in named_tensors(block).items()}
    wanted = network.step(block, reached[0])
    Apart(Choice(recipe, plan), {}, Survey(), work).encode(network, name, block, reached)
    assert all(torch.equal(tensor, before[each]) for each, tensor in named_tensors(block).items())
    assert torch.equal(network.step(block, reached[0]), wanted)
    stored = EncodedTensors([work.file(name)])
    moved = [each for each in before if each.endswith("bias") and "LayerNorm" not in each
             and not torch.equal(stored[f"{name}.{each}"].decode(), before[each])]  # fmt: skip
    assert moved, "no bias makes up for the mean"


class Killing(list):
    """Notes what is done, and kills one of the workers when the first block is."""

    def __init__(self, workers: Workers) -> None:
        super().__init__()
        self.workers, self.killed = workers, 0

    def append(self, name: str) -> None:
        super().append(name)
        if name.startswith("model.layers") and not self.killed:
            assert isinstance(self.workers._pool, Processes)
            self.killed = self.workers._pool.pids[0]
            os.kill(self.killed, signal.SIGKILL)


def test_whoever_encodes_the_bytes_are_the_same_and_a_killed_worker_costs_its_block(
    tmp_path: Path, checkpoints: Checkpoints
):
    source = checkpoints("llama", n_layers=6)
    encoded(tmp_path / "alone", source)
    with Workers(Opening(source), tmp_path / "side", "local", 2, "auto", 0) as workers:
        done = Killing(workers)
        encoded(tmp_path / "beside", source, workers=workers, done=done)
        assert isinstance(workers._pool, Processes)
        later = workers._pool.pids
    assert done.killed
    assert done.killed not in later
    assert sorted(done) == [*(f"model.layers.{i}" for i in range(6)), "tables"]
    assert digests(tmp_path / "beside") == digests(tmp_path / "alone")
    assert not (tmp_path / "side").exists()
    for pid in later:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_run_that_is_interrupted_goes_on_with_another_number_of_workers(tmp_path: Path, llama: Path):
    for seed, name in enumerate(("calibration.txt", "evaluation.txt")):
        (tmp_path / name).write_text(pico.text(seed + 1))
    texts = {"data": str(tmp_path / "calibration.txt"), "eval": str(tmp_path / "evaluation.txt")}
    options = RunOptions(str(llama), str(recipe_in(tmp_path)), tmp_path / "out", format="safetensors", **texts)
    with pytest.raises(KeyboardInterrupt):
        run(replace(options, workers=2, progress=Interrupting("encoding", 2)))
    work = tmp_path / "out.partial" / "work"
    assert not (work / "side-by-side").exists()
    left = digests(work)
    assert "model.layers.0.safetensors" in left or "model.layers.1.safetensors" in left
    run(replace(options, resume=True))
    run(replace(options, output=tmp_path / "whole"))
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        (
            "calibration.drift=0.5",
            "calibration.drift makes up for how far what the compressed blocks give is from that; write "
            "calibration.drift: 0, or calibration.inputs: prefix",
        ),
        (
            "jlcm.block_steps=4",
            "steps of jlcm on blocks learn on what the compressed ones before give; write no such steps, or "
            "calibration.inputs: prefix",
        ),
    ],
)
def test_what_needs_the_compressed_prefix_is_refused_by_name(tmp_path: Path, llama: Path, setting, expected):
    (tmp_path / "r.yaml").write_text(
        "passes: [{pass: jlcm, width: 4, dim: 2, group: 16}]\ncalibration: {inputs: original}"
    )
    make_plan(open_checkpoint(llama), load_recipe(tmp_path / "r.yaml"))
    with pytest.raises(RecipeError) as caught:
        make_plan(open_checkpoint(llama), load_recipe(tmp_path / "r.yaml", [setting]))
    assert str(caught.value) == (
        f"r: calibration.inputs: original gives each block what the original's give, and {expected}"
    )


@pytest.mark.parametrize(
    ("inputs", "changes", "expected"),
    [
        ("prefix", {"workers": 2}, "--workers 2: with calibration.inputs: prefix a block waits for the"),
        ("prefix", {"engine": "ray"}, "--engine ray: with calibration.inputs: prefix a block waits for the"),
        ("original", {"workers": 0}, "--workers: is 0; give 1 or more"),
    ],
)  # fmt: skip
def test_workers_that_cannot_be_are_refused_in_the_plan(tmp_path: Path, llama: Path, inputs, changes, expected):
    options = RunOptions(str(llama), str(recipe_in(tmp_path, inputs)), tmp_path / "out")
    with pytest.raises(UsageError) as caught:
        prepare(replace(options, **changes))
    assert str(caught.value).startswith(expected)


def test_a_network_without_blocks_has_nothing_to_share_out(tmp_path: Path):
    torch.save(Mixed().state_dict(), tmp_path / "mixed.pt")
    options = RunOptions(
        str(tmp_path / "mixed.pt"), str(recipe_in(tmp_path)), tmp_path / "out", workers=2,
        arch="tests.sweeps.test_encode:Mixed",
    )  # fmt: skip
    with pytest.raises(UsageError, match="has no repeated block, of which several could be encoded at a time"):
        prepare(options)


def test_the_plan_counts_the_workers(tmp_path: Path, llama: Path):
    options = RunOptions(str(llama), str(recipe_in(tmp_path)), tmp_path / "out")
    plans = [prepare(replace(options, workers=n)).plan for n in (1, 2, 3)]
    one, two, three = (plan.peak_memory for plan in plans)
    assert two > one + 400_000_000
    assert three - two == pytest.approx((two - one) / 2, rel=0.05)
    assert "blocks are encoded side by side; each of 2 workers takes about 0.4 GB" in plans[1].notes


class Block(nn.Linear):
    def forward(self, x: torch.Tensor, change: object = None) -> torch.Tensor:
        return x + super().forward(x)


class Row(nn.Module):
    """Blocks that could be encoded side by side, as they are listed."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(80, 80) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Sequence(Row):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*self.blocks)


class Summed(Row):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = x
        for block in self.blocks:
            x = block(x)
            found = found + x
        return found


class Calling(Row):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x, lambda y: y)
        return x


def options_of(folder: Path, kind: type[nn.Module], **changes) -> RunOptions:
    torch.save(kind().state_dict(), folder / "model.pt")
    for seed, name in enumerate(("data", "eval")):
        rows = np.random.default_rng(seed).standard_normal((32, 80)).astype(np.float32)
        np.savez(folder / f"{name}.npz", x=rows)
    return RunOptions(
        str(folder / "model.pt"), str(recipe_in(folder)), folder / "out",
        arch=f"tests.sweeps.test_side_by_side:{kind.__name__}",
        data=str(folder / "data.npz"), eval=str(folder / "eval.npz"), format="safetensors", **changes,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (Sequence, "has no repeated block, of which several could be encoded at a time: no ModuleList"),
        (Summed, "does not call its blocks in a row, each on what the one before gives and nothing else"),
        (Calling, "'blocks.0' is called with what cannot go to another process"),
    ],
)
def test_a_network_whose_blocks_are_no_row_is_refused_in_the_plan(tmp_path: Path, kind, expected):
    prepare(options_of(tmp_path, kind))
    with pytest.raises((UsageError, CheckpointError), match=expected):
        prepare(options_of(tmp_path, kind, workers=2))


def test_blocks_that_turn_out_to_be_no_row_are_refused_before_one_is_encoded(tmp_path: Path):
    options = options_of(tmp_path, Summed)
    checkpoint, recipe = open_checkpoint(Path(options.model), arch=options.arch), load_recipe(options.recipe)
    batches = [{"": torch.ones(2, 80)}]
    workers = Workers(Opening(Path(options.model), options.arch), tmp_path / "side", "local", 2, "auto", 0)
    with workers, pytest.raises(UsageError, match="does not call its blocks in a row"):
        encode_network(
            Network(checkpoint, fast=False), batches, recipe, make_plan(checkpoint, recipe), Survey(),
            Work(tmp_path, 0), lambda name: None, workers,
        )  # fmt: skip
    assert not list(tmp_path.glob("*.safetensors"))


def test_there_are_no_more_workers_than_blocks_in_plan_and_run(tmp_path: Path):
    three, many = (prepare(options_of(tmp_path, Row, workers=n)).plan for n in (3, 10**12))
    assert many.peak_memory == three.peak_memory > prepare(options_of(tmp_path, Row)).plan.peak_memory + 10**9
    assert any("each of 3 workers takes" in note and f"and not {10**12}" in note for note in many.notes)
    options = options_of(tmp_path, Row)
    checkpoint, recipe = open_checkpoint(Path(options.model), arch=options.arch), load_recipe(options.recipe)
    with Workers(Opening(Path(options.model), options.arch), tmp_path / "side", "local", 10**12, "auto", 0) as workers:
        encode_network(
            Network(checkpoint, fast=False), [{"": torch.ones(2, 80)}], recipe, make_plan(checkpoint, recipe), Survey(),
            Work(tmp_path, 0), lambda name: None, workers,
        )  # fmt: skip
    assert len(list(tmp_path.glob("blocks.*.safetensors"))) == 3


def test_a_cluster_is_not_looked_for_without_ray_nor_named_without_its_engine(tmp_path: Path, monkeypatch):
    with pytest.raises(UsageError, match="--address 10.0.0.1:6379: is of a Ray cluster; add --engine ray"):
        prepare(options_of(tmp_path, Row, workers=2, address="10.0.0.1:6379"))
    monkeypatch.setattr("compressor.run.prepare.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="--engine ray: ray is not installed"):
        prepare(options_of(tmp_path, Row, engine="ray"))


@pytest.mark.slow
def test_ray_tasks_make_the_same_bytes(tmp_path: Path, llama: Path):
    ray = pytest.importorskip("ray")
    encoded(tmp_path / "alone", llama)
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        with Workers(Opening(llama), tmp_path / "side", "ray", None, "auto", 0) as workers:
            encoded(tmp_path / "beside", llama, workers=workers)
    finally:
        ray.shutdown()
    assert digests(tmp_path / "beside") == digests(tmp_path / "alone")
