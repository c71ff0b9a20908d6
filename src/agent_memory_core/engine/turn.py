"""One request on its way through the engine, and the report of what it came to."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence as ReadOnly
from dataclasses import dataclass, field

from agent_memory_core.blocks.block import Block, BlockHash
from agent_memory_core.blocks.branch import Branch
from agent_memory_core.engine.model_runner import DecodeSlot
from agent_memory_core.engine.sequence import Sequence
from agent_memory_core.engine.session_book import LiveSession, Owner
from agent_memory_core.engine.sinks import OutputSink
from agent_memory_core.messages import (
    ChatRequest,
    Delta,
    FinishReason,
    HitTier,
    MissReason,
    SessionKey,
    TokenLogprob,
    TurnReport,
    Usage,
)
from agent_memory_core.structured.mask import LogitsProcessor
from agent_memory_core.text.detokenizer import Detokenizer
from agent_memory_core.text.token_text import TokenText


@dataclass(slots=True, eq=False)
class Turn:
    """One request on its way through the engine.

    ``session`` is None where the turn owns nothing; ``branch`` is the one it continues. ``known`` is how many
    prompt tokens some branch of the session holds, ``state`` why that may be less than it could be. ``checkpoints`` are
    places of the prompt where others may part from it, ``windows`` the window records of its latest blocks by index,
    ``retained`` the records that its branch will need besides blocks and tail; ``lost`` names what could not be loaded.
    """

    sequence: Sequence
    sink: OutputSink
    key: SessionKey
    detokenizer: Detokenizer
    request: ChatRequest
    session: LiveSession | None
    branch: Branch[TokenText] | None
    known: int
    state: MissReason
    arrived: float
    processors: list[LogitsProcessor] = field(default_factory=list)
    pending: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    said: list[Delta] = field(default_factory=list)
    tool_calls: int = 0
    reasoning_tokens: int = 0
    slot: DecodeSlot | None = None
    tier: HitTier = "none"
    restore_started: float = 0.0
    restore_seconds: float = 0.0
    first_token: float = 0.0
    damaged: bool = False
    checkpoints: tuple[int, ...] = ()
    windows: dict[int, Block] = field(default_factory=dict)
    retained: dict[BlockHash, Block] = field(default_factory=dict)
    lost: set[BlockHash] = field(default_factory=set)

    @property
    def owner(self) -> Owner:
        """Namespace and session id; only for a turn that has a session."""
        assert self.key.session_id is not None
        return self.key.namespace, self.key.session_id

    def with_tokens(self, delta: Delta) -> Delta:
        """A delta with the tokens sampled since the last one; some of them may have had no text of their own."""
        delta = dataclasses.replace(delta, token_ids=tuple(self.pending), logprobs=tuple(self.logprobs))
        self.pending.clear()
        self.logprobs.clear()
        self.said.append(delta)
        return delta

    def sampled(self, token: int, logprobs: ReadOnly[tuple[int, float]]) -> None:
        """A token of the answer: it goes out with the next delta, and what is known of its probability too."""
        self.pending.append(token)
        if logprobs:
            self.logprobs.append(self.detokenizer.logprob(logprobs))

    def report(self, reason: FinishReason, completion: int, model: str) -> TurnReport:
        """What the turn did, up to now; ``completion`` counts the tokens it generated."""
        sequence, now = self.sequence, time.perf_counter()
        return TurnReport(
            finish_reason=reason,
            usage=Usage(sequence.num_prompt, completion, sequence.num_cached, self.reasoning_tokens),
            hit_tier=self.tier if sequence.num_cached else "none",
            miss_reason=self.miss,
            restore_seconds=self.restore_seconds,
            time_to_first_token=(self.first_token or now) - self.arrived,
            total_seconds=now - self.arrived,
            session_id=self.key.session_id,
            branch_id=self.branch.branch_id if self.branch else None,
            model=model,
            persisted=False,
        )

    @property
    def miss(self) -> MissReason:
        """Why prompt tokens that could have been known were computed."""
        if self.damaged:
            return "damaged"
        known = min(self.known, self.sequence.num_prompt - 1)
        if self.state:
            # Where they part inside a block, a small part of it is computed by rule.
            known -= known % self.sequence.block_tokens
        return "evicted" if self.sequence.num_cached < known else self.state


@dataclass(slots=True)
class Counters:
    """What an engine has done since it began."""

    turns: int = 0
    cancelled: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    cache_read: int = 0
    completion_tokens: int = 0
    blocks_sealed: int = 0
    steps: int = 0
    misses: dict[str, int] = field(default_factory=dict)
    background_prefills: int = 0
    background_tokens: int = 0

    def add(self, report: TurnReport, *, background: bool = False) -> None:
        """Count a turn that ended; background work is no turn."""
        if background:
            self.background_prefills += 1
            self.background_tokens += report.usage.cache_creation
            return
        self.turns += 1
        self.prompt_tokens += report.usage.prompt_tokens
        self.cache_read += report.usage.cache_read
        self.completion_tokens += report.usage.completion_tokens
        if report.miss_reason:
            self.misses[report.miss_reason] = self.misses.get(report.miss_reason, 0) + 1
