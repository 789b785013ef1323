"""Processes that are started import nothing from the folder that they run in."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import types
from pathlib import Path

import pytest

import compressor.evaluate.bench
from compressor.core.errors import CheckpointError
from compressor.core.references import call, code_folders, code_of
from compressor.runtime import sessions, workers
from compressor.runtime.processes import clean_environment, own_path, python
from compressor.structure.students import pool

ROOT = Path(__file__).parents[2]
SHADOWS = (
    "random", "json", "numpy", "typer", "torch", "pickle", "subprocess", "onnxruntime", "compressor", "sitecustomize",
    "usercustomize", "yaml", "psutil",
)  # fmt: skip


@pytest.fixture
def hostile(here: Path, trace) -> Path:
    """A folder, as of a downloaded model, with modules that are named as those of libraries."""
    for name in SHADOWS:
        (here / f"{name}.py").write_text(f"import os\nopen(os.environ['TRACE'], 'a').write('{name}\\n')\n")
    (here / "rich").mkdir()
    (here / "rich" / "__init__.py").write_text((here / "random.py").read_text())
    return here


@pytest.fixture
def started(monkeypatch):
    """The commands and environments of processes that would have been started."""
    found = []

    class Started:
        returncode, stdin, stdout, stderr, pid = 1, None, None, None, 0

        def __init__(self, words, env=None, **more):
            found.append((list(words), env, more))

        def wait(self, timeout=None):
            return 1

        def poll(self):
            return 1

        def kill(self):
            pass

        def communicate(self):
            return "", "Error: was not started"

    def run(words, env=None, **more):
        found.append((list(words), env, more))
        return subprocess.CompletedProcess(words, 1, "", "was not started")

    monkeypatch.setattr(subprocess, "Popen", Started)
    monkeypatch.setattr(subprocess, "run", run)
    return found


def starts_session(here: Path) -> None:
    sessions.SessionApart("model.onnx", sessions.Settings())


def starts_benchmark(here: Path) -> None:
    (here / "model.onnx").write_bytes(b"")
    compressor.evaluate.bench.bench(here)


def starts_job(here: Path) -> None:
    workers.LocalEngine().run(["run", "x"], here / "log", 0)


def starts_dry_run(here: Path) -> None:
    workers.LocalEngine().predict(["run", "x"])


def starts_judges(here: Path) -> None:
    pool.Processes(object(), here / "pool", 2)


@pytest.mark.parametrize("start", [starts_session, starts_benchmark, starts_job, starts_dry_run, starts_judges])
def test_every_process_is_started_with_a_path_of_its_own(here, started, monkeypatch, start):
    monkeypatch.setenv("PYTHONPATH", f"{os.pathsep}.{os.pathsep}relative{os.pathsep}{ROOT}")
    monkeypatch.setenv("LD_LIBRARY_PATH", ":/opt/lib")
    try:
        start(here)
    except Exception as error:  # nothing was started, which each says in its own way
        assert started, error
    for words, environment, more in started:
        assert os.path.isabs(words[0])
        assert words[1] == "-P"
        assert environment["PYTHONSAFEPATH"] == "1"
        assert environment["PYTHONPATH"].split(os.pathsep) == [str(ROOT)]
        assert environment["LD_LIBRARY_PATH"] == "/opt/lib"
        assert more.get("shell", False) is False


def test_a_folder_full_of_shadows_is_not_imported_from(hostile, trace, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{os.pathsep}.{os.pathsep}{ROOT}")
    code = "import random, json, subprocess, compressor.runtime.session_process, compressor.cli.commands, numpy, rich"
    done = subprocess.run(python("-c", code), env=clean_environment(), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert trace.read() == []


@pytest.mark.parametrize(
    "words",
    [["-P", "-m", "compressor"], ["-m", "compressor"], ["-c", "from compressor.cli.commands import main; main()"]],
)
def test_the_command_itself_imports_nothing_from_there(hostile, trace, monkeypatch, words):
    """What Python imports before any of our code is not ours to say, as with an empty entry in PYTHONPATH."""
    if words[0] == "-c":  # as the console script is started, which has its own folder first
        words = ["-P", *words]
    elif words[0] == "-m":
        (hostile / "compressor.py").unlink()  # which Python itself would take for the module to run
        (hostile / "sitecustomize.py").unlink()
        (hostile / "usercustomize.py").unlink()
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    done = subprocess.run([sys.executable, *words, "recipes"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "llm-2bit" in done.stdout
    assert trace.read() == []


def test_a_path_that_the_working_folder_slipped_into_is_put_right(monkeypatch, here):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", "sub", "/absolute"]))
    assert own_path(["", str(here), str(here / "sub"), "/absolute", "/lib"]) == ["/absolute", "/lib"]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", str(here)]))
    assert own_path([str(here), "/lib"]) == [str(here), "/lib"]
    monkeypatch.delenv("PYTHONPATH")
    assert own_path([str(here), "/lib"]) == [str(here), "/lib"]


def test_what_the_user_names_is_found_in_the_working_folder_first_and_behind_everything_later(here, monkeypatch):
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(here))])
    (here / "mine.py").write_text(
        "import colorsys\ndef build():\n    import beside\n    return colorsys.__file__, beside.VALUE\n"
    )
    (here / "beside.py").write_text("VALUE = 5\n")
    (here / "colorsys.py").write_text("raise SystemExit\n")
    sys.modules.pop("colorsys", None)
    with pytest.raises(CheckpointError, match="importing it failed; SystemExit"):
        call("mine:build", "--arch", CheckpointError, lambda found: None)  # as any script of the user's would
    (here / "colorsys.py").unlink()
    sys.modules.pop("mine", None)
    file, value = call("mine:build", "--arch", CheckpointError, lambda found: None)
    assert (Path(file).parent, value) == (Path(sysconfig.get_path("stdlib")), 5)
    assert sys.path[-1] == str(here) != sys.path[0]
    assert code_folders()[-1] == str(here)
    assert code_of("mine:build") == [here / "mine.py"]
    for name in ("mine", "beside"):
        sys.modules.pop(name, None)


def test_a_module_from_elsewhere_does_not_bring_the_working_folder_along(here, monkeypatch):
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(here))])
    before = list(sys.path)
    with pytest.raises(CheckpointError, match="the call failed"):
        call("os.path:join", "--data", CheckpointError, lambda found: None)
    assert sys.path == before


def test_a_worker_of_a_search_is_told_where_the_users_code_lies(here, started):
    started.clear()
    pool.Processes(object(), here / "pool", 1)
    words = started[0][0]
    assert words[-len(code_folders()) :] == code_folders() if code_folders() else words[-1].endswith(pool.EVALUATOR)


def test_ray_is_started_among_pythons_own_modules(here, monkeypatch):
    """Ray puts the folder that it is started in before the path of its tasks."""
    seen = {}
    ray = types.ModuleType("ray")
    ray.is_initialized = lambda: False
    ray.init = lambda **settings: seen.update(folder=os.getcwd())
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setenv("PYTHONPATH", f".{os.pathsep}{ROOT}")
    workers.connected_ray("local", "--", "")
    assert seen["folder"] == sysconfig.get_path("stdlib")
    assert Path.cwd() == here
    variables = workers.of_a_task()["env_vars"]
    assert (variables["PYTHONSAFEPATH"], variables["PYTHONPATH"]) == ("1", str(ROOT))
