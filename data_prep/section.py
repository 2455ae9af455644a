"""What all sections of a recipe have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator

LARGEST = 2**53  # the whole numbers up to it are exact in JSON, in MLflow and as floats


class Section(BaseModel):
    """A section refuses keys it does not know; the docstring under a key is its documentation."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        serialize_by_alias=True,  # a key that Python cannot have as a name
    )

    @model_validator(mode="before")
    @classmethod
    def _true_is_no_number(cls, content: Any) -> Any:
        """Python takes True for 1."""
        for key, field in cls.model_fields.items() if isinstance(content, dict) else ():
            value, kind = content.get(key), field.annotation
            if isinstance(value, bool) and bool not in (kind, *get_args(kind)):
                raise ValueError(f"{key} cannot be {str(value).lower()}")
        return content

    @field_validator("*")
    @classmethod
    def _is_within_reach(cls, value: Any) -> Any:
        if isinstance(value, int) and abs(value) > LARGEST:
            raise ValueError(f"expected a number between ±{LARGEST}, not {value}")
        return value

    @field_validator("*")
    @classmethod
    def _is_where_it_says(cls, value: Any) -> Any:
        """Only shells take `~` for the home of whoever asks."""
        if isinstance(value, tuple):
            return tuple(map(_expanded, value))
        return _expanded(value)


def _expanded(value: Any) -> Any:
    own = isinstance(value, Path) and value.parts[:1] == ("~",)
    return value.expanduser() if own else value


def fault_of(error: ValidationError) -> str:
    """Return the key that the first of pydantic's errors is about, and what is wrong with it."""
    first = error.errors()[0]
    key = ".".join(map(str, first["loc"]))
    if first["type"] == "missing":
        return f"`{key}` is missing"
    if first["type"] == "extra_forbidden":
        return f"unknown key `{key}`"
    message = first["msg"].removeprefix("Value error, ")
    return f"`{key}`: {message}" if key else message
