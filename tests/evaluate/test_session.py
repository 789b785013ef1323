"""Sessions: cached generation is the uncached one, sampling keeps to its nucleus, mistakes are one line."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from onnx import parser

from compressor.core.errors import CheckpointError
from compressor.core.report import Speed
from compressor.evaluate import bench_process, original
from compressor.evaluate.bench import alternated, bench, size
from compressor.evaluate.session import DecoderSession, ModuleSession, open_session, sample
from tests.onnx.graphs import decoder_logits, save_classifier, save_decoder


def test_logits_are_the_naive_ones_for_each_sequence_of_a_batch(tmp_path):
    session = DecoderSession(save_decoder(tmp_path), threads=1)
    ids = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
    expected = np.stack([decoder_logits(list(row)) for row in ids])
    np.testing.assert_allclose(session.logits(ids), expected, rtol=1e-5, atol=1e-5)


def test_generation_with_the_cache_is_greedy_search_without_it(tmp_path):
    session, ids = DecoderSession(save_decoder(tmp_path), threads=1), [3, 1, 4]
    expected = list(ids)
    for _ in range(7):
        expected.append(int(decoder_logits(expected)[-1].argmax()))
    assert list(session.generate(np.array(ids), 7)) == expected[3:]


def test_generation_stops_before_the_end_token(tmp_path):
    session = DecoderSession(save_decoder(tmp_path), threads=1)
    free = list(session.generate(np.array([3, 1, 4]), 5))
    assert list(session.generate(np.array([3, 1, 4]), 5, stop={free[0]})) == []


def test_sampled_text_repeats_with_its_seed_and_differs_with_another(tmp_path):
    session = DecoderSession(save_decoder(tmp_path), threads=1)
    texts = [list(session.generate(np.array([1]), 20, temperature=30.0, seed=seed)) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_sampling_keeps_to_the_smallest_set_that_reaches_top_p():
    logits = np.log(np.array([0.1, 0.5, 0.15, 0.25]))
    generator = np.random.default_rng(0)
    assert {sample(logits, 1.0, 0.7, generator) for _ in range(300)} == {1, 3}
    assert {sample(logits, 1.0, 0.4, generator) for _ in range(300)} == {1}
    drawn = [sample(logits, 1.0, 1.0, generator) for _ in range(4000)]
    np.testing.assert_allclose(np.bincount(drawn) / 4000, [0.1, 0.5, 0.15, 0.25], atol=0.03)


def test_the_kind_of_a_session_is_read_from_the_graph(tmp_path):
    assert type(open_session(save_decoder(tmp_path / "a"))) is DecoderSession
    assert type(open_session(save_classifier(tmp_path / "b")[0])) is ModuleSession


def test_what_is_no_artifact_is_refused_in_one_line(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no model.onnx; found nothing"):
        open_session(tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(CheckpointError, match=r"model.onnx: onnxruntime \S+ cannot load it") as caught:
        open_session(tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match="is not a decoder; found outputs scores"):
        DecoderSession(save_classifier(tmp_path / "b")[0])


@pytest.mark.parametrize(("name", "axes"), [("attention_mask", 3), ("input_ids", 1), ("past_key_values.0.key", 0)])
def test_a_decoder_whose_inputs_have_other_axes_is_refused(tmp_path, name, axes):
    path = save_decoder(tmp_path) / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    entry = next(each for each in model.graph.input if each.name == name)
    del entry.type.tensor_type.shape.dim[:]
    for _ in range(axes):
        entry.type.tensor_type.shape.dim.add()
    del model.graph.node[:]
    for output in model.graph.output:
        shape, kind = [1] * len(output.type.tensor_type.shape.dim), output.type.tensor_type.elem_type
        value = onnx.helper.make_tensor(f"{output.name}.value", kind, shape, [0.0])
        model.graph.node.append(onnx.helper.make_node("Constant", [], [output.name], value=value))
    onnx.save(model, path)
    with pytest.raises(CheckpointError, match=f"input '{name}' has {axes} axes; a decoder's has"):
        open_session(tmp_path)


def test_a_decoder_is_measured_in_a_process_of_its_own(tmp_path):
    found = bench(save_decoder(tmp_path), threads=1, prompt=4, new=4, prefill=8, repeats=1)
    assert found["kind"] == "decoder"
    assert min(found["load_seconds"], found["decode_tokens_per_second"], found["prefill_tokens_per_second"]) > 0
    assert found["memory"]["peak_private"] >= found["memory"]["loaded"]["private"] > 1 << 20
    loading = found["memory"]["loading"]
    assert loading["peak"] >= loading["after"] > 0


def test_a_module_is_measured_with_inputs_of_its_own_shapes(tmp_path):
    found = bench(save_classifier(tmp_path)[0], threads=1, repeats=1)
    assert found["kind"] == "module" and found["input_shapes"] == {"pixels": [1, 4]}
    assert found["latency_seconds"] > 0 and found["latency_error"] >= 0


def test_latencies_are_timed_in_turn_until_they_are_stable(monkeypatch):
    """A machine that takes ever longer, at first by far, is no reason to call one of two equal networks slower."""
    now, order = [0.0], []
    monkeypatch.setattr(bench_process.time, "perf_counter", lambda: now[0])

    def run(name: str, seconds: float):
        def runs() -> None:
            order.append(name)
            now[0] += seconds * (30 if len(order) < 12 else 1 + 0.1 * (len(order) // 2 % 3))

        return runs

    a, b = bench_process.latencies([run("a", 0.001), run("b", 0.002)])
    assert order[:6] == ["a", "b"] * 3
    assert b["latency_seconds"] / a["latency_seconds"] == pytest.approx(2, rel=1e-6)
    assert a["latency_seconds"] == pytest.approx(0.0011, rel=0.1)
    assert max(a["latency_error"], b["latency_error"]) <= bench_process.STABLE
    assert now[0] >= bench_process.LEAST_SECONDS


def test_what_never_becomes_stable_is_not_timed_for_ever(monkeypatch):
    now, generator = [0.0], np.random.default_rng(0)
    monkeypatch.setattr(bench_process.time, "perf_counter", lambda: now[0])

    def wild() -> None:
        now[0] += float(generator.exponential(0.5))

    (found,) = bench_process.latencies([wild])
    assert found["latency_error"] > bench_process.STABLE
    assert now[0] < 2 * bench_process.MOST_SECONDS


def test_two_graphs_are_measured_side_by_side(tmp_path):
    first = save_classifier(tmp_path / "a")[0]
    for processor in (False, True):
        found = alternated([first, first], threads=1, processor=processor)
        assert len(found) == 2 and min(each["latency_seconds"] for each in found) > 0


@pytest.mark.parametrize(("times", "confirmed"), [((0.8, 1.0), False), ((1.0, 0.95), False), ((1.0, 0.8), True)])
def test_what_seems_to_break_a_promise_of_speed_is_timed_again_by_the_processors_time(monkeypatch, times, confirmed):
    """Times of the artifact and of its original; a busy machine's latencies are not believed alone."""

    def alternated(graphs, threads=None, shapes=None, processor=False):
        found = (2.0, 1.5) if processor else times
        assert (threads == 1) == processor
        return [{"latency_seconds": each, "latency_error": 0.01} for each in found]

    monkeypatch.setattr(original, "alternated", alternated)
    found, before = original._side_by_side(Speed(), Speed(), [], {}, 0.9)
    assert (found.latency_seconds, before.latency_seconds) == times
    assert (found.processor_seconds, before.processor_seconds) == ((2.0, 1.5) if confirmed else (None, None))


def test_open_sizes_are_those_of_the_data(tmp_path):
    """A graph whose input may have any height and width, and that only computes with one of them."""
    model = parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 21]> net (float[B, C, H, W] image) => (float[B, K] flat) '
        "<int64[2] shape = {-1, 60}> { flat = Reshape(image, shape) }"
    )
    onnx.save(model, tmp_path / "net.onnx")
    found = bench(tmp_path / "net.onnx", repeats=1, shapes={"": [1, 3, 4, 5]})
    assert found["input_shapes"] == {"image": [1, 3, 4, 5]}
    (tmp_path / "model.onnx").write_bytes((tmp_path / "net.onnx").read_bytes())
    (tmp_path / "compression.json").write_text(json.dumps({"speed": {"input_shapes": {"image": [1, 5, 4, 3]}}}))
    assert bench(tmp_path, repeats=1)["input_shapes"] == {"image": [1, 5, 4, 3]}


def test_an_artifact_that_does_not_load_is_not_measured(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(CheckpointError, match="could not be measured; .*cannot load it"):
        bench(tmp_path)


def test_size_counts_every_file_but_provenance_and_report(tmp_path):
    save_decoder(tmp_path)
    for name in ("compression.json", "report.html", "tokenizer.json"):
        (tmp_path / name).write_bytes(b"x" * 5000)
    found = size(tmp_path)
    assert set(found["files"]) == {"model.onnx", "config.json", "tokenizer.json"}
    assert found["bytes"] == sum((tmp_path / name).stat().st_size for name in found["files"])
    assert next(iter(found["files"])) == "tokenizer.json"
