"""Where a sequence may be resumed: the policy against every token of every block, one by one."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given, strategies as st

from agent_memory_core.blocks.resume_policy import (
    EveryToken,
    LastTokens,
    ResumePolicy,
    ResumeRequirement,
    WholeState,
)

requirements: st.SearchStrategy[ResumeRequirement] = st.one_of(
    st.just(EveryToken()), st.builds(LastTokens, st.integers(0, 30)), st.just(WholeState())
)
policies = st.builds(
    ResumePolicy,
    st.integers(1, 9),
    st.lists(requirements, max_size=4).map(tuple),
    unsupported=st.booleans(),
)


def windows(policy: ResumePolicy) -> list[int]:
    return [r.tokens for r in policy.requirements if isinstance(r, LastTokens) and r.tokens]


def has_state(policy: ResumePolicy) -> bool:
    return WholeState() in policy.requirements


@given(policies, st.integers(0, 60))
def test_the_window_blocks_of_a_place_are_those_that_hold_a_token_of_the_longest_window(
    policy: ResumePolicy, position: int
) -> None:
    tokens = range(max(0, position - max(windows(policy), default=0)), position)
    assert list(policy.window_blocks(position)) == sorted({token // policy.block_tokens for token in tokens})
    assert policy.has_windows == bool(windows(policy))


@given(policies, st.lists(st.integers(0, 60), max_size=4))
def test_the_windows_near_several_places_are_those_of_each(policy: ResumePolicy, places: list[int]) -> None:
    each = [set(policy.window_blocks(place)) for place in places]
    assert policy.windows_near(places) == set().union(*each)


@given(policies)
def test_blocks_and_tails_alone_decide_only_if_every_layer_keeps_every_token(policy: ResumePolicy) -> None:
    assert policy.at_any_token == (not windows(policy) and not has_state(policy) and not policy.unsupported)
    assert policy.inside_block or not policy.at_any_token


@given(policies)
def test_a_part_of_a_block_can_be_taken_exactly_if_all_window_records_reach_back_to_its_start(
    policy: ResumePolicy,
) -> None:
    """A window record holds the end of its block; to resume inside it takes every token before that place."""
    size = policy.block_tokens

    def suffices(window: int) -> bool:
        held = range(max(0, size - window), size)
        return all(token in held for inside in range(1, size + 1) for token in range(inside)[-window:])

    can_be_cut = not has_state(policy) and not policy.unsupported
    assert policy.inside_block == (can_be_cut and all(map(suffices, windows(policy))))


@given(policies)
def test_a_state_can_be_resumed_nowhere_but_at_a_tail(policy: ResumePolicy) -> None:
    assert policy.at_block_ends == (not has_state(policy) and not policy.unsupported)


@given(policies)
def test_blocks_hold_something_exactly_if_some_layer_keeps_every_token(policy: ResumePolicy) -> None:
    assert policy.in_blocks == (EveryToken() in policy.requirements)


@dataclass(frozen=True)
class AllInWindows:
    """A requirement that no module knows: all tokens from window records, and only at the ends of blocks."""

    in_blocks = False
    at_block_ends = True

    def inside_block(self, block_tokens: int) -> bool:
        return False

    def window_start(self, position: int) -> int:
        return 0


def test_a_requirement_of_a_new_kind_is_obeyed_like_the_others() -> None:
    policy = ResumePolicy(4, (EveryToken(), AllInWindows(), LastTokens(2)))
    assert not policy.inside_block
    assert policy.at_block_ends
    assert list(policy.window_blocks(9)) == [0, 1, 2]
