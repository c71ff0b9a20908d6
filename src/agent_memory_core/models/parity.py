"""Whether a model answers in a batch as it does alone, and resumed from records as it does uninterrupted.

mlx-lm runs many families, and a few of them give other logits in a batch: a mask that is not passed on, a layer that
uses another layer's keys, a shape that fits one row only. A model's name does not tell that; comparing logits does.

    batched    prompts of different lengths are decoded together, and each of them alone with the same tokens; where
               every layer keeps all tokens, the prompts are evaluated together, too
    resumed    at every block boundary a copy of the cache is made as if from records, and both continue

How far two rows of logits lie apart is measured as a *gap*, see ``kv/parity_runs.py``. On a GPU, kernels for one row
add in another order than those for several rows, so a sound model has a gap too. How large that is depends on the
model, its quantisation and the chip; it is therefore measured in the same run, as the *floor*. The gap of a model that
is wrong by design is far greater.
"""

from __future__ import annotations

import json
import logging
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import Any

import mlx.core as mx

from agent_memory_core.errors import StoreError
from agent_memory_core.kv.layout import KvLayout
from agent_memory_core.kv.parity_runs import Comparison, Gap, batched_gap, coarsest_dtype, resumed_gap
from agent_memory_core.storage.catalog import Catalog

log = logging.getLogger("agent_memory")

LENGTHS = (3, 47, 23)
"""Tokens of each prompt that is decoded in a batch. The shortest is padded a lot, so a fault of the mask shows well."""
STEPS = 5
"""Tokens that are decoded after each."""
LIMITS = {mx.float32: 1e-3, mx.float16: 0.02, mx.bfloat16: 0.05}
"""A gap up to this passes in any case, by the dtype of the weights. It is about what rounding makes on a CPU."""
MARGIN = 3
"""A larger gap passes up to so many times the floor that was measured with it."""
MOST_ROUNDING = {mx.float32: 4e-3, mx.float16: 0.3, mx.bfloat16: 0.3}
"""A floor above this cannot be rounding alone, by the dtype of the weights: then the run itself is wrong."""

_NO_BATCH = "mlx-lm has no batched form of its caches"
_FORM = 3
"""Version of what a result is measured by. Results of another version are not read, so that their refusals end."""


@dataclass(frozen=True, slots=True)
class ParityResult:
    """What was found out about one model. Gaps and floors are in units of the logits' spread."""

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
    """The gap that passes whatever the floor is."""
    reason: str = ""
    """Why rows may not be decoded together."""
    batched_floor: float | None = None
    """The gap that rounding alone makes in a batch; None if it was not measured."""
    resumed_floor: float | None = None
    """The gap that rounding alone makes where a block is fed in other pieces; None if it was not measured."""

    @property
    def resumed_reason(self) -> str:
        """Why the model may not be stored; empty if it may."""
        if self.resumed:
            return ""
        floor = f", and rounding alone by {self.resumed_floor:.2g}" if self.resumed_floor is not None else ""
        return (
            "resumed from stored KV, it gives other logits than in an uninterrupted run "
            f"(they differ by {self.resumed_gap or 0:.2g} of their spread{floor})"
        )

    def to_json(self) -> str:
        """As it is recorded."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> ParityResult:
        """The inverse of `to_json`."""
        return cls(**json.loads(text))


@dataclass(frozen=True, slots=True)
class ResumedResult:
    """What the comparison of a resumed with an uninterrupted run found."""

    passes: bool
    """Whether the gap can come from rounding."""
    gap: float
    """In units of the logits' spread."""
    floor: float
    """The gap that rounding alone makes."""
    limit: float
    """The gap that passes whatever the floor is."""


class ParityCheck:
    """The result for one model: measured when it is first needed, and recorded if there is a catalog."""

    def __init__(
        self,
        model: Any,
        layout: KvLayout,
        fingerprint: str,
        vocab_size: int,
        catalog: Catalog | None,
        later: Callable[[Callable[[], None]], None] = lambda job: job(),
    ) -> None:
        self._model, self._layout, self._vocab_size = model, layout, vocab_size
        self._catalog, self._later = catalog, later
        self._key = parity_key(fingerprint, layout)
        recorded = catalog.note(self._key) if catalog is not None else None
        self.result = _read(recorded) if recorded is not None else None
        if self.result is not None and not self.resumes:
            log.warning(
                "nothing of this model is stored: %s. That was recorded by `agent-memory models verify`; the same "
                "command with --forget drops the record.",
                self.result.resumed_reason,
            )

    @property
    def resumes(self) -> bool:
        """Whether the model may be stored, as far as is known."""
        return self.result is None or self.result.resumed

    def may_batch(self) -> bool:
        """Whether rows may be decoded together."""
        if self.result is None:
            result = _RESULTS.get(self._key) or check_batched(self._model, self._layout, self._vocab_size)
            self.result = _RESULTS[self._key] = result
            # Turns are in flight, and must not wait for the disk.
            self._later(lambda: self._write(result))
        assert self.result is not None
        if not self.result.batched:
            log.warning(
                'this model decodes one sequence at a time: %s. The setting batching="always" decodes sequences '
                "together all the same, and `agent-memory models verify --forget` drops this result.",
                self.result.reason,
            )
        return self.result.batched

    def verify(self, block_tokens: int, blocks: int = 8) -> ParityResult:
        """Measure again, also resuming at ``blocks`` block boundaries, and record the result."""
        batched = check_batched(self._model, self._layout, self._vocab_size)
        resumed = check_resumed(self._model, self._layout, self._vocab_size, block_tokens, blocks)
        result = replace(
            batched,
            resumed=resumed.passes,
            resumed_gap=resumed.gap,
            resumed_floor=resumed.floor,
            boundaries=blocks,
            limit=resumed.limit,
        )
        self.record(result)
        return result

    def record(self, result: ParityResult) -> None:
        """Remember a result."""
        self.result = _RESULTS[self._key] = result
        self._write(result)

    def _write(self, result: ParityResult) -> None:
        if self._catalog is not None:
            try:
                self._catalog.write_note(self._key, result.to_json())
            except StoreError as error:
                log.warning("a result could not be recorded: %s", error)

    def forget(self) -> ParityResult | None:
        """Drop the result, so that it is measured again when it is needed. Returns it; None if there was none.

        Raises:
            StoreError: the catalog cannot be written.
        """
        forgotten = self.result or _RESULTS.get(self._key)
        if self._catalog is not None:
            self._catalog.drop_note(self._key)
        _RESULTS.pop(self._key, None)
        self.result = None
        return forgotten


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
    """What a result holds for."""
    return machine_key(f"parity {_FORM}", fingerprint, layout)


def machine_key(what: str, fingerprint: str, layout: KvLayout) -> str:
    """Names what was measured of this model, on this device, chip and system, with these versions.

    A home folder may move to another machine, whose kernels round in another way.
    """
    chip = [str(mx.device_info().get(name, "")) for name in ("architecture", "device_name")]
    system = [platform.system(), platform.mac_ver()[0]]
    versions = [f"{name} {version(name)}" for name in ("mlx", "mlx-lm")]
    device = str(mx.default_device())
    return json.dumps([what, fingerprint, layout.describe(), device, *chip, *system, *versions])


def check_batched(model: Any, layout: KvLayout, vocab_size: int) -> ParityResult:
    """Compare a batch with each of its rows alone. Nothing is said of resuming."""
    if not layout.batches:
        return ParityResult(False, reason=_NO_BATCH)
    try:
        prompts = [_prompt(length, vocab_size) for length in LENGTHS]
        found = batched_gap(model, prompts, STEPS, together=layout.may_pad)
    except (ValueError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        # A family that cannot run in a batch at all fails in whatever way its code happens to.
        return ParityResult(False, reason=f"a batch of it fails: {error}")
    dtype = coarsest_dtype(model)
    batches = _is_rounding(found, dtype) and _is_sane(found.floor, dtype)
    return ParityResult(
        batches,
        found.gap.size,
        batched_floor=found.floor.size,
        limit=LIMITS[dtype],
        reason="" if batches else _batched_reason(found),
    )


def check_resumed(
    model: Any, layout: KvLayout, vocab_size: int, block_tokens: int, blocks: int
) -> ResumedResult:
    """Compare a resumed with an uninterrupted run at so many block boundaries."""
    found = resumed_gap(model, layout, _prompt(block_tokens * (blocks + 1), vocab_size), block_tokens)
    dtype = coarsest_dtype(model)
    return ResumedResult(_is_rounding(found, dtype), found.gap.size, found.floor.size, LIMITS[dtype])


def _is_rounding(found: Comparison, dtype: mx.Dtype) -> bool:
    """Whether a gap is small enough to come from rounding. A floor that cannot be rounding does not count."""
    floor = found.floor.size if _is_sane(found.floor, dtype) else 0.0
    return not found.gap.other_token and found.gap.size <= max(LIMITS[dtype], MARGIN * floor)


def _is_sane(floor: Gap, dtype: mx.Dtype) -> bool:
    """Whether a floor can come from rounding."""
    return not floor.other_token and floor.size <= MOST_ROUNDING[dtype]


def _batched_reason(found: Comparison) -> str:
    """Why a model is refused, with both numbers."""
    other = ", and its likeliest token is another one" if found.gap.other_token else ""
    return (
        f"its logits in a batch differ from those of a row alone by {found.gap.size:.2g} of their spread{other} "
        f"(in a batch of equal rows, where only rounding differs, by {found.floor.size:.2g})"
    )


def _prompt(length: int, vocab_size: int) -> list[int]:
    """Token ids spread over the vocabulary, the same at every call."""
    return [(7919 * (index + 1)) % vocab_size for index in range(length)]
