"""What is stored of a prompt is restored from wherever it lies; what cannot be read is matched around."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from support.engine_driver import RecordingSink, SteppedEngine

from agent_memory_core import ChatRequest, Message, SamplingParams, SessionKey
from agent_memory_core.engine.results import Loaded

pytestmark = pytest.mark.model

Open = Callable[..., SteppedEngine]
ASKED = ChatRequest((Message("user", "1" * 400),), sampling=SamplingParams(max_tokens=4))


def answered(engine: SteppedEngine) -> RecordingSink:
    sink = RecordingSink()
    engine.submit(ASKED, SessionKey("s"), sink)
    while engine.busy:
        engine.step()
    engine.flush()
    return sink


def test_from_memory_at_once_and_from_disk_when_it_has_answered(open_engine: Open, tmp_path: Path) -> None:
    engine = open_engine(tmp_path / "store")
    cold = answered(engine)
    hot = answered(engine)
    engine.evict()
    warm = answered(engine)
    assert [sink.report.hit_tier for sink in (cold, hot, warm)] == ["none", "hot", "warm"]
    assert hot.report.usage == warm.report.usage
    assert hot.token_ids == warm.token_ids
    assert warm.report.restore_seconds > 0


def test_a_record_that_cannot_be_read_is_matched_around_and_told(open_engine: Open, tmp_path: Path) -> None:
    engine = open_engine(tmp_path / "store")
    hot_read = [answered(engine), answered(engine)][1].report.usage.cache_read
    files = sorted((tmp_path / "store" / "ns").glob("*/blocks/*/*.safetensors"))
    damaged = files[len(files) // 2]
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    engine.evict()
    report = answered(engine).report
    assert report.miss_reason == "damaged"
    assert report.usage.cache_read < hot_read
    assert answered(engine).report.usage.cache_read == hot_read, "it was computed and stored again"


def test_an_answer_of_the_disk_for_a_turn_that_is_gone_is_dropped(open_engine: Open, tmp_path: Path) -> None:
    engine = open_engine(tmp_path / "store")
    answered(engine)
    engine.evict()
    sink = RecordingSink()
    seq_id = engine.submit(ASKED, SessionKey("s"), sink)
    engine.step()
    engine.cancel(seq_id)
    engine.take(Loaded(seq_id, []))
    engine.scheduler.check()
    assert engine.pool.reserved == 0
