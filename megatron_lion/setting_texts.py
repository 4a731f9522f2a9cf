"""The settings of a run as text: their help, a commented config file, and a JSON schema for editors.

All three are made from the dataclasses and attribute docstrings of config.py, so they cannot differ from --help.
"""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Iterator
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import docstring_parser
import yaml

from megatron_lion.config import RunConfig

SCHEMA_DRAFT = "https://json-schema.org/draft/2020-12/schema"
_WIDTH = 100


@dataclasses.dataclass(frozen=True)
class Setting:
    """One setting of a run.

    Attributes:
        key: dotted key, such as "optimizer.lr".
        kind: annotation of the field.
        default: its default.
        text: its help, one paragraph.
    """

    key: str
    kind: Any
    default: Any
    text: str


def settings(part: type = RunConfig, prefix: str = "") -> Iterator[Setting]:
    """Yields every setting in the order of config.py; a group's settings follow those of RunConfig itself."""
    hints, texts = get_type_hints(part), _texts(part)
    groups: list[tuple[str, type]] = []
    for field in dataclasses.fields(part):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            groups.append((field.name, kind))
            continue
        default = field.default_factory() if callable(field.default_factory) else field.default
        yield Setting(prefix + field.name, kind, default, texts[field.name])
    for name, kind in groups:
        yield from settings(kind, f"{prefix}{name}.")


def group_texts() -> dict[str, str]:
    """Returns the first docstring line of each group of settings, by the group's name."""
    hints = get_type_hints(RunConfig)
    return {name: hints[name].__doc__.splitlines()[0] for name in hints if dataclasses.is_dataclass(hints[name])}


@cache
def _texts(part: type) -> dict[str, str]:
    parsed = docstring_parser.parse_from_object(part)
    return {item.arg_name: " ".join((item.description or "").split()) for item in parsed.params}


def commented(text: str) -> str:
    """Returns a config's YAML with the help of each setting above it as a comment.

    Args:
        text: the YAML of `configfile.dump_config`.
    """
    content: dict[str, Any] = yaml.safe_load(text)
    texts, groups = {item.key: item.text for item in settings()}, group_texts()
    chunks = _chunks(text, content)
    lines: list[str] = []
    for section, value in content.items():
        if section not in groups:
            lines += [*_comment(texts[section], ""), *chunks[section]]
            continue
        lines += ["", *_comment(groups[section], ""), f"{section}:"]
        for name in value:
            lines += [*_comment(texts[f"{section}.{name}"], "  "), *chunks[f"{section}.{name}"]]
    return "\n".join(lines) + "\n"


def _chunks(text: str, content: dict[str, Any]) -> dict[str, list[str]]:
    """Returns the lines of each setting in the YAML text, by dotted key; the text itself decides how a value is quoted."""
    root, lines = yaml.compose(text, yaml.SafeLoader), text.splitlines()
    starts: list[tuple[int, str]] = []
    for key, value in root.value if root else ():
        if isinstance(content[key.value], dict):
            starts += [(inner.start_mark.line, f"{key.value}.{inner.value}") for inner, _ in value.value]
        starts.append((key.start_mark.line, key.value))
    starts.sort()
    ends = [*(line for line, _ in starts[1:]), len(lines)]
    return {key: lines[start:end] for (start, key), end in zip(starts, ends, strict=True)}


def _comment(text: str, indent: str) -> list[str]:
    mark = f"{indent}# "
    return textwrap.wrap(text, _WIDTH, initial_indent=mark, subsequent_indent=mark, break_on_hyphens=False)


def json_schema() -> str:
    """Returns the JSON schema of a config file, which editors use to complete and check YAML."""
    root: dict[str, Any] = {
        "$schema": SCHEMA_DRAFT,
        "title": "Settings of a megatron-lion run",
        "type": "object",
        "additionalProperties": False,
        "properties": {},
    }
    groups = group_texts()
    for item in settings():
        section, _, name = item.key.rpartition(".")
        place = root["properties"]
        if section:
            group = {"type": "object", "description": groups[section], "additionalProperties": False, "properties": {}}
            place = place.setdefault(section, group)["properties"]
        place[name] = {"description": item.text, "default": _plain(item.default), **_schema_of(item.kind)}
    return json.dumps(root, indent=1, ensure_ascii=False) + "\n"


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _schema_of(kind: Any) -> dict[str, Any]:
    """Returns the schema of an annotation; a single value is allowed for a list, as in `configfile`."""
    origin, members = get_origin(kind), get_args(kind)
    if origin in (UnionType, Union):
        return {"anyOf": [_schema_of(member) for member in members]}
    if origin is Literal:
        return {"enum": list(members)}
    if origin is list:
        items = _schema_of(members[0])
        return {"anyOf": [{"type": "array", "items": items}, items]}
    if origin is tuple:
        item = _schema_of(members[0])
        return {"type": "array", "items": item, "minItems": len(members), "maxItems": len(members)}
    # A number may also be text: YAML 1.1 reads 1e-4 as text, and megatron-lion as a number.
    if kind is float:
        return {"anyOf": [{"type": "number"}, {"type": "string", "pattern": r"^[-+]?[0-9.]+[eE][-+]?[0-9]+$"}]}
    return {"type": {int: "integer", bool: "boolean", str: "string", NoneType: "null"}[kind]}
