"""What sessions promise as a whole: votes are counted right, and nothing is computed twice, also over a restart."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from support.people import FRAME, people, tokens_heard

from agent_memory_core import AgentMemory
from agent_memory_core.coordination import CoordinationService, Decision, Scenario, run_scenario
from agent_memory_core.coordination.scenario import Phase, Prompt

DRINKS = ("tea", "milk", "water")
VOTERS = ("bot", "p1", "p2", "p3", "p4")


def entered(service: CoordinationService, mode: str, votes: Mapping[str, Sequence[str]]) -> Decision:
    """The decision of a session in which everybody's vote was entered, so that no model is asked for a ballot."""
    persons = [{"agent_id": name, "is_human": True} for name in VOTERS[1:]]
    spec = {
        "agents": [{"agent_id": "bot"}, *persons],
        "decision_mode": mode,
        "coordinator": "bot",
        "max_rounds": 1,
        "threshold": 0.6,
        "sampling": {"max_tokens": 1},
    }
    sid = service.create_session(spec).session_id
    service.ask(sid, "What?", DRINKS)
    for name, ranking in votes.items():
        service.vote(sid, name, ranking=ranking)
    decision = service.decide(sid)
    service.delete(sid)
    return decision


def most(votes: Mapping[str, Sequence[str]], among: Sequence[str] = DRINKS) -> list[str]:
    """The choices that most prefer among some, in their order."""
    counts = Counter(next(drink for drink in ranking if drink in among) for ranking in votes.values())
    return [drink for drink in among if counts[drink] == max(counts.values())]


def majority(votes: Mapping[str, Sequence[str]]) -> str | None:
    """Most votes; then a run-off among the leaders; then what the coordinator prefers of those."""
    lead = most(votes)
    lead = most(votes, lead) if len(lead) > 1 else lead
    return lead[0] if len(lead) == 1 else next(drink for drink in votes["bot"] if drink in lead)


def consensus(votes: Mapping[str, Sequence[str]]) -> str | None:
    """The first of the leaders, if three of five want it."""
    proposal = most(votes)[0]
    return proposal if sum(ranking[0] == proposal for ranking in votes.values()) >= 3 else None


def runoff(votes: Mapping[str, Sequence[str]]) -> str | None:
    """The first preferences of what is left, the weakest dropped: by later preferences, then by place."""
    rankings, left = list(votes.values()), list(DRINKS)
    while True:
        orders = [[drink for drink in ranking if drink in left] for ranking in rankings]
        firsts = Counter(order[0] for order in orders)
        if (best := max(left, key=lambda drink: firsts[drink])) and 2 * firsts[best] > len(orders):
            return best
        places = {drink: [sum(o[i] == drink for o in orders) for i in range(len(left))] for drink in left}
        weakest = min(places.values())
        left.remove([drink for drink in left if places[drink] == weakest][-1])


ORACLES: dict[str, Callable[[Mapping[str, Sequence[str]]], str | None]] = {
    "majority_vote": majority,
    "ranked_choice": runoff,
    "consensus": consensus,
    "coordinator_decides": lambda votes: votes["bot"][0],
}


@pytest.mark.parametrize("mode", ORACLES)
def test_two_hundred_random_votes_are_decided_as_an_oracle_does(
    random_service: CoordinationService, mode: str
) -> None:
    rng = random.Random(mode)
    for _ in range(200 // len(ORACLES)):
        votes = {name: rng.sample(DRINKS, len(DRINKS)) for name in VOTERS}
        decision = entered(random_service, mode, votes)
        assert decision.winner == ORACLES[mode](votes), votes
        assert {ballot.agent_id for ballot in decision.ballots} == set(VOTERS)


def test_eight_rounds_over_a_restart_compute_what_was_heard_and_nothing_else(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"cache_dir": tmp_path / "caches", "min_free_mb": 0, "memory_budget_mb": 128}
    spec = {"agents": people("ann", "bob"), "topology": "round_robin", "sampling": {"max_tokens": 8}}
    with AgentMemory(**settings) as memory, CoordinationService(memory) as service:
        sid = service.create_session(spec).session_id
        for _ in range(4):
            service.round(sid)
    with AgentMemory(**settings) as memory, CoordinationService(memory) as service:
        for _ in range(4):
            service.round(sid)
        rows = service.stats(sid)
        heard = tokens_heard(memory, service._stored(sid).book)
    assert [row.hit_tier for row in rows[6:12]] == ["hot", "hot", "warm", "warm", "hot", "hot"]
    later = list(zip(rows, heard, strict=True))[2:]
    assert all(row.new <= tokens + FRAME for row, tokens in later)
    assert {row.miss_reason for row, _ in later} == {""}


def test_a_template_primes_all_agents_that_share_it_before_their_first_word(
    service: CoordinationService,
) -> None:
    prior = [
        {"role": "user", "content": "The code of the garage is 4821."},
        {"role": "assistant", "content": "I will remember that."},
    ]
    question = "What is the code of the garage?"
    phases = tuple(
        Phase(name=name, agents=(name,), prompts=(Prompt(speaker=name, prompt=question),))
        for name in ("ann", "bob")
    )
    scenario = Scenario(
        name="primed",
        templates={"guard": {"prior_messages": prior, "sampling": {"max_tokens": 24}}},
        agents={"ann": {"template": "guard"}, "bob": {"template": "guard"}},
        phases=phases,
    )
    run = run_scenario(scenario, service)
    assert all("4821" in record.events[-1].content for record in run.phases)
