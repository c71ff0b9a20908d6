"""What other packages call an option, and what becomes of it here.

Programs that are written for any model hand over options of several providers. Each is understood under its name there,
or ignored on purpose because it cannot mean anything for a model in this process; every other name is refused, or named
in a warning where a framework's own tests forbid an error.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Mapping
from typing import Any

from agent_memory_core.errors import InvalidRequest, InvalidSetting

OTHER_NAMES: Mapping[str, str] = {
    "model_name": "model",
    "model_path": "model",
    "model_id": "model",
    "max_completion_tokens": "max_tokens",
    "max_new_tokens": "max_tokens",
    "max_output_tokens": "max_tokens",
    "num_predict": "max_tokens",
    "stop_sequences": "stop",
    "repeat_penalty": "repetition_penalty",
    "num_ctx": "context_length",
    "n_ctx": "context_length",
    "request_timeout": "timeout",
    "enable_thinking": "thinking",
    "reasoning": "thinking",
}
"""Names that other packages have for a field; the value is our name."""

WITHOUT_EFFECT: Mapping[str, str] = {
    "cache_control": "what was computed is kept anyway; on a content block it marks a place to resume from",
    "keep_alive": "a model stays loaded until its memory is closed",
    "max_retries": "no call leaves this process, so that none fails by chance",
    "metadata": "a provider would store it with the answer",
    "safety_identifier": "it names the user to a provider",
    "service_tier": "there is one way to be served",
    "store": "sessions are stored, answers are not",
    "stream": "whether an answer is streamed is chosen by the method that is called",
    "stream_options": "every stream ends with its usage",
    "stream_usage": "every stream ends with its usage",
    "streaming": "whether an answer is streamed is chosen by the method that is called",
    "strict": "every answer that is held to a schema fits it",
    "user": "it names the user to a provider; sessions and namespaces keep users apart here",
    "verbosity": "only some providers' models know it",
}
"""Options that are ignored on purpose, and why."""

NEUTRAL: Mapping[str, Collection[Any]] = {
    "n": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
}
"""Options of which only the value that changes nothing is taken; None is one always."""

REASONING_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh")
"""Values of ``reasoning_effort``; "none" means no thinking at all."""

CALL_OPTIONS: Mapping[str, str] = {
    "model": "another model for this call",
    "session_id": "the session of this call",
    "namespace": "the namespace of that session",
    "prompt_cache_key": "a session, where no other is named",
    "tools": "what the model can call",
    "tool_choice": '"auto", "none", "required" or "any", the name of a tool, or as OpenAI writes it',
    "parallel_tool_calls": "False allows one call at most",
    "response_format": "a form that the answer has to fit, as OpenAI writes it",
    "continue_final_message": "True goes on with a last message of the assistant",
    "thinking": "whether the model thinks, where its chat template knows enable_thinking, or how much",
    "reasoning_effort": f"how much it thinks, where its chat template knows that: {', '.join(REASONING_EFFORTS)}",
    "chat_template_kwargs": "further arguments of the chat template",
    "timeout": "seconds after which the answer is given up",
}
"""Options of a call besides those of sampling, and what each one is."""

_NEAR = 0.75
"""How alike an unknown name and a known one must be for the first to be a slip of the second."""


def nearest(name: str, known: Collection[str]) -> str | None:
    """The known name of which ``name`` is most likely a slip; None if it is like none of them."""
    found = difflib.get_close_matches(name.lower(), sorted(known), n=1, cutoff=_NEAR)
    return found[0] if found else None


def check_neutral(options: Mapping[str, Any]) -> dict[str, Any]:
    """``options`` without those that change nothing.

    Raises:
        InvalidRequest: one of them has a value that would change something, which no model here can do.
    """
    for name, neutral in NEUTRAL.items():
        value = options.get(name)
        if value is not None and value not in neutral:
            only = " or ".join(map(repr, (*neutral, None)))
            raise InvalidRequest(f"{name}={value!r} is not valid: {name} can only be {only} here.")
    return {name: value for name, value in options.items() if name not in NEUTRAL}


def template_kwargs(thinking: object, reasoning_effort: object, more: object) -> dict[str, Any]:
    """What a chat template is told of thinking, and whatever else it is to be told.

    Args:
        thinking: True or False, one of `REASONING_EFFORTS`, ``{"effort": ...}`` or ``{"type": "enabled"}`` and
            ``{"type": "disabled"}``; None says nothing.
        reasoning_effort: one of `REASONING_EFFORTS`; None says nothing.
        more: further arguments of the template, which go before these.

    Raises:
        InvalidRequest: a value is none of these.
    """
    if more is not None and not isinstance(more, Mapping):
        raise InvalidRequest(f"chat_template_kwargs={more!r} is not valid: a mapping of names and values.")
    said = _thinking(thinking) | ({} if reasoning_effort is None else _effort(reasoning_effort))
    return said | dict(more or {})


def _thinking(value: object) -> dict[str, Any]:
    if value is None:
        return {}
    if isinstance(value, bool):
        return {"enable_thinking": value}
    if isinstance(value, str):
        return _effort(value)
    if isinstance(value, Mapping):
        if value.get("effort") is not None:
            return _effort(value["effort"])
        kind = value.get("type")
        if kind in ("enabled", "adaptive", "disabled"):
            return {"enable_thinking": kind != "disabled"}
        if kind is None and value.keys() <= {"effort", "summary", "generate_summary"}:
            return {}
    raise InvalidRequest(f"thinking={value!r} is not valid: True, False or {', '.join(REASONING_EFFORTS)}.")


def _effort(value: object) -> dict[str, Any]:
    if value not in REASONING_EFFORTS:
        known = ", ".join(REASONING_EFFORTS)
        raise InvalidRequest(f"reasoning_effort={value!r} is not valid: one of {known}.")
    if value == "none":
        return {"enable_thinking": False}
    return {"enable_thinking": True, "reasoning_effort": value}


def check_timeout(value: object) -> float | None:
    """Seconds, or None for no limit.

    Raises:
        InvalidRequest: it is no number above 0.
    """
    if value is None:
        return None
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value <= 0:  # type: ignore[arg-type, operator]
        raise InvalidRequest(f"timeout={value!r} is not valid: a number of seconds above 0, or None.")
    return float(value)  # type: ignore[arg-type]


def one_name_each(
    values: Mapping[str, Any], names: Mapping[str, str], known: Collection[str]
) -> dict[str, Any]:
    """``values`` by our own names.

    Args:
        values: what was given.
        names: other names, and ours.
        known: names that stand for themselves even where they are another name too.

    Raises:
        InvalidSetting: one thing was given two values under two names.
    """
    found: dict[str, Any] = {}
    said: dict[str, str] = {}
    for name, value in values.items():
        own = name if name in known else names.get(name, name)
        if own in found and found[own] != value:
            raise InvalidSetting(
                f"{said[own]}={found[own]!r} and {name}={value!r} disagree: give one of them."
            )
        found[own], said[own] = value, name
    return found
