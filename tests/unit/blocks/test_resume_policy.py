"""Where a sequence may be resumed: the rule against every token of every block, one by one."""

from __future__ import annotations

from hypothesis import given, strategies as st

from agent_memory_core.blocks.resume_policy import ResumePolicy

policies = st.builds(
    ResumePolicy,
    st.integers(1, 9),
    window=st.integers(0, 30),
    whole=st.booleans(),
    in_blocks=st.booleans(),
    unsupported=st.booleans(),
)


@given(policies, st.integers(0, 60))
def test_a_windows_blocks_are_those_that_hold_one_of_its_tokens(resume: ResumePolicy, position: int) -> None:
    tokens = range(max(0, position - resume.window), position)
    assert list(resume.window_blocks(position)) == sorted({token // resume.block_tokens for token in tokens})


@given(policies)
def test_blocks_and_tails_alone_decide_only_where_every_layer_keeps_every_token(resume: ResumePolicy) -> None:
    assert resume.at_any_token == (resume.window == 0 and not resume.whole and not resume.unsupported)
    assert resume.inside_block or not resume.at_any_token


@given(policies)
def test_a_part_of_a_block_can_be_taken_exactly_where_its_window_part_reaches_back_to_its_start(
    resume: ResumePolicy,
) -> None:
    """A window record holds the end of its block; whoever resumes inside needs every token before that place."""
    size = resume.block_tokens
    kept = range(max(0, size - resume.window), size) if resume.window else range(size)
    suffices = all(
        token in kept for inside in range(1, size + 1) for token in range(inside)[-resume.window :]
    )
    keeps_tokens = not resume.whole and not resume.unsupported
    assert resume.inside_block == (keeps_tokens and (suffices or resume.window == 0))
