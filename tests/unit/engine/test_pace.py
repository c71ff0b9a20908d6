"""Chunks are as long as time allows; what was found once stays."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from agent_memory_core.engine.pace import (
    CHUNK_SECONDS,
    FIRST_TOKENS,
    LEAST_TOKENS,
    MOST_TOKENS,
    PrefillPace,
    tokens_in_time,
)
from agent_memory_core.storage.block_store import BlockStore


def timed(pace: PrefillPace, *chunks: tuple[int, float]) -> int:
    for tokens, seconds in chunks:
        pace.took(tokens, seconds)
    return pace.tokens


def now(job: object) -> None:
    assert callable(job)
    job()


@given(st.floats(1e-7, 10))
def test_the_size_is_the_greatest_power_of_two_that_keeps_to_the_time(per_token: float) -> None:
    size = tokens_in_time(per_token)
    assert LEAST_TOKENS <= size <= MOST_TOKENS
    assert size & (size - 1) == 0
    assert size == LEAST_TOKENS or size * per_token <= CHUNK_SECONDS
    assert size == MOST_TOKENS or 2 * size * per_token > CHUNK_SECONDS


def test_the_fastest_of_a_few_chunks_counts_and_the_first_one_and_short_ones_do_not() -> None:
    pace = PrefillPace("key", None, now)
    assert timed(pace, (256, 100.0), (1, 1.0), (256, 0.2), (256, 0.1)) == FIRST_TOKENS
    assert timed(pace, (256, 0.15)) == 512
    assert timed(pace, (512, 10.0), (512, 10.0), (512, 10.0)) == 512


def test_a_machine_that_is_far_too_slow_is_not_timed_again() -> None:
    assert timed(PrefillPace("key", None, now), (256, 40.0), (256, 20.0)) == LEAST_TOKENS


def test_a_restart_cuts_prompts_where_they_were_cut_before(tmp_path: Path) -> None:
    """Otherwise the last bits of its logits might be others."""
    store = BlockStore(tmp_path, quota_bytes=2**24)
    assert timed(PrefillPace("key", store.catalog, now), (256, 1.0), *[(256, 0.03)] * 3) == MOST_TOKENS
    store.close()
    store = BlockStore(tmp_path, quota_bytes=2**24)
    assert timed(PrefillPace("key", store.catalog, now), *[(256, 9.0)] * 5) == MOST_TOKENS
    assert PrefillPace("another model", store.catalog, now).tokens == FIRST_TOKENS
    store.close()


@pytest.mark.parametrize("written", ["", "-5", "7", "4096", "many"])
def test_a_record_that_makes_no_sense_is_measured_again(tmp_path: Path, written: str) -> None:
    store = BlockStore(tmp_path, quota_bytes=2**24)
    store.catalog.write_note("key", written)
    assert PrefillPace("key", store.catalog, now).tokens == FIRST_TOKENS
    store.close()
