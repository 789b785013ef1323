"""A text read piece by piece, in whatever way its graph allows, gets the logits that it gets as a whole."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from compressor.core.artifact import KEPT
from compressor.evaluate import reader
from compressor.evaluate.session import DecoderSession
from compressor.runtime.sessions import optimised_graph
from tests.export.test_decoder import IDS, NETWORKS, exported, pico, run, same_logits
from tests.onnx.graphs import save_decoder

TEXT = np.random.default_rng(1).integers(0, 131, 23)


def opened(folder: Path, name: str = "llama", mode: str = "default") -> DecoderSession:
    folder.mkdir(exist_ok=True)
    model = pico(NETWORKS[name])
    exported(model, "affine4", folder, mode)
    (folder / "config.json").write_text(json.dumps(model.config.to_dict()))
    return DecoderSession(folder, threads=1)


def pieces(read: reader.Reader) -> np.ndarray:
    """Logits after a prompt, and after each of further tokens."""
    return np.stack([read.read(TEXT[:17]), *(read.read(TEXT[at : at + 1]) for at in range(17, len(TEXT)))])


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen2_windows", "phi3"])
def test_a_cache_in_place_that_must_grow_gives_the_logits_of_the_whole_text(tmp_path, monkeypatch, name):
    monkeypatch.setattr(reader, "PIECE", 5)
    monkeypatch.setattr(reader, "_ROOM", 7)
    session = opened(tmp_path, name)
    assert session.in_place and session.keeps_last
    read = reader.reader_of(session, len(TEXT))
    assert isinstance(read, reader.CacheInPlace)
    same_logits(pieces(read), session.logits(TEXT[None])[0, 16:], 1e-4)
    assert read.seen == len(TEXT) and read._room == len(TEXT)


def test_each_way_to_read_is_the_same(tmp_path):
    session = opened(tmp_path)
    in_place, growing = pieces(reader.CacheInPlace(session, 40)), pieces(reader.GrowingCache(session))
    same_logits(growing, in_place, 1e-4)
    feed, empty = session.feed, {name: session.empty(name, 1, 0) for name in session.past}
    session.feed = lambda ids, seen: feed(ids, seen) | empty  # a graph that has no cache
    same_logits(pieces(reader.WholeText(session)), in_place, 1e-4)


def test_text_goes_on_as_without_the_buffers(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "PIECE", 4)
    session = opened(tmp_path)
    in_place = list(session.generate(TEXT, 9, stop=()))
    session.in_place, session.keeps_last = False, False
    assert list(session.generate(TEXT, 9, stop=())) == in_place


@pytest.mark.parametrize("mode", ["default", "compat", "standard"])
def test_the_last_logits_are_asked_for_by_an_input_that_need_not_be_fed(tmp_path, mode):
    session = exported(pico(NETWORKS["llama"]), "affine4", tmp_path, mode)
    fixed = [entry.name for entry in session.get_inputs()]
    assert fixed[:2] == ["input_ids", "attention_mask"] and KEPT not in fixed
    whole, past = run(session, IDS)
    for n in (1, 3, 0):
        last, same = run(session, IDS, {KEPT: np.array(n, np.int64)})
        assert last.shape[1] == (n or IDS.shape[1])
        same_logits(last, whole[:, -n:], 1e-5)
        assert all(np.array_equal(past[key], same[key]) for key in past)


def test_a_graph_that_hands_its_cache_on_is_not_read_in_place(tmp_path):
    assert not opened(tmp_path / "standard", mode="standard").in_place
    session = DecoderSession(save_decoder(tmp_path / "else"), threads=1)
    assert not session.in_place and not session.keeps_last
    assert isinstance(reader.reader_of(session, 9), reader.GrowingCache)


def test_the_optimised_graph_can_do_the_same(tmp_path):
    opened(tmp_path)
    (tmp_path / "optimised").mkdir()
    session = DecoderSession(optimised_graph(tmp_path / "model.onnx", tmp_path / "optimised"), threads=1)
    assert session.in_place and session.keeps_last
