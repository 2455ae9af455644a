"""Read recipes and other files in YAML, and say what is wrong with them.

What is wrong is one line that names file, line, key, what was expected, and the nearest key.
"""

from __future__ import annotations

import copy
import difflib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, overload

from pydantic import BaseModel, ValidationError
from pydantic_core import to_jsonable_python
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from pipeline.classification_recipe import ClassificationRecipe
from pipeline.recipe import ROOT, Recipe, UsageError
from pipeline.translation_recipe import TranslationRecipe

TASKS: dict[str, type[Recipe]] = {
    "translation": TranslationRecipe,
    "classification": ClassificationRecipe,
}
"""What a recipe's `task` can be; the first is the default."""

R = TypeVar("R", bound=Recipe)
S = TypeVar("S", bound=BaseModel)

Location = Sequence[str | int]  # a key of a recipe, as pydantic names it


def recipe_keys(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Return every dotted key that holds a value, with its pydantic field.

    :param section: a task's recipe, or a section of it.
    :param prefix: of the keys of `section`, with a dot at its end.
    """
    for name, field in section.model_fields.items():
        name = field.alias or name
        nested = [t for t in (field.annotation, *get_args(field.annotation)) if is_section(t)]
        if nested and not is_sequence(field.annotation):
            yield from recipe_keys(nested[0], f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def default_of(field: Any) -> str:
    """Return the default of a pydantic field in the form that a recipe has, or the name of the key
    that it is."""
    if field.default_factory:
        return str(field.default_factory.__name__).lstrip("_")
    value = to_jsonable_python(field.default)
    text = value if value and isinstance(value, str) else json.dumps(value)
    return text.removeprefix(f"{ROOT}/")


def is_sequence(annotation: object) -> bool:
    """Tell whether a field with this annotation holds a list."""
    return get_origin(annotation) in (tuple, list)


def _is_text(annotation: object, value: str) -> bool:
    """Tell whether a value on the command line is a text or a path, and no YAML.

    :param annotation: of its field.
    """
    kinds = {annotation, *get_args(annotation)}
    if {str, Path}.isdisjoint(kinds) or value == "null":
        return False
    return not (any(map(is_sequence, kinds)) and value.startswith("["))


def is_section(annotation: object) -> bool:
    """Tell whether a field with this annotation holds a section with keys of its own."""
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


@overload
def load_recipe(path: Path, overrides: Sequence[tuple[str, str]] = ()) -> TranslationRecipe: ...
@overload
def load_recipe(path: Path, overrides: Sequence[tuple[str, str]] = (), *, kind: type[R]) -> R: ...
def load_recipe(
    path: Path,
    overrides: Sequence[tuple[str, str]] = (),
    *,
    kind: type[Recipe] = TranslationRecipe,
) -> Recipe:
    """Read a recipe, and apply overrides.

    :param overrides: dotted keys, each with the text that is given for it.
    :param kind: the task's, or `Recipe` for that of any task.
    :raises UsageError: its one line names file, line, key, what was expected, and the nearest key.
    """
    return Draft(path, overrides, kind=kind).recipe()


class Draft:
    """A recipe as its file and the command line have it; keys can be given other values."""

    def __init__(
        self, path: Path, overrides: Sequence[tuple[str, str]] = (), *, kind: type[Recipe] = Recipe
    ) -> None:
        """Read the file, and apply overrides; parameters and errors as of `load_recipe`."""
        self._path, self._content = path, _read_yaml(path)
        self.kind = _kind_of(self._content, path)
        self._overridden = {key for key, _ in overrides}
        if not issubclass(self.kind, kind):
            raise UsageError(f"{path}: this command is not for the task {_task_of(self._content)}")
        fields = dict(recipe_keys(self.kind))
        for key, text in overrides:
            if key not in fields:
                hint = nearest_key_hint(key, self.kind, "--")
                raise UsageError(f"unknown argument `--{key}`{hint}")
            is_text = _is_text(fields[key].annotation, text)
            _set_key(self._content, key, text if is_text else _parse_value(key, text))

    def recipe(self, values: Mapping[str, Any] | None = None) -> Recipe:
        """Return the recipe.

        :param values: of some dotted keys, instead of those in the file.
        :raises UsageError: as `load_recipe`.
        """
        content = self._with(values)
        for location, problem in _bad_texts(content):
            where = _where(location, self._path, content, self._overridden)
            raise UsageError(f"{where}: `{'.'.join(map(str, location))}`: {problem}")
        try:
            recipe = self.kind.model_validate(content)
        except ValidationError as error:
            raise UsageError(
                _describe_error(error, self.kind, self._path, content, self._overridden)
            ) from error
        for name in recipe.model.overruled:
            if f"model.{name}" in {*self._overridden, *(values or ())}:
                where = _where(["model", name], self._path, content, self._overridden)
                raise UsageError(
                    f"{where}: `model.{name}`: says nothing where encoder_levels and "
                    "decoder_levels are both given; give those other values"
                )
        return recipe

    def text(self, values: Mapping[str, Any] | None = None) -> str:
        """Return the recipe as YAML, with the comments of the file; `values` as in `recipe`."""
        yaml, text = YAML(), io.StringIO()
        yaml.width, yaml.preserve_quotes = 10_000, True
        yaml.indent(mapping=2, sequence=4, offset=2)
        yaml.dump(self._with(values), text)
        return text.getvalue()

    def _with(self, values: Mapping[str, Any] | None) -> Any:
        content = copy.deepcopy(self._content)
        for key, value in (values or {}).items():
            _set_key(content, key, value)
        return content


def _set_key(content: Any, key: str, value: Any) -> None:
    """Set a dotted key of a recipe's content; sections that it lacks are made."""
    *parents, last = key.split(".")
    for parent in parents:
        if not isinstance(content.get(parent), dict):
            content[parent] = {}
        content = content[parent]
    content[last] = value


def load_section(path: Path, kind: type[S]) -> tuple[S, Callable[[Location], str]]:
    """Read a sweep's file: YAML, and a section as recipes have them.

    :returns: the section, and what tells the file and line of a key in it.
    :raises UsageError: as `load_recipe`.
    """
    content = _read_yaml(path, "sweep")
    try:
        section = kind.model_validate(content)
    except ValidationError as error:
        raise UsageError(_describe_error(error, kind, path, content, set())) from error
    return section, lambda location: _where(location, path, content, set())


def _read_yaml(path: Path, what: str = "recipe") -> Any:
    """Return the mapping in a recipe's file, with ruamel.yaml's line numbers.

    :param what: the file is called in messages.
    :raises UsageError: there is none.
    """
    try:
        content = YAML().load(path.read_text(encoding="utf-8"))
        _take_apart(content, set())
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot read the {what}: {error}") from error
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 0
        problem = " ".join(str(error.problem).split())
        raise UsageError(f"{path}:{line}: not valid YAML: {problem}") from error
    except YAMLError as error:
        raise UsageError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    except (ValueError, RecursionError) as error:  # of values that YAML cannot hold
        raise UsageError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(content, dict):
        first = "run_dir" if what == "recipe" else "space"
        raise UsageError(f"{path}: a {what} is a YAML mapping with a key `{first}`")
    return content


def _take_apart(value: Any, seen: set[int]) -> None:
    """Have each section that is an alias of another be one of its own: an override of one key must
    change no other.

    :param seen: what was come upon before, by identity.
    """
    for key, item in _items(value):
        if isinstance(item, (dict, list)):
            if id(item) in seen:
                value[key] = item = copy.deepcopy(item)
            seen.add(id(item))
            _take_apart(item, seen)


def _items(value: Any) -> Iterable[tuple[Any, Any]]:
    """Return what is in a section or a list, by key or number; of anything else nothing."""
    if isinstance(value, dict):
        return value.items()
    return enumerate(value) if isinstance(value, list) else ()


def _task_of(content: Any) -> Any:
    return content.get("task", next(iter(TASKS)))


def kind_of(path: Path) -> type[Recipe]:
    """Return what has the keys of the recipe in a file: those of its task.

    :raises UsageError: there is no recipe, or no such task.
    """
    return _kind_of(_read_yaml(path), path)


def _kind_of(content: Any, path: Path) -> type[Recipe]:
    task = _task_of(content)
    if not isinstance(task, str) or task not in TASKS:
        raise UsageError(
            f"{_where(['task'], path, content, set())}: `task`: expected {' or '.join(TASKS)}, not "
            f"{task!r}"
        )
    return TASKS[task]


def _bad_texts(value: Any, location: Location = ()) -> Iterator[tuple[Location, str]]:
    """Return where there is text that says nothing, which as a path would be the current folder, or
    that no file can hold; and what is wrong with it.

    A download's `folder` may be empty.
    """
    for key, item in _items(value):
        if not isinstance(item, str):
            yield from _bad_texts(item, (*location, key))
        elif not item.strip(" \t\r\n\0") and key != "folder":
            yield (*location, key), "must not be empty"
        elif any("\ud800" <= character <= "\udfff" for character in item):
            yield (*location, key), f"{item!r} is not text in UTF-8"


def _where(location: Location, path: Path, content: Any, overridden: set[str]) -> str:
    """Return what messages begin with: the command line, or the file and line of a key.

    :param content: the recipe as ruamel.yaml read it, with line numbers.
    :param overridden: dotted keys that the command line has set.
    """
    key = ".".join(map(str, location))
    if any(f"{key}.".startswith(f"{one}.") for one in overridden):
        return "command line"
    line = ""
    for part in location:
        try:
            position = content.lc.item(part) if isinstance(part, int) else content.lc.key(part)
            line = f":{position[0] + 1}"
            content = content[part]
        except (AttributeError, KeyError, TypeError):
            break
    return f"{path}{line}"


def _parse_value(key: str, text: str) -> Any:
    """Return the value that a recipe with `text` in it would have.

    :raises UsageError: it is not YAML, or nothing.
    """
    try:
        value = YAML(typ="safe").load(text)
        _take_apart(value, set())
    except (YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"command line: `{key}`: cannot read {text!r} as YAML") from error
    if value is None and text.strip() not in ("null", "~"):
        raise UsageError(f"command line: `{key}`: must not be empty; null is the word for nothing")
    return value


def _describe_error(
    error: ValidationError, kind: type[BaseModel], path: Path, content: Any, overridden: set[str]
) -> str:
    """Return one line about the first of the errors; parameters as of `_where`."""
    # A default that is another key's value cannot be told where that one is wrong.
    errors = [each for each in error.errors() if each["type"] != "default_factory_not_called"]
    first = errors[0]
    location = [part for part in first["loc"] if not str(part).startswith(("function-", "some "))]
    key = ".".join(map(str, location))
    where = _where(location, path, content, overridden)
    more = f" (and {len(errors) - 1} more)" if errors[1:] else ""
    if first["type"] == "extra_forbidden":
        in_a_list = any(isinstance(part, int) for part in location)
        hint = nearest_key_hint(key, kind)
        if issubclass(kind, Recipe):
            if in_a_list:
                hint = f"; docs/{kind.page} has its keys"
            hint = _task_hint(first["loc"], kind, content) or hint
        return f"{where}: unknown key `{key}`{hint}{more}"
    if first["type"] == "missing":
        return f"{where}: key `{key}` is required{more}"
    message = first["msg"].removeprefix("Value error, ")
    given = "" if first["type"] == "value_error" else f", not {first['input']!r}"
    return f"{where}: `{key or 'recipe'}`: {message[:1].lower() + message[1:]}{given}{more}"


def _task_hint(location: Location, kind: type[Recipe], content: Any) -> str:
    """Return that the recipe lacks its task, if another one has the key; else nothing."""
    for task, other in TASKS.items():
        if other is not kind and "task" not in content:
            try:
                other.model_validate({**content, "task": task})
                unknown = []
            except ValidationError as error:
                unknown = [
                    each["loc"] for each in error.errors() if each["type"] == "extra_forbidden"
                ]
            if not any(location[: len(each)] == each for each in unknown):
                return f"; it is one of `task: {task}`, which the recipe does not say"
    return ""


def nearest_key_hint(key: str, recipe: type[BaseModel], prefix: str = "") -> str:
    """Return the question whether the nearest key was meant; nothing if none is near."""
    keys = {name: name for name, _ in recipe_keys(recipe)}
    keys |= {name.rsplit(".", 1)[-1]: name for name in keys}
    for wanted in (key, key.rsplit(".", 1)[-1]):
        if near := difflib.get_close_matches(wanted, keys, n=1, cutoff=0.5):
            return f"; did you mean `{prefix}{keys[near[0]]}`?"
    return ""
