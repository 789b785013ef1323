"""The pages say what the code does: generated tables are current, links lead somewhere, the example of a pass works."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

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
TO_BE_WRITTEN = {"compressor/passes/sign.py", "compressor/passes/settings/sign.py", "tests/passes/test_sign.py"}
"""By whoever follows CONTRIBUTING.md."""


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"],
                         ids=lambda page: str(page.relative_to(ROOT)))  # fmt: skip
def test_files_that_a_page_names_exist(page):
    named = set(NAMED.findall(page.read_text(encoding="utf-8"))) - TO_BE_WRITTEN
    assert not [name for name in sorted(named) if not (ROOT / name).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8"))
    lost = [link for link in links if not link.startswith("https://") and not (page.parent / link).exists()]
    assert not lost


def test_the_example_of_a_pass_encodes_as_it_plans():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^   ```python\n(.*?)^   ```", text, re.DOTALL | re.MULTILINE)
    namespace: dict = {}
    for block in blocks:
        exec(textwrap.dedent(block), namespace)
    weight = torch.randn(24, 40, generator=torch.Generator().manual_seed(0))
    for per_row in (True, False):
        step = namespace["Sign"](per_row=per_row)
        encoding = step.encode(weight, None, torch.Generator())
        assert torch.equal(encoding.decode().sign(), weight.sign())
        assert (encoding.decode() - weight).pow(2).mean() < weight.pow(2).mean()
        assert step.spec_for("fc.weight", (24, 40), "linear").nbytes(24, 40) == encoding.nbytes
