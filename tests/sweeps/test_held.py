"""What reaches a block's layers is computed once, and every tensor is what it would have been."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import compressor.plan.recipe
from compressor.checkpoints import Checkpoint, open_checkpoint
from compressor.core.tensors import EncodedTensors
from compressor.core.work import Work
from compressor.graph.blocks import layers
from compressor.plan.planning import make_plan
from compressor.plan.recipe_file import load_recipe
from compressor.sweeps import held
from compressor.sweeps.encode import encode_network
from compressor.sweeps.held import Held, folder_of_held
from compressor.sweeps.network import Network, hidden_of
from compressor.sweeps.survey import Survey
from tests import pico

RECIPE = """
passes: [{{pass: affine, method: gptq, bits: 3, group: 16, zero: learned}}]
embeddings: {{bits: 16}}
calibration: {{drift: {drift}, token_importance: false, correct_means: {means}}}
"""


def of(config: transformers.PretrainedConfig, kind: type):
    return lambda folder: pico.saved(config, kind, folder)


SMALL: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
NETWORKS = {
    "llama": pico.llama,
    "gpt2": pico.gpt2,
    "neox, attention and feed-forward side by side": of(
        transformers.GPTNeoXConfig(**SMALL, use_parallel_residual=True), transformers.GPTNeoXForCausalLM
    ),
    "gemma2": of(
        transformers.Gemma2Config(**SMALL, num_key_value_heads=2, head_dim=8), transformers.Gemma2ForCausalLM
    ),
    "mixtral": of(
        transformers.MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=4), transformers.MixtralForCausalLM
    ),
    "bert": pico.bert,
    "bloom, whose masks are of heads": of(
        transformers.BloomConfig(vocab_size=300, hidden_size=32, n_layer=2, n_head=4), transformers.BloomForCausalLM
    ),
    "albert, no chain of blocks": partial(pico.albert, n_groups=2),
}  # fmt: skip


def encoded(
    source: Path | Checkpoint, folder: Path, drift: float = 0.0, means: bool = False,
    batches: list[dict[str, Tensor]] | None = None,
) -> tuple[EncodedTensors, list[Tensor], Counter[str]]:  # fmt: skip
    """The tensors, what the last block gives, and how often each layer's product is computed for an example."""
    folder.mkdir()
    (folder / "recipe.yaml").write_text(RECIPE.format(drift=drift, means=str(means).lower()))
    checkpoint = open_checkpoint(source) if isinstance(source, Path) else source
    recipe = load_recipe(folder / "recipe.yaml")
    (folder / "work").mkdir()
    products: Counter[str] = Counter()
    plain = nn.functional.linear

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        products["rows"] += x.numel() // x.shape[-1] * weight.numel()
        return plain(x, weight, bias)

    network = Network(checkpoint, fast=False)
    batches, plan = batches or pico.token_batches(size=4), make_plan(checkpoint, recipe)
    nn.functional.linear = counted
    try:
        tensors, _ = encode_network(
            network, batches, recipe, plan, Survey(), Work(folder / "work", 0), lambda note: None
        )
    finally:
        nn.functional.linear = plain
    assert not [path for path in (folder / "work").iterdir() if path.is_dir()]
    return tensors, network.last, products


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(("drift", "means"), [(0.5, False), (0.0, True)], ids=["drift", "means"])
def test_tensors_and_outputs_are_the_same(name, drift, means, tmp_path, monkeypatch):
    monkeypatch.setattr(compressor.plan.recipe, "SMALLEST", 1)
    source = NETWORKS[name](tmp_path / "source")
    found, outputs, products = encoded(source, tmp_path / "held", drift, means)
    monkeypatch.setattr(Held, "note", lambda self, rows: None)
    wanted, same, all_of_them = encoded(source, tmp_path / "anew", drift, means)
    assert found.keys() == wanted.keys()
    for each in wanted:
        assert torch.equal(found[each].decode(), wanted[each].decode()), each
    assert all(torch.equal(one, other) for one, other in zip(outputs, same, strict=True))
    few = "gpt2", "mixtral", "bloom", "albert"  # no linear, those of experts, tried with all examples, one block
    if drift and not name.startswith(few):
        assert products["rows"] < 0.75 * all_of_them["rows"]


class Read(nn.Module):
    """A block that reads what its first layer gives once more at its end, behind a weight of zero."""

    def __init__(self, again: bool) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))
        self.again = again

    def forward(self, hidden_states: Tensor) -> Tensor:
        first = self.a(hidden_states)
        last = self.c(self.b(first.relu()).relu())
        return last + 0.0 * first if self.again else last


class Pair(nn.Module):
    def __init__(self, again: bool = True) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Read(again), Read(again)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def noting(into: Held):
    return lambda _, args: into.note(args[0])


@pytest.mark.parametrize("again", [False, True])
def test_what_is_read_again_is_not_passed_by(again, tmp_path):
    model = Pair(again)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    arch = f"tests.sweeps.test_held:{'Pair' if again else 'Single'}"
    network = Network(open_checkpoint(tmp_path / "weights.pt", arch=arch), fast=False)
    for name, block, reached in network.sweep([{"": torch.randn(5, 4)}, {"": torch.randn(5, 4)}]):
        assert name
        inside = layers(block)
        with folder_of_held(tmp_path / "held") as folder:
            before = Held(network, block, reached, folder)
            for layer in inside.values():
                before.advance([layer])
                for i, arguments in enumerate(reached):
                    hook = layer.register_forward_pre_hook(noting(before))
                    with before.begun(i), hook:
                        network.step(block, arguments)
            before.advance(())
            assert before._passed == [inside[each] for each in inside if each[0] in ("b" if again else "ab")]
            with before.begun(1):
                found = network.step(block, reached[1])
            assert torch.equal(found, block(hidden_of(reached[1])))


class Single(Pair):
    def __init__(self) -> None:
        super().__init__(again=False)


class Strange(nn.Module):
    """A block as strangers write it; rows (batch, tokens, 16) to the same."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(16, 16) for _ in range(3))


class Chosen(Strange):
    """Of large inputs, of which the first example has none, it needs its first layer once more."""

    def forward(self, x: Tensor) -> Tensor:
        first = self.a(x)
        last = self.b(first.tanh())
        return self.c(torch.where(x.amax((1, 2), keepdim=True) > 2.5, first, last).relu())


class Routed(Strange):
    """Each example takes one of two ways, whatever its gate thinks of how much."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        way = self.gate(-x.mean(1)).argmax(-1)[:, None, None]
        return self.c(torch.where(way == 0, self.a(x), self.b(x)).relu())


class Looping(Strange):
    """A layer is called as often as values say: once for the first example."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x).tanh()).tanh()
        return self.c(self.b(y) if x.amax() > 2.8 else y)


class Unlike(Strange):
    """Another block of the kind needs more of its layers, behind what makes a number of NaN."""

    more = False

    def forward(self, x: Tensor) -> Tensor:
        first = self.a(x)
        last = self.b(first.relu())
        return self.c((last + first.nan_to_num() if self.more else last).relu())


class Keeping(Strange):
    """What a layer gives is kept, for the next block to read."""

    before: tuple[Keeping, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        self.kept = self.a(x)
        read = self.before[0].kept if self.before and self.before[0].kept.shape == x.shape else 0.0
        return self.c((self.b(self.kept.relu()) + read).relu())


class Moving(Strange):
    """It remembers the mean of what a layer gives."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(16))

    def forward(self, x: Tensor) -> Tensor:
        first = self.a(x)
        self.mean = 0.9 * self.mean + 0.1 * first.mean((0, 1))
        return self.c(self.b(first.relu() + self.mean).relu())


class Selecting(Strange):
    """A layer is given some of the rows, and none at times."""

    least = 0.9

    def forward(self, x: Tensor) -> Tensor:
        y, some = self.a(x), x[..., 0] > self.least
        y[some] = self.b(y[some].relu())
        return self.c(y.relu())


class ToNone(Selecting):
    least = 9.0


class Writing(Strange):
    """What two layers are given is written to in between."""

    def __init__(self) -> None:
        super().__init__()
        self.d = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).relu()
        one = self.b(y)
        y += 1.0
        return self.d((one * self.c(y)).relu())


class Named(Strange):
    """Layers are called by keyword."""

    def forward(self, x: Tensor) -> Tensor:
        first = self.a(input=x)
        return self.c(input=self.b(input=first.relu()).relu() + first)


class OwnForward(Strange):
    """A layer's forward is an attribute of its own."""

    def __init__(self) -> None:
        super().__init__()
        plain = self.a.forward
        self.a.forward = lambda input: 2.0 * plain(input)

    def forward(self, x: Tensor) -> Tensor:
        first = self.a(x)
        return self.c(self.b(first.relu()).relu() + first)


STRANGE = {
    kind.__name__: kind
    for kind in (Chosen, Routed, Looping, Unlike, Keeping, Moving, Selecting, ToNone, Writing, Named, OwnForward)
}


class Stranges(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        first, second = (STRANGE[kind]() for _ in range(2))
        vars(second).update(more=True, before=(first,))
        self.blocks = nn.ModuleList([first, second])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


globals().update({f"Two{name}": partial(Stranges, name) for name in STRANGE})


@pytest.mark.parametrize("name", STRANGE)
def test_a_network_that_depends_on_values_is_what_it_would_be(name, tmp_path, monkeypatch):
    monkeypatch.setattr(compressor.plan.recipe, "SMALLEST", 1)
    torch.save(pico.lively(Stranges(name), 0).state_dict(), tmp_path / "weights.pt")
    source = open_checkpoint(tmp_path / "weights.pt", arch=f"tests.sweeps.test_held:Two{name}")
    generator = torch.Generator().manual_seed(6)
    batches = [{"": torch.randn(3, 4, 16, generator=generator)} for _ in range(6)]
    for drift, means in ((0.0, True), (0.5, False)):
        found, outputs, _ = encoded(source, tmp_path / f"held-{drift}", drift, means, batches)
        assert all(bool(found[each].decode().isfinite().all()) for each in found)
        if name == "Moving":  # whatever is run changes it
            continue
        with monkeypatch.context() as without:
            without.setattr(Held, "note", lambda self, rows: None)
            wanted, same, _ = encoded(source, tmp_path / f"anew-{drift}", drift, means, batches)
        for each in wanted:
            assert torch.equal(found[each].decode(), wanted[each].decode()), each
        assert all(torch.equal(one, other) for one, other in zip(outputs, same, strict=True))


def test_a_full_disk_costs_time_alone(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(compressor.plan.recipe, "SMALLEST", 1)
    source = pico.llama(tmp_path / "source")
    wanted, _, _ = encoded(source, tmp_path / "room")
    monkeypatch.setattr(held.shutil, "disk_usage", lambda path: SimpleNamespace(free=held._ROOM))
    found, _, _ = encoded(source, tmp_path / "full")
    assert all(torch.equal(found[each].decode(), wanted[each].decode()) for each in wanted)
    assert caplog.text.count("is computed anew each time: [Errno 28] No space left on device") == 1
