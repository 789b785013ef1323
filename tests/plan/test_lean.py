"""The lean recipes: one kernel call for each product, of codes that lie on disk as the kernel wants them."""

from __future__ import annotations

import pytest

from compressor.checkpoints import open_checkpoint
from compressor.export.forms import form
from compressor.plan.planning import make_plan
from compressor.plan.recipe_file import load_recipe


def forms(llama, recipe):
    plan = make_plan(open_checkpoint(llama), load_recipe(recipe, []))
    descriptions = [tensor.describe() for tensor in plan.tensors]
    return [form(description, "default") for description in descriptions if description["kind"] != "dense"]


@pytest.mark.parametrize(("recipe", "bits"), [("llm-2bit-lean", {2, 4}), ("llm-4bit-lean", {4})])
def test_nothing_is_looked_up_and_nothing_added_beside_a_product(llama, recipe, bits):
    found = forms(llama, recipe)
    assert {each.bits for each in found} == bits
    assert all(each.direct and not each.shifted for each in found)


@pytest.mark.parametrize("recipe", ["llm-2bit", "llm-4bit"])
def test_the_recipes_that_they_stand_beside_need_more(llama, recipe):
    assert any(each is None or not each.direct or each.shifted for each in forms(llama, recipe))
