"""Background work: what the template will say of a turn next time is prefilled while nobody waits for anything.

Some templates rewrite history: they strip thinking from earlier answers, or write a call in other letters than the
model did. The next prompt then parts from what the branch holds, and the answer would be computed once more while its
user waits. So after a turn the conversation is rendered as it will be once another message follows; where that
differs from the branch, it is prefilled as a turn without an answer. It moves the branch, or forks it, as the next
prompt would have (see `branch`), and is committed as any turn.

Background work begins when no turn is in flight and is withdrawn when one is submitted: its whole blocks stay findable,
the session is as it was, and it begins again later.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from agent_memory_core.blocks.block import common_prefix
from agent_memory_core.blocks.branch import Branch
from agent_memory_core.engine.session_book import Owner
from agent_memory_core.engine.turn import Turn
from agent_memory_core.errors import AgentMemoryError
from agent_memory_core.messages import ChatRequest, Delta, Message, SessionKey
from agent_memory_core.text.chat_template import ChatTemplate
from agent_memory_core.text.token_text import Prompt, TokenText

KEPT = 64
"""Ended turns that are remembered; older ones are let go."""

SEAM = 8
"""Tokens after the last special token that are left to the next prompt: text that follows might join them."""

_PROBES = ("a", "\n\n1")
"""Two things that may be said next, as unlike as can be: what both prompts begin with, all do."""


def said(deltas: Sequence[Delta]) -> Message:
    """An answer as the message that its caller will send back."""
    unread = (call.text for delta in deltas for call in delta.invalid_tool_calls)
    text = "".join(delta.text for delta in deltas)
    return Message(
        "assistant",
        "\n".join(filter(None, (text, *unread))),
        tool_calls=tuple(call for delta in deltas for call in delta.tool_calls),
        reasoning="".join(delta.reasoning for delta in deltas) or None,
    )


def lasting(
    template: ChatTemplate, request: ChatRequest, answer: Message, known: Sequence[TokenText] = ()
) -> tuple[int, ...]:
    """The token ids that every prompt begins with which goes on from ``answer`` to ``request``.

    Raises:
        InvalidRequest: the template refuses the answer, or what may follow it.
    """
    prompts = []
    for probe in _PROBES:
        messages = (*request.messages, answer, *_following(answer, probe))
        asked = replace(request, messages=messages)
        prompts.append(template.encode(asked, known, generation_prompt=False).token_ids)
    ids = prompts[0][: common_prefix(*prompts)]
    pieces = template.tokenizer.text_of(ids[-2 * SEAM :]).pieces
    open_end = pieces[-1].end - pieces[-1].start if len(pieces) > 1 else 0
    # A special token is a piece of one token, and nothing joins it.
    return ids[: len(ids) - open_end] if 1 < open_end <= SEAM else ids


def _following(answer: Message, text: str) -> tuple[Message, ...]:
    """What comes after an answer: the results of its calls, or the user's next word."""
    if not answer.tool_calls:
        return (Message("user", text),)
    return tuple(Message("tool", text, call.name, tool_call_id=call.id) for call in answer.tool_calls)


@dataclass(frozen=True, slots=True)
class Ended:
    """A turn that has ended: what was said, whose it is, and the ids of the branch that held it then."""

    request: ChatRequest
    answer: Message
    key: SessionKey
    token_ids: tuple[int, ...]

    @property
    def owner(self) -> Owner:
        """Namespace and session id."""
        assert self.key.session_id is not None
        return self.key.namespace, self.key.session_id

    def missing(self, template: ChatTemplate, branches: Sequence[Branch[TokenText]]) -> tuple[int, ...]:
        """What should be known of the next prompt and is not.

        Nothing where it goes on from the branch as it is, or where that branch is no more: something was said since,
        or the session was forgotten.
        """
        if all(branch.token_ids != self.token_ids for branch in branches):
            return ()
        ids = lasting(template, self.request, self.answer, [branch.text for branch in branches])
        goes_on = common_prefix(self.token_ids, ids) == len(self.token_ids)
        if goes_on or any(common_prefix(branch.token_ids, ids) == len(ids) for branch in branches):
            return ()
        return ids


class BackgroundPrewarm:
    """The ended turns of one engine, the latest first, and the one that is being prefilled.

    Args:
        enabled: whether there is any background work at all.
        template: the model's own.
        branches: the branches of a session as they stand now.
        start: queues a prefill of the prompt for a session and returns its id.
        stop: withdraws it; says whether it was still in flight.
    """

    def __init__(
        self,
        enabled: bool,
        template: ChatTemplate,
        branches: Callable[[Owner], Sequence[Branch[TokenText]]],
        start: Callable[[ChatRequest, SessionKey, Prompt], int],
        stop: Callable[[int], bool],
    ) -> None:
        self._enabled = enabled
        self._template = template
        self._branches = branches
        self._start = start
        self._stop = stop
        self._ended: deque[Ended] = deque(maxlen=KEPT)
        self._active: tuple[int, Ended] | None = None

    def ended(self, turn: Turn, branch: Branch[TokenText]) -> None:
        """Remember a turn whose answer ``branch`` now holds."""
        if self._enabled and turn.sequence.max_tokens > 0:
            self._ended.append(Ended(turn.request, said(turn.said), turn.key, branch.token_ids))

    def begin(self) -> bool:
        """Start what is worth prefilling, with nothing in flight; say whether there was any."""
        self._active = None
        while self._ended:
            work = self._ended.pop()
            try:
                ids = work.missing(self._template, self._branches(work.owner))
                if ids:
                    self._active = self._start(work.request, work.key, Prompt(ids, "", 0, None)), work
                    return True
            except AgentMemoryError:
                # Nobody asked for it: where it does not fit, the next turn pays or is refused.
                continue
        return False

    def give_way(self) -> None:
        """A turn arrives: withdraw what is under way, and begin it again later."""
        active, self._active = self._active, None
        if active is not None and self._stop(active[0]):
            self._ended.append(active[1])

    def forget(self, owner: Owner) -> None:
        """Withdraw what is under way for a session that is about to be forgotten, and forget what it said."""
        if self._active is not None and self._active[1].owner == owner:
            self.give_way()
        self._ended = deque((work for work in self._ended if work.owner != owner), KEPT)
