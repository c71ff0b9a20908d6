"""What a tool's OpenAI function schema says of its parameters, in the plain types that tool call parsers understand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

Tool = Mapping[str, Any]
"""An OpenAI function schema, with or without the object round ``function``."""

TYPES = ("string", "integer", "number", "boolean", "null", "object", "array")

_TYPE_OF_VALUE: Mapping[type, str] = {
    str: "string",
    bool: "boolean",
    int: "integer",
    float: "number",
    type(None): "null",
    dict: "object",
    list: "array",
}


class SchemaType(NamedTuple):
    """One type that a value may have."""

    name: str
    """One of `TYPES`, or ``enum`` where the values are listed."""
    schema: Mapping[str, Any]
    """The schema that a value of this type has to fit."""


def function_tool(name: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """A tool with this name and these parameters."""
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def tool_name(tool: Tool) -> str:
    """The name of a tool."""
    return str(tool.get("function", tool).get("name"))


def tool_parameters(tool: Tool) -> Mapping[str, Any]:
    """The JSON schema of a tool's parameters; empty where it has none."""
    return tool.get("function", tool).get("parameters") or {}


def schema_types(schema: Any, root: Mapping[str, Any]) -> Iterator[SchemaType]:
    """The types that a value of ``schema`` may have. Its references are looked up in ``root``."""
    if not isinstance(schema, Mapping):
        schema = {}
    if "const" in schema:
        yield SchemaType("enum", {"enum": [schema["const"]]})
    elif "enum" in schema:
        yield SchemaType("enum", schema)
    elif "$ref" in schema:
        for found in _referred(schema["$ref"], root):
            yield found if found.name == "enum" else SchemaType(found.name, schema)
    elif choices := schema.get("anyOf") or schema.get("oneOf"):
        for choice in choices:
            yield from schema_types(choice, root)
    elif isinstance(schema.get("type"), str):
        yield SchemaType(schema["type"], schema)
    elif not isinstance(schema.get("type"), list) and ("properties" in schema or "allOf" in schema):
        yield SchemaType("object", schema)
    else:
        names = schema["type"] if isinstance(schema.get("type"), list) else TYPES
        yield from (SchemaType(name, {**schema, "type": name}) for name in names)


def _referred(reference: str, root: Mapping[str, Any]) -> Iterator[SchemaType]:
    """The types of the definition in ``root`` that ``reference`` names."""
    found: Any = root
    for key in reference.removeprefix("#/").split("/"):
        found = found.get(key) if isinstance(found, Mapping) else None
    if isinstance(found, Mapping) and found.get("$ref") != reference:
        yield from schema_types(found, root)


def plainly_typed(tool: Tool) -> dict[str, Any]:
    """A copy of a tool in which each parameter that has one type, or one and null, names it by ``type``.

    Parsers of calls that are not JSON read a value by that word alone. They miss the type of an optional parameter,
    whose schema is an ``anyOf``, and of one that refers to a definition.
    """
    function = tool.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("parameters"), Mapping):
        return dict(tool)
    parameters = function["parameters"]
    properties = {
        key: _with_type(schema, parameters) for key, schema in (parameters.get("properties") or {}).items()
    }
    return {**tool, "function": {**function, "parameters": {**parameters, "properties": properties}}}


def _with_type(schema: Any, root: Mapping[str, Any]) -> Any:
    if not isinstance(schema, Mapping) or isinstance(schema.get("type"), str):
        return schema
    names = {name for found in schema_types(schema, root) for name in _type_names(found)} - {"null"}
    return {**schema, "type": names.pop()} if len(names) == 1 else schema


def _type_names(found: SchemaType) -> set[str]:
    if found.name != "enum":
        return {found.name}
    return {_TYPE_OF_VALUE.get(type(value), "string") for value in found.schema["enum"]}
