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
from collections.abc import Sequence
from dataclasses import dataclass, replace

from agent_memory_core.blocks.block import BlockHash, common_prefix
from agent_memory_core.blocks.branch import Branch
from agent_memory_core.engine.session_book import Owner, SessionBook
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


def answer_of(deltas: Sequence[Delta]) -> Message:
    """An answer as the message that its caller will send back."""
    unread = (call.text for delta in deltas for call in delta.invalid_tool_calls)
    text = "".join(delta.text for delta in deltas)
    return Message(
        "assistant",
        "\n".join(filter(None, (text, *unread))),
        tool_calls=tuple(call for delta in deltas for call in delta.tool_calls),
        reasoning="".join(delta.reasoning for delta in deltas) or None,
    )


def lasting_prefix(
    template: ChatTemplate, request: ChatRequest, answer: Message, branches: Sequence[TokenText] = ()
) -> tuple[int, ...]:
    """The token ids that every prompt begins with which goes on from ``answer`` to ``request``.

    Raises:
        InvalidRequest: the template refuses the answer, or what may follow it.
    """
    prompts = []
    for probe in _PROBES:
        messages = (*request.messages, answer, *_following(answer, probe))
        asked = replace(request, messages=messages)
        prompts.append(template.encode(asked, branches, generation_prompt=False).token_ids)
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
class EndedTurn:
    """A turn that has ended, as far as the next prompt depends on it."""

    request: ChatRequest
    answer: Message
    key: SessionKey
    root: BlockHash
    """What the chains of its namespace start from."""
    token_ids: tuple[int, ...]
    """The ids of the branch that held it when it ended."""

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
        ids = lasting_prefix(template, self.request, self.answer, [branch.text for branch in branches])
        goes_on = common_prefix(self.token_ids, ids) == len(self.token_ids)
        if goes_on or any(common_prefix(branch.token_ids, ids) == len(ids) for branch in branches):
            return ()
        return ids


@dataclass(frozen=True, slots=True)
class Prewarm:
    """A prompt worth prefilling, and for which session."""

    turn: EndedTurn
    prompt: Prompt


class BackgroundPrewarm:
    """The ended turns of one engine, the latest first, and the one whose next prompt is being prefilled.

    It says what to do, and the engine does it: ``next`` gives the prompt to start, ``withdraw`` and ``forget`` the
    turn to cancel.
    """

    def __init__(self, template: ChatTemplate, sessions: SessionBook, *, enabled: bool) -> None:
        """Without ``enabled`` there is never anything to do."""
        self._enabled = enabled
        self._template = template
        self._sessions = sessions
        self._ended: deque[EndedTurn] = deque(maxlen=KEPT)
        self._active: tuple[int, EndedTurn] | None = None

    def ended(self, turn: Turn, branch: Branch[TokenText]) -> None:
        """Remember a turn whose answer ``branch`` now holds."""
        if self._enabled and turn.sequence.max_tokens > 0:
            answer = answer_of(turn.answer_deltas)
            self._ended.append(
                EndedTurn(turn.request, answer, turn.key, turn.sequence.root, branch.token_ids)
            )

    def next(self) -> Prewarm | None:
        """The next prompt that is worth prefilling, if there is one."""
        while self._ended:
            turn = self._ended.pop()
            try:
                ids = turn.missing(self._template, self._sessions.open(turn.root, turn.owner).branches)
            except AgentMemoryError:
                # Nobody asked for it: if the template refuses it, the next turn will be told.
                continue
            if ids:
                return Prewarm(turn, Prompt(ids, "", 0, None))
        return None

    def started(self, seq_id: int, work: Prewarm) -> None:
        """A prompt given by `next` is being prefilled as the turn ``seq_id``."""
        self._active = seq_id, work.turn

    def closed(self) -> None:
        """The turn that was started is over."""
        self._active = None

    def withdraw(self) -> int | None:
        """A turn arrives: which turn must give way to it, if any. Its work is done later."""
        active, self._active = self._active, None
        if active is None:
            return None
        self._ended.append(active[1])
        return active[0]

    def forget(self, owner: Owner) -> int | None:
        """A session is being forgotten: which turn works for it, if any."""
        self._ended = deque((turn for turn in self._ended if turn.owner != owner), KEPT)
        if self._active is None or self._active[1].owner != owner:
            return None
        seq_id, self._active = self._active[0], None
        return seq_id
