#!/usr/bin/env python
"""Encoders with real weights and a measure of their own, at four and at eight bits.

    scripts/fetch_material minilm spam albert molecules
    scripts/bench_encoders.py [--only minilm] [--examples 400]

MiniLM gets a head that tells spam from other mail, trained here on SpamAssassin's first collections (easy-ham-1,
spam-1), its encoder as it is; it is judged on mails of others (easy-ham-2, spam-2). ALBERT, which was trained on
chemical reactions, fills in masked tokens of molecules (ChEMBL's drugs to calibrate, other samples to judge). Each
artifact is run in plain onnxruntime beside the original in transformers. Results go to docs/measured/encoders.json.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
import transformers
from material import model_dir
from measured import cached, markdown, write_results
from torch import Tensor, nn

from compressor.core.options import RunOptions
from compressor.run.pipeline import run

RECIPES: dict[str, tuple[str, ...]] = {
    "encoder-4bit": (),
    "encoder-4bit at 8 bits": ("affine.bits=8", "embeddings.bits=8"),
}
LENGTH, BATCH, STEPS, MASKED = 128, 32, 400, 0.15
SMILES = re.compile(r"\[[^\]]+\]|Br|Cl|%[0-9]{2}|.")
Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Judged:
    """A network, what it is calibrated on, and batches (inputs, labels, which of them count) to judge it on."""

    model: Path
    data: Path
    module: nn.Module
    batches: list[tuple[Inputs, Tensor, Tensor]]


def mails(groups: tuple[str, ...], n: int) -> list[str]:
    """Texts of mails without their headers, the same ones each time."""
    found = []
    for group in groups:
        for file in sorted((model_dir("spam") / group).glob("*.txt")):
            body = file.read_text(encoding="utf-8", errors="replace").partition("\n\n")[2].strip()
            if len(body) > 40:
                found.append(body[:4000])
    return found[:: max(1, len(found) // n)][:n]


def spam(n: int) -> Judged:
    """MiniLM with a trained head."""
    folder, source = cached("encoders") / "spam", model_dir("minilm")
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    train = [(text, 0) for text in mails(("easy-ham-1",), n)] + [(text, 1) for text in mails(("spam-1",), n)]
    if not (folder / "model.safetensors").is_file():
        module = trained(transformers.BertForSequenceClassification.from_pretrained(source, num_labels=2,
                         id2label={0: "ham", 1: "spam"}, label2id={"ham": 0, "spam": 1}), tokenizer, train)  # fmt: skip
        module.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    judged = [(text, 0) for text in mails(("easy-ham-2",), n)] + [(text, 1) for text in mails(("spam-2",), n)]
    data = folder / "mails.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text, _ in train), encoding="utf-8")
    batches = []
    for part in (judged[at : at + BATCH] for at in range(0, len(judged), BATCH)):
        labels = torch.tensor([label for _, label in part])
        batches.append((encoded(tokenizer, [text for text, _ in part]), labels, torch.ones_like(labels).bool()))
    module = transformers.BertForSequenceClassification.from_pretrained(folder).eval()
    return Judged(folder, data, module, batches)


def encoded(tokenizer: Any, texts: list[str]) -> Inputs:
    return dict(tokenizer(texts, truncation=True, max_length=LENGTH, padding=True, return_tensors="pt"))


def trained(module: Any, tokenizer: Any, train: list[tuple[str, int]]) -> nn.Module:
    """The pooler and the classifier learn on what the encoder makes of the texts."""
    module.eval()
    with torch.no_grad():
        first = torch.cat([
            module.bert(**encoded(tokenizer, [text for text, _ in train[at : at + BATCH]])).last_hidden_state[:, :1]
            for at in range(0, len(train), BATCH)
        ])  # fmt: skip
    labels = torch.tensor([label for _, label in train])
    learned = [*module.bert.pooler.parameters(), *module.classifier.parameters()]
    optimizer, generator = torch.optim.AdamW(learned, lr=1e-3), torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        rows = torch.randint(0, len(train), (64,), generator=generator)
        loss = nn.functional.cross_entropy(module.classifier(module.bert.pooler(first[rows])), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return module


def molecules(n: int) -> Judged:
    """ALBERT, whose twelve layers are one."""
    source, folder = model_dir("albert"), cached("encoders")
    words = {word: at for at, word in enumerate((source / "vocab.txt").read_text(encoding="utf-8").splitlines())}
    module = transformers.AlbertForMaskedLM.from_pretrained(source).eval()
    data = folder / "drugs.npz"
    np.savez(data, **{name: value.numpy() for name, value in smiles("chembl_drugs.csv", words, n)[0].items()})
    inputs, tokens = smiles("chembl_samples.csv", words, n)
    chosen = (torch.rand(tokens.shape, generator=torch.Generator().manual_seed(0)) < MASKED) & (
        tokens > words["[MASK]"]
    )
    masked = inputs | {"input_ids": torch.where(chosen, words["[MASK]"], tokens)}
    batches = []
    for at in range(0, len(tokens), BATCH):
        rows = slice(at, at + BATCH)
        batches.append(({name: value[rows] for name, value in masked.items()}, tokens[rows], chosen[rows]))
    return Judged(source, data, module, batches)


def smiles(file: str, words: dict[str, int], n: int) -> tuple[Inputs, Tensor]:
    """The first molecules of a list that fit: inputs, and their tokens (n, LENGTH)."""
    rows, unknown = [], words["[UNK]"]
    with (model_dir("molecules") / file).open(encoding="utf-8") as lines:
        for line in csv.DictReader(lines):
            tokens = [words.get(part, unknown) for part in SMILES.findall(line["smiles"])]
            if 16 <= len(tokens) <= LENGTH - 2 and unknown not in tokens:
                rows.append([words["[CLS]"], *tokens, words["[SEP]"]])
    ids = torch.full((min(n, len(rows)), LENGTH), words["[PAD]"])
    for at, row in enumerate(rows[:n]):
        ids[at, : len(row)] = torch.tensor(row)
    return {"input_ids": ids, "attention_mask": (ids != words["[PAD]"]).long()}, ids


def judge(judged: Judged, artifact: Path) -> dict[str, float]:
    """Right of both, agreement and KL of the artifact's classes in onnxruntime, beside the original's."""
    session = onnxruntime.InferenceSession(str(artifact / "model.onnx"), providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    ours, theirs, labels = [], [], []
    for inputs, wanted, counted in judged.batches:
        with torch.no_grad():
            theirs.append(judged.module(**inputs).logits[counted])
        fed = {name: _given(name, inputs).numpy() for name in names}
        ours.append(torch.from_numpy(np.asarray(session.run(["logits"], fed)[0]))[counted])
        labels.append(wanted[counted])
    a, b, wanted = torch.cat(ours), torch.cat(theirs), torch.cat(labels)
    logs = [logits.log_softmax(-1) for logits in (b, a)]
    return {
        "n": len(wanted),
        "accuracy": float((a.argmax(-1) == wanted).float().mean()),
        "original_accuracy": float((b.argmax(-1) == wanted).float().mean()),
        "agreement": float((a.argmax(-1) == b.argmax(-1)).float().mean()),
        "kl": float((logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean()),
    }


def _given(name: str, inputs: Mapping[str, Tensor]) -> Tensor:
    return inputs[name] if name in inputs else torch.zeros_like(inputs["input_ids"])


def encoders_table(results: dict[str, Any]) -> str:
    """A row for each network and recipe."""
    rows: list[list[object]] = []
    for name, found in results.items():
        for recipe, each in found.items():
            sizes = f"{each['original_megabytes']:.1f} → {each['megabytes']:.1f}"
            right = f"{100 * each['original_accuracy']:.1f} → {100 * each['accuracy']:.1f} %"
            rows.append([name, recipe, sizes, right, f"{each['agreement']:.3f}", f"{each['kl']:.4f}", each["n"]])
    return markdown(["network", "recipe", "MB", "right", "agreement", "KL, nats", "of"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    networks = {"MiniLM, spam or not": spam, "ALBERT, masked tokens of molecules": molecules}
    parser.add_argument("--only", default="", help="networks whose name has this in it")
    parser.add_argument("--examples", type=int, default=400, help="of each class, or molecules")
    arguments = parser.parse_args()
    results: dict[str, dict[str, Any]] = {}
    for name, make in networks.items():
        if arguments.only.lower() not in name.lower():
            continue
        judged = make(arguments.examples)
        for recipe, settings in RECIPES.items():
            with tempfile.TemporaryDirectory(dir=cached("encoders")) as scratch:
                report = run(RunOptions(
                    model=str(judged.model), recipe="encoder-4bit", output=Path(scratch) / "out", data=str(judged.data),
                    sets=(*settings, "evaluation.tokens=0", "evaluation.samples=0"),
                )).report  # fmt: skip
                sizes = {"megabytes": report["size"]["bytes"] / 1e6}
                sizes["original_megabytes"] = report["size"]["original_bytes"] / 1e6
                results.setdefault(name, {})[recipe] = sizes | judge(judged, Path(scratch) / "out")
            print(name, recipe, json.dumps(results[name][recipe]), flush=True)
    write_results("encoders", results)
    import make_tables

    make_tables.main()


if __name__ == "__main__":
    main()
