"""The form of a ballot: a JSON schema that the model's answer must fit, and how the answer is read.

The grammar refuses ``uniqueItems``, so that a ranking of few choices is one of all their orders, and a longer one is
picked choice by choice.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import permutations
from typing import Any

MAX_PERMUTED = 5
"""The most choices of which all orders are written into a schema: 5 have 120."""

MAX_REASON = 200
"""Characters of a reason."""

MAX_PROPOSAL = 80
"""Characters of a proposal."""

ABSTAIN = "abstain"
"""The choice that counts as none."""


def choice_schema(choices: Sequence[str], *, reason: bool) -> dict[str, Any]:
    """One of the choices, after a reason if one is wanted: what is written first helps to choose."""
    bare: dict[str, Any] = {"enum": list(choices)}
    return _with_reason(bare) if reason else bare


def ranking_schema(choices: Sequence[str], *, reason: bool) -> dict[str, Any]:
    """All choices in an order of preference; at most `MAX_PERMUTED`."""
    assert len(choices) <= MAX_PERMUTED
    bare: dict[str, Any] = {"enum": [list(order) for order in permutations(choices)]}
    return _with_reason(bare) if reason else bare


def proposal_schema() -> dict[str, Any]:
    """A short text."""
    return {"type": "string", "minLength": 1, "maxLength": MAX_PROPOSAL}


def read(text: str) -> tuple[Any, str]:
    """The choice, ranking or proposal of an answer, and its reason.

    Raises:
        ValueError: the answer was cut off.
    """
    found = json.loads(text)
    if isinstance(found, dict):
        return found["choice"], str(found["reason"])
    return found, ""


def _with_reason(bare: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"reason": {"type": "string", "maxLength": MAX_REASON}, "choice": bare},
        "required": ["reason", "choice"],
        "additionalProperties": False,
    }
