"""What a JSON schema says of a tool's parameters, in the plain types that parsers of tool calls understand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

TYPES = ("string", "integer", "number", "boolean", "null", "object", "array")

_TYPE_OF: Mapping[type, str] = {
    str: "string",
    bool: "boolean",
    int: "integer",
    float: "number",
    type(None): "null",
    dict: "object",
    list: "array",
}

Kind = tuple[str, Mapping[str, Any]]
"""A type, or ``enum``, with the schema that a value of it has to fit."""


def kinds(schema: Any, root: Mapping[str, Any]) -> Iterator[Kind]:
    """The types that a value of ``schema``, which stands in ``root``, may have; listed values are an ``enum``."""
    if not isinstance(schema, Mapping):
        schema = {}
    if "const" in schema:
        yield "enum", {"enum": [schema["const"]]}
    elif "enum" in schema:
        yield "enum", schema
    elif "$ref" in schema:
        yield from (
            (kind, part if kind == "enum" else schema) for kind, part in _referred(schema["$ref"], root)
        )
    elif parts := schema.get("anyOf") or schema.get("oneOf"):
        for part in parts:
            yield from kinds(part, root)
    elif isinstance(schema.get("type"), str):
        yield schema["type"], schema
    elif isinstance(schema.get("type"), list):
        yield from ((kind, {**schema, "type": kind}) for kind in schema["type"])
    elif "properties" in schema or "allOf" in schema:
        yield "object", schema
    else:
        yield from ((kind, {**schema, "type": kind}) for kind in TYPES)


def _referred(name: str, root: Mapping[str, Any]) -> Iterator[Kind]:
    """The types that a definition of ``root`` may have."""
    found: Any = root
    for part in name.removeprefix("#/").split("/"):
        found = found.get(part) if isinstance(found, Mapping) else None
    if isinstance(found, Mapping) and found.get("$ref") != name:
        yield from kinds(found, root)


def plainly_typed(tool: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of an OpenAI function schema in which each parameter of one type, beside null, says so by ``type``.

    Parsers of calls that are not JSON read a value by that word alone, and miss it in an optional parameter, which
    is ``anyOf``, and in one that refers to a definition.
    """
    function = tool.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("parameters"), Mapping):
        return dict(tool)
    parameters = function["parameters"]
    properties = {
        key: _typed(schema, parameters) for key, schema in (parameters.get("properties") or {}).items()
    }
    return {**tool, "function": {**function, "parameters": {**parameters, "properties": properties}}}


def _typed(schema: Any, root: Mapping[str, Any]) -> Any:
    if not isinstance(schema, Mapping) or isinstance(schema.get("type"), str):
        return schema
    types = {word for kind, part in kinds(schema, root) for word in _types(kind, part)} - {"null"}
    return {**schema, "type": types.pop()} if len(types) == 1 else schema


def _types(kind: str, schema: Mapping[str, Any]) -> set[str]:
    if kind != "enum":
        return {kind}
    return {_TYPE_OF.get(type(value), "string") for value in schema["enum"]}
