"""Where a sequence may be resumed: the rule against every token of every block, one by one."""

from __future__ import annotations

from hypothesis import given, strategies as st

from agent_memory_core.blocks.resume_policy import ResumePolicy

rules = st.builds(
    ResumePolicy,
    st.integers(1, 9),
    window=st.integers(0, 30),
    whole=st.booleans(),
    in_blocks=st.booleans(),
    never=st.booleans(),
)


@given(rules, st.integers(0, 60))
def test_a_windows_blocks_are_those_that_hold_one_of_its_tokens(resume: ResumePolicy, position: int) -> None:
    tokens = range(max(0, position - rule.window), position)
    assert list(rule.window_blocks(position)) == sorted({token // rule.block_tokens for token in tokens})


@given(rules)
def test_blocks_and_tails_alone_decide_only_where_every_layer_keeps_every_token(resume: ResumePolicy) -> None:
    assert rule.at_any_token == (rule.window == 0 and not rule.whole and not rule.unsupported)
    assert rule.inside_block or not rule.at_any_token


@given(rules)
def test_a_part_of_a_block_can_be_taken_exactly_where_its_window_part_reaches_back_to_its_start(
    resume: ResumePolicy,
) -> None:
    """A window record holds the end of its block; whoever resumes inside needs every token before that place."""
    size = resume.block_tokens
    kept = range(max(0, size - rule.window), size) if rule.window else range(size)
    suffices = all(token in kept for inside in range(1, size + 1) for token in range(inside)[-rule.window :])
    keeps_tokens = not rule.whole and not rule.unsupported
    assert rule.inside_block == (keeps_tokens and (suffices or rule.window == 0))
