"""Plans: bytes are exactly those of the encodings and of the file, roles and reasons are right, torch stays out."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from compressor.checkpoints import open_checkpoint
from compressor.core.encoding import Affine, Binary, Codebook, Dense, Layout, Scales, describe
from compressor.core.errors import PassError, RecipeError
from compressor.core.passes import Moves, Rates
from compressor.core.roles import block_of, matrix_shape, role_of
from compressor.core.spec import (
    AffineSpec,
    BinarySpec,
    CodebookSpec,
    DenseSpec,
    RefinedSpec,
    SparseSpec,
    Spec,
    group_columns,
)
from compressor.core.tensors import EncodedTensor, write_tensors
from compressor.learning.learned import learnable
from compressor.ops.widths import n_groups, rows_before, zero_steps
from compressor.plan.planning import make_plan
from compressor.plan.recipe_file import load_recipe
from compressor.plan.sizes import header_bytes

ROOT = Path(__file__).parents[2]
SHAPES = [(1, 1), (3, 7), (5, 64), (17, 65), (9, 200), (33, 130)]
NAMES = {
    torch.uint8: "U8", torch.int8: "I8", torch.uint16: "U16", torch.int32: "I32", torch.float16: "F16",
    torch.float32: "F32",
}  # fmt: skip
SPECS: list[Spec] = [
    DenseSpec(), DenseSpec(dtype="F16"), BinarySpec(), BinarySpec(scale="tensor"),
    *(
        AffineSpec(bits=bits, group=group, zero=zero, scale_bits=scale_bits)
        for bits, group, zero, scale_bits in itertools.product(
            (1, 2, 3, 4, 5, 8), (16, 64, "row"), ("middle", "half", "learned"), (8, 16)
        )
    ),
    *(
        CodebookSpec(width=width, dim=dim, codebooks=n, group=group, scale_bits=scale_bits, grid=grid, reorder=ordered)
        for (width, dim), n, group, scale_bits, grid, ordered in itertools.product(
            ((1, 1), (3, 1), (4, 2), (9, 4), (12, 4), (5, 8)), (1, 4), (16, 64, "row"), (8, 16), ("int4", "free"),
            (False, True),
        )
    ),
    *(
        CodebookSpec(width=width, dim=2, group=group, window=window)
        for (width, window), group in itertools.product(((2, 6), (5, 10), (5, 12), (7, 11)), (16, "row"))
    ),
]  # fmt: skip


def encoding_of(spec: Spec, rows: int, columns: int):
    """An encoding with the settings of a spec, filled with whatever fits."""
    shape = (rows, columns)
    if isinstance(spec, DenseSpec):
        return Dense(shape, torch.ones(shape, dtype=torch.float16 if spec.dtype == "F16" else torch.float32))
    if isinstance(spec, BinarySpec):
        return Binary.of(torch.ones(shape, dtype=torch.bool), torch.ones(rows if spec.scale == "row" else 1, 1))
    group = group_columns(spec.group, columns, getattr(spec, "dim", 1))
    groups = n_groups(columns, group)
    scales = Scales.of(torch.ones(rows, groups), spec.scale_bits)
    if isinstance(spec, AffineSpec):
        zero = {"middle": float(2 ** (spec.bits - 1)), "half": 2 ** (spec.bits - 1) - 0.5}.get(
            spec.zero, torch.zeros(rows, groups, dtype=torch.int32)
        )
        codes, steps = torch.zeros(rows, groups * group, dtype=torch.int32), zero_steps(spec.zero, spec.bits)
        return Affine(shape, group, codes, scales, spec.bits, zero, steps)
    books = spec.n_codebooks(rows)
    counts = tuple(rows // books + (i < rows % books) for i in range(books))
    entries, kind = 2 ** (spec.window or spec.width), torch.int8 if spec.grid == "int4" else torch.float16
    table = torch.zeros(books, entries, spec.dim, dtype=kind)
    before = rows_before(spec.width, spec.window)
    codes = torch.zeros(before + rows, groups * group // spec.dim, dtype=torch.int32)
    order = torch.arange(rows) if spec.reorder else None
    return Codebook(shape, spec.width, spec.dim, group, codes, table, scales, counts, order, spec.window)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_spec_names_exactly_the_parts_of_its_encoding(shape):
    for spec in SPECS:
        encoding = encoding_of(spec, *shape)
        parts = {name: (NAMES[part.dtype], tuple(part.shape)) for name, part in encoding.parts().items()}
        assert spec.parts(*shape) == parts, spec
        assert spec.nbytes(*shape) == encoding.nbytes, spec
        assert spec.describe(*shape) == describe(encoding), spec
        assert encoding.decode().shape == shape, spec


@pytest.mark.parametrize(
    ("name", "shape", "config", "role"),
    [
        ("model.layers.0.mlp.up_proj.weight", (1536, 576), {}, "linear"),
        ("model.embed_tokens.weight", (49152, 576), {}, "embedding"),
        ("lm_head.weight", (49152, 576), {}, "embedding"),
        ("bert.embeddings.position_embeddings.weight", (512, 384), {}, "embedding"),
        ("transformer.wpe.weight", (1024, 768), {}, "embedding"),
        ("albert.encoder.embedding_hidden_mapping_in.weight", (256, 128), {}, "linear"),
        ("output.weight", (1000, 64), {"vocab_size": 1000}, "embedding"),
        ("output.weight", (1000, 64), {}, "linear"),
        ("conv1.weight", (64, 3, 7, 7), {}, "conv"),
        ("vit.embeddings.cls_token", (1, 1, 768), {}, "other"),
        ("model.norm.weight", (576,), {}, "other"),
    ],
)
def test_roles(name, shape, config, role):
    assert role_of(name, shape, config) == role


def test_matrices_have_outputs_as_rows():
    assert matrix_shape("conv.weight", (64, 3, 7, 7)) == (64, 147)
    assert matrix_shape("h.0.attn.c_attn.weight", (48, 144), {"model_type": "gpt2"}) == (144, 48)
    assert matrix_shape("h.0.attn.c_attn.weight", (48, 144), {"model_type": "llama"}) == (48, 144)
    assert block_of("model.layers.11.mlp.up_proj.weight") == "model.layers.11"
    assert block_of("model.norm.weight") == ""


@pytest.fixture
def checkpoint(tmp_path):
    """A file with a block twice, a table, a norm, a small matrix, integers and a depthwise convolution."""
    block = {"mlp.up.weight": (130, 70), "mlp.up.bias": (130,), "norm.weight": (70,)}
    tensors = {f"layers.{i}.{name}": torch.ones(shape) for i in (0, 1) for name, shape in block.items()}
    tensors["embed.weight"] = torch.ones(200, 70).half()
    tensors["small.weight"] = torch.ones(3, 70)
    tensors["ids"] = torch.zeros(4, dtype=torch.int64)
    tensors["depthwise.weight"] = torch.ones(1000, 1, 3, 3)
    save_file(tensors, tmp_path / "net.safetensors")
    return open_checkpoint(tmp_path / "net.safetensors")


def test_every_tensor_is_planned_or_has_a_reason(checkpoint):
    plan = make_plan(checkpoint, load_recipe("llm-2bit"))
    found = {tensor.name: (tensor.by, tensor.reason) for tensor in plan.tensors}
    assert found["layers.0.mlp.up.weight"] == ("trellis", "")
    assert found["embed.weight"] == ("embeddings", "")
    assert found["layers.1.mlp.up.bias"] == ("", "bias")
    assert found["layers.1.norm.weight"] == ("", "norm or vector")
    assert found["small.weight"] == ("", "small: fewer than 4096 weights")
    assert found["ids"] == ("", "not of floating point")
    assert found["depthwise.weight"] == ("", "depthwise convolution, and no step has 8 bits")
    assert list(found) == list(checkpoint.tensors)
    assert plan.as_json()["bytes_after"] == sum(plan.files.values())


@pytest.mark.parametrize("recipe", ["llm-2bit", "llm-4bit", "encoder-4bit", "cnn-int8"])
def test_the_planned_file_has_the_bytes_of_the_written_one(checkpoint, recipe, tmp_path):
    plan = make_plan(checkpoint, load_recipe(recipe))
    tensors = {}
    for planned in plan.tensors:
        if isinstance(planned.spec, DenseSpec):
            dtype = {"I64": torch.int64, "F16": torch.float16}.get(planned.spec.dtype, torch.float32)
            tensors[planned.name] = EncodedTensor.dense(torch.zeros(planned.shape), dtype)
        else:
            encoding = encoding_of(planned.spec, *planned.matrix)
            tensors[planned.name] = EncodedTensor(encoding, Layout(planned.shape, planned.transposed))
    write_tensors(tmp_path / "out.safetensors", tensors)
    written = (tmp_path / "out.safetensors").stat().st_size
    assert plan.files["model.safetensors"] == written
    assert header_bytes(plan.tensors, {}) == written - sum(tensor.bytes_after for tensor in plan.tensors)


def test_convolutions_on_int8_are_all_encoded_and_their_graph_is_counted(checkpoint):
    plan = make_plan(checkpoint, load_recipe("cnn-int8"))
    depthwise = next(tensor for tensor in plan.tensors if tensor.name == "depthwise.weight")
    assert (depthwise.by, depthwise.bytes_after) == ("affine", 1000 * 9 + 1000 * 2)
    without = make_plan(checkpoint, load_recipe("cnn-int8", ["affine.skip=depthwise*"]))
    assert plan.files["model.onnx"] - without.files["model.onnx"] > 8 * 1000, "a scale and a bias for each channel"


def test_dense_tensors_are_planned_in_the_type_of_the_export_section(checkpoint):
    plan = make_plan(checkpoint, load_recipe("llm-2bit", ["export.dense=float16"]))
    norm = next(tensor for tensor in plan.tensors if tensor.name == "layers.0.norm.weight")
    assert norm.bytes_after == 2 * math.prod(norm.shape)


def test_a_pattern_that_selects_nothing_is_refused(checkpoint):
    with pytest.raises(RecipeError) as caught:
        make_plan(checkpoint, load_recipe("llm-2bit", ["trellis.select=*.mpl.*"]))
    assert "step 1 (trellis): select '*.mpl.*' matches none of 10 tensors; names are like 'layers.0." in str(
        caught.value
    )


def test_a_network_without_anything_to_encode_is_refused(tmp_path):
    save_file({"norm.weight": torch.ones(8)}, tmp_path / "net.safetensors")
    with pytest.raises(RecipeError, match="encodes no tensor of"):
        make_plan(open_checkpoint(tmp_path / "net.safetensors"), load_recipe("llm-2bit"))


def test_a_plan_of_safetensors_does_not_import_torch(checkpoint):
    code = (
        "import sys\nfrom compressor.checkpoints import open_checkpoint\n"
        "from compressor.plan.planning import make_plan\n"
        "from compressor.plan.recipe_file import load_recipe\n"
        f"make_plan(open_checkpoint({str(checkpoint.path)!r}), load_recipe('llm-2bit'))\n"
        "print(sorted({'torch', 'transformers', 'onnx', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "[]\n"


def test_gradient_steps_over_what_cannot_learn_are_refused_by_its_name(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(AffineSpec, "learns", False)
    text = "passes: [{pass: jlcm, width: 4, dim: 2, group: 32}, {pass: affine, select: '*1.mlp*'}]\n"
    recipe = tmp_path / "recipe.yaml"
    for steps, found in (("distill: {steps: 3}", "distill.steps: 3"), ("", "steps of jlcm on blocks")):
        blocks = "" if steps else ", block_steps: 2"
        recipe.write_text(text.replace("group: 32", f"group: 32{blocks}") + f"embeddings: {{bits: 16}}\n{steps}\n")
        with pytest.raises(RecipeError) as caught:
            make_plan(checkpoint, load_recipe(recipe))
        assert str(caught.value) == (
            f"recipe: 'layers.1.mlp.up.weight' is stored as affine, which gradient steps cannot learn; found {found}; "
            "leave them out, or let another pass store it"
        )
    recipe.write_text(text + "embeddings: {bits: 16}\n")
    make_plan(checkpoint, load_recipe(recipe))


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.label)
def test_what_a_spec_says_of_learning_is_so(spec):
    encoding = encoding_of(spec, 6, 40)
    if not spec.learns:
        with pytest.raises(PassError, match=f"'{spec.kind}' has nothing that gradient steps learn"):
            learnable(encoding, Moves())
        return
    learned = learnable(encoding, Moves())
    assert torch.equal(learned().detach(), encoding.decode())
    assert learned.parameter_groups(Rates(1.0, 1.0, 1.0))


def test_code_bits_are_the_codes_of_a_weight():
    found = {type(spec): spec.code_bits for spec in (DenseSpec(dtype="F16"), AffineSpec(bits=3), BinarySpec())}
    assert found == {DenseSpec: 16, AffineSpec: 3, BinarySpec: 1}
    assert CodebookSpec(width=9, dim=4).code_bits == 2.25
    assert SparseSpec(inner=AffineSpec(bits=8), kept=9).code_bits == 8
    assert RefinedSpec(inner=AffineSpec(bits=3), extra=AffineSpec(bits=4), n=2).code_bits == 3
