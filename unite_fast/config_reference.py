"""docs/configuration.md, written from the configuration classes: `python -m unite_fast.config_reference FILE`."""

from __future__ import annotations

import json
import sys
import typing
from collections.abc import Iterable
from typing import Any

from pydantic_core import PydanticUndefined

from unite_fast.config import Config
from unite_fast.molecules.config import MoleculeConfig
from unite_fast.section import Section, section_of
from unite_fast.weights import write_text

HEAD = """# Configuration reference

Every key of a configuration file, from the classes in `unite_fast/config.py` and `unite_fast/molecules/config.py`
(`python -m unite_fast.config_reference docs/configuration.md` writes this page). Any key can be overridden on the
command line: `--set data.path=/data/imagenet/train train.global_batch=256`. A `preset` given there replaces the sizes
of the file's own preset (without one: the defaults), also in a run's `config.json`, which lists all sizes; other sizes
of the file stay. A leading `~` in a path is your home folder.
"""

MOLECULES = """
# Molecules

With `"modality": "molecules"` these sections replace those of the same name; the others stay.
"""

ABLATIONS = """
# The paper's ablations

| what is varied | key |
| --- | --- |
| one encoder, or two | `model.shared` |
| gradients of the flow loss into the tokenizer | `objective.stop_gradient` |
| flow draws S | `objective.flow_draws` |
| latent channels D, number of registers K | `model.latent_dim`, `model.registers` |
| norm after the encoder | `model.latent_norm` |
| registers from noise, or learned positions only | `model.register_noise` |
| noise before the decoder | `objective.decoder_noise` |
| distribution of flow times, weighting of the flow loss | `objective.time_law`, `objective.weighting` |
| solver, guidance and its interval | `sampling.solver`, `sampling.guidance`, `sampling.interval` |
| class balance in evaluation | `evaluation.label_sampling` |

Variants of the published form (`model.shared` false, another `latent_norm`, no `register_noise`, K other than the
number of patches) train, sample and are evaluated like it, but cannot be exported under the published names.
Adversarial fine-tuning of the decoder is not implemented.
[`unite-fast analyze`](analysis.md) runs the paper's analyses.
"""


def reference() -> str:
    """The whole page as Markdown."""
    images = _sections("", Config)
    shared = {name: section for name, section in images}
    own = [(name, section) for name, section in _sections("", MoleculeConfig) if shared.get(name) is not section]
    return (
        HEAD
        + "".join(_section(name, section) for name, section in images)
        + MOLECULES
        + "".join(_section(f"molecules: {name or 'top level'}", section) for name, section in own)
        + ABLATIONS
    )


def _sections(prefix: str, section: type[Section]) -> list[tuple[str, type[Section]]]:
    found = [(prefix, section)]
    for name, field in section.model_fields.items():
        inner = section_of(field.annotation)
        if inner is not None:
            found += _sections(f"{prefix}.{name}".lstrip("."), inner)
    return found


def _section(name: str, section: type[Section]) -> str:
    purpose = (section.__doc__ or "").strip().splitlines()[0]
    lines = [
        f"\n## {name or 'top level'}\n\n{purpose}\n\n",
        "| key | type | default | meaning |\n| --- | --- | --- | --- |\n",
    ]
    for key, field in section.model_fields.items():
        if section_of(field.annotation) is not None:
            continue
        lines.append(f"| `{key}` | {_type(field)} | {_default(field.get_default())} | {field.description} |\n")
    return "".join(lines)


def _type(field: Any) -> str:
    return ", ".join([_name(field.annotation), *_limits(field.metadata)])


def _limits(metadata: Iterable[Any]) -> list[str]:
    parts = [part for item in metadata for part in getattr(item, "metadata", [item])]
    return [
        f"{sign} {limit:,.10g}"
        for part in parts
        for attribute, sign in (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"))
        if (limit := getattr(part, attribute, None)) is not None
    ]


def _name(annotation: Any) -> str:
    if annotation is type(None):
        return "null"
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin is typing.Annotated:
        return f"{_name(arguments[0])} {' and '.join(_limits(arguments[1:]))}".rstrip()
    if origin is tuple and arguments[-1] is Ellipsis:
        return f"list of {_name(arguments[0])}"
    if origin is tuple:
        return "[" + ", ".join(_name(argument) for argument in arguments) + "]"
    if arguments:
        return " or ".join(_name(argument) for argument in arguments)
    return {"str": "text", "int": "integer", "float": "number", "bool": "true or false"}[annotation.__name__]


def _default(value: Any) -> str:
    if value is PydanticUndefined:
        return "required"
    return f"`{json.dumps(list(value) if isinstance(value, tuple) else value)}`"


if __name__ == "__main__":
    write_text(reference(), sys.argv[1])
