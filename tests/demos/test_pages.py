"""The pages, each run by Streamlit's own tester on the real engine."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent_memory_core import AgentMemoryError
from agent_memory_core.coordination import Transcript
from agent_memory_core.demos import pages
from agent_memory_core.demos.ui import experts
from agent_memory_core.demos.ui.engine import Engine
from agent_memory_core.demos.ui.state import engine_of

pytest.importorskip("streamlit")
from streamlit.testing.v1 import AppTest

pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(scope="module", autouse=True)
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """The engine of the pages, on a store of these tests. It starts once, and again where a test kills it."""
    import streamlit

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AGENT_MEMORY_CACHE_DIR", str(tmp_path_factory.mktemp("pages") / "caches"))
        patch.setenv("AGENT_MEMORY_MIN_FREE_MB", "0")
        patch.setenv("AGENT_MEMORY_MEMORY_BUDGET_MB", "128")
        opened = engine_of(streamlit)
        yield opened
        opened.close()
        streamlit.cache_resource.clear()


def page(name: str) -> Any:
    script = f"import streamlit as st\nfrom agent_memory_core.demos.ui import {name}\n{name}.show(st)\n"
    app = AppTest.from_string(script, default_timeout=120).run()
    assert not app.exception
    return app


def press(app: Any, label: str) -> Any:
    app = next(button for button in app.button if button.label == label).click().run()
    assert not app.exception
    assert not app.error
    return app


def metric(app: Any, label: str) -> float:
    return float(next(each.value for each in app.metric if each.label == label))


def shown(app: Any) -> str:
    return "\n".join(each.value for each in app.markdown)


@pytest.mark.heavy
def test_the_dilemma_is_played_over_a_kill_between_its_phases(engine: Engine) -> None:
    app = press(page("dilemma"), "Run Room A")
    # What a suspect does not know is not in its column.
    marco, danny = app.expander[0].columns
    assert any("4821" in each.value for each in marco.markdown)
    assert not any("4821" in each.value for each in danny.markdown)
    assert "Is not here, and hears nothing." in [each.value for each in danny.caption]
    app = press(app, "Run Room B")
    before = engine.pid
    app = press(app, "Kill the engine")
    assert next(button for button in app.button if button.label == "Kill the engine").disabled
    app = press(app, "Run The yard")
    assert engine.pid not in (None, before)
    first = app.session_state["dilemma"].phases[-1].stats[0]
    assert (first.hit_tier, first.miss_reason) == ("warm", "")
    app = press(app, "Run all")
    run = app.session_state["dilemma"]
    assert "4821" in run.phases[-1].events[-1].content
    assert metric(app, "of these computed") == run.phases[-1].stats[-1].new
    # The cell of what came out is marked, and no other.
    paid = " / ".join(f"{run.outcome.payoff[agent]:g}" for agent in ("marco", "danny"))
    assert shown(app).count("green-badge") == 1
    assert f":green-badge[**{paid}**]" in shown(app)
    assert len(app.expander) == 5
    app = press(app, "Begin again")
    assert app.session_state["dilemma"].phases == ()


@pytest.mark.heavy
def test_an_expert_answers_cold_hot_and_after_a_kill(engine: Engine) -> None:
    app = page("experts")
    app.selectbox[0].set_value("tides").run()
    for _ in range(2):
        app = press(app, "Ask")
        assert "4092" in shown(app)
    row = app.session_state["answer"][3]
    assert (row.hit_tier, metric(app, "of these computed")) == ("hot", row.new)
    assert row.new < row.prompt / 4
    app = press(app, "Kill the engine")
    app = press(app, "Ask")
    assert app.session_state["answer"][3].hit_tier == "warm"
    times = app.session_state["times"]
    assert {tier: len(found) for tier, found in times.items()} == {"none": 3, "hot": 2, "warm": 1}
    assert [each.label for each in app.metric if "median" in each.label] == [
        "cold, median of 3",
        "hot, median of 2",
        "after a kill, median of 1",
    ]
    app.selectbox[0].set_value(experts.CHOOSES)
    assert press(app, "Ask").session_state["answer"][1] in app.selectbox[0].options[1:]


def test_a_session_of_ones_own_talks_whispers_and_votes(engine: Engine) -> None:
    app = page("talk")
    next(each for each in app.text_input if each.label == "Agents").set_value("you, you")
    app = next(button for button in app.button if button.label == "Begin").click().run()
    assert "must differ" in app.error[0].value
    next(each for each in app.text_input if each.label == "Agents").set_value("Ann, Bob, Cyd")
    app = press(app, "Begin")
    app = press(app, "Next turn")
    app = press(app, "A round")
    next(each for each in app.text_input if each.label.startswith("Words that only")).set_value(
        "The code is 4821."
    )
    app = press(app, "Whisper")
    assert "The code is 4821." in shown(app)
    next(each for each in app.text_input if each.label.startswith("Your vote")).set_value("hills")
    app = press(app, "Vote")
    decision = app.session_state["decision"]
    assert {ballot.agent_id: ballot.choice for ballot in decision.ballots}["you"] == "hills"
    assert "you: hills" in [each.value for each in app.caption]
    assert sum(decision.tally.values()) == 4
    assert metric(app, "tokens of the last prompt") > 0
    sid = app.session_state["talk"]
    assert [event.content for event in engine.service.messages(sid, as_agent="Bob")].count(
        "The code is 4821."
    ) == 0


def test_models_make_room_for_each_other(engine: Engine) -> None:
    app = page("models")
    for name in ("planner", "writer", "critic"):
        app.selectbox[0].set_value(name)
        app = press(app, "Load")
    states = {row["model"]: row["state"] for row in app.dataframe[0].value.to_dict("records")}
    assert list(states.values()).count("ready") == 2
    assert states["critic"] == "ready"
    assert any("evicted" in each.value for each in app.markdown)
    app = press(app, "Unload")
    assert engine.manager.get_model_stats()["critic"].state == "unloaded"
    app.selectbox[0].set_value("planner")
    assert "Ada" in shown(press(app, "Ask"))


def test_what_is_stored_is_shown_pinned_forked_and_forgotten(engine: Engine) -> None:
    others = len(engine.memory.sessions())
    engine.memory.chat("Hello!", session="ada", max_tokens=4)
    app = page("inspector")
    assert metric(app, "sessions") == others + 1
    row = app.dataframe[0].value.to_dict("records")[0]
    info = engine.memory.sessions()[0]
    assert (row["session"], row["tokens"], row["tier"], row["pinned"]) == ("ada", info.tokens, "none", False)
    app = press(app, "Pin")
    assert engine.memory.sessions()[0].pinned
    app = press(app, "Check every file")
    assert "0 damaged" in app.success[0].value
    app = press(app, "Unpin")
    app = press(app, "Fork")
    assert metric(app, "sessions") == others + 2
    app = press(press(app, "Forget"), "Forget")
    assert metric(app, "sessions") == others
    assert not [info for info in engine.memory.sessions() if "ada" in info.session_id]


def test_an_engine_that_is_killed_in_the_middle_is_started_again(engine: Engine) -> None:
    starts = max(1, engine.starts)
    steps = engine.desk.steps("phase", "prisoners_dilemma", Transcript(scenario="x"), "killed")
    next(steps)
    os.kill(engine.pid or 0, signal.SIGKILL)
    with pytest.raises(AgentMemoryError, match="has ended"):
        list(steps)
    # A turn that was killed did not happen, and the session can be ended.
    assert engine.service.release("killed") == 1
    assert engine.starts == starts + 1


def test_the_pages_are_served_on_this_machine(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with subprocess.Popen(pages.command(port), stdout=subprocess.DEVNULL, cwd=tmp_path) as server:
        try:
            for _ in range(120):
                try:
                    with urllib.request.urlopen(
                        f"http://127.0.0.1:{port}/_stcore/health", timeout=5
                    ) as answer:
                        assert answer.status == 200
                        return
                except OSError:
                    assert server.poll() is None
                    time.sleep(0.5)
            pytest.fail("the server did not answer")
        finally:
            server.terminate()


def test_streamlit_is_of_this_python() -> None:
    assert pages.command(1)[:3] == [sys.executable, "-m", "streamlit"]
