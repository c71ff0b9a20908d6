"""What a field of the settings declares besides its type, and its name and values in the words of an error."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo


@dataclass(frozen=True, slots=True)
class Source:
    """Where a field may come from beside the constructor, and what its values are called in an error."""

    section: str | None = None
    """The section of a model's profile; None: not in profiles."""
    older_keys: tuple[str, ...] = ()
    """Keys of that section in older profiles."""
    older_variables: tuple[str, ...] = ()
    """Environment variables of older set-ups."""
    in_environment: bool = True
    """Whether ``AGENT_MEMORY_<FIELD>`` sets it."""
    values: str = ""
    """The possible values in words, for a field whose type does not say it."""


def source_of(field: FieldInfo) -> Source:
    """What a field declares of its sources."""
    (source,) = (item for item in field.metadata if isinstance(item, Source))
    return source


def shown(name: str, value: object) -> str:
    """A setting's value as an error may name it: what is longer than any word for encryption may be a key."""
    may_be_a_key = name == "encryption" and len(str(value)) > 12
    return "(a value that is not shown here)" if may_be_a_key else repr(value)


def choice_of(name: str, known: Iterable[str]) -> str:
    """What to write instead of an unknown name: the nearest known one, if one is near, and all of them."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    return f"{f'did you mean {near[0]}? C' if near else 'c'}hoose from {', '.join(known)}."


def values_of(field: FieldInfo) -> str:
    """The values that a field may have, in words."""
    if words := source_of(field).values:
        return words
    kinds = kinds_of(field.annotation)
    if bool in kinds:
        return "True or False"
    choices = [
        f'"{kind}"' if isinstance(kind, str) else str(kind) for kind in kinds if not isinstance(kind, type)
    ]
    if not choices:
        number = f"a {'whole ' if int in kinds else ''}number {_range(field)}"
        return f"{number}, or None" if NoneType in kinds else number
    if NoneType in kinds:
        choices.append("None")
    return f"{', '.join(choices[:-1])} or {choices[-1]}"


def _range(field: FieldInfo) -> str:
    least, above, most = (_bound(field, name) for name in ("ge", "gt", "le"))
    if most is None:
        return f"of at least {least}" if above is None else f"above {above}"
    return f"from {least} to {most}" if above is None else f"above {above} and up to {most}"


def _bound(field: FieldInfo, name: str) -> Any:
    return next((getattr(item, name) for item in field.metadata if hasattr(item, name)), None)


def kinds_of(annotation: Any) -> list[Any]:
    """The types that an annotation allows, and in place of a Literal its values."""
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    if get_origin(annotation) in (Union, UnionType):
        return [kind for part in get_args(annotation) for kind in kinds_of(part)]
    return [annotation]
