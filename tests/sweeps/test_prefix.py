"""Of a network that is one block, what is settled is run once, and every layer sees what it saw before."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, nn

import compressor.plan.recipe
import compressor.sweeps.prefix
from compressor.checkpoints import open_checkpoint
from compressor.core.batch import Batch
from compressor.core.work import Work
from compressor.graph.blocks import layers
from compressor.plan.planning import make_plan
from compressor.plan.recipe_file import load_recipe
from compressor.sweeps.encode import encode_network
from compressor.sweeps.moments import layer_stages, second_moments
from compressor.sweeps.network import Network
from compressor.sweeps.prefix import Settled
from compressor.sweeps.survey import Survey
from tests import pico
from tests.graph import zoo

RECIPE = "passes: [{pass: affine, method: gptq, bits: 8, group: row}]\ncalibration: {correct_means: true}"


class Twice(nn.Module):
    """A chain that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.chain, self.head = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(True)), nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.chain(self.chain(x)).mean((2, 3)))


class Around(nn.Module):
    """What an early chain gives is read again by a late one, behind a weight of zero."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(True))
        self.second = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(True))
        self.third = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(True), nn.Conv2d(8, 4, 1))
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.third(self.second(x) + self.gate * x).mean((2, 3))


NETWORKS = {
    "tests.graph.zoo:VGG": (zoo.VGG, 16), "tests.graph.zoo:ResNet": (zoo.ResNet, 16),
    "tests.graph.zoo:MobileNet": (zoo.MobileNet, 16), "tests.graph.zoo:UNet": (zoo.UNet, 16),
    "tests.sweeps.test_prefix:Twice": (Twice, 8),
    "tests.sweeps.test_prefix:Around": (Around, 8),
}  # fmt: skip


def batches_of(side: int, n: int = 3) -> list[Batch]:
    sizes = [4] * (n - 1) + [2]
    return [{"": torch.randn(size, 3, side, side, generator=torch.Generator().manual_seed(size))} for size in sizes]


@pytest.fixture(params=NETWORKS)
def network(request, tmp_path):
    kind, side = NETWORKS[request.param]
    pico.write_state_dict(kind, tmp_path / "weights.pt")
    return Network(open_checkpoint(tmp_path / "weights.pt", arch=request.param), fast=False), batches_of(side)


def moments(network: Network, batches: list[Batch], limit: int) -> tuple[dict[str, Tensor], Counter[str]]:
    """H of every layer while their weights change one after another, and examples that each layer was run on."""
    compressor.sweeps.prefix.LIMIT = limit
    found: dict[str, Tensor] = {}
    examples: Counter[str] = Counter()
    for _, block, reached in network.sweep(batches):
        inside = layers(block)
        for name, module in inside.items():
            module.register_forward_pre_hook(lambda _, args, name=name: examples.update({name: len(args[0])}))
        settled = Settled(network, block, reached, [module.weight for module in inside.values()])
        for stage in layer_stages(network, block, "", reached[0]):
            for name in stage.names:
                settled.advance(())
                found |= second_moments(
                    network, block, inside, [name], stage.calls, reached, {}, settled
                )[0]  # fmt: skip
                inside[name].weight.data *= 0.9
                settled.done(inside[name].weight)
        assert not any("forward" in vars(module) for module in block.modules())
    return found, examples


def test_every_layer_sees_what_it_would_see(network, monkeypatch):
    monkeypatch.setattr(compressor.sweeps.prefix, "LIMIT", 0)
    model, batches = network
    wanted, all_of = moments(model, batches, 0)
    found, examples = moments(model, batches, 10**9)
    assert found.keys() == wanted.keys()
    assert len(found) > 1
    for name, moment in wanted.items():
        assert torch.equal(found[name], moment), name
    first = next(iter(examples))
    if type(model.module) in (zoo.VGG, zoo.ResNet, zoo.MobileNet):
        assert examples[first] < 0.7 * all_of[first]


def test_what_is_read_again_is_not_passed_by(tmp_path):
    pico.write_state_dict(Around, tmp_path / "weights.pt")
    network = Network(open_checkpoint(tmp_path / "weights.pt", arch="tests.sweeps.test_prefix:Around"), fast=False)
    for _, block, reached in network.sweep(batches_of(8)):
        settled = Settled(network, block, reached, ())
        assert len(settled.chain) == 8
        assert list(settled.starts) == [1, 2, 3, 6, 7, 8]


def test_the_tensors_are_the_same(network, tmp_path, monkeypatch):
    model, batches = network
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    monkeypatch.setattr(compressor.plan.recipe, "SMALLEST", 1)
    recipe, files = load_recipe(tmp_path / "recipe.yaml"), []
    for limit in (0, 10**9):
        monkeypatch.setattr(compressor.sweeps.prefix, "LIMIT", limit)
        work = Work(tmp_path / str(limit), 0)
        work.folder.mkdir()
        fresh, plan = Network(model.checkpoint, False), make_plan(model.checkpoint, recipe)
        files.append(encode_network(fresh, batches, recipe, plan, Survey(), work, lambda note: None)[1][0])
    assert files[0].read_bytes() == files[1].read_bytes()
