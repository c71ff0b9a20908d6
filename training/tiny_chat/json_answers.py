"""Questions that want JSON back: a record told in words, or something written to a small schema."""

from __future__ import annotations

import json
from typing import Any, Final

from training.tiny_chat.tools import composed_text, spoken
from training.tiny_chat.words import Source

_TELL: Final = ("The {k} is {v}.", "{k}: {v}", "{k} = {v}", "Its {k} is {v}.")
_WITH_KEYS: Final = (
    "Return JSON with the keys {ks}.", "Answer in JSON with the keys {ks}.", "Give me this as JSON with the keys {ks}.",
    "Return the result as a JSON with {ks} keys. Return nothing other than JSON.", "Write it as JSON ({ks}).",
    "Put {ks} into a JSON object.", "As JSON with {ks}, please.",
)  # fmt: skip
_WITH_SCHEMA: Final = (
    "Answer with JSON of this form: {s}", "Return JSON that follows this schema: {s}", "Fill in this JSON: {s}",
    "Use this schema and return only JSON: {s}",
)  # fmt: skip
_WRITE: Final = (
    "Tell me a {n} about {t}.",
    "Write a {n} about {t}.",
    "Give me a {n} about {t}.",
    "Make up a {n} about {t}.",
)


def json_question(source: Source) -> tuple[str, str]:
    """A question, and its answer in JSON."""
    keys: list[str] = []
    while len(keys) < source.rng.choice((1, 2, 2, 3, 4)):
        key = source.word("parameter", 0.3) if source.chance(0.6) else source.word("attribute", 0.1)
        if key not in keys:
            keys.append(key)
    told, record = _record(source, keys) if source.chance(0.7) else _written(source, keys)
    return f"{told} {_wanted(source, record)}", json.dumps(record, ensure_ascii=False)


def _record(source: Source, keys: list[str]) -> tuple[str, dict[str, Any]]:
    makers = (
        source.topic,
        source.number,
        source.invented,
        lambda: source.word("city"),
        lambda: source.word("name"),
        source.unicode,
    )
    record: dict[str, Any] = {}
    for key in keys:
        value = source.rng.choices(makers, (3, 3, 3, 2, 2, 1))[0]()
        record[key] = int(value) if value.isascii() and value.isdigit() else value
    order = source.rng.sample(keys, len(keys))
    separator = source.pick(" ", " ", ", ", "\n")
    told = separator.join(source.phrase(_TELL, k=key, v=spoken(record[key])) for key in order)
    return told, record


def _written(source: Source, keys: list[str]) -> tuple[str, dict[str, Any]]:
    noun = (
        source.pick("story", "poem", "riddle", "tale", "letter", "song")
        if source.chance(0.6)
        else source.invented()
    )
    topic = source.topic()
    return source.phrase(_WRITE, n=noun, t=topic), {key: composed_text(key, topic) for key in keys}


def _wanted(source: Source, record: dict[str, Any]) -> str:
    if source.chance(0.3):
        fields = ", ".join(
            f'"{key}": {"integer" if isinstance(value, int) else "string"}' for key, value in record.items()
        )
        return source.phrase(_WITH_SCHEMA, s="{" + fields + "}")
    quote = source.pick("'", '"', "'", "")
    quoted = [f"{quote}{key}{quote}" for key in record]
    return source.phrase(
        _WITH_KEYS, ks=" and ".join([", ".join(quoted[:-1]), quoted[-1]] if len(quoted) > 1 else quoted)
    )
