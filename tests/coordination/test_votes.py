"""Ballots on the real engine: their form is certain, whatever a model wants to say, and nothing of them stays."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import pytest
from support.people import people

from agent_memory_core import AgentMemory, InvalidRequest
from agent_memory_core.coordination import CoordinationService, InvalidTurn

DRINKS = ["tea", "milk", "water"]


def session_of(service: CoordinationService, mode: str, names: str = "ann bob cyd", **fields: Any) -> str:
    spec = {"agents": people(*names.split()), "decision_mode": mode, "sampling": {"max_tokens": 8}, **fields}
    return service.create_session(spec).session_id


def test_two_dozen_ballots_of_a_random_model_are_legal(random_service: CoordinationService) -> None:
    names = " ".join(f"a{number}" for number in range(12))
    sid = session_of(random_service, "majority_vote", names, ends_on_decision=False)
    for choices in (DRINKS, ["left", "right"]):
        decision = random_service.decide(sid, "What?", choices)
        assert len(decision.ballots) == 12
        assert all(ballot.choice in choices and not ballot.error for ballot in decision.ballots)


@pytest.mark.parametrize("count", [3, 6])
def test_rankings_of_a_random_model_are_legal(random_service: CoordinationService, count: int) -> None:
    choices = [*DRINKS, "juice", "coffee", "cocoa"][:count]
    decision = random_service.decide(
        session_of(random_service, "ranked_choice", reasons=count > 3), "What?", choices
    )
    assert all(ballot.ranking in permutations(choices) for ballot in decision.ballots)
    assert decision.winner in choices


def test_a_vote_leaves_a_session_as_it_was(memory: AgentMemory, service: CoordinationService) -> None:
    sid = session_of(service, "majority_vote", ends_on_decision=False)
    service.round(sid)

    def state() -> dict[str, Any]:
        mine = [info.session_id for info in memory.sessions() if sid in info.session_id]
        return {name: [(b.branch_id, b.tokens) for b in memory.branches(name)] for name in sorted(mine)}

    before, said = state(), service.messages(sid)
    assert len(before) == 3
    service.choose(sid, "ann", "What?", DRINKS)
    assert state() == before
    assert service.messages(sid) == said
    decision = service.decide(sid, "What?", ["tea", "abstain"])
    if decision.rounds == 1:
        assert state() == before
    assert [event.kind for event in service.messages(sid)][-1] == "decision"
    service.round(sid)
    assert {row.miss_reason for row in service.stats(sid)[-3:]} == {""}


def test_entered_votes_count_and_the_last_one_wins(service: CoordinationService) -> None:
    agents = [{"agent_id": name, "is_human": True} for name in ("me", "you", "they")]
    sid = session_of(service, "majority_vote", agents=[*people("bot"), *agents])
    service.ask(sid, "What?", DRINKS)
    for who, choice in (("me", "milk"), ("me", "tea"), ("you", "tea"), ("bot", "water")):
        service.vote(sid, who, choice)
    assert service.get(sid).question == "What?"
    decision = service.decide(sid)
    assert (decision.winner, decision.rounds, decision.tied) == ("tea", 1, ())
    assert dict(decision.tally) == {"tea": 2, "milk": 0, "water": 1}
    assert [ballot.choice for ballot in decision.ballots] == ["water", "tea", "tea", None]
    assert "entered no vote" in decision.ballots[3].error
    assert service.stats(sid, "ballot") == []
    assert service.decisions(sid)[0]["winner"] == "tea"
    assert not service.get(sid).is_active


def voted(service: CoordinationService, mode: str, votes: dict[str, str], **fields: Any) -> Any:
    """The decision of a session in which all votes were entered."""
    sid = session_of(service, mode, **fields)
    service.ask(sid, "What?", DRINKS)
    for who, vote in votes.items():
        service.vote(sid, who, ranking=vote.split())
    return service.decide(sid)


def test_a_tie_is_talked_over_and_then_decided_by_the_coordinator(service: CoordinationService) -> None:
    votes = {"ann": "tea", "bob": "milk"}
    tied = voted(service, "majority_vote", votes, names="ann bob")
    assert (tied.winner, tied.rounds, tied.tied) == (None, 2, ("tea", "milk"))
    decided = voted(service, "majority_vote", votes, names="ann bob", coordinator="bob")
    assert (decided.winner, decided.tied) == ("milk", ())


def test_an_instant_runoff_counts_later_preferences(service: CoordinationService) -> None:
    votes = {"ann": "tea milk water", "bob": "water milk tea", "cyd": "milk water tea"}
    assert voted(service, "ranked_choice", votes).winner == "milk"


def test_a_consensus_is_tried_again_and_objections_are_heard(service: CoordinationService) -> None:
    votes = {"ann": "tea", "bob": "tea", "cyd": "milk"}
    failed = voted(service, "consensus", votes, max_rounds=2)
    assert (failed.winner, failed.rounds, dict(failed.tally)) == (None, 2, {"yes": 2, "no": 1})
    assert voted(service, "consensus", votes, threshold=0.6).winner == "tea"


def test_a_coordinator_sees_the_ballots_and_remembers_its_decision(
    memory: AgentMemory, service: CoordinationService
) -> None:
    sid = session_of(service, "coordinator_decides", coordinator="ann", ends_on_decision=False, reasons=False)
    decision = service.decide(sid, "What?", DRINKS)
    assert [ballot.agent_id for ballot in decision.ballots] == ["bob", "cyd", "ann"]
    assert decision.winner == decision.ballots[-1].choice in DRINKS
    book = service._stored(sid).book
    assert book.spoken[-1].said == decision.winner
    assert f"bob: {decision.ballots[0].choice}" in book.spoken[-1].cue
    assert service.get(sid).turn == 0
    service.round(sid)


def test_agents_propose_where_nothing_is_given(random_service: CoordinationService) -> None:
    sid = session_of(random_service, "majority_vote", reasons=False)
    decision = random_service.decide(sid, "What?")
    assert 1 <= len(decision.tally) <= 3
    assert all(len(proposal) <= 80 for proposal in decision.tally)


@pytest.mark.parametrize(
    ("choices", "says"),
    [([], "texts that are not empty"), (["a", ""], "not empty"), (["a", "a"], "are equal")],
)
def test_choices_that_cannot_be_are_refused(
    service: CoordinationService, choices: list[str], says: str
) -> None:
    with pytest.raises(InvalidRequest, match=says):
        service.decide(session_of(service, "majority_vote"), "What?", choices)


def test_votes_that_cannot_be_are_refused(service: CoordinationService) -> None:
    sid = session_of(service, "majority_vote")
    with pytest.raises(InvalidTurn, match="no question is open"):
        service.vote(sid, "ann", "tea")
    with pytest.raises(InvalidTurn, match="no question is open"):
        service.decide(sid)
    service.ask(sid, "What?", DRINKS)
    for ranking in (["cocoa"], ["tea", "tea"]):
        with pytest.raises(InvalidRequest, match="is not valid"):
            service.vote(sid, "ann", ranking=ranking)
    with pytest.raises(InvalidTurn, match="decides nothing"):
        service.decide(session_of(service, "none"), "What?", DRINKS)
