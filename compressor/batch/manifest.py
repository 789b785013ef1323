"""A batch as data: models × recipes, from a manifest in YAML or from the line. Each mistake is found before work.

    recipe: llm-4bit                    for every model that names none; also any other key of a model
    gates: {max_loss: 5%, max_size: 80MB}
    models:
      - smollm2/                        a path, or a pattern that matches some
      - path: vision/*.pth
        recipes: [cnn-int8, cnn-4bit]
        data: photos/
        set: {rounding.steps: 100}

Paths are relative to the manifest. What stands at a model goes over what stands above; `set` and `gates` key by key.
"""

from __future__ import annotations

import glob
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from compressor.core.errors import UsageError, suggestion
from compressor.core.files import resolved, short_name
from compressor.core.options import refuse_seed
from compressor.core.quantities import parse_share, parse_size
from compressor.core.reading import read_text, refuse_special
from compressor.data import is_reference
from compressor.passes.registry import SETTINGS
from compressor.plan.recipe_file import load_recipe, parse_yaml, reaches_of

KEYS = (
    "recipe", "recipes", "data", "eval", "arch", "format", "mode", "seed", "trust_pickle", "target_size",
    "target_flops", "max_loss", "set", "gates",
)  # fmt: skip
MODEL_KEYS = ("path", "name", *KEYS)
TOP_KEYS = ("models", *KEYS)
CHOICES = {"format": ("onnx", "safetensors"), "mode": ("default", "standard", "compat")}
MOST_BYTES = 10_000_000
MOST_JOBS = 100_000


@dataclass(frozen=True)
class Job:
    """One compression of a batch; `options` are the words of its command after model, recipe and output.

    `code` is what a manifest, or a recipe that it names, says that runs code or leads out of the process.
    """

    name: str
    model: str
    recipe: str
    options: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    code: tuple[str, ...] = ()

    def command(self, output: Path, *more: str) -> list[str]:
        """The words after `compress` that do it."""
        model = f"./{self.model}" if self.model.startswith("-") else self.model  # a name is no option
        return ["run", model, "--recipe", self.recipe, "-o", str(output), *self.options, *more]

    def sets(self) -> list[str]:
        """The settings that its recipe gets."""
        return [word for before, word in zip(self.options, self.options[1:], strict=False) if before == "--set"]


def read_manifest(path: Path) -> list[Job]:
    """The jobs of a manifest.

    Raises:
        UsageError: A mistake in it, or in a recipe that it names.
    """
    content = _content(path)
    _refuse_unknown(content, TOP_KEYS, str(path))
    models = content.get("models")
    if not isinstance(models, list) or not models:
        raise UsageError(f"{path}: models is {models!r:.40}; write a list of paths, or of `path: …` with settings")
    above = {key: value for key, value in content.items() if key != "models"}
    jobs: list[Job] = []
    for number, model in enumerate(models, start=1):
        where = f"{path}, model {number}"
        own = {"path": model} if isinstance(model, str) else model
        if not isinstance(own, dict):
            raise UsageError(f"{where}: is {model!r:.40}; write a path, or `path: …` and its settings")
        _refuse_unknown(own, MODEL_KEYS, where)
        jobs += _jobs(_merged(above, own, where), where, path.parent)
        if len(jobs) > MOST_JOBS:
            raise UsageError(f"{where}: makes more than {MOST_JOBS:,} jobs; split the manifest")
    return _told_apart(jobs, str(path))


def jobs_of_line(models: Iterable[str], settings: Mapping[str, Any], sets: Iterable[str] = ()) -> list[Job]:
    """The jobs of paths and patterns on the line, all with the same settings.

    Raises:
        UsageError: A pattern matches nothing, or a setting is wrong.
    """
    jobs = [job for model in models for job in _jobs({"path": model, **settings}, model, Path(), tuple(sets))]
    return _told_apart(jobs, "the line")


def trusting(jobs: Iterable[Job], trusted: bool) -> list[Job]:
    """The jobs; where recipes are trusted, their commands say so."""
    return [replace(job, options=(*job.options, "--trust-recipe")) if trusted else job for job in jobs]


def _content(path: Path) -> dict[str, Any]:
    return parse_yaml(read_text(path, MOST_BYTES, UsageError), str(path))


def _refuse_unknown(values: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    for key in values:
        if key not in known:
            raise UsageError(f"{where}: no key '{key}'. {suggestion(str(key), known)}")


def _merged(above: dict[str, Any], own: dict[str, Any], where: str) -> dict[str, Any]:
    merged = above | own
    for key in ("set", "gates"):
        for values in (above.get(key, {}), own.get(key, {})):
            if not isinstance(values, dict):
                raise UsageError(f"{where}: {key} is {values!r:.40}; write keys and values, as {key}: {{…}}")
        merged[key] = above.get(key, {}) | own.get(key, {})
    if "recipe" in own or "recipes" in own:
        for key in ("recipe", "recipes"):
            merged.pop(key, None)
            merged |= {key: own[key]} if key in own else {}
    return merged


def _jobs(settings: dict[str, Any], where: str, folder: Path, further: tuple[str, ...] = ()) -> list[Job]:
    recipes = _recipes(settings, where)
    options, inputs = _options(settings, where, folder)
    sets = [*_assignments(settings.get("set", {})), *_assignments(settings.get("gates", {}), "gates."), *further]
    found = []
    for recipe in recipes:
        place = str(folder / recipe) if recipe.endswith((".yaml", ".yml")) else recipe
        try:
            load_recipe(place, sets)
            code = (*_code(settings, options, where), *reaches_of(place))
        except UsageError as error:
            raise UsageError(f"{where}: {error}") from error
        words = (*options, *(word for assignment in sets for word in ("--set", assignment)))
        paths = _paths(settings.get("path"), where, folder)
        name = settings.get("name")
        if name is not None and (len(paths) > 1 or not _is_plain(name)):
            raise UsageError(f"{where}: name is {name!r:.40}; write a plain name, of a path that is one model")
        for path in paths:
            stem = str(name) if name else _stem(path)
            job = short_name(f"{stem}-{Path(recipe).stem}")
            found.append(Job(job, str(path), place, words, tuple(inputs), code))
    return found


def _code(settings: Mapping[str, Any], options: Sequence[str], where: str) -> list[str]:
    """What the settings of a model name that runs code, or leads out of the process.

    Raises:
        UsageError: A file is named to be written, which is for the command line alone.
    """
    found = ["trust_pickle"] if "--trust-pickle" in options else []
    for key in ("arch", "data", "eval"):
        if f"--{key}" in options and is_reference(value := options[list(options).index(f"--{key}") + 1]):
            found.append(f"{key} {value}")
    for name, value in settings.get("set", {}).items():
        owner, _, key = str(name).partition(".")
        kind = SETTINGS.get(owner)
        if kind is not None and key in kind.writes:
            raise UsageError(f"{where}: set {name} names a file to be written, which no manifest says; leave it out")
        if kind is not None and key in kind.reaches and value != kind.model_fields[key].default:
            found.append(f"{name} {value}")
    return found


def _recipes(settings: dict[str, Any], where: str) -> list[str]:
    found = settings.get("recipes", settings.get("recipe"))
    names = [found] if isinstance(found, str) else found
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise UsageError(f"{where}: recipe is {found!r:.40}; write a recipe's name, or recipes: [NAME, NAME]")
    return list(dict.fromkeys(names))


def _options(settings: dict[str, Any], where: str, folder: Path) -> tuple[list[str], list[str]]:
    """Words of the command, and the paths among them whose content counts."""
    words, inputs = [], []
    for key in ("data", "eval", "arch"):
        if (value := settings.get(key)) is None:
            continue
        if not isinstance(value, str):
            raise UsageError(f"{where}: {key} is {value!r:.40}; write a path or module:callable")
        beside = folder / value
        if beside.exists():
            refuse_special(beside, UsageError, folders=True)
            value = str(beside)
            inputs.append(value)
        elif ":" not in value:
            raise UsageError(f"{where}: {key} is '{value}', which does not exist; write a path or module:callable")
        words += [f"--{key}", value]
    for key, known in CHOICES.items():
        if (value := settings.get(key, known[0])) not in known:
            raise UsageError(f"{where}: {key} is {value!r:.40}. {suggestion(str(value), known)}")
        words += ([f"--{value}"] if key == "mode" else [f"--{key}", value]) if value != known[0] else []
    for key, kind in (("seed", int), ("trust_pickle", bool)):
        if (value := settings.get(key, kind())) is None or type(value) is not kind:
            wanted = {int: "an integer", bool: "true or false"}[kind]
            raise UsageError(f"{where}: {key} is {value!r:.40}; write {wanted}")
        if kind is int:
            refuse_seed(value)
        words += ["--trust-pickle"] * value if kind is bool else ["--seed", str(value)] if value else []
    for key, parse in (("target_size", parse_size), ("target_flops", parse_share), ("max_loss", parse_share)):
        if (value := settings.get(key)) is not None:
            parse(str(value), f"{where}: {key}")
            words += [f"--{key.replace('_', '-')}", str(value)]
    return words, inputs


def _assignments(values: Mapping[str, Any], prefix: str = "") -> list[str]:
    return [f"{prefix}{key}={'null' if value is None else value}" for key, value in values.items()]


def _paths(pattern: Any, where: str, folder: Path) -> list[Path]:
    if not isinstance(pattern, str) or not pattern or "\0" in pattern:
        raise UsageError(f"{where}: path is {pattern!r:.40}; write the path of a model, or a pattern")
    path = folder / pattern
    if path.exists():
        return [path]
    found = [Path(each) for each in sorted(glob.glob(str(path), recursive=True))]
    if not found:
        kind = "matches nothing" if glob.has_magic(pattern) else "does not exist"
        raise UsageError(f"{where}: {path} {kind}; give a Hugging Face directory, a file of weights, or a pattern")
    return found


def _stem(path: Path) -> str:
    found = resolved(path)
    return found.name if found.is_dir() else found.stem


def _is_plain(name: Any) -> bool:
    return isinstance(name, str) and Path(name).name == name and not name.startswith(".") and "\0" not in name


def _told_apart(jobs: list[Job], where: str) -> list[Job]:
    seen: dict[str, Job] = {}
    for job in jobs:
        other = seen.setdefault(job.name, job)
        if other is not job:
            raise UsageError(
                f"{where}: {other.model} and {job.model} would both be written to '{job.name}'; give one a `name:`"
            )
    return jobs
