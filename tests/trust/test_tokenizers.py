"""A tokenizer and a chat's template are a stranger's: they get so much time and memory; what they raise is theirs."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest

from compressor.core.errors import CheckpointError, DataError
from compressor.data.tokens import encode_sentences, tokenize
from compressor.evaluate.generation import _turn
from compressor.runtime import bounded as bounds
from tests import pico

LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
FAILING = [
    "{{ 1/0 }}", "{{ messages.x.y.z }}", "{{ 'a'*'b' }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ none() }}", "{% include 'x' %}", "{% include '/etc/passwd' %}", "{% import 'os' as os %}", "{{ 9**9999 }}",
    "{{ raise_exception('no') }}", "{{ '%s'|format(1,2) }}", "{{ [].append.__self__ }}", "{{ 'x'.encode('zzz') }}",
    "{{ range(10**6)|length }}", "{{ 'x'.__init__.__globals__ }}", "{{ strftime_now(5) }}", "{% for", 5, ["x"],
    {"a": 1}, [{"name": "default"}], [[]], "{{ cycler.__init__.__globals__ }}",
    "{{ messages.append(messages) }}{{ messages|tojson }}",
]  # fmt: skip
SETTINGS = [
    {"tokenizer_class": 5}, {"added_tokens_decoder": {"x": 5}}, {"added_tokens_decoder": [1]},
    {"extra_special_tokens": 5}, {"eos_token": {"a": 1}}, {"eos_token": 5}, [1], {"auto_map": 5},
    {"additional_special_tokens": [[]]}, {"padding_side": 3},
]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pico.write_tokenizer(tmp_path)
    return tmp_path


def asks(folder: Path, template: object) -> str:
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return _turn(folder, "hi")


def test_a_template_that_fails_is_refused_whatever_it_raises(folder):
    for template in FAILING:
        with pytest.raises(CheckpointError, match="no template of a chat can be used: .*; leave --chat out"):
            asks(folder, template)
    assert asks(folder, "{{ messages[0].content }}\N{DOG FACE}\ud800") == "hi\N{DOG FACE}\ud800"


def test_settings_of_a_tokenizer_that_nobody_means_are_refused(folder):
    for settings in SETTINGS:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        with pytest.raises(CheckpointError, match="its tokenizer cannot be read"):
            _turn(folder, "hi")


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (LOOPS, "more than 1 s"), ("{{ 10**9999999 % 7 }}", "more than 1 s"), ("{{ ('x'*10**10)|length }}", "memory"),
        ("{% set x = namespace(s='x') %}{% for i in range(40) %}{% set x.s = x.s + x.s %}{% endfor %}", "memory"),
        ("{{ 'x'*10**7 }}y", "10,000,000 bytes"), ("{{ [0]*10**10 }}", "memory"),
        ("{{ '%0*d'|format(10**10, 1) }}", "m"),
    ],
)  # fmt: skip
def test_a_template_that_takes_all_it_can_get_is_ended(folder, monkeypatch, template, reason):
    monkeypatch.setattr(bounds, "SECONDS", 1)
    began = time.process_time()
    with pytest.raises(CheckpointError, match=f"no template of a chat can be used: .*{reason}"):
        asks(folder, template)
    assert time.process_time() - began < 5


PATTERNS = ["(a+)+$", "(a|aa)+$", "(.*a){25}"]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_that_goes_astray_on_a_text_is_the_tokenizers_fault(folder, pattern, capfd):
    content = json.loads((folder / "tokenizer.json").read_text())
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    (folder / "tokenizer.json").write_text(json.dumps(content | {"pre_tokenizer": split}))
    text = "a" * 60 + "!"
    with pytest.raises(DataError, match="tokenizer cannot be used; Onig: Regex search error"):
        tokenize(text, folder, folder / "cache")
    with pytest.raises(DataError, match="tokenizer cannot be used"):
        encode_sentences([text, text], folder, 16)


def test_a_tokenizer_that_tells_no_token_fails_where_it_is_used(folder):
    shutil.rmtree(folder / "cache", ignore_errors=True)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"] = {"type": "WordLevel", "vocab": {"the": 0}, "unk_token": "[UNK]"}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="tokenizer cannot be used"):
        tokenize("river", folder, folder / "cache")
