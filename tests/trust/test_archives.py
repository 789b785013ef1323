"""A .pt file holds the same weights for this program as for torch.load, or is refused: it is read by its directory."""

from __future__ import annotations

import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from compressor.checkpoints import open_checkpoint
from compressor.core.errors import CheckpointError

LOCAL = b"PK\x03\x04"


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(30, 40, generator=generator)
    return {
        "a": base, "view": base[3:9, ::2], "b": torch.arange(9), "c": torch.randn(5, dtype=torch.complex64),
        "half": torch.randn(7, 3).half(), "flag": torch.tensor([True, False]), "one": torch.tensor(3.5),
        "none": torch.empty(0, 4), "again": base,
    }  # fmt: skip


@pytest.fixture
def saved(here: Path) -> Path:
    torch.save(tensors(), here / "m.pt")
    return here / "m.pt"


def read(path: Path) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(path)
    return {name: checkpoint.read(name) for name in (*checkpoint.tensors, *checkpoint.tied)}


def rewritten(path: Path, change: Callable[[list[tuple[zipfile.ZipInfo, bytes]]], object], **more) -> Path:
    """The archive as a zip tool writes it again, its records changed."""
    with zipfile.ZipFile(path) as archive:
        records = [(zipfile.ZipInfo(entry.filename), archive.read(entry)) for entry in archive.infolist()]
    change(records)
    target = path.with_name("again.pt")
    with zipfile.ZipFile(target, "w", **more) as made:
        for entry, content in records:
            made.writestr(entry, content, more.get("compression", zipfile.ZIP_STORED))
    return target


def renamed(folder: str) -> Callable:
    def change(records: list) -> None:
        for entry, _ in records:
            entry.filename = f"{folder}/{entry.filename.partition('/')[2]}"

    return change


def shuffled(records: list) -> None:
    random.Random(0).shuffle(records)


def with_metadata(records: list) -> None:
    name = records[0][0].filename.partition("/")[0]
    records.append((zipfile.ZipInfo(f"{name}/ai-models.json"), b'{"a": 1}' * 1000))


def with_extra_fields(records: list) -> None:
    for entry, _ in records:
        entry.extra = struct.pack("<HH", 0x1234, 40) + bytes(40)


def without_versions(records: list) -> None:
    records[:] = [each for each in records if not each[0].filename.endswith((".format_version", ".storage_alignment"))]


SAME = {
    "renamed": (renamed("x"), {}), "archive": (renamed("archive"), {}), "shuffled": (shuffled, {}),
    "metadata": (with_metadata, {}), "extra fields": (with_extra_fields, {}), "no versions": (without_versions, {}),
    "packed": (lambda records: None, {"compression": zipfile.ZIP_DEFLATED}),
    "packed, shuffled": (shuffled, {"compression": zipfile.ZIP_DEFLATED}),
}  # fmt: skip


@pytest.mark.parametrize("kind", SAME)
def test_an_archive_that_a_zip_tool_wrote_again_is_read_as_torch_reads_it(saved, kind):
    change, more = SAME[kind]
    path = rewritten(saved, change, **more)
    expected, found = torch.load(path, weights_only=True), read(path)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_bytes_of_another_order_are_swapped_as_torch_swaps_them(saved):
    def other_order(records: list) -> None:
        for number, (entry, _) in enumerate(records):
            if entry.filename.endswith("byteorder"):
                records[number] = (entry, b"big")

    path = rewritten(saved, other_order)
    expected, found = torch.load(path, weights_only=True), open_checkpoint(path)
    for name in ("b", "half", "c", "flag"):
        wanted = expected[name]
        got = found.source.read(name)  # values that are not numbers any more: only their bytes count
        assert torch.equal(got.view(torch.uint8), wanted.view(torch.uint8)), name


def at(content: bytearray, entry: zipfile.ZipInfo) -> int:
    """Where a record's bytes start."""
    names = struct.unpack_from("<HH", content, entry.header_offset + 26)
    return entry.header_offset + 30 + sum(names)


def entries(path: Path) -> dict[str, zipfile.ZipInfo]:
    with zipfile.ZipFile(path) as archive:
        return {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}


def central(content: bytearray, entry: zipfile.ZipInfo) -> int:
    """Where the directory's entry of a record starts."""
    name, start = entry.orig_filename.encode(), 0
    while True:
        start = content.index(b"PK\x01\x02", start)
        length = struct.unpack_from("<H", content, start + 28)[0]
        if content[start + 46 : start + 46 + length] == name:
            return start
        start += 1


def points_elsewhere(content: bytearray, found: dict) -> None:
    """The directory gives record 0 the place of record 1."""
    struct.pack_into("<L", content, central(content, found["data/0"]) + 42, found["data/1"].header_offset)


def is_named_twice(content: bytearray, found: dict) -> None:
    where = central(content, found["data/1"])
    length = struct.unpack_from("<H", content, where + 28)[0]
    content[where + 46 : where + 46 + length] = found["data/0"].orig_filename.encode()


def is_longer(content: bytearray, found: dict) -> None:
    for place in (20, 24):
        struct.pack_into("<L", content, central(content, found["data/0"]) + place, found["data/0"].file_size + 4000)


def has_two_sizes(content: bytearray, found: dict) -> None:
    struct.pack_into("<L", content, central(content, found["data/0"]) + 24, found["data/0"].file_size - 8)


def is_said_to_be_packed(content: bytearray, found: dict) -> None:
    struct.pack_into("<H", content, central(content, found["data/0"]) + 10, zipfile.ZIP_DEFLATED)


def is_encrypted(content: bytearray, found: dict) -> None:
    for place in (central(content, found["data/0"]) + 8, found["data/0"].header_offset + 6):
        struct.pack_into("<H", content, place, struct.unpack_from("<H", content, place)[0] | 1)


def has_another_local_name(content: bytearray, found: dict) -> None:
    entry = found["data/0"]
    start = entry.header_offset + 30
    content[start : start + len(entry.orig_filename)] = entry.orig_filename.encode()[:-1] + b"9"


def has_something_before(content: bytearray, found: dict) -> None:
    content[:0] = LOCAL + bytes(60)


def counts_from_elsewhere(content: bytearray, found: dict) -> None:
    end = content.rindex(b"PK\x05\x06")
    struct.pack_into("<L", content, end + 16, struct.unpack_from("<L", content, end + 16)[0] + 10)


DISAGREEING = (
    points_elsewhere, is_named_twice, is_longer, has_two_sizes, is_said_to_be_packed, is_encrypted,
    has_another_local_name, has_something_before, counts_from_elsewhere,
)  # fmt: skip


@pytest.mark.parametrize("change", DISAGREEING)
@pytest.mark.parametrize("by", ["torch", "a zip tool"])
def test_an_archive_that_disagrees_with_itself_is_refused(saved, change, by):
    path = saved if by == "torch" else rewritten(saved, lambda records: None)
    content = bytearray(path.read_bytes())
    change(content, entries(path))
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="is damaged|is encrypted|cannot be read|damaged archive"):
        read(path)


def test_records_are_never_taken_from_where_they_would_lie(saved):
    """Of two files with the same records in another order, each is read right: torch computes places on meta."""
    path = rewritten(saved, shuffled)
    computed = torch.load(path, weights_only=True, map_location="meta")["b"].untyped_storage()._checkpoint_offset
    assert computed != at(bytearray(path.read_bytes()), entries(path)["data/1"])
    assert torch.equal(read(path)["b"], tensors()["b"])


def test_what_only_ends_as_an_archive_is_what_it_begins_as(here):
    """torch goes by the first bytes: a pickle with an archive behind it is a pickle."""
    torch.save({"a": torch.ones(3)}, here / "old.pt", _use_new_zipfile_serialization=False)
    torch.save({"a": torch.zeros(3)}, here / "new.pt")
    (here / "both.pt").write_bytes((here / "old.pt").read_bytes() + (here / "new.pt").read_bytes())
    assert torch.equal(torch.load(here / "both.pt", weights_only=True)["a"], torch.ones(3))
    assert torch.equal(read(here / "both.pt")["a"], torch.ones(3))


def test_a_packed_archive_takes_no_more_memory_than_it_says_and_no_small_one_says_much(here):
    torch.save({"a": torch.zeros(30_000_000)}, here / "m.pt")
    path = rewritten(here / "m.pt", lambda records: None, compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 1_000_000
    with pytest.raises(CheckpointError, match="its compressed records would become 1200"):
        open_checkpoint(path)


def test_the_header_of_safetensors_names_a_tensor_once(here):
    one, two = (f'"a": {{"dtype": "F32", "shape": [1], "data_offsets": [{n}, {n + 4}]}}' for n in (0, 4))
    header = f"{{{one}, {two}}}".encode()
    (here / "m.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(CheckpointError, match="its safetensors header is corrupt; 'a' is in it twice"):
        open_checkpoint(here / "m.safetensors")
