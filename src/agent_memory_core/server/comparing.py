"""Why a prompt could not go on from an earlier one: what clients ask about their cache, in both dialects.

Two prompts are compared by what they are made of, in the order in which a chat template writes it: the model, the
tools and the system prompt, then message by message.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

from agent_memory_core import ChatRequest, Message

Part = Literal["model", "system", "tools", "messages"]


@dataclass(frozen=True, slots=True)
class Outline:
    """What a prompt is made of, as hashes."""

    model: str
    system: str
    tools: str
    messages: tuple[str, ...]
    tokens: int = 0
    """How many tokens it and its answer have."""

    @classmethod
    def of(cls, request: ChatRequest, model: str, tokens: int = 0) -> Outline:
        """The outline of a request to ``model``."""
        messages, system = list(request.messages), ""
        if messages and messages[0].role == "system":
            system = messages.pop(0).content
        return cls(
            model,
            _hash(system),
            _hash([dict(tool) for tool in request.tools]),
            tuple(_hash(_as_told(message)) for message in messages),
            tokens,
        )

    def first_change(self, later: Outline) -> Part | None:
        """The first part in which a later prompt differs; None where it goes on from this one."""
        if self.model != later.model:
            return "model"
        if self.system != later.system:
            return "system"
        if self.tools != later.tools:
            return "tools"
        return None if later.messages[: len(self.messages)] == self.messages else "messages"


class Finding(NamedTuple):
    """What a comparison came to."""

    is_known: bool
    """Whether there is a record of the earlier prompt."""
    change: Part | None = None
    missed_tokens: int = 0
    """Tokens of the earlier prompt and its answer that were computed again."""
    reusable_tokens: int = 0
    """Tokens of the earlier prompt and its answer."""

    def anthropic(self) -> dict[str, Any] | None:
        """The value of `diagnostics` in Anthropic's dialect: null where all could be reused."""
        if not self.is_known:
            return {"cache_miss_reason": {"type": "previous_message_not_found"}}
        if self.change is not None:
            missed = {"type": f"{self.change}_changed", "cache_missed_input_tokens": self.missed_tokens}
            return {"cache_miss_reason": missed}
        # It was the same, and its keys and values were not there any more.
        return {"cache_miss_reason": {"type": "unavailable"}} if self.missed_tokens else None

    def openai(self) -> dict[str, Any]:
        """The value of `prompt_cache_diagnostics` in OpenAI's dialect."""
        if not self.is_known:
            return {"type": "comparison_response_not_found"}
        if self.change is None:
            return {"type": "unavailable" if self.missed_tokens else "cache_hit"}
        names = {"model": "model_changed", "tools": "tools_changed"}
        return {
            "type": "cache_miss",
            "reason": names.get(self.change, "input_changed"),
            "cache_missed_tokens": self.missed_tokens,
            "comparison_reusable_tokens": self.reusable_tokens,
        }


def compared(earlier: Outline | None, now: Outline, cached_tokens: int) -> Finding:
    """What a prompt, of which so many tokens were reused, could not reuse of an earlier one."""
    if earlier is None:
        return Finding(False)
    # The last token of an answer was never read by the model.
    missed = max(0, earlier.tokens - 1 - cached_tokens)
    return Finding(True, earlier.first_change(now), missed, earlier.tokens)


def _as_told(message: Message) -> dict[str, Any]:
    told = asdict(message)
    # Where a client marks places to go on from changes nothing of what the model reads.
    del told["cache_points"]
    return told


def _hash(value: object) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()[:32]
