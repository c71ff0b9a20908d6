"""Every kind of attention: a resumed turn is the uninterrupted one, whatever the layers keep.

That a turn's bits do not depend on where its KV lay is tried on every family, though `make test` leaves most of them
to `make test-heavy`. The other properties follow from the kinds of layers alone, so they are tried on one family for
each combination of kinds.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import KVCache, make_prompt_cache
from support import devices, families
from support.cases import some_of
from support.engine_driver import RecordingSink
from support.watched_engine import BLOCK, Talk, Watched

from agent_memory_core import (
    ChatRequest,
    Message,
)
from agent_memory_core.kv.layout import KvLayout
from agent_memory_core.models import parity
from agent_memory_core.text.checkpoints import CheckpointFinder

REPRESENTATIVES = (
    "gemma3",
    "gpt_oss",
    "deepseek_v3",
    "qwen3_next",
    "mamba2",
    "baichuan_m1",
    "recurrent_gemma",
    "llama4",
)
"""One family for each combination of layer kinds; these are also tried in the default encoding."""
FEW = ("gemma3", "qwen3_next", "baichuan_m1", "llama4")
"""Those in which every kind of layer occurs; `make test` tries the properties of kinds on these."""


@pytest.fixture
def opened() -> Iterator[Callable[..., Watched]]:
    """Opens engines, closed at the test's end."""
    engines: list[Watched] = []

    def open_one(name: str, store: Path | None, **settings: Any) -> Watched:
        engines.append(Watched(name, store, **settings))
        return engines[-1]

    yield open_one
    for engine in engines:
        engine.close()


every_family = pytest.mark.parametrize("name", some_of(families.CONFIGS, REPRESENTATIVES))
one_of_each_kind = pytest.mark.parametrize("name", some_of(REPRESENTATIVES, FEW))


def layer_kinds(name: str) -> frozenset[tuple[str, bool]]:
    """The kinds of a family's layers, and whether their window is shorter than a block."""
    layout = KvLayout(families.loaded(name).model)
    return frozenset((group.kind, 0 < group.live_bytes.window < BLOCK) for group in layout.groups)


def test_every_combination_of_layer_kinds_has_its_representative() -> None:
    represented = {layer_kinds(name) for name in REPRESENTATIVES}
    assert {name for name in families.CONFIGS if layer_kinds(name) not in represented} == set()


def plain(name: str, prompt: list[int], new: int) -> list[int]:
    """What the model alone makes of a prompt, from its first token on."""
    model = families.loaded(name).model
    cache = make_prompt_cache(model)
    tokens = list(prompt)
    fed = 0
    for _ in range(new):
        logits = model(mx.array([tokens[fed:]]), cache=cache)[:, -1]
        fed = len(tokens)
        tokens.append(int(mx.argmax(logits).item()))
    return tokens[len(prompt) :]


def said(sink: RecordingSink) -> Message:
    return Message("assistant", sink.text)


def user(count: int, digit: str = "1") -> Message:
    """A message of about ``count`` tokens: one digit is one token."""
    return Message("user", "Tell me " + digit * count)


def conversation(count: int = 4) -> list[Message]:
    """Questions of such lengths that branches end before, on and after blocks and windows."""
    return [user(80, "1"), user(11, "2"), user(130, "3"), user(47, "4")][:count]


@every_family
def test_hot_evicted_and_restarted_turns_are_the_same_bits(
    name: str, opened: Callable[..., Watched], tmp_path: Path
) -> None:
    for bits in (None, "6/4") if name in REPRESENTATIVES else (None,):
        store = tmp_path / str(bits).replace("/", "-")
        hot, evicted = (opened(name, store / kind, kv_bits=bits) for kind in ("hot", "evicted"))
        talk: Talk = [Message("system", "You are terse. " * 12)]
        known: list[int] = []
        checked = 0
        for index, question in enumerate(conversation()):
            talk = [*talk, question]
            evicted.evict()
            restarted = opened(name, store / "restarted", kv_bits=bits)
            seen = [engine.turn(talk) for engine in (hot, evicted, restarted)]
            assert len({tuple(sink.token_ids) for sink in seen}) == 1
            assert len({sink.report.usage.cache_read for sink in seen}) == 1, bits
            assert all(mx.array_equal(hot.logits[-1], other.logits[-1]) for other in (evicted, restarted))
            if index and hot.prompts[-1][: len(known)] == known:
                assert seen[0].report.usage.cache_read == len(known), "a turn pays for its new tokens only"
                checked += 1
            known = hot.prompts[-1] + seen[0].token_ids
            talk = [*talk, said(seen[0])]
            restarted.close()
        assert checked, (
            "random answers may decode to text that is read back in other tokens, but not all of them"
        )


@pytest.mark.exact_on_cpu(
    reason="a live window holds more keys than a restored one, so a GPU adds their products in other tiles",
    tolerance=1e-4,
)
@every_family
def test_a_resumed_turn_is_the_uninterrupted_one_bit_for_bit(
    name: str, opened: Callable[..., Watched], tmp_path: Path, tolerance: float
) -> None:
    """The turn before leaves its live cache; fed with the same chunks it gives the same logits."""
    talk: Talk = []
    live: list[Any] = []
    for index, question in enumerate(conversation()):
        engine = opened(name, tmp_path / "store")
        talk = [*talk, question]
        sink = engine.turn(talk)
        if index:
            model = families.loaded(name).model
            for chunk in engine.chunks:
                logits = model(mx.array([chunk]), cache=live)[:, -1]
                mx.eval(logits)
            assert devices.same(logits, engine.logits[-1], tolerance)
            assert sink.token_ids == plain(name, engine.prompts[-1], 8)
        live = engine.live
        talk = [*talk, said(sink)]
        engine.close()


@one_of_each_kind
def test_chunked_is_whole(name: str, opened: Callable[..., Watched]) -> None:
    question = [user(230)]
    small, large = opened(name, None, prefill_chunk=64), opened(name, None, prefill_chunk=2048)
    small.turn(question, None), large.turn(question, None)
    assert len(small.chunks) > len(large.chunks)
    scale = mx.abs(large.logits[-1]).max()
    assert mx.abs(small.logits[-1] - large.logits[-1]).max() <= 1e-3 * scale


@one_of_each_kind
def test_sessions_that_share_a_beginning_share_it_as_deep_as_their_layers_allow(
    name: str, opened: Callable[..., Watched], tmp_path: Path
) -> None:
    engine = opened(name, tmp_path / "store")
    brief = Message("system", "You are terse and kind. " * 20)
    first = engine.turn([brief, user(50, "1")], "a")
    opening = CheckpointFinder(engine.engine.template).find(
        ChatRequest((brief, user(50, "1"))),
        engine.engine.template.encode(ChatRequest((brief, user(50, "1")))),
    )[0]
    assert BLOCK < opening < first.report.usage.prompt_tokens
    for evict in (False, True):
        if evict:
            engine.evict()
        second = engine.turn([brief, user(40, "23"[evict])], "bc"[evict])
        got = second.report.usage.cache_read
        rule = engine.engine.blocks.resume
        if rule.at_any_token or rule.inside_block:
            assert got >= opening // BLOCK * BLOCK
        else:
            assert got == opening


@one_of_each_kind
def test_a_fan_out_shares_what_it_begins_with(name: str, opened: Callable[..., Watched]) -> None:
    engine = opened(name, None)
    brief = Message("system", "You are terse and kind. " * 20)
    sinks = [engine.start([brief, user(20, digit)], None) for digit in "123"]
    engine.run()
    read = [sink.report.usage.cache_read for sink in sinks]
    assert sorted(read)[1] >= 2 * BLOCK, "all but the first of them begin where it has been"
    for sink, prompt in zip(sinks, engine.prompts, strict=True):
        assert sink.token_ids == plain(name, prompt, 8)[: len(sink.token_ids)]


@one_of_each_kind
def test_a_question_asked_again_goes_on_behind_the_messages(
    name: str, opened: Callable[..., Watched], tmp_path: Path
) -> None:
    """A retry parts from its branch where the answer began: all but the generation prompt is known."""
    engine = opened(name, tmp_path / "store")
    question = [user(150)]
    engine.turn(question)
    again = engine.turn(question)
    usage = again.report.usage
    assert usage.prompt_tokens - usage.cache_read <= 8
    restarted = opened(name, tmp_path / "store")
    restarted.turn([*question, said(again), user(5)])
    once_more = restarted.turn([*question, said(again), user(5)])
    assert once_more.report.usage.prompt_tokens - once_more.report.usage.cache_read <= 8


@one_of_each_kind
def test_a_fork_goes_on_as_the_original_does(
    name: str, opened: Callable[..., Watched], tmp_path: Path
) -> None:
    engine = opened(name, tmp_path / "store")
    first = engine.turn([user(150)])
    assert engine.store is not None
    engine.store.catalog.branches.fork("default", "s", "fork")
    talk = [user(150), said(first), user(30, "2")]
    one = engine.turn(talk, "s")
    end = one.report.usage.cache_read
    assert end >= first.report.usage.prompt_tokens
    engine.evict()
    other = engine.turn([*talk[:2], user(30, "3")], "fork")
    assert other.report.usage.cache_read >= end
    assert other.token_ids == plain(name, engine.prompts[-1], 8)
    assert engine.store is not None
    assert engine.store.check().clean


@pytest.mark.parametrize("name", some_of([*REPRESENTATIVES, "afm7"], ("gpt_oss", "qwen3_next", "afm7")))
def test_several_at_once_answer_as_each_alone(name: str, opened: Callable[..., Watched]) -> None:
    questions = [[user(90, "1")], [user(20, "2")], [user(55, "3")]]
    alone = [opened(name, None).turn(question, None, 12).token_ids for question in questions]
    engine = opened(name, None)
    sinks = [engine.start(question, None, 12) for question in questions]
    engine.run()
    assert [sink.token_ids for sink in sinks] == alone


@one_of_each_kind
def test_an_answer_longer_than_the_window_is_resumed_too(
    name: str, opened: Callable[..., Watched], tmp_path: Path
) -> None:
    engine = opened(name, tmp_path / "store")
    talk: Talk = [user(20)]
    first = engine.turn(talk, new=150)
    talk = [*talk, said(first), user(9, "2")]
    engine.evict()
    usage = engine.turn(talk).report.usage
    made = first.report.usage
    assert usage.cache_read == made.prompt_tokens + made.completion_tokens


@one_of_each_kind
def test_a_cancelled_prompt_keeps_what_was_computed(name: str, opened: Callable[..., Watched]) -> None:
    engine = opened(name, None)
    sink = engine.start([user(400)], None)
    for _ in range(3):
        engine.engine.step()
    computed = sum(map(len, engine.chunks))
    (seq_id,) = engine.engine.turns
    engine.engine.cancel(seq_id)
    assert not sink.deltas
    assert computed >= 2 * BLOCK
    assert engine.turn([user(400)], None).report.usage.cache_read == computed


@pytest.mark.parametrize("name", ["nemotron_h", "lfm2"])
def test_a_stop_string_costs_the_end_of_its_turn_and_nothing_else(
    name: str, opened: Callable[..., Watched], tmp_path: Path
) -> None:
    engine = opened(name, tmp_path / "store")
    talk: Talk = [user(100)]
    free = engine.turn(talk, new=40)
    stop = free.text[len(free.text) // 2 :][:3]
    stopped = engine.turn(talk, "other", new=40, stop=(stop,))
    assert stopped.text == free.text[: free.text.index(stop)]
    talk = [*talk, said(stopped), user(10, "2")]
    shutil.copytree(tmp_path / "store", tmp_path / "copy")
    hot = engine.turn(talk, "other")
    assert hot.token_ids == plain(name, engine.prompts[-1], 8)
    assert hot.report.miss_reason == "boundary"
    usage = stopped.report.usage
    assert usage.prompt_tokens - 8 <= hot.report.usage.cache_read < usage.prompt_tokens
    again = opened(name, tmp_path / "copy").turn(talk, "other")
    assert (again.token_ids, again.report.usage, again.report.miss_reason) == (
        *(hot.token_ids, hot.report.usage, hot.report.miss_reason),
    )


@pytest.mark.parametrize("name", ["lfm2", "baichuan_m1"])
def test_an_opening_is_shared_again_after_its_catalog_was_lost(
    name: str, opened: Callable[..., Watched], tmp_path: Path
) -> None:
    """The files do not say the words of a tail; the next branch that needs it does."""
    brief = Message("system", "You are terse and kind. " * 20)
    first = opened(name, tmp_path / "store")
    first.turn([brief, user(50, "1")], "a")
    first.turn([brief, user(50, "2")], "b")
    shared = first.turn([brief, user(50, "3")], "c").report.usage.cache_read
    first.close()
    for file in (tmp_path / "store").glob("catalog.db*"):
        file.unlink()
    engine = opened(name, tmp_path / "store")
    engine.turn([brief, user(50, "4")], "d")
    engine.evict()
    again = engine.turn([brief, user(50, "5")], "e")
    assert again.report.usage.cache_read == shared > BLOCK
    assert again.token_ids == plain(name, engine.prompts[-1], 8)


def test_what_cannot_be_stored_is_computed_anew_and_said(
    opened: Callable[..., Watched],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Strange(KVCache):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.mystery = object()

    model = families.loaded("llama").model
    monkeypatch.setattr(model, "make_cache", lambda: [KVCache(), Strange()], raising=False)
    engine = opened("llama", tmp_path / "store")
    assert "Strange, which cannot be stored" in caplog.text
    first = engine.turn([user(150)])
    second = engine.turn([user(150), said(first), user(5)])
    assert (second.report.usage.cache_read, second.report.miss_reason) == (0, "unsupported")
    assert second.token_ids == plain("llama", engine.prompts[-1], 8)
    assert engine.engine.stats().memory.blocks == 0


# Batches


def test_a_family_that_fails_in_a_batch_decodes_alone_and_the_verdict_is_kept(
    opened: Callable[..., Watched],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(parity, "_RESULTS", {})
    engine = opened("afm7", tmp_path / "store")
    engine.turn([user(20)], None)
    assert engine.engine.parity.result is None, "one sequence alone is nothing to look into"
    for digit in "12":
        engine.start([user(20, digit)], None)
    engine.run()
    assert "decodes one sequence at a time: its logits in a batch differ" in caplog.text
    monkeypatch.setattr(parity, "_RESULTS", {})
    monkeypatch.setattr(parity, "check_batched", None)
    result = opened("afm7", tmp_path / "store").engine.parity.result
    assert result is not None
    assert not result.batched


@pytest.mark.parametrize(("batching", "batches"), [("always", True), ("never", False)])
def test_the_user_may_decide_about_batches_without_a_comparison(
    batching: str, batches: bool, opened: Callable[..., Watched], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity, "check_batched", None)
    engine = opened("afm7" if batches else "llama", None, batching=batching)
    sinks = [engine.start([user(20, digit)], None) for digit in "12"]
    engine.run()
    assert all(sink.report for sink in sinks)
    assert engine.engine.runner.batches is batches
    assert engine.engine.parity.result is None


def test_what_mlx_lm_cannot_batch_is_not_batched_whatever_is_set(opened: Callable[..., Watched]) -> None:
    assert opened("llama4", None, batching="always").engine.runner.batches is False


def test_a_family_that_does_not_resume_exactly_is_not_stored(
    opened: Callable[..., Watched], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = opened("llama", tmp_path / "store")
    cut = KvLayout.cut

    def wrong(self: KvLayout, *args: Any) -> Any:
        return {name: x * 1.01 for name, x in cut(self, *args).items()}

    monkeypatch.setattr(parity, "_RESULTS", {})
    monkeypatch.setattr(KvLayout, "cut", wrong)
    result = engine.engine.parity.verify(BLOCK)
    assert (result.batched, result.resumed, result.boundaries) == (True, False, 8)
    monkeypatch.setattr(KvLayout, "cut", cut)
    other = opened("llama", tmp_path / "store")
    first = other.turn([user(150)])
    assert other.turn([user(150), said(first), user(5)]).report.miss_reason == "unsupported"
    assert other.engine.parity.verify(BLOCK).resumed
    assert opened("llama", tmp_path / "store").engine.blocks.resume.at_any_token


# Windows


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma3", "gpt_oss"])
def test_window_layers_take_no_more_than_the_windows_of_live_branches(
    name: str, opened: Callable[..., Watched], tmp_path: Path
) -> None:
    """6,000 tokens of conversation; what the window layers keep stays what it was after the first turns."""
    engine = opened(name, tmp_path / "store", prefill_chunk=2048)
    assert engine.store is not None
    rule, memory = engine.engine.blocks.resume, engine.engine
    most = len(rule.window_blocks(10 * BLOCK + 1)) + 1
    talk: Talk = []
    length = windows = 0
    while length < 6_000:
        talk = [*talk, user(600, str(len(talk) % 10))]
        sink = engine.turn(talk)
        talk = [*talk, said(sink)]
        length = sink.report.usage.prompt_tokens
        windows = len(list((tmp_path / "store").glob("ns/*/windows/*/*.safetensors")))
        assert windows <= 2 * most, "a window behind the messages, and one behind the answer"
        kinds = [block.kind for block in (*memory.pool._evictable.values(), *memory.pool._held.values())]
        assert kinds.count("window") <= 2 * most
    files = engine.store.check()
    assert files.clean
    live = engine.engine.blocks.layout.live_bytes
    full = length * (live.per_token + live.per_window_token)
    if name == "gemma3":
        assert full > 2.5 * files.nbytes, "most layers of it are of the window kind"
