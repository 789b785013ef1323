"""Pico networks of real architectures, in code: what dependency groups and structure passes have to be right on."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


def conv_bn(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1, act: type = nn.ReLU) -> Any:
    padding = kernel // 2
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), act())


class Bottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int, groups: int = 1) -> None:
        super().__init__()
        outputs = 4 * width
        self.reduce, self.middle = conv_bn(inputs, width, 1), conv_bn(width, width, 3, stride, groups)
        self.expand = conv_bn(width, outputs, 1, act=nn.Identity)
        changed = stride > 1 or inputs != outputs
        self.shortcut = conv_bn(inputs, outputs, 1, stride, act=nn.Identity) if changed else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.expand(self.middle(self.reduce(x))) + self.shortcut(x), inplace=True)


class ResNet(nn.Module):
    """Bottlenecks with projected and with identical shortcuts; `groups` makes it a ResNeXt."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_bn(3, 12), nn.MaxPool2d(2))
        self.layers = nn.Sequential(Bottleneck(12, 8, 1, groups), Bottleneck(32, 8, 1, groups),
                                    Bottleneck(32, 12, 2, groups))  # fmt: skip
        self.head = nn.Linear(48, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.stem(x)).mean((2, 3)))


class VGG(nn.Module):
    """Its classifier reads a flattened map: several columns per channel."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 10, 3, padding=1), nn.ReLU(True), nn.MaxPool2d(2),
            nn.Conv2d(10, 14, 3, padding=1), nn.BatchNorm2d(14), nn.ReLU(True), nn.MaxPool2d(2),
        )  # fmt: skip
        self.classifier = nn.Sequential(nn.Linear(14 * 16, 24), nn.ReLU(True), nn.Dropout(), nn.Linear(24, 7))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.features(x), 1))


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.squeeze, self.excite = nn.Conv2d(channels, squeezed, 1), nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = functional.adaptive_avg_pool2d(x, 1)
        return x * functional.hardsigmoid(self.excite(functional.relu(self.squeeze(pooled))))


class InvertedResidual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, act: type, excite: bool) -> None:
        super().__init__()
        wide = 3 * inputs
        gate = SqueezeExcite(wide, 6) if excite else nn.Identity()
        self.conv = nn.Sequential(
            conv_bn(inputs, wide, 1, act=act), conv_bn(wide, wide, 3, stride, wide, act), gate,
            conv_bn(wide, outputs, 1, act=nn.Identity),
        )  # fmt: skip
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.adds else self.conv(x)


class MobileNet(nn.Module):
    """V2 with ReLU6, V3 with hard swish and squeeze-excite, EfficientNet-lite's proportions with SiLU."""

    def __init__(self, act: type = nn.ReLU6, excite: bool = False, widths: tuple[int, ...] = (8, 12, 12, 16)) -> None:
        super().__init__()
        blocks = [InvertedResidual(a, b, 1 + (i == 0), act, excite)
                  for i, (a, b) in enumerate(itertools.pairwise(widths))]  # fmt: skip
        self.features = nn.Sequential(conv_bn(3, widths[0], act=act), *blocks, conv_bn(widths[-1], 20, 1, act=act))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(20, 7))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean([2, 3]))


class DenseNet(nn.Module):
    """Every layer reads all that came before, joined; its norms stand before the convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        widths = [8, 13, 18]
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths)
        self.convs = nn.ModuleList(nn.Conv2d(width, 5, 3, padding=1, bias=False) for width in widths)
        self.transition = nn.Sequential(nn.BatchNorm2d(23), nn.ReLU(), nn.Conv2d(23, 11, 1), nn.AvgPool2d(2))
        self.head = nn.Linear(11, 7)

    def forward(self, x: Tensor) -> Tensor:
        found = [self.stem(x)]
        for norm, conv in zip(self.norms, self.convs, strict=True):
            found.append(conv(functional.relu(norm(torch.cat(found, 1)))))
        return self.head(self.transition(torch.cat(found, 1)).flatten(2).mean(-1))


class UNet(nn.Module):
    """Transposed convolutions, and maps joined across the network; its output has the input's positions."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.bottom = conv_bn(3, 6), conv_bn(6, 10), conv_bn(10, 14)
        self.up2, self.up1 = nn.ConvTranspose2d(14, 9, 2, 2), nn.ConvTranspose2d(12, 5, 2, 2)
        self.merge2, self.merge1 = conv_bn(19, 12), conv_bn(11, 8)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down1(x)
        b = self.down2(functional.max_pool2d(a, 2))
        c = self.bottom(functional.max_pool2d(b, 2))
        b = self.merge2(torch.cat([self.up2(c), b], 1))
        return self.head(self.merge1(torch.cat([self.up1(b), a], 1)))


class Recurrent(nn.Module):
    """An LSTM, whose width is not followed, between layers whose is."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.before = nn.Embedding(30, 12), nn.Linear(12, 16)
        self.project = nn.Linear(16, 10)
        self.lstm, self.hidden, self.head = nn.LSTM(10, 14, batch_first=True), nn.Linear(14, 18), nn.Linear(18, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.project(functional.gelu(self.before(self.embedding(tokens))))
        return self.head(functional.relu(self.hidden(self.lstm(x)[0][:, -1])))


class Towers(nn.Module):
    """Two inputs, two towers, their product by entries; then a gate whose masked units are not zero."""

    def __init__(self) -> None:
        super().__init__()
        self.users = nn.Sequential(nn.Linear(9, 20), nn.ReLU(), nn.Linear(20, 12))
        self.items = nn.Sequential(nn.Linear(7, 16), nn.Tanh(), nn.Linear(16, 12))
        self.gate, self.head = nn.Linear(12, 10), nn.Linear(10, 3)

    def forward(self, users: Tensor, items: Tensor) -> Tensor:
        both = self.users(users) * self.items(items)
        return self.head(torch.sigmoid(self.gate(both)))


class Custom(nn.Module):
    """Parameters of its own: a packed projection, a position table, a class token, a scale per channel, a tied head."""

    def __init__(self, width: int = 24, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.size = heads, 6
        self.patch = nn.Conv2d(3, width, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, 17, width))
        self.qkv = nn.Parameter(torch.randn(width, 3 * heads * self.size) * width**-0.5)
        self.mix = nn.Parameter(torch.randn(width, heads * self.size) * 0.2)
        self.up, self.gate = nn.Linear(width, 20), nn.Linear(width, 20, bias=False)
        self.down, self.scale = nn.Linear(20, width), nn.Parameter(torch.rand(width))
        self.head = nn.Linear(width, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions[:, : x.shape[1] + 1]
        q, k, v = (x @ self.qkv).view(*x.shape[:2], 3, self.heads, self.size).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) / self.size**0.5).softmax(-1)
        x = x + (weights @ v).transpose(1, 2).reshape(*x.shape[:2], -1) @ self.mix.T
        x = x + self.scale * self.down(functional.silu(self.gate(x)) * self.up(x))
        return self.head(x[:, 0])


def image(side: int = 16, n: int = 2) -> tuple[Tensor]:
    return (torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(1)),)


def tokens(n: int = 2, length: int = 9, vocabulary: int = 40) -> dict[str, Tensor]:
    numbers = torch.randint(3, vocabulary, (n, length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": numbers, "attention_mask": torch.ones_like(numbers)}


def _transformer(config: str, model: str, **settings: Any) -> nn.Module:
    import transformers

    return getattr(transformers, model)(getattr(transformers, config)(**settings))


def bert() -> nn.Module:
    return _transformer(
        "BertConfig", "BertForSequenceClassification", vocab_size=40, hidden_size=32, num_hidden_layers=2,
        num_attention_heads=4, intermediate_size=44, max_position_embeddings=16, num_labels=3,
    )  # fmt: skip


def t5() -> nn.Module:
    return _transformer(
        "T5Config", "T5ForConditionalGeneration", vocab_size=40, d_model=24, d_kv=6, d_ff=40, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu", decoder_start_token_id=0,
    )  # fmt: skip


def llama() -> nn.Module:
    return _transformer(
        "LlamaConfig", "LlamaForCausalLM", vocab_size=40, hidden_size=32, intermediate_size=44, num_hidden_layers=2,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=32, tie_word_embeddings=True,
    )  # fmt: skip


def gpt2() -> nn.Module:
    return _transformer(
        "GPT2Config", "GPT2LMHeadModel", vocab_size=40, n_embd=32, n_layer=2, n_head=4, n_positions=16, n_inner=40,
    )  # fmt: skip


def vit() -> nn.Module:
    return _transformer(
        "ViTConfig", "ViTForImageClassification", hidden_size=24, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=40, image_size=16, patch_size=4, num_labels=7,
    )  # fmt: skip


def swin() -> nn.Module:
    return _transformer(
        "SwinConfig", "SwinForImageClassification", image_size=16, patch_size=2, embed_dim=16, depths=[2, 1],
        num_heads=[2, 4], window_size=4, num_labels=7,
    )  # fmt: skip


def convnext() -> nn.Module:
    return _transformer(
        "ConvNextConfig", "ConvNextForImageClassification", hidden_sizes=[12, 20], depths=[1, 2], patch_size=2,
        num_stages=2, num_labels=7, layer_scale_init_value=0.5,
    )  # fmt: skip


def with_statistics(module: nn.Module, seed: int = 0) -> nn.Module:
    """In eval mode, with weights of some size and norms that change what they are given."""
    generator = torch.Generator().manual_seed(seed)
    for child in module.modules():
        if isinstance(child, (nn.BatchNorm2d, nn.GroupNorm)):
            for tensor in (child.weight.data, child.bias.data):
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
        if isinstance(child, nn.BatchNorm2d):
            assert child.running_mean is not None and child.running_var is not None
            child.running_mean.copy_(0.3 * torch.randn(child.running_mean.shape, generator=generator))
            child.running_var.copy_(0.5 + torch.rand(child.running_var.shape, generator=generator))
    return module.eval()


ZOO: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "resnet": (ResNet, image()),
    "resnext": (lambda: ResNet(groups=4), image()),
    "vgg": (VGG, image()),
    "mobilenet_v2": (MobileNet, image()),
    "mobilenet_v3": (lambda: MobileNet(nn.Hardswish, excite=True), image()),
    "efficientnet_lite": (lambda: MobileNet(nn.SiLU, widths=(8, 8, 12, 20)), image()),
    "densenet": (DenseNet, image()),
    "unet": (UNet, image()),
    "convnext": (convnext, {"pixel_values": image()[0]}),
    "vit": (vit, {"pixel_values": image()[0]}),
    "swin": (swin, {"pixel_values": image()[0]}),
    "bert": (bert, tokens()),
    "t5": (t5, tokens() | {"decoder_input_ids": tokens(length=5)["input_ids"]}),
    "llama": (llama, tokens()),
    "gpt2": (gpt2, tokens()),
    "recurrent": (Recurrent, (tokens(vocabulary=30)["input_ids"],)),
    "towers": (Towers, (torch.randn(4, 9), torch.randn(4, 7))),
    "custom": (Custom, image()),
}
"""Name -> how it is made, and arguments of its forward."""


def build(name: str, seed: int = 0) -> nn.Module:
    """A network of the zoo, its weights drawn from `seed`, in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return with_statistics(ZOO[name][0]())
