"""The pages, each run by Streamlit's own tester on the real engine."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent_memory_core import AgentMemory
from agent_memory_core.demos import pages

pytest.importorskip("streamlit")
from streamlit.testing.v1 import AppTest

pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(autouse=True)
def _store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    import streamlit

    monkeypatch.setenv("AGENT_MEMORY_CACHE_DIR", str(tmp_path / "caches"))
    monkeypatch.setenv("AGENT_MEMORY_MIN_FREE_MB", "0")
    yield
    AgentMemory.shared().close()
    streamlit.cache_resource.clear()


def page(name: str) -> Any:
    script = f"import streamlit as st\nfrom agent_memory_core.demos.ui import {name}\n{name}.show(st)\n"
    return AppTest.from_string(script, default_timeout=120).run()


def press(app: Any, label: str) -> Any:
    app = next(button for button in app.button if button.label == label).click().run()
    assert not app.exception
    return app


def metric(app: Any, label: str) -> float:
    return float(next(each.value for each in app.metric if each.label == label))


def test_the_dilemma_is_played_with_a_restart_between_its_phases() -> None:
    app = page("dilemma")
    for number, label in enumerate(["Room A", "Room B", "The yard", "The reckoning"]):
        app = press(app, f"Run {label}")
        if number == 1:
            app = press(app, "Restart the engine")
    run = app.session_state["dilemma"]
    assert "4821" in run.phases[-1].events[-1].content
    assert run.outcome.payoff
    last = run.phases[-1].stats[-1]
    assert metric(app, "of these computed") == last.new
    assert last.hit_tier in ("hot", "warm")
    assert [each.value for each in app.subheader][-1] == "What each gets"


def test_an_expert_answers_hot_and_after_a_restart() -> None:
    app = page("experts")
    app.selectbox[0].set_value("tides").run()
    app = press(app, "Ask")
    assert any("4092" in each.value for each in app.markdown)
    assert metric(app, "of these computed") < metric(app, "tokens of the prompt") / 4
    app = press(app, "Restart the engine")
    app = press(app, "Ask")
    assert set(app.session_state["times"]) == {"none", "hot", "warm"}


def test_a_session_of_ones_own_talks_and_votes() -> None:
    app = press(page("talk"), "Begin")
    app = press(app, "Next turn")
    app = press(app, "A round")
    app = press(app, "Vote")
    assert any(each.value.startswith("Decided: ") for each in app.markdown)
    assert metric(app, "tokens of the last prompt") > 0


def test_what_is_stored_is_shown_pinned_and_forgotten() -> None:
    AgentMemory.shared().chat("Hello!", session="ada", max_tokens=4)
    app = page("inspector")
    assert metric(app, "sessions") == 1
    app = press(app, "Pin")
    assert AgentMemory.shared().sessions()[0].pinned
    app = press(app, "Check every file")
    assert any("0 damaged" in each.value for each in app.markdown)
    app = press(app, "Forget")
    assert metric(app, "sessions") == 0


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
