"""Sessions in a process of their own give what one in this process gives, errors too, and end with their object."""

from __future__ import annotations

import gc

import numpy as np
import pytest

from compressor.core.errors import CheckpointError
from compressor.evaluate.session import DecoderSession, open_session
from compressor.runtime import sessions as inference
from compressor.runtime.sessions import SessionApart, Settings, open_inference
from tests.onnx.graphs import save_decoder


@pytest.fixture
def everything_is_large(monkeypatch):
    monkeypatch.setattr(inference, "LARGE", 0)


@pytest.mark.usefixtures("everything_is_large")
def test_a_session_apart_gives_the_same_logits(tmp_path):
    path = save_decoder(tmp_path)
    apart, ids = open_session(path, threads=1, apart=True), np.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
    assert type(apart) is DecoderSession
    assert isinstance(apart.session, SessionApart)
    np.testing.assert_array_equal(apart.logits(ids), open_session(path, threads=1).logits(ids))
    np.testing.assert_array_equal(apart.logits(ids[:1]), open_session(path, threads=1).logits(ids[:1]))


@pytest.mark.usefixtures("everything_is_large")
def test_its_errors_are_onnxruntimes_and_leave_it_usable(tmp_path):
    session = open_session(save_decoder(tmp_path), threads=1, apart=True)
    with pytest.raises(RuntimeError, match="input_ids"):
        session.session.run(["logits"], {})
    assert session.logits(np.array([[1, 2]])).shape[:2] == (1, 2)


@pytest.mark.usefixtures("everything_is_large")
def test_a_graph_that_cannot_be_loaded_is_one_line(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(CheckpointError, match="cannot load it"):
        open_session(tmp_path, apart=True)


def test_small_graphs_stay_here(tmp_path):
    path = save_decoder(tmp_path)
    assert not isinstance(open_session(path, apart=True).session, SessionApart)


def test_a_process_that_was_ended_says_so_and_none_is_left_behind(tmp_path, started):
    graph = save_decoder(tmp_path) / "model.onnx"
    session = SessionApart(str(graph), Settings(threads=1))
    (process,) = started()
    process.kill()
    with pytest.raises(RuntimeError, match="ended with status -9"):
        session.run(["logits"], {})
    other = SessionApart(str(graph), Settings(threads=1))
    assert len(started()) == 1
    del other
    gc.collect()
    assert started() == []
    assert not isinstance(open_inference(graph, Settings(threads=1), apart=False), SessionApart)
