"""Pico models of real architectures, built in code and saved to a directory, for the tests of whole sweeps and runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn

VOCABULARY = 300
WORDS = [
    "the",
    "of",
    "river",
    "stone",
    "and",
    "to",
    "bridge",
    "in",
    "water",
    "old",
    "light",
    "house",
    "walks",
    "slowly",
    "over",
    "under",
    "green",
    "hill",
    "bird",
    "sings",
]


def text(seed: int, n_words: int = 2500) -> str:
    """Sentences of random words: texts of two seeds share no long passages."""
    chosen = np.random.default_rng(seed).choice(WORDS, n_words)
    return " ".join(word + ("." if i % 9 == 8 else "") for i, word in enumerate(chosen)) + "\n"


def write_tokenizer(directory: Path) -> None:
    """A byte-level tokenizer.json of `VOCABULARY` tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text(99)], trainer)
    tokenizer.save(str(directory / "tokenizer.json"))


def lively(module: nn.Module, seed: int) -> nn.Module:
    """Weights large enough that what a network computes depends on its input, and norms that are not all one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.dim() > 1 and parameter.numel():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter[0].numel() ** 0.5)
            else:
                offset = 0.0 if name.endswith("bias") else 1.0
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator) + offset)
    return module.eval()


def saved(config: transformers.PretrainedConfig, kind: type, directory: Path, seed: int = 0) -> Path:
    """A transformers model with its config and tokenizer in `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    lively(kind(config), seed).save_pretrained(directory)
    write_tokenizer(directory)
    return directory


def rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Changes the tensors of a model.safetensors."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def llama(directory: Path, tied: bool = True, n_layers: int = 3) -> Path:
    """Grouped attention (5 heads on 1), no biases, 108 columns that no group divides, a tied table."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=80, intermediate_size=108, num_hidden_layers=n_layers, num_attention_heads=5,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=128, tie_word_embeddings=tied, bos_token_id=0,
        eos_token_id=1,
    )  # fmt: skip
    return saved(config, transformers.LlamaForCausalLM, directory)


def gpt2(directory: Path) -> Path:
    """Conv1D layers, stored (inputs, outputs), with biases."""
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=72, n_layer=2, n_head=3, n_positions=64, bos_token_id=0, eos_token_id=1
    )
    return saved(config, transformers.GPT2LMHeadModel, directory)


def openai_gpt(directory: Path) -> Path:
    """A decoder that keeps nothing of what it has read."""
    config = transformers.OpenAIGPTConfig(
        vocab_size=VOCABULARY,
        n_embd=72,
        n_layer=2,
        n_head=3,
        n_positions=64,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=False,
    )
    return saved(config, transformers.OpenAIGPTLMHeadModel, directory)


def mamba(directory: Path) -> Path:
    """A decoder that keeps states, and no keys and values."""
    config = transformers.MambaConfig(
        vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, bos_token_id=0, eos_token_id=1
    )
    return saved(config, transformers.MambaForCausalLM, directory)


def bert(directory: Path) -> Path:
    """An encoder with a masked-language head, whose table and bias are tied."""
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=72, intermediate_size=100, num_hidden_layers=2, num_attention_heads=3,
        max_position_embeddings=64,
    )  # fmt: skip
    return saved(config, transformers.BertForMaskedLM, directory)


def albert(directory: Path, n_groups: int = 1) -> Path:
    """Layers that share their weights: called several times per forward."""
    config = transformers.AlbertConfig(
        vocab_size=VOCABULARY, embedding_size=48, hidden_size=72, intermediate_size=100, num_hidden_layers=4,
        num_attention_heads=3, max_position_embeddings=64, num_hidden_groups=n_groups,
    )  # fmt: skip
    return saved(config, transformers.AlbertForMaskedLM, directory)


class Residual(nn.Module):
    """Two convolutions with batch norms around a shortcut, which is 1×1 where the channels change."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(n_in, n_out, 3, padding=1, bias=False), nn.BatchNorm2d(n_out)
        self.conv2, self.norm2 = nn.Conv2d(n_out, n_out, 3, padding=1, bias=False), nn.BatchNorm2d(n_out)
        self.shortcut = nn.Conv2d(n_in, n_out, 1) if n_in != n_out else nn.Identity()

    def forward(self, x):
        inner = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        return torch.relu(inner + self.shortcut(x))


class ResNet(nn.Module):
    """Images (batch, 3, 12, 12) to 10 logits, with a depthwise convolution and running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 20, 5, stride=2, padding=2)
        self.blocks = nn.Sequential(Residual(20, 28), Residual(28, 28))
        self.depthwise = nn.Conv2d(28, 28, 3, groups=28, padding=1)
        self.head = nn.Linear(28, 10)

    def forward(self, x):
        return self.head(self.depthwise(self.blocks(self.stem(x))).mean((2, 3)))


class Tied(nn.Module):
    """Vectors (batch, 70) to 9 logits; two layers are one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(70, 90)
        self.second, self.third = nn.Linear(90, 90, bias=False), nn.Linear(90, 90)
        self.third.weight = self.second.weight
        self.head = nn.Linear(90, 9)

    def forward(self, x):
        return self.head(torch.tanh(self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))))


def write_state_dict(kind: type[nn.Module], file: Path) -> nn.Module:
    """Saves a module's state dict, with running statistics that are not those of a fresh one; returns the module."""
    module = lively(kind(), 0)
    for buffer in module.buffers():
        if buffer.is_floating_point():
            buffer.copy_(buffer + 0.1 * torch.rand(buffer.shape, generator=torch.Generator().manual_seed(5)))
    torch.save(module.state_dict(), file)
    return module


def token_batches(n_batches: int = 3, size: int = 2, length: int = 20) -> list[dict[str, torch.Tensor]]:
    """Random tokens as a network takes them."""
    generator = torch.Generator().manual_seed(7)
    shape = (size, length)
    return [{"input_ids": torch.randint(0, VOCABULARY, shape, generator=generator)} for _ in range(n_batches)]


def correlated(rows: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight (rows, columns) and the second moment (columns, columns) of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    weight = 0.02 * torch.randn(rows, columns, generator=generator)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5 + 0.5 * torch.eye(columns)
    inputs = torch.randn(6 * columns, columns, generator=generator) @ mixing
    inputs *= torch.rand(columns, generator=generator) * 2 + 0.1
    return weight, inputs.T @ inputs / len(inputs)


def output_error(weight: torch.Tensor, decoded: torch.Tensor, hessian: torch.Tensor) -> float:
    """tr((W − Ŵ)H(W − Ŵ)ᵀ) / tr(WHWᵀ)."""
    error, weight, hessian = (weight - decoded).double(), weight.double(), hessian.double()
    return float(((error @ hessian) * error).sum() / ((weight @ hessian) * weight).sum())
