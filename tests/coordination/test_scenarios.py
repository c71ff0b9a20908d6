"""Scenarios on the real engine, with a real kill between their phases."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.people import FRAME, tokens_heard

from agent_memory_core import AgentMemory, InvalidRequest
from agent_memory_core.coordination import (
    CoordinationService,
    Scenario,
    Transcript,
    load_scenario,
    route,
    run_scenario,
)
from agent_memory_core.coordination.scenario import Phase, Routing

PROGRAM = """
import os, sys
from pathlib import Path
from agent_memory_core import AgentMemory
from agent_memory_core.coordination import CoordinationService, Transcript, load_scenario, run_phase

folder, count = Path(sys.argv[1]), int(sys.argv[2])
scenario = load_scenario("prisoners_dilemma")
scenario = scenario.model_copy(update={"sampling": {**scenario.sampling, "max_tokens": 24}})
kept = folder / "transcript.json"
run = Transcript.model_validate_json(kept.read_text()) if kept.exists() else Transcript(scenario=scenario.name)
memory = AgentMemory(cache_dir=folder / "caches", min_free_mb=0)
service = CoordinationService(memory)
for phase in scenario.phases[len(run.phases):len(run.phases) + count]:
    run = run_phase(scenario, service, phase, run)
kept.write_text(run.model_dump_json())
print("done", flush=True)
sys.stdin.read()
"""
"""Runs some phases, and then waits to be killed."""


def run_and_kill(folder: Path, phases: int) -> None:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("AGENT_MEMORY_")}
    command = [sys.executable, "-c", PROGRAM, str(folder), str(phases)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environ
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "done\n"
        process.kill()


@pytest.fixture(scope="module")
def killed_twice(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a dilemma that ran in two processes, each killed with SIGKILL after some phases."""
    folder = tmp_path_factory.mktemp("dilemma")
    run_and_kill(folder, 2)
    run_and_kill(folder, 3)
    return folder


def test_a_secret_of_the_first_phase_is_known_in_the_last_one_after_a_kill(killed_twice: Path) -> None:
    run = Transcript.model_validate_json((killed_twice / "transcript.json").read_text())
    assert [record.name for record in run.phases] == ["room_a", "room_b", "yard", "offer", "reckoning"]
    assert "4821" in run.phases[-1].events[-1].content
    assert "4821" not in str(run.phases[1].events)


def test_every_turn_after_an_agents_first_computes_what_it_heard_over_kills_too(
    memory: AgentMemory, killed_twice: Path
) -> None:
    run = Transcript.model_validate_json((killed_twice / "transcript.json").read_text())
    seen: set[str] = set()
    with CoordinationService(memory, killed_twice / "caches" / "coordination.db") as service:
        for record in run.phases:
            heard = tokens_heard(memory, service._stored(record.session_id).book)
            for row, tokens in zip(record.stats, heard, strict=True):
                assert row.agent_id not in seen or row.new <= tokens + FRAME, (record.name, row)
                seen.add(row.agent_id)


def test_the_choices_are_certain_in_form_and_the_payoff_is_looked_up(killed_twice: Path) -> None:
    run = Transcript.model_validate_json((killed_twice / "transcript.json").read_text())
    assert run.outcome is not None
    assert set(run.outcome.choices) == {"marco", "danny"}
    assert set(run.outcome.choices.values()) <= {"silent", "confess"}
    cell = ", ".join(str(choice) for choice in run.outcome.choices.values())
    assert run.outcome.payoff == load_scenario("prisoners_dilemma").payoff[cell]


def test_what_is_told_by_a_template_reaches_one_agent(killed_twice: Path) -> None:
    run = Transcript.model_validate_json((killed_twice / "transcript.json").read_text())
    told = [event for event in run.phases[-1].events if event.content.startswith("In the yard Marco said")]
    assert [event.visible_to for event in told] == [frozenset({"warden"})]
    assert run.said("yard", "marco") in told[0].content
    with pytest.raises(InvalidRequest, match="is not over"):
        Transcript(scenario="x").said("yard", "marco")


def test_a_phase_that_was_cut_short_is_run_again(service: CoordinationService) -> None:
    phases = tuple(Phase(name=name, agents=("ann",), auto_rounds=1) for name in ("one", "two"))
    ann = {"lifecycle": "permanent", "sampling": {"max_tokens": 8}}
    scenario = Scenario(name="short", agents={"ann": ann}, phases=phases)
    left = service.create_session({"agents": [scenario.role("ann")], "persistent_cache_prefix": "short"})
    service.say(left.session_id, "guide", "The code of the garage is 4821.")
    run = run_scenario(scenario, service)
    assert not service.get(left.session_id).is_active
    assert [len(record.events) for record in run.phases] == [1, 1]
    book = service._stored(run.phases[0].session_id).book
    assert "4821" in str(book.minds["ann"].waiting)
    assert run_scenario(scenario, service, transcript=run) == run


def test_experts_know_their_articles_after_a_restart(tmp_path: Path) -> None:
    scenario = load_scenario("routing")
    names = ("router", "tides", "bees")
    spec = {
        "agents": [scenario.role(name) for name in names],
        "topology": "whisper",
        "persistent_cache_prefix": "library",
        "reasons": False,
        "sampling": {"max_tokens": 24},
    }
    settings: dict[str, Any] = {"cache_dir": tmp_path / "caches", "min_free_mb": 0}
    with AgentMemory(**settings) as memory, CoordinationService(memory) as service:
        sid = service.create_session(spec).session_id
        read = ["router", "tides"]
        cost = service.prime(sid, read)
        assert set(cost) == set(read)
    with AgentMemory(**settings) as memory, CoordinationService(memory) as service:
        harbour = Routing(router="router", experts=("tides",))
        expert, answer = route(service, sid, harbour, "What is the code of the harbour?")
        assert (expert, "4092" in answer) == ("tides", True)
        row = service.stats(sid)[0]
        assert row.hit_tier == "warm"
        assert row.cache_read >= 0.95 * cost["tides"].usage.prompt_tokens
        both = Routing(router="router", experts=("tides", "bees"))
        assert route(service, sid, both, "What is the code of the hive?")[0] in both.experts
    with AgentMemory(cache_dir=None) as memory, CoordinationService(memory) as service:
        sid = service.create_session(spec).session_id
        service.turn(sid, speaker="tides", to="router", prompt="What is the code of the harbour?")
        assert service.stats(sid)[0].cache_read == 0


SMALL: dict[str, Any] = {
    "name": "small",
    "agents": {"ann": {}},
    "phases": [{"name": "one", "agents": ["ann"]}],
}


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"phases": [{"name": "one", "agents": ["bob"]}]}, "'bob' is no agent"),
        ({"agents": {"ann": {"template": "kind"}}}, "'kind' is no template"),
        ({"phases": [{"name": "one", "agents": ["ann"], "initial_prompt": "${two}"}]}, "is not valid: write"),
        (
            {"phases": [{"name": "one", "agents": ["ann"], "initial_prompt": "${two.messages[ann]}"}]},
            "'two' is not over",
        ),
    ],
)
def test_a_scenario_that_cannot_be_run_says_why(
    service: CoordinationService, fields: dict[str, Any], says: str
) -> None:
    with pytest.raises(InvalidRequest, match=says):
        run_scenario(Scenario(**{**SMALL, **fields}), service)


@pytest.mark.parametrize("text", ["", "[", "agents: 3", "agents: {ann: {reads: nothing.md}}"])
def test_a_file_that_is_no_scenario_says_so(tmp_path: Path, text: str) -> None:
    (tmp_path / "wrong.yaml").write_text(text)
    with pytest.raises(InvalidRequest, match="cannot be read"):
        load_scenario(tmp_path / "wrong.yaml")
    with pytest.raises(InvalidRequest, match="cannot be read"):
        load_scenario("nothing")
