"""What a run refuses, its dry run refuses in the same words: every recipe on every kind of network."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from torch import nn

import compressor.run.pipeline
import compressor.structure.stage
from compressor.cli.exit_status import explain
from compressor.core.batch import Batch
from compressor.core.errors import CheckpointError, CompressorError, DataError
from compressor.core.groups import Group
from compressor.core.options import RunOptions
from compressor.graph.groups import find_groups
from compressor.passes.parts.metanetwork import Metanetwork, Shape, save_metanetwork
from compressor.plan.recipe_file import load_recipe, shipped_recipes
from compressor.run.pipeline import run
from compressor.run.prepare import prepare
from tests import pico
from tests.run.sources import SOURCES, TEXT, write_sources

TINY = {
    "calibration.tokens": 512, "calibration.window": 32, "calibration.samples": 24, "evaluation.tokens": 192,
    "evaluation.window": 32, "evaluation.samples": 12, "evaluation.speed": "false",
}  # fmt: skip
QUICK = {
    "epochs": 1, "search_epochs": 1, "shrink_epochs": 1, "rollouts": 1, "max_students": 2, "validation": 16,
    "student_examples": 32, "batch": 8, "jobs": 1, "steps": 2,
}  # fmt: skip
ONLY_A_RUN_TELLS = {
    ("t5", "cnn-explain"): (3, "it does not run; "), ("t5", "encoder-heads"): (3, "it does not run; "),
}  # fmt: skip
"""A size that is written into the code shows in the traced graph, before any training."""
TRACED_LONG = ("mixtral", "t5-alone", "neox", "gguf")
"""Each recipe traces them anew; CI has whole runs of them, and of networks like them all refusals."""
WHOLE = [
    ("llama", "llm-2bit"), ("llama", "llm-3bit"), ("llama", "llm-width"), ("llama", "llm-depth"),
    ("gpt2", "llm-4bit"), ("bert", "encoder-4bit"), ("bert", "encoder-heads"), ("bert", "cnn-once"),
    ("albert", "cnn-4bit"), ("albert", "llm-depth"), ("t5-alone", "encoder-4bit"),
    ("neox", "llm-4bit"), ("vit", "encoder-4bit"), ("resnet.pt", "cnn-int8"),
    ("resnet.pt", "cnn-binary"), ("tied.pt", "encoder-4bit"), ("custom.pt", "cnn-4bit"), ("images", "cnn-int8"),
    ("tokens", "encoder-4bit"), ("decoder", "llm-4bit"), ("decoder", "llm-2bit"), ("gguf", "llm-3bit"),
]  # fmt: skip
"""Those that are really run, to the end or to the refusal; all of them in the slow test."""


class Reached(BaseException):
    """Ends a run where its work would begin."""


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    write_sources(folder)
    return folder


@pytest.fixture(autouse=True)
def folder(sources, monkeypatch) -> Iterator[None]:
    monkeypatch.chdir(sources)
    return


def sets_of(name: str) -> tuple[str, ...]:
    """Settings that make a recipe quick, of those that it has."""
    found = dict(TINY)
    recipe = load_recipe(name)
    for step in recipe.passes:
        written = step.settings.model_dump()
        for key, value in QUICK.items():
            if isinstance(written.get(key), int) and written[key] > value:
                found[f"{step.name}.{key}"] = value
        if step.name == "n2n" and written["remove"]:
            found["n2n.remove"] = 1
    if recipe.distill.steps:
        found |= {"distill.steps": 1, "distill.tokens": 64}
    if recipe.gates.promised_loss is not None:  # of networks whose weights are random
        found["gates.promised_loss"] = "null"
    return tuple(f"{key}={value}" for key, value in found.items())


def words_of(source: str, recipe: str, *more: str) -> list[str]:
    sets = [word for each in sets_of(recipe) for word in ("--set", each)]
    return [*SOURCES[source][1], "--recipe", recipe, *sets, *more]


def options_of(source: str, recipe: str, output: Path) -> RunOptions:
    """As the command makes them of `words_of`."""
    model, *words = SOURCES[source][1]
    given = {
        word.removeprefix("--"): words[at + 1]
        for at, word in enumerate(words)
        if word in ("--data", "--eval", "--arch")
    }
    return RunOptions(model=model, recipe=recipe, output=output, sets=sets_of(recipe), **given,
                      trust_pickle="--trust-pickle" in words)  # fmt: skip


def refusal(attempt, *args) -> tuple[int, str]:
    """(status, message) as the command tells them; (0, "") where nothing is refused."""
    try:
        attempt(*args)
    except Reached:
        return 0, ""
    except CompressorError as error:
        return explain(error)
    return 0, ""


@pytest.mark.parametrize(
    "source", [pytest.param(each, marks=pytest.mark.slow) if each in TRACED_LONG else each for each in SOURCES]
)
def test_what_is_refused_before_work_is_what_the_dry_run_refuses(source, command, tmp_path, monkeypatch):
    def reached(*_):
        raise Reached

    known: dict[tuple, list[Group]] = {}

    def found_once(module: nn.Module, example: Batch) -> list[Group]:
        key = tuple((name, tuple(tensor.shape)) for name, tensor in example.items())
        if key not in known:
            known[key] = find_groups(module, example)
        return known[key]

    monkeypatch.setattr(compressor.run.pipeline, "identity_of", reached)
    monkeypatch.setattr(compressor.structure.stage, "find_groups", found_once)  # of the one network; it takes seconds
    for recipe in shipped_recipes():
        said = command(*words_of(source, recipe, "--dry-run", "-o", str(tmp_path / "out")))
        planned = said.status, said.err.removeprefix("Error: ").strip()
        assert planned == refusal(run, options_of(source, recipe, tmp_path / "out")), recipe
        assert said.status in (0, 2, 3), said.err


@pytest.mark.parametrize(("source", "recipe"), WHOLE, ids=[" ".join(pair) for pair in WHOLE])
def test_a_run_ends_as_its_dry_run_says(source, recipe, command, tmp_path):
    compare(source, recipe, command, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES)
def test_every_run_ends_as_its_dry_run_says(source, command, tmp_path):
    for recipe in shipped_recipes():
        compare(source, recipe, command, tmp_path / recipe)


def compare(source: str, recipe: str, command, folder: Path) -> None:
    planned = command(*words_of(source, recipe, "--dry-run", "-o", str(folder / "out")))
    done = command(*words_of(source, recipe, "--json", "-o", str(folder / "out")))
    if (source, recipe) in ONLY_A_RUN_TELLS:
        status, why = ONLY_A_RUN_TELLS[source, recipe]
        assert (planned.status, done.status) == (0, status)
        assert why in done.err
        return
    assert done.status in (0, 2, 3), done.err
    assert (done.status, last(done.err)) == (planned.status, last(planned.err))
    assert (folder / "out").exists() == (done.status == 0)
    assert not (folder / "out.partial").exists()


def last(text: str) -> str:
    """The refusal, which libraries' own warnings may stand before."""
    return next((line for line in text.splitlines()[::-1] if line.startswith("Error: ")), "")


@pytest.mark.parametrize(
    ("source", "positions", "recipe"),
    [("few", 40, "llm-4bit"), ("roberta", 64, "encoder-4bit"), ("bert", 64, "encoder-4bit")],
)
def test_a_network_of_few_positions_is_run_on_as_many_and_measured(source, positions, recipe, tmp_path):
    sets = ("calibration.tokens=512", "evaluation.tokens=256", "gates.promised_loss=null")
    texts = dict(zip(("data", "eval"), TEXT[1::2], strict=True))
    options = RunOptions(source, recipe, tmp_path / "out", sets=sets, **texts)
    plan = prepare(options).plan
    assert any(f"{positions} tokens, as many as the network has positions for" in note for note in plan.notes)
    report = run(options).report
    assert report["recipe"]["calibration"]["window"] == positions
    assert report["quality"]
    speed = report["speed"]
    assert speed.get("decode_tokens_per_second") or speed["input_shapes"]["input_ids"] == [1, positions]


def test_a_network_of_hardly_any_positions_is_refused(tmp_path):
    import transformers

    config = transformers.GPT2Config(vocab_size=pico.VOCABULARY, n_embd=72, n_layer=1, n_head=3, n_positions=12)
    pico.saved(config, transformers.GPT2LMHeadModel, tmp_path / "short")
    with pytest.raises(CheckpointError, match="has positions for 12 tokens, and windows of text have at least 16"):
        prepare(RunOptions(str(tmp_path / "short"), "llm-4bit", tmp_path / "out"))


WRONG_DATA = {
    "a text too short for a window": ("llama", {"data": "short.txt"}, "text: is too short for one window; found"),
    "a text to judge on that is": ("llama", {"eval": "short.txt"}, "text: is too short for one window; found"),
    "a text without a sentence": ("bert", {"eval": "short.txt"}, "short.txt: has no sentences; give running text"),
    "a text for a network of images": (
        "tied.pt",
        {"data": "calibration.txt"},
        "calibration.txt: is text, but",
    ),
    "a text to judge one on": ("tied.pt", {"eval": "calibration.txt"}, "calibration.txt: is text, but tests."),
    "arrays to judge a decoder on": ("llama", {"eval": "tokens.npz"}, "tokens.npz: holds arrays, and a language model"),
    "sequences beyond the positions": (
        "few",
        {"data": "long.npz"},
        "long.npz: has sequences of 41 tokens, and few has",
    ),
    "tokens beyond the table": ("bert", {"data": "rare.npz"}, "rare.npz: has token 300, and the table of bert has 300"),
    "no such file": ("llama", {"data": "nowhere.txt"}, "nowhere.txt: does not exist"),
    "the same text twice": ("llama", {"eval": "calibration.txt"}, "calibration.txt: overlaps the calibration data"),
}


@pytest.mark.parametrize("case", WRONG_DATA)
def test_data_that_do_not_suit_are_refused_before_work(case, tmp_path):
    source, changed, message = WRONG_DATA[case]
    Path("short.txt").write_text("a purple elephant")
    np.savez("long.npz", input_ids=np.ones((4, 41), np.int64))
    np.savez("rare.npz", input_ids=np.full((4, 9), pico.VOCABULARY))
    kept = {"data": "calibration.txt", "eval": "evaluation.txt"}
    if source == "tied.pt":
        kept = {"data": "vectors.npz", "arch": "tests.pico:Tied"}
    options = RunOptions(source, "encoder-4bit", tmp_path / "out", **(kept | changed))
    found = refusal(prepare, options)
    assert found[0] == 3
    assert found[1].startswith(message)
    assert refusal(run, options) == found


def test_a_network_without_an_example_is_refused_where_its_graph_is_traced(tmp_path):
    (tmp_path / "recipe.yaml").write_text("passes: [{pass: affine, method: rtn, bits: 4, group: 16}]\n")
    options = RunOptions("tied.pt", str(tmp_path / "recipe.yaml"), tmp_path / "out", arch="tests.pico:Tied")
    with pytest.raises(DataError, match=r"tied.pt: its graph is traced on an example of its inputs; give --data"):
        prepare(options)


class Branching(pico.ResNet):
    """Whose forward depends on the values that it is given."""

    def forward(self, x):
        return super().forward(x if x.mean() > 0 else -x)


HESSO, REWRITTEN = "{pass: hesso, epochs: 1}", "{pass: metaprune, network: network.safetensors, epochs: 1}"


@pytest.mark.parametrize(("arch", "step", "shape", "message"), [
    ("tests.run.test_prepare:Branching", HESSO, None, "Branching: its forward cannot be traced at"),
    ("tests.pico:ResNet", REWRITTEN, None, "network.safetensors: is no metanetwork; "),
    ("tests.pico:ResNet", REWRITTEN, Shape(adds=False), "ResNet: is of another family than the networks that"),
    ("tests.pico:ResNet", HESSO, None, "hesso: 1 of 1 steps are for pruning, fewer than periods: 10; write fewer"),
    ("tests.pico:ResNet", "{pass: hesso, fraction: 0.99}", None, "hesso: fraction 0.99 of the parameters cannot go; "),
    ("tests.pico:ResNet", "{pass: oto, fraction: 0.99}", None, "oto: fraction 0.99 of the parameters cannot go; "),
    ("tests.pico:ResNet", "{pass: oto, fraction: 0.99, erase: true}", None, "oto: fraction 0.99 of the parameters can"),
    ("tests.pico:ResNet", "{pass: lrp, fraction: 0.95, most: 0.5}", None, "lrp: only "),
    ("tests.pico:ResNet", "{pass: metaprune, fraction: 0.95, most: 0.5}", None, "metaprune: only "),
])  # fmt: skip
def test_what_a_structure_pass_cannot_go_through_is_refused_before_work(arch, step, shape, message, tmp_path):
    (tmp_path / "recipe.yaml").write_text(f"passes: [{step}]\n")
    Path("network.safetensors").unlink(missing_ok=True)
    if shape is not None:
        save_metanetwork(Path("network.safetensors"), Metanetwork(shape))
    options = RunOptions("resnet.pt", str(tmp_path / "recipe.yaml"), tmp_path / "out", arch=arch, data="images.npz")
    found = refusal(prepare, options)
    assert found[1].startswith(message)
    assert refusal(run, options) == found


def test_more_blocks_than_there_are_cannot_go(tmp_path):
    options = options_of("llama", "llm-depth", tmp_path / "out")
    options = replace(options, sets=(*options.sets, "n2n.remove=3"))
    found = refusal(prepare, options)
    assert found[1] == "n2n: remove is 3, but of 3 units one has to stay; write at most 2"
    assert refusal(run, options) == found


def test_a_metanetwork_of_another_architecture_is_noted(tmp_path):
    (tmp_path / "recipe.yaml").write_text(f"passes: [{REWRITTEN}]\n")
    save_metanetwork(Path("network.safetensors"), Metanetwork(Shape(height=5, breadth=5)))
    options = RunOptions("resnet.pt", str(tmp_path / "recipe.yaml"), tmp_path / "out", arch="tests.pico:ResNet",
                         data="images.npz")  # fmt: skip
    assert any("other architectures than that of ResNet" in note for note in prepare(options).plan.notes)


def test_a_tokenizer_that_is_not_there_is_missed_before_work(tmp_path):
    model = pico.llama(tmp_path / "llama", n_layers=1)
    (model / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"llama: has no tokenizer; expected tokenizer.json"):
        prepare(RunOptions(str(model), "llm-4bit", tmp_path / "out"))


def test_a_text_of_tokens_beyond_the_table_is_refused_before_work(tmp_path):
    import transformers

    config = transformers.GPT2Config(vocab_size=260, n_embd=72, n_layer=1, n_head=3, n_positions=64)
    pico.saved(config, transformers.GPT2LMHeadModel, tmp_path / "small")
    options = RunOptions(
        str(tmp_path / "small"), "llm-4bit", tmp_path / "out", data="calibration.txt", eval="evaluation.txt"
    )
    with pytest.raises(
        DataError, match=r"the tokenizer makes token 299 of it, and the network's table has 260 entries"
    ):
        run(options)
    assert not (tmp_path / "out.partial").exists()


QUICK_ONES = ["llama", "gpt2", "few", "bert", "decoder"]


@pytest.mark.parametrize("source", QUICK_ONES)
def test_a_dry_run_of_a_known_network_builds_nothing(source):
    words = [SOURCES[source][1][0], "-r", "llm-4bit", "--dry-run"]
    code = (
        f"import sys\nfrom compressor.cli.commands import main\ntry:\n    main({words!r})\nexcept SystemExit as end:\n"
        "    print(end.code, sorted({'torch', 'transformers', 'onnxruntime'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 []"
