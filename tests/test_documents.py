"""The pages say what the code does: generated tables are current, links lead somewhere, the example of a pass works."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from scripts import draw_house

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def test_tables_are_current():
    code = (
        "import make_tables; from measured import ROOT\n"
        "for name in make_tables.PAGES:\n"
        "    page = (ROOT / name).read_text(encoding='utf-8')\n"
        "    assert make_tables.filled(page) == page, f'{name}: run scripts/make_tables.py'\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "scripts", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_picture_of_the_house_and_its_tables_are_current():
    page = draw_house.PAGE.read_text(encoding="utf-8")
    assert draw_house.filled(page) == page, "run scripts/draw_house.py"
    assert draw_house.picture() == draw_house.PICTURE.read_text(encoding="utf-8"), "run scripts/draw_house.py"


NAMED = re.compile(r"(?<![\w/.-])(?:compressor|scripts|tests|docs|recipes)/[\w./-]*\w")
TO_BE_WRITTEN = {
    f"{where}{name}.py"
    for where in ("compressor/passes/", "compressor/passes/settings/", "tests/passes/test_")
    for name in ("sign", "ternary")
}
"""By whoever follows CONTRIBUTING.md or docs/encodings.md."""


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"],
                         ids=lambda page: str(page.relative_to(ROOT)))  # fmt: skip
def test_files_that_a_page_names_exist(page):
    named = set(NAMED.findall(page.read_text(encoding="utf-8"))) - TO_BE_WRITTEN
    assert not [name for name in sorted(named) if not (ROOT / name).exists()]


def test_scripts_are_run_as_their_docstrings_say():
    scripts = [path for path in (ROOT / "scripts").iterdir() if path.is_file()]
    begins = {path.name for path in scripts if path.read_bytes().startswith(b"#!")}
    assert begins == {path.name for path in scripts if os.access(path, os.X_OK)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8"))
    lost = [link for link in links if not link.startswith("https://") and not (page.parent / link).exists()]
    assert not lost


def test_each_word_of_the_glossary_is_defined_where_it_says():
    page = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    rows = [row.split(" | ") for row in page.splitlines() if row.startswith("| ")]
    words = [row for row in rows if row[0] not in ("| word", "| :--")]
    assert len(words) > 50
    for word, _, where in words:
        places = re.findall(r"(?:`(\w+)` in )?`(compressor/[\w/.]+)`", where)
        assert places, f"{word} has no place"
        for name, file in places:
            defined = rf"^(?:class|def) {name}\b|^{name}\b.* = "
            assert re.search(defined, (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE), (
                f"{word}: {name}, {file}"
            )


FOLLOWED = ("CONTRIBUTING.md", "docs/encodings.md")
BLOCK = re.compile(r"^( *)```(?:python|diff)\n(.*?)^\1```", re.DOTALL | re.MULTILINE)
PLACE = re.compile(r"# (?P<path>\S+\.py)(?:, (?P<how>in|before) (?P<name>\w+))?\n")
FUTURE = "from __future__ import annotations\n"
IMPORTS = re.compile(r"\A(?:(?:from|import) [^\n]*\n)*")


def follow(tree: Path, block: str) -> None:
    """Writes a block of a page where its first line says: a new file, its end, before a name, or in its literal."""
    place = PLACE.match(block)
    assert place, f"a block says first which file it belongs to: {block[:60]!r}"
    file, text = tree / place["path"], block[place.end() :]
    if not file.exists():
        file.write_text(text)
        return
    imports = IMPORTS.match(text)[0]
    text, found = text.removeprefix(imports).strip("\n"), file.read_text()
    if imports:
        found = found.replace(FUTURE, f"{FUTURE}\n{imports}", 1)
    if place["name"] is None:
        found, n = f"{found}\n\n{text}\n", 1
    elif place["how"] == "before":
        found, n = re.subn(rf"^(?={place['name']}\b)", lambda _: f"{text}\n\n\n", found, flags=re.MULTILINE)
    else:
        opening = rf"^{place['name']}: .*[({{]$"
        found, n = re.subn(opening, lambda match: f"{match[0]}\n{text}", found, flags=re.MULTILINE)
    assert n == 1, f"{file}: {place['name']} stands in it {n} times"
    file.write_text(found)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package and its tests in which someone has done what the pages say."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("compressor", "tests", "scripts", "recipes"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tree)
    for page in FOLLOWED:
        for _, block in BLOCK.findall((ROOT / page).read_text(encoding="utf-8")):
            follow(tree, re.sub(r"^\+", "", textwrap.dedent(block), flags=re.MULTILINE))
    return tree


def ran(tree: Path, *arguments: str) -> str:
    """What a Python process that stands in the tree prints."""
    done = subprocess.run(
        [sys.executable, *arguments], cwd=tree, env={**os.environ, "PYTHONPATH": str(tree)}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_passes_and_encodings_written_as_the_pages_say_keep_the_contract(tree):
    tests = ["tests/test_contract.py", "tests/passes/test_sign.py", "tests/passes/test_ternary.py"]
    out = ran(
        tree, "-m", "pytest", "--verbosity=0", "-p", "no:cacheprovider", "-n", "0", *tests, "-k", "sign or ternary"
    )
    assert int(re.search(r"(\d+) passed", out)[1]) > 25


@pytest.fixture(scope="module")
def runs(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """What runs of them came to, by name."""
    folder = tmp_path_factory.mktemp("runs")
    return json.loads(ran(tree, "-m", "tests.followed_pages", str(folder)).splitlines()[-1])


KINDS = {"up_proj": "ternary", "down_proj": "ternary", "gate_proj": "binary", "embed_tokens": "ternary"}


@pytest.mark.parametrize("mode", ["default", "standard", "compat"])
def test_a_language_model_of_them_computes_in_onnxruntime_what_it_decodes_to(runs, mode):
    found = runs[mode]
    for name, kind in KINDS.items():
        assert {stored for tensor, stored in found["kinds"].items() if name in tensor} == {kind}
    assert found["proof"]["exact"]["max_relative_error"] < 1e-5
    assert found["operators"]["MatMulNBits"] == 16  # of five linears, in three blocks, q, k and v are one; and the head
    # Ternary and binary weights are the kernel's of two bits; what else there is, an allocation chose.
    assert found["bits"] == [4] if mode == "compat" else found["bits"][0] == 2


def test_their_widths_are_allocated_and_their_scales_learned(runs):
    found = runs["default"]
    assert 0.99 * found["target"] <= found["bytes"] <= found["target"]
    assert found["widths"] == {"ternary": 1.6, "binary": 1.0}
    assert found["distilled"] == 6
    assert found["learned"] == {"ternary": True, "binary": True}
    assert found["codes_stay"]


@pytest.mark.parametrize("activations", ["int8", "static_int8"])
def test_convolutions_of_them_compute_what_they_decode_to(runs, activations):
    found = runs[activations]
    assert set(found["kinds"].values()) == {"ternary", "binary", "dense"}
    assert found["proof"]["exact"]["max_relative_error"] < 1e-5
    assert found["operators"].get("QLinearConv", 0) == (5 if activations == "static_int8" else 0)


def test_what_keeps_no_zeros_does_not_follow_a_pass_that_drops_weights(runs):
    assert "is pruned by gblm, but sign as it is set has no exact zero" in runs["pruned"]["refused"]
