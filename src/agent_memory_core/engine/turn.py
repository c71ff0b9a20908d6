"""One request on its way through the engine, and the report of what it came to."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence as ReadOnly
from dataclasses import dataclass, field

from agent_memory_core.blocks.block import Block, BlockHash
from agent_memory_core.blocks.branch import Branch
from agent_memory_core.engine.events import TurnInfo
from agent_memory_core.engine.misses import Expectation
from agent_memory_core.engine.model_runner import DecodeSlot
from agent_memory_core.engine.sequence import Sequence
from agent_memory_core.engine.session_book import LiveSession, Owner
from agent_memory_core.engine.sinks import OutputSink
from agent_memory_core.kv.restoration import Restoration
from agent_memory_core.messages import (
    ChatRequest,
    Delta,
    FinishReason,
    HitTier,
    InvalidToolCall,
    MissReason,
    SessionKey,
    TokenLogprob,
    TurnReport,
    Usage,
)
from agent_memory_core.structured.mask import CallMask, LogitsProcessor
from agent_memory_core.text.detokenizer import Detokenizer
from agent_memory_core.text.token_text import TokenText

_NOTHING = Delta()


@dataclass(slots=True, eq=False)
class Turn:
    """One request on its way through the engine. The engine's thread alone reads and writes it.

    What the scheduler decides is in ``sequence``, what the model holds in ``slot``; the rest is here.
    """

    sequence: Sequence
    """Its tokens, and how far they are computed."""
    sink: OutputSink
    """Where its deltas go."""
    key: SessionKey
    """Whose turn it is."""
    detokenizer: Detokenizer
    """Makes text of its tokens."""
    request: ChatRequest
    """What was asked for."""
    session: LiveSession | None
    """The session that it becomes a part of; None if it owns nothing."""
    branch: Branch[TokenText] | None
    """The branch that it continues; None if it begins one."""
    expected: Expectation
    """What can be reused of its prompt."""
    arrived: float
    """When the caller asked, by `time.perf_counter`, as all times here."""
    processors: list[LogitsProcessor] = field(default_factory=list)
    """What changes its logits before a token is sampled."""
    call_mask: CallMask | None = None
    """The one of ``processors`` that holds the calls of an answer that may be text as well."""
    pending_tokens: list[int] = field(default_factory=list)
    """Sampled tokens that go out with the next delta."""
    pending_logprobs: list[TokenLogprob] = field(default_factory=list)
    """One for each of these, if they were asked for."""
    answer_deltas: list[Delta] = field(default_factory=list)
    """All that was handed out."""
    tool_calls: int = 0
    """How many calls were handed out."""
    reasoning_tokens: int = 0
    """Tokens of the answer that are reasoning."""
    slot: DecodeSlot | None = None
    """Its place on the model; None until what is stored of its prompt was restored."""
    tier: HitTier = "none"
    """Where the restored tokens came from."""
    restoration: Restoration | None = field(default=None, repr=False)
    """Its live cache while the disk reads what is stored of its prompt."""
    restore_started: float = 0.0
    """When it was admitted."""
    restore_seconds: float = 0.0
    """How long it took to load and decode what is stored."""
    first_token: float = 0.0
    """When its first token was sampled; 0 before that."""
    windows: dict[int, Block] = field(default_factory=dict)
    """Window records of its latest blocks, by the number of the block."""
    kept: set[BlockHash] = field(default_factory=set)
    """Records that were handed to the disk before the turn has ended."""
    kept_tokens: int = 0
    """Prompt tokens that were computed when that was done last."""
    retained: dict[BlockHash, Block] = field(default_factory=dict)
    """Records that its branch needs besides blocks and tail."""
    unreadable: set[BlockHash] = field(default_factory=set)
    """Names of records that were matched on disk and could not be loaded."""

    @property
    def seq_id(self) -> int:
        """Its number in the engine."""
        return self.sequence.seq_id

    @property
    def info(self) -> TurnInfo:
        """Which turn it is, for observers."""
        return TurnInfo(self.seq_id, self.key, self.sequence.background)

    @property
    def owner(self) -> Owner:
        """Namespace and session id; only for a turn that has a session."""
        assert self.key.session_id is not None
        return self.key.namespace, self.key.session_id

    @property
    def checkpoints(self) -> tuple[int, ...]:
        """Places of the prompt at which later prompts may part from it."""
        return self.sequence.checkpoints

    @property
    def row(self) -> DecodeSlot:
        """What the model holds of it, from when it was restored on."""
        assert self.slot is not None
        return self.slot

    @property
    def answered(self) -> int:
        """Tokens that have KV and stand for text that was handed out."""
        if self.detokenizer.stopped:
            return min(self.row.fed, self.sequence.num_prompt + self.detokenizer.tokens_before_stop)
        return self.row.fed

    def hand_out(self, token: int, logprobs: ReadOnly[tuple[int, float]]) -> bool:
        """Hand out the text of a sampled token, if that is known yet; return whether it ends the answer.

        ``logprobs`` are the token's and those of the likeliest in its place, if they were asked for.
        """
        may_call = not self.detokenizer.is_reasoning
        delta = self.detokenizer.push(token)
        if self.call_mask is not None:
            self.call_mask.accept(token, is_call=may_call)
        self.tool_calls += len(delta.tool_calls)
        self.reasoning_tokens += bool(delta.reasoning)
        self.pending_tokens.append(token)
        if logprobs:
            self.pending_logprobs.append(self.detokenizer.logprob(logprobs))
        if delta != _NOTHING:
            self.sink.deliver(self._with_tokens(delta))
        return self.detokenizer.stopped

    def rest(self, reason: FinishReason) -> Delta | None:
        """What the detokenizer still held back, if that is anything; ``reason`` is why the answer ended."""
        rest = self.detokenizer.finish()
        if reason == "length" and rest.invalid_tool_calls:
            *others, cut = rest.invalid_tool_calls
            rest = dataclasses.replace(rest, invalid_tool_calls=(*others, self._cut(cut)))
        delta = self._with_tokens(rest)
        self.tool_calls += len(delta.tool_calls)
        return delta if delta != _NOTHING else None

    def _cut(self, call: InvalidToolCall) -> InvalidToolCall:
        """A call that the limit of tokens cut off, with an error that says so."""
        names = (str(tool.get("function", tool).get("name")) for tool in self.request.tools)
        name = next((name for name in names if name in call.text), None)
        most = self.request.sampling.max_tokens
        place = f"the call of {name}" if name else "a call"
        error = f"the answer ended at max_tokens={most} in the middle of {place}: raise max_tokens"
        return dataclasses.replace(call, error=error)

    def _with_tokens(self, delta: Delta) -> Delta:
        """A delta with the tokens sampled since the last one; some of them may have had no text of their own."""
        delta = dataclasses.replace(
            delta, token_ids=tuple(self.pending_tokens), logprobs=tuple(self.pending_logprobs)
        )
        self.pending_tokens.clear()
        self.pending_logprobs.clear()
        self.answer_deltas.append(delta)
        return delta

    def report(self, reason: FinishReason, completion: int, model: str) -> TurnReport:
        """What the turn did up to now; ``completion`` counts the tokens it generated."""
        sequence, now = self.sequence, time.perf_counter()
        return TurnReport(
            finish_reason=reason,
            usage=Usage(sequence.num_prompt, completion, sequence.num_cached, self.reasoning_tokens),
            hit_tier=self.tier if sequence.num_cached else "none",
            miss_reason=self.miss_reason,
            restore_seconds=self.restore_seconds,
            time_to_first_token=(self.first_token or now) - self.arrived,
            total_seconds=now - self.arrived,
            session_id=self.key.session_id,
            branch_id=self.branch.branch_id if self.branch else None,
            model=model,
            persisted=False,
            lane=self.key.lane,
            miss=self.expected.miss if self.miss_reason in ("diverged", "template") else None,
            stop_string=self.detokenizer.stop_string,
        )

    @property
    def miss_reason(self) -> MissReason:
        """Why prompt tokens that could have been known were computed."""
        if self.unreadable:
            return "damaged"
        sequence = self.sequence
        return self.expected.reason(sequence.num_prompt, sequence.num_cached, sequence.block_tokens)
