"""Recipes as YAML files: finding, importing, merging and checking them, each mistake worded for its writer.

An importing recipe starts from the imported ones, in order. Its sections change single keys of theirs; its first
step of a pass changes the settings of their first step of that pass, its second of their second; further steps are
added behind. `--set` comes last.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from compressor.core.errors import RecipeError, suggestion
from compressor.core.files import resolved
from compressor.core.passes import STAGES
from compressor.core.reading import read_text, refuse_special
from compressor.passes.registry import SETTINGS
from compressor.plan.recipe import SECTIONS, Evaluation, Gates, Recipe, Step

PACKAGE = Path(__file__).parents[1]
TEXTS = ("name", "description", "needs")
KEYS = (*TEXTS, "imports", "passes", *SECTIONS)
STEP_KEYS = ("select", "skip")
MOST_BYTES = 1_000_000
MOST_ALIASES = 16
DEEPEST = 64
Values = dict[str, tuple[Any, str]]
"""Setting -> (value, where it was written)."""


class _Loader(yaml.SafeLoader):
    """YAML with `1e-3` as a number and `2:4` as a text, as everybody expects, and without repeated keys."""


_INTEGER = "tag:yaml.org,2002:int"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _INTEGER]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_INTEGER, re.compile(r"^[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[str, Any]:
    keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
    for key in keys:
        if keys.count(key) > 1:
            raise yaml.constructor.ConstructorError(None, None, f"'{key}' is written twice", node.start_mark)
    return {str(key): value for key, value in loader.construct_mapping(node, deep=True).items()}


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


@dataclass
class _Draft:
    """A recipe that is being put together."""

    texts: dict[str, str] = field(default_factory=dict)
    steps: list[tuple[str, str, Values]] = field(default_factory=list)  # pass, where, settings
    sections: dict[str, Values] = field(default_factory=dict)
    reaches: list[str] = field(default_factory=list)  # what files that are not shipped say of the world outside


def recipe_directory() -> Path:
    """The shipped recipes: inside of the installed package, or beside it in a checkout."""
    installed = PACKAGE / "_recipes"
    return installed if installed.is_dir() else PACKAGE.parent / "recipes"


def shipped_recipes() -> dict[str, Path]:
    """Name -> file of the recipes that come with the package."""
    return {path.stem: path for path in sorted(recipe_directory().glob("*.yaml"))}


def known_passes() -> tuple[str, ...]:
    """The names of all passes."""
    return tuple(sorted(SETTINGS))


def find_recipe(name: str, beside: Path | None = None) -> Path:
    """The file of a recipe: a path (also relative to the importing recipe), else a shipped name."""
    looks_like_path = name.endswith((".yaml", ".yml")) or "/" in name
    if looks_like_path:
        path = beside / name if beside and not Path(name).is_absolute() else Path(name)
        try:
            if path.is_file():
                return path
        except OSError as error:  # a name that is too long
            raise RecipeError(f"{path!s:.80}: cannot be read; {error.strerror}; give a YAML file") from error
        refuse_special(path, RecipeError)
        if path.is_symlink():
            raise RecipeError(f"{path}: links to {path.readlink()}, which is not there; give a YAML file")
        raise RecipeError(f"{path}: no such recipe file; give a YAML file, or a name from `compress recipes`")
    shipped = shipped_recipes()
    if name not in shipped:
        raise RecipeError(f"no recipe named '{name}'. {suggestion(name, shipped)} Or give a YAML file.")
    return shipped[name]


def load_recipe(name: str | Path, sets: Iterable[str] = ()) -> Recipe:
    """The recipe of a shipped name or a file, with "section.key=value" put over it, checked as a whole.

    Raises:
        RecipeError: Nothing of that name, or a mistake in it.
    """
    name = str(name)
    path = find_recipe(name)
    where = str(path) if name.endswith((".yaml", ".yml")) or "/" in name else path.name
    draft = _read(path, where, ())
    for assignment in sets:
        _assign(draft, assignment)
    return _finish(draft, where, path.stem)


def reaches_of(name: str | Path) -> list[str]:
    """What a recipe that is not shipped leads out of the process to, each as it is written; empty where nothing.

    Raises:
        RecipeError: Nothing of that name, or a mistake in it.
    """
    path = find_recipe(str(name))
    return _read(path, str(name), ()).reaches


def refuse_reaching(name: str | Path, trusted: bool) -> None:
    """Refuses a recipe that leads out of the process, unless whoever gives it says that it may.

    Raises:
        RecipeError: It does.
    """
    found = [] if trusted else reaches_of(name)
    if found:
        raise RecipeError(
            f"{name}: says {', '.join(found)}, which leads out of this process; nothing was run; give --trust-recipe "
            "if you trust whoever wrote it, or --set it yourself"
        )


def restore_recipe(content: dict[str, Any], where: str) -> Recipe:
    """The recipe that `Recipe.to_dict` spelt out, as compression.json holds it."""
    return _finish(_draft(content, where), where, str(content.get("name", where)))


def _read(path: Path, where: str, importers: tuple[Path, ...]) -> _Draft:
    content = _parse(path, where)
    for key in content:
        if key not in KEYS:
            raise RecipeError(f"{where}: no key '{key}'. {suggestion(str(key), KEYS)}")
    chain = (*importers, resolved(path))
    draft = _Draft()
    for name in _names(content.get("imports", []), f"{where}, imports"):
        try:
            imported = find_recipe(name, path.parent)
        except RecipeError as error:
            raise RecipeError(f"{where}, imports: {error}") from error
        if resolved(imported) in chain:
            cycle = " → ".join(step.stem for step in (*chain[chain.index(resolved(imported)) :], imported))
            raise RecipeError(f"{where}: imports go in a circle, {cycle}; remove one of them")
        _extend(draft, _read(imported, imported.name, chain))
    own = _draft(content, where)
    if resolved(path).parent != resolved(recipe_directory()):
        own.reaches = _reaching(own)
    _extend(draft, own)
    return draft


def _reaching(draft: _Draft) -> list[str]:
    """Settings of a file that lead out of the process; those that name files to be written are refused.

    Raises:
        RecipeError: A file is named to be written, which is for the command line alone.
    """
    found = []
    for name, where, values in draft.steps:
        kind = SETTINGS[name]
        written = next((key for key in values if key in kind.writes and values[key][0] is not None), None)
        if written is not None:
            raise RecipeError(
                f"{where}: {written} names a file to be written, which no recipe says; give {kind.writes[written]} "
                "FILE on the command line"
            )
        defaults = kind.model_fields
        reaching = [key for key in kind.reaches if key in values and values[key][0] != defaults[key].default]
        found += [f"{name}.{key} {values[key][0]}" for key in reaching]
    return found


def _draft(content: dict[str, Any], where: str) -> _Draft:
    """What one file says itself."""
    own = _Draft({key: " ".join(str(content[key]).split()) for key in TEXTS if key in content})
    for section in SECTIONS:
        own.sections[section] = _section(content.get(section) or {}, section, f"{where}, {section}")
    steps = content.get("passes") or []
    if not isinstance(steps, list):
        raise RecipeError(f"{where}: passes is {steps!r}; write a list of steps, each `- pass: NAME`")
    own.steps = [_step(step, f"{where}, step {i}") for i, step in enumerate(steps, start=1)]
    return own


def _parse(path: Path, where: str) -> dict[str, Any]:
    return parse_yaml(read_text(path, MOST_BYTES, RecipeError), where)


def parse_yaml(text: str, where: str) -> dict[str, Any]:
    """A mapping written in YAML.

    Raises:
        RecipeError: It is none, or nested so deeply, or repeats itself so often, that nobody wrote it.
    """
    try:
        _refuse_bombs(text, where)
        content = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise RecipeError(f"{where}{line}: is not YAML; {getattr(error, 'problem', None) or error}") from error
    except RecursionError as error:
        raise RecipeError(f"{where}: is nested too deeply; write keys and values, as `passes:`") from error
    except (ValueError, TypeError, OverflowError) as error:
        raise RecipeError(f"{where}: is not YAML; {error}; put the value into quotation marks") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{where}: holds {content!r:.40}; write keys and values, as `passes:`")
    return content


def _refuse_bombs(text: str, where: str) -> None:
    """Aliases of aliases stand for billions of values in a few lines; brackets in brackets take the square of time."""
    depth = 0
    for letter in text:
        depth += (letter in "[{") - (letter in "]}")
        if depth > DEEPEST:
            raise RecipeError(f"{where}: is nested too deeply; write keys and values, as `passes:`")
    n = sum(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, _Loader))
    if n > MOST_ALIASES:
        raise RecipeError(f"{where}: has {n} aliases; write their values out")


def _step(step: Any, where: str) -> tuple[str, str, Values]:
    if not isinstance(step, dict) or not isinstance(step.get("pass"), str):
        raise RecipeError(f"{where}: is {step!r:.60}; write `pass: NAME` and its settings")
    name = step["pass"]
    if name not in known_passes():
        raise RecipeError(f"{where}: no pass named '{name}'. {suggestion(name, known_passes())}")
    where = f"{where} ({name})"
    fields = [*SETTINGS[name].model_fields, *STEP_KEYS]
    values = {key: value for key, value in step.items() if key != "pass"}
    return name, where, _known(values, fields, where)


def _section(values: Any, section: str, where: str) -> Values:
    if not isinstance(values, dict):
        raise RecipeError(f"{where}: is {values!r:.60}; write its settings, as `{next(iter(_fields(section)))}: …`")
    return _known(values, _fields(section), where)


def _fields(section: str) -> list[str]:
    return list(SECTIONS[section].model_fields)


def _known(values: dict[str, Any], fields: list[str], where: str) -> Values:
    for key in values:
        if key not in fields:
            raise RecipeError(f"{where}: no setting '{key}'. {suggestion(str(key), fields)}")
    return {key: (value, where) for key, value in values.items()}


def _extend(draft: _Draft, own: _Draft) -> None:
    draft.texts |= own.texts
    draft.reaches += own.reaches
    for section, values in own.sections.items():
        draft.sections[section] = draft.sections.get(section, {}) | values
    imported = list(range(len(draft.steps)))
    for name, where, values in own.steps:
        match = next((i for i in imported if draft.steps[i][0] == name), None)
        if match is None:
            draft.steps.append((name, where, values))
            continue
        imported.remove(match)
        draft.steps[match] = (name, where, draft.steps[match][2] | values)


def _assign(draft: _Draft, assignment: str) -> None:
    target, equals, text = assignment.partition("=")
    owner, dot, key = target.strip().partition(".")
    where = f"--set {assignment}"
    if not (equals and dot and key):
        raise RecipeError(f"{where}: write PASS.KEY=VALUE, as --set jlcm.bits=3")
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError:
        value = text  # a pattern as *.mlp.*, which YAML takes for an alias
    steps = [values for name, _, values in draft.steps if name == owner]
    if owner in SECTIONS:
        draft.sections.setdefault(owner, {}).update(_known({key: value}, _fields(owner), where))
    elif steps:
        fields = [*SETTINGS[owner].model_fields, *STEP_KEYS]
        for values in steps:
            values.update(_known({key: value}, fields, where))
    else:
        names = {name for name, _, _ in draft.steps} | set(SECTIONS)
        raise RecipeError(f"{where}: the recipe has no '{owner}'. {suggestion(owner, names)}")


def _finish(draft: _Draft, where: str, stem: str) -> Recipe:
    if not draft.steps:
        raise RecipeError(f"{where}: has no passes; write for example `passes: [{{pass: {known_passes()[0]}}}]`")
    steps = [_build_step(name, place, values) for name, place, values in draft.steps]
    for before, after, (_, place, _) in zip(steps, steps[1:], draft.steps[1:], strict=False):
        first, second = before.settings.stage, after.settings.stage
        if STAGES.index(second) < STAGES.index(first):
            raise RecipeError(
                f"{place}: a {second} pass cannot follow the {first} pass '{before.name}'; write the steps in the "
                f"order {' → '.join(STAGES)}"
            )
    sections = {key: _build(kind, draft.sections.get(key, {}), f"{where}, {key}") for key, kind in SECTIONS.items()}
    _refuse_unmeasured_gate(sections["gates"], sections["evaluation"], draft)
    return Recipe(passes=tuple(steps), **({"name": stem} | draft.texts), **sections)  # type: ignore[arg-type]


def _refuse_unmeasured_gate(gates: Gates, evaluation: Evaluation, draft: _Draft) -> None:
    """Refuses a limit of speed or memory where the recipe says that neither is measured."""
    for name, what in (("min_speedup", "speed"), ("max_memory", "memory")):
        limit = getattr(gates, name)
        if limit is not None and not evaluation.speed:
            _, place = draft.sections["gates"][name]
            raise RecipeError(
                f"{place}: {name} is {limit:g}, but evaluation.speed is false, so that no {what} is measured; leave "
                "one of them out"
            )


def _build_step(name: str, where: str, values: Values) -> Step:
    patterns = {key: tuple(_names(*values[key])) for key in STEP_KEYS if key in values}
    settings = {key: value for key, value in values.items() if key not in STEP_KEYS}
    return Step(settings=_build(SETTINGS[name], settings, where), **patterns)  # type: ignore[arg-type]


def _build(kind: type[BaseModel], values: Values, where: str) -> Any:
    try:
        return kind(**{key: value for key, (value, _) in values.items()})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        if not first["loc"]:
            raise RecipeError(f"{where}: {first['msg'].removeprefix('Value error, ')}") from error
        key = str(first["loc"][0])
        value, place = values[key]
        messages = [each["msg"] for each in error.errors(include_url=False) if each["loc"][0:1] == (key,)]
        wanted = " or ".join(dict.fromkeys(_reworded(message) for message in messages))
        raise RecipeError(f"{place}: {key} is {value!r}; it should be {wanted}") from error


def _reworded(message: str) -> str:
    wanted = message.removeprefix("Value error, ").removeprefix("Input should be ").removeprefix("a valid ")
    return {"integer": "an integer", "number": "a number", "string": "a text", "boolean": "true or false"}.get(
        wanted, wanted
    )


def _names(value: Any, where: str) -> list[str]:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise RecipeError(f"{where}: is {value!r:.60}; write a name or a list of names")
    return names
