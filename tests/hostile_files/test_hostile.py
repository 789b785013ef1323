"""Files that were damaged by chance or made on purpose: a clear refusal, soon, and nothing of them is executed."""

from __future__ import annotations

import json
import pickle
import random
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from compressor.checkpoints import open_checkpoint
from compressor.checkpoints.architecture import refuse_implausible
from compressor.core.artifact import Artifact
from compressor.core.errors import CheckpointError, DataError
from compressor.core.packed import METADATA_KEY, packed_tensors
from compressor.core.reading import parse_json
from compressor.data import load as load_data
from tests.hostile_files.readers import READERS, attempt
from tests.pico import llama

EXAMPLES = 40


@pytest.mark.parametrize("name", READERS)
@pytest.mark.filterwarnings("ignore")
def test_a_damaged_file_is_read_or_refused(name, tmp_path):
    path = READERS[name].write(tmp_path)
    content = path.read_bytes()

    # The same files every time: what fails is then of the change. scripts/fuzz.py draws new ones.
    @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.integers(0, 2**32))
    @example(293)  # torchscript: of two disks
    def read(seed):
        path.write_bytes(READERS[name].wrong(content, random.Random(seed)))
        attempt(READERS[name], path)

    assert attempt(READERS[name], path) is None or name in ("torchscript", "gguf", "artifact")
    read()


class Executed:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("suffix", [".pt", ".bin", ".pt2", ".ckpt"])
def test_nothing_of_a_pickle_is_executed(here, suffix, legacy):
    path = here / f"model{suffix}"
    torch.save(
        {"state_dict": {"w": torch.ones(2, 2)}, "x": Executed()}, path, _use_new_zipfile_serialization=not legacy
    )
    with pytest.raises(CheckpointError, match="nothing of it was run|nothing was run|is not a torch.save file"):
        open_checkpoint(path)
    path.write_bytes(pickle.dumps(Executed(), protocol=2))
    with pytest.raises(CheckpointError):
        open_checkpoint(path)
    assert not (here / "executed").exists()


def bomb(path: Path, name: str, n: int = 200_000_000) -> Path:
    """A small archive whose one record would be 200 MB."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open(name, "w", force_zip64=True) as file:
        for _ in range(n // 10_000_000):
            file.write(bytes(10_000_000))
    return path


def test_small_archives_that_would_become_large_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="compressed records would become 200000000 bytes"):
        open_checkpoint(bomb(tmp_path / "model.pt", "archive/data.pkl"))
    with pytest.raises(DataError, match="bytes would become 200000000; save it uncompressed"):
        load_data(str(bomb(tmp_path / "data.npz", "x.npy")))


def test_tensors_that_stand_for_more_than_is_stored_take_no_memory(tmp_path):
    torch.save({"w": torch.zeros(1).expand(2**36)}, tmp_path / "net.pt")
    with pytest.raises(
        CheckpointError, match=r"'w' of shape .68719476736,. would become 274877906944 bytes, and 4 are"
    ):
        open_checkpoint(tmp_path / "net.pt")
    torch.save({"w": torch.ones(1).expand(3)}, tmp_path / "net.pt")
    assert open_checkpoint(tmp_path / "net.pt").read("w").tolist() == [1, 1, 1]


@pytest.mark.parametrize("number", [b"\x8a\x0a" + (10**20).to_bytes(10, "little"), b"\x8a\x0a" + b"\xff" * 10])
def test_sizes_that_no_tensor_has_are_refused(tmp_path, number):
    torch.save({"w": torch.ones(6, 4)}, tmp_path / "good.pt")
    with zipfile.ZipFile(tmp_path / "good.pt") as good, zipfile.ZipFile(tmp_path / "net.pt", "w") as made:
        for name in good.namelist():
            made.writestr(name, good.read(name).replace(b"K\x06K\x04\x86", number + b"K\x04\x86"))
    with pytest.raises(CheckpointError, match="is truncated or corrupt|would become|is truncated inside"):
        open_checkpoint(tmp_path / "net.pt").read("w")


def test_a_scripted_module_that_holds_itself_is_refused(tmp_path):
    path = READERS["torchscript"].write(tmp_path)
    with zipfile.ZipFile(path) as good:
        records = {name: good.read(name) for name in good.namelist()}
    root = next(iter(records)).partition("/")[0]
    bag = b"\x80\x02c__torch__\nNet\n)\x81q\x00}q\x01"
    for content in (bag + b"X\1\0\0\0ah\0sb.", bag + b"K\1Nsb."):  # net.a = net; an attribute whose name is 1
        with zipfile.ZipFile(path, "w") as made:
            for name, found in (records | {f"{root}/data.pkl": content}).items():
                made.writestr(name, found)
        assert attempt(READERS["torchscript"], path)


@pytest.mark.parametrize("shape", ["[2.0, 3]", "[-2, -3]", "[1e999]", "[true, 6]", f"[{10**400}]"])
def test_a_header_of_safetensors_counts_in_whole_numbers(tmp_path, shape):
    header = f'{{"w": {{"dtype": "F32", "shape": {shape}, "data_offsets": [0, 24]}}}}'.encode()
    (tmp_path / "m.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(24))
    with pytest.raises(CheckpointError, match="header of tensor 'w' is corrupt; .*is no count"):
        open_checkpoint(tmp_path / "m.safetensors")


def test_a_header_of_numpy_that_is_no_python_is_refused(tmp_path):
    np.savez(tmp_path / "data.npz", x=np.ones(3))
    with zipfile.ZipFile(tmp_path / "data.npz") as good:
        content = good.read("x.npy")
    with zipfile.ZipFile(tmp_path / "data.npz", "w") as made:
        made.writestr("x.npy", content.replace(b"(3,)", b"(3,("))
    with pytest.raises(DataError, match="data.npz: cannot be read as npz"):
        load_data(str(tmp_path / "data.npz"))


LOCATOR, END = b"PK\x06\x07", b"PK\x05\x06"
ARCHIVES = {
    "of two disks": lambda content, at: _behind(content, content.rindex(END), LOCATOR + bytes(12) + b"\2\0\0\0"),
    "with a directory in nowhere": lambda content, at: _behind(
        content, content.rindex(END), LOCATOR + bytes(4) + b"\xff" * 8 + b"\1\0\0\0"
    ),
    "that is encrypted": lambda content, at: _put(content, at + 8, b"\1"),
    "that is packed in an unknown way": lambda content, at: _put(content, at + 10, b"\x63"),
    "that is packed, but for its bytes": lambda content, at: _put(content, at + 10, b"\x08"),
    "of version 99": lambda content, at: _put(content, at + 6, b"\x63"),
    "whose first record lies behind its end": lambda content, at: _put(content, at + 42, b"\xff\xff\xff\x7f"),
    "whose sizes are in a field that ends early": lambda content, at: _put(content, at + 20, b"\xff" * 8),
    "of names in no letters": lambda content, at: _put(_put(content, at + 9, b"\x08"), at + 46, b"\xff\xfe"),
}


def _put(content: bytes, at: int, by: bytes) -> bytes:
    return content[:at] + by + content[at + len(by) :]


def _behind(content: bytes, at: int, added: bytes) -> bytes:
    return content[:at] + added + content[at:]


@pytest.mark.parametrize("name", ["pt", "torchscript", "pt2", "npz"])
def test_an_archive_is_refused_whatever_zipfile_says_of_it(name, tmp_path):
    path = READERS[name].write(tmp_path)
    content = path.read_bytes()
    directory = int.from_bytes(content[content.rindex(END) :][16:20], "little")
    for kind, change in ARCHIVES.items():
        path.write_bytes(change(content, directory))
        assert attempt(READERS[name], path), f"an archive {kind} was taken"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 10**9}, "has num_hidden_layers 1e.09; expected at most 10,000"),
        ({"max_position_embeddings": 10**12}, "has max_position_embeddings 1e.12; expected at most 16,777,216"),
        ({"hidden_size": 10**15}, "has hidden_size 1e.15; expected at most"),
        ({"hidden_size": 2**30}, "has hidden_size 1.07374e.09; expected at most 1,048,576"),
        ({"head_dim": 10**400}, "has head_dim 10000000.; expected at most 1,048,576"),
        ({"text_config": {"intermediate_size": -(2**40)}}, "has intermediate_size -1.09951e.12; expected at most"),
        ({"deep": [{"num_hidden_layers": [1, 10**9]}]}, "has num_hidden_layers 1e.09; expected at most 10,000"),
        ({"rope_theta": {"__float__": "NaN"}}, "has rope_theta nan; expected at most"),
        ({"hidden_size": "wide"}, "does not describe a LlamaForCausalLM"),
        ({"architectures": ["os"]}, "names architecture 'os'"),
        ({"auto_map": {"AutoModel": "evil.Model"}, "model_type": "evil"}, "code inside of checkpoints is never run"),
    ],
)
def test_configs_that_nobody_means_are_refused(tmp_path, changes, message):
    path = READERS["config"].write(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(path.parent).check()


@pytest.mark.parametrize("kind", ["mamba2", "doge", "gemma3n_text", "nemotron_h", "muse_spark_text", "qwen4_exp"])
def test_what_a_kind_of_network_has_by_default_is_nothing_that_nobody_means(kind):
    refuse_implausible(Path("model"), transformers.CONFIG_MAPPING[kind]().to_dict())


def test_an_infinite_limit_is_read_as_transformers_writes_it(tmp_path):
    config = transformers.Mamba2Config(
        num_hidden_layers=1, hidden_size=16, num_heads=4, head_dim=8, state_size=4, vocab_size=20
    )
    transformers.Mamba2ForCausalLM(config).save_pretrained(tmp_path)
    assert '"__float__": "Infinity"' in (tmp_path / "config.json").read_text()
    open_checkpoint(tmp_path).check()


def test_shards_outside_of_the_directory_are_not_read(tmp_path):
    path = READERS["index"].write(tmp_path)
    for name in ("../secret.safetensors", "/etc/passwd", "a/../b.safetensors", "x" * 300, "\ud800", "a\0b"):
        path.write_text(json.dumps({"weight_map": {"w": name}}))
        with pytest.raises(CheckpointError, match="which is not a file beside it|holds half of a character"):
            open_checkpoint(path)


def test_json_that_is_nested_without_end_is_refused(tmp_path):
    for file in (READERS["config"].write(tmp_path), READERS["artifact"].write(tmp_path)):
        file.write_text('{"a":' * 100_000)
    with pytest.raises(CheckpointError, match="config.json: is nested too deeply"):
        open_checkpoint(tmp_path / "llama")
    with pytest.raises(CheckpointError, match="compression.json: is nested too deeply"):
        Artifact.open(tmp_path)


@pytest.mark.parametrize("count", [2**20, 2**40, 2**63])
def test_a_gguf_array_without_end_takes_no_time(tmp_path, count):
    path = READERS["gguf"].write(tmp_path)
    content = path.read_bytes()
    fields = int.from_bytes(content[16:24], "little")
    words = (5).to_bytes(8, "little") + b"a.end" + (9).to_bytes(4, "little") + (8).to_bytes(4, "little")
    added = content[:16] + (fields + 1).to_bytes(8, "little") + words + count.to_bytes(8, "little") + content[24:]
    path.write_bytes(added)
    with pytest.raises(CheckpointError, match=f"its index asks for more .{count} entries"):
        open_checkpoint(path)


def test_a_header_that_promises_more_than_there_is_takes_no_memory(tmp_path):
    path = tmp_path / "model.safetensors"
    header = json.dumps({"w": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))
    with pytest.raises(CheckpointError, match="is truncated"):
        open_checkpoint(path)
    np.save(tmp_path / "data.npy", np.ones(3))
    content = (tmp_path / "data.npy").read_bytes().replace(b"(3,)", b"(9" + b"9" * 12 + b",)")
    (tmp_path / "data.npy").write_bytes(content)
    with pytest.raises(DataError, match=r"data.npy: cannot be read as npy"):
        load_data(str(tmp_path / "data.npy"))


@pytest.mark.parametrize("key", ["hidden_size", "vocab_size", "intermediate_size", "head_dim", "num_attention_heads"])
def test_a_config_of_more_memory_than_there_is_is_refused_as_what_it_is(key, tmp_path):
    llama(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, key: 1_000_000_000}))
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path).check()


def test_json_that_cannot_be_written_again_is_refused():
    assert parse_json(b'{"a": "\\ud83d\\ude00"}', "x") == {"a": "\U0001f600"}
    with pytest.raises(CheckpointError, match="x: holds half of a character"):
        parse_json(b'{"a": ["b", "\\udcff"]}', "x")


@pytest.mark.parametrize("span", [[0, 10**400], [-8, 0], [8, 0]])
def test_parts_beyond_the_file_are_no_packed_tensors(tmp_path, span):
    description = {"tensors": {"w": {"kind": "dense", "tensor_shape": [1], "parts": ["weight"]}}}
    header = {"__metadata__": {METADATA_KEY: json.dumps(description)}, "w": {"data_offsets": span}}
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    assert packed_tensors(tmp_path / "model.safetensors") is None
    fine = json.dumps(header | {"w": {"data_offsets": [0, 8]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(fine).to_bytes(8, "little") + fine + bytes(8))
    found = packed_tensors(tmp_path / "model.safetensors")
    assert found is not None and found["w"]["bytes"] == 8


TRIAL = {"stage": "removal", "epoch": 0, "reward": 0.5, "student": "a", "parameters": 10, "accuracy": 0.9}
SHOWN = {
    "recipe": {"name": "cnn-n2n", "description": "", "gates": {"max_loss": 0.05, "max_size": None}},
    "structure": [{
        "parameters": 10, "search": {
            "trials": [TRIAL, TRIAL | {"stage": "shrinkage", "accuracy": None}], "removed": ["block_1"],
            "shrunk": [["block_2", "channels", 0.5]], "teacher": {"parameters": 40}, "policy": "actor-critic",
            "n_judged": 2, "measure": "accuracy", "validation": "validation.npz", "best": "a",
        },
    }],
    "allocation": {"kind": "cosine", "predicted_loss": 0.01, "loss": 0.02, "target_size": 1000},
}  # fmt: skip


def _nodes(tree, path=()):
    """The path of every value within."""
    for key in tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ():
        yield (*path, key)
        yield from _nodes(tree[key], (*path, key))


def test_a_report_is_shown_or_refused_whatever_stands_where():
    import rich.console

    from compressor.core.report import misshapen
    from compressor.report.page import _gates, _searches
    from compressor.report.tables import run_tables

    console, n_shown, n_refused = rich.console.Console(quiet=True), 0, 0
    assert not misshapen(SHOWN) and _searches(SHOWN)[0].sizes
    for path in _nodes(SHOWN):
        for wrong in ("x", "", 3, -1, 0.5, 10**30, True, None, [], {}, [1], {"a": 1}, [[]]):
            tree = json.loads(json.dumps(SHOWN))
            holder = tree
            for key in path[:-1]:
                holder = holder[key]
            holder[path[-1]] = wrong
            if misshapen(tree):
                n_refused += 1
                continue
            n_shown += 1
            _gates(tree), _searches(tree)
            console.print(*run_tables(tree, "x"))
    assert n_shown > 50 and n_refused > 200


def test_a_recipe_that_is_no_mapping_is_no_report(tmp_path):
    for wrong in ("llm-2bit", [], {"gates": "x"}, {"gates": {"max_loss": "5%"}}):
        (tmp_path / "compression.json").write_text(json.dumps({"recipe": wrong}))
        with pytest.raises(CheckpointError, match=r"compression.json: is damaged; recipe.*compress again"):
            Artifact.open(tmp_path)


def test_a_manifest_of_many_models_reads_their_recipe_once(tmp_path, monkeypatch):
    from compressor.batch import manifest

    read = []
    monkeypatch.setattr(manifest, "load_recipe", lambda name, sets=(): read.append(name))
    monkeypatch.setattr(manifest, "reaches_of", lambda name: [])
    models = [{"path": "m.pt", "name": f"m{number}"} for number in range(300)]
    (tmp_path / "m.pt").write_bytes(b"")
    (tmp_path / "many.yaml").write_text(json.dumps({"recipe": "cnn-int8", "models": models}))
    assert len(manifest.read_manifest(tmp_path / "many.yaml")) == 300
    assert read == ["cnn-int8"]
