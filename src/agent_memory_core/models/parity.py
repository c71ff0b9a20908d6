"""Whether a model answers in a batch, and from what is at rest, as it does alone and uninterrupted.

mlx-lm runs many families, and a few of them give other logits in a batch: a mask that is not passed on, a layer that
reuses another's keys, a shape that only fits one row. No look at a model's name finds that out; comparing logits does.

    batched    rows of unlike length decode together, and each alone on the same tokens
    resumed    at every block boundary a cache is taken apart and put together, and both go on

A *gap* is the largest difference of two logits in units of their spread. Rounding in a batch is of the order of the
dtype's precision; what is wrong by design is far beyond it, and on most steps. So of each row's gaps the median
counts, and of these the largest.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import Any

import mlx.core as mx
from mlx_lm.generate import BatchGenerator, generation_stream
from mlx_lm.models.cache import make_prompt_cache

from agent_memory_core.errors import StoreError
from agent_memory_core.kv.layout import KvLayout
from agent_memory_core.storage.catalog import Catalog

log = logging.getLogger("agent_memory")

LENGTHS = (5, 23, 11)
STEPS = 5
LIMITS = {mx.float32: 2e-3, mx.float16: 0.1, mx.bfloat16: 0.1}
"""Largest gap that passes, by the dtype of the logits."""

_NO_BATCH = "mlx-lm has no batched form of its caches"


@dataclass(frozen=True, slots=True)
class ParityResult:
    """What was found. A gap is None where it was not looked for; ``reason`` says why a batch was refused."""

    batched: bool
    batched_gap: float | None = None
    resumed: bool = True
    resumed_gap: float | None = None
    boundaries: int = 0
    limit: float = 0.0
    reason: str = ""

    def to_json(self) -> str:
        """As it is recorded."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> ParityResult:
        """The inverse of `to_json`."""
        return cls(**json.loads(text))


class ParityCheck:
    """What is known of one model, found out when it is first asked for, and recorded where there is a catalog."""

    def __init__(
        self, model: Any, layout: KvLayout, fingerprint: str, vocab_size: int, catalog: Catalog | None
    ) -> None:
        self._model, self._layout, self._vocab_size = model, layout, vocab_size
        self._catalog = catalog
        self._key = parity_key(fingerprint, layout)
        recorded = catalog.note(self._key) if catalog is not None else None
        self.result = _read(recorded) if recorded is not None else None
        if self.result is not None and not self.resumes:
            log.warning(
                "this model goes on otherwise from what is at rest than uninterrupted (by %.2g of its logits' spread): "
                "nothing of it is stored.",
                self.result.resumed_gap,
            )

    @property
    def resumes(self) -> bool:
        """Whether the model may be stored, as far as is known."""
        return self.result is None or self.result.resumed

    def may_batch(self) -> bool:
        """Whether rows may decode together."""
        if self.result is None:
            self.record(_FOUND.get(self._key) or check_batched(self._model, self._layout, self._vocab_size))
        assert self.result is not None
        if not self.result.batched:
            log.warning("this model decodes one sequence at a time: %s.", self.result.reason)
        return self.result.batched

    def verify(self, block_tokens: int, blocks: int = 8) -> ParityResult:
        """Look anew, also at resuming at every block boundary, and record what is found."""
        batched = check_batched(self._model, self._layout, self._vocab_size)
        gap, limit = check_resumed(self._model, self._layout, self._vocab_size, block_tokens, blocks)
        found = replace(batched, resumed=gap <= limit, resumed_gap=gap, boundaries=blocks, limit=limit)
        self.record(found)
        return found

    def record(self, result: ParityResult) -> None:
        """Take note of a result."""
        self.result = _FOUND[self._key] = result
        if self._catalog is not None:
            try:
                self._catalog.write_note(self._key, result.to_json())
            except StoreError as error:
                log.warning("a result could not be recorded: %s", error)


_FOUND: dict[str, ParityResult] = {}


def _read(recorded: str) -> ParityResult | None:
    """A recorded result; one of another form was never made."""
    try:
        return ParityResult.from_json(recorded)
    except (ValueError, TypeError) as error:
        log.warning("what was recorded of this model cannot be read, so it is looked at anew: %s", error)
        return None


def parity_key(fingerprint: str, layout: KvLayout) -> str:
    """What a result is about: it holds for this model, on this device, with these versions."""
    versions = [f"{name} {version(name)}" for name in ("mlx", "mlx-lm")]
    return json.dumps(["parity", fingerprint, layout.describe(), str(mx.default_device()), *versions])


def check_batched(model: Any, layout: KvLayout, vocab_size: int) -> ParityResult:
    """Compare a batch with its rows alone."""
    if not layout.batches:
        return ParityResult(False, reason=_NO_BATCH)
    rows = [_prompt(length, vocab_size) for length in LENGTHS]
    with mx.stream(generation_stream):
        try:
            gap, limit = _batched_gap(model, rows)
        except (ValueError, TypeError, AttributeError, IndexError, RuntimeError) as error:
            # A family that cannot run in a batch at all says so in whatever way its code happens to fail.
            return ParityResult(False, reason=f"a batch of it fails: {error}")
    if gap > limit:
        why = f"its logits in a batch differ from those of a row alone by {gap:.2g} of their spread"
        return ParityResult(False, gap, limit=limit, reason=why)
    return ParityResult(True, gap, limit=limit)


def check_resumed(
    model: Any, layout: KvLayout, vocab_size: int, block_tokens: int, blocks: int
) -> tuple[float, float]:
    """The largest gap between a resumed cache and one that goes on, over all block boundaries, and its limit."""
    ids = _prompt(block_tokens * (blocks + 1), vocab_size)
    live = make_prompt_cache(model)
    worst = 0.0
    limit = LIMITS[mx.float32]
    with mx.stream(generation_stream):
        _logits(model, ids[:block_tokens], live)
        for at in range(block_tokens, len(ids), block_tokens):
            copy = _copied(layout, live, at, block_tokens)
            new = ids[at : at + block_tokens]
            kept, resumed = _logits(model, new, live), _logits(model, new, copy)
            worst = max(worst, _gap(kept, resumed))
            limit = LIMITS.get(kept.dtype, limit)
    return worst, limit


def _copied(layout: KvLayout, live: list[Any], length: int, block_tokens: int) -> list[Any]:
    """A live cache by way of what is kept of it at rest, unencoded."""
    spans = list(itertools.pairwise([*range(0, length, block_tokens), length]))
    start = max(0, length - layout.reach)
    parts = [layout.cut(live, *span) for span in spans]
    windows = [layout.cut_window(live, max(start, a), b) for a, b in spans if b > start]
    copy = layout.join(parts, windows, layout.snapshot(live), length, block_tokens)
    mx.eval(layout.arrays(copy))
    return copy


def _batched_gap(model: Any, rows: Sequence[list[int]]) -> tuple[float, float]:
    generator = BatchGenerator(model, completion_batch_size=len(rows), prefill_batch_size=len(rows))
    generator.close()
    caches, firsts = [], []
    for ids in rows:
        caches.append(make_prompt_cache(model))
        firsts.append(_likeliest(_logits(model, ids, caches[-1])))
    uids = generator.insert(
        [[token] for token in firsts],
        max_tokens=[STEPS] * len(rows),
        caches=caches,
        all_tokens=[list(r) for r in rows],
    )
    seen: dict[int, list[Any]] = {uid: [] for uid in uids}
    while any(len(found) < STEPS for found in seen.values()):
        for response in generator.next()[1]:
            seen[response.uid].append(response)
    gaps = []
    for ids, first, uid in zip(rows, firsts, uids, strict=True):
        tokens = [first, *(response.token for response in seen[uid])]
        alone = _alone(model, ids, tokens[:-1])
        pairs = zip((response.logprobs for response in seen[uid]), alone, strict=True)
        gaps.append(statistics.median(_gap(one, other) for one, other in pairs))
    return max(gaps), LIMITS.get(alone[0].dtype, LIMITS[mx.float32])


def _alone(model: Any, prompt: list[int], tokens: list[int]) -> list[mx.array]:
    """The log-probabilities after each of ``tokens``, fed one by one behind the prompt."""
    cache = make_prompt_cache(model)
    _logits(model, prompt, cache)
    found = []
    for token in tokens:
        logits = _logits(model, [token], cache)
        found.append((logits - mx.logsumexp(logits, axis=-1, keepdims=True))[0])
    return found


def _logits(model: Any, ids: list[int], cache: list[Any]) -> mx.array:
    logits: mx.array = model(mx.array([ids]), cache=cache)[:, -1, :]
    mx.eval(logits)
    return logits


def _gap(one: mx.array, other: mx.array) -> float:
    one, other = one.astype(mx.float32), other.astype(mx.float32)
    gap: float = (mx.abs(one - other).max() / (mx.std(one) + 1e-9)).item()  # type: ignore[assignment]
    return float("inf") if math.isnan(gap) else gap


def _likeliest(logits: mx.array) -> int:
    token: int = mx.argmax(logits).item()  # type: ignore[assignment]
    return token


def _prompt(length: int, vocab_size: int) -> list[int]:
    """Tokens that are spread over the vocabulary, the same at every call."""
    return [(7919 * (index + 1)) % vocab_size for index in range(length)]
