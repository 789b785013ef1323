"""Code that the user names as `module:callable`: looked for in the working folder and on PYTHONPATH, and run.

Only what the user writes comes here. What an artifact, a config or a recipe names is text. The working folder is on
the path for the user's own modules alone: while they are imported and called it comes first, as for any script, and
afterwards last, so that nothing in it is taken for a module of a library.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from compressor.core.errors import CompressorError, suggestion

_asked: list[str] = []
"""Folders that modules of the user were found in, in this process."""


def code_folders() -> list[str]:
    """Folders that other processes need to find what the user has named, in order."""
    return list(_asked)


@contextlib.contextmanager
def code_from(folders: Sequence[str]) -> Iterator[None]:
    """Modules are found in these folders first, and behind the block last."""
    new = [folder for folder in folders if folder not in sys.path]
    sys.path[:0] = new
    try:
        yield
    finally:
        for folder in new:
            sys.path.remove(folder)
        sys.path += new
        _asked.extend(folder for folder in folders if folder not in _asked)


def call(reference: str, option: str, failure: type[CompressorError], check: Callable[[Any], None]) -> Any:
    """What `module:callable` returns; `check` may refuse what is called before it is.

    Raises:
        CompressorError: Of the kind `failure`: it cannot be found or imported, or the call failed.
    """
    where = f"{option} {reference}"
    module_name, _, attribute = reference.partition(":")
    with code_from(_folders_of(module_name)):
        found = _found(module_name, attribute, where, failure)
        check(found)
        with refusing(f"{where}: the call failed", failure):
            return found()


@contextlib.contextmanager
def refusing(what: str, failure: type[CompressorError]) -> Iterator[None]:
    """Somebody else's code: whatever it raises, or an exit that it asks for, is a failure of what was named."""
    try:
        yield
    except (CompressorError, MemoryError):
        raise
    except (Exception, SystemExit) as error:
        raise failure(f"{what}; {type(error).__name__}: {error}; make it return what is asked for") from error


def code_of(reference: str) -> list[Path]:
    """The file that holds a module of the working folder, without importing it; none where it lies elsewhere."""
    top, *rest = reference.partition(":")[0].split(".")
    places = (Path(top, *rest).with_suffix(".py"), Path(top, *rest, "__init__.py"))
    return [place.absolute() for place in places if place.is_file()][:1]


def _folders_of(module_name: str) -> list[str]:
    """The working folder, where the module lies in it and is not known from elsewhere."""
    top = module_name.partition(".")[0]
    here = str(Path.cwd())
    return [here] if PathFinder.find_spec(top, [here]) is not None else []


def _found(module_name: str, attribute: str, where: str, failure: type[CompressorError]) -> Any:
    with refusing(f"{where}: importing it failed", failure):
        try:
            found: Any = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            raise failure(
                f"{where}: no module named '{error.name}'; looked in {Path.cwd()} and PYTHONPATH; write module:callable"
            ) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            public = [name for name in vars(found) if not name.startswith("_") and callable(vars(found)[name])]
            raise failure(f"{where}: '{part}' is not there. {suggestion(part, public)}")
        found = getattr(found, part)
    if not callable(found):
        raise failure(f"{where}: is a {type(found).__name__}; name a function or a class")
    return found
