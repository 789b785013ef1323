"""How processes of this program are started: by its own interpreter, with nothing of the working folder on their path.

A `random.py` or `numpy.py` in a downloaded folder would otherwise be imported by whoever works inside of it. What the
user names as `module:callable` is still found there (`core.references`), and a process that needs that code is told.
"""

from __future__ import annotations

import os
import site
import sys
from pathlib import Path

import compressor

PATHS = ("PYTHONPATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PATH")
"""Variables with folders from which code is run; an empty or relative one among them is the working folder."""


def python(*words: str) -> list[str]:
    """The command of a process of this interpreter: `-P` keeps the working folder and a script's off the path."""
    return [str(Path(sys.executable).absolute()), "-P", *words]


def clean_environment(**more: str) -> dict[str, str]:
    """Of such a process: this package can be found, and no variable leads into the folder that it happens to run in."""
    found = {**os.environ, "PYTHONSAFEPATH": "1", **more}
    found |= {name: os.pathsep.join(_absolute(found[name])) for name in PATHS if name in found}
    package = str(Path(compressor.__file__).resolve().parents[1])
    if package not in site.getsitepackages():
        found["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([package, *_absolute(found.get("PYTHONPATH", ""))]))
    return found


def own_path(path: list[str]) -> list[str]:
    """The path of this process without folders that are there only because it was started in them.

    Python makes absolute what PYTHONPATH has as an empty or relative folder, which `export PYTHONPATH=$PYTHONPATH:…`
    often leaves there. What it also names absolutely, stays.
    """
    named = os.environ.get("PYTHONPATH", "").split(os.pathsep) if "PYTHONPATH" in os.environ else []
    unwanted = {str(Path(each).absolute()) for each in named if not os.path.isabs(each)}
    unwanted -= {each for each in named if os.path.isabs(each)}
    return [each for each in path if os.path.isabs(each) and each not in unwanted]


def _absolute(paths: str) -> list[str]:
    return [each for each in paths.split(os.pathsep) if os.path.isabs(each)]
