"""Text from every kind of source, and one clear line for what cannot be read."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch

from compressor.core.errors import DataError
from compressor.data import kind_of, load
from compressor.data.batches import calibration_batches, evaluation_windows, learning_batches
from compressor.data.disjoint import check_disjoint, text_overlap
from compressor.data.text import SAMPLE, Text, load_text
from compressor.data.tokens import encode_sentences, frame_of, tokenize, windows
from compressor.plan.recipe_file import load_recipe
from tests import pico


def test_the_sample_is_small_and_its_parts_are_disjoint():
    calibration, evaluation = load_text(), load_text(None, "evaluation")
    assert (len(calibration.documents), len(evaluation.documents)) == (70, 8)
    assert 1_200_000 < len(calibration) + len(evaluation) < 1_300_000
    assert sum(file.stat().st_size for file in SAMPLE.iterdir()) < 400_000
    assert check_disjoint(calibration, evaluation) < 0.002
    with pytest.raises(DataError, match="Did you mean 'evaluation'"):
        load_text(None, "evaluatoin")


JSONL = [
    ({"text": "one"}, "one"),
    ({"id": 3, "content": "two"}, "two"),
    ("three", "three"),
    ({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}, "Hi\nHo"),
    ({"conversations": [{"from": "human", "value": "A"}]}, "A"),
    ({"messages": [{"content": [{"type": "text", "text": "See"}, {"type": "image", "url": "x"}]}]}, "See"),
    (
        {"messages": [{"content": ["a", {"text": "b"}]}, {"content": None, "tool_calls": []}, {"content": "c"}]},
        "a\nb\n\nc",
    ),
]


@pytest.mark.parametrize(("row", "expected"), JSONL)
def test_lines_of_json_hold_text_in_their_usual_fields(tmp_path, row, expected):
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n\n")
    assert load_text(tmp_path / "a.jsonl").documents == (expected,)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_text_is_read_by_its_byte_order_mark(tmp_path, encoding):
    (tmp_path / "a.txt").write_text("Čtyři slova, 四字。", encoding=encoding)
    assert load_text(tmp_path / "a.txt").content == "Čtyři slova, 四字。"


def test_a_directory_is_its_files_in_order(tmp_path):
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.md").write_text("first")
    (tmp_path / "c.bin").write_bytes(b"\0")
    assert load_text(tmp_path).content == "first\n\nsecond"


WRONG = [
    ("a.txt", b"", "holds no text; found 0 bytes"),
    ("a.txt", b"  \n", "holds no text; found 3 bytes"),
    ("a.txt", b"caf\xe9", "is not UTF-8; found byte 0xe9 at offset 3"),
    ("a.jsonl", b'{"text": "x"}\nnot json\n', "a.jsonl, line 2: is not JSON"),
    ("a.jsonl", b'{"txt": "x"}', "line 1: has no text; found txt; expected a field 'text'"),
    ("a.jsonl", b'{"messages": [{"content": 3}]}', "line 1: a turn has no text; expected 'content' of a string"),
    ("a.jsonl", b'{"messages": [{"content": [{"text": ["x"]}]}]}', "a turn has no text"),
    ("a.txt", b"\xff\xfea", "is not UTF-16; found byte 0x61 at offset 2"),
    ("a.pdf", b"%PDF", "files ending in '.pdf' are not text"),
]


@pytest.mark.parametrize(("name", "content", "message"), WRONG)
def test_what_cannot_be_read_is_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message.replace("(", r"\(")) as caught:
        load_text(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_absent_and_textless_sources_are_refused(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        load_text(tmp_path / "nothing.txt")
    with pytest.raises(DataError, match="holds no text files"):
        load_text(tmp_path)


def test_kinds_are_told_by_name_and_content(tmp_path):
    (tmp_path / "pictures" / "cat").mkdir(parents=True)
    (tmp_path / "pictures" / "cat" / "1.png").write_bytes(b"")
    kinds = {None: "text", "x.npz": "arrays", "my.data:batches": "arrays", "a.txt": "text"}
    assert {source: kind_of(source) for source in kinds} == kinds
    assert kind_of(tmp_path / "pictures") == "images"
    with pytest.raises(DataError, match="needs Pillow|is not a whole image"):
        load(tmp_path / "pictures")


def test_a_split_ends_a_sentence_and_loses_nothing():
    text = Text("t", (" ".join(f"Sentence number {i}." for i in range(100)),))
    first, second = text.split(0.2)
    assert first.content.endswith(".") and second.content.startswith("Sentence")
    assert f"{first.content} {second.content}" == text.content
    assert 0.15 < len(second) / len(text) < 0.25


def test_overlap_is_the_share_of_shingles_that_recur():
    generator = np.random.default_rng(0)
    letters = [chr(97 + i) for i in generator.integers(0, 26, 4000)]
    known, fresh = "".join(letters[:2000]), "".join(letters[2000:])
    mixed = fresh[:600] + known[500:900] + fresh[600:1600]
    naive = {known[i : i + 64] for i in range(len(known) - 63)}
    shingles = [mixed[i : i + 64] for i in range(len(mixed) - 63)]
    share, example = text_overlap(known, mixed)
    assert share == pytest.approx(sum(shingle in naive for shingle in shingles) / len(shingles))
    assert example == repr(known[500:564])
    with pytest.raises(DataError, match=r"b: overlaps the calibration data a; 17\.\d% of it is in both, for example"):
        check_disjoint(Text("a", (known,)), Text("b", (mixed,)))


def test_overlap_ignores_case_and_spacing_and_reads_across_pieces():
    passage = (
        "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness."
    )
    text = "x" * ((1 << 20) - 70) + passage + "y" * 500
    assert text_overlap(text, passage.upper().replace(" ", "\n"))[0] == 1.0
    assert text_overlap(text, "short")[0] == 0.0


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", *"abcdefghij"]
    fast = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    fast.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    fast.enable_truncation(4)
    fast.enable_padding(pad_id=3, length=8)
    directory = tmp_path_factory.mktemp("tokenizer")
    fast.save(str(directory / "tokenizer.json"))
    return directory


def test_tokens_are_whole_without_special_ones_and_kept(tokenizer, tmp_path):
    text = "a b c d e f g h i j"
    tokens = tokenize(text, tokenizer, tmp_path)
    assert tokens.dtype == np.int32 and tokens.tolist() == list(range(4, 14))
    (kept,) = (tmp_path / "tokens").iterdir()
    np.save(kept, np.array([7], np.int32))
    assert tokenize(text, tokenizer / "tokenizer.json", tmp_path).tolist() == [7]
    assert tokenize(text + " a", tokenizer, tmp_path).tolist() == [*range(4, 14), 4]
    kept.write_bytes(b"damaged")
    assert tokenize(text, tokenizer, tmp_path).tolist() == list(range(4, 14))


def test_sentences_have_special_tokens_and_one_length(tokenizer):
    found = encode_sentences(["a b", "c d e f g"], tokenizer, length=5)
    assert found["input_ids"].tolist() == [[1, 4, 5, 2, 3], [1, 6, 7, 8, 2]]
    assert found["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(DataError, match="has no tokenizer; expected tokenizer.json"):
        tokenize("a", tmp_path, tmp_path)


def test_windows_stand_side_by_side_or_are_drawn_by_seed():
    tokens = np.arange(23, dtype=np.int32)
    assert windows(tokens, 5).tolist() == np.arange(20).reshape(4, 5).tolist()
    assert windows(tokens, 5, 2).tolist() == np.arange(10).reshape(2, 5).tolist()
    drawn = windows(tokens, 5, 3, seed=1)
    assert drawn.dtype == np.int64 and len({row[0] for row in drawn.tolist()}) == 3
    np.testing.assert_array_equal(drawn, windows(tokens, 5, 3, seed=1))
    many = windows(tokens, 5, 9, seed=1)
    assert many.shape == (9, 5) and (np.diff(many) == 1).all()


def test_windows_of_a_decoder_begin_with_what_the_tokenizer_puts_before_a_text(tokenizer):
    frame, tokens = frame_of(tokenizer, "decoder"), np.arange(4, 14, dtype=np.int32)
    assert (frame.before.tolist(), frame.after.tolist()) == ([1], [])
    assert windows(tokens, 4, frame=frame).tolist() == [[1, 4, 5, 6], [1, 7, 8, 9], [1, 10, 11, 12]]
    drawn = windows(tokens, 3, 8, seed=1, frame=frame)
    assert drawn.shape == (8, 3) and set(drawn[:, 0]) == {1} and (drawn[:, 2] - drawn[:, 1] == 1).all()
    with pytest.raises(DataError, match="a window of 1 tokens has no room for text; the tokenizer puts 1 tokens"):
        windows(tokens, 1, frame=frame)


def test_windows_of_an_encoder_are_whole_texts(tokenizer):
    frame = frame_of(tokenizer, "encoder")
    assert (frame.before.tolist(), frame.after.tolist()) == ([1], [2])
    assert windows(np.arange(4, 14), 5, frame=frame).tolist() == [[1, 4, 5, 6, 2], [1, 7, 8, 9, 2], [1, 10, 11, 12, 2]]


def test_a_tokenizer_that_puts_nothing_around_a_text_leaves_windows_as_they_are(tmp_path):
    pico.write_tokenizer(tmp_path)
    frame, tokens = frame_of(tmp_path, "encoder"), np.arange(10)
    assert len(frame.before) == len(frame.after) == 0
    np.testing.assert_array_equal(windows(tokens, 5, frame=frame), windows(tokens, 5))


def test_all_that_a_network_reads_begins_so(tokenizer):
    content, written = " ".join("abcdefghij" * 60), torch.full((2, 64), 3)
    sets = ["calibration.window=32", "calibration.tokens=256", "calibration.generated=0.5", "evaluation.window=32"]
    recipe = load_recipe("llm-2bit", [*sets, "distill.tokens=256", "distill.generated=0.5"])
    text = Text("given", (content,))
    assert (evaluation_windows(text, recipe, tokenizer)[:, 0] == 1).all()
    for make, family in itertools.product((calibration_batches, learning_batches), ("decoder", "encoder")):
        rows = torch.cat([batch["input_ids"] for batch in make(text, recipe, tokenizer, 0, written, family)])
        assert (rows[:, 0] == 1).all() and ((rows[:, -1] == 2).all() == (family == "encoder"))
        own = (rows[:, 1:-1] == 3).all(1)
        assert own.any() and not (rows[~own] == 3).any()


def test_too_short_a_text_says_what_was_found_and_needed():
    with pytest.raises(DataError, match="too short for one window; found 4 tokens, needed 5"):
        windows(np.arange(4), 5)
    with pytest.raises(DataError, match="found 14 tokens, needed 15; .* at most 2 windows"):
        windows(np.arange(14), 5, 3)


def test_half_a_character_in_json_is_replaced_and_said_and_a_whole_one_stays(tmp_path, caplog):
    rows = [r'{"text": "one \ud83d half"}', r'{"messages": [{"content": ["a \ud83d\ude00 face", "\udc00"]}]}']
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    found = load_text(str(tmp_path / "rows.jsonl"))
    assert found.documents == ("one \N{REPLACEMENT CHARACTER} half", "a 😀 face\n\N{REPLACEMENT CHARACTER}")
    assert len(found.digest) == 64
    assert "holds 2 halves of characters" in caplog.text


def test_rows_that_are_nested_too_deeply_are_no_json(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": ' + "[" * 100_000)
    with pytest.raises(DataError, match="line 1: is not JSON"):
        load_text(str(tmp_path / "rows.jsonl"))
