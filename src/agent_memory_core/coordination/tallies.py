"""How ballots become a decision: plain counting."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from agent_memory_core.coordination.spec import DecisionMode


@dataclass(frozen=True, slots=True)
class Ballot:
    """What one agent voted."""

    agent_id: str
    ranking: tuple[str, ...] = ()
    """Its choices, the first preference first; empty: it abstained."""
    reason: str = ""
    """Why, in its own words."""
    error: str = ""
    """Why there is no vote, where the model could not give one."""

    @property
    def choice(self) -> str | None:
        """Its first preference."""
        return self.ranking[0] if self.ranking else None


@dataclass(frozen=True, slots=True)
class Decision:
    """How a question was decided."""

    mode: DecisionMode
    question: str
    winner: str | None
    """None where nothing was decided."""
    tally: Mapping[str, int] = field(default_factory=dict)
    """Votes for each choice, in the last count; for a consensus, who agreed and who did not."""
    ballots: tuple[Ballot, ...] = ()
    """Those of the last round."""
    rounds: int = 1
    """How often it was voted."""
    tied: tuple[str, ...] = ()
    """The choices with equally many votes, where nobody decided between them."""


def first_votes(ballots: Sequence[Ballot], choices: Sequence[str]) -> dict[str, int]:
    """How many ballots prefer each choice, in the order of the choices."""
    votes = Counter(ballot.choice for ballot in ballots)
    return {choice: votes[choice] for choice in choices}


def leaders(tally: Mapping[str, int]) -> tuple[str, ...]:
    """The choices with the most votes; none where nobody voted."""
    most = max(tally.values(), default=0)
    return tuple(choice for choice, votes in tally.items() if votes == most) if most else ()


def instant_runoff(ballots: Sequence[Ballot], choices: Sequence[str]) -> tuple[str | None, dict[str, int]]:
    """The winner of ranked ballots, and its last count.

    While no choice has more than half of the first preferences, the one with the fewest is dropped. Of several it is
    the one that fewer prefer second, then third and so on; then the last in the order of the choices.
    """
    left = list(choices)
    while left:
        rankings = [[choice for choice in ballot.ranking if choice in left] for ballot in ballots]
        rankings = [ranking for ranking in rankings if ranking]
        counts = [
            Counter(ranking[place] for ranking in rankings if place < len(ranking))
            for place in range(len(left))
        ]
        tally = {choice: counts[0][choice] for choice in left}
        winner = next((choice for choice in left if 2 * tally[choice] > len(rankings)), None)
        if winner is not None or not rankings:
            return winner, tally
        strengths = {choice: [count[choice] for count in counts] for choice in left}
        left.remove(min(reversed(left), key=strengths.__getitem__))
    return None, {}


def agreed(ballots: Sequence[Ballot], yes: str, threshold: float) -> bool:
    """Whether enough of those who voted agree; 1 means all of them."""
    votes = [ballot.choice for ballot in ballots if ballot.ranking]
    return bool(votes) and votes.count(yes) >= threshold * len(votes)


def folded(proposals: Sequence[str]) -> list[str]:
    """Proposals without those that differ from an earlier one in upper and lower case or spaces only."""
    found: dict[str, str] = {}
    for proposal in proposals:
        if text := " ".join(proposal.split()):
            found.setdefault(text.casefold(), text)
    return list(found.values())


def decision_text(decision: Decision) -> str:
    """A decision as the agents are told of it."""
    votes = ", ".join(f"{choice}: {count}" for choice, count in decision.tally.items())
    counted = f" ({votes})" if votes else ""
    if decision.winner is not None:
        return f"{decision.question} {decision.winner}{counted}"
    return f"{decision.question} Nothing was decided{counted}."
