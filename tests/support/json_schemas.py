"""JSON schemas that a random model can complete, and the `jsonschema` package as judge of what it wrote."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from jsonschema import Draft202012Validator, ValidationError, validators

NAME = {"type": "string", "minLength": 1, "maxLength": 6}

SCHEMAS: dict[str, dict[str, Any]] = {
    "string": {"type": "object", "properties": {"name": NAME}, "required": ["name"]},
    "enum": {
        "type": "object",
        "properties": {"colour": {"enum": ["green", "blau", "κόκκινο", "赤", "🟣", 7, None]}},
        "required": ["colour"],
    },
    "nested": {
        "type": "object",
        "properties": {
            "who": {
                "type": "object",
                "properties": {"name": NAME, "age": {"type": "integer"}},
                "required": ["age"],
            },
            "ok": {"type": "boolean"},
        },
        "required": ["who", "ok"],
    },
    "array": {
        "type": "object",
        "properties": {
            "xs": {
                "type": "array",
                "items": {"type": "integer", "minimum": -5, "maximum": 30},
                "minItems": 1,
                "maxItems": 4,
            }
        },
        "required": ["xs"],
    },
    "optional": {
        "type": "object",
        "properties": {
            "a": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
            "b": NAME,
            "c": {"const": "c"},
        },
        "required": ["a"],
    },
    "number": {
        "type": "object",
        "properties": {"x": {"type": "number"}, "p": {"type": "number", "minimum": 0, "maximum": 1}},
        "required": ["x", "p"],
    },
    "referred": {
        "type": "object",
        "properties": {"left": {"$ref": "#/$defs/point"}, "right": {"$ref": "#/$defs/point"}},
        "required": ["left", "right"],
        "$defs": {
            "point": {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]},
        },
    },
    "ünï": {
        "type": "object",
        "properties": {'grüße "é"': {"enum": ["ä\n", "\\"]}, "properties": {"type": "boolean"}},
        "required": ['grüße "é"'],
    },
    "nothing": {"type": "object", "properties": {}},
}


def _named_in_order(validator: Any, properties: dict[str, Any], value: Any, schema: Any) -> Iterator[Any]:
    yield from Draft202012Validator.VALIDATORS["properties"](validator, properties, value, schema)
    if isinstance(value, dict) and list(value) != [name for name in properties if name in value]:
        yield ValidationError(f"{list(value)} are not properties of {list(properties)} in this order")


_Judge = validators.extend(  # type: ignore[no-untyped-call]
    Draft202012Validator, {"properties": _named_in_order}
)


def fits(value: Any, schema: dict[str, Any]) -> bool:
    """Whether ``value`` fits, with the properties that its schema names in this order, and with no others."""
    return bool(_Judge(schema).is_valid(value))


def tool(name: str, parameters: dict[str, Any]) -> dict[str, Any]:
    """An OpenAI function schema."""
    return {"type": "function", "function": {"name": name, "description": "", "parameters": parameters}}
