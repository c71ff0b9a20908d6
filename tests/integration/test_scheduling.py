"""Nobody waits for a stranger: counted in steps of the engine, which is driven by hand here."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import mlx.core as mx
import pytest
from support.engine_driver import RecordingSink, SteppedEngine, chunks, run

from agent_memory_core import (
    ChatRequest,
    EngineConfig,
    Message,
    OutOfGpuMemory,
    SamplingParams,
    SessionInfo,
    SessionKey,
)
from agent_memory_core.engine.model_runner import DecodeSlot
from agent_memory_core.models.loader import load_model
from agent_memory_core.storage.block_store import BlockStore

MIB = 2**20


def ask(text: str, new: int = 4) -> ChatRequest:
    return ChatRequest((Message("user", text),), sampling=SamplingParams(max_tokens=new))


@pytest.fixture
def engine(llama: str, tmp_path: Path) -> Iterator[SteppedEngine]:
    config = EngineConfig(
        model=llama, block_tokens=64, prefill_chunk=512, prefill_chunk_busy=128, max_batch_size=2
    )
    store = BlockStore(tmp_path / "store")
    engine = SteppedEngine(load_model(llama), config, 256 * MIB, store)
    yield engine
    engine.fail_all(RuntimeError("over"))
    engine.close()


def sessions(engine: SteppedEngine) -> list[SessionInfo]:
    """The sessions in memory, which are all that this engine has made."""
    return engine.sessions.infos(None, "model")


def under_way(engine: SteppedEngine, seq_id: int) -> bool:
    """Whether a turn has generated a few tokens, or ended."""
    return seq_id not in engine.turns or len(engine.turns[seq_id].sequence.generated) > 2


def finish(engine: SteppedEngine, request: ChatRequest, key: SessionKey) -> RecordingSink:
    heard = RecordingSink()
    engine.submit(request, key, heard)
    run(engine, lambda: not engine.busy)
    engine.flush()
    return heard


@pytest.mark.parametrize("evicted", [False, True])
def test_a_warm_turn_overtakes_a_strangers_long_prefill(engine: SteppedEngine, evicted: bool) -> None:
    first = finish(engine, ask("A question. " * 40), SessionKey("warm"))
    if evicted:
        engine.evict()
    seen = chunks(engine)
    stranger, warm = RecordingSink(), RecordingSink()
    engine.submit(ask("7" * 4096), SessionKey("stranger"), stranger)
    run(engine, lambda: len(seen) == 2)
    history = (
        Message("user", "A question. " * 40),
        Message("assistant", "".join(d.text for d in first.deltas)),
        Message("user", "And now?"),
    )
    began = len(seen)
    seq_id = engine.submit(
        ChatRequest(history, sampling=SamplingParams(max_tokens=4)), SessionKey("warm"), warm
    )
    run(engine, lambda: engine.scheduler.running == [] or bool(engine.turns[seq_id].first_token))
    # While the disk is read, a chunk of the stranger's is evaluated.
    assert len(seen) - began <= 1 + evicted, f"first token after the chunks {seen[began:]}"
    assert seen[-1][0] == seq_id
    run(engine, lambda: not engine.busy)
    engine.flush()
    assert warm.report.usage.cache_read > 100
    assert stranger.report.usage.prompt_tokens > 4096


def test_decoding_goes_on_while_a_stranger_prefills_in_smaller_chunks(engine: SteppedEngine) -> None:
    seen = chunks(engine)
    talking, stranger = RecordingSink(), RecordingSink()
    engine.submit(ask("Talk.", new=40), SessionKey("talking"), talking)
    run(engine, lambda: len(engine.runner._groups) == 1)
    engine.submit(ask("7" * 2048), SessionKey("stranger"), stranger)
    began, tokens = len(seen), engine.scheduler.running[0].generated
    before = len(tokens)
    run(engine, lambda: len(seen) == began + 8)
    after = len(engine.turns[0].sequence.generated) if 0 in engine.turns else 40
    assert after - before >= 8, "every step decodes before it prefills"
    assert all(length <= 128 for _, length in seen[began:])


def test_rows_join_and_leave_mid_batch_and_answer_as_alone(engine: SteppedEngine) -> None:
    texts = [
        "One.",
        "A longer second question of some length.",
        "3",
        "And a fourth, asked at the end of it all.",
    ]
    alone = [
        finish(engine, ask(t, 5 + 7 * i), SessionKey(None, namespace=f"alone{i}"))
        for i, t in enumerate(texts)
    ]
    together = []
    for i, text in enumerate(texts):
        heard = RecordingSink()
        engine.submit(ask(text, 5 + 7 * i), SessionKey(None, namespace=f"together{i}"), heard)
        together.append(heard)
        run(engine, partial(under_way, engine, i + len(texts)))
    run(engine, lambda: not engine.busy)
    for one, other in zip(alone, together, strict=True):
        assert [t for d in one.deltas for t in d.token_ids] == [t for d in other.deltas for t in d.token_ids]


@pytest.mark.parametrize("when", ["waiting", "prefill", "decode"])
def test_a_cancelled_turn_frees_its_place_and_leaves_its_blocks(engine: SteppedEngine, when: str) -> None:
    session = SessionKey("s")
    before = finish(engine, ask("First."), session)
    request = ask("8" * 2000, new=200)
    heard = RecordingSink()
    seq_id = engine.submit(request, session, heard)
    if when == "prefill":
        run(engine, lambda: engine.turns[seq_id].sequence.num_computed >= 1024)
    if when == "decode":
        run(engine, lambda: len(engine.turns[seq_id].sequence.generated) > 70)
    engine.cancel(seq_id)
    engine.flush()
    engine.scheduler.check()
    assert not engine.busy
    assert engine.pool.reserved == 0
    assert engine.runner.decode() == []
    (info,) = sessions(engine)
    assert (info.branches, info.tokens) == (1, before.report.usage.prompt_tokens + 4), "as last committed"
    retry = finish(engine, ask("8" * 2000), session)
    computed = retry.report.usage.cache_creation
    assert computed <= {"waiting": 2100, "prefill": 1088, "decode": 64}[when]
    assert retry.report.usage.cache_read >= {"waiting": 0, "prefill": 960, "decode": 1900}[when]


def test_a_busy_branch_is_forked_and_not_waited_for(engine: SteppedEngine) -> None:
    key = SessionKey("s")
    first = finish(engine, ask("A beginning of some length for both. " * 12), key)
    history = (
        Message("user", "A beginning of some length for both. " * 12),
        Message("assistant", "".join(d.text for d in first.deltas)),
    )
    both = [RecordingSink(), RecordingSink()]
    for word, heard in zip(("left", "right"), both, strict=True):
        request = ChatRequest((*history, Message("user", word)), sampling=SamplingParams(max_tokens=4))
        engine.submit(request, key, heard)
    run(engine, lambda: not engine.busy)
    engine.flush()
    assert all(h.report.usage.cache_read > 100 for h in both)
    (info,) = sessions(engine)
    assert info.branches == 2


def test_a_fault_in_one_step_reaches_its_callers_and_the_engine_goes_on(engine: SteppedEngine) -> None:
    heard = RecordingSink()
    engine.submit(ask("Hello."), SessionKey("s"), heard)
    engine.fail_all(RuntimeError("a fault"))
    assert str(heard.error) == "a fault"
    assert engine.pool.reserved == 0
    assert finish(engine, ask("Hello."), SessionKey("s")).report.usage.completion_tokens == 4


def test_several_short_prompts_are_evaluated_in_one_pass_and_answered_as_alone(
    engine: SteppedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [ask(f"{number}, a question. " * (2 + number % 3)) for number in range(6)]
    alone = [finish(engine, request, SessionKey(f"alone {i}")) for i, request in enumerate(requests)]
    engine.pool.evict_all()
    passes: list[int] = []
    together = engine.runner.prefill_together

    def counted(work: list[tuple[DecodeSlot, list[int]]]) -> list[mx.array]:
        passes.append(len(work))
        return together(work)

    monkeypatch.setattr(engine.runner, "prefill_together", counted)
    heard = [RecordingSink() for _ in requests]
    for number, (request, sink) in enumerate(zip(requests, heard, strict=True)):
        engine.submit(request, SessionKey(f"joint {number}", "other"), sink)
    run(engine, lambda: not engine.busy)
    engine.flush()
    assert sum(passes) == 6
    assert max(passes) > 1
    for one, other in zip(alone, heard, strict=True):
        assert other.report.usage.cache_read == 0
        assert [d.token_ids for d in one.deltas] == [d.token_ids for d in other.deltas]


def test_a_pass_of_several_prompts_that_lacks_memory_fails_these_alone(
    engine: SteppedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = finish(engine, ask("Before. " * 4), SessionKey("before"))

    def lacks(*_: object) -> mx.array:
        raise RuntimeError("[malloc] Unable to allocate 1 bytes.")

    monkeypatch.setattr(engine.runner, "prefill_together", lacks)
    heard = [RecordingSink() for _ in range(3)]
    for number, sink in enumerate(heard):
        engine.submit(ask(f"{number}, a question. "), SessionKey(f"joint {number}"), sink)
    run(engine, lambda: not engine.busy)
    assert all(isinstance(sink.error, OutOfGpuMemory) for sink in heard)
    again = finish(engine, ask("Before. " * 4), SessionKey("again"))
    assert [d.token_ids for d in again.deltas] == [d.token_ids for d in before.deltas]
