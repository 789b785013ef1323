"""--target-latency, --target-speedup: what is searched, what is refused, and networks that are what their genes say."""

from __future__ import annotations

import io
import json
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from rich.console import Console

from compressor.core.errors import DataError, GateFailed, UsageError
from compressor.core.options import RunOptions
from compressor.core.progress import Progress
from compressor.core.quantities import parse_latency, short_duration
from compressor.core.report import Report, Searched
from compressor.core.tensors import EncodedTensors
from compressor.core.work import Work
from compressor.data.batches import calibration_batches
from compressor.evaluate.bench import Pair
from compressor.evaluate.operators import Operator, Table, stored_as, timed
from compressor.evaluate.session import open_session
from compressor.report.facts import searched_speed
from compressor.report.front import front_picture
from compressor.report.page import page
from compressor.report.tables import run_tables
from compressor.run import search
from compressor.run.candidates import Mixtures
from compressor.run.clock import Clock
from compressor.run.encoding import restructured
from compressor.run.gates import missed_target
from compressor.run.pipeline import run
from compressor.run.prepare import prepare
from compressor.widths.allocate import target_of
from tests import pico

ARCH = "tests.pico:ResNet"
SORTED = """
passes: [{pass: sortednet, widths: [0.5, 1.0], depths: [0.5, 1.0], multiple: 4, epochs: 1, batch: 16, ship: ['50x50']}]
calibration: {samples: 32}
evaluation: {speed: false}
"""
INT8 = """
passes: [{pass: affine, method: rtn, bits: 8, group: row}]
calibration: {samples: 32, correct_means: true}
export: {activations: static_int8}
evaluation: {speed: false}
"""


FOUR = """
passes: [{pass: affine, method: rtn, bits: 4, group: 32}]
calibration: {tokens: 256, window: 32}
evaluation: {speed: false}
"""


@pytest.fixture(scope="module", autouse=True)
def folder(module_here):
    generator = np.random.default_rng(0)
    for name in ("training", "evaluation"):
        np.savez(module_here / f"{name}.npz", image=generator.standard_normal((48, 3, 12, 12)).astype(np.float32))
    pico.write_state_dict(pico.ResNet, module_here / "model.pt")
    for name, text in (("sorted", SORTED), ("int8", INT8), ("four", FOUR)):
        (module_here / f"{name}.yaml").write_text(text)
    pico.bert(module_here / "bert")
    for seed, name in enumerate(("text", "other")):
        (module_here / f"{name}.txt").write_text(pico.text(seed, 600))
    return module_here


def options(**changes) -> RunOptions:
    known = {"recipe": "sorted.yaml", "data": "training.npz", "eval": "evaluation.npz", "output": Path("out")}
    return RunOptions(**({"model": "model.pt", "arch": ARCH, "threads": 1} | known | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_latency": 0.001}, "two targets"),
        ({"target_speedup": 1.0}, "write such as 2"),
        ({"target_size": 1000}, "--target-size"),
        ({"recipe": "int8.yaml", "format": "safetensors"}, "leave --format safetensors out"),
        ({"batch": 0}, "--batch is 0"),
        ({"batch": 2**16 + 1}, "--batch is 65537; write 1 to 65536"),
        ({"sets": ("evaluation.samples=0",)}, "evaluation is skipped"),
        ({"recipe": "cnn-explain"}, "leaves nothing to choose.* found lrp"),
        ({"target_speedup": None}, "--threads and --batch are of --target-latency"),
    ],
)
def test_what_cannot_be_searched_is_refused_in_the_plan(changes, message):
    with pytest.raises(UsageError, match=message):
        prepare(options(**({"target_speedup": 2.0} | changes)))


def test_a_recipe_that_encodes_sizes_afterwards_and_a_network_without_data_are_refused(folder):
    both = SORTED.replace("}]", "}, {pass: affine, method: rtn, bits: 8, group: row}]")
    (folder / "both.yaml").write_text(both)
    with pytest.raises(UsageError, match="before anything is encoded, and both has affine after it"):
        prepare(options(recipe="both.yaml", target_speedup=2.0))
    with pytest.raises(DataError, match="give --data"):
        prepare(options(recipe="int8.yaml", data=None, target_speedup=2.0))


def test_a_batch_that_an_onnx_graph_does_not_take_is_refused_in_the_plan(folder):
    for size in (1, "n"):
        values = [onnx.helper.make_tensor_value_info(name, 1, [size, 3, 12, 12]) for name in ("image", "y")]
        weights = [onnx.numpy_helper.from_array(np.ones(shape, np.float32), name)
                   for name, shape in (("a", (64, 3, 5, 5)), ("b", (64, 64, 5, 5)), ("c", (3, 64, 5, 5)))]  # fmt: skip
        nodes = [onnx.helper.make_node("Conv", [x, weight], [y], pads=[2] * 4)
                 for x, weight, y in (("image", "a", "x"), ("x", "b", "z"), ("z", "c", "y"))]  # fmt: skip
        graph = onnx.helper.make_graph(nodes, "net", values[:1], values[1:], weights)
        onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)]), f"{size}.onnx")
    known = {"arch": None, "recipe": "int8.yaml", "target_speedup": 2.0}
    prepare(options(model="n.onnx", batch=4, **known))
    prepare(options(model="1.onnx", **known))
    with pytest.raises(UsageError, match="--batch is 4, and 'image' of 1.onnx takes 1 at a time; leave --batch out"):
        prepare(options(model="1.onnx", batch=4, **known))


def test_the_plan_says_what_is_searched_and_the_search_begins_with_every_size():
    start = prepare(options(target_speedup=2.0))
    assert any("2 widths for each group of units, 2 depths" in note for note in start.plan.notes)
    assert all(not step.settings.ship for step in start.recipe.structure)
    start = prepare(options(recipe="int8.yaml", target_latency=0.001))
    (note,) = [note for note in start.plan.notes if "searches among" in note]
    assert "layers as the recipe stores it or as floats" in note
    assert "'stem" not in note


def test_times_of_a_run_have_units():
    assert [parse_latency(text, "") for text in ("5ms", "800us", ".5 s")] == pytest.approx([0.005, 0.0008, 0.5])
    for text in ("5", "-1ms", "0ms", "5 min"):
        with pytest.raises(UsageError, match="--target-latency"):
            parse_latency(text, "--target-latency")


def mixtures() -> Mixtures:
    start = prepare(options(target_speedup=2.0, output=Path("made")))
    folder = Path("made-work")
    folder.mkdir(exist_ok=True)
    work = Work(folder / "work", 0)
    work.folder.mkdir(exist_ok=True)
    course = restructured(start, work, Progress(), Clock())
    batches = calibration_batches(start.samples.calibration, start.recipe, folder, 0)
    return Mixtures(start, course, batches, Table(folder / "table.json", 1, 1))


def test_a_mixture_has_the_widths_of_its_genes_and_its_graph_is_the_masked_network(tmp_path):
    family = mixtures()
    top = tuple(count - 1 for count in family.space.counts)
    for genes in (top, family.space.canonical((1, 0, *top[2:])), family.space.canonical([0] * len(top))):
        target = tmp_path / "".join(map(str, genes))
        target.mkdir()
        family.write(genes, target)
        checkpoint = family._made(genes, tmp_path / "made")
        module = checkpoint.build("cpu").float().eval()
        for group, gene in zip(family.groups, genes[1:], strict=True):
            member = group.producers[0]
            shapes = dict(module.named_parameters())
            if gene == 0 and member.tensor in shapes:
                assert shapes[member.tensor].shape[member.dim] < group.size
        images = family.batches[0][""][:4] if "" in family.batches[0] else next(iter(family.batches[0].values()))[:4]
        with torch.no_grad():
            wanted = module(images).numpy()
        (found,) = open_session(target).run({"": images.numpy()}).values()
        assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()


def test_groups_in_blocks_that_are_gone_make_no_difference_and_less_costs_less():
    family = mixtures()
    idle = [family._inactive((depth, *[0] * len(family.groups))) for depth in range(2)]
    assert not idle[1]
    assert idle[0]
    top = tuple(count - 1 for count in family.space.counts)
    low = family.space.canonical([0] * len(top))
    assert family.space.prior is not None
    assert family.space.prior(low) < family.space.prior(top)


def tried(monkeypatch, shares, **changes):
    """A run whose networks take a made-up share of the original's time, by how many bytes they have."""
    for name, value in (("FIRST", 3), ("MOST", 4), ("BATCH", 1)):
        monkeypatch.setattr(search, name, value)

    def paired(graph, original, threads=None, batch=1, shapes=None, blocks=5):
        return Pair(shares(bytes_of(graph)), 1.0, 0.01)

    monkeypatch.setattr(search, "paired", paired)
    return run(options(force=True, **changes))


def bytes_of(graph) -> int:
    return sum(file.stat().st_size for file in Path(graph).glob("model.*"))


def printed(artifact) -> str:
    file = io.StringIO()
    Console(width=200, file=file).print(*run_tables(artifact.report, "out"), sep="\n")
    return file.getvalue()


def test_the_artifact_is_the_best_that_is_fast_enough_and_the_front_lies_beside_it(monkeypatch):
    artifact = tried(monkeypatch, lambda n: n / 1e6, target_speedup=1.5)
    report = artifact.report["search"]
    assert report["over"] == "sizes"
    found = searched_speed(artifact.report)
    assert found is not None
    times = short_duration(found.original), short_duration(found.latency)
    (row,) = [line for line in printed(artifact).splitlines() if "latency, 1 thread, batch 1" in line]
    assert row.split()[-4:] == [*times[0].split(), *times[1].split()]
    for text in (printed(artifact), page(artifact, [], "")):
        assert f"{1 / report['latency']:.3g} × the original" in text
        assert "1.5 × its speed was sought; the choice of 4 networks" in text
    assert (
        f"| latency, 1 thread, batch 1, s | 1 | {report['latency']:.3g} |"
        in (artifact.directory / "README.md").read_text()
    )
    assert report["latency"] * 1.5 <= 1
    front = json.loads((artifact.directory / "front.json").read_text())
    (chosen,) = [each for each in front["networks"] if each["chosen"]]
    fitting = [each for each in front["networks"] if each["latency"] / each["original"] <= 1 / 1.5]
    assert chosen["loss"] == min(each["loss"] for each in fitting)
    assert chosen["front"]
    assert len(front["networks"]) == report["n_measured"] == 4
    picture = ElementTree.parse(artifact.directory / "front.svg")
    assert len(picture.findall(".//{*}circle")) == 4
    assert "front.json" not in artifact.report["size"]["files"]


def test_a_target_that_none_meets_fails_its_gate_and_names_the_fastest(monkeypatch):
    with pytest.raises(GateFailed, match="the target is 3; the fastest of 4 networks came to 1.25"):
        tried(monkeypatch, lambda n: 0.8, recipe="int8.yaml", target_speedup=3.0)


class Plain(torch.nn.Sequential):
    def __init__(self) -> None:
        super().__init__(torch.nn.Linear(80, 80), torch.nn.ReLU(), torch.nn.Linear(80, 80))


def test_where_floats_throughout_are_best_the_artifact_is_that(folder, monkeypatch):
    """Which no recipe's plan would be: it encodes nothing."""
    pico.write_state_dict(Plain, folder / "plain.pt")
    for seed, name in enumerate(("rows", "others")):
        np.savez(folder / f"{name}.npz", x=np.random.default_rng(seed).standard_normal((48, 80)).astype(np.float32))
    (folder / "plain.yaml").write_text(INT8.replace("static_int8", "int8"))
    artifact = tried(
        monkeypatch, lambda n: 0.5, recipe="plain.yaml", model="plain.pt", arch="tests.run.test_search:Plain",
        data="rows.npz", eval="others.npz", target_speedup=1.5,
    )  # fmt: skip
    assert set(artifact.report["search"]["choices"].values()) == {"float"}


BERT = {"model": "bert", "arch": None, "recipe": "four.yaml", "data": "text.txt", "eval": "other.txt"}


def stored(name: str, folder: Path) -> str:
    """How the file holds a layer that a recipe stores in fewer than 8 bits."""
    described = EncodedTensors([folder / "model.safetensors"]).describe(name)
    return {"dense": "float"}.get(described["kind"]) or {8: "8 bits"}.get(described["bits"], "stored")


@pytest.mark.parametrize("bits", [4, 3])
def test_each_layer_of_a_network_is_in_the_bits_of_its_gene(bits, tmp_path):
    """The kernel of 3 bits is that of 4."""
    start = prepare(options(target_speedup=2.0, output=Path("bits"), sets=(f"affine.bits={bits}",), **BERT))
    (note,) = [note for note in start.plan.notes if "searches among" in note]
    assert "each of 13 layers as the recipe stores it or as floats, 13 of them in 8 bits as well" in note
    assert "up to 60 networks" in note
    place = tmp_path / "place"
    place.mkdir()
    start.checkpoint.write_tokenizer(place)
    course = restructured(start, Work(place / "work", 0), Progress(), Clock())
    target = target_of(start.options, "encoder", start.samples)
    trials = Work(place / "one", 0), Work(place / "other", 0)
    family = search._family(start, course, start.samples, target, trials, Table(place / "t", 1, 1), Progress())
    assert family.space.counts == (3,) * 13
    assert {json.loads(key)["how"] for known in json.loads((place / "t").read_text()).values() for key in known} == {
        "4", "8", "float"
    }  # fmt: skip
    genes = tuple(i % 3 for i in range(13))
    (tmp_path / "made").mkdir()
    family.write(genes, tmp_path / "made")
    told = family.told(genes)
    assert told == {name: stored(name, tmp_path / "made") for name in told}
    graph = onnx.load(tmp_path / "made" / "model.onnx", load_external_data=False).graph
    found = Counter(
        next(each.i for each in node.attribute if each.name == "bits")
        for node in graph.node if node.op_type == "MatMulNBits"
    )  # fmt: skip
    assert found == {4: genes.count(0) + 1, 8: genes.count(1)}  # and the head, which is the table of tokens
    again = family.course(genes, trials[0]).plan
    assert {tensor.name: tensor.describe().get("bits", 32) for tensor in again.tensors if tensor.name in told} == {
        name: {"stored": bits, "8 bits": 8, "float": 32}[how] for name, how in told.items()
    }


def test_the_artifact_of_a_search_holds_the_bits_that_it_chose(monkeypatch):
    """Made up as well are what each loses, less the more bytes it has, and how long an operator takes: of a random
    network and a busy machine they are anything."""
    monkeypatch.setattr(search._Judge, "loss", lambda judge, graph: 1 / bytes_of(graph))
    times = {"4": 1.0, "8": 2.0, "float": 4.0}
    monkeypatch.setattr("compressor.evaluate.operators.timed", lambda operator, *_: times[operator.how])
    artifact = tried(monkeypatch, lambda n: 0.5 if n < 400_000 else 1.0, target_speedup=1.5, **BERT)
    choices = artifact.report["search"]["choices"]
    assert "8 bits" in choices.values()
    assert choices == {name: stored(name, artifact.directory) for name in choices}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "compat"}, r"as floats \('bert.*' and 12 more not: 8 bits crawl or fail in onnxruntime before 1.22"),
        ({"sets": ("affine.zero=half",)}, "12 more not: a zero point of 127.5 at 8 bits has no kernel"),
        ({"sets": ("affine.bits=8",)}, "each of 13 layers as the recipe stores it or as floats: up to 60"),
    ],
)
def test_a_plan_says_which_layers_are_not_in_8_bits_and_why(changes, message):
    notes = prepare(options(**(BERT | {"target_speedup": 2.0, "output": Path("planned")} | changes))).plan.notes
    assert any(re.search(message, note) for note in notes), notes


def test_an_original_that_is_fast_enough_is_no_search(monkeypatch):
    with pytest.raises(UsageError, match="is 2 s, and the original takes 1 s"):
        tried(monkeypatch, lambda n: 0.8, target_latency=2.0)


@pytest.mark.parametrize("most", [2, 3])
def test_a_search_that_was_ended_goes_on_with_what_it_measured(most, monkeypatch):
    """Before all that it begins with was measured, and after."""
    measured, plain = [], search.Search
    monkeypatch.setattr(search, "Search", lambda space, *rest: plain(replace(space, trained=()), *rest))

    def stopped(n):
        measured.append(n)
        if len(measured) == most + 1:
            raise KeyboardInterrupt
        return 0.5

    with pytest.raises(KeyboardInterrupt):
        tried(monkeypatch, stopped, target_speedup=1.5)
    report = tried(monkeypatch, stopped, target_speedup=1.5, resume=True).report["search"]
    assert report["n_measured"] == 4
    assert len(measured) - 1 < 4 + 4  # those before, those after, one confirmed, and the artifact


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({"target_speedup": 2.0, "latency": 0.5, "original": 1.0}, None),
        ({"target_speedup": 2.0, "latency": 0.51, "original": 1.0, "spread": 0.03}, None),
        ({"target_speedup": 2.0, "latency": 0.6, "original": 1.0, "spread": 0.03},
         "speed over the original's is 1.67, the target is 2; the fastest of 9 networks came to 2"),
        ({"target_latency": 0.005, "latency": 0.006, "original": 1.0},
         "latency is 6 ms, the target is 5 ms; the fastest of 9 networks took 500 ms"),
        ({"target_latency": 0.005, "latency": 0.005, "original": 1.0}, None),
    ],
)  # fmt: skip
def test_a_target_is_missed_beyond_the_spread_of_its_pairs(found, said):
    report = Report(search=Searched(over="sizes", n_measured=9, fastest=0.5, **found))
    assert missed_target(report) == ([] if said is None else [said])


def test_operators_are_timed_as_they_are_stored_and_once(tmp_path, monkeypatch):
    conv = Operator((8, 4, 3, 3), (4, 10, 10), (1, 1), (1, 1, 1, 1), (1, 1))
    product = Operator((16, 32), (5,))
    assert [stored_as(conv, static, 8).how for static in (True, False)] == ["int8", "float"]
    assert [stored_as(product, True, bits).how for bits in (2, 4, 8, 16)] == ["2", "4", "8", "float"]
    table = Table(tmp_path / "t.json", 1, 2)
    for operator in (
        conv,
        stored_as(conv, True, 8),
        product,
        stored_as(product, False, 4),
        stored_as(product, False, 2),
    ):
        assert 0 < table.seconds(operator) < 1
    monkeypatch.setattr("compressor.evaluate.operators.timed", timed_never)
    assert Table(tmp_path / "t.json", 1, 2).seconds(conv) == table.seconds(conv)
    with pytest.raises(AssertionError):
        Table(tmp_path / "t.json", 2, 2).seconds(conv)
    assert timed(conv, 1) > 0


def timed_never(*_):
    raise AssertionError("is known")


def test_the_picture_is_well_formed_and_has_a_dot_for_each_network():
    svg = front_picture([(0.5, 0.1, "chosen"), (0.4, 0.3, "front"), (0.9, 0.2, "other")], 0.5)
    root = ElementTree.fromstring(svg)
    assert [circle.get("class") for circle in root.findall(".//{*}circle")] == ["other", "front", "chosen"]
    assert front_picture([(1.0, 0.0, "chosen")], 2.0)
