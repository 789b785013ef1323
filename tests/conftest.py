"""What tests of several rooms ask for: networks that are made once and only read, a folder to stand in, the command."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

# Read when huggingface_hub is imported, which test modules do: no test asks the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@dataclass(frozen=True)
class Said:
    """How the command ended, and what it printed."""

    status: int
    out: str
    err: str


Command = Callable[..., Said]
Checkpoints = Callable[..., Path]


@pytest.fixture(scope="session", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of tokens of the session's own, for processes that tests start as well."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMPRESSOR_HOME", str(folder))
        yield folder


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> None:
    """The collector looks only at what has come since the module's first test: a run collects seven times, and what the
    libraries hold takes it a quarter of a second each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkpoints]:
    """`checkpoints("llama", n_layers=2)`: the directory of one of tests.pico's networks. Each is made once.

    Whoever wants to change it makes or copies one; that none was changed is checked at the end.
    """
    from tests import pico

    folder, made = tmp_path_factory.mktemp("checkpoints"), {}

    def checkpoint(kind: str, **settings: object) -> Path:
        key = "-".join([kind, *(f"{name}-{value}" for name, value in sorted(settings.items()))])
        if key not in made:
            made[key] = _times(getattr(pico, kind)(folder / key, **settings))
        return folder / key

    yield checkpoint
    for key, times in made.items():
        assert _times(folder / key) == times, f"a test has changed the shared checkpoint {key}"


def _times(directory: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in sorted(directory.rglob("*"))}


@pytest.fixture(scope="session")
def llama(checkpoints: Checkpoints) -> Path:
    """`tests.pico.llama`, to read."""
    return checkpoints("llama")


@pytest.fixture(scope="session")
def bert(checkpoints: Checkpoints) -> Path:
    """`tests.pico.bert`, to read."""
    return checkpoints("bert")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The test's own folder, which is the working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def module_here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of all tests of a module, which is the working directory."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("module")
        patch.chdir(folder)
        yield folder


@pytest.fixture
def texts(here: Path) -> Path:
    """The working directory, with calibration.txt and evaluation.txt in it."""
    from tests import pico

    (here / "calibration.txt").write_text(pico.text(1))
    (here / "evaluation.txt").write_text(pico.text(2))
    return here


@pytest.fixture
def started() -> Callable[[], list[psutil.Process]]:
    """Tells which processes this one has started since the test began, as far as they still run."""
    this = psutil.Process()
    before = set(this.children())

    def running() -> list[psutil.Process]:
        new = [process for process in this.children() if process not in before]
        return [process for process in new if process.status() != psutil.STATUS_ZOMBIE]

    return running


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Calls the command in this process, with its arguments as one text or several words."""
    from compressor.cli.commands import main

    def called(*arguments: str) -> Said:
        words = arguments[0].split() if len(arguments) == 1 else list(arguments)
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert isinstance(ended.value.code, int)
        return Said(ended.value.code, *capsys.readouterr())

    return called
