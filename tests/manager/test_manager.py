"""ModelManager on real engines: who is loaded, who makes room, who waits, and that nothing is lost on the way."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from agent_memory_core import AgentMemory, Cancelled, InvalidRequest, InvalidSetting
from agent_memory_core.manager import (
    LoadTimeout,
    ManagerClosed,
    ManagerConfig,
    ModelConfig,
    ModelLoadFailed,
    ModelManager,
    ModelTooLarge,
    UnknownModel,
)
from agent_memory_core.manager.books import State, Ticket

pytestmark = pytest.mark.usefixtures("all_cores")

Make = Callable[..., ModelManager]
HELLO = [{"role": "user", "content": "Hello. " * 30}]


def watch(manager: ModelManager) -> list[str]:
    """Every loaded, evicted and unloaded event, as it comes."""
    events: list[str] = []
    for event in ("loaded", "evicted", "unloaded", "load_failed", "fallback", "over_limit"):
        manager.register_callback(event, partial(lambda event, name: events.append(f"{event} {name}"), event))
    return events


def leases(manager: ModelManager) -> int:
    return sum(stats.leases for stats in manager.get_model_stats().values())


def test_a_handle_is_one_object_and_outlives_its_model(make: Make) -> None:
    manager = make()
    model = manager.get_model("a")
    assert model is manager.get_model("a")
    assert model.loaded
    assert manager.list_loaded_models() == ["a"]
    answer = model.chat(HELLO, session="s")
    assert manager.unload_model("a")
    assert manager.list_loaded_models() == []
    assert not manager.unload_model("a"), "it is not loaded"
    again = model.chat(HELLO, session="s")
    assert again.token_ids == answer.token_ids
    assert again.report.usage.cache_read > 0
    assert manager.get_model_stats()["a"].load_count == 2


def test_where_one_of_two_fits_the_second_waits_for_the_end_of_a_stream_and_never_are_both_loaded(
    make: Make,
) -> None:
    manager = make(limit=15)
    solo = manager.get_model("a").chat(HELLO, max_tokens=60).token_ids
    events = watch(manager)
    both: list[list[str]] = []
    manager.register_callback("loaded", lambda name: both.append(manager.list_loaded_models()))
    stream = manager.get_model("a").stream(HELLO, max_tokens=60)
    tokens = list(next(stream).token_ids)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(lambda: manager.get_model("b").generate("Hello."))
        for delta in stream:
            assert manager.list_loaded_models() == ["a"]
            tokens += delta.token_ids
        assert other.result(60)
    assert tuple(tokens) == solo
    assert events == ["evicted a", "unloaded a", "loaded b"]
    assert both == [["b"]]


def test_many_threads_load_a_model_once(make: Make) -> None:
    manager = make()
    with ThreadPoolExecutor(32) as pool:
        answers = list(
            pool.map(lambda _: manager.get_model("a").chat(HELLO, max_tokens=2).token_ids, range(32))
        )
    assert len(set(answers)) == 1
    assert manager.get_model_stats()["a"].load_count == 1
    assert leases(manager) == 0


def test_random_requests_of_many_threads_keep_the_limit_and_are_all_answered(make: Make) -> None:
    manager = make(limit=25, fair_after=0.2)
    expected = {name: manager.get_model(name).chat(HELLO, max_tokens=2).token_ids for name in "abcd"}
    books, broken = manager._pool.books, []

    def check(_: str) -> None:
        with manager._pool.changed:
            if books.used + books.reserved > books.limit:
                broken.append(books.in_the_way())

    for event in ("loaded", "unloaded"):
        manager.register_callback(event, check)

    def ask(number: int) -> bool:
        name = random.Random(number).choice("aaabcd")
        answer = manager.get_model(name).chat(HELLO, session=f"s{number % 5}", max_tokens=2)
        return answer.token_ids == expected[name] or answer.report.usage.cache_read > 0

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(20)))
    assert broken == []
    assert leases(manager) == 0
    assert manager._pool.books.line == []


def test_a_model_that_two_threads_keep_busy_makes_way(make: Make) -> None:
    manager = make(limit=15, fair_after=0.3)
    stop = threading.Event()

    def hammer() -> None:
        while not stop.is_set():
            manager.get_model("a").chat(HELLO, max_tokens=20)

    threads = [threading.Thread(target=hammer) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        assert manager.get_model("b", timeout=60).generate("Hello.")
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_what_can_never_fit_evicts_nothing(make: Make) -> None:
    manager = make(limit=25, models={"a": {"pinned": True}, "b": {}, "c": {"memory_mb": 20}})
    events = watch(manager)
    manager.get_model("a")
    manager.get_model("b")
    with pytest.raises(ModelTooLarge, match="a 9") as caught:
        manager.get_model("c")
    assert not isinstance(caught.value, ValueError)
    assert events == ["loaded a", "loaded b"]
    assert "c" in manager.list_available_models()


def test_who_waits_too_long_is_told_who_is_in_the_way(make: Make) -> None:
    manager = make(limit=15)
    with manager.get_model("a").lease(), pytest.raises(LoadTimeout, match=r"a .* in use"):
        manager.get_model("b", timeout=0.1)
    assert manager.get_model("b").loaded
    assert manager._pool.books.line == []


def test_a_model_idles_from_the_end_of_its_last_lease_on(make: Make) -> None:
    now = [0.0]
    manager = make(clock=lambda: now[0], models={"a": {"max_idle_time": 10}, "b": {"max_idle_time": None}})
    events = watch(manager)
    manager.get_model("b")
    with manager.get_model("a").lease():
        now[0] = 50.0
        manager._pool.expire()
        assert manager.list_loaded_models() == ["a", "b"]
    now[0] = 59.0
    manager._pool.expire()
    assert manager.list_loaded_models() == ["a", "b"]
    now[0] = 61.0
    manager._pool.expire()
    assert manager.list_loaded_models() == ["b"]
    assert events[-2:] == ["evicted a", "unloaded a"]
    assert manager.get_model_stats()["a"].evictions == 1


def test_its_own_thread_unloads_what_idles(make: Make) -> None:
    manager = make(models={"a": {"max_idle_time": 0.05}})
    gone = threading.Event()
    manager.register_callback("evicted", lambda name: gone.set())
    manager.get_model("a")
    assert gone.wait(30)


def test_a_forced_unload_during_a_stream_cancels_it_and_the_session_is_warm_afterwards(make: Make) -> None:
    manager = make(drain_timeout=0.05)
    model = manager.get_model("a")
    model.chat(HELLO, session="s")
    stream = model.stream(HELLO, session="s", max_tokens=4000)
    next(stream)
    assert not manager.unload_model("a"), "it is in use"
    assert manager.unload_model("a", force=True)
    with pytest.raises(Cancelled):
        list(stream)
    assert leases(manager) == 0
    assert model.chat(HELLO, session="s").report.usage.cache_read > 0


def test_a_forced_unload_also_ends_turns_that_reach_the_engine_past_the_manager(make: Make) -> None:
    manager = make(drain_timeout=0.05)
    memory = AgentMemory.shared(**manager.settings_of(manager.get_model("a").config))
    stream = memory.chat(HELLO, stream=True, max_tokens=4000)
    next(stream)
    assert leases(manager) == 1
    assert not manager.unload_model("a")
    assert manager.unload_model("a", force=True)
    with pytest.raises(Cancelled):
        list(stream)
    assert memory.chat(HELLO, max_tokens=2).token_ids
    assert manager.list_loaded_models() == ["a"], "a turn of anybody loads it through the manager"
    assert manager.get_model_stats()["a"].load_count == 2


def test_leases_come_back_whatever_happens(make: Make) -> None:
    manager = make()
    model = manager.get_model("a")
    stream = model.stream(HELLO, max_tokens=4000)
    next(stream)
    del stream
    gc.collect()
    model.stream(HELLO).close()
    with pytest.raises(ZeroDivisionError), model.lease():
        raise ZeroDivisionError
    with pytest.raises(InvalidRequest):
        model.chat([])
    with pytest.raises(InvalidRequest, match="temperature"):
        model.chat(HELLO, temprature=1)
    with model.lease(), model.lease():
        assert model.chat(HELLO, max_tokens=2).token_ids
    end = time.monotonic() + 30
    while leases(manager) and time.monotonic() < end:
        time.sleep(0.01)
    assert leases(manager) == 0


def test_who_holds_a_lease_gets_another_one_while_others_wait_for_the_model_to_go(make: Make) -> None:
    manager = make(limit=15, fair_after=0)
    model = manager.get_model("a")
    with ThreadPoolExecutor(1) as pool:
        with model.lease():
            other = pool.submit(manager.get_model, "b")
            while manager._pool.books.entries["a"].draining is None:
                time.sleep(0.01)
            assert model.chat(HELLO, max_tokens=2).token_ids
            assert asyncio.run(model.achat(HELLO, max_tokens=2)).token_ids
        assert other.result(60).loaded


def test_callbacks_may_raise_and_use_the_manager(make: Make) -> None:
    manager = make()
    seen: list[Any] = []

    def broken(name: str) -> None:
        raise ZeroDivisionError

    manager.register_callback("loaded", broken)
    stop = manager.register_callback("loaded", lambda name: seen.append(manager.get_memory_usage()["models"]))
    manager.get_model("a")
    assert list(seen[0]) == ["a"]
    stop()
    manager.get_model("b")
    assert len(seen) == 1
    with pytest.raises(InvalidSetting, match="loaded"):
        manager.register_callback("laoded", broken)


def test_a_failed_load_is_told_to_all_who_wait_and_tried_again(
    make: Make, models: dict[str, str], tmp_path: Path
) -> None:
    folder = tmp_path / "broken"
    folder.mkdir()
    for file in Path(models["b"]).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    manager = make(limit=15, models={"a": {}, "b": {"path": str(folder), "fallback": ["a"]}})
    events = watch(manager)

    def fail(_: int) -> bool:
        try:
            manager.get_model("b", fallback=False)
        except ValueError:
            return False
        except ModelLoadFailed as error:
            return error.__cause__ is not None
        return False

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(fail, range(4)))
    assert manager._pool.books.used == manager._pool.books.reserved == 0
    assert manager.get_model("b").name == "a"
    assert events[-1] == "fallback a"
    assert manager.get_model_stats()["b"].state == "failed"
    assert manager.get_model_stats()["b"].last_error
    (folder / "model.safetensors").write_bytes(weights)
    assert manager.get_model("b").name == "b"


def test_an_unknown_model_is_a_value_error_that_names_the_nearest(make: Make) -> None:
    manager = make(models={"a": {"name": "SmolLM3-3B"}})
    with pytest.raises(ValueError, match="SmolLM3-3B"):
        manager.get_model("SmolLM-3B")
    with pytest.raises(UnknownModel):
        manager.unload_model("other")


def test_agents_have_models(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    manager = make(agents={"expert": "b"}, default_model="c")
    assert manager.get_model_for_agent("expert", load=False).name == "b"
    assert manager.get_model_for_agent("other", load=False).name == "c"
    assert manager.get_model_for_agent("other", load=False).name == "c"
    assert sum("'other'" in record.message for record in caplog.records) == 1


def test_models_are_loaded_ahead_by_priority_as_far_as_they_fit(make: Make) -> None:
    wanted = {"preload": True}
    manager = make(
        limit=25,
        models={
            "a": wanted | {"memory_priority": 3},
            "b": wanted | {"memory_priority": 1},
            "c": wanted,
            "d": {},
        },
    )
    assert manager.preloaded(60)
    assert sorted(manager.list_loaded_models()) == ["a", "b"]


def test_a_lower_limit_unloads_what_idles_and_leaves_what_is_in_use(make: Make) -> None:
    manager = make(limit=100)
    for name in "abc":
        manager.get_model(name)
    usage = manager.get_memory_usage()
    assert usage["total_mb"] == pytest.approx(sum(usage["models"].values()), abs=0.2)
    assert (usage["limit_mb"], usage["loaded_models"]) == (100, ["a", "b", "c"])
    events = watch(manager)
    with manager.get_model("a").lease():
        assert manager.set_memory_limit(5) >= 4
        assert manager.list_loaded_models() == ["a"]
        assert "over_limit the new limit" in events
    assert manager.set_memory_limit(5) == 0
    assert manager.list_loaded_models() == []
    with pytest.raises(InvalidSetting):
        manager.set_memory_limit(0)


def test_a_new_configuration_replaces_the_old_one(make: Make, models: dict[str, str]) -> None:
    manager = make(models={"a": {}, "b": {}})
    manager.get_model("a")
    kept = manager.get_model("b").config
    manager.load_config(ManagerConfig(models=(kept,), max_memory_mb=100))
    assert manager.list_available_models() == ["b"]
    manager._pool.expire()
    assert manager.list_loaded_models() == ["b"]
    manager.add_model_config(kept)
    with pytest.raises(InvalidSetting, match="another"):
        manager.add_model_config(kept.model_copy(update={"path": models["c"]}))
    with pytest.raises(InvalidSetting, match="same"):
        manager.add_model_config(kept.model_copy(update={"name": "twin"}))
    assert manager.list_available_models() == ["b"]
    manager.add_model_config(ModelConfig(name="d", type="mlx", path=models["d"]))
    assert manager.list_available_models() == ["b", "d"]


def test_a_configuration_that_is_refused_changes_nothing(make: Make, models: dict[str, str]) -> None:
    manager = make(limit=40, models={"a": {}, "b": {}})
    held = manager.get_model("a").config
    idle = manager.get_model("b", load=False)
    other = held.model_copy(update={"context_length": 64})
    refused = {"max_memory_mb": 7, "fair_after": 1.5, "load_timeout": 2.0, "default_model": "new"}
    new = ModelConfig(name="new", type="mlx", path=models["c"])
    with pytest.raises(InvalidSetting, match="unload it first"):
        manager.load_config(ManagerConfig(models=(new, other), **refused))
    assert manager.list_available_models() == ["a", "b"]
    assert (manager.get_memory_usage()["limit_mb"], manager._pool.books.fair_after) == (40, 10)
    assert manager.get_model_for_agent("any").name == "a"
    assert "new" not in manager.get_model_stats()
    manager._pool.expire()
    assert manager.list_loaded_models() == ["a"], "it is configured still"
    with pytest.raises(InvalidSetting):
        manager.load_config("no/such/file.json")
    with pytest.raises(InvalidSetting, match="new"):
        manager.add_model_config(new.model_copy(update={"fallback": ("new",)}))
    manager.unload_model("a")
    manager.load_config(ManagerConfig(models=(new, other, idle.config), **refused | {"max_memory_mb": 50}))
    assert manager.get_model("a", load=False).config == other
    assert manager.get_model("b", load=False) is idle


def test_a_handle_follows_a_new_configuration(make: Make, models: dict[str, str]) -> None:
    manager = make(models={"a": {}})
    handle = manager.get_model("a")
    changed = handle.config.model_copy(update={"path": models["b"]})
    manager.unload_model("a")
    manager.load_config(ManagerConfig(models=(changed,), max_memory_mb=100))
    assert manager.get_model("a", load=False) is handle
    assert handle.config.path == models["b"]
    assert handle.chat(HELLO, max_tokens=2).token_ids
    assert list(manager.get_memory_usage()["models"]) == ["a"]


def test_after_shutdown_everything_is_unloaded_and_refused(make: Make) -> None:
    manager = make()
    model = manager.get_model("a")
    stream = model.stream(HELLO, max_tokens=4000)
    next(stream)
    manager.shutdown(timeout=0.05)
    manager.shutdown()
    with pytest.raises(Cancelled):
        list(stream)
    assert all(slot.entry.state is State.UNLOADED for slot in manager._pool.slots.values())
    with pytest.raises(ManagerClosed):
        manager.get_model("a")
    with pytest.raises(ManagerClosed):
        model.generate("Hello.")


def _use_in_child(manager: ModelManager, result: Any) -> None:
    try:
        manager.get_model("a")
    except ManagerClosed as error:
        result.put(str(error))


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_process_is_refused(make: Make) -> None:
    manager = make()
    context = multiprocessing.get_context("fork")
    result = context.SimpleQueue()
    child = context.Process(target=_use_in_child, args=(manager, result))
    child.start()
    child.join(60)
    assert "forked" in result.get()


def test_an_interpreter_that_ends_without_shutdown_ends_cleanly(models: dict[str, str]) -> None:
    program = """
import sys
from agent_memory_core.manager import ManagerConfig, ModelManager
config = ManagerConfig(models=[{"name": "a", "type": "mlx", "path": sys.argv[1], "parameters": {"cache_dir": None}}])
manager = ModelManager(config)
stream = manager.get_model("a").stream("Hello.", max_tokens=4000)
next(stream)
"""
    said = subprocess.run(
        [sys.executable, "-c", program, models["a"]],
        capture_output=True,
        text=True,
        env=dict(os.environ),
        timeout=120,
    )
    assert (said.returncode, said.stderr) == (0, "")


def test_a_turn_that_begins_while_its_model_is_to_make_way_does_not_wait_for_itself(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream has a lease of its own. Whoever has one already gets the other, although somebody else is next."""
    manager = make(limit=15, fair_after=0.0)
    handle = manager.get_model("a")
    pool, slot = manager._pool, manager._pool.slots["a"]
    acquire, taken = pool.acquire, 0

    def then_drained(wanted: Any, timeout: float | None = None) -> None:
        nonlocal taken
        acquire(wanted, timeout)
        taken += 1
        if taken == 1:
            with pool.changed:
                slot.entry.draining = Ticket(pool.books.entries["b"], 0.0)

    monkeypatch.setattr(pool, "acquire", then_drained)
    assert handle.chat(HELLO, max_tokens=2).token_ids
    assert taken > 1
    assert leases(manager) == 0
