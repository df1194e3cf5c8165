"""`key.path=value` on the command line, and JSON in which every key stands once."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from pydantic import ValidationError

from unite_fast.errors import UserError
from unite_fast.section import Section, section_of


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        UserError: an object that gives a key more than once, of which Python would keep the last.
        ValueError, RecursionError: no JSON.
    """
    return json.loads(text, object_pairs_hook=_unique)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    counts = Counter(key for key, _ in pairs)
    twice = ", ".join(repr(key) for key, count in counts.items() if count > 1)
    if twice:
        raise UserError(f"{twice} is given more than once in one section: keep one")
    return dict(pairs)


def apply_overrides(data: dict[str, Any], overrides: list[str] | tuple[str, ...], whole: type[Section]) -> None:
    """Put `key.path=value` overrides into a configuration's dictionary (JSON values; anything else is a string).

    A new preset takes the place of the sizes that the former one stood for (without a former one: of the defaults),
    as a run's config.json states them all. Other sizes were chosen by hand and stay.

    Args:
        data: the dictionary, changed in place.
        overrides: applied in their order.
        whole: the class of the configuration.

    Raises:
        UserError: an override of another form, a key that is given twice.
    """
    parsed = [_parse(override) for override in overrides]
    for _, keys, value in parsed:
        if keys[-1] == "preset" and value is not None:
            _drop_preset(data, keys[:-1], whole)
    for override, keys, value in parsed:
        _apply(data, override, keys, value)


def _parse(override: str) -> tuple[str, list[str], Any]:
    """The override, the parts of its key, its value."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r} is not of the form key.path=value")
    try:
        value = parse_json(text)
    except UserError as error:
        raise UserError(f"override {override!r}: {error}") from None
    except (ValueError, RecursionError):
        value = text
    return override, key.split("."), value


def _drop_preset(node: Any, path: list[str], section: type[Section] | None) -> None:
    """Take what its preset stands for out of a section; nothing where it is no section or its preset is unknown."""
    for part in path:
        field, node = section.model_fields.get(part), node.get(part)
        section = section_of(field.annotation) if field else None
        if section is None or not isinstance(node, dict):
            return
    try:
        stood_for = section.model_validate({"preset": node.get("preset")}).model_dump(mode="json")
    except ValidationError:
        return
    _drop(node, stood_for)


def _drop(node: dict[str, Any], stood_for: dict[str, Any]) -> None:
    for key in stood_for.keys() & node.keys():
        mine, value = node[key], stood_for[key]
        if mine == value:
            del node[key]
        # A decoder of the same preset, of which some sizes were chosen by hand.
        elif isinstance(mine, dict) and isinstance(value, dict) and mine.get("preset") == value.get("preset"):
            _drop(mine, value)


def _apply(data: dict[str, Any], override: str, keys: list[str], value: Any) -> None:
    *parents, last = keys
    node = data
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise UserError(f"override {override!r}: {parent} is a value, not a section")
    node[last] = value
