"""Counting, compared with an oracle that counts in another way."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import permutations

import pytest

from agent_memory_core.coordination.ballots import choice_schema, ranking_schema, read
from agent_memory_core.coordination.tallies import (
    Ballot,
    Decision,
    agreed,
    decision_text,
    first_votes,
    folded,
    instant_runoff,
    leaders,
)

CHOICES = ("tea", "milk", "water", "juice")


def ballots_of(rng: random.Random, whole: bool = False) -> list[Ballot]:
    found = []
    for number in range(rng.randint(0, 9)):
        ranking = rng.sample(CHOICES, len(CHOICES))
        found.append(Ballot(f"a{number}", tuple(ranking if whole else ranking[: rng.randint(0, 4)])))
    return found


def oracle(rankings: list[list[str]], choices: Sequence[str]) -> str | None:
    """Instant run-off by recursion over what is left, on lists of preferences."""
    rankings = [[c for c in r if c in choices] for r in rankings]
    rankings = [r for r in rankings if r]
    if not rankings:
        return None
    firsts = [r[0] for r in rankings]
    for choice in choices:
        if firsts.count(choice) * 2 > len(firsts):
            return choice

    def support(choice: str) -> tuple[int, ...]:
        return tuple(sum(len(r) > i and r[i] == choice for r in rankings) for i in range(len(choices)))

    weakest = min(support(choice) for choice in choices)
    dropped = [choice for choice in choices if support(choice) == weakest][-1]
    return oracle(rankings, [choice for choice in choices if choice != dropped])


@pytest.mark.parametrize("seed", range(200))
def test_an_instant_runoff_has_the_winner_of_the_oracle(seed: int) -> None:
    ballots = ballots_of(random.Random(seed))
    winner, tally = instant_runoff(ballots, CHOICES)
    assert winner == oracle([list(ballot.ranking) for ballot in ballots], list(CHOICES))
    assert winner is None or tally[winner] == max(tally.values())


def test_most_votes_lead() -> None:
    for seed in range(200):
        ballots = ballots_of(random.Random(seed))
        firsts = [ballot.ranking[0] for ballot in ballots if ballot.ranking]
        most = max(map(firsts.count, CHOICES))
        assert set(leaders(first_votes(ballots, CHOICES))) == {
            c for c in CHOICES if most and firsts.count(c) == most
        }


def test_a_condorcet_loser_never_wins_and_a_majority_always_does() -> None:
    for seed in range(200):
        ballots = ballots_of(random.Random(seed), whole=True)
        winner, _ = instant_runoff(ballots, CHOICES)
        for choice in CHOICES:
            if sum(ballot.choice == choice for ballot in ballots) * 2 > len(ballots):
                assert winner == choice
        if winner is not None:
            assert any(
                2 * sum(b.ranking.index(winner) < b.ranking.index(other) for b in ballots) >= len(ballots)
                for other in CHOICES
                if other != winner
            )


@pytest.mark.parametrize(
    ("votes", "threshold", "expected"),
    [
        ("yyy", 1, True),
        ("yyn", 1, False),
        ("yyn", 0.6, True),
        ("-yy", 1, True),
        ("---", 0.5, False),
        ("yn", 0.5, True),
    ],
)
def test_a_consensus_needs_all_who_vote_or_a_share_of_them(
    votes: str, threshold: float, expected: bool
) -> None:
    ballots = [Ballot(str(i), () if vote == "-" else (vote,)) for i, vote in enumerate(votes)]
    assert agreed(ballots, "y", threshold) is expected


def test_proposals_that_differ_in_case_and_spaces_are_one() -> None:
    assert folded(["Green  tea", "green tea ", "", "Milk"]) == ["Green tea", "Milk"]


def test_a_ranking_is_any_order_and_a_reason_comes_first() -> None:
    assert ranking_schema(CHOICES, reason=False) == {"enum": [list(order) for order in permutations(CHOICES)]}
    schema = choice_schema(CHOICES, reason=True)
    assert list(schema["properties"]) == ["reason", "choice"]
    assert read('{"reason": "It is hot.", "choice": "tea"}') == ("tea", "It is hot.")
    assert read('["tea", "milk"]') == (["tea", "milk"], "")


def test_agents_are_told_what_was_decided() -> None:
    assert (
        decision_text(Decision("majority_vote", "Drink?", "tea", {"tea": 2, "milk": 1}))
        == "Drink? tea (tea: 2, milk: 1)"
    )
    assert decision_text(Decision("consensus", "Drink?", None)) == "Drink? Nothing was decided."
