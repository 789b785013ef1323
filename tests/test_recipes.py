"""Recipes: the shipped ones load, imports and --set merge, and every mistake is told exactly."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from compressor.core.errors import RecipeError
from compressor.passes.registry import SETTINGS
from compressor.plan.recipe import SECTIONS
from compressor.plan.recipe_file import known_passes, load_recipe, restore_recipe, shipped_recipes

ROOT = Path(__file__).parents[1]
FIELD = next(iter(SECTIONS["calibration"].model_fields))
STEP_1 = "recipe.yaml, step 1"
KNOWN = f"Known: {', '.join(known_passes())}."
JLCM = f"Known: {', '.join(sorted([*SETTINGS['jlcm'].model_fields, 'select', 'skip']))}."
EMBEDDINGS = f"Known: {', '.join(sorted(SECTIONS['embeddings'].model_fields))}."


@pytest.fixture(autouse=True)
def folder(here):
    return here


def write(folder, text: str, name: str = "recipe.yaml") -> None:
    (folder / name).write_text(text)


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_load_and_say_what_they_need(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description
    assert recipe.needs


def test_the_recipes_that_are_promised_are_shipped():
    promised = {"cnn-int8", "llm-2bit", "llm-3bit", "llm-4bit", "encoder-4bit", "llm-2bit-fast", "llm-2bit-best"}
    assert promised <= set(shipped_recipes())


def test_the_fast_recipe_takes_no_gradient_steps():
    assert "gradients" not in load_recipe("llm-2bit-fast").required


def test_reading_a_recipe_does_not_import_torch():
    lines = ("import sys", "import compressor.plan.recipe_file as file", "file.load_recipe('llm-2bit')",
             "print('torch' in sys.modules)")  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout == "False\n"


def test_an_importing_recipe_changes_single_settings(folder):
    write(
        folder, "passes: [{pass: jlcm, width: 8, dim: 4, group: 32}]\ncalibration: {tokens: 99, window: 64}", "a.yaml"
    )
    write(folder, "imports: [a.yaml]\npasses: [{pass: jlcm, group: 128}, {pass: affine}]\ncalibration: {tokens: 77}")
    recipe = load_recipe("recipe.yaml")
    assert [step.name for step in recipe.passes] == ["jlcm", "affine"]
    settings = recipe.passes[0].settings.model_dump()
    assert (settings["width"], settings["group"]) == (8, 128)
    assert (recipe.calibration.tokens, recipe.calibration.window) == (77, 64)


def test_imports_find_files_beside_the_importing_recipe(folder):
    (folder / "sub").mkdir()
    write(folder, "passes: [{pass: jlcm, width: 7}]", "sub/a.yaml")
    write(folder, "imports: a.yaml", "sub/b.yaml")
    assert load_recipe("sub/b.yaml").passes[0].settings.model_dump()["width"] == 7


def test_set_changes_settings_sections_and_patterns():
    sets = [
        "trellis.width=6",
        "trellis.damping=1e-3",
        "trellis.select=*.mlp.*",
        "embeddings.bits=8",
        "trellis.group=row",
    ]
    recipe = load_recipe("llm-2bit", sets)
    settings = recipe.passes[0].settings.model_dump()
    assert (settings["width"], settings["damping"], settings["group"]) == (6, 0.001, "row")
    assert recipe.passes[0].select == ("*.mlp.*",)
    assert recipe.embeddings.bits == 8


def test_patterns_select_and_skip(folder):
    write(folder, "passes: [{pass: jlcm, select: ['*.mlp.*', '*q_proj*'], skip: '*.0.*'}]")
    step = load_recipe("recipe.yaml").passes[0]
    names = ["l.0.mlp.up", "l.1.mlp.up", "l.1.q_proj.weight", "l.1.k_proj.weight"]
    assert [step.selects(name) for name in names] == [False, True, True, False]


def test_the_last_pass_that_selects_a_tensor_stores_it(folder):
    write(folder, "passes: [{pass: affine, bits: 2}, {pass: affine, bits: 8, select: '*down*'}]")
    recipe = load_recipe("recipe.yaml")
    bits = [recipe.choose(name, (64, 128), "linear").spec.bits for name in ("up.weight", "down.weight")]
    assert bits == [2, 8]


def test_to_dict_spells_out_what_writing_it_again_would_read(folder):
    import yaml

    content = load_recipe("llm-2bit").to_dict()
    write(folder, yaml.safe_dump(content))
    assert restore_recipe(content, "compression.json") == load_recipe("llm-2bit")
    assert load_recipe("recipe.yaml").to_dict() == content


WRONG = {
    "passes: [{pass: registry}]": f"{STEP_1}: no pass named 'registry'. Did you mean 'reste'? {KNOWN}",
    "passes: [{pass: jlmc}]": f"{STEP_1}: no pass named 'jlmc'. Did you mean 'jlcm'? {KNOWN}",
    "passes: [{pass: jlcm, grup: 2}]": f"{STEP_1} (jlcm): no setting 'grup'. Did you mean 'group'? {JLCM}",
    "passes: [{pass: jlcm, width: 99}]": f"{STEP_1} (jlcm): width is 99; it should be less than or equal to 12",
    "passes: [{pass: jlcm, width: two}]": f"{STEP_1} (jlcm): width is 'two'; it should be an integer",
    "passes: [{pass: jlcm, feedback: 1}]": f"{STEP_1} (jlcm): feedback is 1; it should be true or false",
    "passes: [{pass: jlcm}, {pass: affine, bits: 5}]": (
        "recipe.yaml, step 2 (affine): bits is 5; it should be 2, 3, 4 or 8"
    ),
    "passes: [{pass: jlcm, group: rows}]": f"{STEP_1} (jlcm): group is 'rows'; it should be an integer or 'row'",
    "passes: [{pass: jlcm, width: 2, width: 3}]": "recipe.yaml, line 1: is not YAML; 'width' is written twice",
    "passes: [jlcm]": f"{STEP_1}: is 'jlcm'; write `pass: NAME` and its settings",
    "passes: jlcm": "recipe.yaml: passes is 'jlcm'; write a list of steps, each `- pass: NAME`",
    "passes: [{pass: jlcm, width: [2}]": "recipe.yaml, line 1: is not YAML; expected ',' or ']', but got '}'",
    "imports: [recipe.yaml]": "recipe.yaml: imports go in a circle, recipe → recipe; remove one of them",
    "passes: [{pass: jlcm}]\nembeddings: {bit: 4}": (
        f"recipe.yaml, embeddings: no setting 'bit'. Did you mean 'bits'? {EMBEDDINGS}"
    ),
    "passes: [{pass: jlcm}]\ncalibration: {tokens: 0}": (
        "recipe.yaml, calibration: tokens is 0; it should be greater than or equal to 1"
    ),
    "passes: [{pass: jlcm}]\ngates: {min_speedup: 2}\nevaluation: {speed: false}": (
        "recipe.yaml, gates: min_speedup is 2, but evaluation.speed is false, so that no speed is measured; leave one "
        "of them out"
    ),
    "passes: [{pass: jlcm}]\ngates: {max_memory: 90MB}\nevaluation: {speed: false}": (
        "recipe.yaml, gates: max_memory is 9e+07, but evaluation.speed is false, so that no memory is measured; leave "
        "one of them out"
    ),
    "calibration: 3": f"recipe.yaml, calibration: is 3; write its settings, as `{FIELD}: …`",
    "- 1": "recipe.yaml: holds [1]; write keys and values, as `passes:`",
    "name: x": "recipe.yaml: has no passes; write for example `passes: [{pass: affine}]`",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_wrong_recipe_gives_exactly_the_message(folder, text):
    write(folder, text)
    with pytest.raises(RecipeError) as caught:
        load_recipe("recipe.yaml")
    assert str(caught.value) == WRONG[text]


def test_an_unknown_recipe_is_refused_with_the_known_ones():
    with pytest.raises(RecipeError, match="no recipe named 'llm2bit'. Did you mean 'llm-2bit'"):
        load_recipe("llm2bit")


def test_longer_import_cycles_are_named(folder):
    write(folder, "imports: b.yaml", "a.yaml")
    write(folder, "imports: a.yaml", "b.yaml")
    with pytest.raises(RecipeError, match="b.yaml: imports go in a circle, a → b → a"):
        load_recipe("a.yaml")


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("trellis.widht=3", "--set trellis.widht=3: no setting 'widht'. Did you mean 'width'?"),
        ("trelis.width=3", "--set trelis.width=3: the recipe has no 'trelis'. Did you mean 'trellis'?"),
        ("trellis.width", "--set trellis.width: write PASS.KEY=VALUE"),
        ("trellis.width=0", "--set trellis.width=0: width is 0; it should be greater than or equal to 2"),
    ],
)
def test_a_wrong_set_names_the_option(assignment, message):
    with pytest.raises(RecipeError) as caught:
        load_recipe("llm-2bit", [assignment])
    assert str(caught.value).startswith(message)


def test_a_pass_of_an_earlier_stage_cannot_follow(folder, monkeypatch):
    class Rotate(SETTINGS["affine"]):
        name = "rotate"
        stage = "rewrite"

    monkeypatch.setitem(SETTINGS, "rotate", Rotate)
    write(folder, "passes: [{pass: affine}, {pass: rotate}]")
    with pytest.raises(RecipeError) as caught:
        load_recipe("recipe.yaml")
    assert str(caught.value) == (
        "recipe.yaml, step 2 (rotate): a rewrite pass cannot follow the weight pass 'affine'; write the steps in the "
        "order structure → rewrite → weight"
    )


def test_a_pattern_is_a_text_without_quotation_marks(folder):
    write(folder, "passes: [{pass: gblm, pattern: 2:4, sparsity: 5e-1}]\ncalibration: {tokens: 8_192}")
    recipe = load_recipe("recipe.yaml")
    assert recipe.passes[0].settings.pattern == "2:4"
    assert recipe.calibration.tokens == 8192
