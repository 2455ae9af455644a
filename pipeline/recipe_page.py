"""Write a page for each task: every key of its recipes, from the models that read them.

python -m pipeline.recipe_page
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, get_args

from pydantic import BaseModel, TypeAdapter

from pipeline.markdown import markdown_table
from pipeline.recipe import ROOT
from pipeline.recipe_file import TASKS, default_of, is_section, is_sequence

PAGES = {task: ROOT / "docs" / recipe.page for task, recipe in TASKS.items()}
HEAD = """\
# Recipe keys: {task}

Every key that a recipe with `task: {task}` can have ([those of the other task]({other})).
`python -m pipeline.recipe_page` writes this page from the models that read recipes; do not edit it.
`./run.sh prepare --config RECIPE --help_keys` says the same in a terminal.

A key is given in the recipe or on the command line: `--training.max_steps 100`, a list as YAML:
`--data.train '[…]'`. `[]` stands for each element of a list; the keys of an
element cannot be given one by one on a command line. Unknown keys are refused, as are values that
do not fit together; the message names line and key. Relative paths start at the current directory,
those of corpora and test sets at `data.root`.
"""
BOUNDS = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}
TABLE = ("key", "value", "default", "what it says")


def page(task: str) -> str:
    """Return the whole page of a task."""
    (other,) = (path.name for name, path in PAGES.items() if name != task)
    head = HEAD.format(task=task, other=other)
    return "\n".join([head, *_section_lines(TASKS[task], "", {})])


def _section_lines(model: type[BaseModel], prefix: str, shown: dict[Any, str]) -> Iterator[str]:
    """Return the lines about a section: a table of its keys, then its sections.

    :param prefix: of the keys of `model`, with a dot at its end.
    :param shown: for each model whose keys came before, the key where they are; it is added to.
    """
    inner = []
    rows = []
    for name, field in model.model_fields.items():
        key = f"{prefix}{field.alias or name}"
        sections = list(dict.fromkeys(_sections_in(field.annotation)))
        if sections:
            inner.append((f"{key}[]" if is_sequence(field.annotation) else key, field, sections))
        if not sections or is_sequence(field.annotation):
            rows.append((f"`{key}`", *_describe_field(field)))
    if rows:
        yield markdown_table(TABLE, rows) + "\n"
    for key, field, sections in inner:
        yield f"{'#' * (2 + key.count('.'))} {key}\n"
        if len(sections) > 1:
            if tuple(sections) in shown:
                yield f"As {shown[tuple(sections)]}.\n"
            else:
                shown[tuple(sections)] = f"`{key}`"
                yield from _variants_table(sections)
            continue
        about = None if is_sequence(field.annotation) else field.description
        yield f"{_one_line(about or sections[0].__doc__)}\n"
        if sections[0] in shown:
            yield f"Keys as of {shown[sections[0]]}.\n"
        else:
            shown[sections[0]] = f"`{key}`"
            yield from _section_lines(sections[0], f"{key}.", shown)


def _variants_table(sections: list[type[BaseModel]]) -> Iterator[str]:
    """Return a table of the sections that an element can be; their first key tells them apart."""
    (tag,) = {next(iter(section.model_fields)) for section in sections}
    rows = []
    for section in sections:
        fields = dict(section.model_fields)
        rows.append((f"`{fields.pop(tag).default}`", "", "", "", _one_line(section.__doc__)))
        rows += [("", f"`{name}`", *_describe_field(field)) for name, field in fields.items()]
    yield markdown_table((tag, *TABLE), rows) + "\n"


def _sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Return the sections in a field's annotation, however deep."""
    if is_section(annotation):
        yield annotation
    for part in get_args(annotation):
        yield from _sections_in(part)


def _describe_field(field: Any) -> tuple[str, str, str]:
    """Return what values a field takes, its default, and its documentation."""
    annotated: Any = Annotated  # of parts that no type checker knows
    parts = (field.annotation, *field.metadata, None)  # it wants two or more
    schema = TypeAdapter(annotated[parts]).json_schema()
    sections = not field.is_required() and list(_sections_in(field.annotation)) and field.default
    if sections:
        default = ", ".join(f"`{next(iter(dict(each).values()))}`" for each in sections)
    else:
        default = "required" if field.is_required() else f"`{default_of(field)}`"
    return _describe_values(schema), default, _one_line(field.description)


def _describe_values(schema: dict[str, Any]) -> str:
    """Return in words what values a JSON schema allows."""
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if choices := schema.get("anyOf") or schema.get("oneOf"):
        return " or ".join(dict.fromkeys(map(_describe_values, choices)))
    if "prefixItems" in schema:
        return f"list of {len(schema['prefixItems'])}: {_describe_values(schema['prefixItems'][0])}"
    if schema.get("type") == "array":
        least = ", at least one" if schema.get("minItems") else ""
        return f"list of {_describe_values(schema['items'])}{least}"
    if schema.get("format") == "path":
        return "path"
    if pattern := schema.get("pattern"):
        return f"text like `{pattern}`"
    kind = schema.get("type", "mappings")
    name = {"string": "text", "boolean": "`true`, `false`", "null": "`null`"}.get(kind, kind)
    bounds = [f"{sign} {schema[key]:g}" for key, sign in BOUNDS.items() if key in schema]
    return " ".join([name, ", ".join(bounds)]).strip()


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())


if __name__ == "__main__":
    for task, path in PAGES.items():
        path.write_text(page(task), encoding="utf-8")
