"""Meta-pruning: the metanetwork against a plain one in loops, its worked values, and what the pass promises."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from compressor.core.errors import CheckpointError, RecipeError
from compressor.core.tensors import named_tensors
from compressor.graph.channels import channel_graph
from compressor.graph.surgery import sort_units
from compressor.passes.metaprune import Metaprune, importance, pull, pulls
from compressor.passes.parts.metanetwork import Metanetwork, Shape, aggregate, load_metanetwork, save_metanetwork
from tests.graph import zoo
from tests.learning.training_case import EXAMPLE, residual, subject_of

SETTINGS = {"fraction": 0.4, "epochs_before": 0, "epochs": 0}


def by_the_paper(network: Metanetwork, nodes: Tensor, edges: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
    """A node and an edge at a time, float64."""
    w = {name: values.double() for name, values in network.state_dict().items()}

    def linear(name: str, x: Tensor) -> Tensor:
        return w[f"{name}.weight"] @ x + w[f"{name}.bias"]

    def silu(x: Tensor) -> Tensor:
        return x / (1 + torch.exp(-x))

    def normal(x: Tensor) -> Tensor:
        return (x - x.mean()) / ((x - x.mean()).square().mean() + 1e-5).sqrt()

    def aggregated(messages: list[Tensor], width: int) -> Tensor:
        if not messages:
            return torch.zeros(4 * width, dtype=torch.float64)
        m = torch.stack(messages)
        mean = m.mean(0)
        variance = ((m - mean) ** 2).mean(0)
        spread = torch.where(variance <= 1e-5, 0.0, variance.sqrt())
        return torch.cat([mean, spread, m.max(0).values, m.min(0).values])

    def written(name: str, x: Tensor) -> Tensor:
        x = normal(x) * w[f"{name}.0.weight"] + w[f"{name}.0.bias"]
        return linear(f"{name}.3", silu(linear(f"{name}.1", x)))

    h = [linear("read_nodes", x) for x in nodes.double()]
    e = [linear("read_edges", x) for x in edges.double()]
    width = len(h[0])
    sign = torch.tensor([1.0] * (width // 2) + [-1.0] * (width - width // 2), dtype=torch.float64)
    for number in range(network.shape.layers):
        x = [normal(each) for each in h]

        def f(kind: str, node: int, number=number, x=x) -> Tensor:
            return silu(linear(f"layers.{number}.{kind}.0", x[node]))

        onwards, backwards = [[] for _ in h], [[] for _ in h]
        changed = []
        for edge, (s, t) in enumerate(pairs.T.tolist()):
            back = e[edge] * sign
            onwards[t].append(f("target", t) * f("source", s) * e[edge])
            backwards[s].append(f("target", s) * f("source", t) * back)
            changed.append(f("edge_source", s) * f("edge_target", t) * e[edge]
                           + sign * (f("edge_source", t) * f("edge_target", s) * back))  # fmt: skip
        name = f"layers.{number}.combine"
        h = [
            each + linear(name, aggregated(one, width)) + linear(name, aggregated(other, width))
            for each, one, other in zip(h, onwards, backwards, strict=True)
        ]
        e = [each + more for each, more in zip(e, changed, strict=True)]
    share = network.shape.share
    return (
        nodes.double() + share * torch.stack([written("write_nodes", each) for each in h]),
        edges.double() + share * torch.stack([written("write_edges", each) for each in e]),
    )


def metanetwork(share: float = 0.5, adds: bool = True, **more: int) -> Metanetwork:
    torch.manual_seed(2)
    return Metanetwork(Shape(layers=2, width=6, share=share, adds=adds, **more))


def test_the_metanetwork_by_the_paper():
    network, generator = metanetwork(), torch.Generator().manual_seed(1)
    nodes, edges = torch.randn(7, 8, generator=generator), torch.randn(11, 9, generator=generator)
    pairs = torch.tensor([[0, 0, 1, 1, 2, 2, 3, 3, 4, 5, 5], [2, 3, 2, 3, 4, 5, 4, 5, 6, 6, 4]])
    found = network(nodes, edges, pairs)
    for values, wanted in zip(found, by_the_paper(network, nodes, edges, pairs), strict=True):
        torch.testing.assert_close(values.double(), wanted, rtol=1e-4, atol=1e-5)


def test_messages_one_and_three_are_two_one_three_one():
    found = aggregate(torch.tensor([[1.0], [3.0], [5.0]]), torch.tensor([1, 1, 2]), 3)
    assert found.tolist() == [[0, 0, 0, 0], [2, 1, 3, 1], [5, 0, 5, 5]]


def test_the_smallest_channel_is_pulled_most():
    torch.testing.assert_close(
        pulls(torch.tensor([1, 0.25, 0.0625], dtype=torch.float64)),
        torch.tensor([1, 16 ** (2 / 3), 16], dtype=torch.float64),
    )
    assert pulls(torch.full((3,), 0.7)).tolist() == [1, 1, 1]


def test_importance_and_pull_by_hand():
    subject = subject_of(residual())
    group = next(group for group in subject.choosable() if group.name == "block.0")
    tensors = dict(subject.module.named_parameters())
    rows, norm, columns = (tensors[f"block.{n}.weight"].detach().double() for n in (0, 1, 3))
    mean = [(float(rows[c].square().sum()) + float(norm[c] ** 2) + float(columns[:, c].square().sum())) / 3
            for c in range(group.size)]  # fmt: skip
    found = importance(group, tensors)
    assert found.tolist() == pytest.approx([each / max(mean) for each in mean])
    s = [math.sqrt(each / max(mean)) for each in mean]
    gamma = [16 ** ((max(s) - each) / (max(s) - min(s))) for each in s]
    added = pull([group], tensors, 0.1)
    assert set(added) == {"block.0.weight", "block.1.weight", "block.3.weight"}
    for c in (0, 5):
        torch.testing.assert_close(added["block.0.weight"][c].double(), 0.1 * gamma[c] * rows[c], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(
            added["block.3.weight"][:, c].double(), 0.1 * gamma[c] * columns[:, c], rtol=1e-5, atol=1e-7
        )


@pytest.mark.parametrize("name", ["ResNet", "VGG", "MobileNet"])
def test_channels_in_another_order_are_rewritten_alike(name):
    torch.manual_seed(0)
    module = zoo.with_statistics(getattr(zoo, name)())
    network = metanetwork(adds=name != "VGG", height=4, breadth=4)
    other = copy.deepcopy(module)
    graph = channel_graph(module, zoo.image())
    groups = [group for group in subject_of_images(module).choosable() if group.size > 2]
    orders = [torch.randperm(group.size, generator=torch.Generator().manual_seed(3)) for group in groups]
    for group, order in zip(groups, orders, strict=True):
        sort_units(other, group, order)
    with torch.no_grad():
        found = network.rewritten(graph, named_tensors(module))
        wanted = network.rewritten(graph, named_tensors(other))
        for name, values in found.items():
            named_tensors(module)[name].copy_(values)
    for group, order in zip(groups, orders, strict=True):
        sort_units(module, group, order)
    for name, values in wanted.items():
        torch.testing.assert_close(named_tensors(module)[name], values, rtol=1e-3, atol=1e-4)


def subject_of_images(module: nn.Module):
    from compressor.core.batch import call
    from compressor.structure.stage import GraphSurgeon, looked_at

    batch = {"": zoo.image()[0]}
    return looked_at(module, [batch], GraphSurgeon(batch, call), lambda name: True)


def test_it_prunes_what_it_has_rewritten(tmp_path):
    """A metanetwork whose say is known: it adds 1 to every γ and leaves kernels alone."""
    network = metanetwork(share=1.0)
    with torch.no_grad():
        for decoder in (network.write_nodes, network.write_edges):
            decoder[3].weight.zero_()
            decoder[3].bias.zero_()
        network.write_nodes[3].bias[0] = 1.0
    save_metanetwork(tmp_path / "network.safetensors", network)
    subject = subject_of(residual())
    before = named_tensors(copy.deepcopy(subject.module))
    outcome = Metaprune(network=str(tmp_path / "network.safetensors"), **SETTINGS).restructure(subject)
    assert outcome.report["other_architecture"]
    stem, kept = outcome.module.stem, outcome.report["kept_units"]
    assert kept["stem.0"][0] < 16 or kept["block.0"][0] < 16
    assert torch.equal(stem[1].weight.unique(), before["stem.1.weight"].add(1).unique())
    rows = {tuple(row.flatten().tolist()) for row in before["stem.0.weight"]}
    assert all(tuple(row.flatten().tolist()) in rows for row in stem[0].weight)
    whole = subject.surgeon.multiplications(residual(), {})
    assert subject_of(outcome.module).surgeon.multiplications(outcome.module, {}) <= 0.6 * whole


def test_without_a_metanetwork_the_smallest_norms_go():
    module = residual()
    with torch.no_grad():
        for n in (2, 7, 11):
            module.block[0].weight[n] *= 1e-3
            module.block[1].weight[n] *= 1e-3
            module.block[3].weight[:, n] *= 1e-3
    outcome = Metaprune(fraction=0.15, step=1.0, most=0.2, epochs_before=0, epochs=0).restructure(subject_of(module))
    kept = outcome.module.block[0].weight.detach().flatten(1).norm(dim=1)
    assert outcome.report["kept_units"]["block.0"] == [13, 16]
    assert float(kept.min()) > 0.1


def test_it_trains_before_and_after_and_goes_on_where_it_was_interrupted(tmp_path):
    settings = Metaprune(fraction=0.3, epochs_before=1, epochs=2, batch=16)
    whole = settings.restructure(subject_of(residual(), folder=tmp_path / "training"))
    assert [len(whole.report[name]) for name in ("training_before", "training")] == [1, 2]
    again = settings.restructure(subject_of(residual(), folder=tmp_path / "training"))
    for name, values in whole.module.state_dict().items():
        assert torch.equal(values, again.module.state_dict()[name])


def test_a_metanetwork_is_what_was_saved(tmp_path):
    file, graph = tmp_path / "network.safetensors", channel_graph(residual(), (EXAMPLE,))
    network = Metanetwork(Shape(layers=1, width=4), (graph.fingerprint(),))
    save_metanetwork(file, network)
    found = load_metanetwork(file)
    assert found.shape == network.shape
    assert found.knows(graph)
    assert not found.knows(channel_graph(zoo.ResNet().eval(), zoo.image()))
    for name, values in network.state_dict().items():
        assert torch.equal(found.state_dict()[name], values)


def test_other_files_and_families_are_refused_before_work_begins(tmp_path):
    file = tmp_path / "network.safetensors"
    for content in (None, b"", b"no metanetwork at all", "weights", "large"):
        if isinstance(content, bytes):
            file.write_bytes(content)
        elif content == "weights":
            save_file({"a": torch.zeros(2)}, file)
        elif content == "large":
            said = '{"shape": {"layers": 1000000000}, "trained_on": []}'
            save_file({"a": torch.zeros(2)}, file, {"format": "metanetwork 1", "metanetwork": said})
        with pytest.raises(RecipeError, match=r"network\.safetensors: .*scripts/metatrain"):
            Metaprune(network=str(file)).examine(subject_of(residual()))
    save_metanetwork(file, metanetwork(adds=False))
    with pytest.raises(CheckpointError, match="another family .*: it has residual sums, and those had none"):
        Metaprune(network=str(file)).examine(subject_of(residual()))
    save_metanetwork(file, metanetwork(height=1, breadth=1))
    with pytest.raises(CheckpointError, match="it has kernels of 3×3, and those were up to 1×1"):
        Metaprune(network=str(file)).examine(subject_of(residual()))
    save_metanetwork(file, metanetwork())
    (note,) = Metaprune(network=str(file)).examine(subject_of(residual()))
    assert "other architectures" in note
