"""Networks as strangers write them, by kind: small, in evaluation mode, with inputs for each.

What a class is called is what is odd about it. `inputs` are rows that its forward takes.
"""

from __future__ import annotations

import dataclasses
import warnings

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


class Several(nn.Module):
    """Networks of one input side by side, with an output of each by its name: one run of the command for all of them.

    One that is made of blocks is none of these: side by side they are no chain.
    """

    kinds: tuple[type[nn.Module], ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self.each = nn.ModuleDict({kind.__name__: kind() for kind in self.kinds})

    @classmethod
    def inputs(cls) -> dict[str, np.ndarray]:
        return cls.kinds[0].inputs()  # type: ignore[attr-defined]

    def forward(self, x):
        return {name: network(x) for name, network in self.each.items()}


class Block(nn.Module):
    """Vectors (batch, 64) to vectors (batch, 64)."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(64, 96), nn.Linear(96, 64)

    def forward(self, x):
        return self.narrow(torch.relu(self.wide(x)))


class Blocks(nn.Module):
    """Four blocks between a first layer and a last; what lies between them is each subclass's own."""

    block: type[nn.Module] = Block

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.norm = nn.Linear(64, 64), nn.Linear(64, 10), nn.LayerNorm(64)
        self.blocks = nn.ModuleList(self.block() for _ in range(4))
        self.scales = nn.Parameter(torch.tensor([0.5, 1.5, 0.25, 2.0]))

    @classmethod
    def inputs(cls) -> dict[str, np.ndarray]:
        return {"x": normal(64, 64)}

    def forward(self, x):
        return self.last(self.between(self.first(x)))

    def between(self, x):
        raise NotImplementedError


class Chain(Blocks):
    def between(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Residual(Blocks):
    def between(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


class NormBetween(Blocks):
    def between(self, x):
        for block in self.blocks:
            x = self.norm(block(x))
        return x


class SideBySide(Blocks):
    def between(self, x):
        return sum(block(x) for block in self.blocks)


class Scaled(Blocks):
    def between(self, x):
        for i, block in enumerate(self.blocks):
            x = self.scales[i] * block(x)
        return x


class Collecting(Blocks):
    """The outputs of all blocks are summed behind them."""

    def between(self, x):
        seen = []
        for block in self.blocks:
            x = block(x)
            seen.append(x)
        return torch.stack(seen).sum(0)


class LastAdded(Blocks):
    """A chain but for its end."""

    def between(self, x):
        for block in list(self.blocks)[:-1]:
            x = block(x)
        return x + self.blocks[-1](x)


class Backwards(Blocks):
    def between(self, x):
        for block in reversed(self.blocks):
            x = block(x)
        return x


class Skipping(Blocks):
    """One block is never called."""

    def between(self, x):
        for block in list(self.blocks)[1:]:
            x = block(x)
        return x


class AlikeButOne(Blocks):
    """The first blocks do not tell what the parent does around a later one."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(7))

    def between(self, x):
        for i, block in enumerate(self.blocks):
            x = x + (block(2 * x) if i == 5 else block(x))
        return x


class CalledTwice(Blocks):
    def between(self, x):
        for block in self.blocks:
            x = block(block(x))
        return x


class InsidesCalled(Blocks):
    """Whose blocks are never called: their layers are."""

    def between(self, x):
        for block in self.blocks:
            x = block.narrow(functional.gelu(block.wide(x)))
        return x


class Pair(Block):
    """Gives what goes on, and what it adds."""

    def forward(self, x):
        made = super().forward(x)
        return x + made, made


class Pairs(Blocks):
    block = Pair

    def between(self, x):
        total = 0
        for block in self.blocks:
            x, made = block(x)
            total = total + made
        return x + total


class FirstOfPairs(Blocks):
    block = Pair

    def between(self, x):
        for block in self.blocks:
            x = block(x)[0]
        return x


class SecondOfPairs(Blocks):
    block = Pair

    def between(self, x):
        for block in self.blocks:
            x = block(x)[1]
        return x


class Named(Block):
    def forward(self, x):
        made = super().forward(x)
        return {"hidden": x + made, "made": made}


class Dicts(Blocks):
    block = Named

    def between(self, x):
        total = 0
        for block in self.blocks:
            found = block(x)
            x, total = found["hidden"], total + found["made"]
        return x + total


class Remembering(Block):
    """Takes and gives a memory beside the hidden state."""

    def forward(self, x, memory):
        memory = memory + super().forward(x)
        return torch.tanh(memory), memory


class Memories(Blocks):
    block = Remembering

    def between(self, x):
        memory = torch.zeros_like(x)
        for block in self.blocks:
            x, memory = block(x, memory)
        return x + memory


class Previous(Block):
    def forward(self, x, before):
        return super().forward(x) + before


class Previouses(Blocks):
    """Each block is given the output of the one before the last as well."""

    block = Previous

    def between(self, x):
        before = x
        for block in self.blocks:
            x, before = block(x, before), x
        return x


class ListsOfLists(nn.Module):
    """Pairs of layers in lists of a list, as in many a U-Net."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 64), nn.Linear(64, 10)
        self.pairs = nn.ModuleList(nn.ModuleList([nn.Linear(64, 96), nn.Linear(96, 64)]) for _ in range(3))

    inputs = Blocks.inputs

    def forward(self, x):
        x = self.first(x)
        for up, down in self.pairs:
            x = x + down(torch.relu(up(x)))
        return self.last(x)


class ListsOfDicts(ListsOfLists):
    def __init__(self) -> None:
        super().__init__()
        del self.pairs
        self.pairs = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(64, 96), "down": nn.Linear(96, 64)}) for _ in range(3)
        )

    def forward(self, x):
        x = self.first(x)
        for pair in self.pairs:
            x = x + pair["down"](torch.relu(pair["up"](x)))
        return self.last(x)


class DictOfLists(ListsOfLists):
    def __init__(self) -> None:
        super().__init__()
        del self.pairs
        self.stages = nn.ModuleDict({f"stage{i}": nn.ModuleList(Block() for _ in range(i + 1)) for i in range(3)})

    def forward(self, x):
        x = self.first(x)
        for stage in self.stages.values():
            for block in stage:
                x = x + block(x)
        return self.last(x)


class EmptyList(ListsOfLists):
    """A list with nothing in it, and one with a single list of blocks."""

    def __init__(self) -> None:
        super().__init__()
        del self.pairs
        self.none = nn.ModuleList()
        self.pairs = nn.ModuleList([nn.ModuleList(Block() for _ in range(3))])

    def forward(self, x):
        x = self.first(x)
        for blocks in self.pairs:
            for block in blocks:
                x = block(x)
        return self.last(x)


class Lists(Several):
    kinds = (ListsOfLists, ListsOfDicts, DictOfLists, EmptyList)


class UNet(nn.Module):
    """Ways down and up in lists of lists, with skips from one to the other."""

    def __init__(self) -> None:
        super().__init__()
        self.downs = nn.ModuleList(
            nn.ModuleList([nn.Conv2d(a, b, 3, padding=1), nn.Conv2d(b, b, 3, stride=2, padding=1)])
            for a, b in ((3, 16), (16, 32))
        )
        self.ups = nn.ModuleList(
            nn.ModuleList([nn.ConvTranspose2d(a, b, 2, stride=2), nn.Conv2d(2 * b, b, 3, padding=1)])
            for a, b in ((32, 32), (32, 16))
        )
        self.last = nn.Conv2d(16, 5, 1)

    @classmethod
    def inputs(cls) -> dict[str, np.ndarray]:
        return {"x": normal(24, 3, 16, 16)}

    def forward(self, x):
        skips = []
        for same, down in self.downs:
            x = torch.relu(same(x))
            skips.append(x)
            x = torch.relu(down(x))
        for up, same in self.ups:
            x = torch.relu(same(torch.cat([up(x), skips.pop()], 1)))
        return self.last(x)


class Vectors(nn.Module):
    """Of vectors (batch, 72), with layers that are used more than once."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(72, 72), nn.Linear(72, 80)

    @classmethod
    def inputs(cls) -> dict[str, np.ndarray]:
        return {"x": normal(64, 72)}


class TwiceInARow(Vectors):
    def forward(self, x):
        return self.b(self.a(self.a(x)))


class ThriceInARow(Vectors):
    def forward(self, x):
        return self.b(self.a(self.a(self.a(x))))


class TwiceApart(Vectors):
    def forward(self, x):
        return self.b(self.a(torch.relu(self.a(x))))


class TwiceTheLast(Vectors):
    """The output of the graph is made by what has made its input."""

    def forward(self, x):
        return self.a(self.a(x))


class TwiceWithItself(Vectors):
    def forward(self, x):
        return self.b(self.a(x) + self.a(self.a(x)))


class TiedAutoencoder(Vectors):
    def forward(self, x):
        return functional.linear(self.a(x), self.a.weight.t()) + self.b(x)[:, :72]


class TiedInARow(Vectors):
    """Two layers of one weight, with a bias each."""

    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Linear(72, 72)
        self.c.weight = self.a.weight

    def forward(self, x):
        return self.b(self.c(self.a(x)))


class BiasMade(Vectors):
    """What a product adds is itself the product of the same weight."""

    def forward(self, x):
        return self.b(torch.addmm(self.a(x), x, self.a.weight))


class UsedAgain(Several):
    kinds = (
        TwiceInARow, ThriceInARow, TwiceApart, TwiceTheLast, TwiceWithItself, TiedAutoencoder, TiedInARow, BiasMade,
    )  # fmt: skip


class TableAndHead(nn.Module):
    """A table of tokens that is the output's as well, read after it."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.body = nn.Embedding(90, 64), nn.Linear(64, 64)
        self.head = nn.Linear(64, 90, bias=False)
        self.head.weight = self.table.weight

    @classmethod
    def inputs(cls) -> dict[str, np.ndarray]:
        return {"ids": np.random.default_rng(0).integers(0, 90, (48, 7))}

    def forward(self, ids):
        return self.head(self.body(self.table(ids)))


class ConvolvedTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(24, 24, 3, padding=1), nn.Conv2d(24, 8, 1)

    @classmethod
    def inputs(cls) -> dict[str, np.ndarray]:
        return {"x": normal(24, 24, 9, 9)}

    def forward(self, x):
        return self.b(self.a(self.a(x)))


def _normalised(layer: nn.Module, form: str) -> nn.Module:
    if form == "old":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return nn.utils.weight_norm(layer)
    if form == "old spectral":
        return nn.utils.spectral_norm(layer)
    if form == "new":
        return parametrizations.weight_norm(layer)
    if form == "spectral":
        return parametrizations.spectral_norm(layer)
    if form == "orthogonal":
        return parametrizations.orthogonal(layer)
    if form == "own":
        parametrize.register_parametrization(layer, "weight", Symmetric())
    return layer


class Symmetric(nn.Module):
    """A parametrisation of somebody's own, of layers with as many outputs as inputs."""

    def forward(self, weight):
        return weight.triu() + weight.triu(1).mT


class Normalised(nn.Module):
    """Sequences (batch, 16, 20) to 12 numbers, whose layers' weights are computed from others."""

    form = "none"

    def __init__(self) -> None:
        super().__init__()
        if self.form in ("own", "orthogonal"):
            layers = [nn.Flatten(), nn.Linear(320, 64), nn.ReLU(), _normalised(nn.Linear(64, 64), self.form)]
        else:
            layers = [
                _normalised(nn.Conv1d(16, 64, 3), self.form), nn.ReLU(), _normalised(nn.Conv1d(64, 32, 3), self.form),
                nn.ReLU(), nn.Flatten(), _normalised(nn.Linear(512, 12), self.form),
            ]  # fmt: skip
        self.layers = nn.Sequential(*layers)

    @classmethod
    def inputs(cls) -> dict[str, np.ndarray]:
        return {"x": normal(48, 16, 20)}

    def forward(self, x):
        return self.layers(x)


class WeightNorm(Normalised):
    form = "new"


class OldWeightNorm(Normalised):
    form = "old"


class SpectralNorm(Normalised):
    form = "spectral"


class OldSpectralNorm(Normalised):
    form = "old spectral"


class Orthogonal(Normalised):
    form = "orthogonal"


class OwnParametrisation(Normalised):
    form = "own"


class Recurrent(nn.Module):
    """Sequences (batch, 9, 40) to 7 numbers, of the states of a recurrent network."""

    def __init__(self) -> None:
        super().__init__()
        self.cells, self.last = self.made(), nn.Linear(self.width, 7)

    width = 64

    def made(self) -> nn.Module:
        raise NotImplementedError

    @classmethod
    def inputs(cls) -> dict[str, np.ndarray]:
        return {"x": normal(48, 9, 40)}

    def forward(self, x):
        return self.last(self.cells(x)[0][:, -1])


class Lstm(Recurrent):
    def made(self):
        return nn.LSTM(40, 64, batch_first=True)


class DeepLstm(Recurrent):
    width = 128

    def made(self):
        return nn.LSTM(40, 64, 2, batch_first=True, bidirectional=True)


class ProjectedLstm(Recurrent):
    width = 32

    def made(self):
        return nn.LSTM(40, 64, batch_first=True, proj_size=32)


class Gru(Recurrent):
    def made(self):
        return nn.GRU(40, 64, batch_first=True)


class DeepGru(Recurrent):
    width = 128

    def made(self):
        return nn.GRU(40, 64, 2, batch_first=True, bidirectional=True, bias=False)


class Elman(Recurrent):
    def made(self):
        return nn.RNN(40, 64, batch_first=True)


class SequenceFirst(Recurrent):
    def made(self):
        return nn.LSTM(40, 64)

    def forward(self, x):
        return self.last(self.cells(x.transpose(0, 1))[0][-1])


class Given(Recurrent):
    """Whose first state is given, and whose last one is an output."""

    def made(self):
        return nn.GRU(40, 64, batch_first=True)

    @classmethod
    def inputs(cls) -> dict[str, np.ndarray]:
        return {"x": normal(48, 9, 40), "state": normal(48, 64, seed=1)}

    def forward(self, x, state):
        seen, last = self.cells(x, state[None])
        return {"answer": self.last(seen[:, -1]), "state": last[0]}


class LstmCell(Recurrent):
    def made(self):
        return nn.LSTMCell(40, 64)

    def forward(self, x):
        state = x.new_zeros(x.shape[0], 64), x.new_zeros(x.shape[0], 64)
        for t in range(9):
            state = self.cells(x[:, t], state)
        return self.last(state[0])


class GruCell(Recurrent):
    def made(self):
        return nn.GRUCell(40, 64)

    def forward(self, x):
        state = x.new_zeros(x.shape[0], 64)
        for t in range(9):
            state = self.cells(x[:, t], state)
        return self.last(state)


class RnnCell(Recurrent):
    def made(self):
        return nn.RNNCell(40, 64)

    forward = GruCell.forward


class RecurrentAll(Several):
    kinds = (Lstm, Gru, DeepGru, Elman, SequenceFirst, LstmCell, GruCell, RnnCell)


class Odd(nn.Module):
    """Vectors (batch, 64) to vectors of 80, with something odd in each subclass."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 96), nn.Linear(96, 80)

    @classmethod
    def inputs(cls) -> dict[str, np.ndarray]:
        return {"x": normal(48, 64)}

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))


class ConfigOfDict(Odd):
    def __init__(self) -> None:
        super().__init__()
        self.config = {"use_cache": True}


@dataclasses.dataclass(frozen=True)
class Frozen:
    use_cache: bool = True


class ConfigFrozen(Odd):
    def __init__(self) -> None:
        super().__init__()
        self.config = Frozen()


class Slotted:
    __slots__ = ("width",)


class ConfigSlotted(Odd):
    def __init__(self) -> None:
        super().__init__()
        self.config = Slotted()


class ConfigNone(Odd):
    config = None


class EmptyParameter(Odd):
    def __init__(self) -> None:
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(0, 5))


class WritesIntoInput(Odd):
    def forward(self, x):
        x[:, :8] *= 2.0
        x += 1.0
        return super().forward(x)


class ComplexBuffer(Odd):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("turn", torch.ones(4, dtype=torch.complex64))


class AlwaysDropped(Odd):
    def forward(self, x):
        return self.b(functional.dropout(torch.relu(self.a(x)), 0.4))


class DroppedInTraining(Odd):
    def forward(self, x):
        return self.b(functional.dropout(torch.relu(self.a(x)), 0.4, training=self.training))


class Noisy(Odd):
    def forward(self, x):
        return super().forward(x + torch.randn_like(x))


class OddConfigs(Several):
    kinds = (ConfigOfDict, ConfigFrozen, ConfigSlotted, ConfigNone, EmptyParameter, WritesIntoInput, DroppedInTraining)

    def forward(self, x):
        return {name: network(x.clone()) for name, network in self.each.items()}


class InPlace(Block):
    def forward(self, x):
        x += super().forward(x)
        return x


class InPlaceBlocks(Chain):
    """Whose blocks write into what they are given."""

    block = InPlace


class Pictures(nn.Module):
    """Pictures (batch, 8, 12, 12) through convolutions, with something odd in each subclass."""

    @classmethod
    def inputs(cls) -> dict[str, np.ndarray]:
        return {"x": normal(32, 8, 12, 12)}

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 32, 3, padding=1), nn.Conv2d(32, 40, 3, padding=1)

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))


class StrideOfList(Pictures):
    def __init__(self) -> None:
        super().__init__()
        self.b.stride, self.b.padding, self.b.dilation = [2, 2], [1, 1], [1, 1]


class PictureNormWithoutStatistics(Pictures):
    """A norm of each batch: what it answers to one picture depends on the others."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(40, track_running_stats=False)

    def forward(self, x):
        return self.norm(super().forward(x))


class OneChannel(Pictures):
    """A convolution of one input channel, which is no depthwise one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 512, 3, padding=1), nn.Conv2d(512, 8, 1)

    def forward(self, x):
        return self.b(torch.relu(self.a(x[:, :1])))


class TwoEnds(Pictures):
    """Whose outputs are convolutions' own."""

    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Conv2d(32, 6, 1)

    def forward(self, x):
        seen = torch.relu(self.a(x))
        return {"boxes": self.b(seen), "scores": self.c(seen)}


class Transposed(Pictures):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.ConvTranspose2d(8, 48, 4, stride=2), nn.ConvTranspose2d(48, 9, 3)


class FewChannels(Pictures):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 64, 5), nn.Linear(64, 10)

    def forward(self, x):
        return self.b(torch.relu(self.a(x[:, :4])).mean((2, 3)))


class LargeStatistics(Pictures):
    """A running variance beyond float16, as of pixels of 0 to 255."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(32)
        self.norm.running_var.fill_(90_000.0)
        self.norm.running_mean.fill_(70_000.0)

    def forward(self, x):
        return self.b(self.norm(self.a(x) * 300 + 70_000))
