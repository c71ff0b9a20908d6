"""What a schema says of a value's type, in words that parsers of tool calls understand."""

from __future__ import annotations

import json
from typing import Any

from support.json_schemas import tool

from agent_memory_core.structured.tool_schema import plainly_typed, schema_types

POINT = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}


def test_a_parameter_of_one_type_beside_null_says_so() -> None:
    given = tool(
        "f",
        {
            "type": "object",
            "properties": {
                "plain": {"type": "integer"},
                "optional": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
                "listed": {"enum": ["a", "b"]},
                "referred": {"$ref": "#/$defs/point"},
                "either": {"anyOf": [{"type": "integer"}, {"type": "string"}]},
                "any": {},
                "loop": {"$ref": "#/properties/loop"},
            },
            "$defs": {"point": POINT},
        },
    )
    before = json.dumps(given)
    found = plainly_typed(given)["function"]["parameters"]["properties"]
    types = {key: schema.get("type") for key, schema in found.items()}
    assert types == {
        "plain": "integer",
        "optional": "integer",
        "listed": "string",
        "referred": "object",
        "either": None,
        "any": None,
        "loop": None,
    }
    assert json.dumps(given) == before
    assert plainly_typed({"name": "f"}) == {"name": "f"}


def test_types_of_a_schema() -> None:
    def names(schema: Any) -> list[str]:
        return [found.name for found in schema_types(schema, {})]

    assert names({"const": 1}) == ["enum"]
    assert names({"oneOf": [{"type": "string"}, {"enum": [1]}]}) == ["string", "enum"]
    assert names({"type": ["array", "null"]}) == ["array", "null"]
    assert names({"allOf": [POINT]}) == ["object"]
    assert len(names(True)) == 7
