"""Why prompt tokens were computed although a session has, or might have had, their keys and values.

A prompt misses nothing where all that it shares with a branch of its session was reused: a retry, a regenerated answer,
another last message, the first turn of an agent with a prompt of its own. It misses something where a message, the
system prompt or the tools that were there before are others now. Then the first difference is looked for: in which
message it is, and what stands there in the branch and in the prompt.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from agent_memory_core.blocks.block import common_prefix
from agent_memory_core.blocks.branch import Branch
from agent_memory_core.errors import InvalidRequest
from agent_memory_core.messages import (
    ChatRequest,
    Message,
    Miss,
    MissPart,
    MissReason,
    SessionKey,
    TurnReport,
)
from agent_memory_core.text.chat_template import TEMPLATE_ERRORS, ChatTemplate
from agent_memory_core.text.token_text import GUARD, Prompt, TokenText, unguarded

logger = logging.getLogger("agent_memory")

SHOWN = 80
"""How many characters of a difference are shown."""

MAX_LANES = 256
"""Of how many lanes it is remembered that they missed something."""

_COLD: frozenset[MissReason] = frozenset({"diverged", "template", "evicted"})


@dataclass(frozen=True, slots=True)
class Expectation:
    """What can be reused of a prompt, and why that may be less than it could be."""

    shared: int = 0
    """The tokens that the prompt shares with a branch of its session."""
    leaves: bool = False
    """Whether the branch goes on otherwise than the prompt."""
    hint: MissReason = ""
    """Why less may be known than could be."""
    miss: Miss | None = None
    """Where the prompt differs from the branch, if that costs something."""
    resumes_anywhere: bool = True
    """Whether the model can be resumed at any token."""

    def reason(self, num_prompt: int, num_cached: int, block_tokens: int) -> MissReason:
        """Why prompt tokens that could have been known were computed, once it is known how many were not."""
        expected = min(self.shared, num_prompt - 1)
        if self.hint or self.leaves:
            # If the prompt parts from its branch inside a block, a small part of that block is always computed.
            expected -= expected % block_tokens
            if not self.resumes_anywhere:
                return "boundary" if num_cached < expected and not self.hint else self.hint
        return "evicted" if num_cached < expected else self.hint


class MissFinder:
    """Finds the first difference between a prompt and the branch that it might have continued. For one thread."""

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template

    def find(
        self,
        request: ChatRequest,
        prompt: Prompt,
        branches: Sequence[Branch[TokenText]],
        nearest: Branch[TokenText],
        lane: str,
    ) -> Miss | None:
        """What the prompt misses of ``nearest``, the one of ``branches`` with which it shares most; None if nothing."""
        shared = common_prefix(nearest.token_ids, prompt.token_ids)
        if shared >= min(len(nearest.token_ids), len(prompt.token_ids) - 1):
            return None
        if all(branch.lane != lane for branch in branches):
            return None
        at = common_prefix(nearest.text.text, prompt.text)
        index, part = self._place(request, prompt.text, at)
        if index == len(request.messages) - 1 and part != "tools":
            return None
        return Miss(
            reason="template" if shared >= nearest.prompt_tokens else "diverged",
            part=part,
            message=index,
            token=shared,
            character=at - prompt.text.count(GUARD, 0, at),
            before=unguarded(nearest.text.text[at : at + SHOWN]),
            now=unguarded(prompt.text[at : at + SHOWN]),
        )

    def _message_at(self, request: ChatRequest, text: str, at: int) -> int | None:
        """The last message whose content begins at or before a character; None where that stands before all of them."""
        low, high = 0, len(request.messages)
        while low < high:
            middle = (low + high) // 2
            if self._start(request, text, middle) <= at:
                low = middle + 1
            else:
                high = middle
        return low - 1 if low else None

    def _start(self, request: ChatRequest, text: str, index: int) -> int:
        """The character of the prompt at which the content of a message begins."""
        message = request.messages[index]
        other = "1" if message.content[:1] != "1" else "a"
        changed = Message(message.role, other, message.name, tool_call_id=message.tool_call_id)
        asked = dataclasses.replace(request, messages=(*request.messages[:index], changed))
        try:
            probe = self._template.render(asked, generation_prompt=False)
        except (InvalidRequest, *TEMPLATE_ERRORS):
            # Some templates refuse a conversation that ends there.
            return 0
        return common_prefix(probe, text)

    def _place(self, request: ChatRequest, text: str, at: int) -> tuple[int | None, MissPart]:
        """The message and the part of the prompt in which a character stands."""
        index = self._message_at(request, text, at)
        if index is None:
            return None, "tools" if request.tools else "system"
        message = request.messages[index]
        if at >= self._start(request, text, index) + len(message.content) and index + 1 < len(
            request.messages
        ):
            # Behind a message's content comes the head of the next one, and behind a system message often the tools.
            if message.role == "system" and self._is_in_tools(request, text, index, at):
                return index, "tools"
            index += 1
        return index, "system" if request.messages[index].role == "system" else "messages"

    def _is_in_tools(self, request: ChatRequest, text: str, index: int, at: int) -> bool:
        """Whether a character between two messages is further from the second than its head is long."""
        if not request.tools:
            return False
        bare = dataclasses.replace(request, tools=())
        plain = self._template.render(bare, generation_prompt=False)
        end = self._start(bare, plain, index) + len(request.messages[index].content)
        head = self._start(bare, plain, index + 1) - end
        return self._start(request, text, index + 1) - at > head


class ColdLanes:
    """Warns once of every lane of a session that has missed something twice. For one thread."""

    def __init__(self) -> None:
        self._misses: OrderedDict[tuple[SessionKey, str], int] = OrderedDict()

    def add(self, key: SessionKey, report: TurnReport) -> None:
        """Take the report of a turn."""
        if key.session_id is None or key.ephemeral or report.miss_reason not in _COLD:
            return
        lane = (key, key.lane)
        count = self._misses.pop(lane, 0) + 1
        self._misses[lane] = count
        if len(self._misses) > MAX_LANES:
            self._misses.popitem(last=False)
        if count == 2:
            logger.warning(_warning(report))


def _warning(report: TurnReport) -> str:
    """A sentence for logs, without any text of the conversation."""
    computed = report.usage.cache_creation
    said = f"a session was computed anew twice ({report.miss_reason}, {computed} tokens this time)"
    miss = report.miss
    if miss is None:
        return f"{said}: its keys and values made room for others, give the memory a larger budget"
    place = miss.part if miss.message is None else f"{miss.part}, message {miss.message}"
    return f"{said}: what was there before differs at character {miss.character} ({place}){_guess(miss)}"


def _guess(miss: Miss) -> str:
    """What most likely differs, as far as the texts tell."""
    if miss.part == "tools":
        return ": the tools changed, or came in another order"
    if re.match(r"[\d:.\-/ TZ]*\d", miss.before) and re.match(r"[\d:.\-/ TZ]*\d", miss.now):
        return ": it looks like a clock, a date or a counter"
    if re.match(r"[0-9a-f\-]{8}", miss.before) and re.match(r"[0-9a-f\-]{8}", miss.now):
        return ": it looks like an id that is made anew every time"
    if miss.part == "messages":
        return ": earlier messages were changed, dropped or put in another order"
    return ""
