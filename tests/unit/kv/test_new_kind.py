"""A kind of layer that no module knows is stored and resumed like the others, once it is in the list of kinds.

The kind, its cache class and its rule of where to resume are all made up here: a cache that keeps keys and values side
by side in one array, and that can be resumed at the ends of blocks and tails only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.base import create_attention_mask
from mlx_lm.models.cache import KVCache
from mlx_lm.utils import load_tokenizer
from support import tiny_models
from support.engine_driver import RecordingSink, SteppedEngine
from support.live_caches import run

from agent_memory_core import ChatRequest, EngineConfig, Message, SamplingParams, SessionKey
from agent_memory_core.blocks.resume_policy import ResumeRequirement
from agent_memory_core.kv import layout
from agent_memory_core.kv.codec import Segment
from agent_memory_core.kv.layer_kind import LayerGroup, Leaf, LiveBytes, shapes_of
from agent_memory_core.models.loader import LoadedModel
from agent_memory_core.storage.block_store import BlockStore

pytestmark = pytest.mark.model

BLOCK = 64


class FusedCache:
    """Keeps keys and values of all tokens side by side, [1, heads, tokens, key_dim + value_dim]."""

    def __init__(self) -> None:
        self.fused: Any = None
        self.offset = 0

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        new = mx.concatenate([keys, values], axis=-1)
        self.fused = new if self.fused is None else mx.concatenate([self.fused, new], axis=2)
        self.offset += keys.shape[2]
        return self.fused[..., : keys.shape[-1]], self.fused[..., keys.shape[-1] :]

    def make_mask(self, *args: Any, **kwargs: Any) -> Any:
        return create_attention_mask(*args, offset=self.offset, **kwargs)


class AtEnds:
    """All tokens, from blocks and tails, and only where one of them ends."""

    in_blocks = True
    at_block_ends = True

    def inside_block(self, block_tokens: int) -> bool:
        return False

    def window_start(self, position: int) -> int:
        return position


AT_ENDS = AtEnds()


@dataclass(frozen=True, slots=True)
class FusedLayers(LayerGroup):
    """The kind of `FusedCache`."""

    kind = "fused"
    layer_type = "global"
    home = "block"

    layers: tuple[int, ...]
    leaves: tuple[int, ...]
    heads: int
    width: int
    dtype: mx.Dtype

    @classmethod
    def key_of(cls, leaf: Leaf) -> tuple[Any, ...] | None:
        if type(leaf.cache) is not FusedCache:
            return None
        return leaf.cache.fused.shape[1], leaf.cache.fused.shape[3], leaf.cache.fused.dtype

    @classmethod
    def of(cls, leaves: Sequence[Leaf]) -> FusedLayers:
        heads, width, dtype = cls.key_of(leaves[0]) or ()
        numbers = tuple(leaf.index for leaf in leaves)
        return cls(tuple(leaf.layer for leaf in leaves), numbers, heads, width, dtype)

    def describe(self) -> str:
        return f"fused {self.leaves} {self.heads} {self.width} {self.dtype}"

    @property
    def requirement(self) -> ResumeRequirement:
        return AT_ENDS

    @property
    def live_bytes(self) -> LiveBytes:
        return LiveBytes(per_token=len(self.leaves) * self.heads * self.width * self.dtype.size)

    def dims(self) -> dict[str, int]:
        return {"fused": self.width}

    def empty(self, tokens: int) -> Segment:
        return {"fused": mx.zeros((len(self.leaves), self.heads, tokens, self.width), self.dtype)}

    def holds(self, caches: Sequence[Any], position: int, fed: int) -> bool:
        return True

    def cut(self, caches: Sequence[Any], start: int, stop: int) -> Segment:
        if start == stop:
            return {}
        return {"fused": mx.contiguous(mx.stack([cache.fused[0, :, start:stop] for cache in caches]))}

    def join(self, caches: Sequence[Any], segments: Sequence[Segment], length: int, room: int) -> None:
        joined = mx.concatenate([segment["fused"] for segment in segments], axis=2)
        assert joined.shape[2] == length
        for row, cache in enumerate(caches):
            cache.fused, cache.offset = joined[row : row + 1], length

    def fits(self, arrays: Segment, tokens: int) -> bool:
        return shapes_of(arrays) == shapes_of(self.empty(tokens) if tokens else {})


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], SteppedEngine]]:
    """Opens engines of one model whose second layer is of the new kind."""
    monkeypatch.setattr(layout, "LAYER_KINDS", [FusedLayers, *layout.LAYER_KINDS])
    model = tiny_models.build(tiny_models.LLAMA | {"vocab_size": tiny_models.vocab_size()})
    model.make_cache = lambda: [KVCache(), FusedCache()]
    tokenizer = load_tokenizer(tiny_models.TOKENIZER, eos_token_ids=[tiny_models.eos()])
    loaded = LoadedModel("fused", model, tokenizer, "a fused model", 32768, tiny_models.LLAMA)
    engines: list[SteppedEngine] = []

    def open_one(folder: Path) -> SteppedEngine:
        config = EngineConfig(model="fused", block_tokens=BLOCK, kv_bits=None, prefill_chunk=256)
        engines.append(SteppedEngine(loaded, config, 2**26, BlockStore(folder)))
        return engines[-1]

    yield open_one
    for engine in engines:
        engine.close()


def answer(engine: SteppedEngine, talk: list[Message], session: str = "s") -> RecordingSink:
    sink = RecordingSink()
    request = ChatRequest(tuple(talk), sampling=SamplingParams(max_tokens=8))
    engine.submit(request, SessionKey(session), sink)
    while engine.busy:
        engine.step()
    engine.flush()
    return sink


def test_a_kind_defined_in_this_file_is_stored_and_resumed(
    opened: Callable[[Path], SteppedEngine], tmp_path: Path
) -> None:
    first = opened(tmp_path / "store")
    assert [group.kind for group in first.blocks.layout.groups] == ["append", "fused"]
    assert not first.blocks.resume.inside_block
    talk = [Message("system", "You are terse. " * 12), Message("user", "Tell me " + "1" * 100)]
    begun = answer(first, talk)
    talk += [Message("assistant", begun.text), Message("user", "More, and not less.")]
    first.close()
    restarted = opened(tmp_path / "store")
    resumed = answer(restarted, talk)
    assert resumed.report.usage.cache_read >= begun.report.usage.prompt_tokens > 2 * BLOCK
    (branch,) = restarted.sessions.open(restarted.intake.root("default"), ("default", "s")).branches
    tokens = list(branch.token_ids[: branch.prompt_tokens])
    model = restarted.loaded.model
    for token in resumed.token_ids:
        assert token == mx.argmax(run(model, tokens, model.make_cache())).item()
        tokens.append(token)


def test_its_own_rule_decides_where_another_session_may_begin(
    opened: Callable[[Path], SteppedEngine], tmp_path: Path
) -> None:
    """The two prompts share more than a block and less than two; the part of the second block cannot be used."""
    engine = opened(tmp_path / "store")
    one, other = ([Message("user", "1" * 100 + digit * 60)] for digit in "23")
    answer(engine, one, "a")
    shared = answer(engine, other, "b").report.usage.cache_read
    assert shared == BLOCK
