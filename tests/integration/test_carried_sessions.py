"""A session that is carried to another store goes on there as it would where it came from, whatever the layers keep."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from support import engine_driver, families
from support.cases import some_of

from agent_memory_core import InvalidRequest, SessionKey, SessionNotFound, StoreError

Open = Callable[..., engine_driver.Driver]
TALK: engine_driver.History = [{"role": "user", "content": "A first question, and not a short one. " * 12}]


@pytest.mark.parametrize(
    "family", some_of(["llama", "gemma3", "mamba2", "qwen3_next"], ["llama", "qwen3_next"])
)
def test_a_carried_session_goes_on_as_where_it_came_from(
    open_driver: Open, tmp_path: Path, family: str
) -> None:
    model = families.write(tmp_path / family, family)
    here, carried = open_driver(model), io.BytesIO()
    answer = here.turn(TALK, "one")
    assert here.memory.export_session("one", carried) > 0
    carried.seek(0)
    there = open_driver(model, cache_dir=tmp_path / "there")
    tokens = there.memory.import_session("two", carried, "other")
    assert tokens == here.memory.sessions()[0].tokens
    here.memory.close()
    asked = [*TALK, {"role": "assistant", "content": answer.text}, {"role": "user", "content": "And now?"}]
    moved = there.turn(asked, SessionKey("two", namespace="other"))
    stayed = open_driver(model).turn(asked, "one")
    assert moved == stayed
    assert moved.cache_read > 0
    assert there.memory.check().clean


def test_what_cannot_be_carried_is_named(open_driver: Open, llama: str) -> None:
    driver, without = open_driver(llama), open_driver(llama, cache_dir=None)
    with pytest.raises(SessionNotFound, match="nobody"):
        driver.memory.export_session("nobody", io.BytesIO())
    with pytest.raises(InvalidRequest, match="damaged"):
        driver.memory.import_session("one", io.BytesIO(b"something"))
    with pytest.raises(InvalidRequest, match="session id"):
        driver.memory.import_session("", io.BytesIO())
    with pytest.raises(StoreError, match="no cache_dir"):
        without.memory.export_session("one", io.BytesIO())
