"""How a session decides: ballots are asked for, counted, and talked over where they are tied."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from agent_memory_core import InvalidRequest
from agent_memory_core.coordination import ballots as forms, tallies
from agent_memory_core.coordination.books import Draft, Spoken, joined, name_of
from agent_memory_core.coordination.line import Place
from agent_memory_core.coordination.session import Session
from agent_memory_core.coordination.spec import SYSTEM, AgentRole, DecisionMode
from agent_memory_core.coordination.tallies import Ballot, Decision

YES, NO = "yes", "no"
Votes = Mapping[str, Sequence[str]]
"""Rankings that were entered, by agent."""


class Council:
    """One decision of a session.

    Args:
        session: whose line ``place`` is inside of.
        place: where it stands.
        question: what is decided.
        votes: what was entered for agents, which are then not asked.
    """

    def __init__(self, session: Session, place: Place, question: str, votes: Votes) -> None:
        self._session = session
        self._place = place
        self._question = question
        self._votes = votes
        self._spec = session.book().spec
        # A coordinator's decision stays in its view: its cue, and its ballot.
        self._remembered: tuple[str, Ballot] | None = None

    def decide(self, choices: Sequence[str] | None) -> Decision:
        """Decide, and tell all agents."""
        choices = list(choices) if choices is not None else self._proposals()
        if not choices:
            decision = Decision(self._spec.decision_mode, self._question, None)
        else:
            decision = self._rules()[self._spec.decision_mode](choices)
        return self._announced(decision)

    def _rules(self) -> dict[DecisionMode, Callable[[list[str]], Decision]]:
        return {
            "majority_vote": self._majority,
            "ranked_choice": self._ranked,
            "consensus": self._consensus,
            "coordinator_decides": self._coordinator,
        }

    # Rules

    def _majority(self, choices: list[str]) -> Decision:
        cast, rounds = self._ballots(choices), 1
        tally = tallies.first_votes(cast, choices)
        lead = tallies.leaders(tally)
        if len(lead) > 1:
            self._session.talk(self._place)
            cast, rounds = self._ballots(list(lead)), 2
            tally = tallies.first_votes(cast, lead)
            lead = tallies.leaders(tally)
        winner = lead[0] if len(lead) == 1 else self._casting_vote(cast, lead)
        return self._decision(winner, tally, cast, rounds, () if winner is not None else lead)

    def _casting_vote(self, cast: Sequence[Ballot], lead: Sequence[str]) -> str | None:
        coordinator = self._spec.coordinator_id
        return next((b.choice for b in cast if b.agent_id == coordinator and b.choice in lead), None)

    def _ranked(self, choices: list[str]) -> Decision:
        cast = self._rankings(choices)
        winner, tally = tallies.instant_runoff(cast, choices)
        return self._decision(winner, tally, cast)

    def _consensus(self, choices: list[str]) -> Decision:
        proposal = choices[0]
        if len(choices) > 1:
            first = tallies.leaders(tallies.first_votes(self._ballots(choices), choices))
            proposal = first[0] if first else proposal
        for number in range(1, self._spec.max_rounds + 1):
            cast = self._ballots(
                [YES, NO], f"{self._question}\n\nDo you agree to this: {proposal}?", self._agreeing(proposal)
            )
            agreed = tallies.agreed(cast, YES, self._spec.threshold)
            if agreed or number == self._spec.max_rounds:
                break
            for ballot in cast:
                if ballot.choice == NO and ballot.reason:
                    self._session.add("public", ballot.agent_id, ballot.reason)
            self._session.talk(self._place)
        return self._decision(
            proposal if agreed else None, tallies.first_votes(cast, (YES, NO)), cast, number
        )

    def _agreeing(self, proposal: str) -> Votes:
        """Entered votes as answers to a proposal."""
        return {
            agent_id: list(ranking) if ranking[0] in (YES, NO) else [YES if ranking[0] == proposal else NO]
            for agent_id, ranking in self._votes.items()
            if ranking
        }

    def _coordinator(self, choices: list[str]) -> Decision:
        coordinator = self._spec.agent(self._spec.coordinator_id or "")
        others = [agent for agent in self._spec.agents if agent != coordinator]
        cast = self._ballots(choices, among=others)
        if coordinator.agent_id in self._votes or coordinator.is_human:
            last = self._ballots(choices, among=[coordinator])[0]
            return self._decision(last.choice, tallies.first_votes(cast, choices), [*cast, last])
        shown = "\n".join(
            f"{name_of(self._spec, ballot.agent_id)}: {ballot.choice or 'abstained'}. {ballot.reason}".strip()
            for ballot in cast
        )
        cue = joined(self._question, "The others voted:\n" + shown, "You decide.", _one_of(choices))
        last = self._ballots(choices, cue, among=[coordinator])[0]
        decision = self._decision(last.choice, tallies.first_votes(cast, choices), [*cast, last])
        self._remembered = (cue, last)
        return decision

    # Ballots

    def _ballots(
        self,
        choices: list[str],
        cue: str = "",
        votes: Votes | None = None,
        among: Sequence[AgentRole] | None = None,
    ) -> list[Ballot]:
        """One choice of everybody, in the order of the agents."""
        entered = self._votes if votes is None else votes
        schemas = (
            forms.choice_schema(choices, reason=self._spec.reasons),
            forms.choice_schema(choices, reason=False),
        )

        def asked(agents: list[str]) -> dict[str, Ballot]:
            cues = dict.fromkeys(agents, cue or joined(self._question, _one_of(choices)))
            return {
                agent_id: Ballot(agent_id, _ranking([choice] if choice is not None else []), reason, error)
                for agent_id, (choice, reason, error) in self._session.votes(
                    self._session.book(), cues, *schemas
                ).items()
            }

        return self._cast(choices, entered, asked, self._spec.agents if among is None else among)

    def _rankings(self, choices: list[str]) -> list[Ballot]:
        return self._cast(
            choices, self._votes, lambda agents: self._ranked_by(agents, choices), self._spec.agents
        )

    def _ranked_by(self, agents: list[str], choices: list[str]) -> dict[str, Ballot]:
        """Orders of preference. Of many choices the first ones are picked one by one, until few are left."""
        picked: dict[str, list[str]] = {agent_id: [] for agent_id in agents}
        reasons: dict[str, str] = {}
        errors: dict[str, str] = {}
        while going := [a for a in agents if a not in errors and len(picked[a]) < len(choices)]:
            for agent_id in going:
                left = [choice for choice in choices if choice not in picked[agent_id]]
                answer, reason, error = self._next_pick(agent_id, left, picked[agent_id])
                picked[agent_id] += answer
                reasons.setdefault(agent_id, reason)
                if error:
                    errors[agent_id] = error
        return {
            a: Ballot(
                a, _ranking(picked[a]) if a not in errors else (), reasons.get(a, ""), errors.get(a, "")
            )
            for a in agents
        }

    def _next_pick(self, agent_id: str, left: list[str], picked: list[str]) -> tuple[list[str], str, str]:
        few = len(left) <= forms.MAX_PERMUTED
        schema = forms.ranking_schema if few else forms.choice_schema
        so_far = f"You ranked so far: {', '.join(picked)}." if picked else ""
        ask = "Rank all of these, the best first" if few else "Choose the best of these"
        cue = joined(self._question, so_far, f"{ask}: {', '.join(left)}.")
        book = self._session.book()
        found = self._session.votes(
            book,
            {agent_id: cue},
            schema(left, reason=self._spec.reasons and not picked),
            schema(left, reason=False),
        )
        answer, reason, error = found[agent_id]
        if error:
            return [], reason, error
        return (list(answer) if few else [answer]), reason, ""

    def _cast(
        self,
        choices: Sequence[str],
        entered: Votes,
        ask: Callable[[list[str]], dict[str, Ballot]],
        among: Sequence[AgentRole],
    ) -> list[Ballot]:
        given = {
            agent_id: Ballot(agent_id, _ranking([choice for choice in ranking if choice in choices]))
            for agent_id, ranking in entered.items()
        }
        models = [agent.agent_id for agent in among if not agent.is_human and agent.agent_id not in given]
        found = given | ask(models)
        absent = "it is a person, and entered no vote."
        return [found.get(agent.agent_id) or Ballot(agent.agent_id, error=absent) for agent in among]

    def _proposals(self) -> list[str]:
        """What the agents propose, and what was entered."""
        cue = joined(self._question, "Propose one answer, in a few words.")
        agents = [agent.agent_id for agent in self._spec.speakers if agent.agent_id not in self._votes]
        found = self._session.votes(self._session.book(), dict.fromkeys(agents, cue), forms.proposal_schema())
        entered = [ranking[0] for ranking in self._votes.values() if ranking]
        proposals = tallies.folded([*entered, *(str(text) for text, _, error in found.values() if not error)])
        if proposals:
            self._session.add("system", SYSTEM, f"{self._question} Proposed: {', '.join(proposals)}.")
        return proposals

    # The end

    def _decision(
        self,
        winner: str | None,
        tally: Mapping[str, int],
        cast: Sequence[Ballot],
        rounds: int = 1,
        tied: tuple[str, ...] = (),
    ) -> Decision:
        return Decision(self._spec.decision_mode, self._question, winner, tally, tuple(cast), rounds, tied)

    def _announced(self, decision: Decision) -> Decision:
        draft = Draft(self._session.book())
        upto = len(draft.book.events)
        event = draft.add("decision", SYSTEM, tallies.decision_text(decision))
        if self._remembered is not None:
            cue, ballot = self._remembered
            said = f"{ballot.reason} {ballot.choice or ''}".strip()
            draft.spoken.append(Spoken(ballot.agent_id, upto, cue, said, event.seq, is_turn=False))
        self._session.keep(draft)
        self._session.note("decision", dataclasses.asdict(decision))
        return decision


def checked_choices(choices: Sequence[str]) -> list[str]:
    """Choices that can be voted on.

    Raises:
        InvalidRequest: there is none, one is empty, or two are equal.
    """
    found = list(choices)
    if not found or not all(isinstance(choice, str) and choice.strip() for choice in found):
        raise InvalidRequest(f"choices={found!r} is not valid: a list of texts that are not empty.")
    if len(set(found)) < len(found):
        raise InvalidRequest(f"choices={found!r} is not valid: two of them are equal.")
    return found


def checked_vote(vote: Sequence[Any], choices: Sequence[str] | None) -> list[str]:
    """A vote that can be counted; `ballots.ABSTAIN` is none.

    Raises:
        InvalidRequest: it names what is no choice, or a choice twice.
    """
    ranking = [str(choice) for choice in vote if choice != forms.ABSTAIN]
    unknown = [choice for choice in ranking if choices is not None and choice not in choices]
    if unknown or len(set(ranking)) < len(ranking):
        raise InvalidRequest(
            f"the vote {list(vote)!r} is not valid: each of {list(choices or ())} at most once."
        )
    return ranking


def _one_of(choices: Sequence[str]) -> str:
    return f"Choose one of: {', '.join(choices)}."


def _ranking(choices: Sequence[str]) -> tuple[str, ...]:
    """A ballot's ranking: empty where the first choice is to abstain."""
    return () if choices[:1] == [forms.ABSTAIN] else tuple(choices)
