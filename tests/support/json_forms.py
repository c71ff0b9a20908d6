"""JSON schemas that a random model can complete, and a judge of values that owes nothing to llguidance."""

from __future__ import annotations

from typing import Any

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

_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}


def fits(value: Any, schema: dict[str, Any], root: dict[str, Any] | None = None) -> bool:
    """Whether ``value`` is of this form, with no property that the form does not name."""
    root = root or schema
    if "$ref" in schema:
        return fits(value, root["$defs"][schema["$ref"].rsplit("/", 1)[1]], root)
    if "anyOf" in schema:
        return any(fits(value, one, root) for one in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return value in schema.get("enum", [schema.get("const")])
    return _is_a(value, schema["type"]) and _within(value, schema) and _parts_fit(value, schema, root)


def _is_a(value: Any, kind: str) -> bool:
    return isinstance(value, _TYPES[kind]) and isinstance(value, bool) <= (kind == "boolean")


def _within(value: Any, schema: dict[str, Any]) -> bool:
    if isinstance(value, (str, list)):
        kind = "Length" if isinstance(value, str) else "Items"
        return bool(schema.get(f"min{kind}", 0) <= len(value) <= schema.get(f"max{kind}", len(value)))
    if isinstance(value, (int, float)):
        return bool(schema.get("minimum", value) <= value <= schema.get("maximum", value))
    return True


def _parts_fit(value: Any, schema: dict[str, Any], root: dict[str, Any]) -> bool:
    if isinstance(value, list):
        return all(fits(item, schema["items"], root) for item in value)
    if not isinstance(value, dict) or "properties" not in schema:
        return True
    named = schema["properties"]
    order = [name for name in named if name in value]
    return (
        list(value) == order
        and set(schema.get("required", ())) <= set(value)
        and all(fits(value[name], named[name], root) for name in value)
    )


def tool(name: str, parameters: dict[str, Any]) -> dict[str, Any]:
    """An OpenAI function schema."""
    return {"type": "function", "function": {"name": name, "description": "", "parameters": parameters}}
