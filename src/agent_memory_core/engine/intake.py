"""A request becomes a turn: its prompt as token ids, the branch it continues, and what can be expected of it."""

from __future__ import annotations

import time
from collections.abc import Sequence as ReadOnly

from agent_memory_core.blocks.block import BlockHash, common_prefix, root_hash
from agent_memory_core.blocks.branch import Branch
from agent_memory_core.config import EngineConfig
from agent_memory_core.engine.misses import Expectation, MissFinder
from agent_memory_core.engine.persistence import Persistence
from agent_memory_core.engine.preparing import Preparation
from agent_memory_core.engine.prewarm import Prewarm
from agent_memory_core.engine.results import PreparedPrompt
from agent_memory_core.engine.retention import KvRetention
from agent_memory_core.engine.sequence import Sequence
from agent_memory_core.engine.session_book import SessionBook
from agent_memory_core.engine.sinks import DISCARD, OutputSink
from agent_memory_core.engine.turn import Turn
from agent_memory_core.kv.records import KvBlocks
from agent_memory_core.messages import ChatRequest, MissReason, SessionKey
from agent_memory_core.models.loader import LoadedModel
from agent_memory_core.structured.grammar import Grammars
from agent_memory_core.structured.thinking import thinking_limit
from agent_memory_core.text.detokenizer import Detokenizer, starts_in_reasoning
from agent_memory_core.text.token_text import Prompt, TokenText

FORMAT = "1"
"""Version of what blocks hold; part of every root."""


class Intake:
    """Makes the turns of one engine."""

    def __init__(
        self,
        loaded: LoadedModel,
        config: EngineConfig,
        preparation: Preparation,
        blocks: KvBlocks,
        sessions: SessionBook,
        retention: KvRetention,
        disk: Persistence,
    ) -> None:
        self._loaded = loaded
        self._block_tokens = config.block_tokens
        self._preparation = preparation
        self._grammars = Grammars(loaded.tokenizer, preparation.template)
        self._misses = MissFinder(preparation.template)
        self._blocks = blocks
        self._resume = blocks.resume
        self._sessions = sessions
        self._retention = retention
        self._disk = disk
        self._roots: dict[str, BlockHash] = {}

    def root(self, namespace: str) -> BlockHash:
        """What the chains of a namespace start from; walls between namespaces begin here."""
        if namespace not in self._roots:
            identity = {
                "format": FORMAT,
                "model": self._loaded.fingerprint,
                "namespace": namespace,
                **self._blocks.identity(),
            }
            root = root_hash(identity)
            self._disk.identify(root, identity | {"name": self._loaded.name}, namespace)
            self._roots[namespace] = root
        return self._roots[namespace]

    def turn(
        self,
        seq_id: int,
        request: ChatRequest,
        key: SessionKey,
        sink: OutputSink,
        *,
        prewarm: bool,
        arrived: float = 0,
        prepared: PreparedPrompt | None = None,
        background: bool = False,
    ) -> Turn:
        """Make a turn of a request.

        Args:
            seq_id: its number in the engine.
            request: what is asked for.
            key: whose turn it is.
            sink: where its deltas go.
            prewarm: whether only the prompt is to be evaluated.
            arrived: when the caller asked, by `time.perf_counter`; 0 means now.
            prepared: the prompt, where it is known already; else the request is rendered and tokenised.
            background: whether nobody waits for it.

        Raises:
            InvalidRequest: the template cannot render it, or its form cannot be held to.
        """
        root = self.root(key.namespace)
        session = self._sessions.open(root, (key.namespace, key.session_id)) if key.session_id else None
        branches = session.branches if session else []
        if prepared is None:
            prepared = self._preparation.prepare(request, [b.text for b in branches], asks=not prewarm)
        prompt = prepared.prompt
        nearest = max(branches, key=lambda b: common_prefix(b.token_ids, prompt.token_ids), default=None)
        expected = self._expect(root, key, request, prompt, branches, nearest)
        owned = session if not key.ephemeral else None
        sequence = Sequence(
            seq_id=seq_id,
            root=root,
            token_ids=list(prompt.token_ids),
            max_tokens=0 if prewarm else request.sampling.max_tokens,
            block_tokens=self._block_tokens,
            hashes=nearest.hashes[: expected.shared // self._block_tokens] if nearest else [],
            reads_tier=session is not None,
            background=background,
            checkpoints=prepared.checkpoints,
            branch_tail=nearest.tail if nearest else None,
            stops_at_checkpoints=self._resume.stops_at_checkpoints,
        )
        turn = Turn(
            sequence=sequence,
            sink=sink,
            key=key,
            detokenizer=self._detokenizer(request, prompt),
            request=request,
            session=owned,
            branch=owned.continued_by(prompt.token_ids, key.lane) if owned else None,
            expected=expected,
            arrived=arrived or time.perf_counter(),
        )
        if not prewarm:
            turn.call_mask = self._grammars.call_mask(request, prompt)
            turn.processors = [
                *thinking_limit(self._loaded.tokenizer, request.thinking_budget, prompt),
                *self._grammars.processors(request, prompt),
                *filter(None, [turn.call_mask]),
            ]
        return turn

    def known(self, key: SessionKey) -> list[TokenText]:
        """The branches of a session, as far as they are known."""
        if not key.session_id:
            return []
        session = self._sessions.open(self.root(key.namespace), (key.namespace, key.session_id))
        return [branch.text for branch in session.branches]

    def background_turn(self, seq_id: int, work: Prewarm) -> Turn:
        """Make a turn without an answer of background work. Raises as `turn` does."""
        asked = work.turn
        prepared = self._preparation.with_checkpoints(asked.request, work.prompt)
        return self.turn(
            seq_id, asked.request, asked.key, DISCARD, prewarm=True, prepared=prepared, background=True
        )

    def _detokenizer(self, request: ChatRequest, prompt: Prompt) -> Detokenizer:
        tokenizer = self._loaded.tokenizer
        return Detokenizer(
            tokenizer,
            stop=request.sampling.stop,
            calls=self._grammars.call_parser(request),
            in_reasoning=starts_in_reasoning(tokenizer, prompt.text),
        )

    def _expect(
        self,
        root: BlockHash,
        key: SessionKey,
        request: ChatRequest,
        prompt: Prompt,
        branches: ReadOnly[Branch[TokenText]],
        nearest: Branch[TokenText] | None,
    ) -> Expectation:
        """What can be reused of a prompt, of which ``nearest`` is the nearest branch."""
        anywhere = self._resume.at_any_token
        if nearest is None:
            hint = (
                self._sessions.miss_hint(root, (key.namespace, key.session_id)) if key.session_id else "new"
            )
            return Expectation(hint=self._or_unsupported(hint), resumes_anywhere=anywhere)
        shared = common_prefix(nearest.token_ids, prompt.token_ids)
        leaves = shared < len(nearest.token_ids)
        miss = self._misses.find(request, prompt, branches, nearest, key.lane)
        hint = miss.reason if miss else ""
        if not leaves and self._retention.ends_in_token_tail(root, nearest):
            hint = "boundary"
        return Expectation(shared, leaves, self._or_unsupported(hint), miss, anywhere)

    def _or_unsupported(self, hint: MissReason) -> MissReason:
        return "unsupported" if self._resume.unsupported else hint
