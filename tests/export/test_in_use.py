"""Memory in use is planned: what folding makes and keeps as in the real graph, and what a process really takes."""

from __future__ import annotations

import pytest
import torch

from compressor.core.encoding import describe, restore
from compressor.core.spec import AffineSpec, BinarySpec, CodebookSpec
from compressor.export import in_use
from compressor.export.in_use import folding_peak, taken
from compressor.export.shares import STAGES, Share
from compressor.export.staging import sizes_of, units_of
from compressor.plan.plan import PlannedTensor
from tests.export.test_lowering import ENCODINGS
from tests.export.test_staging import layers_of

MADE, KEPT = 0.1, 0.02
"""How far what is planned may be from what a graph makes and keeps."""
LAYERS = 4
SUMS = 4 * 1024 * 32
"""Bytes of the matrix that sums groups of inputs, one for all layers."""
TABLES = 1_200_000
"""Bytes of tables that all layers of a graph share, which no plan counts."""
FORMS = {
    "affine2": AffineSpec(bits=2, group=64, zero="learned", scale_bits=8),
    "affine3": AffineSpec(bits=3, group=64, zero="learned", scale_bits=8),
    "affine4": AffineSpec(bits=4, group=32, scale_bits=8),
    "affine4fine": AffineSpec(bits=4, group=32, zero="fine", scale_bits=8),
    "affine8": AffineSpec(bits=8, group=64),
    "codebook10": CodebookSpec(width=10, dim=4, group=64, scale_bits=8),
    "codebook7": CodebookSpec(width=7, dim=2, group=64, scale_bits=8),
    "codebook8": CodebookSpec(width=8, dim=4, group=64, scale_bits=8),
    "binary": BinarySpec(scale="row"),
}


def planned(spec, rows=1024, columns=512, role="linear"):
    return PlannedTensor("w", (rows, columns), role, (rows, columns), 4 * rows * columns, spec, by="x")


@pytest.mark.parametrize("name", FORMS)
def test_what_a_product_folds_is_what_its_nodes_make_and_keep(tmp_path, name):
    tensor = planned(FORMS[name], 2048, 1024)
    parts = {
        part: torch.zeros(shape, dtype={"F16": torch.float16, "F32": torch.float32}.get(dtype, torch.uint8))
        for part, (dtype, shape) in tensor.spec.parts(*tensor.matrix).items()
    }
    model = layers_of(tmp_path, restore(tensor.describe(), parts), n=LAYERS)
    units = units_of(model.graph, sizes_of(model))
    shares = taken(tensor, "default").shares
    made, kept = sum(unit.made for unit in units), sum(unit.kept for unit in units if unit.final)
    assert LAYERS * sum(share.kept for share in shares) == pytest.approx(kept, rel=KEPT, abs=SUMS)
    assert LAYERS * sum(share.made for share in shares) == pytest.approx(made, rel=MADE, abs=TABLES)


def test_a_table_is_planned_to_fold_only_where_it_is_the_heads_too():
    table = planned(FORMS["codebook10"], 4096, 512, role="embedding")
    assert not taken(table, "default").shares
    assert taken(table, "default", is_head=True).shares
    direct = taken(planned(FORMS["affine4"], 4096, 512, role="embedding"), "default", is_head=True)
    assert direct.touched == 4096 * 512 // 2


def test_stages_hold_the_peak_of_folding_near_what_stays():
    shares = [Share(made=20_000_000, kept=3_000_000) for _ in range(30)]
    made, kept = sum(share.made for share in shares), sum(share.kept for share in shares)
    assert kept < folding_peak(shares) < made / STAGES + kept
    assert folding_peak(shares[:1]) == 20_000_000


def test_every_encoding_that_a_graph_can_hold_has_a_plan_of_its_memory():
    for name, encoding in ENCODINGS.items():
        description = describe(encoding)
        if description["kind"] in ("dense", "sparse"):
            continue
        found = in_use._product(description, 1000, "default") or in_use._constant(description, 1000)
        assert all(share.made >= share.kept >= 0 for share in found.shares), name


@pytest.mark.parametrize("heads", [[4, 8], "many", None, 0, True])
def test_a_config_that_states_no_number_of_heads_has_no_plan_of_its_cache(heads):
    config = {"hidden_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2}
    kept = 2 * 4 * 2 * 64 * 2
    assert in_use.memory_in_use([planned(FORMS["affine4"])], {}, config, "default").per_thousand_tokens == 1000 * kept
    found = in_use.memory_in_use([planned(FORMS["affine4"])], {}, config | {"num_attention_heads": heads}, "default")
    assert found.per_thousand_tokens == 0
