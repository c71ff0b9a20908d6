"""Whether a model answers in a batch as it does alone, and resumed from records as it does uninterrupted.

mlx-lm runs many families, and a few of them give other logits in a batch: a mask that is not passed on, a layer that
uses another layer's keys, a shape that fits one row only. A model's name does not tell that; comparing logits does.

    batched    prompts of different lengths are decoded together, and each of them alone with the same tokens
    resumed    at every block boundary a copy of the cache is made as if from records, and both continue

How far two rows of logits lie apart is measured as a *gap*, see ``kv/parity_runs.py``. Rounding errors are of the order
of the dtype's precision; the gap of a model that is wrong by design is far greater.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import Any

import mlx.core as mx

from agent_memory_core.errors import StoreError
from agent_memory_core.kv.layout import KvLayout
from agent_memory_core.kv.parity_runs import batched_gap, resumed_gap
from agent_memory_core.storage.catalog import Catalog

log = logging.getLogger("agent_memory")

LENGTHS = (5, 23, 11)
"""Tokens of each prompt that is decoded in a batch."""
STEPS = 5
"""Tokens that are decoded after each."""
LIMITS = {mx.float32: 2e-3, mx.float16: 0.1, mx.bfloat16: 0.1}
"""The largest gap that passes, by the dtype of the logits."""

_NO_BATCH = "mlx-lm has no batched form of its caches"


@dataclass(frozen=True, slots=True)
class ParityResult:
    """What was found out about one model."""

    batched: bool
    """Whether rows may be decoded together."""
    batched_gap: float | None = None
    """None if it was not measured."""
    resumed: bool = True
    """Whether the model may be stored and resumed."""
    resumed_gap: float | None = None
    """None if it was not measured."""
    boundaries: int = 0
    """At how many block boundaries it was resumed."""
    limit: float = 0.0
    """The largest gap that passes."""
    reason: str = ""
    """Why rows may not be decoded together."""

    def to_json(self) -> str:
        """As it is recorded."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> ParityResult:
        """The inverse of `to_json`."""
        return cls(**json.loads(text))


class ParityCheck:
    """The result for one model: measured when it is first needed, and recorded if there is a catalog."""

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
                "resumed from stored KV, this model gives other logits than in an uninterrupted run (by %.2g of its "
                "logits' spread): nothing of it is stored.",
                self.result.resumed_gap,
            )

    @property
    def resumes(self) -> bool:
        """Whether the model may be stored, as far as is known."""
        return self.result is None or self.result.resumed

    def may_batch(self) -> bool:
        """Whether rows may be decoded together."""
        if self.result is None:
            self.record(_RESULTS.get(self._key) or check_batched(self._model, self._layout, self._vocab_size))
        assert self.result is not None
        if not self.result.batched:
            log.warning("this model decodes one sequence at a time: %s.", self.result.reason)
        return self.result.batched

    def verify(self, block_tokens: int, blocks: int = 8) -> ParityResult:
        """Measure again, also resuming at ``blocks`` block boundaries, and record the result."""
        batched = check_batched(self._model, self._layout, self._vocab_size)
        gap, limit = check_resumed(self._model, self._layout, self._vocab_size, block_tokens, blocks)
        result = replace(batched, resumed=gap <= limit, resumed_gap=gap, boundaries=blocks, limit=limit)
        self.record(result)
        return result

    def record(self, result: ParityResult) -> None:
        """Remember a result."""
        self.result = _RESULTS[self._key] = result
        if self._catalog is not None:
            try:
                self._catalog.write_note(self._key, result.to_json())
            except StoreError as error:
                log.warning("a result could not be recorded: %s", error)


_RESULTS: dict[str, ParityResult] = {}
"""The results that this process has measured, by `parity_key`."""


def _read(recorded: str) -> ParityResult | None:
    """A recorded result; None if it cannot be read, as if it had never been recorded."""
    try:
        return ParityResult.from_json(recorded)
    except (ValueError, TypeError) as error:
        log.warning("the recorded parity of this model cannot be read, so it is measured again: %s", error)
        return None


def parity_key(fingerprint: str, layout: KvLayout) -> str:
    """What a result holds for: this model, on this device, with these versions."""
    versions = [f"{name} {version(name)}" for name in ("mlx", "mlx-lm")]
    return json.dumps(["parity", fingerprint, layout.describe(), str(mx.default_device()), *versions])


def check_batched(model: Any, layout: KvLayout, vocab_size: int) -> ParityResult:
    """Compare a batch with each of its rows alone."""
    if not layout.batches:
        return ParityResult(False, reason=_NO_BATCH)
    try:
        gap = batched_gap(model, [_prompt(length, vocab_size) for length in LENGTHS], STEPS)
    except (ValueError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        # A family that cannot run in a batch at all fails in whatever way its code happens to.
        return ParityResult(False, reason=f"a batch of it fails: {error}")
    limit = LIMITS.get(gap.dtype, LIMITS[mx.float32])
    if gap.size > limit:
        why = f"its logits in a batch differ from those of a row alone by {gap.size:.2g} of their spread"
        return ParityResult(False, gap.size, limit=limit, reason=why)
    return ParityResult(True, gap.size, limit=limit)


def check_resumed(
    model: Any, layout: KvLayout, vocab_size: int, block_tokens: int, blocks: int
) -> tuple[float, float]:
    """The largest gap between a resumed and an uninterrupted run over all block boundaries, and the limit for it."""
    gap = resumed_gap(model, layout, _prompt(block_tokens * (blocks + 1), vocab_size), block_tokens)
    return gap.size, LIMITS.get(gap.dtype, LIMITS[mx.float32])


def _prompt(length: int, vocab_size: int) -> list[int]:
    """Token ids spread over the vocabulary, the same at every call."""
    return [(7919 * (index + 1)) % vocab_size for index in range(length)]
