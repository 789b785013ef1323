"""A batch as data: what a manifest makes, and that each mistake in it is named where it stands."""

from __future__ import annotations

import pytest

from compressor.batch.manifest import jobs_of_line, read_manifest
from compressor.core.errors import UsageError

BOMB = "a: &a [x]\n" + "".join(f"{k}: &{k} [{', '.join(['*' + j] * 8)}]\n" for j, k in ("ab", "bc", "cd", "de"))


@pytest.fixture
def folder(here):
    for name in ("a.pth", "b.pth", "text.txt"):
        (here / name).write_text("x")
    (here / "net").mkdir()
    (here / "mine.yaml").write_text("imports: llm-4bit\n")
    return here


def jobs(folder, text: str):
    (folder / "batch.yaml").write_text(text)
    return read_manifest(folder / "batch.yaml")


def test_models_times_recipes_with_what_stands_nearest(folder):
    found = jobs(folder, """
        recipe: llm-4bit
        data: text.txt
        gates: {max_loss: 5%, max_size: 1MB}
        set: {calibration.tokens: 64}
        models:
          - net
          - path: '*.pth'
            recipes: [cnn-int8, mine.yaml]
            data: mymodule:batches
            seed: 3
            mode: compat
            gates: {max_loss: .1}
        """)  # fmt: skip
    assert [job.name for job in found] == ["net-llm-4bit", "a-cnn-int8", "b-cnn-int8", "a-mine", "b-mine"]
    net, a = found[0], found[1]
    assert net.sets() == ["calibration.tokens=64", "gates.max_loss=5%", "gates.max_size=1MB"]
    assert net.inputs == (str(folder / "text.txt"),)
    assert net.command(folder / "out" / "net") == [
        "run", str(folder / "net"), "--recipe", "llm-4bit", "-o", str(folder / "out" / "net"), "--data",
        str(folder / "text.txt"), "--set", "calibration.tokens=64", "--set", "gates.max_loss=5%", "--set",
        "gates.max_size=1MB",
    ]  # fmt: skip
    assert a.options[:4] == ("--data", "mymodule:batches", "--compat", "--seed")
    assert a.sets() == ["calibration.tokens=64", "gates.max_loss=0.1", "gates.max_size=1MB"]
    assert found[3].recipe == str(folder / "mine.yaml")


def test_models_on_the_line(folder):
    found = jobs_of_line(["*.pth", "net"], {"recipes": ["cnn-int8"]}, ["gates.max_size=1MB"])
    assert [job.name for job in found] == ["a-cnn-int8", "b-cnn-int8", "net-cnn-int8"]
    assert found[0].sets() == ["gates.max_size=1MB"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "batch.yaml: holds None; write keys and values"),
        ("recipe: llm-4bit", "batch.yaml: models is None; write a list of paths"),
        ("modles: [net]", "batch.yaml: no key 'modles'. Did you mean 'models'?"),
        ("models: [net]", "batch.yaml, model 1: recipe is None; write a recipe's name"),
        ("recipe: llm-4bti\nmodels: [net]", "model 1: no recipe named 'llm-4bti'. Did you mean 'llm-4bit'?"),
        ("recipe: llm-4bit\nmodels: [net, none]", "batch.yaml, model 2: .*none does not exist; give a Hugging Face"),
        ("recipe: llm-4bit\nmodels: ['*.gguf']", "model 1: .* matches nothing"),
        ("recipe: llm-4bit\nmodels: [{path: net, reciep: a}]", "model 1: no key 'reciep'. Did you mean 'recipe'?"),
        ("recipe: llm-4bit\nmodels: [{path: net, set: {affine.bist: 3}}]", "no setting 'bist'. Did you mean 'bits'?"),
        ("recipe: llm-4bit\nmodels: [{path: net, gates: {max_los: 3}}]", "'max_los'. Did you mean 'max_loss'"),
        ("recipe: llm-4bit\nmodels: [{path: net, gates: [3]}]", r"gates is \[3\]; write keys and values"),
        ("recipe: llm-4bit\nmodels: [{path: net, gates: {max_size: big}}]", "max_size is 'big'; it should be a size"),
        ("recipe: llm-4bit\nmodels: [{path: net, name: ../../etc}]", "name is '../../etc'; write a plain name"),
        ("recipe: llm-4bit\nmodels: [{path: '*.pth', name: x}]", "name is 'x'; write a plain name, of a path"),
        ("recipe: llm-4bit\nmodels: [net, ./net]", "would both be written to 'net-llm-4bit'; give one a `name:`"),
        ("recipe: llm-4bit\nmodels: [{path: net, data: gone.txt}]", "data is 'gone.txt', which does not exist"),
        ("recipe: llm-4bit\nmodels: [{path: net, seed: x}]", "seed is 'x'; write an integer"),
        ("recipe: llm-4bit\nmodels: [{path: net, trust_pickle: 1}]", "trust_pickle is 1; write true or false"),
        ("recipe: llm-4bit\nmodels: [{path: net, mode: fast}]", "mode is 'fast'. Known: compat, default, standard"),
        ("recipe: llm-4bit\nmodels: [{path: net, target_size: 3XB}]", "target_size: '3XB' is no size"),
        ("models: [7]\nrecipe: llm-4bit", "model 1: is 7; write a path"),
        ("models: [{path: 7}]\nrecipe: llm-4bit", "model 1: path is 7; write the path of a model"),
        ("models: [net\n", "batch.yaml, line 2: is not YAML"),
        (BOMB, "has 32 aliases; write their values out"),
        ("[" * 20000, "is nested too deeply"),
    ],
)  # fmt: skip
def test_mistakes_are_named_before_work(folder, text, message):
    with pytest.raises(UsageError, match=message):
        jobs(folder, text)
