#!/usr/bin/env python
"""A chat with a compressed language model: numpy, onnxruntime and tokenizers, nothing of compressor.

    compress smollm2/ --recipe llm-2bit -o small
    python chat.py small

A line is a question; an empty one, or the end of the input, ends the chat. The graph remembers nothing: the keys and
values of all tokens so far go in as `past_key_values.….key` and `.value` and come out as `present.…`, longer by the new
tokens, so that each step computes these alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}


class Decoder:
    """The graph with the cache of one conversation."""

    def __init__(self, folder: Path) -> None:
        self.session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
        self.inputs = {entry.name: entry for entry in self.session.get_inputs()}
        self.outputs = [entry.name for entry in self.session.get_outputs()]
        # One array per layer and kind: (1, heads of keys and values, tokens so far, size of a head).
        self.cache = {
            name: np.zeros((1, entry.shape[1], 0, entry.shape[3]), DTYPES[entry.type])
            for name, entry in self.inputs.items()
            if name.startswith("past_key_values.")
        }
        self.n_seen = 0

    def read(self, tokens: list[int]) -> np.ndarray:
        """Takes further tokens in; logits (vocabulary,) of the one that follows."""
        total = self.n_seen + len(tokens)
        given = {
            "input_ids": np.array([tokens]),
            "attention_mask": np.ones((1, total)),
            "position_ids": np.arange(self.n_seen, total)[None],
        }
        feed = {name: array.astype(np.int64) for name, array in given.items() if name in self.inputs}
        found = dict(zip(self.outputs, self.session.run(self.outputs, feed | self.cache), strict=True))
        self.cache = {name: found[name.replace("past_key_values", "present")] for name in self.cache}
        self.n_seen = total
        return found["logits"][0, -1]


def chosen(logits: np.ndarray, temperature: float, generator: np.random.Generator) -> int:
    """The likeliest token at temperature 0, else one drawn from those above a twentieth of the likeliest's chance."""
    if temperature == 0:
        return int(logits.argmax())
    chance = np.exp((logits - logits.max()) / temperature, dtype=np.float64)
    chance[chance < 0.05] = 0
    return int(generator.choice(len(chance), p=chance / chance.sum()))


class Format:
    """How a question is put: as ChatML where the tokenizer knows it, else as a text to go on from."""

    def __init__(self, tokenizer: Tokenizer, config: dict) -> None:
        self.is_chat = tokenizer.token_to_id("<|im_start|>") is not None
        ends = config.get("eos_token_id")
        self.ends = {tokenizer.token_to_id("<|im_end|>"), *(ends if isinstance(ends, list) else [ends])}
        self.ends |= set() if self.is_chat else set(tokenizer.encode("\n").ids[-1:])

    def question(self, text: str, is_first: bool) -> str:
        """The text of a turn up to where the model answers."""
        if not self.is_chat:
            return f"{'' if is_first else chr(10)}Question: {text}\nAnswer:"
        start = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n" if is_first else "<|im_end|>\n"
        return f"{start}<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


def answer(
    decoder: Decoder, tokenizer: Tokenizer, prompt: str, ends: set[int], most: int, temperature: float,
    generator: np.random.Generator,
) -> Iterator[str]:  # fmt: skip
    """Pieces of text as they come. What ends the answer is not read: the next question begins with its own mark."""
    tokens: list[int] = []
    shown = ""
    new = tokenizer.encode(prompt).ids
    for _ in range(most):
        token = chosen(decoder.read(new), temperature, generator)
        if token in ends:
            return
        tokens.append(token)
        new = [token]
        text = tokenizer.decode(tokens)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # half of a character
            yield text[len(shown) :]
            shown = text
    decoder.read(new)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="an artifact")
    parser.add_argument("--tokens", type=int, default=200, help="of an answer at most")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 takes the likeliest token each time")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    config = json.loads((options.folder / "config.json").read_text(encoding="utf-8"))
    tokenizer = Tokenizer.from_file(str(options.folder / "tokenizer.json"))
    decoder, form = Decoder(options.folder), Format(tokenizer, config)
    generator = np.random.default_rng(options.seed)
    room = config["max_position_embeddings"] - options.tokens
    print("> ", end="", flush=True)
    for line in sys.stdin:
        if not line.strip():
            break
        prompt = form.question(line.strip(), decoder.n_seen == 0)
        if decoder.n_seen + len(tokenizer.encode(prompt).ids) > room:
            print("(the model has no room for more; start again)")
            break
        pieces = answer(decoder, tokenizer, prompt, form.ends, options.tokens, options.temperature, generator)
        for piece in pieces:
            print(piece, end="", flush=True)
        print("\n> ", end="", flush=True)
    print()


if __name__ == "__main__":
    main()
