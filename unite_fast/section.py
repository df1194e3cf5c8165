"""What every section of a configuration is: strict, immutable, and one line for each mistake in it."""

from __future__ import annotations

import difflib
import types
import typing
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from unite_fast.errors import UserError


class Section(BaseModel):
    """Base of every section: immutable, no unknown keys, finite numbers only."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        # pydantic takes true for 1. Its strict mode would refuse that, and JSON's lists for tuples as well.
        plain = _plain_types(cls.model_fields[info.field_name].annotation)
        if plain & {int, float} and bool not in plain:
            for part in value if isinstance(value, list | tuple) else [value]:
                if isinstance(part, bool):
                    raise ValueError(f"{str(part).lower()} is not a number")
        return value

    @classmethod
    def parse(cls, data: Any, *, source: str = "configuration") -> Self:
        """Validate a dictionary.

        Raises:
            UserError: every problem on a line of its own, with the key, the value and what is valid.
        """
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            lines = [_explain(cls, e) for e in _joined(cls, error.errors())]
            raise UserError(f"{source} is not valid:\n" + "\n".join(lines)) from None


def _plain_types(annotation: Any) -> set[Any]:
    """The types that an annotation is made of."""
    inner = typing.get_args(annotation)
    return {annotation} if not inner else set().union(*map(_plain_types, inner))


def section_of(annotation: Any) -> type[Section] | None:
    """The section class behind a field's annotation, or None where the field is a plain value."""
    for candidate in (annotation, *typing.get_args(annotation)):
        is_class = isinstance(candidate, type) and not isinstance(candidate, types.GenericAlias)
        if is_class and issubclass(candidate, Section):
            return candidate
    return None


def _joined(section: type[Section], errors: list[Any]) -> list[Any]:
    """Validation errors with those of a key's alternatives, such as a number or a word, as one."""
    found: dict[tuple[str | int, ...], Any] = {}
    for error in errors:
        location = error["loc"][: _key_length(section, error["loc"])]
        if location in found:
            other = error["msg"].removeprefix("Input should be ")
            found[location] = found[location] | {"msg": f"{found[location]['msg']}, or {other}"}
        else:
            found[location] = dict(error) | {"loc": location}
    return list(found.values())


def _key_length(section: type[Section], location: tuple[str | int, ...]) -> int:
    """How many parts of an error's location name keys; behind a plain value's key pydantic names the alternative."""
    for length, part in enumerate(location, 1):
        field = section.model_fields.get(part) if isinstance(part, str) else None
        if field is None:
            break
        inner = section_of(field.annotation)
        if inner is None:
            return length if len(location) > length and isinstance(location[length], str) else len(location)
        section = inner
    return len(location)


def _explain(section: type[Section], error: Any) -> str:
    """One line for one validation error: dotted key, what is wrong, what is valid."""
    location = [str(part) for part in error["loc"]]
    key = ".".join(location)
    if error["type"] == "extra_forbidden":
        for part in location[:-1]:
            section = section_of(section.model_fields[part].annotation) or section
        valid = list(section.model_fields)
        near = difflib.get_close_matches(location[-1], valid, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "valid keys: " + ", ".join(valid)
        return f"  {key}: unknown key; {hint}"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"  {key}: {message}" if key else f"  {message}"
    if error["type"] == "missing":
        if isinstance(error["loc"][-1], int):
            return f"  {'.'.join(location[:-1])}: number {error['loc'][-1] + 1} of the list is missing"
        return f"  {key}: required key is missing"
    if error["type"] == "tuple_type":
        message = f"must be a JSON list, which a shell wants in quotes: '{key}=[…]'"
    return f"  {key}: {message} (got {error['input']!r})"
