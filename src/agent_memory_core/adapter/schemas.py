"""The JSON schema that an answer has to fit, from the forms in which it is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from agent_memory_core.errors import InvalidRequest


def to_response_schema(value: object) -> Mapping[str, Any] | None:
    """The JSON schema in a ``response_format`` as OpenAI writes it, or of a pydantic class; None is free text.

    Raises:
        InvalidRequest: it is none of these.
    """
    if isinstance(value, type) and issubclass(value, BaseModel):
        return value.model_json_schema()
    kind = value.get("type") if isinstance(value, Mapping) else None
    if value is None or kind == "text":
        return None
    if kind == "json_object":
        return {}
    named = value.get("json_schema") if isinstance(value, Mapping) and kind == "json_schema" else None
    schema = named.get("schema") if isinstance(named, Mapping) else None
    if not isinstance(schema, Mapping):
        raise InvalidRequest(
            f'response_format={value!r} is not valid: {{"type": "text"}}, {{"type": "json_object"}} or '
            '{"type": "json_schema", "json_schema": {"name": ..., "schema": ...}}.'
        )
    return schema
