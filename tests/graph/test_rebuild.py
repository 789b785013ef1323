"""Layers read from the traced graph, and students rebuilt from them: what is dead or absent may go without a change."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from compressor.core.students import Student
from compressor.graph.chain import read_chain
from compressor.graph.rebuild import InvalidStudent, build_student, shrunk_kernel, shrunk_outputs
from scripts.networks import digit_cnn, resnet20
from tests import pico

IMAGES = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
GREY = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))


def resnet() -> nn.Module:
    return pico.lively(pico.ResNet(), 0)


def student(module, images, removed=(), shrunk=(), fresh=False):
    chain = read_chain(module, (images,))
    found = Student.of(removed, shrunk)
    return build_student(module, chain, found, (images,), fresh, torch.Generator().manual_seed(0))


def n_parameters(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_outputs_and_kernels_by_the_paper():
    assert [shrunk_outputs(64, share) for share in (0.25, 0.6, 1.0)] == [16, 38, 64]
    assert shrunk_outputs(16, 0.25) == 10
    assert shrunk_outputs(8, 0.25) == 8  # never more than it was
    assert shrunk_outputs(20, 0.7) == 14  # ⌊13.999…⌋ is 14
    assert [shrunk_kernel(3, share) for share in (0.25, 0.5, 0.7, 1.0)] == [1, 1, 2, 3]


def test_layers_their_blocks_and_what_cannot_go():
    chain = read_chain(resnet(), (IMAGES,))
    assert [layer.name for layer in chain.layers] == [
        "stem", "blocks.0.conv1", "blocks.0.conv2", "blocks.0.shortcut", "blocks.1.conv1", "blocks.1.conv2",
        "depthwise", "head",
    ]  # fmt: skip
    assert [block.layers for block in chain.blocks] == [(1, 2), (4, 5)]
    assert [(layer.skip_start, layer.skip_end) for layer in chain.layers] == [
        (0, 0), (0, 1), (1, 0), (0, 0), (0, 1), (1, 0), (0, 0), (0, 0),
    ]  # fmt: skip
    reasons = {layer.name: layer.fixed for layer in chain.layers if layer.fixed}
    assert reasons == {"stem": "is the first layer", "blocks.0.shortcut": "is a shortcut", "head": "is the last layer"}
    assert chain.norms == {1: "blocks.0.norm1", 2: "blocks.0.norm2", 4: "blocks.1.norm1", 5: "blocks.1.norm2"}
    plain = read_chain(digit_cnn().eval(), (GREY,))
    assert [layer.fixed for layer in plain.layers] == [
        "is the first layer", "has a stride", "", "has a stride", "", "has a stride", "is linear", "is the last layer"
    ]  # fmt: skip
    assert plain.blocks == ()
    strided = [layer.fixed for layer in read_chain(resnet20().eval(), (GREY,)).layers if layer.stride == 2]
    assert strided == ["has a stride"] * 4


def test_an_unchanged_student_is_the_teacher_and_the_teacher_stays():
    module = resnet()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    same = student(module, IMAGES)
    assert torch.equal(same(IMAGES), module(IMAGES))
    student(module, IMAGES, [1, 4], [(0, "outputs", 0.5)], fresh=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_a_block_whose_layers_all_go_becomes_its_shortcut():
    module = resnet()
    with torch.no_grad():
        wanted = torch.relu(module.blocks[0](module.stem(IMAGES)))
        wanted = module.head(module.depthwise(wanted).mean((2, 3)))
    torch.testing.assert_close(student(module, IMAGES, [4, 5])(IMAGES), wanted)
    with torch.no_grad():
        projected = torch.relu(module.blocks[0].shortcut(module.stem(IMAGES)))
        wanted = module.head(module.depthwise(module.blocks[1](projected)).mean((2, 3)))
    smaller = student(module, IMAGES, [1, 2])
    torch.testing.assert_close(smaller(IMAGES), wanted)
    gone = sum(n_parameters(child) for name, child in module.blocks[0].named_children() if name != "shortcut")
    assert n_parameters(smaller) == n_parameters(module) - gone


def test_channels_that_are_nothing_go_without_a_change():
    """Half of the stem, and of a block's middle, is dead: the student without it computes the same."""
    module = resnet()
    with torch.no_grad():
        for layer, norm in ((module.blocks[1].conv1, module.blocks[1].norm1),):
            layer.weight[::2] = 0
            for tensor in (norm.weight, norm.bias):
                tensor[::2] = 0
        module.stem.weight[1::2] = 0
        module.stem.bias[1::2] = 0
    smaller = student(module, IMAGES, (), [(0, "outputs", 0.5), (4, "outputs", 0.5)])
    assert (smaller.stem.out_channels, smaller.blocks[0].conv1.in_channels) == (10, 10)
    assert smaller.blocks[1].norm1.num_features == 14
    torch.testing.assert_close(smaller(IMAGES), module(IMAGES), rtol=1e-4, atol=1e-5)


def test_the_last_convolution_of_a_block_has_its_shortcuts_width():
    module = resnet20().eval()
    for number, removed in enumerate(((), (2,), (1, 4))):
        smaller = student(module, GREY, removed, [(0, "outputs", 0.7), (9, "outputs", 0.5), (7, "outputs", 0.6)])
        assert smaller.stem[0].out_channels == 11
        assert smaller.blocks[2].conv2.out_channels == 11, number
        assert smaller.blocks[3].conv1.out_channels == 19
        assert smaller.blocks[3].conv2.out_channels == smaller.blocks[3].shortcut[0].out_channels == 16
        assert smaller.blocks[5].conv2.out_channels == 16


def test_linears_take_the_features_of_the_channels_that_are_left():
    module = digit_cnn().eval()
    with torch.no_grad():
        module.conv_layers[6].weight[::2] = 0
        module.conv_layers[6].bias[::2] = 0
    smaller = student(module, GREY, (), [(4, "outputs", 0.5)])
    assert smaller.fc_layers[0].in_features == 64 * 9
    torch.testing.assert_close(smaller(GREY), module(GREY), rtol=1e-4, atol=1e-5)


def test_a_kernel_keeps_its_middle_and_shapes_that_do_not_fit_are_refused():
    module = resnet()
    shrunk = [(1, "kernel", 0.5), (1, "padding", 0.5)]
    smaller = student(module, IMAGES, (), shrunk)
    assert torch.equal(smaller.blocks[0].conv1.weight[:, :, 0, 0], module.blocks[0].conv1.weight[:, :, 1, 1])
    assert (smaller.blocks[0].conv1.kernel_size, smaller.blocks[0].conv1.padding) == ((1, 1), (0, 0))
    with pytest.raises(InvalidStudent):
        student(module, IMAGES, (), shrunk[1:])  # the two sides of the sum differ in size


def test_a_fresh_student_has_none_of_the_teachers_weights():
    module = resnet()
    kept, fresh = (student(module, IMAGES, [1], fresh=flag) for flag in (False, True))
    assert torch.equal(kept.head.weight, module.head.weight)
    assert kept.head.weight.shape == fresh.head.weight.shape
    assert not torch.equal(fresh.head.weight, module.head.weight)
    assert fresh.blocks[0].norm2.running_var.eq(1).all()


def test_random_students_of_a_residual_network_are_mostly_valid():
    module, generator = resnet20().eval(), torch.Generator().manual_seed(0)
    chain = read_chain(module, (GREY,))
    free = [i for i, layer in enumerate(chain.layers) if not layer.fixed]
    wide = [i for i, layer in enumerate(chain.layers) if "outputs" in layer.shrinks]
    for _ in range(6):
        removed = [i for i in free if torch.rand((), generator=generator) < 0.5]
        shrunk = [(i, "outputs", 0.6) for i in wide if torch.rand((), generator=generator) < 0.5]
        smaller = build_student(module, chain, Student.of(removed, shrunk), (GREY,), False, generator)
        assert n_parameters(smaller) < n_parameters(module)
        assert smaller(GREY).isfinite().all()
