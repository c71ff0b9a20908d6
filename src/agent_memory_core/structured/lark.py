"""Parts of a grammar in llguidance's dialect of Lark: exact text, text up to a delimiter, and JSON.

JSON is written as chat templates write it: ", " and ": " between items, and properties in the schema's order. An object
whose schema names its properties has no others, unless the schema says something about others.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from agent_memory_core.errors import InvalidRequest

_JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_OTHER_PROPERTIES = frozenset({"additionalProperties", "patternProperties"})
_NAMED = frozenset({"properties", "patternProperties", "$defs", "definitions"})
"""Keywords whose value has a schema for each name."""
_DATA = frozenset({"const", "default", "enum", "examples"})
"""Keywords whose value is no schema."""
_COMBINATORS = frozenset({"$ref", "allOf", "anyOf", "oneOf", "if"})


class Lark:
    """Writes grammars for one tokenizer, in which special tokens are tokens and not the text that they show."""

    def __init__(self, special_tokens: Mapping[str, int]) -> None:
        """Take the ids of the special tokens by the text that they show."""
        self._ids = special_tokens
        longest_first = sorted(special_tokens, key=len, reverse=True)
        self._special = re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")

    def literal(self, text: str) -> str:
        """Exactly ``text``: as strings, and where it spells special tokens, as those tokens."""
        parts = [
            f"<[{self._ids[part]}]>" if part in self._ids else json.dumps(part, ensure_ascii=False)
            for part in self._special.split(text)
            if part
        ]
        return " ".join(parts) or '""'

    def until(self, rule: str, delimiter: str) -> str:
        """A rule for any text that ends with the first ``delimiter``."""
        if self._special.match(delimiter):
            return f"{rule}: /(?s:.+)/? {self.literal(delimiter)}"
        return f"{rule}[lazy]: /(?s:.*){escaped(delimiter)}/"

    def before_special(self, text: str) -> str | None:
        """What stands in ``text`` before its first special token; None where it has none."""
        found = self._special.search(text)
        return text[: found.start()] if found else None


def escaped(text: str) -> str:
    """``text`` inside a regular expression that stands between slashes."""
    return re.escape(text).replace("\\\n", r"\n").replace("/", r"\/")


def json_of(schema: Mapping[str, Any]) -> str:
    """JSON that fits ``schema``.

    Raises:
        InvalidRequest: the schema is not JSON itself.
    """
    try:
        schema = _with_listed_names(schema, schema)
        closed = schema if _combines(schema) else _closed(schema)
        return "%json " + json.dumps({**closed, "x-guidance": _JSON_STYLE})
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"the schema is not JSON: {error}") from error


def _with_listed_names(schema: Any, root: Mapping[str, Any]) -> Any:
    """``schema`` with properties in the place of a list of names that they may have, which llguidance does not know.

    So a mapping from an enum or from some words is written, for which ``propertyNames`` lists the keys.
    """
    if isinstance(schema, list):
        return [_with_listed_names(part, root) for part in schema]
    if not isinstance(schema, Mapping):
        return schema
    found = {key: _with_listed_names_under(key, value, root) for key, value in schema.items()}
    names = _listed(found.get("propertyNames"), root)
    if names is not None and "properties" not in found:
        value = found.pop("additionalProperties", {})
        del found["propertyNames"]
        found |= {"properties": dict.fromkeys(names, value), "additionalProperties": False}
    return found


def _with_listed_names_under(key: str, value: Any, root: Mapping[str, Any]) -> Any:
    """What stands under one key of a schema: a property, a word of an enum or a default may look like a keyword."""
    if key in _NAMED and isinstance(value, Mapping):
        return {name: _with_listed_names(part, root) for name, part in value.items()}
    return value if key in _DATA else _with_listed_names(value, root)


def _listed(names: Any, root: Mapping[str, Any]) -> list[str] | None:
    """The words of an enum or a constant, by its definition in ``root`` where it is named; None for anything else."""
    if not isinstance(names, Mapping):
        return None
    if isinstance(names.get("$ref"), str):
        place: Any = root
        for key in names["$ref"].removeprefix("#/").split("/"):
            place = place.get(key) if isinstance(place, Mapping) else None
        return None if isinstance(place, Mapping) and "$ref" in place else _listed(place, root)
    words = names.get("enum", [names["const"]] if "const" in names else None)
    return words if isinstance(words, list) and all(isinstance(word, str) for word in words) else None


def _closed(schema: Any) -> Any:
    """``schema`` without further properties, in each object that lists its own and does not mention others.

    Every value that fits the result fits ``schema``. Without it, weak models invent properties without end.
    """
    if isinstance(schema, list):
        return [_closed(part) for part in schema]
    if not isinstance(schema, Mapping):
        return schema
    closed: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _NAMED and isinstance(value, Mapping):
            value = {name: _closed(part) for name, part in value.items()}
        elif key in ("items", "additionalProperties", "prefixItems", "anyOf", "oneOf", "allOf"):
            value = _closed(value)
        closed[key] = value
    if "properties" in schema and not _OTHER_PROPERTIES & schema.keys():
        closed["additionalProperties"] = False
    return closed


def _combines(schema: Any) -> bool:
    """Whether a value may have to fit several schemas at once: closed, each would forbid the others' properties."""
    if isinstance(schema, Mapping):
        every = schema.get("allOf")
        if isinstance(every, list) and len(every) > 1:
            return True
        combined = bool("properties" in schema and _COMBINATORS & schema.keys())
        return combined or any(map(_combines, schema.values()))
    return isinstance(schema, list) and any(map(_combines, schema))
