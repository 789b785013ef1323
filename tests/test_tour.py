"""docs/tour.md tells what lies on disk in the course of a run: as it is when the run is done."""

from __future__ import annotations

import logging
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from compressor.core.options import Format, RunOptions
from compressor.core.progress import Progress
from compressor.core.quantities import parse_size
from compressor.run.pipeline import run
from tests import pico

PAGE = (Path(__file__).parents[1] / "docs" / "tour.md").read_text(encoding="utf-8")


def told(name: str) -> str:
    """What stands between two marks of the page."""
    found = re.search(rf"<!-- test_tour: {name} -->\n(.*?)<!-- end -->", PAGE, re.DOTALL)
    assert found
    return found[1]


def rows(name: str) -> list[list[str]]:
    """The cells of a table's rows."""
    return [[cell.strip() for cell in line.strip("|\n").split("|")] for line in told(name).strip().splitlines()[2:]]


def names(cell: str) -> set[str]:
    return set(re.findall(r"`([^`]+)`", cell))


COMMAND = re.search(r"^    compress pico (.*)$", PAGE, re.MULTILINE)
BESIDES = {line: names(files) for told_run, files, _ in rows("besides") for line in re.findall("^`([^`]+)`", told_run)}


def options_of(line: str, folder: Path, format: Format = "onnx") -> RunOptions:
    """The options of a command line of the page, in a folder that has its network and texts."""
    words = shlex.split(line)
    given = list(zip(words[::2], words[1::2], strict=True))
    named = dict(given)
    size = named.get("--target-size")
    return RunOptions(
        str(folder / "pico"), named["--recipe"], folder / named.get("-o", "small"),
        data=str(folder / named.get("--data", "my.txt")), eval=str(folder / named.get("--eval", "other.txt")),
        sets=tuple(value for option, value in given if option == "--set"),
        target_size=None if size is None else parse_size(size, "--target-size"), progress=Progress(),
        format=format,
    )  # fmt: skip


class Watch(logging.Handler):
    """What lies in a folder each time that a stage says it has ended."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.seen: dict[str, set[str]] = {}

    def emit(self, record: logging.LogRecord) -> None:
        paths = self.folder.rglob("*")
        stage = record.getMessage().split(":")[0]
        self.seen[stage] = {path.relative_to(self.folder).as_posix() for path in paths if path.is_file()}


@pytest.fixture
def folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Iterator[Path]:
    pico.llama(tmp_path / "pico")
    for seed, name in enumerate(("my", "other")):
        (tmp_path / f"{name}.txt").write_text(pico.text(seed))
    with caplog.at_level(logging.INFO, logger="compressor"):
        yield tmp_path


@pytest.fixture
def watch(folder: Path) -> Iterator[Watch]:
    logger, watch = logging.getLogger("compressor"), Watch(folder / "small.partial")
    logger.addHandler(watch)
    yield watch
    logger.removeHandler(watch)


def test_each_stage_leaves_the_files_that_the_tour_says(folder, watch):
    assert COMMAND
    artifact = run(options_of(COMMAND[1], folder))
    before, changes = set(), {}
    for stage, now in watch.seen.items():
        if now != before:
            changes[stage] = (now - before, before - now)
        before = now
    assert changes == {stage: (names(new), names(gone)) for stage, new, gone in rows("stages")}
    assert {path.name for path in artifact.directory.iterdir()} == set(told("artifact").split())
    assert {path.name for path in folder.iterdir()} == {"pico", "my.txt", "other.txt", "small"}


@pytest.mark.parametrize("line", BESIDES)
def test_other_recipes_leave_besides_what_the_tour_says(line, folder, watch):
    run(options_of(f"{line} --set distill.steps=0", folder, format="safetensors"))
    work = {name.removeprefix("work/") for name in watch.seen["encoding"] if name.startswith("work/")}
    usual = re.compile(r"(run|sources)\.json|survey\.bin|(outside|model\.layers\.\d)\.safetensors")
    assert {name for name in work if not usual.fullmatch(name)} == BESIDES[line]


def test_modules_that_the_tour_names_are_there():
    named = set(re.findall(r"`(\w+(?:/\w+)*/\w+\.py)`", PAGE))
    package = Path(__file__).parents[1] / "compressor"
    missing = [name for name in sorted(named) if not (package / name).exists() and not (package.parent / name).exists()]
    assert len(named) > 30
    assert not missing
