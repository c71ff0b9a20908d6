"""What a session can be told: prewarm, fork, forget; with a disk and without one."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from support import engine_driver

from agent_memory_core import AgentMemory, ChatHistory, InvalidRequest, SessionKey

Open = Callable[..., engine_driver.Driver]
BRIEF = {"role": "system", "content": "A brief that every agent begins with. " * 8}


@pytest.fixture(params=["disk", "memory only"])
def driver(request: pytest.FixtureRequest, llama: str, open_driver: Open) -> engine_driver.Driver:
    settings: dict[str, Any] = {"kv_bits": None}
    return open_driver(llama, **settings | ({} if request.param == "disk" else {"cache_dir": None}))


def begun(driver: engine_driver.Driver, session: str) -> engine_driver.History:
    history: engine_driver.History = [BRIEF, {"role": "user", "content": "A first question."}]
    return [*history, {"role": "assistant", "content": driver.turn(history, session).text}]


def test_a_prewarmed_brief_makes_the_first_turn_warm(driver: engine_driver.Driver) -> None:
    report = driver.memory.prewarm([BRIEF], session="template")
    assert report.usage.completion_tokens == 0
    assert report.usage.cache_read == 0
    history = [BRIEF, {"role": "user", "content": "A question."}]
    first = driver.turn(history, "agent")
    assert first.cache_read == report.usage.prompt_tokens
    assert driver.memory.prewarm([BRIEF], session="template").usage.cache_creation <= 1


def test_a_prewarmed_brief_survives_a_restart(llama: str, open_driver: Open) -> None:
    prompt_tokens = open_driver(llama).memory.prewarm([BRIEF], session="template").usage.prompt_tokens
    seen = open_driver(llama).turn([BRIEF, {"role": "user", "content": "A question."}], "agent")
    assert (seen.tier, seen.cache_read) == ("warm", prompt_tokens)


def test_a_fork_goes_on_warm_and_leaves_the_other_alone(driver: engine_driver.Driver) -> None:
    history = begun(driver, "one")
    driver.memory.fork("one", "two")
    left = driver.turn([*history, {"role": "user", "content": "Go left."}], "one")
    right = driver.turn([*history, {"role": "user", "content": "Go right."}], "two")
    known = len(driver.prompts[0]) + 8
    assert left.cache_read >= known - 1
    assert right.cache_read >= known - 1
    assert {info.session_id: info.branches for info in driver.memory.sessions()} == {"one": 1, "two": 1}
    driver.memory.forget("one")
    again = driver.turn([*history, {"role": "user", "content": "Go right."}], "two")
    assert again.token_ids == right.token_ids
    with pytest.raises(InvalidRequest, match="two"):
        driver.memory.fork("two", "two")


def test_a_forgotten_session_is_gone_from_memory_and_disk(
    driver: engine_driver.Driver, tmp_path: Path
) -> None:
    history = begun(driver, "secret")
    assert driver.memory.forget("secret")
    assert driver.memory.sessions() == []
    assert not list(tmp_path.rglob("store/**/*.safetensors"))
    assert driver.turn(history, "secret").cache_read == 0
    assert driver.memory.forget("secret")
    assert not driver.memory.forget("secret")


def test_forgetting_one_session_leaves_what_others_share(
    llama: str, open_driver: Open, tmp_path: Path
) -> None:
    driver = open_driver(llama)
    begun(driver, "one")
    history = begun(driver, "two")
    driver.memory.forget("one")
    driver.evict()
    seen = driver.turn([*history, {"role": "user", "content": "Go on."}], "two")
    assert seen.tier == "warm"
    assert seen.prompt_tokens - seen.cache_read < 20


def test_a_memory_that_was_never_asked_answers_about_its_store(llama: str, open_driver: Open) -> None:
    begun(open_driver(llama), "one")
    fresh = open_driver(llama)
    other = type(fresh.memory)(fresh.memory.config)
    assert [info.session_id for info in other.sessions()] == ["one"]
    other.fork("one", "two")
    other.pin("two")
    assert {info.session_id: info.pinned for info in other.sessions()} == {"one": False, "two": True}
    assert other.forget("one")
    assert other.stats().store.sessions == 1
    other.close()


def test_sessions_in_use_and_pinned_ones_are_not_pruned(driver: engine_driver.Driver) -> None:
    for name in ("ada", "bob"):
        begun(driver, name)
    on_disk = driver.memory.config.cache_dir is not None
    if on_disk:
        driver.memory.pin("ada")
    stream = driver.memory.chat(
        [BRIEF, {"role": "user", "content": "Go on."}], "bob", stream=True, max_tokens=400
    )
    next(stream)
    pruned = driver.memory.prune(0)
    assert [info.session_id for info in pruned] == ([] if on_disk else ["ada"])
    stream.close()
    assert [info.session_id for info in driver.memory.prune(timedelta(hours=1))] == []
    with pytest.raises(InvalidRequest, match="older_than=-1"):
        driver.memory.prune(-1)


def test_a_namespace_is_forgotten_whole_and_others_stay(tmp_path: Path) -> None:
    with AgentMemory(cache_dir=tmp_path, min_free_mb=0) as memory:
        for namespace in ("mine", "yours"):
            for number in range(3):
                memory.chat(f"{namespace} {number}. " * 20, SessionKey(f"s{number}", namespace), max_tokens=1)
        memory.pin("s0", "mine")
        assert memory.forget_namespace("mine") == 3
        assert memory.sessions("mine") == []
        assert len(memory.sessions("yours")) == 3
        assert memory.forget_namespace("mine") == 0
        (identity,) = (path for path in tmp_path.glob("ns/*/identity.json") if '"mine"' in path.read_text())
        assert not list(identity.parent.rglob("*.safetensors"))


def test_sessions_come_in_pages(tmp_path: Path) -> None:
    with AgentMemory(cache_dir=tmp_path, min_free_mb=0) as memory:
        for number in range(5):
            memory.chat("Hi.", f"s{number}", max_tokens=1)
        whole = [info.session_id for info in memory.sessions()]
        pages = [memory.sessions(limit=2, offset=at) for at in range(0, 7, 2)]
        assert [info.session_id for page in pages for info in page] == whole
        with pytest.raises(InvalidRequest, match="limit=-1"):
            memory.sessions(limit=-1)


def test_what_the_terminal_keeps_of_a_session_goes_with_it(tmp_path: Path) -> None:
    history = ChatHistory(tmp_path, "default", "carol")
    with AgentMemory(cache_dir=tmp_path, min_free_mb=0) as memory:
        memory.chat("Hi.", "carol", max_tokens=1)
        history.write([{"role": "user", "content": "A secret."}])
        assert memory.forget("carol")
    assert history.read() == []
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(b"A secret." in path.read_bytes() for path in files)


def test_a_released_session_leaves_memory_and_what_others_share_stays(llama: str, open_driver: Open) -> None:
    driver = open_driver(llama)
    history = begun(driver, "one")
    begun(driver, "two")
    driver.memory.flush()
    before = driver.memory.stats().memory
    freed = driver.memory.release("one")
    after = driver.memory.stats().memory
    assert before.block_bytes / 2 < after.block_bytes < before.block_bytes
    assert (before.live_caches, after.live_caches) == (2, 1)
    assert freed == before.block_bytes + before.live_bytes - after.block_bytes - after.live_bytes
    assert driver.memory.release("one") == 0
    again = driver.turn([*history, {"role": "user", "content": "And now?"}], "one")
    # The brief is still in memory, the rest is read from disk.
    assert again.tier == "warm"
    assert again.cache_read >= len(driver.prompts[0])


def test_a_released_session_answers_as_one_that_stayed(llama: str, open_driver: Open) -> None:
    driver = open_driver(llama)
    asked = [*begun(driver, "one"), {"role": "user", "content": "And now?"}]
    driver.memory.fork("one", "stayed")
    stayed = driver.turn(asked, "stayed")
    driver.memory.forget("stayed")
    driver.memory.release("one")
    assert driver.turn(asked, "one").token_ids == stayed.token_ids


def test_nothing_is_released_that_could_not_be_read_back(llama: str, open_driver: Open) -> None:
    driver = open_driver(llama, cache_dir=None)
    history = begun(driver, "one")
    driver.memory.flush()
    assert driver.memory.release("one") == 0
    assert driver.turn([*history, {"role": "user", "content": "And now?"}], "one").tier == "hot"


def test_an_unknown_session_and_a_cold_engine_release_nothing(llama: str, open_driver: Open) -> None:
    driver = open_driver(llama)
    assert driver.memory.release("nobody") == 0
    begun(driver, "one")
    assert driver.memory.release("nobody") == 0
