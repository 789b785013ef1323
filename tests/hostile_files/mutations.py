"""Files with one to three things wrong *inside*: they still parse as what they are, and say what nobody means.

`readers.damaged` breaks bytes, and most of what it makes ends at a parser. Here the file is taken apart by its format,
a name, a number, a text or a record is replaced by one of the nastiest, and it is put together again.
"""

from __future__ import annotations

import copy
import io
import json
import pickletools
import random
import struct
import warnings
import zipfile
from collections.abc import Callable
from typing import Any

import onnx
import yaml

NAMES = (
    "", " ", ".", "..", "../../x", "/etc/passwd", "a/b", "a\\b", "C:\\x", "nul", "~", "-o", "--force", "*", "?", "*a",
    "\0", "a\0b", "\n", "\r\n", "\t", "\x7f", "\x1b[2J\x1b[31mred", "\x9b31m", "[/x]", "[bold]x[/bold]", "[link=x]",
    "{x}",
    "{0.__class__}", "%s%n", "${HOME}", "$(id)", "<script>alert(1)</script>", "&amp;", "'\"`", "\u202egnp.exe",
    "\u200b", "\ufeff", "e\u0301", "\u00e9", "\U0001f4a9", "\ud800", "a\udcffb", "x" * 300, "y" * 70_000, "é" * 200,
    "__class__", "__proto__", "__metadata__", "os:system", "builtins:exec", "file:///etc/passwd", "http://localhost/x",
    "null", "NaN", "1e999", "0x10", "00", "１２", "true", "model.safetensors", "config.json", "compression.json",
    "model.embed_tokens.weight", "lm_head.weight", "a.weight", "weight", "affine", "llm-4bit", "F32", "BF16", "float32",
)  # fmt: skip
"""As names, texts and paths; the lone surrogates are what JSON can say and UTF-8 cannot."""
NUMBERS = (
    -(2**63), -1, 0, 1, 2, 3, 7, 255, 65_536, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**53 + 1, 2**63 - 1, 2**63, 2**64,
    10**30, 10**400, 0.5, -0.0, 1e-320, 1e308, -1e308, float("inf"), float("-inf"), float("nan"),
)  # fmt: skip
YAML_TEXTS = (
    "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\npasses: [*c]\n", "<<: {passes: []}\n", "? {a: b}\n: c\n",
    "--- a\n--- b\n",
    "!!python/object/apply:os.system [id]\n", "!!binary aGk=\n", "!!set {a, b}\n", "2020-01-01: 1\n", "1: 2\n",
    "%YAML 9.9\n---\n",
    "~: ~\n", "passes: !!omap [a: 1]\n", "a: 0o777\n", "a: 1_000\n", "a: 12:30:45\n",
    "a: .inf\n", "[[[[[[[[[[]]]]]]]]]]\n",
)  # fmt: skip


def nasty(generator: random.Random) -> Any:
    """A value of any kind that JSON and YAML have."""
    kind = generator.randrange(10)
    if kind < 4:
        return generator.choice(NAMES)
    if kind < 7:
        return generator.choice(NUMBERS)
    deep: Any = generator.choice(NAMES)
    for _ in range(generator.choice((3, 20, 400))):
        deep = [deep] if generator.random() < 0.5 else {"a": deep}
    return generator.choice((None, True, False, [], {}, [[]], {"": {}}, [None] * 3, deep))


def mutated_tree(tree: Any, generator: random.Random) -> Any:
    """One node of it replaced, removed, doubled, moved or renamed."""
    tree = copy.deepcopy(tree)
    holder, key = _place(tree, generator)
    if holder is None:
        return nasty(generator)
    kind = generator.randrange(8)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[generator.choice(NAMES)] = holder.pop(key)
    elif kind == 2:
        other, there = _place(tree, generator)
        holder[key] = copy.deepcopy(other[there]) if other is not None else nasty(generator)
    elif kind == 3 and isinstance(holder, list):
        holder[key:key] = [copy.deepcopy(holder[key])] * generator.choice((1, 3, 200))
    elif kind == 4 and isinstance(holder, dict):
        holder[generator.choice(NAMES)] = copy.deepcopy(holder[key])
    elif kind == 5 and isinstance(holder[key], str):
        at = generator.randrange(len(holder[key]) + 1)
        holder[key] = holder[key][:at] + generator.choice(NAMES) + holder[key][at:]
    elif kind == 6 and isinstance(holder[key], (int, float)):
        holder[key] = generator.choice(NUMBERS)
    else:
        holder[key] = nasty(generator)
    return tree


def _place(tree: Any, generator: random.Random) -> tuple[Any, Any]:
    """(what holds a node, its key there): at any depth alike, since there are most nodes where it is deepest."""
    found: tuple[Any, Any] = (None, None)
    while isinstance(tree, (dict, list)) and tree:
        key = generator.choice(list(tree)) if isinstance(tree, dict) else generator.randrange(len(tree))
        found, tree = (tree, key), tree[key]
        if generator.random() < 0.25:
            break
    return found


def _times(generator: random.Random) -> range:
    return range(generator.choice((1, 1, 1, 2, 3)))


def mutated_json(content: bytes, generator: random.Random) -> bytes:
    """Also with a key twice, and in other encodings of text."""
    tree = json.loads(content)
    for _ in _times(generator):
        tree = mutated_tree(tree, generator)
    text = json.dumps(tree, ensure_ascii=generator.random() < 0.7)
    if generator.random() < 0.1 and text.startswith("{") and len(text) > 2:
        text = "{" + text[1:-1] + ", " + text[1:]
    return text.encode(generator.choice(("utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16")), errors="surrogatepass")


def mutated_yaml(content: bytes, generator: random.Random) -> bytes:
    """As YAML or as JSON, which is YAML as well; or with a text in it that only YAML has."""
    if generator.random() < 0.2:
        lines = content.decode().splitlines(keepends=True)
        lines.insert(generator.randrange(len(lines) + 1), generator.choice(YAML_TEXTS))
        return "".join(lines).encode()
    tree = yaml.safe_load(content)
    for _ in _times(generator):
        tree = mutated_tree(tree, generator)
    as_json, letters = generator.random() < 0.5, generator.random() < 0.5
    try:
        text = json.dumps(tree) if as_json else yaml.safe_dump(tree, allow_unicode=letters)
    except RecursionError:  # it is nested more deeply than PyYAML writes
        text = json.dumps(tree)
    return text.encode(errors="surrogatepass")


def mutated_safetensors(content: bytes, generator: random.Random) -> bytes:
    """Its header is JSON, whose length is made to fit again."""
    (size,) = struct.unpack("<Q", content[:8])
    header = mutated_json(content[8 : 8 + size], generator)
    header += b" " * generator.choice((0, -len(header) % 8))
    return struct.pack("<Q", len(header)) + header + content[8 + size :]


def mutated_zip(content: bytes, generator: random.Random) -> bytes:
    """Records renamed, doubled, left out, packed, or with something wrong in the pickle or the JSON in them."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        records = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    packing = zipfile.ZIP_STORED
    for _ in _times(generator):
        at, kind = generator.randrange(len(records)), generator.randrange(9)
        name, found = records[at]
        if kind == 0 and len(records) > 1:
            del records[at]
        elif kind == 1:
            records[at] = (_record_name(name, generator), found)
        elif kind == 2:
            records.insert(generator.randrange(len(records)), (_record_name(name, generator), found))
        elif kind == 3:
            packing = generator.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
        elif kind == 4:
            records[at] = (name, found[: generator.randrange(len(found) + 1)] + bytes(generator.choice((0, 1, 64))))
        else:
            described = [i for i, (name, _) in enumerate(records) if name.endswith((".pkl", ".json", ".npy"))]
            at = generator.choice(described or [at])
            records[at] = (records[at][0], _described(*records[at], generator))
    made = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(made, "w", packing) as archive:
        warnings.simplefilter("ignore")
        for name, found in records:
            archive.writestr(zipfile.ZipInfo(name), found, packing)
    return made.getvalue()


def _record_name(name: str, generator: random.Random) -> str:
    chosen = generator.choice(NAMES).encode(errors="replace").decode()[:60_000]
    return generator.choice((chosen, f"{name.partition('/')[0]}/{chosen}", name.upper(), name + "/"))


def _described(name: str, content: bytes, generator: random.Random) -> bytes:
    if name.endswith((".json", ".pkl")):
        try:
            return (mutated_json if name.endswith(".json") else mutated_pickle)(content, generator)
        except (ValueError, RecursionError):  # it is wrong already
            return content[: generator.randrange(len(content) + 1)]
    found = bytearray(content)
    start = found.find(b"{")
    words = [
        b"'<f4'",
        b"'|O'",
        b"'>f8'",
        b"'<U9'",
        b"'|V0'",
        b"(4, -3)",
        b"(0,)",
        b"(4611686018427387904, 4)",
        b"()",
        b"[('a','<f4')]",
    ]
    at = start + generator.randrange(max(1, 60))
    new = generator.choice(words)
    found[at : at + len(new)] = new
    return bytes(found)


def mutated_pickle(content: bytes, generator: random.Random) -> bytes:
    """A text or a number of it replaced, an operation left out or doubled."""
    operations = list(pickletools.genops(content))
    ends = [position or 0 for _, _, position in operations[1:]] + [len(content)]
    at = generator.randrange(len(operations))
    wanted = [i for i, (op, _, _) in enumerate(operations) if op.name in ("BINUNICODE", "BININT1", "BININT", "BININT2")]
    if wanted and generator.random() < 0.8:
        at = generator.choice(wanted)
    operation, _, start = operations[at]
    start, end = start or 0, ends[at]
    piece = content[start:end]
    if operation.name == "BINUNICODE" and generator.random() < 0.9:
        text = generator.choice(NAMES).encode(errors="surrogatepass")
        piece = b"X" + struct.pack("<I", len(text)) + text
    elif operation.name.startswith("BININT") and generator.random() < 0.9:
        number = generator.choice([each for each in NUMBERS if isinstance(each, int) and abs(each) < 2**65])
        piece = b"\x8a\x0a" + number.to_bytes(10, "little", signed=True)
    else:
        piece = generator.choice((b"", piece * 2, b"N", b"]", b"}", b")", b"0", b"2"))
    return content[:start] + piece + content[end:]


def mutated_gguf(content: bytes, generator: random.Random) -> bytes:
    """A text with its length, a number or a kind of value replaced, in the header alone."""
    for _ in _times(generator):
        places = _gguf_places(content)
        start, end, kind = generator.choice(places)
        if kind == "text":
            text = generator.choice(NAMES).encode(errors="surrogatepass")
            new = struct.pack("<Q", len(text)) + text
        elif kind == "kind":
            new = struct.pack("<I", generator.choice((*range(16), 2**31, 2**32 - 1)))
        else:
            number = generator.choice([each for each in NUMBERS if isinstance(each, int)])
            new = (number & (1 << 8 * (end - start)) - 1).to_bytes(end - start, "little")
        content = content[:start] + new + content[end:]
    return content


def _gguf_places(content: bytes) -> list[tuple[int, int, str]]:
    """(start, end, kind) of what its header holds, as far as it can be read."""
    places = [(4, 8, "number"), (8, 16, "number"), (16, 24, "number")]
    n_tensors, n_fields = struct.unpack("<QQ", content[8:24])
    sizes = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
    at = 24

    def take(size: int, kind: str) -> int:
        nonlocal at
        places.append((at, at + size, kind))
        at += size
        return int.from_bytes(content[at - size : at], "little")

    def take_text() -> None:
        nonlocal at
        length = int.from_bytes(content[at : at + 8], "little")
        places.append((at, min(at + 8 + length, len(content)), "text"))
        at += 8 + length

    for _ in range(min(n_fields, 50)):
        take_text()
        kind = take(4, "kind")
        if kind == 8:
            take_text()
        elif kind in sizes:
            take(sizes[kind], "number")
        else:
            break
    else:
        for _ in range(min(n_tensors, 20)):
            take_text()
            for _ in range(min(take(4, "number"), 4)):
                take(8, "number")
            take(4, "kind")
            take(8, "number")
    return [place for place in places if place[1] <= len(content)]


def mutated_onnx(content: bytes, generator: random.Random) -> bytes:
    """A field of a message at any depth replaced, cleared, doubled or swapped."""
    model = onnx.load_from_string(content)
    for _ in _times(generator):
        _mutate_message(model, generator)
    return model.SerializeToString()


def _mutate_message(message: Any, generator: random.Random) -> None:
    while True:
        fields = [(field, value) for field, value in message.ListFields()]
        deeper = [(field, value) for field, value in fields if field.type == field.TYPE_MESSAGE]
        if not deeper or generator.random() < 0.25:
            break
        field, value = generator.choice(deeper)
        repeated = not hasattr(value, "ListFields")
        if repeated and generator.random() < 0.15:
            _mutate_repeated(value, generator)
            return
        message = generator.choice(list(value)) if repeated else value
    if not fields:
        return
    field, value = generator.choice(fields)
    if field.type == field.TYPE_MESSAGE:
        message.ClearField(field.name)
    elif isinstance(value, (str, bytes, int, float)):
        _set(lambda new: setattr(message, field.name, new), value, generator)
    elif len(value):
        at = generator.randrange(len(value))
        if generator.random() < 0.2:
            del value[at]
        else:
            _set(lambda new: value.__setitem__(at, new), value[at], generator)


def _mutate_repeated(values: Any, generator: random.Random) -> None:
    kind, at = generator.randrange(3), generator.randrange(len(values))
    if kind == 0:
        del values[at]
    elif kind == 1:
        values.add().CopyFrom(values[at])
    else:
        other = generator.randrange(len(values))
        kept = copy.deepcopy(values[at])
        values[at].CopyFrom(values[other])
        values[other].CopyFrom(kept)


def _set(assign: Callable[[Any], None], value: Any, generator: random.Random) -> None:
    """Assigns a value of the same type, where the field holds it."""
    if isinstance(value, bytes):
        new: Any = generator.choice((b"", value[:-1], value + b"\0", b"\xff" * len(value), b"location"))
    elif isinstance(value, str):
        new = generator.choice(NAMES).encode(errors="replace").decode()
    else:
        new = generator.choice(NUMBERS)
        new = float(min(new, 1e308)) if isinstance(value, float) else new
    try:
        assign(new)
    except (ValueError, TypeError, OverflowError):
        assign(value)


MUTATIONS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "json": mutated_json,
    "zip": mutated_zip,
    "safetensors": mutated_safetensors,
    "gguf": mutated_gguf,
    "onnx": mutated_onnx,
    "yaml": mutated_yaml,
}
